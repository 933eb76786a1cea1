"""A recipe from start to end: its stages one after the other, evaluation, report. Each part resumes."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from onejump.analytic import AnalyticPrecond
from onejump.by_first import by_first
from onejump.config import Distilling, Recipe, Stage
from onejump.config_json import to_json
from onejump.data.latents import LatentSet
from onejump.data.text_set import TextSet
from onejump.data.training_set import TrainingSet
from onejump.distributed import Team, in_turn
from onejump.evaluate import Judge, detector_for
from onejump.fit import check_files, images_for, network_of
from onejump.hand_over import in_words
from onejump.importers.stable_diffusion import open_sha256
from onejump.methods.base import Nets
from onejump.metrics_log import Silence, progress_for
from onejump.model import ConsistencyModel
from onejump.prompts import PARTS
from onejump.report import write_report
from onejump.run_evaluation import evaluate_run, tell
from onejump.run_record import finished, has_begun, say
from onejump.saved import SavedModel, model_sha256, save_model, write_json
from onejump.start import (
    Given,
    check_same_teacher,
    doubtful,
    first_step_of,
    guide_of_stage,
    start_of,
    starting_model,
    teacher_of,
)
from onejump.teacher import jump_in, jump_of, load_teacher
from onejump.train import Every, TrainResult, mix, train
from onejump.types import UserError
from onejump.watch import Best, Watch


def run(
    recipe: Recipe,
    data: TrainingSet,
    out: Path,
    device: torch.device,
    given: Given,
    tensorboard: bool = False,
    team: Team | None = None,
    judge: Judge | None = None,
) -> Path:
    """Every stage, the evaluation and the report, in a folder that open_run has opened. Returns the report.

    What is finished already is left as it is, unless the models it was made from have changed. All processes of a team
    call this; the first one writes. judge: of the same images, by another detector than their usual one.
    """
    judge, team = judge or Judge(data, detector_for(data)), team or Team(device=device)
    for name in recipe.stages:
        train_stage(recipe, name, judge, out, device, given, tensorboard, team)
    evaluate_run(recipe, judge, out, device, team)
    return Path(by_first(team, lambda: str(write_report(out))))


def train_stage(
    recipe: Recipe,
    name: str,
    judge: Judge,
    out: Path,
    device: torch.device,
    given: Given,
    tensorboard: bool = False,
    team: Team | None = None,
) -> None:
    """Trains one stage from the EMA of the stage before it (or of the model `init`), unless it is finished.

    Where what it started from has changed since, it is trained again, from the start.
    """
    stage, folder, team = recipe.stages[name], out / name, team or Team(device=device)
    start = start_of(recipe, name, out, given)
    stale = start.differs(folder)
    if team.told(not stale and finished(folder / "stage.json")):
        tell(team, f"{name}: finished before, kept")
        return
    student = starting_model(recipe, name, start)
    record = start.record
    if isinstance(stage.method, Distilling):
        record |= teacher_record(stage, teacher_of(recipe, name, out, given), guide_of_stage(name, out, given))
    team.barrier()  # all have read what the first now changes
    if stale:
        tell(team, f"{name}: {start.name} has changed since, trained again")
    if (doubt := doubtful(recipe, name, start)) and not has_begun(folder):
        tell(team, doubt)
    record |= {"first_step": first_step_of(recipe, name, out, start, stale)}
    by_first(team, lambda: begin(folder, record, stale))
    nets = nets_of(recipe, name, student, judge.data, out, team, given)
    result = train_nets(recipe, name, nets, judge, folder, record, tensorboard, team)
    by_first(team, lambda: keep(recipe, name, result, judge.data, folder, record))


def begin(folder: Path, record: dict[str, Any], afresh: bool) -> None:
    """Says in start.json what the stage starts from."""
    if afresh:
        clear(folder)
    write_json(folder / "start.json", record)


def teacher_record(stage: Stage, teacher: Path, guide: Path | None) -> dict[str, Any]:
    """Which teacher, and which model guides it if one does."""
    record: dict[str, Any] = {"teacher_sha256": open_sha256(teacher)}
    if stage.guidance != 1 and guide is not None:
        record["guide"] = {"path": str(guide), "sha256": open_sha256(guide)}
    return record


def keep(
    recipe: Recipe, name: str, result: TrainResult, images: TrainingSet, folder: Path, record: dict[str, Any]
) -> None:
    """The stage's model, and stage.json, which says that it is finished. With a rule it is the best on the way."""
    saved = saved_as(recipe, name, result.ema, result.last_step, images, record)
    rule, numbers = recipe.stages[name].until, numbers_of(result) | record
    best = Best(rule, folder) if rule else None
    if rule and best and (decision := best.decision()):
        saved = replace(best.model(decision), licence=saved.licence)
        numbers["hand_over"] = decision.record(rule)
        say(f"{name}: {in_words(numbers['hand_over'])}")
    save_model(folder / "model", saved)
    write_json(folder / "stage.json", numbers | {"model_sha256": model_sha256(folder)})
    if best:
        best.clear()


