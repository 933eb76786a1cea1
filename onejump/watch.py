"""What is looked at while a stage trains: its averaged model's samples, how good they are, and which were the best."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onejump.by_first import by_first
from onejump.checkpoint import saved_steps
from onejump.config import Evaluation, Stage
from onejump.data.latents import LatentSet
from onejump.data.text_set import TextSet
from onejump.distributed import Team
from onejump.generate import balanced_labels, denoise_images, generate_by
from onejump.hand_over import Decision, Judged, Plateau, at_end, best_of, decide
from onejump.judge import Judge
from onejump.model import ConsistencyModel
from onejump.prompts import SHOWN, shown
from onejump.report import contact_sheet
from onejump.run_evaluation import GRID
from onejump.run_folder import read_lines
from onejump.samplers import ODE, Jumps
from onejump.saved import SavedModel, load_model, save_model
from onejump.types import Images, UserError

Saved = Callable[[ConsistencyModel, int], SavedModel]  # a stage's averaged model at a step, as its file will say


@dataclass(frozen=True)
class Best:
    """The models of a stage that its rule may hand over: STAGE/best/step-N, the best as of each checkpoint and now.

    A run that goes on from a checkpoint may come to other evaluations than before, where a device adds in no fixed
    order; what was best at the checkpoint is still there.
    """

    rule: Plateau
    folder: Path  # of the stage

    def path(self, step: int) -> Path:
        return self.folder / "best" / f"step-{step:08d}"

    def history(self, before: float = float("inf")) -> tuple[Judged, ...]:
        """The evaluations that are on file, below this step."""
        return tuple(found for found in self.rule.history(self._lines()) if found.step < before)

    def _lines(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "evaluations.jsonl")

    def keep(self, line: dict[str, Any], step: int, saved: Callable[[], SavedModel]) -> None:
        """Before the line of `step` is written: its model, if it is the best so far; those not needed are removed."""
        history = (*self.history(step), *self.rule.history([{"step": step, **line}]))
        bests = {best_of([found for found in history if found.step <= s]) for s in self._checkpoints(step)}
        kept = {self.path(best.step) for best in bests if best}
        if self.path(step) in kept:
            save_model(self.path(step), saved())
        for path in set(self.path(0).parent.glob("step-*")) - kept:
            shutil.rmtree(path, ignore_errors=True)

    def _checkpoints(self, step: int) -> set[int]:
        return {*saved_steps(self.folder / "checkpoints"), step}

    def decision(self) -> Decision | None:
        """Of a stage that has ended; None if nothing was judged."""
        history = self.history()
        return decide(history, self.rule) or at_end(history)

    def model(self, decision: Decision) -> SavedModel:
        """Raises UserError if the model to hand over is gone."""
        path = self.path(decision.best.step)
        try:
            return load_model(path)
        except UserError as error:
            way_out = f"delete {self.folder} to train the stage again"
            raise UserError(f"{path}: the stage's best model cannot be read ({error}); {way_out}") from error

    def clear(self) -> None:
        """Once the stage is finished."""
        shutil.rmtree(self.path(0).parent, ignore_errors=True)


@dataclass(frozen=True)
class Watch:
    """Looks at the EMA model of a stage while it trains: sample grids, and Frechet distances by number of steps."""

    judge: Judge
    stage: Stage
    wanted: Evaluation
    folder: Path
    classes: int  # that the model knows
    team: Team
    saved: Saved

    def images(self, ema: ConsistencyModel, n: int, steps: int) -> Images:
        labels, sampler = balanced_labels(n, self.classes), self.stage.sampler
        return generate_by(self.team, ema, sampler, steps, n, self.judge.data.shape, labels, self.wanted.seed)

    def on_sample(self, ema: ConsistencyModel, step: int) -> None:
        path, sampler, data = self.folder / "samples" / f"step-{step:08d}.png", self.stage.sampler, self.judge.data
        if isinstance(data, TextSet):
            seed = self.wanted.seed
            by_first(self.team, lambda: contact_sheet(shown(ema, sampler, data, seed), len(SHOWN), path))
        if isinstance(data, LatentSet | TextSet):  # latents alone can be shown by their autoencoder only
            return
        steps = 1
        if isinstance(sampler, ODE | Jumps):  # which cannot take one
            steps = self.wanted.teacher_steps if isinstance(sampler, ODE) else len(sampler.start)
        images = self.images(ema, GRID, steps)
        by_first(self.team, lambda: contact_sheet(images, 10, path))

    def on_evaluate(self, ema: ConsistencyModel, step: int) -> dict[str, Any]:
        """The line of evaluations.jsonl, once the model is kept if it is the best by the stage's rule."""
        if not self.judges:
            return {"frechet": {}}
        line = {"frechet": {str(k): self.frechet(self.images(ema, self.wanted.n, k)) for k in self.wanted.steps}}
        rule = self.stage.until
        if rule is None:
            return line
        if (t := rule.t) is not None:
            kind, which = rule.measure
            line[kind] = {which: by_first(self.team, lambda: self.denoising(ema, t))}
        by_first(self.team, lambda: Best(rule, self.folder).keep(line, step, lambda: self.saved(ema, step)))
        return line

    @property
    def judges(self) -> bool:
        """Not diffusion models, of dozens of network calls an image, which are judged once, at the end; nor latents."""
        return not isinstance(self.stage.sampler, ODE) and not isinstance(self.judge.data, LatentSet | TextSet)

    def ready(self) -> None:
        """Has the real images measured now, which may take long, and not when the first evaluation is due."""
        if self.judges:
            by_first(self.team, self.judge.measure_real)

    def frechet(self, images: Images) -> float:
        return by_first(self.team, lambda: self.judge.frechet(images))

    def denoising(self, ema: ConsistencyModel, t: float) -> float:
        """The denoising FID at t, of the same images and noise at every step."""
        data, seed = self.judge.data, self.wanted.seed
        chosen = torch.randperm(data.n, generator=torch.Generator().manual_seed(0))[: self.wanted.n]
        labels = data.labels[chosen] if self.classes and data.labels is not None else None
        return self.judge.frechet(denoise_images(ema, data.pick(chosen), t, range(len(chosen)), labels, seed))
