"""Our format of a finished model: a folder of config.json, which rebuilds the exact object, and model.safetensors."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from onejump import __version__
from onejump.checkpoint import file_sha256, why_not_written
from onejump.config import Network, OneJump
from onejump.config_json import from_json, to_json
from onejump.model import ConsistencyModel
from onejump.precond import EDM
from onejump.samplers import Sampler
from onejump.types import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class SavedModel:
    """A model with its sampler's defaults, the images it makes, and where it came from."""

    model: ConsistencyModel
    network: Network
    sampler: Sampler
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)


def save_model(folder: Path, saved: SavedModel) -> None:
    """Writes the folder; config.json, with the checksum of the weights, comes last. Raises UserError if it cannot."""
    weights = {name: value.detach().cpu().contiguous() for name, value in saved.model.net.state_dict().items()}
    draft = folder / f".{WEIGHTS}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, draft)
        _put_in_place(draft, folder / WEIGHTS)
        content = {
            "format": 1,
            "onejump": __version__,
            "network": to_json(saved.network),
            "precond": to_json(saved.model.precond),
            "jump": to_json(saved.model.jump),
            "t_min": saved.model.t_min,
            "sampler": to_json(saved.sampler),
            "shape": list(saved.shape),
            "class_names": list(saved.class_names),
            "provenance": saved.provenance,
            "sha256": file_sha256(folder / WEIGHTS),
        }
    except (OSError, SafetensorError) as error:
        raise not_written(folder / WEIGHTS, error) from error
    write_json(folder / CONFIG, content)


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all, also if the power is cut. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}")
        draft.write_text(json.dumps(content, indent=1) + "\n")
        _put_in_place(draft, path)
    except OSError as error:
        raise not_written(path, error) from error


def _put_in_place(draft: Path, path: Path) -> None:
    """A rename could otherwise reach the disk before the bytes do."""
    with open(draft, "rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)


def not_written(path: Path, error: Exception) -> UserError:
    """What to say, and the way out, when a file could not be written."""
    reason, way_out = why_not_written(error)
    return UserError(f"{path}: could not write ({reason}); {way_out}")


def load_model(path: str | Path) -> SavedModel:
    """A model folder, a stage's folder, or a run's folder (its last finished stage). Nothing is ever unpickled."""
    folder = model_folder(Path(path))
    try:
        content = json.loads((folder / CONFIG).read_bytes())
        network, precond, jump, sampler = (from_json(content[k]) for k in ("network", "precond", "jump", "sampler"))
        kinds = isinstance(network, Network), isinstance(precond, EDM), isinstance(jump, OneJump)
        if not all(kinds) or not isinstance(sampler, Sampler):
            raise ValueError("network, precond, jump or sampler is not what its field says")
        shape, names = tuple(content["shape"]), tuple(map(str, content["class_names"]))
        if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
            raise ValueError(f"shape {shape}: channels, height and width are needed")
        if content["sha256"] != file_sha256(folder / WEIGHTS):
            raise ValueError(
                f"the checksum of {WEIGHTS} is not the one in {CONFIG}; copy both again or, in a run's folder, delete "
                "the stage.json beside them and run the same command again"
            )
        two_times = network.second_time != "off"
        model = ConsistencyModel(network.build(), precond, jump, float(content["t_min"]), two_times)
        model.net.load_state_dict(load_file(folder / WEIGHTS))
        return SavedModel(model.eval().requires_grad_(False), network, sampler, shape, names, content["provenance"])
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError, RuntimeError, SafetensorError) as error:
        reason = f"{CONFIG} has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{folder}: this model cannot be read ({reason[:400]})") from error


def model_folder(path: Path) -> Path:
    """Where the model lies that this path means. Raises UserError with what was looked for."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; a model is a folder with {CONFIG}, or a run's folder")
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file():
            return folder
    for name in reversed(_stages(path / "recipe.json")):
        folder = path / name / "model"
        if (folder / CONFIG).is_file() and (path / name / "stage.json").is_file():
            return folder
    raise UserError(f"{path}: no model there (no {CONFIG}, and no finished stage of a run)")


def _stages(recipe: Path) -> list[str]:
    """The names of a run's stages in their order, none without a recipe.json."""
    try:
        return [str(name) for name in json.loads(recipe.read_bytes())["stages"]] if recipe.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{recipe}: cannot be read; name the folder of one stage") from error


def model_sha256(path: Path) -> str:
    """The checksum of the weights that this path means, as their config.json has it (load_model compares them)."""
    file = model_folder(path) / CONFIG
    try:
        return str(json.loads(file.read_bytes())["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: this model cannot be read") from error
