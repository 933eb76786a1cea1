"""Our format of a finished model: config.json, which rebuilds the exact object, and model.safetensors in one folder, or
one file NAME.safetensors with the same configuration in its metadata. docs/format.md describes both.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from onejump import __version__
from onejump.checkpoint import why_not_written
from onejump.config import Network, OneJump
from onejump.config_json import from_json, to_json
from onejump.model import ConsistencyModel
from onejump.networks.layers import empty_network
from onejump.precond import EDM, StableDiffusion
from onejump.samplers import ODE, Jumps, Sampler
from onejump.tensor_file import MAX_HEADER, Entry, looks_like_tensors, open_tensors, write_tensors
from onejump.types import UserError

CONFIG, WEIGHTS, SINGLE = "config.json", "model.safetensors", ".safetensors"
KEY, KEY_SHA256 = "onejump", "onejump_sha256"  # of the metadata of a single file: the configuration, and its checksum
FORMAT = 2  # 1 knew no licence and no ema
LICENCES = (  # that the Hub knows by these names; of all others it wants to be told the name
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "openrail", "gpl-3.0", "lgpl-3.0"),
    *(f"cc-by{kind}-{version}" for version in ("2.0", "3.0", "4.0") for kind in ("", "-sa", "-nc", "-nc-sa", "-nc-nd")),
)


@dataclass(frozen=True)
class SavedModel:
    """A model with its sampler's defaults, the images it makes, and where it came from.

    licence: of the weights. ema: which average of the weights of training these are, such as "constant 0.9999".
    """

    model: ConsistencyModel
    network: Network
    sampler: Sampler
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    ema: str = ""


def usual_steps(sampler: Sampler) -> int:
    """A number of steps that this sampler can make."""
    if isinstance(sampler, Jumps):
        return len(sampler.start)
    return sampler.steps if isinstance(sampler, ODE) else 1


def licence_on_hub(licence: str) -> dict[str, str]:
    """What a model card's header says of it; nothing if it is not stated."""
    name = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")
    if not name or name in LICENCES:
        return {"license": name} if name else {}
    return {"license": "other", "license_name": name}


