"""The diffusion model that a stage distils: found sound before training starts, and the jump computed from it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from onejump.analytic import AnalyticPrecond, estimate
from onejump.analytic_jump import Analytic
from onejump.analytic_page import cost, write_table_page
from onejump.analytic_table import Estimator, Table, load_table, save_table
from onejump.config import SIGMA_MAX, SIGMA_MIN, Recipe
from onejump.data.text_set import TextSet
from onejump.data.training_set import TrainingSet
from onejump.fit import check_precond, images_for
from onejump.guidance import guide_of, guided_sha256
from onejump.importers.stable_diffusion import open_model, open_sha256
from onejump.metrics_log import progress_of
from onejump.precond import EDM, StableDiffusion, ToData
from onejump.prompts import PARTS
from onejump.samplers import ODE
from onejump.saved import SavedModel
from onejump.times import karras_grid
from onejump.types import UserError


@dataclass(frozen=True)
class Teacher:
    saved: SavedModel
    sha256: str
    path: Path


def load_teacher(
    recipe: Recipe, name: str, path: Path, data: TrainingSet, device: torch.device, guide: Path | None = None
) -> Teacher:
    """The teacher of stage `name`, on the device, with the guidance that the stage asks for (by the model `guide`).

    A guided one counts as another teacher, with a table of its own. Raises UserError if it cannot teach these images.
    """
    saved = open_model(path)
    check_diffusion(saved, path, "; give one with --teacher")
    check_images(saved, path, images_for(recipe.network, data))
    check_precond(str(path), saved.model.precond, name, recipe.stages[name].precond)
    if isinstance(data, TextSet):
        check_text(saved, path, data)
    saved.model.to(device)
    scale, null = recipe.stages[name].guidance, None
    if scale != 1 and isinstance(data, TextSet):
        null = data.encoder(device)([""])[0]
    saved = guide_of(saved, path, scale, guide, null)
    check_finite(saved, path, data, device)
    return Teacher(saved, guided_sha256(open_sha256(path), scale, guide), path)


def check_diffusion(saved: SavedModel, path: Path, way_out: str = "") -> None:
    if not isinstance(saved.sampler, ODE) or not isinstance(saved.model.jump, ToData) or saved.model.second_time:
        raise UserError(f"{path}: not a diffusion model (trained by DSM), which is what a teacher must be{way_out}")


def check_images(saved: SavedModel, path: Path, data: TrainingSet) -> None:
    """Whether the teacher knows images of this shape, and their classes."""
    if saved.shape != data.shape:
        theirs, ours = ("x".join(map(str, shape)) for shape in (saved.shape, data.shape))
        raise UserError(f"{path}: this teacher makes images of {theirs}, these ({data.name}) are {ours}; see --size")
    if saved.network.label_dim != data.classes:
        theirs, ours = (f"{n} classes" if n else "no classes" for n in (saved.network.label_dim, data.classes))
        raise UserError(f"{path}: this teacher knows {theirs}, these images ({data.name}) have {ours}; give another")


def check_text(saved: SavedModel, path: Path, data: TextSet) -> None:
    """Whether the captions are read, and the latents made, by the parts of the teacher's own Stable Diffusion."""
    theirs = saved.provenance.get(PARTS, {})
    for key, what in (("text_sha256", "text encoder"), ("vae_sha256", "autoencoder")):
        if theirs.get(key) != data.parts[key]:
            raise UserError(f"{path}: its {what} is not the one that {data.name} was prepared with; prepare it anew")


@torch.no_grad()
def check_finite(saved: SavedModel, path: Path, data: TrainingSet, device: torch.device) -> None:
    """One pass at 16 times over the whole range: what is not finite now would ruin the training unseen."""
    ends, precond = (SIGMA_MIN, SIGMA_MAX), saved.model.precond
    if isinstance(precond, StableDiffusion):
        ends = precond.schedule.sigma_min, precond.schedule.sigma_max
    t = karras_grid(16, *ends).float().to(device)
    x0, cond = images_for(saved.network, data).batch(0, len(t), seed=0, device=device)
    bad = ~saved.model.denoise(x0 + t.view(-1, 1, 1, 1) * torch.randn_like(x0), t, cond=cond).flatten(1).isfinite()
    if bad.any():
        at = t[bad.any(1)][0].item()
        raise UserError(f"{path}: this teacher's output is not finite at t = {at:.4g}; it cannot teach")


def jump_of(wanted: AnalyticPrecond, teacher: Teacher, data: TrainingSet, folder: Path, name: str) -> Analytic:
    """The jump computed from this teacher: from the table given, or the one in `folder`, estimated unless it is that.

    A stage killed before its first checkpoint may be given another teacher, other images or another estimator.
    """
    if wanted.table:
        return jump_in(Path(wanted.table), wanted, teacher)
    path = folder / "precond.json"
    if not is_of(path, teacher, data, wanted.estimator):
        estimate_table(teacher.saved, teacher.sha256, data, wanted.estimator, path, f"{name}, preconditioning")
    return jump_in(path, wanted, teacher)


def is_of(path: Path, teacher: Teacher, data: TrainingSet, estimator: Estimator) -> bool:
    """Whether the file is a whole table of this teacher from these images, estimated this way."""
    try:
        table = load_table(path)
    except UserError:
        return False
    found = table.teacher, table.data_fingerprint, table.estimator
    return found == (teacher.sha256, data.fingerprint, estimator)


def jump_in(path: Path, wanted: AnalyticPrecond, teacher: Teacher) -> Analytic:
    """The jump of a table file. Raises UserError if it is of another teacher or another range of times."""
    table = load_table(path)
    if table.teacher != teacher.sha256:
        raise UserError(f"{path}: a table of another teacher than {teacher.path}; make one with onejump precond")
    jump = table.jump(wanted.form)
    jump.check_times(SIGMA_MIN, SIGMA_MAX)
    return jump


def estimate_table(
    saved: SavedModel, sha256: str, data: TrainingSet, estimator: Estimator, path: Path, title: str
) -> Table:
    """Estimates and writes the table of this teacher; a second call goes on where the first was killed."""
    assert isinstance(saved.model.precond, EDM), "check_diffusion has let it pass"
    device = next(saved.model.parameters()).device
    x0, cond = images_for(saved.network, data).batch(0, estimator.samples, estimator.seed, device=device)
    partial = path.with_suffix(".partial.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress_of(title) as progress:
        try:
            table = estimate(
                saved.model,
                x0,
                cond,
                estimator,
                teacher_sha=sha256,
                data_name=data.name,
                data_fingerprint=data.fingerprint,
                partial=partial,
                progress=progress,
            )
        except KeyboardInterrupt:
            if partial.exists():
                print(f"\nKept in {partial}: the same command goes on from there", file=sys.stderr)
            raise
    save_table(path, table)
    partial.unlink(missing_ok=True)
    write_table_page(path.with_suffix(".html"), table, saved.model.precond, cost(table))
    return table
