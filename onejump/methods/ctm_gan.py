"""CTM's third loss: a critic on the jumps to the data."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from onejump.methods.base import Critic, Nets, Stats, gradient_ratio
from onejump.methods.ctm import CTM
from onejump.model import ConsistencyModel
from onejump.optim import RAdam
from onejump.times import check_range
from onejump.types import Cond, Samples


@dataclass(frozen=True)
class CTMGAN:
    """Consistency Trajectory Models with the adversarial loss (Kim et al. 2024, section 3.3).

    It goes on from a student that CTM has trained. Even steps train the student, odd ones the critic, which tells the
    student's estimates at the data from images.
    """

    ctm: CTM = CTM()
    critic_lr: float = 2e-3
    low: float = 0.01  # bounds of the adversarial loss's adaptive weight
    high: float = 10.0

    def __post_init__(self) -> None:
        check_range(above=0, critic_lr=self.critic_lr, low=self.low)
        check_range(at_least=self.low, high=self.high)

    def nets(self, student: ConsistencyModel, teacher: ConsistencyModel, critic: nn.Module) -> Nets:
        turn = Critic(critic, RAdam(betas=(0.5, 0.9)), self.critic_lr, turn=lambda step: step % 2 == 1)
        return replace(self.ctm.nets(student, teacher), critic=turn)

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]:
        """Student: L_CTM + lambda_DSM L_DSM - lambda_GAN E[C(x)]; critic: E[(1 - C(x0))_+] + E[(1 + C(x))_+]."""
        assert nets.critic is not None
        critics_turn, C = nets.critic.turn(step), nets.critic.net
        with torch.set_grad_enabled(not critics_turn):
            x, target, t = self.ctm.at_the_data(nets, x0, cond, step)
        distance = self.ctm.distance(x, target)
        if critics_turn:
            return relu(1 - C(x0)).mean() + relu(1 + C(x)).mean(), {"t": t, "distance": distance}
        ctm, (dsm, _), gan = distance.mean(), self.ctm.dsm.loss(nets, x0, cond, step, steps), -C(x).mean()
        loss = ctm + gradient_ratio(ctm, dsm, nets.student) * dsm
        return loss + gradient_ratio(ctm, gan, nets.student, self.low, self.high) * gan, {"t": t, "distance": distance}
