"""What a recipe costs to train: passes of the network, counted, at the speed of a GPU that is kept busy."""

from onejump.config import Recipe, Stage
from onejump.lpips import LPIPS
from onejump.methods.cd import CD
from onejump.methods.ct import CT
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.methods.distilled import Distilled
from onejump.methods.dsm import DSM
from onejump.solvers import Solver, euler

FLOP_A_SECOND = 2e14  # 20 % of an H100's peak in half precision
LPIPS_GFLOP = 92.0  # VGG at 224x224, 31 an image: forwards of two images and backwards through one


def passes(stage: Stage) -> float:
    """Of the network over one image in a step, on the mean; forwards and backwards count 3. Identities are counted too.

    A guided teacher runs twice. CTM: k of random_steps is (2 max_steps + 1) / 3 on the mean; its student makes 5 calls,
    3 with gradients. With the critic every other step trains the critic, with 4 calls of the student.
    """
    method, guided = stage.method, 1 if stage.guidance == 1 else 2
    if isinstance(method, DSM):
        return 3.0
    if isinstance(method, CD | Distilled):
        return 4.0 + guided * calls(method.solver)
    if isinstance(method, CTM | CTMGAN):
        ctm = method if isinstance(method, CTM) else method.ctm
        teacher = guided * calls(ctm.solver) * (2 * ctm.max_steps + 1) / 3
        return teacher + (11.0 if isinstance(method, CTM) else (11.0 + 4.0) / 2)
    return 4.0


def calls(solver: Solver) -> int:
    """Of the teacher in one step of this solver."""
    return 1 if solver is euler else 2


def flop(stage: Stage, gflop: float) -> float:
    """Of one image in a step, gflop being 10^9 operations a pass."""
    method = stage.method.ctm if isinstance(stage.method, CTMGAN) else stage.method
    perceptual = isinstance(method, CD | CT | CTM) and isinstance(method.distance, LPIPS)
    return 1e9 * (passes(stage) * gflop + perceptual * LPIPS_GFLOP)


def gpu_hours(recipe: Recipe, gflop: float) -> float:
    """Of training, all stages. An estimate: no figure of ours for this is measured."""
    total = sum(flop(stage, gflop) * stage.steps * stage.batch for stage in recipe.stages.values())
    return total / FLOP_A_SECOND / 3600
