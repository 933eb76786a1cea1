"""Recipes: the configuration is the object. Frozen dataclasses hold the numbers and the code that uses them."""

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from onejump import losses
from onejump.ema import EMA, ConstantEMA, PowerEMA
from onejump.methods.base import boundary_count
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import Adam, ConstantRate, CosineRate, InverseSqrtRate, Optimizer, RAdam, Rate
from onejump.precond import EDM, ToData
from onejump.samplers import Heun, Multistep, Sampler
from onejump.times import Discretisation, LogNormal, LogStudentT, check_range
from onejump.types import UserError

Network = SongUNetConfig | MLPConfig


MAX_SEED = 2**63 - 1
ICT_SIGMA_MIN = 0.002  # where karras_grid starts


@dataclass(frozen=True)
class Stage:
    """One training run: a method, how long, and how. Published numbers belong to recipes, not here."""

    method: DSM | ICT | ECT | TCM
    steps: int
    count_on: bool = False  # steps are counted on from the stage before (TCM's stage 2); else from 0
    batch: int = 64  # images an optimiser step
    micro_batch: int = 0  # images a pass, their gradients averaged; 0: the whole batch
    optimizer: Optimizer = RAdam()
    rate: Rate = ConstantRate()
    clip: float = 1e6  # gradient norm
    ema: EMA = ConstantEMA()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    precond: EDM = EDM()
    jump: ToData = ToData()
    sampler: Sampler = Multistep()

    def __post_init__(self) -> None:
        check_range(at_least=1, steps=self.steps, batch=self.batch)
        if not 0 <= self.micro_batch <= self.batch:
            raise UserError(f"micro_batch: {self.micro_batch}; 0 (the whole batch) to batch={self.batch} is possible")
        if not self.clip > 0:
            raise UserError(f"clip: {self.clip:g}; a gradient norm above 0 is needed")
        if isinstance(self.method, TCM):
            self._check_passes(self.method.rho)
        if isinstance(self.method, ICT) and self.precond.sigma_min != ICT_SIGMA_MIN:
            raise UserError(
                f"precond.sigma_min: {self.precond.sigma_min:.15g}; ICT's first time is {ICT_SIGMA_MIN}, where f must "
                f"be the identity: use precond.sigma_min={ICT_SIGMA_MIN}"
            )

    def _check_passes(self, rho: float) -> None:
        """Each pass of TCM holds samples of both kinds, in the shares of the whole batch."""
        boundary_count(self.batch, rho)  # refuses a batch or a share that holds none
        if self.micro_batch and not self._keeps_shares(self.micro_batch, rho):
            sizes = (n for n in range(2, self.batch + 1) if self._keeps_shares(n, rho))
            nearest = min(sizes, key=lambda n: abs(n - self.micro_batch))
            raise UserError(
                f"micro_batch: {self.micro_batch}; with batch={self.batch} and method.rho={rho:.15g} it would change "
                f"the share of samples at t'; use {nearest}"
            )

    def _keeps_shares(self, size: int, rho: float) -> bool:
        passes, left = divmod(self.batch, size)
        return left == 0 and size >= 2 and passes * boundary_count(size, rho) == boundary_count(self.batch, rho)


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
            _check_sampler(name, stage, max(self.evaluation.steps))


def _check_sampler(name: str, stage: Stage, steps: int) -> None:
    """What the evaluation will ask of this stage, found out before hours of training and not after."""
    if not isinstance(stage.sampler, Multistep):
        return
    if steps > stage.sampler.max_steps:
        raise UserError(
            f"evaluation.steps: {steps}; the sampler of {name} has times for {stage.sampler.max_steps}: "
            f"give {name}.sampler.mid more times"
        )
    last = min(stage.sampler.times(steps))
    if isinstance(stage.method, TCM) and last < stage.method.t_prime:
        t_prime = stage.method.t_prime
        raise UserError(f"{name}.sampler: time {last:g} is below {name}.method.t_prime={t_prime:g}; use that or more")


CLASSES: tuple[type, ...] = (
    *(Recipe, Stage, Evaluation, SongUNetConfig, MLPConfig),
    *(DSM, ICT, ECT, TCM, LogNormal, LogStudentT, Discretisation),
    *(EDM, ToData, Multistep, Heun, ConstantEMA, PowerEMA),
    *(RAdam, Adam, ConstantRate, InverseSqrtRate, CosineRate),
)
FUNCTIONS: tuple[Callable, ...] = (
    *(losses.uniform, losses.inverse_delta, losses.inverse_sqrt_delta),
    *(losses.inverse_c_out, losses.inverse_c_out_squared, losses.t_over_c_out_squared_delta),
)


