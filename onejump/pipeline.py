"""A recipe from start to end: its stages one after the other, evaluation, report. Each part resumes."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from onejump.analytic import AnalyticPrecond
from onejump.config import Distilling, Evaluation, Recipe
from onejump.config_json import to_json
from onejump.data.latents import LatentSet
from onejump.data.training_set import TrainingSet
from onejump.evaluate import Judge, detector_for, evaluate
from onejump.evaluation.metrics import nearest_neighbours
from onejump.fit import check_files, images_for, network_of
from onejump.generate import balanced_labels, generate
from onejump.methods.base import Nets
from onejump.metrics_log import progress_for
from onejump.model import ConsistencyModel
from onejump.report import contact_sheet, neighbour_sheet, write_report
from onejump.run_record import finished, read_json, say
from onejump.samplers import ODE, Jumps, Sampler
from onejump.saved import SavedModel, load_model, model_sha256, save_model, write_json
from onejump.start import Given, check_same_teacher, start_of, starting_model, teacher_of
from onejump.teacher import jump_in, jump_of, load_teacher
from onejump.train import Every, TrainResult, mix, train
from onejump.types import Images

GRID = 60  # images in a contact sheet: 6 rows of 10, so that each column is a class of the digits
AT_ONCE = 4096  # training images that samples are compared with at once


def run(
    recipe: Recipe, data: TrainingSet, out: Path, device: torch.device, given: Given, tensorboard: bool = False
) -> Path:
    """Every stage, the evaluation and the report, in a folder that open_run has opened. Returns the report.

    What is finished already is left as it is, unless the models it was made from have changed.
    """
    judge = Judge(data, detector_for(data))
    for name in recipe.stages:
        train_stage(recipe, name, judge, out, device, given, tensorboard)
    evaluate_run(recipe, judge, out, device)
    return write_report(out)


@dataclass(frozen=True)
class Watch:
    """Looks at the EMA model of a stage while it trains: sample grids, and Frechet distances by number of steps."""

    judge: Judge
    sampler: Sampler
    wanted: Evaluation
    folder: Path
    classes: int  # that the model knows

    def images(self, ema: ConsistencyModel, n: int, steps: int) -> Images:
        labels = balanced_labels(n, self.classes)
        return generate(ema, self.sampler, steps, range(n), self.judge.data.shape, labels, self.wanted.seed)

    def on_sample(self, ema: ConsistencyModel, step: int) -> None:
        if isinstance(self.judge.data, LatentSet):  # which only their autoencoder can show
            return
        steps = 1
        if isinstance(self.sampler, ODE | Jumps):  # which cannot take one
            steps = self.wanted.teacher_steps if isinstance(self.sampler, ODE) else len(self.sampler.start)
        contact_sheet(self.images(ema, GRID, steps), 10, self.folder / "samples" / f"step-{step:08d}.png")

    def on_evaluate(self, ema: ConsistencyModel, step: int) -> dict[str, Any]:
        if isinstance(self.sampler, ODE):  # dozens of network calls an image: evaluated once, at the end
            return {"frechet": {}}
        if isinstance(self.judge.data, LatentSet):
            return {"frechet": {}}
        return {"frechet": {str(k): self.judge.frechet(self.images(ema, self.wanted.n, k)) for k in self.wanted.steps}}


def train_stage(
    recipe: Recipe,
    name: str,
    judge: Judge,
    out: Path,
    device: torch.device,
    given: Given,
    tensorboard: bool = False,
) -> None:
    """Trains one stage from the EMA of the stage before it (or of the model `init`), unless it is finished.

    Where what it started from has changed since, it is trained again, from the start.
    """
    stage, folder, data = recipe.stages[name], out / name, images_for(recipe.network, judge.data)
    start = start_of(recipe, name, out, given)
    stale = start.differs(folder)
    if not stale and finished(folder / "stage.json"):
        say(f"{name}: finished before, kept")
        return
    student = starting_model(recipe, name, start)
    if stale:
        say(f"{name}: {start.name} has changed since, trained again")
        clear(folder)
    record = start.record
    if isinstance(stage.method, Distilling):
        record |= {"teacher_sha256": model_sha256(teacher_of(recipe, name, out, given))}
    write_json(folder / "start.json", record)
    nets = nets_of(recipe, name, student, judge.data, out, device, given)
    result = train_nets(recipe, name, nets, judge, folder, device, tensorboard)
    origin = {"recipe": recipe.name, "stage": name, "step": result.last_step, "seed": recipe.seed, **record}
    origin |= {"data": data.name, "data_fingerprint": judge.data.fingerprint, "method": to_json(stage.method)}
    if isinstance(data, LatentSet):
        origin |= {"latents": asdict(data.scaling)}
    network, about = network_of(recipe, stage), (data.shape, data.class_names, origin)
    save_model(folder / "model", SavedModel(result.ema, network, stage.sampler, *about, ema=stage.ema.name))
    write_json(folder / "stage.json", numbers_of(result) | record | {"model_sha256": model_sha256(folder)})


def train_nets(
    recipe: Recipe, name: str, nets: Nets, judge: Judge, folder: Path, device: torch.device, tensorboard: bool
) -> TrainResult:
    stage, data = recipe.stages[name], images_for(recipe.network, judge.data)
    watch = Watch(judge, stage.sampler, recipe.evaluation, folder, data.classes)
    return train(
        stage,
        nets,
        data,
        folder,
        seed=mix(recipe.seed, list(recipe.stages).index(name), 0, 1),  # no stage repeats another's noise
        first_step=recipe.first_step(name),
        every=Every(recipe.log_every, recipe.save_every, recipe.sample_every, recipe.evaluate_every),
        device=device,
        progress=progress_for(name),
        on_sample=watch.on_sample,
        on_evaluate=watch.on_evaluate,
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
    device: torch.device,
    given: Given,
) -> Nets:
    """The method's networks around the student; a jump that comes from the teacher is computed here."""
    stage = recipe.stages[name]
    if not isinstance(stage.method, Distilling):
        return stage.method.nets(student)
    teacher = load_teacher(recipe, name, teacher_of(recipe, name, out, given), data, device)
    if isinstance(stage.jump, AnalyticPrecond):
        student.jump = jump_of(stage.jump, teacher, data, out / name, name)
    critic = (stage.critic.build(),) if stage.critic else ()
    return stage.method.nets(student, teacher.saved.model, *critic)


