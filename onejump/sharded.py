"""Checkpoints of runs whose weights lie in pieces on many processes: each writes its own, in the background.

torch.distributed.checkpoint plans who writes and who reads what; the files are of our own layout, without pickles:

FOLDER/step-00001200/pieces-00003.safetensors   what process 3 had to write: "NAME@OFFSETS"
FOLDER/step-00001200/state.json                 as of other checkpoints; where the pieces of each tensor are, checksums

Any number of processes reads them, one plain process too. The promises are those of checkpoint.py.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as Promise

from onejump.checkpoint import TENSORS, Draft
from onejump.tensor_file import DTYPES, NAMES, open_tensors, write_tensors
from onejump.types import UserError

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


class PieceWriter(StorageWriter):
    """Writes one draft of a checkpoint; one object a process."""

    def __init__(self, draft: Draft):
        self.draft = draft

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The first process's part: an empty hidden folder, and a file name for each."""
        self.draft.begin()
        return [replace(plan, storage_data=f"pieces-{i:05d}.safetensors") for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Promise[list[WriteResult]]:
        done: Promise[list[WriteResult]] = Promise()
        tensors = {key_of(item.index): cast(Tensor, planner.resolve_data(item)).detach() for item in plan.items}
        file = plan.storage_data
        checksum = write_tensors(self.draft.folder / file, tensors) if tensors else ""
        where = {"file": file, "sha256": checksum}
        done.set_result(
            [
                WriteResult(item.index, tensors[key].nbytes, where | {"sizes": list(tensors[key].shape)})
                for item, key in zip(plan.items, tensors, strict=True)
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The first process's part: with state.json and a rename it becomes a checkpoint."""
        files: dict[str, str] = {}
        tensors: dict[str, Any] = {}
        for result in (result for part in results for result in part):
            about, where = metadata.state_dict_metadata[result.index.fqn], result.storage_data
            assert isinstance(about, TensorStorageMetadata) and result.index.offset is not None
            files[where["file"]] = where["sha256"]
            dtype = NAMES[about.properties.dtype]
            entry = tensors.setdefault(result.index.fqn, {"dtype": dtype, "shape": list(about.size), "pieces": []})
            entry["pieces"].append([where["file"], key_of(result.index), list(result.index.offset), where["sizes"]])
        self.draft.finish({"pieces": {"files": files, "tensors": tensors}})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False


class PieceReader(StorageReader):
    """Reads the pieces of a checkpoint that was found intact."""

    def __init__(self, path: Path, tensors: Mapping[str, Any]):
        self.path, self.tensors = path, tensors

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[entry["dtype"]]),
                    torch.Size(entry["shape"]),
                    [
                        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                        for _, _, offsets, sizes in entry["pieces"]
                    ],
                )
                for name, entry in self.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Promise[None]:
        files: dict[str, list[tuple[str, ReadItem]]] = {}
        for item in plan.items:
            wanted = list(item.storage_index.offset or ())
            for file, key, offsets, _ in self.tensors[item.storage_index.fqn]["pieces"]:
                if offsets == wanted:
                    files.setdefault(file, []).append((key, item))
        for name, parts in files.items():
            with safe_open(self.path / name, "pt") as file:
                for key, item in parts:
                    target = planner.resolve_tensor(item).detach()
                    ends = zip(item.storage_offsets, item.lengths, strict=True)
                    place = tuple(slice(start, start + n) for start, n in ends)
                    target.copy_(file.get_slice(key)[place] if place else file.get_tensor(key))
                    planner.commit_tensor(item, target)
        done: Promise[None] = Promise()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False


def key_of(index: MetadataIndex) -> str:
    """What a piece is called in its file."""
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


def begin_writing(draft: Draft, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> Future:
    """Copies the tensors, and writes the copies in the background, with messages to the others through `group`."""
    with quiet():
        future = dcp.async_save(dict(tensors), storage_writer=PieceWriter(draft), process_group=group)
    assert isinstance(future, Future)
    return future


def end_writing(draft: Draft, future: Future, first: bool) -> None:
    """Waits for what begin_writing began. Raises UserError, on all processes, if one of them could not write."""
    try:
        future.result()
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        cause = next((cause for cause in causes if isinstance(cause, OSError)), None)
        if cause is None:
            raise
        raise draft.failed(cause, clean=first) from error


def read_pieces(path: Path, content: Mapping[str, Any], into: Mapping[str, Tensor]) -> None:
    """Fills these tensors, each process its part of them, from a checkpoint in pieces or in one."""
    if "pieces" in content:
        there = content["pieces"]["tensors"]
    else:
        entries = open_tensors(path / TENSORS).entries
        there = {
            name: {
                "dtype": NAMES[e.dtype],
                "shape": list(e.shape),
                "pieces": [[TENSORS, name, [0] * len(e.shape), list(e.shape)]],
            }
            for name, e in entries.items()
        }
    if there.keys() != into.keys() or any(list(into[name].shape) != there[name]["shape"] for name in into):
        raise UserError(
            f"{path}: its weights do not fit this network; train with that run's recipe, or into a new folder"
        )
    with quiet():
        dcp.load(dict(into), storage_reader=PieceReader(path, there))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes on the workings of torch.distributed.checkpoint, which are no news to a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
