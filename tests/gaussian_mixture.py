"""Teachers whose denoiser and ODE are known: mixtures of Gaussians that share one diagonal covariance."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onejump.model import ConsistencyModel, per_sample
from onejump.precond import EDM


@dataclass(frozen=True)
class Mixture:
    """Equal shares of N(means[k], diag(variance)), float64: means [k, d], variance [d]."""

    means: Tensor
    variance: Tensor

    def sample(self, n: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        k = torch.randint(len(self.means), (n,), generator=generator)
        eps = torch.randn(n, len(self.variance), dtype=torch.float64, generator=generator)
        return self.means[k] + eps * self.variance.sqrt()

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t = x]."""
        t2 = per_sample(t, x) ** 2
        precision = 1 / (self.variance + t2)
        scores = (x * precision) @ self.means.T - precision @ (self.means.T**2) / 2  # + what all components share
        mean = scores.softmax(1) @ self.means
        return precision * (self.variance * x + t2 * mean)

    def flow(self, x: Tensor, times: Tensor, substeps: int = 8) -> Tensor:
        """The states [len(times), n, d] of the exact ODE at these falling times from x at times[0]: RK4 in ln t."""
        states = [x]
        for start, end in zip(times.log()[:-1], times.log()[1:], strict=True):
            h = (start - end) / substeps
            for i in range(substeps):
                x = self._step(x, -start + i * h, h)
            states.append(x)
        return torch.stack(states)

    def _step(self, x: Tensor, lam: Tensor, h: Tensor) -> Tensor:
        def slope(x: Tensor, lam: Tensor) -> Tensor:
            return self.denoise(x, torch.exp(-lam).expand(len(x))) - x

        k1 = slope(x, lam)
        k2 = slope(x + h / 2 * k1, lam + h / 2)
        k3 = slope(x + h / 2 * k2, lam + h / 2)
        k4 = slope(x + h * k3, lam + h)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class ExactNetwork(nn.Module):
    """The network F whose denoiser is the mixture's: (D - c_skip x) / c_out, float64 inside, from c_in x and c_noise.

    weight: scales F, so that a teacher has weights, and another weight makes another teacher.
    """

    def __init__(self, mixture: Mixture, sigma_data: float = 0.5):
        super().__init__()
        self.mixture, self.precond = mixture, EDM(sigma_data)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, c_noise: Tensor, c_noise_s=None, cond=None, key=None) -> Tensor:
        t = (4 * c_noise.double()).exp()
        c_skip, c_out, c_in, _ = self.precond(t)
        xt = x.double() / c_in[:, None]
        F = (self.mixture.denoise(xt, t) - c_skip[:, None] * xt) / c_out[:, None]
        return (F * self.weight).to(x.dtype)


def exact_teacher(mixture: Mixture) -> ConsistencyModel:
    return ConsistencyModel(ExactNetwork(mixture)).eval().requires_grad_(False)


def single(mean: float, std: float, d: int = 4) -> Mixture:
    """A Gaussian with independent coordinates."""
    return Mixture(torch.full((1, d), mean, dtype=torch.float64), torch.full((d,), std**2, dtype=torch.float64))


def random_mixture(d: int, k: int, mean: float, power: float, within: float = 0.1, seed: int = 0) -> Mixture:
    """k components; the coordinates' variances fall as i^-power and are 0.25 on average, `within` of it inside one."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -power
    variance = 0.25 * spectrum / spectrum.mean()
    centres = torch.randn(k, d, dtype=torch.float64, generator=generator)
    return Mixture(mean + centres * (variance * (1 - within)).sqrt(), variance * within)
