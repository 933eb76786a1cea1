"""The update that follows a backward pass: guard, clip, optimiser, averages, all weights at once.

The kernels are those of torch's fused optimisers, which read and write each number once and take their verdict on
whether to act from the device: the host never waits, and nothing is compiled.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import is_available, is_initialized

from onejump.optim import Adam, RAdam
from onejump.types import UserError

FIRST_SCALE, GROWTH_INTERVAL = 16.0, 20_000  # of fp16's loss scale: TCM's released settings
HUGE = 2.0**64  # an eps beside which every second moment vanishes

Summed = Callable[[Tensor], Tensor]
Move = tuple[float | Tensor, Tensor, float, Tensor]  # rate, steps for the bias corrections, eps, flag: 1 forbids it


def identity(x: Tensor) -> Tensor:
    return x


def added_up(squares: Tensor) -> Tensor:
    return squares.sum()


class Updater:
    """One optimiser and its averages. `averages[j][i]` follows parameters[i].

    A step whose loss or gradient is not finite changes nothing but `skipped`, `skipped_in_row` and the scale. A
    parameter without a gradient counts as one whose gradient is zero. scaled: with fp16's dynamic loss scale, which
    doubles after 20,000 good steps in a row and halves at each bad one; else `scale` is 1.

    Where processes share one copy of the weights, parameters and averages are DTensors, each process works on its
    shard, and `summed` makes of the squared norms of the gradients here, [parameters], that of all together.
    Weights may get another memory layout (channels_last) at any time; averages and moments then take it over.
    """

    def __init__(
        self,
        optimizer: RAdam | Adam,
        parameters: Sequence[nn.Parameter],
        averages: Sequence[Sequence[Tensor]] = (),
        *,
        scaled: bool = False,
        summed: Summed = added_up,
    ):
        self.optimizer, self.parameters, self.averages = optimizer, list(parameters), [list(of) for of in averages]
        self.scaled, self.summed = scaled, summed
        assert self.parameters and len({(p.dtype, p.device) for p in self.parameters}) == 1
        for of in self.averages:
            assert [a.shape for a in of] == [p.shape for p in self.parameters]
        with torch.no_grad():
            self.exp_avg = [torch.zeros_like(p) for p in self.parameters]
            self.exp_avg_sq = [torch.zeros_like(p) for p in self.parameters]
        device = self.parameters[0].device
        sharded = any(local(p) is not p for p in self.parameters)
        self.here: Callable[[Tensor], Tensor] = local if sharded else identity
        self.on_host = device.type == "cpu"  # where numbers are read without waiting
        self.count = torch.zeros((), device=device)  # of steps made; float32, as the kernels ask
        self.infinite = torch.full((), math.inf, device=device)
        self.scale = torch.full((), FIRST_SCALE if scaled else 1.0, device=device)
        self.good_in_row = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_row = torch.zeros((), dtype=torch.int64, device=device)
        self.flatten()

    @torch.no_grad()
    def step(self, loss: Tensor, rate: float, decays: Sequence[float], clip: float) -> Tensor:
        """Update the weights from their gradients and drop those; average j keeps the share decays[j] of itself.

        The gradients are those of scale * loss, and are clipped to the norm `clip`. Returns their norm before that,
        unscaled, on the device. Processes that each hold the weights must all be given the same loss.
        """
        if self.addresses != self.found_at():
            self.flatten()
        grads = [
            torch.zeros_like(w) if p.grad is None else flat(self.here(p.grad), self.here(p))
            for p, w in zip(self.parameters, self.weights, strict=True)
        ]
        squares = torch.stack(torch._foreach_norm(grads)).square()
        norm = self.summed(squares).sqrt() / self.scale
        bad = (~(loss.detach() + norm).isfinite()).float()
        self.count += 1 - bad
        divisor: Tensor | None = (self.scale * ((norm + 1e-6) / clip).clamp(min=1)).float()
        if self.on_host and divisor == 1:
            divisor = None  # with one, the kernel writes the gradients back
        for move in self.moves(rate, bad):
            self.move(grads, move, divisor)
        self.follow(decays, bad)
        if self.scaled:
            torch._amp_update_scale_(self.scale, self.good_in_row, bad, 2.0, 0.5, GROWTH_INTERVAL)
        self.skipped += bad.long()
        self.skipped_in_row.add_(1).mul_(bad.long())
        self.clear()
        return norm

    @torch.no_grad()
    def follow(self, decays: Sequence[float], forbidden: Tensor) -> None:
        """Average j keeps the share decays[j] of itself, the rest becomes the weights; nothing if `forbidden` is 1."""
        if self.addresses != self.found_at():
            self.flatten()
        for average, decay in zip(self.flat_averages, decays, strict=True):
            if decay != 1:
                lerp(average, self.weights, 1 - decay, forbidden)

    def moves(self, rate: float, bad: Tensor) -> list[Move]:
        """Adam's step; RAdam's, as Adam's step with other numbers (Liu et al. 2020, algorithm 2).

        RAdam is Adam at r_n * rate where the variance of its rate is bounded. Before, it is momentum alone: Adam at
        HUGE * rate with eps = HUGE. Which it is depends on the number of good steps, which only the device knows.
        """
        beta1, beta2 = self.optimizer.betas
        if isinstance(self.optimizer, Adam):
            return [(rate, self.count, self.optimizer.eps, bad)]
        n = self.count.double()
        correction1, correction2, rho_inf = 1 - beta1**n, 1 - beta2**n, 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * n * beta2**n / correction2
        r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)).sqrt()
        rectified = (rho > 5).float()
        later, first = rate * r * correction2.sqrt() / correction1, rate / correction1
        return [  # at step infinity: eps is added to the root of the second moment before its bias is corrected
            (later, self.infinite, self.optimizer.eps, bad.maximum(1 - rectified)),
            (first * HUGE, self.infinite, HUGE, bad.maximum(rectified)),
        ]

    def move(self, grads: list[Tensor], move: Move, divisor: Tensor | None) -> None:
        rate, count, eps, forbidden = move
        if self.on_host and forbidden:
            return
        if isinstance(rate, Tensor):
            rate = rate.item() if self.on_host else rate.float()
        torch._fused_adam_(
            self.weights,
            grads,
            self.flat_exp_avg,
            self.flat_exp_avg_sq,
            [],
            [count] * len(grads),
            lr=rate,
            beta1=self.optimizer.betas[0],
            beta2=self.optimizer.betas[1],
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=forbidden,
        )

    @torch.no_grad()
    def flatten(self) -> None:
        """Views of all tensors as vectors, in the order in which the weights lie in memory."""
        weights = [self.here(p) for p in self.parameters]
        self.weights = [flat(w, w) for w in weights]
        self.flat_exp_avg, self.flat_exp_avg_sq, *self.flat_averages = [
            [adopted(self.here(t), w) for t, w in zip(of, weights, strict=True)]
            for of in (self.exp_avg, self.exp_avg_sq, *self.averages)
        ]
        self.addresses = self.found_at()

    def found_at(self) -> list[int]:
        """Where weights and averages lie: they are others after a change of layout."""
        return [self.here(t).data_ptr() for t in [*self.parameters, *itertools.chain(*self.averages)]]

    def clear(self) -> None:
        """Drop the gradients."""
        for p in self.parameters:
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint needs besides weights and averages, by name; "3/exp_avg" belongs to parameter 3."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        found = {f"{i}/{name}": tensor for name, of in moments.items() for i, tensor in enumerate(of)}
        rectified = torch.tensor(isinstance(self.optimizer, RAdam))
        counters = {"step": self.count, "skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        scale = {"scale": self.scale, "good_in_row": self.good_in_row} if self.scaled else {}
        return found | {"rectified": rectified} | counters | scale

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave. A loss scale is taken over if there is one on both sides.

        Raises UserError if they are of another optimiser, or of weights of other shapes.
        """
        ours, way_out = self.tensors(), "train with the recipe of that run, or into a new folder"
        saved, this = kind(tensors), kind(ours)
        if saved != this:
            raise UserError(f"optimizer: the checkpoint was saved by {saved}, this is {this}; {way_out}")
        for name, tensor in ours.items():
            if name in tensors and tensors[name].shape != tensor.shape:
                shapes = f"{list(tensors[name].shape)} in the checkpoint and {list(tensor.shape)} here"
                raise UserError(f"optimizer: {name} has the shape {shapes}; {way_out}")
            if name not in tensors and name not in ("scale", "good_in_row"):
                raise UserError(f"optimizer: the checkpoint has no {name}; {way_out}")
        for name, tensor in ours.items():
            if name in tensors:
                local(tensor).copy_(shard_of(tensors[name], tensor))


