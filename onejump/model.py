"""The model f: network + preconditioning + jump. The only place where the network is called."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from onejump.precond import EDM, Jump, Precond, ToData
from onejump.types import Cond, DropoutKey, PerSample, Samples, Times, beside


def per_sample(values: PerSample, x: Samples) -> Tensor:
    """[b] -> [b, 1, ...], to multiply the samples x."""
    return beside(values, x).view(-1, *[1] * (x.ndim - 1))


class ConsistencyModel(nn.Module):
    """f(x, t -> s) = a(t, s) x + b(t, s) D(x, t, s), with D = c_skip x + c_out F(c_in x, c_noise(t), c_noise(s)).

    net: called as net(x, c_noise, c_noise_s, cond, key); key holds one dropout key a sample (equal keys, equal masks).
    t_min: the smallest time a consistency sampler may ask for (t' after TCM's stage 2).
    second_time: the network reads s too (CTM); else it gets None.
    autocast: run the network, and only the network, in this precision; skip path, times and output stay float32.
    """

    def __init__(
        self,
        net: nn.Module,
        precond: Precond | None = None,
        jump: Jump | None = None,
        t_min: float = 0.0,
        second_time: bool = False,
    ):
        super().__init__()
        self.net = net
        self.precond = precond or EDM()
        self.jump = jump or ToData()
        self.t_min = t_min
        self.second_time = second_time
        self.autocast: torch.dtype | None = None
        self._wrapped: tuple[nn.Module, ...] = ()  # in a tuple it is no submodule

    @property
    def runner(self) -> nn.Module:
        return self._wrapped[0] if self._wrapped else self.net

    @property
    def passes(self) -> int:
        """Networks that a call runs: two in a guided model."""
        return getattr(self.net, "passes", 1)

    def through(self, wrapper: nn.Module) -> None:
        """From here on, call the network through a wrapper of it (DDP); its parameters keep their names."""
        self._wrapped = (wrapper,)

    def denoise(
        self, x: Samples, t: Times, s: Times | None = None, cond: Cond = None, key: DropoutKey = None
    ) -> Samples:
        """D(x, t, s). Without s, that is at s = t, the denoiser: the model's estimate of E[x0 | x_t = x]."""
        t = beside(t, x)
        c_skip, c_out, c_in, c_noise = self.precond(t)
        c_noise_s = self.precond(t if s is None else beside(s, x)).c_noise if self.second_time else None
        with torch.autocast(x.device.type, self.autocast) if self.autocast else nullcontext():
            F = self.runner(per_sample(c_in, x) * x, c_noise, c_noise_s, cond, key)
        return per_sample(c_skip, x) * x + per_sample(c_out, x) * F.to(x.dtype)

    def forward(
        self, x: Samples, t: Times, s: Times | None = None, cond: Cond = None, key: DropoutKey = None
    ) -> Samples:
        """The jump f(x, t -> s); without s it goes as far as jumps of this kind go, to jump.sigma_min."""
        t = beside(t, x)
        s = torch.full_like(t, self.jump.sigma_min) if s is None else beside(s, x)
        a, b = self.jump(t, s)
        return per_sample(a, x) * x + per_sample(b, x) * self.denoise(x, t, s, cond, key)
