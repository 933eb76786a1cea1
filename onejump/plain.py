"""A training step in the plain way of the public code: the baseline of `onejump bench --vs plain`.

The mathematics, the random numbers and the dropout masks are those of our step, so that losses agree. Plain is how it
is computed: eagerly, on contiguous maps; biases added after the convolutions, maps resampled by grouped convolutions,
attention with its matrix (DDPM++; other networks run as they are, eagerly); targets by every network on the whole
batch; gradients checked, weights updated and averaged parameter by parameter, and the loss looked at in every step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, silu

from onejump.config import Recipe, Stage
from onejump.draws import normal_like
from onejump.losses import pseudo_huber
from onejump.methods.base import Nets, boundary_count, diffuse, dropout_key
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel, beside
from onejump.networks.layers import label_vectors
from onejump.networks.song_unet import SQRT_HALF, Block, SongUNet
from onejump.networks.unet_parts import double
from onejump.optim import RAdam
from onejump.types import Cond, DropoutKey, Samples, Times, UserError


def has_plain_form(stage: Stage) -> bool:
    return isinstance(stage.method, ECT | TCM)


def check_plain(recipe: Recipe) -> None:
    """Raises UserError if no stage has a plain form."""
    if not any(has_plain_form(stage) for stage in recipe.stages.values()):
        kinds = ", ".join(type(stage.method).__name__ for stage in recipe.stages.values())
        raise UserError(f"--vs plain: ECT and TCM have a plain form, {kinds} has none; time it without --vs")


@dataclass(frozen=True)
class PlainStep:
    """Loss, gradients, update and average of one step. after(part): called when "backward" or "optimiser" is done."""

    stage: Stage
    nets: Nets
    ema: ConsistencyModel
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, stage: Stage, nets: Nets, ema: ConsistencyModel) -> "PlainStep":
        for model in (nets.student, *nets.frozen):
            if isinstance(model.net, SongUNet) and model.net.config.variant == "ddpmpp" and not model.second_time:
                model.through(PlainSongUNet(model.net))
        kind = torch.optim.RAdam if isinstance(stage.optimizer, RAdam) else torch.optim.Adam
        parameters = list(nets.student.parameters())
        betas, eps = stage.optimizer.betas, stage.optimizer.eps
        return cls(stage, nets, ema, kind(parameters, lr=0.0, betas=betas, eps=eps, foreach=False))

    def __call__(self, x0: Samples, cond: Cond, step: int, after: Callable[[str], None]) -> float:
        """Returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(x0, cond, step)
        loss.backward()
        after("backward")
        parameters = list(self.nets.student.parameters())
        for p in parameters:
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
        if math.isfinite(self.stage.clip):
            nn.utils.clip_grad_norm_(parameters, self.stage.clip, foreach=False)
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.rate.rate(step, 0.0)
        self.optimizer.step()
        after("optimiser")
        beta = self.stage.ema.decay(step + 1)
        with torch.no_grad():
            for average, p in zip(self.ema.parameters(), parameters, strict=True):
                average.copy_(p.lerp(average, beta))
        return loss.item()

    def loss(self, x0: Samples, cond: Cond, step: int) -> Tensor:
        method = self.stage.method
        assert isinstance(method, ECT | TCM)
        return self.ect(method, x0, cond, step) if isinstance(method, ECT) else self.tcm(method, x0, cond, step)

    def ect(self, method: ECT, x0: Samples, cond: Cond, step: int) -> Tensor:
        """The target is computed at every r, and thrown away where r = 0."""
        t = beside(method.times(len(x0), method.t_min, method.t_max).to(x0.dtype), x0)
        r, eps, key = method.delta.r(t, step), normal_like(x0), dropout_key(x0)
        student, sigma_min = self.nets.student, self.nets.student.jump.sigma_min
        ft = student(diffuse(x0, eps, t), t, cond=cond, key=key)
        xr = diffuse(x0, eps, r)
        with torch.no_grad():
            fr = torch.where((r > sigma_min)[:, None, None, None], student(xr, r, cond=cond, key=key), xr)
        return (method.weight(t, r) * pseudo_huber(ft, fr, method.c)).mean()

    def tcm(self, method: TCM, x0: Samples, cond: Cond, step: int) -> Tensor:
        """Both target networks at every r; one of the two is thrown away."""
        n_b = boundary_count(len(x0), method.rho)
        at_boundary = torch.arange(len(x0)) < n_b
        t = method.times(len(x0), method.t_prime, method.t_max).to(x0.dtype).masked_fill(at_boundary, method.t_prime)
        r = method.delta.r(t, step)
        below = beside(at_boundary | (r < method.t_prime), x0)
        t, r, eps, key = beside(t, x0), beside(r, x0), normal_like(x0), dropout_key(x0)
        ft, xr = self.nets.student(diffuse(x0, eps, t), t, cond=cond, key=key), diffuse(x0, eps, r)
        with torch.no_grad():
            frozen = self.nets.frozen[0](xr, r, cond=cond, key=key)
            fr = torch.where(below[:, None, None, None], frozen, self.nets.student(xr, r, cond=cond, key=key))
        loss = method.weight(t, r) * pseudo_huber(ft, fr, method.c)
        return loss[n_b:].mean() + method.w_b * loss[:n_b].mean()


