"""What is on file about a model that is to be compared: its training, its evaluation, the cost of its network."""

import contextlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from onejump.compare_cost import flops_of_call, passes_of
from onejump.config_json import from_json
from onejump.fit import network_of
from onejump.importers.stable_diffusion import open_model, open_sha256
from onejump.page import guidance_in, plural
from onejump.prompts import SHOWN, reads_text
from onejump.run_folder import RunFolder, StageFolder, read_json, read_run
from onejump.samplers import ODE, Jumps, Multistep, Sampler
from onejump.saved import SavedModel
from onejump.types import UserError


@dataclass(frozen=True)
class Target:
    """What was asked for: a model, the stage of a run that made it if one did, and a record of `evaluate` if given."""

    path: Path
    run: RunFolder | None = None
    stage: StageFolder | None = None
    record: Path | None = None

    @property
    def name(self) -> str:
        if self.run and self.stage:
            return f"{self.run.path.resolve().name}/{self.stage.name}"
        path = self.path.resolve()
        return path.stem if path.is_file() else path.parent.name if path.name == "model" else path.name


@dataclass(frozen=True)
class Part:
    """A finished stage: what one part of a model's training has cost."""

    run: RunFolder
    stage: StageFolder

    @cached_property
    def flops(self) -> int | None:
        """Images times passes times operations of a pass; None where the loss has networks of its own (critic, LPIPS).

        Passes are those of a step at the end of any curriculum; a backward pass counts as two.
        """
        passes = passes_of(self.run.recipe, self.stage.stage)
        network = network_of(self.run.recipe, self.stage.stage)
        return None if passes is None else self.stage.summary["images"] * passes * flops_of_call(network)


@dataclass(frozen=True)
class Training:
    """Of a model and of all that it was trained from: each stage once, its own last. whole: all of it is on file."""

    parts: tuple[Part, ...]
    whole: bool

    @property
    def images(self) -> int:
        return sum(part.stage.summary["images"] for part in self.parts)

    @property
    def seconds(self) -> float:
        return sum(part.stage.summary["seconds"] for part in self.parts)

    @cached_property
    def flops(self) -> int | None:
        flops = [part.flops for part in self.parts]
        return None if None in flops else sum(n for n in flops if n is not None)

    @property
    def devices(self) -> set[str | None]:
        return {device_of(part.run.run) for part in self.parts}


@dataclass(frozen=True)
class Record:
    """An evaluation: numbers by sampling steps, against which real images and through which detector."""

    reference: dict[str, Any]
    steps: dict[int, dict[str, Any]]
    device: str | None
    sampler: Sampler
    rounding: str = "round"

    @property
    def samples(self) -> int:
        return next(iter(self.steps.values()))["n"]


@dataclass(frozen=True, eq=False)
class Entry:
    """One model of a comparison."""

    name: str
    target: Target
    saved: SavedModel  # its weights on the meta device
    parameters: int
    flops: int  # of one network call for one image
    sampler: Sampler
    training: Training | None
    record: Record | None
    remarks: tuple[str, ...] = ()

    @property
    def method(self) -> str | None:
        return self.saved.provenance.get("method", {}).get("type")

    @property
    def is_diffusion(self) -> bool:
        return isinstance(self.sampler, ODE)

    @property
    def stage(self) -> StageFolder | None:
        return self.target.stage

    @property
    def data(self) -> str | None:
        return self.saved.provenance.get("data")

    @property
    def fingerprint(self) -> str | None:
        return self.saved.provenance.get("data_fingerprint")

    @property
    def results(self) -> dict[int, dict[str, Any]]:
        return self.record.steps if self.record else {}

    @property
    def sheet_steps(self) -> list[int]:
        """Numbers of steps whose samples are shown: those that were evaluated."""
        if self.results:
            return list(self.results)
        if isinstance(self.sampler, ODE | Jumps):
            return [self.sampler.steps if isinstance(self.sampler, ODE) else len(self.sampler.start)]
        return [1] if isinstance(self.sampler, Multistep) and self.sampler.max_steps == 1 else [1, 2]


def device_of(about: dict[str, Any]) -> str | None:
    """What a run.json or a record was made on."""
    device, threads = about.get("device"), about.get("threads")
    return f"{device}, {plural(threads, 'thread')}" if device and threads else device


def targets_of(text: str, all_stages: bool = False) -> list[Target]:
    """PATH, or PATH=RECORD.json: a run (its last finished stage, or all of them), RUN/STAGE, or a model."""
    path, record = Path(text), None
    if not path.exists() and text.endswith(".json") and "=" in text:
        path, record = (Path(part) for part in text.rsplit("=", 1))
        if not record.is_file():
            raise UserError(f"{record}: no such file; `onejump evaluate {path} --out {record}` would write it")
    if not path.exists():
        way_out = "give the folder of a run, RUN/STAGE, or a model, with =RECORD.json after it if it was evaluated"
        raise UserError(f"{path}: no such run or model; {way_out}")
    found = _of_run(path, all_stages) or [Target(path)]
    if record and len(found) > 1:
        raise UserError(f"{text}: a record is of one model, and with --stages these are {len(found)}")
    return [replace(target, record=record) for target in found]


