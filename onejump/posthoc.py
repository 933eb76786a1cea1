"""Post-hoc EMA (Karras et al. 2024, section 3.2 and appendix C): averages that are saved along a stage, and any other
width made of them afterwards.

STAGE/ema/step-00012000-0.05.safetensors   the EMA of relative width 0.05 at step 12,000; see docs/ema.md

The count of a stage may start above 0, at first_step, with weights from elsewhere. These then are theta(tau) for every
tau up to first_step, in all of its EMAs.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onejump.checkpoint import why_not_written
from onejump.ema import Mix, PowerEMA, Profile, Snapshots, check_sigma_rel, gamma_of, mix
from onejump.tensor_file import Entry, header_of, open_tensors, write_tensors
from onejump.types import UserError

KEY = "onejump_ema"  # of the metadata of a snapshot
PIECE = 2**20  # bytes of each snapshot in memory at once


class Averager:
    """The EMAs of a stage. parameters: what they follow, named as in the network's state_dict.

    They begin as copies of the parameters, as they are at first_step. lists[j][i] follows the i-th parameter with
    decays(n)[j] at the update that makes step n.
    """

    def __init__(self, snapshots: Snapshots, parameters: Mapping[str, Tensor], first_step: int = 0):
        self.snapshots, self.first_step, self.names = snapshots, first_step, tuple(parameters)
        self.lists = [[p.detach().clone() for p in parameters.values()] for _ in snapshots.sigma_rels]
        self.laws = [PowerEMA(gamma_of(width)) for width in snapshots.sigma_rels]

    def decays(self, n: int) -> list[float]:
        return [law.decay(n) for law in self.laws]

    def named(self, j: int) -> dict[str, Tensor]:
        """The j-th average."""
        return dict(zip(self.names, self.lists[j], strict=True))

    def begin(self, folder: Path, step: int, writes: bool = True) -> None:
        """Before training goes on from `step`: what was saved beyond it goes, and where the count starts above 0 the
        weights that it starts with are saved, once, since there all averages are the same. As in `save`."""
        for path in folder.glob("step-*.safetensors") if writes else ():
            if (match := re.match(r"step-(\d+)-", path.name)) and (int(match[1]) > step or step == self.first_step):
                path.unlink()
        if step == self.first_step > 0:
            self._save(folder, step, self.snapshots.sigma_rels[:1], writes)

    def due(self, step: int, last_step: int) -> bool:
        return self.snapshots.due(step, self.first_step, last_step)

    def save(self, folder: Path, step: int, writes: bool = True) -> None:
        """A file for each, whole or not at all; saved again, the same. Raises UserError if the disk is full.

        Of weights in pieces on several processes all must call it, and one `writes`: with one average at a time in its
        memory. If that one cannot write, it takes its part to the end, and then raises.
        """
        self._save(folder, step, self.snapshots.sigma_rels, writes)

    def _save(self, folder: Path, step: int, widths: Sequence[float], writes: bool) -> None:
        problem = None
        for j, width in enumerate(widths):
            tensors = {}
            for name, tensor in self.named(j).items():
                tensor = whole(tensor)
                if writes and problem is None:
                    tensors[name] = tensor
            try:
                if tensors:
                    save_snapshot(folder, Profile(step, width), self.first_step, tensors)
            except UserError as error:
                problem = error
        if problem is not None:
            raise problem

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        widths = self.snapshots.sigma_rels
        return {f"{width:.15g}/{name}": t for j, width in enumerate(widths) for name, t in self.named(j).items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of tensors(). Raises UserError for those of other widths or of another network."""
        ours = self.tensors()
        for name in ours.keys() | tensors.keys():
            if name not in ours or name not in tensors or ours[name].shape != tensors[name].shape:
                raise UserError(
                    f"snapshots: the checkpoint's {name} is not what this stage averages; train with that run's "
                    "recipe, or into a new folder"
                )
        for name, tensor in ours.items():
            tensor.copy_(tensors[name])


def whole(tensor: Tensor) -> Tensor:
    """Of a tensor in pieces on several processes, which must all call this, a copy in one piece on the CPU."""
    module = sys.modules.get("torch.distributed.tensor")  # a second to import, and there before such a tensor is
    return tensor.full_tensor().cpu() if module is not None and isinstance(tensor, module.DTensor) else tensor


def save_snapshot(folder: Path, profile: Profile, first_step: int, tensors: Mapping[str, Tensor]) -> Path:
    """Writes one EMA whole or not at all, tensor by tensor, with its checksum. Raises UserError if it cannot."""
    path = folder / f"step-{profile.step:08d}-{profile.sigma_rel:.15g}.safetensors"
    about = {"step": profile.step, "sigma_rel": profile.sigma_rel, "first_step": first_step}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, lambda sha256: {KEY: json.dumps(about | {"sha256": sha256})})
    except OSError as error:
        reason, way_out = why_not_written(error)
        raise UserError(f"{path}: could not write ({reason}); {way_out}") from error
    return path


