"""A recipe from start to end: its stages one after the other, evaluation, report. Each part resumes."""

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onejump.config import Evaluation, Recipe, to_json
from onejump.data.image_set import ImageSet
from onejump.evaluate import Judge, detector_for, evaluate
from onejump.evaluation.metrics import nearest_neighbours
from onejump.fit import images_for
from onejump.generate import balanced_labels, generate
from onejump.metrics_log import progress_for
from onejump.model import ConsistencyModel
from onejump.precond import EDM
from onejump.report import contact_sheet, neighbour_sheet, write_report
from onejump.run_record import finished, has_begun, read_json, say
from onejump.samplers import Heun, Sampler
from onejump.saved import SavedModel, load_model, model_sha256, save_model, write_json
from onejump.train import Every, TrainResult, mix, train
from onejump.types import Images, UserError

GRID = 60  # images in a contact sheet: 6 rows of 10, so that each column is a class of the digits


def run(recipe: Recipe, data: ImageSet, out: Path, device: torch.device, tensorboard: bool = False) -> Path:
    """Every stage, the evaluation and the report, in a folder that open_run has opened. Returns the report.

    What is finished already is left as it is, unless the models it was made from have changed.
    """
    judge = Judge(data, detector_for(data))
    for name in recipe.stages:
        train_stage(recipe, name, judge, out, device, tensorboard)
    evaluate_run(recipe, judge, out, device)
    return write_report(out)


@dataclass(frozen=True)
class Watch:
    """Looks at the EMA model of a stage while it trains: sample grids, and one-step Frechet distances."""

    judge: Judge
    sampler: Sampler
    wanted: Evaluation
    folder: Path
    classes: int  # that the model knows

    def images(self, ema: ConsistencyModel, n: int) -> Images:
        steps = self.wanted.teacher_steps if isinstance(self.sampler, Heun) else 1
        labels = balanced_labels(n, self.classes)
        return generate(ema, self.sampler, steps, range(n), self.judge.data.shape, labels, self.wanted.seed)

    def on_sample(self, ema: ConsistencyModel, step: int) -> None:
        contact_sheet(self.images(ema, GRID), 10, self.folder / "samples" / f"step-{step:08d}.png")

    def on_evaluate(self, ema: ConsistencyModel, step: int) -> dict[str, Any]:
        if isinstance(self.sampler, Heun):  # dozens of network calls an image: evaluated once, at the end
            return {"frechet": {}}
        return {"frechet": {"1": self.judge.frechet(self.images(ema, self.wanted.n))}}


def train_stage(
    recipe: Recipe, name: str, judge: Judge, out: Path, device: torch.device, tensorboard: bool, init: str | None = None
) -> None:
    """Trains one stage from the EMA of the stage before it (or of the model `init`), unless it is finished.

    Where what it started from has changed since, it is trained again, from the start.
    """
    stage, folder, data = recipe.stages[name], out / name, images_for(recipe.network, judge.data)
    start = start_of(recipe, name, out, init)
    stale = start.differs(folder)
    if not stale and finished(folder / "stage.json"):
        say(f"{name}: finished before, kept")
        return
    nets = stage.method.nets(starting_model(recipe, name, start))
    if stale:
        say(f"{name}: {start.name} has changed since, trained again")
        clear(folder)
    write_json(folder / "start.json", start.record)
    watch = Watch(judge, stage.sampler, recipe.evaluation, folder, data.classes)
    result = train(
        stage,
        nets,
        data,
        folder,
        seed=mix(recipe.seed, list(recipe.stages).index(name), 0, 1),  # no stage repeats another's noise
        first_step=recipe.first_step(name),
        every=Every(recipe.log_every, recipe.save_every, recipe.sample_every, recipe.evaluate_every),
        device=device,
        progress=progress_for(name),
        on_sample=watch.on_sample,
        on_evaluate=watch.on_evaluate,
        tensorboard=tensorboard,
    )
    origin = {"recipe": recipe.name, "stage": name, "step": result.last_step, "seed": recipe.seed, **start.record}
    origin |= {"data": data.name, "data_fingerprint": judge.data.fingerprint, "method": to_json(stage.method)}
    save_model(
        folder / "model", SavedModel(result.ema, recipe.network, stage.sampler, data.shape, data.class_names, origin)
    )
    write_json(folder / "stage.json", numbers_of(result) | start.record | {"model_sha256": model_sha256(folder)})


def numbers_of(result: TrainResult) -> dict[str, Any]:
    numbers = {"first_step": result.first_step, "last_step": result.last_step, "seconds": result.train_seconds}
    numbers |= {"seconds_on_the_clock": result.seconds, "images": result.images, "skipped": result.skipped}
    return numbers | {"parameters": sum(p.numel() for p in result.ema.parameters())}