def check_teachers(
    recipe: Recipe, names: list[str], data: TrainingSet, out: Path, device: torch.device, given: Given
) -> None:
    """Raises UserError now for a teacher that is already there and will not do, or that nothing will provide, and for
    missing weights of a distance."""
    for name in names:
        check_files(recipe.stages[name])
        if isinstance(recipe.stages[name].method, Distilling):
            check_same_teacher(name, out, given)
            path = teacher_of(recipe, name, out, given)
            if given.teacher or given.init or (path / "stage.json").exists():
                teacher, jump = load_teacher(recipe, name, path, data, device), recipe.stages[name].jump
                if isinstance(jump, AnalyticPrecond) and jump.table:
                    jump_in(Path(jump.table), jump, teacher)


def clear(folder: Path) -> None:
    """Removes what training has left in a stage's folder; start.json last, so that a kill in between is noticed."""
    for name in ("stage.json", "model", "checkpoints", "samples", "tensorboard"):
        (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name, ignore_errors=True)
    for path in (*folder.glob("precond.*"), *(folder / f"{name}.jsonl" for name in ("metrics", "evaluations"))):
        path.unlink(missing_ok=True)
    (folder / "start.json").unlink(missing_ok=True)


def evaluate_run(recipe: Recipe, judge: Judge, out: Path, device: torch.device) -> None:
    """evaluation.json and the pictures of the report: every stage from the same noise."""
    wanted, path = recipe.evaluation, out / "evaluation.json"
    if isinstance(judge.data, LatentSet):
        say("evaluation: left out, since latents are no images; decode samples with their autoencoder to judge them")
        return
    hashes = {name: model_sha256(out / name) for name in recipe.stages}
    if finished(path):
        before = read_json(path).get("stages", {})
        changed = [name for name in hashes if before.get(name, {}).get("model_sha256") != hashes[name]]
        if not changed:
            say("evaluation: finished before, kept")
            return
        say(f"evaluation: {', '.join(changed)} changed since, made again")
    labels, shape, stages = balanced_labels(GRID, recipe.network.label_dim), judge.data.shape, {}
    contact_sheet(real_images(judge.data, labels), 10, out / "report" / "real.png")
    for name in recipe.stages:
        saved = load_model(out / name)
        model = saved.model.to(device)
        steps = (wanted.teacher_steps,) if isinstance(saved.sampler, ODE) else wanted.steps
        say(f"evaluation: {name}, {wanted.n} images with {' and '.join(map(str, steps))} step(s)")
        stages[name] = evaluate(judge, saved, steps, wanted.n, wanted.seed) | {"model_sha256": hashes[name]}
        for k in steps:
            images = generate(model, saved.sampler, k, range(GRID), shape, labels, wanted.seed)
            contact_sheet(images, 10, out / "report" / f"{name}-{k}step.png")
            if k == steps[0]:
                nearest = nearest_in(judge.data, images[:30])
                neighbour_sheet(images[:30], nearest, 10, out / "report" / f"neighbours-{name}.png")
    write_json(path, {"detector": judge.detector.name, "reference": judge.reference, "stages": stages})


def nearest_in(data: TrainingSet, samples: Images) -> Images:
    """The training image nearest to each sample, from one pass over the set."""
    best, found = torch.full((len(samples),), torch.inf, dtype=torch.float64), torch.empty_like(samples)
    for images, _ in data.chunks(AT_ONCE):
        index, distance = nearest_neighbours(samples, images)
        closer = distance < best
        best[closer], found[closer] = distance[closer], images[index[closer]]
    return found


def real_images(data: TrainingSet, labels: torch.Tensor | None) -> Images:
    """As many real images as a sheet holds, of the classes that the samples were asked for."""
    if labels is None or data.labels is None:
        return data.pick(torch.arange(GRID) % data.n)
    of_class = [torch.nonzero(data.labels == c).flatten() for c in range(data.classes)]
    rows = [of_class[c][(i // data.classes) % len(of_class[c])] for i, c in enumerate(labels.tolist())]
    return data.pick(torch.stack(rows))