class PlainSongUNet(nn.Module):
    """DDPM++ operation by operation, on the weights of ours."""

    def __init__(self, net: SongUNet):
        super().__init__()
        self.net = net

    def forward(
        self, x: Samples, c_noise: Times, c_noise_s: Times | None, cond: Cond = None, key: DropoutKey = None
    ) -> Samples:
        net = self.net
        emb = net.embed(c_noise, label_vectors(cond, net.config.label_dim, x, net.config.augment_dim))
        first, *blocks = net.enc.values()
        kept = [plain_conv(first, x)]
        for block in blocks:
            kept.append(plain_block(block, kept[-1], emb, key))
        *decoder, (_, norm), (_, last) = net.dec.items()
        x = kept[-1]
        for name, block in decoder:
            x = torch.cat([x, kept.pop()], dim=1) if "_block" in name else x
            x = plain_block(block, x, emb, key)
        return plain_conv(last, silu(norm(x)))


def plain_block(block: nn.Module, x: Tensor, emb: Tensor, key: DropoutKey) -> Tensor:
    assert isinstance(block, Block)
    up, down = block.resample is double, block.resample is not None and block.resample is not double
    h = plain_conv(block.conv0, silu(block.norm0(x)), up, down)
    h = silu(block.norm1(h.add_(block.affine(emb)[:, :, None, None])))
    h = plain_conv(block.conv1, block.dropout(h, key))
    x = h.add_(x if isinstance(block.skip, nn.Identity) else plain_conv(block.skip, x, up, down)) * SQRT_HALF
    if not block.attention:
        return x
    q, k, v = plain_conv(block.qkv, block.norm2(x)).unflatten(1, (-1, 3)).flatten(3).unbind(2)
    attention = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(q.shape[1])).float().softmax(dim=2).to(q.dtype)
    a = torch.einsum("bqk,bck->bcq", attention, v).reshape(x.shape)
    return plain_conv(block.proj, a).add_(x) * SQRT_HALF


def plain_conv(layer: nn.Module, x: Tensor, up: bool = False, down: bool = False) -> Tensor:
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    c = x.shape[1]
    f = torch.full((c, 1, 2, 2), 0.25, dtype=x.dtype, device=x.device)
    if up:
        x = conv_transpose2d(x, 4 * f, stride=2, groups=c)
    if down:
        x = conv2d(x, f, stride=2, groups=c)
    x = conv2d(x, layer.weight, padding=layer.padding)
    return x.add_(layer.bias.to(x.dtype).view(1, -1, 1, 1))