def clear(folder: Path) -> None:
    """Removes what training has left in a stage's folder; start.json last, so that a kill in between is noticed."""
    for name in ("stage.json", "model", "checkpoints", "samples", "tensorboard"):
        (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "evaluations.jsonl", "start.json"):
        (folder / name).unlink(missing_ok=True)


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


def recorded_start(folder: Path) -> dict[str, Any]:
    """What start.json and stage.json say, {} without them."""
    found: dict[str, Any] = {}
    for path in (folder / "start.json", folder / "stage.json"):
        with contextlib.suppress(OSError, ValueError):  # a cut one is no record
            found |= json.loads(path.read_bytes())
    return found


def start_of(recipe: Recipe, name: str, out: Path, init: str | None) -> Start:
    """Where this stage starts, or has started if that was a model given with --init. Raises UserError without one."""
    folder, names = out / name, list(recipe.stages)
    before = names[names.index(name) - 1] if name != names[0] else None
    begun = recorded_start(folder) if has_begun(folder) else {}
    if init:
        start = Start(Path(init), model_sha256(Path(init)), True)
        if start.differs(folder):
            raise UserError(f"--init {init}: {name} in {out} began from another model; give another --out")
        return start
    if "initialised_from" in begun:
        source = Path(begun["initialised_from"]["path"])
        done = (folder / "stage.json").exists()  # then the source may be gone
        return Start(source, begun["started_from"] if done else model_sha256(source), True)
    if before is None:
        return Start(None, None)
    if not (out / before / "stage.json").exists():
        way_out = f"train --stage {before} first, or give a model with --init"
        raise UserError(f"{name} starts from {before}, which is not trained yet in {out}: {way_out}")
    return Start(out / before, model_sha256(out / before))


def starting_model(recipe: Recipe, name: str, start: Start) -> ConsistencyModel:
    """Random weights from the recipe's seed, or those of the source, which must be of the same kind."""
    stage = recipe.stages[name]
    torch.manual_seed(mix(recipe.seed, list(recipe.stages).index(name), 0, 0))
    net = recipe.network.build()
    if start.source is not None:
        saved = load_model(start.source)
        if saved.network != recipe.network:
            raise UserError(f"{start.source}: its network is {saved.network}, this recipe has {recipe.network}")
        assert isinstance(saved.model.precond, EDM)
        theirs, ours = saved.model.precond.sigma_data, stage.precond.sigma_data
        if theirs != ours:
            raise UserError(
                f"{start.source}: its precond.sigma_data is {theirs:g}, but {name}.precond.sigma_data is {ours:g}; "
                "give it the same, or another model"
            )
        net.load_state_dict(saved.model.net.state_dict())
    return ConsistencyModel(net, stage.precond, stage.jump)


def evaluate_run(recipe: Recipe, judge: Judge, out: Path, device: torch.device) -> None:
    """evaluation.json and the pictures of the report: every stage from the same noise."""
    wanted, path = recipe.evaluation, out / "evaluation.json"
    hashes = {name: model_sha256(out / name) for name in recipe.stages}
    if finished(path):
        before = read_json(path).get("stages", {})
        changed = [name for name in hashes if before.get(name, {}).get("model_sha256") != hashes[name]]
        if not changed:
            say("evaluation: finished before, kept")
            return
        say(f"evaluation: {', '.join(changed)} changed since, made again")
    labels, shape, stages = balanced_labels(GRID, recipe.network.label_dim), judge.data.shape, {}
    contact_sheet(real_images(judge.data, labels), 10, out / "report" / "real.png")
    for name in recipe.stages:
        saved = load_model(out / name)
        model = saved.model.to(device)
        steps = (wanted.teacher_steps,) if isinstance(saved.sampler, Heun) else wanted.steps
        say(f"evaluation: {name}, {wanted.n} images with {' and '.join(map(str, steps))} step(s)")
        stages[name] = evaluate(judge, saved, steps, wanted.n, wanted.seed) | {"model_sha256": hashes[name]}
        for k in steps:
            images = generate(model, saved.sampler, k, range(GRID), shape, labels, wanted.seed)
            contact_sheet(images, 10, out / "report" / f"{name}-{k}step.png")
            if k == steps[0]:
                nearest = judge.data.images[nearest_neighbours(images[:30], judge.data.images)[0]]
                neighbour_sheet(images[:30], nearest, 10, out / "report" / f"neighbours-{name}.png")
    write_json(path, {"detector": judge.detector.name, "reference": judge.reference, "stages": stages})


def real_images(data: ImageSet, labels: torch.Tensor | None) -> Images:
    """As many real images as a sheet holds, of the classes that the samples were asked for."""
    if labels is None or data.labels is None:
        return data.images[torch.arange(GRID) % data.n]
    of_class = [torch.nonzero(data.labels == c).flatten() for c in range(data.classes)]
    rows = [of_class[c][(i // data.classes) % len(of_class[c])] for i, c in enumerate(labels.tolist())]
    return data.images[torch.stack(rows)]
