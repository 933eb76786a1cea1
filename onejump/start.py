"""What a stage starts from: the model it takes its weights from, and the one it distils."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from onejump.analytic import AnalyticPrecond
from onejump.config import Distilling, Network, Recipe
from onejump.config_json import to_json
from onejump.cost import shape_of
from onejump.data.training_set import TrainingSet
from onejump.fit import check_precond, network_of
from onejump.hand_over import undecided
from onejump.importers.stable_diffusion import open_model, open_sha256
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks.lora import merged
from onejump.networks.mlp import MLPConfig
from onejump.networks.text_unet import TextUNetConfig
from onejump.overrides import value_text
from onejump.precond import Euler, StableDiffusion
from onejump.recipes.text import at_levels
from onejump.run_record import has_begun
from onejump.train import mix
from onejump.types import UserError


@dataclass(frozen=True)
class Given:
    """Models given on the command line. init: what a stage starts from. teacher: the diffusion model to distil.
    guide: the one that guides it, where Stage.guidance is not 1."""

    init: str | None = None
    teacher: str | None = None
    guide: str | None = None


def distilled_from(recipe: Recipe, teacher: str) -> Recipe:
    """The recipe for a teacher that is there already: of its network, and without the stages that would train one.

    Dropout stays the recipe's: it belongs to the training of the student, not to the weights.
    """
    stages = {name: stage for name, stage in recipe.stages.items() if not isinstance(stage.method, DSM)}
    if not any(isinstance(stage.method, Distilling) for stage in stages.values()):
        raise UserError(f"--teacher: no stage of {recipe.name} distils a diffusion model; leave it out, or see --init")
    saved, recipe = open_model(teacher), replace(recipe, stages=stages)
    if isinstance(saved.network, TextUNetConfig) and isinstance(saved.model.precond, StableDiffusion):
        return at_levels(recipe, saved.network, saved.model.precond)
    if isinstance(saved.network, TextUNetConfig) or isinstance(recipe.network, TextUNetConfig):
        raise UserError(f"--teacher {teacher}: it reads no text; {recipe.name} wants a Stable Diffusion folder")
    return replace(recipe, network=replace(saved.network, dropout=recipe.network.dropout))


def check_shape(network: Network, data: TrainingSet, teacher: str | None) -> None:
    """Raises UserError for a network of other images. One that reads text takes latents of any size."""
    wanted, (channels, side, _) = shape_of(network), data.shape
    if isinstance(network, TextUNetConfig) or wanted == data.shape:
        return
    theirs, ours = ("x".join(map(str, shape)) for shape in (wanted, data.shape))
    told, way_out = f"{theirs}, these ({data.name}) are {ours}", f"network.shape={value_text(list(data.shape))}"
    if teacher is not None:
        raise UserError(f"{teacher}: this teacher makes images of {told}; see --size")
    if not isinstance(network, MLPConfig):
        attention = [res * side // network.img_resolution for res in network.attn_resolutions]  # at the same levels
        way_out = f"network.img_channels={channels} network.img_resolution={side}"
        way_out += f" network.attn_resolutions={value_text(attention)}" if side != network.img_resolution else ""
    raise UserError(f"network: it is for images of {told}; give {way_out}")


@dataclass(frozen=True)
class Start:
    """What a stage starts from: random weights (no source), the stage before it, or a model given with --init."""

    source: Path | None
    sha256: str | None  # of its weights
    given: bool = False

    @property
    def name(self) -> str:
        return "the start" if self.source is None else str(self.source) if self.given else self.source.name

    @property
    def record(self) -> dict[str, Any]:
        """For start.json, stage.json and the model's provenance."""
        given = {"initialised_from": {"path": str(self.source), "sha256": self.sha256}} if self.given else {}
        return {"started_from": self.sha256, **given}

    def differs(self, folder: Path) -> bool:
        """Whether the stage in this folder has begun from something else."""
        return has_begun(folder) and recorded_start(folder).get("started_from", self.sha256) != self.sha256


