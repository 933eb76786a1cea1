"""Our format of a finished model: a folder of config.json, which rebuilds the exact object, and model.safetensors."""

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
    """Writes the folder; config.json, with the checksum of the weights, comes last and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in saved.model.net.state_dict().items()}
    try:
        save_file(weights, folder / WEIGHTS)
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
        draft = folder / f".{CONFIG}"
        draft.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(draft, folder / CONFIG)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: could not write the model ({error}); free space and run the same command again"
        ) from error


def load_model(path: str | Path) -> SavedModel:
    """A model folder, a stage's folder, or a run's folder (its last finished stage). Nothing is ever unpickled."""
    folder = model_folder(Path(path))
    try:
        content = json.loads((folder / CONFIG).read_bytes())
        network, precond, jump, sampler = (from_json(content[k]) for k in ("network", "precond", "jump", "sampler"))
        if not isinstance(precond, EDM) or not isinstance(jump, ToData):
            raise UserError(f"{folder / CONFIG}: precond and jump are not what their fields say")
        if content["sha256"] != _sha256(folder / WEIGHTS):
            raise UserError(f"{folder / WEIGHTS} is damaged or was changed: its checksum is not the one in {CONFIG}")
        model = ConsistencyModel(network.build(), precond, jump, float(content["t_min"]))
        model.net.load_state_dict(load_file(folder / WEIGHTS))
        shape, names = tuple(content["shape"]), tuple(content["class_names"])
        return SavedModel(model.eval().requires_grad_(False), network, sampler, shape, names, content["provenance"])
    except (OSError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: this model cannot be read ({type(error).__name__}: {reason})") from error


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
