"""A recipe from start to end: its stages one after the other, evaluation, report. Each part resumes."""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onejump import __version__
from onejump.config import Evaluation, Recipe, to_json
from onejump.data.image_set import ImageSet
from onejump.evaluate import Judge, detector_for, evaluate
from onejump.evaluation.metrics import nearest_neighbours
from onejump.generate import balanced_labels, generate
from onejump.metrics_log import progress_for
from onejump.model import ConsistencyModel
from onejump.report import contact_sheet, neighbour_sheet, write_report
from onejump.samplers import Heun, Sampler
from onejump.saved import SavedModel, load_model, save_model, write_json
from onejump.train import Every, mix, train
from onejump.types import Images, UserError

GRID = 60  # images in a contact sheet: 6 rows of 10, so that each column is a class of the digits


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(recipe: Recipe, data: ImageSet, out: Path, device: torch.device, tensorboard: bool = False) -> Path:
    """Every stage, the evaluation and the report, in a folder that open_run has opened. Returns the report.

    What is finished already is left as it is.
    """
    judge = Judge(data, detector_for(data))
    for name in recipe.stages:
        train_stage(recipe, name, judge, out, device, tensorboard)
    evaluate_run(recipe, judge, out, device)
    return write_report(out)


def open_run(recipe: Recipe, data: ImageSet, out: Path, device: torch.device, command: str) -> None:
    """Writes recipe.json and run.json, or checks that the folder's are of this very run."""
    about = {"name": data.name, "n": data.n, "shape": list(data.shape), "classes": data.classes}
    about |= {"class_names": list(data.class_names), "fingerprint": data.fingerprint}
    if (out / "recipe.json").exists():
        difference = first_difference(read_json(out / "recipe.json"), to_json(recipe))
        if not difference and read_json(out / "run.json")["data"]["fingerprint"] != data.fingerprint:
            difference = "other images"
        if difference:
            raise UserError(f"{out} holds another run ({difference}); give another --out, or delete that folder")
        return
    content = {
        "data": about,
        "versions": versions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "seed": recipe.seed,
        "command": command,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    write_json(out / "run.json", content)
    write_json(out / "recipe.json", to_json(recipe))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """While it lasts, no other process trains in this folder. The system lets go of the lock if this one is killed."""
    with open(out / "run.json", "rb") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ModuleNotFoundError:  # Windows
            pass
        except BlockingIOError as error:
            raise UserError(f"{out}: another process trains there; wait for it, or give another --out") from error
        yield


@dataclass(frozen=True)
class Watch:
    """Looks at the EMA model of a stage while it trains: sample grids, and one-step Frechet distances."""

    judge: Judge
    sampler: Sampler
    wanted: Evaluation
    folder: Path

    def images(self, ema: ConsistencyModel, n: int) -> Images:
        steps = self.wanted.teacher_steps if isinstance(self.sampler, Heun) else 1
        labels = balanced_labels(n, self.judge.data.classes)
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
    """Trains one stage from the EMA of the stage before it (or of the model `init`), unless it is finished."""
    stage, folder, data = recipe.stages[name], out / name, judge.data
    if finished(folder / "stage.json"):
        say(f"{name}: finished before, kept")
        return
    watch = Watch(judge, stage.sampler, recipe.evaluation, folder)
    result = train(
        stage,
        stage.method.nets(starting_model(recipe, name, out, init)),
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
    origin = {"recipe": recipe.name, "stage": name, "step": result.last_step, "seed": recipe.seed}
    origin |= {"data": data.name, "data_fingerprint": data.fingerprint, "method": to_json(stage.method)}
    saved = SavedModel(result.ema, recipe.network, stage.sampler, data.shape, data.class_names, origin)
    save_model(folder / "model", saved)
    numbers = {"first_step": result.first_step, "last_step": result.last_step, "seconds": result.train_seconds}
    numbers |= {"seconds_on_the_clock": result.seconds, "images": result.images, "skipped": result.skipped}
    write_json(folder / "stage.json", numbers | {"parameters": sum(p.numel() for p in result.ema.parameters())})


def starting_model(recipe: Recipe, name: str, out: Path, init: str | None) -> ConsistencyModel:
    """Random weights from the recipe's seed, or those of the stage before."""
    stage, names = recipe.stages[name], list(recipe.stages)
    before = names[names.index(name) - 1] if name != names[0] else None
    torch.manual_seed(mix(recipe.seed, names.index(name), 0, 0))
    net = recipe.network.build()
    if before and not init and not (out / before / "stage.json").exists():
        way_out = f"train --stage {before} first, or give a model with --init"
        raise UserError(f"{name} starts from {before}, which is not trained yet in {out}: {way_out}")
    if init or before:
        source = load_model(init or out / str(before))
        if source.network != recipe.network:
            raise UserError(f"{init or before}: its network is {source.network}, this recipe has {recipe.network}")
        net.load_state_dict(source.model.net.state_dict())
    return ConsistencyModel(net, stage.precond, stage.jump)


def evaluate_run(recipe: Recipe, judge: Judge, out: Path, device: torch.device) -> None:
    """evaluation.json and the pictures of the report: every stage from the same noise."""
    wanted, path = recipe.evaluation, out / "evaluation.json"
    if finished(path):
        say("evaluation: finished before, kept")
        return
    labels, shape, stages = balanced_labels(GRID, judge.data.classes), judge.data.shape, {}
    contact_sheet(real_images(judge.data, labels), 10, out / "report" / "real.png")
    for name in recipe.stages:
        saved = load_model(out / name)
        model = saved.model.to(device)
        steps = (wanted.teacher_steps,) if isinstance(saved.sampler, Heun) else wanted.steps
        say(f"evaluation: {name}, {wanted.n} images with {' and '.join(map(str, steps))} step(s)")
        stages[name] = evaluate(judge, saved, steps, wanted.n, wanted.seed)
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


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """ "stage1.steps was 800, now 1000", or "" for equal configurations."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        below = (first_difference(old[k], new[k], k if path in ("", "stages") else f"{path}.{k}") for k in old)
        return next((text for text in below if text), "")
    return "" if old == new else f"{path} was {old}, now {new}"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "numpy", "scipy", "pillow", "safetensors", "scikit-learn")
    return {"onejump": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {os.cpu_count()} cores)"


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        way_out = "delete recipe.json there and give the same command again if it is this very run, else another --out"
        raise UserError(f"{path}: cannot be read ({error}); {way_out}") from error


def finished(record: Path) -> bool:
    """Whether the last thing that a part of the run writes is there, and whole."""
    try:
        return isinstance(json.loads(record.read_bytes()), dict)
    except FileNotFoundError:
        return False
    except ValueError:
        say(f"{record}: damaged, is made again")
        return False
