"""Magnitude-preserving layers (Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models).

Each is built so that uncorrelated inputs of variance one give outputs of variance one, at the start of training and
ever after. t is the weight of the second input.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, silu

from onejump.types import Samples, Times

EPS = 1e-4
SILU_GAIN = 0.596  # root mean square of silu(x), x ~ N(0, 1)


def magnitude(x: Float[Tensor, "..."], dims: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Root mean square of x over these dimensions, which are kept, plus 1e-4; float32 also in half precision."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return EPS + norm / math.sqrt(math.prod([x.shape[d] for d in dims]))


def normalize(x: Float[Tensor, "..."], dim: int | None = None) -> Float[Tensor, "..."]:
    """x with root mean square one: each sample (each output of a weight) as a whole, or over one dimension alone."""
    dims = tuple(range(1, x.ndim)) if dim is None else (dim,)
    return x / magnitude(x, dims).to(x.dtype)


def mp_silu(x: Samples) -> Samples:
    """silu(x) / 0.596, eq. 81."""
    return silu(x) / SILU_GAIN


def mp_sum(a: Samples, b: Samples, t: float) -> Samples:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2), eq. 88."""
    norm = math.hypot(1 - t, t)
    return torch.add(a * ((1 - t) / norm), b, alpha=t / norm)


def mp_cat(a: Samples, b: Samples, t: float = 0.5) -> Samples:
    """a and b, channel after channel, scaled so that their shares of the squared sum are those of mp_sum; eq. 103."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt(n_a + n_b) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], dim=1)


class MPFourier(nn.Module):
    """sqrt(2) cos(w c_noise + phase), eq. 75: angular frequencies w ~ 2 pi N(0, 1) and phases are drawn once."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, c_noise: Times) -> Float[Tensor, "b channels"]:
        angle = c_noise[:, None] * self.get_buffer("freqs") + self.get_buffer("phases")
        return angle.cos() * math.sqrt(2)


class MPConv(nn.Module):
    """A convolution (kernel 0: a linear map) without bias that reads its weights divided by their magnitude.

    The output is a function of the weights' direction alone, times gain. Calling it changes nothing.
    """

    held: Tensor | None = None  # the magnitudes of the weights, while they are known: see `normalized`

    def __init__(self, c_in: int, c_out: int, kernel: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, *[kernel, kernel] if kernel else []))

    def forward(self, x: Samples, gain: Float[Tensor, ""] | float = 1.0) -> Samples:
        known = None if torch.is_grad_enabled() else self.held  # a gradient goes through the magnitudes too
        w = self.weight * (gain / math.sqrt(self.weight[0].numel()) / (self.magnitudes() if known is None else known))
        w = w.to(x.dtype)
        return linear(x, w) if w.ndim == 2 else conv2d(x, w, padding=w.shape[-1] // 2)

    def extra_repr(self) -> str:
        return "x".join(map(str, self.weight.shape))

    def magnitudes(self) -> Tensor:
        """One an output."""
        return magnitude(self.weight, tuple(range(1, self.weight.ndim)))


@torch.no_grad()
def normalize_weights(net: nn.Module) -> None:
    """Forced weight normalisation, eq. 66: every MPConv's weights get magnitude one, in place; nothing else changes.

    The outputs stay the same (where the magnitudes are far above 1e-4), and a step of the optimiser turns the weights
    by as much as it did at the start, instead of less and less as they grow. To be called at the start of each
    optimiser step, so that averages are taken of the weights as the step has left them.
    """
    for module in net.modules():
        if isinstance(module, MPConv):
            module.weight.copy_(normalize(module.weight))


@contextmanager
def normalized(net: nn.Module) -> Iterator[None]:
    """normalize_weights; and until it ends, passes without gradients find the magnitudes of the weights computed.

    For the passes of one optimiser step. Weights of which a process holds a shard are left out.
    """
    normalize_weights(net)
    layers = [module for module in net.modules() if isinstance(module, MPConv)]
    whole = [layer for layer in layers if type(layer.weight.detach()) is Tensor]
    try:
        for layer in whole:
            layer.held = layer.magnitudes().detach()
        yield
    finally:
        for layer in whole:
            layer.held = None
