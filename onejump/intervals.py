"""What happens in training every so many steps: samples, evaluations, snapshots."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onejump.distributed import Team
from onejump.hand_over import decide
from onejump.metrics_log import RunLog
from onejump.model import ConsistencyModel
from onejump.run_state import Run
from onejump.types import UserError


@dataclass(frozen=True)
class Every:
    """Intervals in optimiser steps, counted over the whole chain; each also happens at the end. 0: only there."""

    log: int = 25
    save: int = 200
    sample: int = 200
    evaluate: int = 200


def due(step: int, interval: int, last_step: int) -> bool:
    return step == last_step or (interval > 0 and step % interval == 0)


@dataclass(frozen=True)
class Keeper:
    """Of the snapshots from which an EMA of any width is made afterwards, where the stage keeps some."""

    run: Run
    folder: Path
    last_step: int

    def begin(self) -> None:
        if self.run.averager:
            self._all(self.run.averager.begin)

    def at_step(self) -> None:
        if self.run.averager and self.run.averager.due(self.run.step, self.last_step):
            self._all(self.run.averager.save)

    def _all(self, write: Callable[..., None]) -> None:
        """The first process writes; where it cannot, all end with its UserError."""
        problem = None
        try:
            write(self.folder, self.run.step, writes=self.run.team.first)
        except UserError as error:
            problem = str(error)
        if problem := self.run.team.told(problem):
            raise UserError(problem)


@dataclass(frozen=True)
class Reports:
    """Samples and evaluations of the EMA model, at their intervals."""

    run: Run
    team: Team
    every: Every
    last_step: int
    log: RunLog
    on_sample: Callable[[ConsistencyModel, int], None]
    on_evaluate: Callable[[ConsistencyModel, int], dict[str, Any]]

    def at_step(self) -> bool:
        """What is due at this step; an evaluation that is already on file is not repeated.

        True: the evaluations so far say, by the rule of the stage, that it is over.
        """
        step, rule = self.run.step, self.run.stage.until
        if due(step, self.every.sample, self.last_step):
            self.on_sample(self.run.whole_ema(), step)
        if not due(step, self.every.evaluate, self.last_step):
            return False
        if self.team.told(self.log.evaluated != step):
            line = {"step": step, **self.run.clock(), **self.on_evaluate(self.run.whole_ema(), step)}
            self.log.evaluation(line)
        over = rule is not None and decide(rule.history(self.log.evaluated_lines()), rule) is not None
        return self.team.told(over)
