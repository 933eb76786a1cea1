"""Recipes: the configuration is the object. Frozen dataclasses hold the numbers and the code that uses them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from onejump import losses, solvers
from onejump.analytic import AnalyticPrecond
from onejump.analytic_jump import Analytic, Gaussian
from onejump.analytic_table import Estimator
from onejump.data.augment import AugmentPipe
from onejump.ema import EMA, ConstantEMA, PowerEMA, Snapshots
from onejump.hand_over import Plateau, check_rule
from onejump.losses import Distance, Weight
from onejump.lpips import LPIPS
from onejump.methods.base import boundary_count
from onejump.methods.cd import CD
from onejump.methods.continuous import ContinuousCD, ContinuousCT
from onejump.methods.ct import CT
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.methods.distilled import Distilled
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.critic import ProjectedCriticConfig, SmallCriticConfig, TimmFeatures
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.networks.text_unet import TextUNetConfig
from onejump.optim import Adam, ConstantRate, CosineRate, InverseSqrtRate, Optimizer, RAdam, Rate
from onejump.precond import CM, EDM, Euler, Jump, StableDiffusion, ToData
from onejump.samplers import ODE, Jumps, Multistep, Sampler, Trajectory
from onejump.solvers import Solver
from onejump.times import (
    AtLevels,
    Discretisation,
    HalfLogNormal,
    KarrasUniform,
    LevelSteps,
    LogNormal,
    LogStudentT,
    check_range,
)
from onejump.types import UserError
from onejump.vp import VPSchedule

Network = SongUNetConfig | ADMUNetConfig | EDM2UNetConfig | MLPConfig | TextUNetConfig
OneJump = ToData | CM | Euler | Gaussian | Analytic  # a jump that a model can have
Distilling = CD | ContinuousCD | CTM | CTMGAN | Distilled  # methods with a teacher
AnyMethod = DSM | CT | ContinuousCT | ICT | ECT | TCM | CD | ContinuousCD | CTM | CTMGAN | Distilled
Trajectories = CTM | CTMGAN  # methods whose jumps end anywhere

MAX_SEED = 2**63 - 1
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # of karras_grid, on which CT, CD, iCT and CTM train


@dataclass(frozen=True)
class Stage:
    """One training run: a method, how long, and how. Published numbers belong to recipes, not here."""

    method: AnyMethod
    steps: int
    count_on: bool = False  # steps are counted on from the stage before (TCM's stage 2); else from 0
    batch: int = 64  # images an optimiser step
    micro_batch: int = 0  # images a pass, their gradients averaged; 0: the whole batch
    optimizer: Optimizer = RAdam()
    rate: Rate = ConstantRate()
    clip: float = 1e6  # gradient norm
    augment: AugmentPipe | None = None  # of the images; the network is told by labels of its own (augment_dim)
    ema: EMA = ConstantEMA()
    snapshots: Snapshots | None = None  # EMAs to make one of any width of, afterwards
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"  # of the network's passes; tf32: NVIDIA GPUs alone
    checkpointing: bool = False  # the maps inside a block are computed again in the backward pass, and not kept
    precond: EDM | StableDiffusion = EDM()
    jump: OneJump | AnalyticPrecond = ToData()  # AnalyticPrecond: computed from the teacher when the stage starts
    second_time: Literal["off", "zero", "random"] = "off"  # the network reads s too; how that branch starts
    critic: SmallCriticConfig | ProjectedCriticConfig | None = None  # of CTMGAN
    sampler: Sampler = Multistep()
    shift: float = 0.0  # of c_skip and c_out where the averaged model samples (ECT on CIFAR-10); never in training
    guidance: float = 1.0  # scale of the teacher's classifier-free guidance; 1: none
    label_dropout: float = 0.0  # share of samples without their label; what guides a diffusion model learns from them
    until: Plateau | None = None  # the stage may end before its steps, and hands over its best model; none: its last

    def __post_init__(self) -> None:
        check_range(at_least=1, steps=self.steps, batch=self.batch)
        check_range(at_least=0, guidance=self.guidance)
        check_range(at_least=0, below=SIGMA_MAX, shift=self.shift)
        check_range(at_least=0, below=1, label_dropout=self.label_dropout)
        if not 0 <= self.micro_batch <= self.batch:
            raise UserError(f"micro_batch: {self.micro_batch}; 0 (the whole batch) to batch={self.batch} is possible")
        if not self.clip > 0:
            raise UserError(f"clip: {self.clip:g}; a gradient norm above 0 is needed")
        if isinstance(self.core, TCM):
            self._check_passes(self.core.rho)
        if isinstance(self.method, ContinuousCT | ContinuousCD) and self.precision not in ("fp32", "tf32"):
            raise UserError(f"precision: {self.precision}; forward derivatives want fp32 or tf32")
        _check_jump(self)

    @property
    def core(self) -> AnyMethod:
        """The method; of ECT and TCM in distillation, these."""
        return self.method.of if isinstance(self.method, Distilled) else self.method

    def sampling_jump(self, trained: Jump) -> Jump:
        """That of the averaged model, the student's being `trained`: with a shift CM's, whose sigma_min it is."""
        return CM(self.shift, self.precond.sigma_data) if self.shift else trained

    def _check_passes(self, rho: float) -> None:
        """Each pass of TCM holds samples of both kinds, in the shares of the whole batch."""
        boundary_count(self.batch, rho)  # refuses a batch or a share that holds none
        if self.micro_batch and not self.keeps_shares(self.micro_batch, rho):
            sizes = (n for n in range(2, self.batch + 1) if self.keeps_shares(n, rho))
            nearest = min(sizes, key=lambda n: abs(n - self.micro_batch))
            raise UserError(
                f"micro_batch: {self.micro_batch}; with batch={self.batch} and method.rho={rho:.15g} it would change "
                f"the share of samples at t'; use {nearest}"
            )

    def keeps_shares(self, size: int, rho: float) -> bool:
        """Whether passes of this size hold TCM's samples at t' in the share of the whole batch."""
        passes, left = divmod(self.batch, size)
        return left == 0 and size >= 2 and passes * boundary_count(size, rho) == boundary_count(self.batch, rho)


def _check_jump(stage: Stage) -> None:
    """Where jumps end must be where the method says f is the identity, and CTM's go anywhere."""
    name, sigma_min = type(stage.method).__name__, stage.jump.sigma_min
    ends = 0.0 if isinstance(stage.method, CD) and stage.method.levels else SIGMA_MIN
    if not isinstance(stage.core, DSM | ECT | TCM) and sigma_min != ends:
        use = "Euler" if isinstance(stage.method, Trajectories) else "CM" if ends else "ToData"
        raise UserError(
            f"jump: {type(stage.jump).__name__} ends at {sigma_min:.15g}; {name}'s first time is {ends:g}, where f "
            f"must be the identity: use jump={use}, or another that ends there"
        )
    if isinstance(stage.method, Trajectories) and (isinstance(stage.jump, CM) or stage.second_time == "off"):
        raise UserError(
            f"jump: {type(stage.jump).__name__} with second_time={stage.second_time}; CTM jumps from any t to any "
            "s: use jump=Euler or another that can, and second_time=zero"
        )
    if not isinstance(stage.method, Trajectories) and stage.second_time != "off":
        raise UserError(f"second_time: {stage.second_time}; {name}'s jumps end in one place only: use second_time=off")
    if stage.guidance != 1 and not isinstance(stage.method, Distilling):
        raise UserError(f"guidance: {stage.guidance:g} is of a teacher, and {name} has none; use guidance=1")
    if isinstance(stage.method, CTMGAN) != (stage.critic is not None):
        raise UserError(f"critic: CTMGAN, and no other method, needs one; the method is {name}")
    if stage.shift and (type(stage.core), type(stage.jump), type(stage.precond)) != (ECT, ToData, EDM):
        raise UserError(
            f"shift: {stage.shift:g} is for ECT with jump=ToData and precond=EDM, not for {name} here; use 0"
        )
    if isinstance(stage.jump, Analytic):
        stage.jump.check_times(SIGMA_MIN, SIGMA_MAX)
    if isinstance(stage.jump, AnalyticPrecond):
        if not isinstance(stage.method, Distilling):
            raise UserError(f"jump: AnalyticPrecond needs a teacher, and {name} has none; use it with CD or CTM")
        check_range(at_least=SIGMA_MAX, **{"jump.estimator.sigma_max": stage.jump.estimator.sigma_max})


