"""Published checkpoints of this field, read without running anything and turned into our models."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from onejump.importers import diffusers_folder
from onejump.importers.edm import read_pickle
from onejump.importers.flax_msgpack import looks_like_msgpack
from onejump.importers.imported import Imported, first
from onejump.importers.inert import printable
from onejump.importers.jax import read_jax
from onejump.importers.module_record import ModuleRecord
from onejump.importers.openai import is_openai, read_openai
from onejump.importers.state_dicts import is_state_dict, read_state_dict
from onejump.importers.torch_file import read_torch
from onejump.importers.use import Given
from onejump.saved import CONFIG, KEY
from onejump.tensor_file import open_tensors
from onejump.types import UserError

__all__ = ["Imported", "import_model"]

KINDS = (
    "pickles of EDM, EDM2, ECT and TCM, state dicts of these, OpenAI's and CTM's .pt, JAX checkpoints of "
    "consistency_models_cifar10, diffusers folders"
)


def import_model(
    path: str | Path,
    method: str | None = None,
    qkv: str | None = None,
    t_min: float | None = None,
    head_channels: int | None = None,
) -> Imported:
    """What a published checkpoint is, by its content. Its weights stay in the file until they are asked for.

    method, qkv, t_min, head_channels: what the user knows and the file does not say (see `Given`). Raises UserError
    for what is no such checkpoint, lacks a tensor, has one too many, or contradicts what is given.
    """
    path, given = Path(path), Given(method, qkv, t_min, head_channels)
    with explained(path):
        return read(path, given)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file becomes one line that names it, or the option that is wrong."""
    try:
        yield
    except UserError as error:
        if str(path) in str(error) or str(error).startswith("--"):
            raise
        raise UserError(f"{path}: {error}") from error
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be imported ({printable(error, 300)})") from error


def read(path: Path, given: Given) -> Imported:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        return read_folder(path, given)
    with path.open("rb") as file:
        start = file.read(64)
    if looks_like_msgpack(start):
        return read_jax(path, given)
    if start[8:10] == b'{"':
        refuse_safetensors(path)
    return read_content(path, read_torch(path), given)


def read_folder(path: Path, given: Given) -> Imported:
    if is_diffusers(path):
        given.only(path, "diffusers")
        return diffusers_folder.read(path)
    if (path / CONFIG).is_file() or (path / "recipe.json").is_file():
        raise ours_already(path)
    raise UserError(f"{path}: nothing to import in this folder (no model_index.json or config.json of diffusers)")


def is_diffusers(path: Path) -> bool:
    if (path / "model_index.json").is_file():
        return True
    try:
        content = json.loads((path / CONFIG).read_bytes())
        return isinstance(content, dict) and "_class_name" in content
    except (OSError, ValueError):
        return False


def refuse_safetensors(path: Path) -> None:
    """Ours are ours already; of others only diffusers' are known, and those need their folder."""
    try:
        metadata = open_tensors(path).metadata
    except ValueError:
        return
    if KEY in metadata:
        raise ours_already(path)
    raise UserError(f"{path}: safetensors without a configuration; for a diffusers model name the folder that holds it")


def ours_already(path: Path) -> UserError:
    return UserError(f"{path}: this is onejump's own format already; use it as it is (onejump sample, onejump show)")


def read_content(path: Path, content: object, given: Given) -> Imported:
    """By what a PyTorch file holds."""
    if isinstance(content, ModuleRecord):
        content = {"ema": content}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path}: it holds no network (a {type(content).__name__}); known are {KINDS}")
    for key in ("ema", "net"):
        if isinstance(content.get(key), ModuleRecord):
            return read_pickle(path, content, given)
    if "G_ema" in content or "G" in content:
        raise UserError(f"{path}: a GAN's generator (StyleGAN), no diffusion or consistency model; known are {KINDS}")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) == len(content) and is_openai(tensors):
        return read_openai(path, tensors, given)
    if len(tensors) == len(content) and is_state_dict(tensors):
        return read_state_dict(path, tensors, given)
    if "down_blocks.0.resnets.0.conv1.weight" in content:
        raise UserError(f"{path}: the weights of a diffusers model; name the folder with its config.json")
    some = first(list(content)) or "nothing"
    raise UserError(f"{path}: no network that is known here (it holds {some}); known are {KINDS}")
