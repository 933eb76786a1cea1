"""Denoising score matching with EDM's weight: the diffusion teacher."""

from dataclasses import dataclass

from torch import Tensor

from onejump.draws import normal_like
from onejump.losses import squared_l2
from onejump.methods.base import Nets, Stats, diffuse, dropout_key
from onejump.model import ConsistencyModel, beside
from onejump.times import HalfLogNormal, LogNormal, check_range
from onejump.types import Cond, Samples


@dataclass(frozen=True)
class DSM:
    """Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al. 2022, section 5)."""

    times: LogNormal | HalfLogNormal = LogNormal(P_mean=-1.2, P_std=1.2)
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_range(above=0, sigma_data=self.sigma_data)

    def nets(self, student: ConsistencyModel) -> Nets:
        return Nets(student, target=student)

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]:
        """E[lambda(t) ||D(x_t, t) - x0||^2], lambda = (t^2 + sigma_data^2) / (t sigma_data)^2."""
        t = self.times(len(x0)).to(x0.dtype)
        xt = diffuse(x0, normal_like(x0), t)
        distance = squared_l2(nets.student.denoise(xt, t, cond=cond, key=dropout_key(x0)), x0)
        weight = (t**2 + self.sigma_data**2) / (t * self.sigma_data) ** 2
        return (beside(weight, x0) * distance).mean(), {"t": t, "distance": distance}