@dataclass(frozen=True)
class Snapshot:
    """A file. sha256: of what it is without metadata. start: where its data begin."""

    path: Path
    profile: Profile
    sha256: str
    start: int

    def read(self, offset: int, piece: Entry, digest: Any) -> Tensor:
        """What is at this place of the data; the digest takes its bytes."""
        try:
            data = np.fromfile(self.path, np.uint8, piece.nbytes, offset=self.start + offset)
        except OSError as error:
            raise damaged(self.path, error.strerror or str(error)) from error
        if data.nbytes < piece.nbytes:
            raise damaged(self.path, "it was cut off while it was read")
        digest.update(data.data)
        return torch.from_numpy(data).view(piece.dtype)


@dataclass(frozen=True)
class Track:
    """All that a stage has saved, in order of step and width. entries: what each of the files holds."""

    folder: Path
    first_step: int
    snapshots: tuple[Snapshot, ...]
    entries: dict[str, Entry]

    @property
    def steps(self) -> list[int]:
        """At which an average can be made."""
        return sorted({snapshot.profile.step for snapshot in self.snapshots})

    def mix(self, wanted: Profile) -> Mix:
        """Raises UserError for a step at which nothing was saved."""
        if wanted.step not in self.steps:
            nearest = min(self.steps, key=lambda step: abs(step - wanted.step))
            raise UserError(f"{self.folder}: nothing was saved at step {wanted.step}; the nearest is {nearest}")
        return mix([snapshot.profile for snapshot in self.snapshots], wanted, self.first_step)

    def combine(self, mixes: Sequence[Mix], out: Sequence[Path]) -> None:
        """Writes a file of these entries for each mix. Each snapshot is read once, all of them side by side and one
        MiB at a time; sums are float64. Raises UserError for a damaged one; what was written is then of no use.
        """
        header = header_of(self.entries, {})
        digests = {
            snapshot: hashlib.sha256(header)
            for i, snapshot in enumerate(self.snapshots)
            if any(made.weights[i] for made in mixes)
        }
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb")) for path in out]
            for file in files:
                file.write(header)
            for offset, piece in pieces(self.entries):
                for file, total in zip(files, self._sums(mixes, offset, piece, digests), strict=True):
                    file.write(total.to(piece.dtype).view(torch.uint8).numpy().data)
        for snapshot, digest in digests.items():
            if digest.hexdigest() != snapshot.sha256:
                raise damaged(snapshot.path, "its checksum is not the one it was saved with")

    def _sums(self, mixes: Sequence[Mix], offset: int, piece: Entry, digests: dict[Snapshot, Any]) -> list[Tensor]:
        """A piece of each mix. digests: of the snapshots to read, and of what has been read of them."""
        sums = [torch.zeros(piece.shape, dtype=torch.float64, device="cpu") for _ in mixes]
        for i, snapshot in enumerate(self.snapshots):
            if snapshot in digests:
                tensor = snapshot.read(offset, piece, digests[snapshot])
                for made, total in zip(mixes, sums, strict=True):
                    if made.weights[i]:
                        total.add_(tensor, alpha=made.weights[i])
        return sums


def pieces(entries: Mapping[str, Entry]) -> Iterator[tuple[int, Entry]]:
    """(offset, dtype and size) of the data of a file, part by part, whatever tensors they belong to."""
    offset = 0
    for dtype, run in groupby(entries.values(), key=lambda entry: entry.dtype):
        size = sum(entry.nbytes for entry in run)
        for start in range(0, size, PIECE):
            yield offset + start, Entry(dtype, (min(PIECE, size - start) // dtype.itemsize,))
        offset += size


def track_in(folder: Path) -> Track:
    """Reads the headers of all snapshots in a folder. Raises UserError without any, and for damaged or mixed ones."""
    snapshots: list[Snapshot] = []
    first: tuple[int, dict[str, Entry]] | None = None
    for path in sorted(folder.glob("step-*.safetensors")):
        try:
            file = open_tensors(path)
            about = json.loads(file.metadata[KEY])
            profile, of = Profile(about["step"], about["sigma_rel"]), (about["first_step"], file.entries)
            check_sigma_rel("sigma_rel", profile.sigma_rel)
            if not (0 <= of[0] <= profile.step > 0 and isinstance(about["sha256"], str)):
                raise ValueError(f"step {profile.step} of a stage from {of[0]}")
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = f"its header has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise damaged(path, reason[:400]) from error
        first = first or of
        if of != first:
            raise UserError(f"{path}: of another training than {snapshots[0].path.name}; delete those of one of them")
        snapshots.append(Snapshot(path, profile, about["sha256"], len(file.raw)))
    if first is None:
        raise UserError(f"{folder}: no snapshots there; a stage trained with STAGE.snapshots=Snapshots has them")
    snapshots.sort(key=lambda snapshot: (snapshot.profile.step, snapshot.profile.sigma_rel))
    return Track(folder, first[0], tuple(snapshots), first[1])


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that stay in it: the system reads a page when it is looked at, and may forget it again."""
    file = open_tensors(path)
    data, start, found = torch.from_file(str(path), False, path.stat().st_size, dtype=torch.uint8), len(file.raw), {}
    for name, entry in file.entries.items():
        found[name] = data[start : start + entry.nbytes].view(entry.dtype).view(entry.shape)
        start += entry.nbytes
    return found


def damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: this snapshot is damaged ({reason}); delete it and give the same command again: the others do without"
    )
