"""The checkpoints of a run of one process or many: who writes them, and which one all go on from."""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from onejump.checkpoint import (
    DAMAGE,
    Checkpoint,
    Draft,
    newest,
    read_checkpoint,
    save_checkpoint,
    saved_steps,
    verified,
)
from onejump.distributed import Team
from onejump.types import UserError


@dataclass
class Saver:
    """Writes the checkpoints of a run, one after the other; all processes of its team make the same calls.

    Weights in one piece are written by the first process before `save` returns. Those in pieces are copied before it
    returns and written in the background; what goes wrong there is raised by the next call.
    """

    folder: Path
    team: Team
    group: dist.ProcessGroup | None = None  # in the background, messages need a channel of their own
    under_way: tuple[Draft, Future] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """The path of the checkpoint, whole once `wait` returns. Raises UserError as save_checkpoint, on all."""
        self.wait()
        draft = Draft(self.folder, step, meta)
        if not self.team.sharded:
            problem = self._write_whole(draft, tensors) if self.team.first else None
            if problem := self.team.told(problem):
                raise UserError(problem)
            return draft.path
        from onejump.sharded import begin_writing  # a second of imports, which only these runs need

        self.group = self.group or dist.new_group(backend="gloo")
        self.under_way = draft, begin_writing(draft, tensors, self.group)
        return draft.path

    def _write_whole(self, draft: Draft, tensors: Mapping[str, Tensor]) -> str | None:
        try:
            save_checkpoint(draft.into, draft.step, tensors, draft.meta, draft.keep)
        except UserError as error:
            return str(error)
        return None

    def wait(self) -> None:
        """Until the checkpoint under way is whole. Raises UserError if it cannot be."""
        if self.under_way is not None:
            from onejump.sharded import end_writing

            (draft, future), self.under_way = self.under_way, None
            end_writing(draft, future, self.team.first)

    def load(self, into: Mapping[str, Tensor]) -> Checkpoint | None:
        """The newest checkpoint that is intact for all processes; as load_checkpoint.

        Its tensors are `into`, filled in place, where the weights lie in pieces; else whole ones on the CPU.
        """
        steps = self.team.told(saved_steps(self.folder))
        return newest(self.folder, steps, functools.partial(self._read, into))

    def _read(self, into: Mapping[str, Tensor], path: Path, step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if not self.team.sharded:
            return agreed(self.team, lambda: read_checkpoint(path, step))
        share = slice(self.team.rank, None, self.team.world)
        content = agreed(self.team, lambda: verified(path, step, share))
        from onejump.sharded import read_pieces

        read_pieces(path, content, into)
        return content["meta"], dict(into)


def agreed(team: Team, read: Callable[[], Any]) -> Any:
    """What it returns, if it does so on all processes; else a ValueError on all."""
    if team.world == 1:
        return read()
    found, problem = None, ""
    try:
        found = read()
    except DAMAGE as error:
        problem = " ".join(str(error).split()) or type(error).__name__
    for text in team.all_told(problem):
        if text:
            raise ValueError(text)
    return found