@dataclass(frozen=True)
class Evaluation:
    """How samples are judged: n images for each number of steps, from the per-image seeds of `seed`."""

    n: int = 2000
    steps: tuple[int, ...] = (1, 2)
    teacher_steps: int = 18
    seed: int = 1234

    def __post_init__(self) -> None:
        check_range(at_least=2, n=self.n, teacher_steps=self.teacher_steps)
        check_range(at_least=0, at_most=MAX_SEED, seed=self.seed)
        if min(self.steps, default=0) < 1:
            raise UserError(f"steps: {self.steps}; one or more numbers of sampling steps, each 1 or more, are needed")


@dataclass(frozen=True)
class Recipe:
    """A chain of stages: each starts from the EMA of the one before it."""

    name: str
    network: Network
    stages: dict[str, Stage] = field(default_factory=dict)
    seed: int = 0
    log_every: int = 25
    save_every: int = 200
    sample_every: int = 200
    evaluate_every: int = 200
    evaluation: Evaluation = Evaluation()

    def first_step(self, name: str) -> int:
        """The count at which this stage starts."""
        names = list(self.stages)
        if not self.stages[name].count_on:
            return 0
        before = names[names.index(name) - 1]
        return self.first_step(before) + self.stages[before].steps

    def __post_init__(self) -> None:
        check_range(at_least=0, at_most=MAX_SEED, seed=self.seed)
        every = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_every")}
        check_range(at_least=0, **every)  # 0: only at the end of a stage
        taken = {f.name for f in fields(Recipe) + fields(Stage)} | {"type", "report"}
        if self.stages and next(iter(self.stages.values())).count_on:
            raise UserError(f"{next(iter(self.stages))}.count_on: the first stage has none before it; use false")
        for name, stage in self.stages.items():
            if name in taken or not re.fullmatch(r"\w[\w-]*", name):
                raise UserError(f"stages: {name!r} is no name for a stage; use a plain word, such as stage1")
            if isinstance(self.network, EDM2UNetConfig | TextUNetConfig) and stage.second_time != "off":
                raise UserError(
                    f"{name}.second_time: {stage.second_time}; {type(self.network).__name__} reads one time only, and "
                    "jumps that end anywhere need another: use network=SongUNetConfig or ADMUNetConfig"
                )
            if isinstance(self.network, TextUNetConfig) != isinstance(stage.precond, StableDiffusion):
                pair = f"{type(stage.precond).__name__} with network {type(self.network).__name__}"
                raise UserError(f"{name}.precond: {pair}; StableDiffusion and TextUNetConfig go together, and alone")
            _check_augment(name, stage, self.network)
            _check_sampler(name, stage, self.evaluation.steps)
            _check_labels(name, stage, self.network)
            if stage.until:
                low = stage.core.t_prime if isinstance(stage.core, TCM) else SIGMA_MIN
                asked, is_judged = self.evaluation.steps, not isinstance(stage.method, DSM)
                check_rule(f"{name}.until", stage.until, self.evaluate_every, asked, is_judged, (low, SIGMA_MAX))


