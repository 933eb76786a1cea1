"""recipe.json and run.json: what a run's folder says it is, who may write there, and which changes it bears."""

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
from onejump.checkpoint import saved_steps
from onejump.config import Recipe
from onejump.config_json import from_json, join, to_json
from onejump.data.latents import LatentSet
from onejump.data.text_set import TextSet
from onejump.data.training_set import TrainingSet
from onejump.judge import Judge, detector_for
from onejump.saved import not_written, write_json
from onejump.types import UserError

WHILE_IT_TRAINS = ("rate", "clip", "precision", "micro_batch")  # what a stage that has begun may change
INTERVALS = ("log_every", "save_every", "sample_every", "evaluate_every")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """While it lasts, no other process trains in this folder. The system lets go of the lock if this one is killed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a")
    except OSError as error:
        raise not_written(out, error) from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ModuleNotFoundError:  # Windows
            pass
        except BlockingIOError as error:
            raise UserError(f"{out}: another process trains there; wait for it, or give another --out") from error
        yield


@dataclass(frozen=True)
class Change:
    """Of one value of the configuration, in JSON; `str` gives "stage1.rate.lr was 0.001, now 0.0005"."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path} was {_short(self.old)}, now {_short(self.new)}"


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return value.get("type") or value.get("function") or ", ".join(value)
    return value


def changes(old: Any, new: Any, path: str = "") -> Iterator[Change]:
    """From one configuration to the other; an object of another type is one change."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys() and _type(old) == _type(new):
        for key in old:
            yield from changes(old[key], new[key], join(path, key))
    elif old != new:
        yield Change(path or "the recipe", old, new)


def _type(value: dict) -> Any:
    return value.get("type"), value.get("function")


def has_begun(folder: Path) -> bool:
    """Whether this stage has results to lose."""
    return (folder / "stage.json").exists() or bool(saved_steps(folder / "checkpoints"))


def begun(out: Path) -> bool:
    """Whether this is the folder of a run any stage of which has."""
    return (out / "recipe.json").exists() and any(has_begun(path) for path in out.iterdir())


def check_run(recipe: Recipe, data: TrainingSet, out: Path) -> list[Change]:
    """What is new against the folder's recipe.json. Raises UserError if its results would be another run's.

    What has not begun may change, and so may a few fields of the stage that is training.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file, where a run needs a folder; give another --out")
    if not (out / "recipe.json").exists():
        return []
    old, run = read_json(out / "recipe.json"), read_json(out / "run.json")
    found = list(changes(to_json(from_json(old)), to_json(recipe)))  # with the fields that are newer than the run
    trained = [path.name for path in out.iterdir() if has_begun(path)]
    if not trained:
        return found
    refused = [str(change) for change in found if not _bearable(change, recipe, out)]
    if not refused and run["data"]["fingerprint"] != data.fingerprint:
        refused = ["other images"]
    if not refused:
        moved = [name for name in trained if recipe.first_step(name) != from_json(old).first_step(name)]
        refused = [f"{change}, from which {moved[0]} counts on" for change in found if moved and _is_steps(change)]
    if refused:
        raise UserError(f"{out} holds another run ({refused[0]}); give another --out, or delete that folder")
    return found


def _is_steps(change: Change) -> bool:
    return change.path.endswith(".steps") and change.path.count(".") == 1


def _bearable(change: Change, recipe: Recipe, out: Path) -> bool:
    stage, _, field = change.path.partition(".")
    if stage not in recipe.stages:
        return stage in (*INTERVALS, "evaluation") and not (out / "evaluation.json").exists()
    if not has_begun(out / stage):
        return True
    longer = _is_steps(change) and change.new > change.old
    return (longer or field.split(".")[0] in WHILE_IT_TRAINS) and not (out / stage / "stage.json").exists()


def about_detector(judge: Judge, asked: str | None = None, weights: Path | None = None) -> dict[str, Any] | None:
    """What run.json says of the detector that judges a run: also how to find it again. None for latents, unjudged."""
    if isinstance(judge.data, LatentSet | TextSet):
        return None
    given = {"asked": asked, "weights": None if weights is None else str(weights)}
    return {"name": judge.detector.name, "sha256": judge.detector.hash, **given}


def detector_begun(out: Path) -> dict[str, Any]:
    """What about_detector said of a run that has begun; {} otherwise, and for one of before there was a choice."""
    return (read_json(out / "run.json").get("detector") or {}) if begun(out) else {}


def check_detector(judge: Judge, out: Path) -> None:
    """Raises UserError for a detector that is not the one by which the run in this folder is judged so far."""
    now, usual = about_detector(judge), about_detector(Judge(judge.data, detector_for(judge.data)))
    known = detector_begun(out) or usual
    if not begun(out) or not known or not now or all(known[key] == now[key] for key in ("name", "sha256")):
        return
    which = f"other weights of {now['name']}" if known["name"] == now["name"] else f"{known['name']}, not {now['name']}"
    raise UserError(
        f"--detector: the evaluations in {out} are by {which}, and would mix; leave it out, or give another --out "
        "(onejump evaluate judges a finished model by any)"
    )


def open_run(
    recipe: Recipe,
    data: TrainingSet,
    out: Path,
    device: torch.device,
    command: str,
    detector: dict[str, Any] | None = None,
) -> None:
    """Writes recipe.json and run.json, or what is new in them; within `alone`. Raises UserError as check_run does.

    `command` joins those before it where one of them began a stage with --init: only together they are the run.
    detector: as about_detector; it does not change.
    """
    found = check_run(recipe, data, out)
    if not begun(out):
        write_json(out / "run.json", about_run(recipe, data, device, command) | {"detector": detector})
        write_json(out / "recipe.json", to_json(recipe))
        return
    for change in found:
        if has_begun(out / change.path.partition(".")[0]):
            say(f"{change} from here on")
    if found:
        write_json(out / "recipe.json", to_json(recipe))
    run = read_json(out / "run.json")
    if command not in run["command"]:
        if " --init " in run["command"] + command:
            write_json(out / "run.json", run | {"command": f"{run['command']} && {command}"})
        elif found:
            write_json(out / "run.json", run | {"command": command})


def about_run(recipe: Recipe, data: TrainingSet, device: torch.device, command: str) -> dict[str, Any]:
    """The content of run.json."""
    about = {"name": data.name, "n": data.n, "shape": list(data.shape), "classes": data.classes}
    return {
        "data": about | {"class_names": list(data.class_names), "fingerprint": data.fingerprint},
        "versions": versions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "seed": recipe.seed,
        "command": command,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


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
