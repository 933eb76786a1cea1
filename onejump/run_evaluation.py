"""evaluation.json and the pictures of a run's report."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from onejump.by_first import by_first, led
from onejump.config import Recipe
from onejump.data.latents import LatentSet
from onejump.data.text_set import TextSet
from onejump.data.training_set import TrainingSet
from onejump.distributed import Team
from onejump.evaluate import How, Judge, evaluate
from onejump.evaluation.metrics import nearest_neighbours
from onejump.generate import balanced_labels, generate_by
from onejump.parts import Workers
from onejump.report import contact_sheet, how_to_judge, neighbour_sheet
from onejump.run_record import finished, read_json, say
from onejump.samplers import ODE
from onejump.saved import load_model, model_sha256, write_json
from onejump.types import Images

GRID = 60  # images in a contact sheet: 6 rows of 10, so that each column is a class of the digits
SHARES = "evaluation.shares"  # where several processes lay down their shares of an evaluation
AT_ONCE = 4096  # training images that samples are compared with at once


def tell(team: Team, text: str) -> None:
    if team.first:
        say(text)


def evaluate_run(recipe: Recipe, judge: Judge, out: Path, device: torch.device, team: Team | None = None) -> None:
    """evaluation.json and the pictures of the report: every stage from the same noise."""
    team = team or Team(device=device)
    path = out / "evaluation.json"
    if isinstance(judge.data, LatentSet | TextSet):
        text, command = how_to_judge(recipe.network, out)
        tell(team, f"evaluation: left out. {text} `{command}`")
        return
    hashes = {name: model_sha256(out / name) for name in recipe.stages}
    changed = team.told(changed_since(path, hashes))
    if not changed:
        tell(team, "evaluation: finished before, kept")
        return
    if changed != list(hashes):
        tell(team, f"evaluation: {', '.join(changed)} changed since, made again")
    stages = {name: evaluate_stage(recipe, name, judge, out, hashes[name], team) for name in recipe.stages}

    def write() -> None:
        labels = balanced_labels(GRID, recipe.network.label_dim)
        contact_sheet(real_images(judge.data, labels), 10, out / "report" / "real.png")
        write_json(path, {"detector": judge.detector.name, "reference": judge.reference, "stages": stages})
        shutil.rmtree(out / SHARES, ignore_errors=True)

    by_first(team, write)


def changed_since(path: Path, hashes: dict[str, str]) -> list[str]:
    """The stages whose models are not those that evaluation.json is about; all, without one."""
    before = read_json(path).get("stages", {}) if finished(path) else {}
    return [name for name in hashes if before.get(name, {}).get("model_sha256") != hashes[name]]


def evaluate_stage(recipe: Recipe, name: str, judge: Judge, out: Path, sha256: str, team: Team) -> dict[str, Any]:
    """The numbers of one stage's model, which the first process alone knows, and its pictures."""
    wanted, saved = recipe.evaluation, load_model(out / name)
    model, labels = saved.model.to(team.device), balanced_labels(GRID, recipe.network.label_dim)
    steps: Sequence[int] = (wanted.teacher_steps,) if isinstance(saved.sampler, ODE) else wanted.steps
    tell(team, f"evaluation: {name}, {wanted.n} images with {' and '.join(map(str, steps))} step(s)")
    workers = Workers(out / SHARES, rank=team.rank, world=team.world) if team.world > 1 else Workers()
    how = How(workers=workers, identity=sha256)
    found = led(team, lambda: evaluate(judge, saved, steps, wanted.n, wanted.seed, how=how))
    sheets = {k: generate_by(team, model, saved.sampler, k, GRID, judge.data.shape, labels, wanted.seed) for k in steps}
    by_first(team, lambda: show_samples(judge, name, sheets, out / "report"))
    return found | {"model_sha256": sha256}


def show_samples(judge: Judge, name: str, sheets: dict[int, Images], folder: Path) -> None:
    """Those of each number of steps; under the first, the training images nearest to some."""
    for k, images in sheets.items():
        contact_sheet(images, 10, folder / f"{name}-{k}step.png")
    first = next(iter(sheets.values()))[:30]
    neighbour_sheet(first, nearest_in(judge.data, first), 10, folder / f"neighbours-{name}.png")


def nearest_in(data: TrainingSet, samples: Images) -> Images:
    """The training image nearest to each sample, from one pass over the set."""
    best, found = torch.full((len(samples),), torch.inf, dtype=torch.float64), torch.empty_like(samples)
    for images, _ in data.chunks(AT_ONCE):
        index, distance = nearest_neighbours(samples, images)
        closer = distance < best
        best[closer], found[closer] = distance[closer], images[index[closer]]
    return found


def real_images(data: TrainingSet, labels: torch.Tensor | None) -> Images:
    """As many real images as a sheet holds, of the classes asked of the samples; black where one has none."""
    if labels is None or data.labels is None:
        return data.pick(torch.arange(GRID) % data.n)
    of_class = [torch.nonzero(data.labels == c).flatten().tolist() for c in range(data.classes)]
    asked = [of_class[c] for c in labels.tolist()]
    rows = [own[(i // data.classes) % len(own)] if own else 0 for i, own in enumerate(asked)]
    there = torch.tensor([bool(own) for own in asked])
    return data.pick(torch.tensor(rows)) * there[:, None, None, None]