def _check_labels(name: str, stage: Stage, network: Network) -> None:
    """Labels that are left out must be there, and wanted: guidance is for diffusion models alone."""
    if stage.label_dropout and not isinstance(stage.method, DSM):
        kind = type(stage.method).__name__
        raise UserError(f"{name}.label_dropout: {kind} makes no diffusion model, which alone is guided; use 0")
    if stage.label_dropout and not network.label_dim:
        raise UserError(f"{name}.label_dropout: the network knows no classes; use 0")


def _check_augment(name: str, stage: Stage, network: Network) -> None:
    """The network must read what the pipe tells it about each image."""
    reads = network.augment_dim if isinstance(network, SongUNetConfig | ADMUNetConfig) else None
    if stage.augment is None or stage.augment.width == reads:
        return
    way_out = f"give network.augment_dim={stage.augment.width}"
    if reads is None:
        way_out = "use network=SongUNetConfig or ADMUNetConfig"
    found = f"{stage.augment.width} labels an image, but {type(network).__name__} reads {reads or 0}"
    raise UserError(f"{name}.augment: {found}; {way_out}, or leave augment=none")


def _check_sampler(name: str, stage: Stage, asked: tuple[int, ...]) -> None:
    """What the evaluation will ask of this stage, found out before hours of training and not after."""
    use: tuple[type, ...] = (ODE,) if isinstance(stage.method, DSM) else (Multistep,)
    use = (Trajectory, Jumps) if isinstance(stage.method, Trajectories) else use
    if not isinstance(stage.sampler, use):
        kinds = f"{type(stage.sampler).__name__}; {type(stage.method).__name__}"
        raise UserError(f"{name}.sampler: {kinds} wants {use[0].__name__}")
    if isinstance(stage.sampler, Jumps) and set(asked) != {len(stage.sampler.start)}:
        made, given = len(stage.sampler.start), ",".join(map(str, asked))
        raise UserError(f"evaluation.steps: {given}; the sampler of {name} makes {made} jumps: give {made}, no other")
    if not isinstance(stage.sampler, Multistep):
        return
    steps = max(asked)
    if steps > stage.sampler.max_steps:
        raise UserError(
            f"evaluation.steps: {steps}; the sampler of {name} has times for {stage.sampler.max_steps}: "
            f"give {name}.sampler.mid more times"
        )
    last = min(stage.sampler.times(steps))
    if isinstance(stage.core, TCM) and last < stage.core.t_prime:
        t_prime = stage.core.t_prime
        raise UserError(f"{name}.sampler: time {last:g} is below {name}.method.t_prime={t_prime:g}; use that or more")


