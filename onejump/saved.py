"""Our format of a finished model: a folder of config.json, which rebuilds the exact object, and model.safetensors."""

import errno
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from onejump import __version__
from onejump.config import Network, from_json, to_json
from onejump.model import ConsistencyModel
from onejump.precond import EDM, ToData
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
            "sha256": _sha256(folder / WEIGHTS),
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
    reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())  # safetensors has its own
    no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) or "space" in str(reason)
    way_out = "free space and run the same command again" if no_space else "give a place that can be written"
    return UserError(f"{path}: could not write ({reason}); {way_out}")


def load_model(path: str | Path) -> SavedModel:
    """A model folder, a stage's folder, or a run's folder (its last finished stage). Nothing is ever unpickled."""
    folder = model_folder(Path(path))
    try:
        content = json.loads((folder / CONFIG).read_bytes())
        network, precond, jump, sampler = (from_json(content[k]) for k in ("network", "precond", "jump", "sampler"))
        kinds = isinstance(network, Network), isinstance(precond, EDM), isinstance(jump, ToData)
        if not all(kinds) or not isinstance(sampler, Sampler):
            raise ValueError("network, precond, jump or sampler is not what its field says")
        shape, names = tuple(content["shape"]), tuple(map(str, content["class_names"]))
        if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
            raise ValueError(f"shape {shape}: channels, height and width are needed")
        if content["sha256"] != _sha256(folder / WEIGHTS):
            raise ValueError(
                f"the checksum of {WEIGHTS} is not the one in {CONFIG}; copy both again or, in a run's folder, delete "
                "the stage.json beside them and run the same command again"
            )
        model = ConsistencyModel(network.build(), precond, jump, float(content["t_min"]))
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
    finished = [p for p in path.glob(f"*/model/{CONFIG}") if (p.parent.parent / "stage.json").is_file()]
    if not finished:
        raise UserError(f"{path}: no model there (no {CONFIG}, and no finished stage of a run)")
    return max(finished, key=lambda p: p.stat().st_mtime).parent


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
