"""One step t -> r of the probability-flow ODE dx/dt = (x - D(x, t)) / t."""

from collections.abc import Callable

from onejump.model import per_sample
from onejump.types import Samples, Times

Denoiser = Callable[[Samples, Times], Samples]


def euler(denoise: Denoiser, x: Samples, t: Times, r: Times) -> Samples:
    """First order."""
    d = (x - denoise(x, t)) / per_sample(t, x)
    return x + per_sample(r - t, x) * d


def heun(denoise: Denoiser, x: Samples, t: Times, r: Times) -> Samples:
    """Second order (Karras et al. 2022, algorithm 1); r > 0."""
    d = (x - denoise(x, t)) / per_sample(t, x)
    xr = x + per_sample(r - t, x) * d
    d_r = (xr - denoise(xr, r)) / per_sample(r, x)
    return x + per_sample(r - t, x) * (d + d_r) / 2
