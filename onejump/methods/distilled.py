"""ECT and TCM as distillation."""

from dataclasses import dataclass, replace

from torch import Tensor

from onejump.methods.base import Nets, Stats
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.solvers import Solver, euler
from onejump.types import Cond, Samples


@dataclass(frozen=True)
class Distilled:
    """ECT or TCM with x_r by a step of a teacher's ODE from x_t, in place of the same noise.

    So Lee et al. 2025 make text-to-image models of Stable Diffusion. Times, discretisation, targets and loss stay as
    they are; euler is DDIM's step; as in CD the teacher may be guided.
    """

    of: ECT | TCM
    solver: Solver = euler

    def nets(self, student: ConsistencyModel, teacher: ConsistencyModel) -> Nets:
        return replace(self.of.nets(student), teacher=teacher, solver=self.solver)

    def loss(self, nets: Nets, x0: Samples, cond: Cond, step: int, steps: int) -> tuple[Tensor, Stats]:
        return self.of.loss(nets, x0, cond, step, steps)