def doubtful(recipe: Recipe, name: str, start: Start) -> str | None:
    """What to say of a stage that starts otherwise than its paper; the methods that begin at random weights may."""
    core = recipe.stages[name].core
    if start.source is not None or not isinstance(core, ECT | TCM):
        return None
    way_out = f"give one to onejump train with --stage {name} --init MODEL, and another --out"
    return f"{name}: starts from random weights, but {type(core).__name__} tunes a diffusion model; {way_out}"


def doubts(recipe: Recipe, names: Sequence[str], out: Path, given: Given) -> list[str]:
    """What to say, before these stages are trained, of settings that will not do what they are for."""
    found = []
    for name, stage in recipe.stages.items():
        rule, before = stage.until, diffusion_before(recipe, name)
        if rule and name in names and not has_begun(out / name):
            found.append(undecided(name, rule, recipe.evaluate_every, recipe.first_step(name), stage.steps))
        if stage.guidance == 1 or before is None or before not in names:
            continue
        if recipe.stages[before].label_dropout or has_begun(out / before):
            continue
        if guide_of_stage(name, out, given) is None and teacher_of(recipe, name, out, given) == out / before:
            lacks = "the teacher does not learn what no label is, which guidance needs"
            found.append(f"{before}.label_dropout=0: {lacks}; give {before}.label_dropout=0.1")
    return list(dict.fromkeys(text for text in found if text))


def check_guided(recipe: Recipe, names: Sequence[str], out: Path, given: Given) -> None:
    """Raises UserError now, and not after the stages before, for a teacher whose guidance has nothing to compare."""
    if recipe.network.label_dim or isinstance(recipe.network, TextUNetConfig):
        return
    for name in names:
        scale = recipe.stages[name].guidance
        if scale != 1 and guide_of_stage(name, out, given) is None:
            way_out = "leave guidance at 1, or give --guide MODEL"
            raise UserError(f"{name}.guidance: {scale:g}, but the teacher knows no classes to guide by; {way_out}")


def recorded_start(folder: Path) -> dict[str, Any]:
    """What start.json and stage.json say, {} without them."""
    found: dict[str, Any] = {}
    for path in (folder / "start.json", folder / "stage.json"):
        with contextlib.suppress(OSError, ValueError):  # a cut one is no record
            found |= json.loads(path.read_bytes())
    return found


def teacher_of(recipe: Recipe, name: str, out: Path, given: Given) -> Path:
    """--teacher's model; else the one that this stage starts, or has started, from by --init; else the last diffusion
    stage before it."""
    before = diffusion_before(recipe, name)
    begun = recorded_start(out / name).get("initialised_from", {}) if has_begun(out / name) else {}
    if found := given.teacher or given.init or begun.get("path"):
        return Path(found)
    if before is None:
        raise UserError(f"{name} distils a diffusion model, and {recipe.name} trains none: give --teacher MODEL")
    return out / before


def diffusion_before(recipe: Recipe, name: str) -> str | None:
    """The last diffusion stage before this one."""
    names = list(recipe.stages)
    before = [other for other in names[: names.index(name)] if isinstance(recipe.stages[other].method, DSM)]
    return before[-1] if before else None


def check_same_teacher(name: str, out: Path, given: Given) -> None:
    """Raises UserError for a --teacher that is not the one this stage has begun with."""
    if not has_begun(out / name):
        return
    begun = recorded_start(out / name)
    if given.teacher and begun.get("teacher_sha256") not in (None, open_sha256(Path(given.teacher))):
        raise UserError(f"--teacher {given.teacher}: {name} in {out} began with another teacher; give another --out")
    guide = guide_of_stage(name, out, given)
    if guide is not None and begun.get("guide", {}).get("sha256") != open_sha256(guide):
        raise UserError(f"--guide {guide}: {name} in {out} began without it, or with another; give another --out")


def guide_of_stage(name: str, out: Path, given: Given) -> Path | None:
    """--guide's model; else the one that this stage has begun with."""
    begun = recorded_start(out / name).get("guide", {}) if has_begun(out / name) else {}
    found = given.guide or begun.get("path")
    return None if found is None else Path(found)