def to_json(value: Any) -> Any:
    """A recipe, or a part of one, as what JSON can hold; `from_json` is its inverse.

    A dataclass becomes {"type": its name, field: ...}, a function {"function": its name}, a tuple a list, and an
    infinite or undefined number a string. Raises UserError for what is not in CLASSES or FUNCTIONS.
    """
    if is_dataclass(value) and type(value) in CLASSES:
        return {"type": type(value).__name__} | {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if value in FUNCTIONS:
        return {"function": value.__name__}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, NoneType | bool | int | float | str):
        return value
    raise UserError(f"{value!r} cannot be written: add it to onejump.config.CLASSES or FUNCTIONS")


def from_json(value: Any) -> Any:
    """The object that `to_json` wrote. Only CLASSES and FUNCTIONS are ever built or looked up.

    A field left out keeps its default. Raises UserError for unknown types, functions and fields and for values of the
    wrong type or range, with the path of the field.
    """
    return _build(value, CLASSES, "")


def decode(value: Any, annotation: Any, path: str) -> Any:
    """JSON to a value of this annotation (of a field of one of CLASSES); `path` is for messages."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        others = tuple(a for a in args if a is not NoneType)
        return decode(value, others[0], path) if len(others) == 1 else _build(value, others, path)
    if isinstance(annotation, type) and is_dataclass(annotation):
        return _build(value, (annotation,), path)
    if origin is Literal:
        return value if value in args else _none_of(value, args, path)
    if origin is Callable:
        return _function(value, path)
    if origin is tuple:
        return _tuple(value, args, path)
    if origin is dict and isinstance(value, dict):
        return {name: decode(item, args[1], join(path, name)) for name, item in value.items()}
    return _plain(value, origin or annotation, path)


def join(path: str, name: str) -> str:
    """Dotted paths leave out `stages`: stage1.batch."""
    return name if path in ("", "stages") else f"{path}.{name}"


def _build(value: Any, classes: Iterable[type], path: str) -> Any:
    by_name = {cls.__name__: cls for cls in classes}
    name = str(value.get("type")) if isinstance(value, dict) else value
    if not isinstance(value, dict) or name not in by_name:
        _none_of(name, by_name, path)
    cls = by_name[name]
    known = {f.name: f for f in fields(cls)}
    given = {key: item for key, item in value.items() if key != "type"}
    for key in given:
        if key not in known:
            nearest = did_you_mean(key, known) or f"; there are {', '.join(known)}"
            raise UserError(f"{join(path, key)}: {name} has no such field{nearest}")
    missing = [key for key, f in known.items() if f.default is f.default_factory is MISSING and key not in given]
    if missing:
        raise UserError(f"{path or name}: {name} needs {', '.join(missing)}")
    arguments = {key: decode(item, known[key].type, join(path, key)) for key, item in given.items()}
    try:
        return cls(**arguments)
    except ValueError as e:
        raise UserError(_located(str(e), known, path)) from e


def _located(message: str, fields_known: Iterable[str], path: str) -> str:
    """The path in front of a message of __post_init__, which may start with one of its fields."""
    starts_with_field = re.split(r"\W", message, maxsplit=1)[0] in fields_known
    return join(path, message) if starts_with_field or not path else f"{path}: {message}"


def _function(value: Any, path: str) -> Callable:
    by_name = {f.__name__: f for f in FUNCTIONS}
    name = str(value.get("function")) if isinstance(value, dict) else value
    return by_name[name] if isinstance(value, dict) and name in by_name else _none_of(name, by_name, path)


def _tuple(value: Any, args: tuple, path: str) -> tuple:
    kinds = args[:1] * len(value) if isinstance(value, list) and args[1:] == (...,) else args
    if not isinstance(value, list) or len(value) != len(kinds):
        count = "numbers" if args[1:] == (...,) else f"{len(args)} numbers"
        raise UserError(f"{path}: expected {count} such as 1,2, got {value!r}")
    return tuple(decode(item, kind, path) for item, kind in zip(value, kinds, strict=True))


EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "names and values"}


def _plain(value: Any, kind: type, path: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and (number or value in ("inf", "-inf", "nan")):
        return float(value)
    if kind is int and number and value == value // 1:
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise UserError(f"{path}: expected {EXPECTED[kind]}, got {value!r}")


def _none_of(value: Any, names: Iterable, path: str) -> Any:
    choices = [str(name) for name in names]
    raise UserError(f"{path or 'type'}: {value!r} is none of {', '.join(choices)}{did_you_mean(str(value), choices)}")


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The end of a message: the nearest name, nothing if none is near."""
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
