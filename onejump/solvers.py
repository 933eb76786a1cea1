"""One step t -> r of the probability-flow ODE dx/dt = (x - D(x, t)) / t."""

from collections.abc import Callable

from onejump.model import ConsistencyModel, per_sample
from onejump.types import Cond, Samples, Times

Denoiser = Callable[[Samples, Times], Samples]
Solver = Callable[[Denoiser, Samples, Times, Times], Samples]


def denoiser(model: ConsistencyModel, cond: Cond) -> Denoiser:
    """D(x, t) for these labels."""
    return lambda x, t: model.denoise(x, t, cond=cond)


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


def dpm2(denoise: Denoiser, x: Samples, t: Times, r: Times) -> Samples:
    """Second order, by the slope at a midpoint: DPM-Solver-2 (Lu et al. 2022) as in CM's and CTM's code.

    The midpoint is even in t^(1/3), where the paper has ln t.
    """
    mid = ((t ** (1 / 3) + r ** (1 / 3)) / 2) ** 3
    x_mid = euler(denoise, x, t, mid)
    return x + per_sample((r - t) / mid, x) * (x_mid - denoise(x_mid, mid))