def kind(tensors: Mapping[str, Tensor]) -> str:
    n = sum(re.fullmatch(r"\d+/exp_avg", name) is not None for name in tensors)
    return f"{'RAdam' if tensors.get('rectified', False) else 'Adam'} for {n} parameters"


def lerp(averages: list[Tensor], weights: list[Tensor], share: float, forbidden: Tensor) -> None:
    """averages <- averages + share (weights - averages), unless forbidden is 1.

    As a step of gradient descent: with the gradient -weights and the weight decay 1, the rate is the share.
    """
    torch._fused_sgd_(
        averages,
        weights,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=share,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        grad_scale=None,
        found_inf=forbidden,
    )


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it. The type is imported only where there can be one: that takes a second."""
    if not (is_available() and is_initialized()):
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that is whole, or laid out as `like` is."""
    if local(like) is like or local(tensor) is not tensor:
        return local(tensor)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    whole = tensor.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def layout(tensor: Tensor) -> list[int]:
    """Its strides; those of dimensions of size 1 mean nothing."""
    return [stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]


def flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Its numbers as a vector, in the order in which those of `like` lie in memory: a view if the layouts agree."""
    if tensor.stride() != like.stride() and layout(tensor) != layout(like):
        tensor = torch.empty_like(like).copy_(tensor)
        assert layout(tensor) == layout(like), "weights with gaps or overlaps"
    return tensor.as_strided((tensor.numel(),), (1,))


def adopted(tensor: Tensor, like: Tensor) -> Tensor:
    """A flat view of a tensor that is first given the layout of `like`."""
    if layout(tensor) != layout(like):
        tensor.data = torch.empty_like(like).copy_(tensor)
    return flat(tensor, like)