def save_model(path: str | Path, saved: SavedModel, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes a folder, or a single file if the path ends in .safetensors. Raises UserError if it cannot.

    weights: what to write in place of the network's own, which may then be on the meta device; their names and shapes
    must be the network's. Either way they are written one by one, in the precision they have, and the memory of one is
    all that is needed. In a folder config.json, with the checksum of the weights, comes last.
    """
    path = Path(path)
    single = path.suffix.lower() == SINGLE
    file = path if single else path / WEIGHTS
    if weights is None:
        weights = saved.model.net.state_dict()
        if any(tensor.is_meta for tensor in weights.values()):
            raise UserError(f"{path}: this network is on the meta device and has no weights; give them")
    check_fit(weights, saved.model.net)
    content = _config(saved)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sha256 = write_tensors(file, weights, (lambda digest: _metadata(content, digest)) if single else None)
    except OSError as error:
        raise not_written(file, error) from error
    if not single:
        write_json(path / CONFIG, content | {"sha256": sha256})


def check_fit(weights: Mapping[str, Tensor | Entry], net: nn.Module) -> None:
    """Raises UserError with the first weight that is missing, not of the network's shape and kind, or unknown to it."""
    wanted = net.state_dict()
    for name, ours in wanted.items():
        if name not in weights:
            raise UserError(f"weights: {name} is missing")
        found = weights[name]
        if tuple(found.shape) != tuple(ours.shape):
            raise UserError(f"weights: {name} is {tuple(found.shape)}, the network's {tuple(ours.shape)}")
        if found.dtype != ours.dtype and not (found.dtype.is_floating_point and ours.dtype.is_floating_point):
            raise UserError(f"weights: {name} is {found.dtype}, the network's {ours.dtype}")
    for name in weights:
        if name not in wanted:
            raise UserError(f"weights: {name} is none of this network's")


def _config(saved: SavedModel) -> dict[str, Any]:
    """All that config.json holds but the checksum of the weights."""
    return {
        "format": FORMAT,
        "onejump": __version__,
        "network": to_json(saved.network),
        "precond": to_json(saved.model.precond),
        "jump": to_json(saved.model.jump),
        "t_min": saved.model.t_min,
        "sampler": to_json(saved.sampler),
        "shape": list(saved.shape),
        "class_names": list(saved.class_names),
        "licence": saved.licence,
        "ema": saved.ema,
        "provenance": saved.provenance,
    }


def _metadata(content: dict[str, Any], sha256: str) -> dict[str, str]:
    """Of a single file. The checksums are of one length, whatever they are."""
    text = json.dumps(content | {"sha256": sha256})
    return {KEY: text, KEY_SHA256: hashlib.sha256(text.encode()).hexdigest()}


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


def check_new(out: Path, folder: bool, over: bool = False) -> None:
    """Raises UserError unless `out` can become a folder (new, or empty), or else a file (over: in place of another)."""
    parent = next(above for above in out.absolute().parents if above.exists())
    if not parent.is_dir():
        raise UserError(f"{out}: {parent} is a file; name a folder that exists or can be made")
    if folder and out.is_file():
        raise UserError(f"{out}: is a file; name a folder that is new or empty")
    if folder and out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: this folder is not empty; name one that is new or empty")
    if not folder and out.is_dir():
        raise UserError(f"{out}: is a folder; name a file")
    if not folder and not over and out.exists():
        raise UserError(f"{out}: is there already; give another name")


def not_written(path: Path, error: Exception) -> UserError:
    """What to say, and the way out, when a file could not be written."""
    reason, way_out = why_not_written(error)
    return UserError(f"{path}: could not write ({reason}); {way_out}")


def load_model(path: str | Path) -> SavedModel:
    """A model's folder or single file, a stage's folder, or a run's (its last finished stage). Nothing is unpickled.

    The weights are in memory once, bit for bit and in the precision of the file; the model is in eval mode, on the CPU.
    Raises UserError for what is no model, or a damaged one.
    """
    place = _place(Path(path))
    with _explained(place):
        single = place.is_file()
        content = _content(place)
        saved = _rebuilt(content)
        file = open_tensors(place if single else place / WEIGHTS)
        check_fit(file.entries, saved.model.net)
        tensors, sha256 = file.load(file.plain if single else file.raw)
        if content["sha256"] != sha256:
            raise ValueError(
                "the checksum of its weights is not the one it was saved with; copy it again or, in a run's folder, "
                "delete the stage.json beside it and run the same command again"
            )
        saved.model.net.load_state_dict(tensors, assign=True)
        assert not any(buffer.is_meta for buffer in saved.model.buffers()), "a buffer that the file does not hold"
        saved.model.eval().requires_grad_(False)
    return saved


def model_sha256(path: Path) -> str:
    """The checksum of the weights that this path means, as they were saved with it (load_model compares them).

    It is the sha256 of model.safetensors, and of a single file what it would be in a folder.
    """
    place = _place(path)
    with _explained(place):
        return str(_content(place)["sha256"])


def _place(path: Path) -> Path:
    """The single file, or the folder, that this path means. Raises UserError for other programs' files."""
    if not path.is_file():
        return model_folder(path)
    if path.suffix.lower() in (".onnx", ".pt2"):
        raise UserError(f"{path}: an exported graph, for other programs; name the model that it was made from")
    if path.suffix.lower() != SINGLE and not looks_like_tensors(path):
        raise UserError(f"{path}: no model of onejump's; {_import_first(path)}")
    return path


def _import_first(path: Path) -> str:
    return f"a published one has to be imported first: onejump import {path} MODEL"


def _content(place: Path) -> dict[str, Any]:
    """The configuration of a model's folder or single file."""
    if not place.is_file():
        with open(place / CONFIG, "rb") as file:
            text = file.read(MAX_HEADER + 1)
        if len(text) > MAX_HEADER:
            raise ValueError(f"{CONFIG} is longer than {MAX_HEADER:,} bytes")
        content = json.loads(text)
        if "_class_name" in content and "format" not in content:
            raise ValueError(f"it is a part of a diffusers model; {_import_first(place)}")
        return content
    metadata = open_tensors(place).metadata
    if KEY not in metadata:
        raise ValueError(
            f"no {KEY!r} in its metadata: if it belongs to a folder with {CONFIG} or model_index.json, name the folder"
        )
    if hashlib.sha256(metadata[KEY].encode()).hexdigest() != metadata.get(KEY_SHA256):
        raise ValueError("the checksum of its configuration is wrong; copy it again")
    return json.loads(metadata[KEY])


def _rebuilt(content: dict[str, Any]) -> SavedModel:
    """The model that a configuration describes, its network on the meta device."""
    if content["format"] not in range(1, FORMAT + 1):
        raise ValueError(f"format {content['format']!r}, this version reads 1 to {FORMAT}; install a newer onejump")
    network, precond, jump, sampler = (from_json(content[k]) for k in ("network", "precond", "jump", "sampler"))
    kinds = isinstance(network, Network), isinstance(precond, EDM | StableDiffusion), isinstance(jump, OneJump)
    if not all(kinds) or not isinstance(sampler, Sampler):
        raise ValueError("network, precond, jump or sampler is not what its field says")
    shape, names = tuple(content["shape"]), tuple(map(str, content["class_names"]))
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"shape {shape}: channels, height and width are needed")
    t_min, provenance = float(content["t_min"]), dict(content["provenance"])
    if not 0 <= t_min < math.inf:
        raise ValueError(f"t_min {t_min:g}: a time, 0 or more, is needed")
    licence, ema = (str(content.get(key, "")) for key in ("licence", "ema"))
    model = ConsistencyModel(empty_network(network), precond, jump, t_min, network.second_time != "off")
    return SavedModel(model, network, sampler, shape, names, provenance, licence, ema)


@contextmanager
def _explained(place: Path) -> Iterator[None]:
    """Whatever is wrong with a model becomes one line that names it."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = f"its configuration has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{place}: this model cannot be read ({reason[:400]})") from error


def model_folder(path: Path) -> Path:
    """Where the model lies that this path means. Raises UserError with what was looked for."""
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder; a model is a folder with {CONFIG}, a file *{SINGLE}, or a run's folder"
        )
    for folder in (path, path / "model"):
        if (folder / CONFIG).is_file():
            return folder
    if (path / "model_index.json").is_file():
        raise UserError(f"{path}: a diffusers model; {_import_first(path)}")
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