CLASSES: tuple[type, ...] = (
    *(Recipe, Stage, Evaluation, SongUNetConfig, ADMUNetConfig, EDM2UNetConfig, MLPConfig),
    *(TextUNetConfig, StableDiffusion, VPSchedule, AtLevels, LevelSteps, Distilled),
    *(DSM, CT, ContinuousCT, ICT, ECT, TCM, CD, ContinuousCD, CTM, CTMGAN, LPIPS),
    *(SmallCriticConfig, ProjectedCriticConfig, TimmFeatures),
    *(LogNormal, HalfLogNormal, KarrasUniform, LogStudentT, Discretisation),
    *(EDM, ToData, CM, Euler, Gaussian, Analytic, AnalyticPrecond, Estimator),
    *(Multistep, Trajectory, Jumps, ODE, ConstantEMA, PowerEMA, Snapshots, Plateau),
    *(RAdam, Adam, ConstantRate, InverseSqrtRate, CosineRate, AugmentPipe),
)
CHOICES: dict[Any, tuple[Callable, ...]] = {  # by the annotation of the field
    Weight: (
        *(losses.uniform, losses.inverse_delta, losses.inverse_sqrt_delta, losses.inverse_c_out),
        *(losses.inverse_c_out_squared, losses.t_over_c_out_squared_delta),
        *(losses.snr, losses.snr_plus_one, losses.truncated_snr),
    ),
    Distance: (losses.mean_l1, losses.mean_l2),
    Solver: (solvers.euler, solvers.heun, solvers.dpm2),
}
FUNCTIONS: tuple[Callable, ...] = tuple(f for choices in CHOICES.values() for f in choices)
