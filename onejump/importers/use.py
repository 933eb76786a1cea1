"""How a published model is used, by the method that trained it: its jump, its sampler's times, and where it ends."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from onejump.config import OneJump
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
STEPS = {32: "18 Heun steps are usual", 64: "40 Heun steps are usual"}


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
    """The parts of a model that its method decides, and what to print about them."""

    jump: OneJump
    sampler: Sampler
    t_min: float
    facts: dict[str, str]
    undecided: str = ""


def from_name(path: Path) -> str | None:
    """The one method that the file's name names, if there is one."""
    words = {"cd": "cm", "ct": "cm", "cm": "cm", "ecm": "ect", "edm2": "edm"} | {name: name for name in METHODS}
    found = {words[word] for word in re.split(r"[^a-z0-9]+", path.name.lower()) if word in words}
    return found.pop() if len(found) == 1 else None


def decided(path: Path, given: Given, content: str | None, because: str = "") -> tuple[str | None, str]:
    """(method, how it is known), by the content, else by --method, else by the name of the file.

    content: the method that the content tells of, and what in it tells. Raises UserError if --method says another.
    """
    if content:
        if given.method not in (None, content):
            raise UserError(f"--method {given.method}: {path} is of {content} ({because}); leave the option out")
        return content, because
    if given.method:
        return given.method, "as --method says; the file does not"
    named = from_name(path)
    return named, f"by the file's name {path.name}, a hint only; --method decides" if named else ""


def use_of(
    method: str,
    how: str,
    network: Known,
    precond: EDM,
    given: Given,
    t_min: float | None = None,
    mid: tuple[float, ...] | None = None,
    shift: float = 0.003,
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
        return Use(ToData(), ODE(), _t_min(given, 0.0), facts | {"sampling": _usual_steps(network)})
    times: tuple[float, ...] = (0.821,) if small else (1.526,)
    jump: OneJump = CM(0.002, precond.sigma_data)
    if method == "tcm":
        if t_min is None and given.t_min is None:
            facts["t_min"] = "1, that of TCM's stage 2, is assumed: the file does not say; --t-min 0 for stage 1"
        jump, times = ToData(), (1.0,) if small else (1.526,)
        t_min = 1.0 if t_min is None else t_min
    if method == "ect":  # on ImageNet, with EDM2's network, it is evaluated as it is trained
        jump = ToData() if isinstance(network, EDM2UNetConfig) or not shift else CM(shift, precond.sigma_data)
    t_min = _t_min(given, t_min or 0.0)
    times = tuple(t for t in (times if mid is None else mid) if t >= t_min)
    if not times:
        facts["sampling"] = "one step; no time of a second is known: --times 80,T samples with two"
    return Use(jump, Multistep(80.0, times), t_min, facts)


def open_use(use: Use, undecided: str) -> Use:
    """Until the user decides: the printout says so, and nothing is written."""
    return replace(use, undecided=undecided, facts=use.facts | {"training method": f"not known: {undecided}"})


def one_step(network: Known, given: Given, why: str) -> Use:
    """Of a consistency model of which no more is known: the one step that is the same for all of them."""
    times = f"{why}; it is sampled in one step, the same for both: give --method for more"
    return Use(ToData(), Multistep(80.0, ()), _t_min(given, 0.0), {"training method": times})


def _t_min(given: Given, found: float) -> float:
    return found if given.t_min is None else given.t_min


def _usual_steps(network: Known) -> str:
    if isinstance(network, EDM2UNetConfig):
        return "32 Heun steps are usual (onejump sample --steps 32)"
    if isinstance(network, ADMUNetConfig):
        return "40 to 256 Heun steps are usual; the noise that EDM adds in its 256 on ImageNet is not"
    return STEPS.get(network.img_resolution, "18 to 40 Heun steps are usual") + " (onejump sample --steps N)"