def _run(path: Path) -> RunFolder:
    recipe = path / "recipe.json"
    content = read_json(recipe)
    try:
        from_json(content)
    except UserError as error:
        way_out = "was it made by another version? A copy of the model's folder outside of the run can be compared"
        raise UserError(f"{recipe}: cannot be read ({error}); {way_out}") from error
    return read_run(path)


def _of_run(path: Path, all_stages: bool = False) -> list[Target]:
    """The stages that this path means, [] if it lies in no run."""
    if (path / "recipe.json").is_file():
        run = _run(path)
        done = [stage for stage in run.stages if stage.summary]
        if not done:
            raise UserError(f"{path}: no stage of this run is finished; it goes on with `{run.command}`")
        chosen = done if all_stages else done[-1:]
    else:
        folder = path.resolve()
        folder = folder.parent if folder.name == "model" else folder
        if not (folder.parent / "recipe.json").is_file():
            return []
        run = _run(path.parent if path.name == folder.name else folder.parent)
        chosen = [stage for stage in run.stages if stage.name == folder.name]
        if chosen and not chosen[0].summary:
            raise UserError(f"{path}: this stage is not finished; it goes on with `{run.command}`")
    return [Target(run.path / stage.name, run, stage) for stage in chosen]


def entry_of(target: Target) -> Entry:
    """Reads what is on file. Raises UserError for a damaged model or record, or a record of another model."""
    saved = open_model(target.path)
    parameters = sum(p.numel() for p in saved.model.parameters())
    saved.model.to("meta")
    training = None
    if target.run and target.stage:
        parts: dict[str, Part] = {}
        whole = _collect(target.run, target.stage, parts)
        training = Training(tuple(reversed(parts.values())), whole)
    record, remarks = record_of(target, saved)
    if training and not training.whole:
        remarks += ("its start or teacher was trained elsewhere: images, time and compute of training are not all",)
    sampler = record.sampler if record else saved.sampler
    if reads_text(saved):
        remarks += (f"its samples are of the prompts {', '.join(map(repr, SHOWN))}, in turn",)
    flops = flops_of_call(saved.network)
    return Entry(target.name, target, saved, parameters, flops, sampler, training, record, remarks)


def _collect(run: RunFolder, stage: StageFolder, parts: dict[str, Part]) -> bool:
    """Enters this stage, and what its start and its teacher were trained from; whether all of it was found."""
    parts[open_sha256(run.path / stage.name)] = Part(run, stage)
    whole = "started_from" in stage.summary
    for sha256 in (stage.summary.get("teacher_sha256"), stage.summary.get("started_from")):
        if sha256 is not None and sha256 not in parts:
            source = _source(run, stage, sha256)
            whole = source is not None and _collect(*source, parts) and whole
    return whole


def _source(run: RunFolder, stage: StageFolder, sha256: str) -> tuple[RunFolder, StageFolder] | None:
    """The finished stage that made the model with this checksum."""
    before = [Target(run.path / other.name, run, other) for other in run.stages if other.name != stage.name]
    candidates = [target for target in before if target.stage and target.stage.summary]
    if given := stage.summary.get("initialised_from"):
        with contextlib.suppress(UserError):  # what lies there now is damaged, or trained again
            candidates += _of_run(Path(given["path"]))
    for target in candidates:
        if target.run and target.stage and open_sha256(target.path) == sha256:
            return target.run, target.stage
    return None


def record_of(target: Target, saved: SavedModel) -> tuple[Record | None, tuple[str, ...]]:
    """The record given, or the run's own evaluation of this stage; and what is wrong with it."""
    content: dict[str, Any] = {}
    if target.record:
        content = read_json(target.record)
        if "guidance" in content:
            told = f"{target.path} was judged with {guidance_in(content['guidance'])}, which is not compared"
            raise UserError(f"{target.record}: {told}; give a record of `onejump evaluate` without --guidance")
        if content.get("model_sha256") != open_sha256(target.path):
            raise UserError(f"{target.record}: this is no record of {target.path}; see `onejump evaluate --out`")
    elif target.run and target.stage:
        whole, own = target.run.evaluation, target.run.evaluation.get("stages", {}).get(target.stage.name, {})
        device = {name: target.run.run.get(name) for name in ("device", "threads")}
        content = {"reference": whole.get("reference"), **device, **own}
        if own and own.get("model_sha256") != open_sha256(target.path):
            return None, ("its evaluation is of other weights and left out: run the command of the run again",)
    if not content.get("steps"):
        way_out = "give MODEL=RECORD.json with the record that `onejump evaluate MODEL --out RECORD.json` writes"
        return None, (f"not evaluated: {way_out}",)
    try:
        return _read(content, saved), ()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        place = target.record or target.path.parent / "evaluation.json"
        raise UserError(f"{place}: no record of an evaluation ({error!r}); make it again") from error


def _read(content: dict[str, Any], saved: SavedModel) -> Record:
    steps = {int(k): numbers for k, numbers in sorted(content["steps"].items(), key=lambda item: int(item[0]))}
    for numbers in steps.values():
        _ = float(numbers["frechet"]), int(numbers["n"]), int(numbers["nfe"])
    sampler = from_json(content["sampler"]) if "sampler" in content else saved.sampler
    rounding = content.get("rounding", "round")
    prompts = content.get("question", {}).get("prompts", {})  # of a model that reads text
    asked = prompts | {"prompts": next(iter(steps.values()))["n"]} if prompts else {}
    return Record(content["reference"] | asked, steps, device_of(content), sampler, rounding)