def saved_as(
    recipe: Recipe, name: str, ema: ConsistencyModel, step: int, images: TrainingSet, record: dict[str, Any]
) -> SavedModel:
    """The stage's averaged model at a step, with what is to be known of it."""
    stage, data = recipe.stages[name], images_for(recipe.network, images)
    origin = {"recipe": recipe.name, "stage": name, "step": step, "seed": recipe.seed, **record}
    origin |= {"data": data.name, "data_fingerprint": images.fingerprint, "method": to_json(stage.method)}
    if isinstance(data, LatentSet):
        origin |= {"latents": asdict(data.scaling)}
    if isinstance(data, TextSet):
        origin |= {PARTS: data.parts}
    network, about = network_of(recipe, stage), (data.shape, data.class_names, origin)
    return SavedModel(ema, network, stage.sampler, *about, ema=stage.ema.name)


def train_nets(
    recipe: Recipe,
    name: str,
    nets: Nets,
    judge: Judge,
    folder: Path,
    record: dict[str, Any],
    tensorboard: bool,
    team: Team,
) -> TrainResult:
    stage, data = recipe.stages[name], images_for(recipe.network, judge.data)

    def saved(ema: ConsistencyModel, step: int) -> SavedModel:
        return saved_as(recipe, name, ema, step, judge.data, record)

    watch = Watch(judge, stage, recipe.evaluation, folder, data.classes, team, saved)
    watch.ready()
    return train(
        stage,
        nets,
        data,
        folder,
        seed=mix(recipe.seed, list(recipe.stages).index(name), 0, 1),  # no stage repeats another's noise
        first_step=record["first_step"],
        every=Every(recipe.log_every, recipe.save_every, recipe.sample_every, recipe.evaluate_every),
        device=team.device,
        progress=progress_for(name) if team.first else Silence(),
        on_sample=watch.on_sample,
        on_evaluate=watch.on_evaluate,
        team=team,
        tensorboard=tensorboard,
    )


def numbers_of(result: TrainResult) -> dict[str, Any]:
    numbers = {"first_step": result.first_step, "last_step": result.last_step, "seconds": result.train_seconds}
    numbers |= {"seconds_on_the_clock": result.seconds, "images": result.images, "skipped": result.skipped}
    return numbers | {"parameters": sum(p.numel() for p in result.ema.parameters())}


def nets_of(
    recipe: Recipe,
    name: str,
    student: ConsistencyModel,
    data: TrainingSet,
    out: Path,
    team: Team,
    given: Given,
) -> Nets:
    """The method's networks around the student; a jump that comes from the teacher is computed here."""
    stage = recipe.stages[name]
    if not isinstance(stage.method, Distilling):
        return stage.method.nets(student)
    path, guide = teacher_of(recipe, name, out, given), guide_of_stage(name, out, given)
    teacher = load_teacher(recipe, name, path, data, team.device, guide)
    if isinstance(stage.jump, AnalyticPrecond):
        wanted = stage.jump
        student.jump = in_turn(team, lambda: jump_of(wanted, teacher, data, out / name, name))
    torch.manual_seed(mix(recipe.seed, list(recipe.stages).index(name), 0, 2))  # the same on all processes
    critic = (stage.critic.build(),) if stage.critic else ()
    return stage.method.nets(student, teacher.saved.model, *critic)


def check_teachers(
    recipe: Recipe, names: list[str], data: TrainingSet, out: Path, device: torch.device, given: Given
) -> None:
    """Raises UserError now for a teacher that is already there and will not do, or that nothing will provide, and for
    missing weights of a distance."""
    for name in names:
        check_files(recipe.stages[name])
        if recipe.stages[name].until and isinstance(data, LatentSet | TextSet):
            raise UserError(f"{name}.until: latents are not judged while training; leave until=none")
        if isinstance(recipe.stages[name].method, Distilling):
            check_same_teacher(name, out, given)
            path, guide = teacher_of(recipe, name, out, given), guide_of_stage(name, out, given)
            if given.teacher or given.init or (path / "stage.json").exists():
                teacher, jump = load_teacher(recipe, name, path, data, device, guide), recipe.stages[name].jump
                if isinstance(jump, AnalyticPrecond) and jump.table:
                    jump_in(Path(jump.table), jump, teacher)


def clear(folder: Path) -> None:
    """Removes what training has left in a stage's folder; start.json last, so that a kill in between is noticed."""
    for name in ("stage.json", "model", "best", "checkpoints", "samples", "tensorboard", "ema"):
        (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name, ignore_errors=True)
    for path in (*folder.glob("precond.*"), *(folder / f"{name}.jsonl" for name in ("metrics", "evaluations"))):
        path.unlink(missing_ok=True)
    (folder / "start.json").unlink(missing_ok=True)
