"""Checkpoints: one folder a step, written whole or not at all, verified when read. Nothing is ever unpickled.

FOLDER/step-00001200/state.safetensors   every tensor
FOLDER/step-00001200/state.json          the rest, and the checksums of both files
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from onejump.types import UserError

TENSORS, META = "state.safetensors", "state.json"
TEMPORARY, REPLACED = ".saving", ".replaced"  # hidden: never taken for a checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at `step`, and one line for every newer checkpoint that could not be used."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path
    warnings: tuple[str, ...] = ()


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints in a folder, ascending; they may be damaged."""
    matches = [re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*")]
    return sorted(int(match[1]) for match in matches if match)


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of this step, then remove all but the `keep` newest up to it. Returns its path.

    The files are complete and on disk in a hidden folder before a rename makes them the checkpoint, so a kill or a
    power cut at any moment leaves the older ones as they were. meta is JSON. Raises UserError if the disk is full or
    the folder cannot be written; nothing old is lost then.
    """
    path, temporary, replaced = checkpoint_path(folder, step), folder / TEMPORARY, folder / REPLACED
    before = [s for s in saved_steps(folder) if s < step]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        _write(temporary, step, tensors, meta)
        if path.exists():  # one that was skipped as damaged; a folder that holds files cannot be renamed over
            os.replace(path, replaced)
        os.replace(temporary, path)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        if replaced.exists() and not path.exists():
            os.rename(replaced, path)
        shutil.rmtree(temporary, ignore_errors=True)
        reason, way_out = why_not_written(error)
        last = f"the last good one is step {before[-1]}" if before else "there is none before it"
        raise UserError(f"checkpoint: could not write {path} ({reason}); {last}; {way_out}") from error
    _remove_leftovers(folder)
    for old in before[: max(len(before) - keep + 1, 0)]:
        shutil.rmtree(checkpoint_path(folder, old), ignore_errors=True)
    return path


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is intact, on the CPU; None if there is none at all.

    Damaged ones (cut short, a flipped byte, a missing file) are named in `warnings`. Raises UserError if all are.
    """
    unusable: list[str] = []
    for step in reversed(saved_steps(folder)):
        path = checkpoint_path(folder, step)
        try:
            meta, tensors = _read(path, step)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError) as error:
            unusable.append(f"{path.name} is damaged ({_reason(error)})")
            continue
        warnings = tuple(f"checkpoint: {damage}; using {path.name} instead" for damage in unusable)
        return Checkpoint(step, tensors, meta, path, warnings)
    if unusable:
        raise UserError(f"checkpoint: none in {folder} can be used: {'; '.join(unusable)}; delete it to start afresh")
    return None


def pack_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str = "optimizer"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as named tensors ("optimizer/3/exp_avg": parameter 3), and its kind as JSON."""
    state = optimizer.state_dict()["state"]
    tensors = {f"{prefix}/{i}/{name}": value for i, values in state.items() for name, value in values.items()}
    return tensors, _kind(optimizer)


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], prefix: str = "optimizer"
) -> None:
    """The inverse of pack_optimizer; hyper-parameters stay those of `optimizer`. UserError if it is of another kind."""
    kind = _kind(optimizer)
    if meta != kind:
        raise UserError(
            f"optimizer: the checkpoint was saved by {meta['class']} for {meta['parameters']} parameters, this is "
            f"{kind['class']} for {kind['parameters']}; train with the recipe of that run, or into a new folder"
        )
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}/"):
            _, i, field = name.split("/")
            state.setdefault(int(i), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _kind(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    parameters = sum(len(group["params"]) for group in optimizer.param_groups)
    return {"class": type(optimizer).__name__, "parameters": parameters}


def _write(temporary: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    temporary.mkdir()
    tensors_file, meta_file = temporary / TENSORS, temporary / META
    save_file(_without_aliases(tensors), tensors_file)
    content = {"step": step, "meta": dict(meta), "tensors_sha256": file_sha256(tensors_file)}
    content["checksum"] = _checksum(content)
    meta_file.write_text(json.dumps(content, indent=1, allow_nan=False))
    shutil.copymode(meta_file, tensors_file)  # safetensors writes files that only their owner may read
    for path in (tensors_file, meta_file, temporary):
        _sync(path)


def _read(path: Path, step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content = json.loads((path / META).read_bytes())
    checksum = content.pop("checksum")
    if checksum != _checksum(content) or content["step"] != step:
        raise ValueError(f"{META} does not match its checksum")
    if content["tensors_sha256"] != file_sha256(path / TENSORS):
        raise ValueError(f"{TENSORS} does not match its checksum")
    tensors = load_file(path / TENSORS)
    return content["meta"], {name: tensor.clone() for name, tensor in tensors.items()}  # the file may go away


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, on the CPU, and no two of them in one storage: what safetensors asks for."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        out[name] = tensor
    return out


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    for name in (TEMPORARY, REPLACED):
        shutil.rmtree(folder / name, ignore_errors=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror}: {Path(error.filename).name}" if error.filename else f"{error.strerror}"
    if isinstance(error, KeyError):
        return f"{META} has no {error}"
    return " ".join(str(error).split())


def why_not_written(error: Exception) -> tuple[str, str]:
    """(reason, way out) where a file could not be written."""
    reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())  # safetensors has its own
    no_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) or "space" in str(reason)
    way_out = "free space" if no_space else "make that place writable"
    return str(reason), f"{way_out} and run the same command again"
