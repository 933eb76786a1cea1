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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from onejump.tensor_file import DTYPES
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


@dataclass(frozen=True)
class Draft:
    """A checkpoint while it is written: a hidden folder that a rename makes the checkpoint of this step.

    A kill or a power cut at any moment leaves the older ones as they were. meta is JSON; keep: how many stay, with it.
    """

    into: Path
    step: int
    meta: Mapping[str, Any]
    keep: int = 2

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.into / TEMPORARY

    @property
    def path(self) -> Path:
        """What it becomes."""
        return checkpoint_path(self.into, self.step)

    def begin(self) -> None:
        """Makes its folder, without what another has left there. Raises OSError."""
        self.into.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.into)
        self.folder.mkdir()

    def finish(self, content: Mapping[str, Any]) -> None:
        """Its tensors are written and on the disk; content says how, with checksums of their files. Raises OSError."""
        whole: dict[str, Any] = {"step": self.step, "meta": dict(self.meta), **content}
        whole["checksum"] = _checksum(whole)
        meta_file = self.folder / META
        meta_file.write_text(json.dumps(whole, indent=1, allow_nan=False))
        for file in self.folder.glob("*.safetensors"):
            shutil.copymode(meta_file, file)  # safetensors writes files that only their owner may read
        for path in (meta_file, self.folder):
            _sync(path)
        if self.path.exists():  # one that was skipped as damaged; a folder that holds files cannot be renamed over
            os.replace(self.path, self.into / REPLACED)
        os.replace(self.folder, self.path)
        _sync(self.into)
        _remove_leftovers(self.into)
        before = [step for step in saved_steps(self.into) if step < self.step]
        for old in before[: max(len(before) - self.keep + 1, 0)]:
            shutil.rmtree(checkpoint_path(self.into, old), ignore_errors=True)

    def failed(self, error: Exception, clean: bool = True) -> UserError:
        """What to raise after an error in between; nothing old is lost. clean: and remove what is left of this one."""
        replaced = self.into / REPLACED
        if clean and replaced.exists() and not self.path.exists():
            os.rename(replaced, self.path)
        if clean:
            shutil.rmtree(self.folder, ignore_errors=True)
        before = [step for step in saved_steps(self.into) if step < self.step]
        reason, way_out = why_not_written(error)
        last = f"the last good one is step {before[-1]}" if before else "there is none before it"
        return UserError(f"checkpoint: could not write {self.path} ({reason}); {last}; {way_out}")


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of this step, then remove all but the `keep` newest up to it. Returns its path.

    meta is JSON. Raises UserError if the disk is full or the folder cannot be written; nothing old is lost then.
    """
    draft = Draft(folder, step, meta, keep)
    try:
        draft.begin()
        tensors_file = draft.folder / TENSORS
        save_file(_without_aliases(tensors), tensors_file)
        _sync(tensors_file)
        draft.finish({"tensors_sha256": file_sha256(tensors_file)})
    except (OSError, SafetensorError) as error:
        raise draft.failed(error) from error
    return draft.path


DAMAGE = (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError)
Read = Callable[[Path, int], tuple[dict[str, Any], dict[str, Tensor]]]  # (meta, tensors) of the checkpoint of a step


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is intact, on the CPU; None if there is none at all.

    Damaged ones (cut short, a flipped byte, a missing file) are named in `warnings`. Raises UserError if all are.
    """
    return newest(folder, saved_steps(folder), read_checkpoint)


def newest(folder: Path, steps: Sequence[int], read: Read) -> Checkpoint | None:
    """Of these checkpoints the last that can be read; as load_checkpoint."""
    unusable: list[str] = []
    for step in reversed(steps):
        path = checkpoint_path(folder, step)
        try:
            meta, tensors = read(path, step)
        except DAMAGE as error:
            unusable.append(f"{path.name} is damaged ({_reason(error)})")
            continue
        warnings = tuple(f"checkpoint: {damage}; using {path.name} instead" for damage in unusable)
        return Checkpoint(step, tensors, meta, path, warnings)
    if unusable:
        raise UserError(f"checkpoint: none in {folder} can be used: {'; '.join(unusable)}; delete it to start afresh")
    return None


def read_checkpoint(path: Path, step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(meta, tensors). Raises one of DAMAGE unless it is whole, and of this step."""
    content = verified(path, step)
    if "pieces" not in content:
        tensors = load_file(path / TENSORS)
        return content["meta"], {name: tensor.clone() for name, tensor in tensors.items()}  # the file may go away
    tensors = {}
    for name, entry in content["pieces"]["tensors"].items():
        tensors[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    for file in content["pieces"]["files"]:
        with safe_open(path / file, "pt") as pieces:
            for name, entry in content["pieces"]["tensors"].items():
                for _, key, offsets, sizes in (piece for piece in entry["pieces"] if piece[0] == file):
                    place = tuple(slice(start, start + n) for start, n in zip(offsets, sizes, strict=True))
                    tensors[name][place] = pieces.get_tensor(key)
    return content["meta"], tensors


def verified(path: Path, step: int, share: slice = slice(None)) -> dict[str, Any]:
    """What state.json says, if it and its files (this share of them) match their checksums."""
    content = json.loads((path / META).read_bytes())
    checksum = content.pop("checksum")
    if checksum != _checksum(content) or content["step"] != step:
        raise ValueError(f"{META} does not match its checksum")
    files = content["pieces"]["files"] if "pieces" in content else {TENSORS: content["tensors_sha256"]}
    for file in sorted(files)[share]:
        if files[file] != file_sha256(path / file):
            raise ValueError(f"{file} does not match its checksum")
    return content


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
