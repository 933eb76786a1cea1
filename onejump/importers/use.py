"""How a published model is used, by the method that trained it: its jump, its sampler's times, and where it ends."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from onejump.config import OneJump
from onejump.importers.published import method_of, remark
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.precond import CM, EDM, Euler, ToData
from onejump.samplers import ODE, Multistep, Sampler, Trajectory
from onejump.types import UserError

Method = Literal["edm", "cm", "ctm", "ict", "ect", "tcm"]
METHODS: tuple[Method, ...] = get_args(Method)
Qkv = Literal["block", "heads"]
Known = SongUNetConfig | ADMUNetConfig | EDM2UNetConfig
# Heun steps of a teacher, up to 32x32 and above (NVlabs/edm, README.md), and of EDM2's (NVlabs/edm2, README.md). On
# ImageNet EDM takes 256 with noise added on the way, which is not here, or 40 without.
HEUN, HEUN_EDM2 = (18, 40), 32
# Where the second step starts, up to 32x32 and above. CM, iCT and ECT: --mid_t of locuslab/ect, ct_train.py, and its
# branch for ImageNet; TCM: NVlabs/FastGen, configs. No time below t' is used.
MID, MID_TCM = (0.821, 1.526), (1.0, 1.526)
SHIFT = 0.003  # of c_skip and c_out in evaluation: sigma_min of ECMPrecond, locuslab/ect, training/networks.py


@dataclass(frozen=True)
class Given:
    """What the user adds to what a file says. None: nothing."""

    method: str | None = None
    qkv: str | None = None  # order of the rows of OpenAI's qkv: all q, k, v, or head by head
    t_min: float | None = None
    head_channels: int | None = None

    def __post_init__(self) -> None:
        for field, choices in (("method", METHODS), ("qkv", get_args(Qkv))):
            value = getattr(self, field)
            if value not in (None, *choices):
                raise UserError(f"--{field} {value}: there are {', '.join(choices)}")
        if self.t_min is not None and not 0 <= self.t_min < 80:
            raise UserError(f"--t-min {self.t_min:g}: a time of 0 or more and below 80 is needed")
        if self.head_channels is not None and self.head_channels < 1:
            raise UserError(f"--head-channels {self.head_channels}: 1 or more is needed")

    def only(self, path: Path, kind: str, *fields: str) -> None:
        """Raise UserError if something is given that this kind of file has no use for."""
        for field in ("method", "qkv", "t_min", "head_channels"):
            if getattr(self, field) is not None and field not in fields:
                raise UserError(
                    f"--{field.replace('_', '-')}: {path} is a file of {kind}, which has no such choice; leave it out"
                )


@dataclass(frozen=True)
class Use:
    """The parts of a model that its method decides, and what to print about them; without meaning while undecided."""

    jump: OneJump
    sampler: Sampler
    t_min: float
    facts: dict[str, str]
    undecided: str = ""


def decided(path: Path, given: Given, content: str | None, because: str = "") -> tuple[str | None, str]:
    """(method, how it is known), by the content, else by --method, else by the name that a file is published under.

    content: the method that the content tells of, and what in it tells. Raises UserError if --method says another.
    """
    if content:
        if given.method not in (None, content):
            raise UserError(f"--method {given.method}: {path} is of {content} ({because}); leave the option out")
        return content, because
    if given.method:
        return given.method, "as --method says; the file does not"
    named = method_of(path)
    return named, f"by its name, {path.name}, that of a published file" if named else ""


def use_of(
    method: str,
    how: str,
    network: Known,
    precond: EDM,
    given: Given,
    t_min: float | None = None,
    mid: tuple[float, ...] | None = None,
    shift: float = SHIFT,
) -> Use:
    """t_min, mid, shift: where the file tells more than the method.

    mid: the published times of the second step on. shift: how far from the boundary ECT's CIFAR-10 models are used.
    """
    small = network.img_resolution <= 32
    facts = {"training method": f"{method} ({how})"}
    if method == "ctm" or network.second_time != "off":
        if method != "ctm" or network.second_time == "off":
            raise UserError(f"--method {method}: CTM's networks read a second time, and this one is not used so")
        return Use(Euler(), Trajectory(), _t_min(given, 0.0), facts)
    if method == "edm":
        steps = HEUN_EDM2 if isinstance(network, EDM2UNetConfig) else HEUN[not small]
        return Use(ToData(), ODE(steps=steps), _t_min(given, 0.0), facts)
    times = MID_TCM if method == "tcm" else MID
    jump: OneJump = CM(0.002, precond.sigma_data)
    if method == "tcm":
        if t_min is None and given.t_min is None:
            facts["t_min"] = "1, that of TCM's stage 2, is assumed: the file does not say; --t-min 0 for stage 1"
        jump, t_min = ToData(), 1.0 if t_min is None else t_min
    if method == "ect":  # on ImageNet, with EDM2's network, it is evaluated as it is trained
        jump = ToData() if isinstance(network, EDM2UNetConfig) or not shift else CM(shift, precond.sigma_data)
    t_min = _t_min(given, t_min or 0.0)
    kept = tuple(t for t in ((times[not small],) if mid is None else mid) if t >= t_min)
    if not kept:
        facts["sampling"] = "one step; no time of a second is known: --times 80,T samples with two"
    return Use(jump, Multistep(80.0, kept), t_min, facts)


def open_use(path: Path, given: Given, choices: str) -> Use:
    """Until the user decides: the printout says so, and nothing is written."""
    undecided = f"{path}: the file does not say how it was trained; give --method {choices}{remark(path)}"
    return Use(ToData(), ODE(), _t_min(given, 0.0), {"training method": "not known"}, undecided)


def one_step(path: Path, given: Given, why: str) -> Use:
    """Of a consistency model of which no more is known: the one step that is the same for all of them."""
    sampling = f"one step, the same for both; give --method for more{remark(path)}"
    return Use(
        ToData(),
        Multistep(80.0, ()),
        _t_min(given, 0.0),
        {"training method": f"not known ({why})", "sampling": sampling},
    )


def _t_min(given: Given, found: float) -> float:
    return found if given.t_min is None else given.t_min
