"""What a run has left in its folder so far. Whatever is not there yet is empty, and a torn last line is left out."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onejump.config import Recipe, Stage
from onejump.config_json import from_json
from onejump.methods.dsm import DSM
from onejump.types import UserError


@dataclass(frozen=True)
class StageFolder:
    """One stage: its lines in order of step, its numbers by sampling steps, its pictures."""

    name: str
    stage: Stage
    first_step: int  # its count at its start
    steps_before: int  # of the stages before it
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]  # stage.json; empty until the stage has ended
    results: dict[int, dict[str, Any]]
    sheets: dict[int, Path]  # samples by sampling steps
    neighbours: Path

    @property
    def is_diffusion(self) -> bool:
        return isinstance(self.stage.method, DSM)

    def step_of(self, line: dict[str, Any]) -> int:
        """Counted over all stages."""
        return line["step"] - self.first_step + self.steps_before

    @property
    def last_line(self) -> dict[str, Any]:
        """Of metrics.jsonl; empty before the first."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def train_seconds(self) -> float:
        """So far, without sampling, evaluating and saving."""
        return self.summary.get("seconds", self.last_line.get("train_seconds", 0.0))

    @property
    def clock_seconds(self) -> float:
        """So far, with them."""
        return self.summary.get("seconds_on_the_clock", self.last_line.get("seconds", 0.0))


@dataclass(frozen=True)
class RunFolder:
    path: Path
    recipe: Recipe
    run: dict[str, Any]
    evaluation: dict[str, Any]
    stages: tuple[StageFolder, ...]

    @property
    def real(self) -> Path:
        return self.path / "report" / "real.png"

    @property
    def command(self) -> str:
        """The command of this run: given again, it goes on where it stopped, to the evaluation and the report."""
        return self.run.get("command", "onejump run")


def read_run(out: Path) -> RunFolder:
    """Reads the folder; raises UserError if it is not the folder of a run."""
    if not (out / "recipe.json").is_file():
        raise UserError(f"{out}: no recipe.json there, so this is no run's folder; give the one that training made")
    recipe = from_json(read_json(out / "recipe.json"))
    if not isinstance(recipe, Recipe):
        raise UserError(f"{out / 'recipe.json'}: holds a {type(recipe).__name__}, not a Recipe")
    evaluation = read_json(out / "evaluation.json")
    stages = tuple(_read_stage(out, recipe, name, evaluation) for name in recipe.stages)
    return RunFolder(out, recipe, read_json(out / "run.json"), evaluation, stages)


def _read_stage(out: Path, recipe: Recipe, name: str, evaluation: dict[str, Any]) -> StageFolder:
    before = itertools.takewhile(lambda other: other != name, recipe.stages)
    summary = read_json(out / name / "stage.json")
    begun = summary or read_json(out / name / "start.json")
    results = evaluation.get("stages", {}).get(name, {}).get("steps", {})
    sheets = {}
    for path in (out / "report").glob(f"{name}-*step.png"):
        if match := re.fullmatch(r"-(\d+)step\.png", path.name.removeprefix(name)):
            sheets[int(match[1])] = path
    return StageFolder(
        name=name,
        stage=recipe.stages[name],
        first_step=begun.get("first_step", recipe.first_step(name)),
        steps_before=sum(_steps_of(out, recipe, other) for other in before),
        metrics=read_lines(out / name / "metrics.jsonl"),
        evaluations=read_lines(out / name / "evaluations.jsonl"),
        summary=summary,
        results={int(k): numbers for k, numbers in sorted(results.items(), key=lambda item: int(item[0]))},
        sheets=dict(sorted(sheets.items())),
        neighbours=out / "report" / f"neighbours-{name}.png",
    )


def _steps_of(out: Path, recipe: Recipe, name: str) -> int:
    """That the stage took, or is to take."""
    done = read_json(out / name / "stage.json")
    return done["last_step"] - done["first_step"] if done else recipe.stages[name].steps


def read_json(path: Path) -> dict[str, Any]:
    """The object in this file, {} if there is no file; raises UserError if it is not JSON."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); delete it and make it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; delete it and make it again")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file in order of step, the later one where a step was written twice."""
    lines: dict[int, dict[str, Any]] = {}
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:  # the run was stopped while it wrote this line
            continue
        lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]