def start_of(recipe: Recipe, name: str, out: Path, given: Given) -> Start:
    """Where this stage starts, or has started if that was a model given by name. Raises UserError without one."""
    folder, names, init = out / name, list(recipe.stages), given.init
    before = names[names.index(name) - 1] if name != names[0] else None
    begun = recorded_start(folder) if has_begun(folder) else {}
    if init is None and before is None and isinstance(recipe.stages[name].method, Distilling):
        init = given.teacher  # the student starts as its teacher
    if init:
        start = Start(Path(init), open_sha256(Path(init)), True)
        if start.differs(folder):
            raise UserError(f"--init {init}: {name} in {out} began from another model; give another --out")
        return start
    if "initialised_from" in begun:
        source = Path(begun["initialised_from"]["path"])
        done = (folder / "stage.json").exists()  # then the source may be gone
        return Start(source, begun["started_from"] if done else open_sha256(source), True)
    if before is None:
        return Start(None, None)
    if not (out / before / "stage.json").exists():
        way_out = f"train --stage {before} first, or give a model with --init"
        raise UserError(f"{name} starts from {before}, which is not trained yet in {out}: {way_out}")
    return Start(out / before, open_sha256(out / before))


def first_step_of(recipe: Recipe, name: str, out: Path, start: Start, afresh: bool) -> int:
    """The count at which this stage starts, or has started: that of the model it starts from, if it counts on."""
    begun = recorded_start(out / name) if has_begun(out / name) and not afresh else {}
    if "first_step" in begun:
        return begun["first_step"]
    if not recipe.stages[name].count_on or start.source is None or start.given:
        return recipe.first_step(name)
    before = recorded_start(start.source)
    if "hand_over" in before:
        return before["hand_over"]["best_step"]
    return before.get("last_step", recipe.first_step(name))


def starting_model(recipe: Recipe, name: str, start: Start) -> ConsistencyModel:
    """Random weights from the recipe's seed, or those of the source, which must be of the same kind."""
    stage = recipe.stages[name]
    torch.manual_seed(mix(recipe.seed, list(recipe.stages).index(name), 0, 0))
    network = network_of(recipe, stage)
    net = network.build()
    if start.source is not None:
        saved = open_model(start.source)
        if not starts_from(network, saved.network):
            differing = " ".join(differences(network, saved.network))
            way_out = (
                f"give {differing}" if differing else f"it reads a second time, as CTM's do, and {name}'s does not"
            )
            raise UserError(f"{start.source}: its network is not that of {name}; {way_out}, or another model")
        check_precond(str(start.source), saved.model.precond, name, stage.precond)
        theirs = saved.model.net.state_dict()
        if getattr(saved.network, "lora_rank", 0) != getattr(network, "lora_rank", 0):
            theirs = merged(theirs)
        theirs_too = {name: value for name, value in theirs.items() if name in net.state_dict()}
        net.load_state_dict(net.state_dict() | theirs_too)
    jump = Euler() if isinstance(stage.jump, AnalyticPrecond) else stage.jump
    return ConsistencyModel(net, stage.precond, jump, second_time=stage.second_time != "off")


def starts_from(network: Network, source: Network) -> bool:
    """Whether the weights of one are weights of the other.

    It may read a second time in addition, and either may be without labels of augmentation: the map of those adds
    nothing where they are 0.
    """
    adds = source.second_time == "off" or network.second_time != "off"
    augmented = {getattr(config, "augment_dim", 0) for config in (network, source)} - {0}
    return adds and len(augmented) < 2 and _weights(network) == _weights(source)


def differences(network: Network, source: Network) -> list[str]:
    """The overrides of a recipe that make its network the source's, but for what weights do not depend on."""
    same = type(network) is type(source)
    before, after = _weights(network if same else type(source)()), _weights(source)
    values = to_json(source)
    changed = [f"network.{name}={value_text(values[name])}" for name in after if after[name] != before[name]]
    return changed if same else [f"network={type(source).__name__}", *changed]


def _weights(network: Network) -> dict[str, Any]:
    """What decides which weights the network has, and what they mean, besides those of second time and augmentation."""
    others = (
        *("second_time", "dropout", "dropout_resolution", "augment_dim", "lora_rank"),
        "fourier_scale",  # its buffer is loaded
    )
    return {"type": type(network)} | {f.name: getattr(network, f.name) for f in fields(network) if f.name not in others}
