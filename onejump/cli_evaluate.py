"""The command that says how good a model's samples, or given images, are."""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onejump import cli_judge
from onejump.cli_input import check_seed, device_of, images_of, numbers_of
from onejump.cli_results import finish, refuse_over
from onejump.cli_sampling import STEPS, add_guidance, add_sampling, asked_sampler, guided_as_asked
from onejump.cli_text import add_prompts, null_of, number_of, prompts_of

if TYPE_CHECKING:
    import torch

    from onejump.data.image_set import ImageSet
    from onejump.data.training_set import TrainingSet
    from onejump.evaluate import How
    from onejump.judge import Judge
    from onejump.prompts import Prompts
    from onejump.samplers import Sampler
    from onejump.saved import SavedModel

Work = Callable[[], None]
MODEL_ONLY = (  # nothing for --images
    *("steps", "times", "gamma", "jumps", "solver", "seed", "block", "rounding", "denoise", "search-times"),
    *("prompts", "stable-diffusion", "clip", "guidance", "guide"),
)
USUAL = {"n": 2000, "seed": 1234, "rounding": "round", "guidance": 1.0}  # of a model
EPILOG = """metrics, separated by commas (default: fid,kid):
  fid          Frechet distance (FID with an Inception detector), always there
  kid          kernel distance; kid-subsets: its mean over 100 subsets of 1,000
  is           inception score; needs a detector that tells classes
  pr, dc       precision and recall; density and coverage
  sfid         Frechet distance of Inception's spatial features
  dfid         denoising FID, by noise level
  per-class    Frechet distance within each class

The numbers do not depend on --processes or on threads. With --out, an evaluation that was stopped goes on when the same
command is given again. The record of another evaluation is never replaced."""


def add_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    made = add("evaluate", evaluate_command, "Frechet distance and the rest, as a table or as JSON", EPILOG)
    made.add_argument("model", nargs="?", help="a model's folder, or a run's (its last stage)")
    made.add_argument("--images", metavar="PATH", help="evaluate these images instead of a model's")
    made.add_argument("--data", metavar="PATH", help="folder or zip of real images (default: digits)")
    made.add_argument("--size", type=int, metavar="N", help="crop and resize them to N x N")
    made.add_argument("--reference", type=Path, metavar="FILE", help="compare with published statistics, an .npz file")
    cli_judge.add_options(made)
    made.add_argument("--metrics", metavar="A,B", help="see below")
    made.add_argument("--steps", metavar="N,N", help=STEPS.format("1,2"))
    add_sampling(made)
    add_prompts(made, scored=True)
    add_guidance(made)
    made.set_defaults(guidance=None)  # to tell whether it was given
    made.add_argument("--n", type=int, help="samples for each (default: 2000), or the first of --images (default: all)")
    made.add_argument("--seed", type=int, help="(default: 1234)")
    made.add_argument("--block", type=int, metavar="N", help="images of a network call (default: 8; on a GPU 64)")
    made.add_argument("--rounding", metavar="HOW", help="to bytes: round or truncate (default: round)")
    made.add_argument("--denoise", metavar="T,T", help="noise levels of dfid (default: 1,2,3,4)")
    made.add_argument("--processes", type=int, default=1, metavar="N", help="work in N processes (default: 1)")
    made.add_argument("--search-times", type=int, metavar="K", help="find the best times of 2 to K steps")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the whole record there, as JSON")
    made.add_argument("--json", action="store_true", help="print the whole record instead of the table")
    made.add_argument("--device", help="cpu, cuda, ...")


def evaluate_command(args: argparse.Namespace) -> Work:
    from onejump.types import UserError

    check_options(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and (args.processes > 1 or args.out is None):
        raise UserError("--out: processes started from outside (WORLD_SIZE) meet beside this file; without --processes")
    local = args.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if world > 1 and gpus() else None)
    device = device_of(local)
    if args.images is not None:
        return of_images(args, device)
    for name, usual in USUAL.items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    task = task_of(args, device)
    return lambda: of_model(args, task, rank, world)


def check_options(args: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    from onejump.generate import check_rounding
    from onejump.types import UserError

    metrics = (args.metrics or "").split(",")
    if args.model is not None and args.images is not None:
        raise UserError(f"{args.model} and --images: not both; give a model, or the images to evaluate")
    if args.model is None and args.images is None:
        raise UserError("evaluate: give a model, or --images with the images to evaluate")
    given = [f"--{name}" for name in MODEL_ONLY if getattr(args, name.replace("-", "_")) is not None]
    if args.images is not None and (given or "dfid" in metrics):
        raise UserError(f"--images: {given[0] if given else 'dfid'} is for a model; leave it out, or give one")
    if args.n is not None and args.n < 2:
        raise UserError(f"--n {args.n}: a distance needs at least 2 samples")
    for name in ("processes", "block"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: 1 or more")
    check_seed(args.seed or 0)
    check_rounding(args.rounding or "round")
    cli_judge.check_options(args)
    if args.reference is not None and args.data is None and args.size is not None:
        raise UserError(f"--size {args.size}: for the images of --data, and there are none; leave it out")
    if args.denoise is not None and "dfid" not in metrics:
        raise UserError("--denoise: the noise levels of dfid; add it to --metrics, or leave them out")
    if args.search_times is not None and args.times is not None:
        raise UserError("--search-times and --times: give one of them")
    if args.out is not None and args.out.is_dir():
        raise UserError(f"--out {args.out}: this is a folder; name a file in it, such as {args.out / 'record.json'}")


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True)
class Task:
    """What to evaluate, checked. question: all that the numbers depend on."""

    saved: "SavedModel"
    judge: "Judge"
    steps: list[int]
    n: int
    how: "How"
    question: dict[str, Any]


def task_of(args: argparse.Namespace, device: "torch.device") -> Task:
    """The model, the real images and the numbers of steps, all of which fit each other."""
    from onejump.evaluate import DENOISE, How, question_of
    from onejump.generate import block_on
    from onejump.guidance import guided_sha256
    from onejump.importers.stable_diffusion import open_model, open_sha256

    saved = open_model(args.model)
    saved.model.to(device)
    saved = guided_as_asked(args, args.model, saved, null_of(args, saved, device))
    prompts = prompts_of(args, saved, device)
    shape = prompts.image_shape(saved) if prompts else saved.shape
    judge = judge_of(args, shape, device)
    check_shape(args, judge, shape, "the model makes")
    sampler, steps = sampler_of(args, saved)
    check_extras(args, saved, judge, prompts)
    n = number_of(args, prompts)
    denoise = DENOISE if args.denoise is None else tuple(numbers_of("--denoise", args.denoise, float))
    identity = guided_sha256(open_sha256(Path(args.model)), args.guidance, args.guide)
    how = How(
        args.block or block_on(device), args.rounding, denoise, identity=identity, sampler=sampler, prompts=prompts
    )
    question = question_of(judge, how, {"steps": steps, "n": n, "seed": args.seed, "search_times": args.search_times})
    refuse_over(args.out, question)
    return Task(saved, judge, steps, n, how, question)


def check_shape(args: argparse.Namespace, judge: "Judge", shape: tuple[int, ...], whose: str) -> None:
    from onejump.types import UserError

    if judge.data.shape == shape:
        return
    real, made = ("x".join(map(str, sides)) for sides in (judge.data.shape, shape))
    if args.data is None:
        raise UserError(f"--data: not given, so the real images are the digits, {real}; {whose} {made}: give --data")
    raise UserError(f"--data: the images are {real}, {whose} {made}; see --size")


def sampler_of(args: argparse.Namespace, saved: "SavedModel") -> "tuple[Sampler, list[int]]":
    """The sampler asked for, and numbers of steps that it can do."""
    from onejump.samplers import ODE, Jumps, Multistep, refuse_below
    from onejump.saved import usual_steps
    from onejump.types import UserError

    given = [f"--{name}" for name in ("times", "gamma", "jumps", "solver") if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")
    sampler = asked_sampler(args, saved)
    default = str(usual_steps(sampler)) if isinstance(sampler, ODE | Jumps) else "1,2"
    if args.times and isinstance(sampler, Multistep):
        default = str(sampler.max_steps)
    steps = numbers_of("--steps", args.steps or default, int)
    for k in steps:
        times = sampler.times(k)
        if isinstance(sampler, Multistep):
            refuse_below(saved.model.t_min, times)
    return sampler, steps


def check_extras(args: argparse.Namespace, saved: "SavedModel", judge: "Judge", prompts: "Prompts | None") -> None:
    """Before hours of work: what metrics by class, dfid and --search-times would refuse."""
    from onejump.evaluate import check_classes
    from onejump.samplers import Multistep
    from onejump.types import UserError

    if prompts and (args.search_times is not None or "dfid" in judge.metrics):
        raise UserError("--search-times, dfid: not for text-to-image models; leave them out")
    check_classes(judge, saved.class_names)
    if args.denoise is not None:
        lowest = min(numbers_of("--denoise", args.denoise, float))
        if lowest < saved.model.t_min:
            raise UserError(
                f"--denoise: {lowest:g} is below t' = {saved.model.t_min:g}, where this model was never trained"
            )
    if args.search_times is not None:
        if not isinstance(saved.sampler, Multistep):
            raise UserError("--search-times: only consistency models have mid times; this is none")
        if args.search_times not in (2, 3, 4):
            raise UserError(f"--search-times {args.search_times}: 2, 3 or 4 steps")


def judge_of(args: argparse.Namespace, shape: tuple[int, int, int], device: "torch.device") -> "Judge":
    """Real images, or published statistics alone where --reference is given without --data."""
    import torch

    from onejump.data.image_set import ImageSet
    from onejump.data.latents import LatentSet
    from onejump.evaluation.detectors import detector_named
    from onejump.judge import Judge, detector_for
    from onejump.reference import published_reference
    from onejump.types import UserError

    given = None if args.reference is None else published_reference(args.reference)
    data: TrainingSet
    if given and args.data is None:
        data, default = ImageSet(args.reference.name, torch.zeros(0, *shape, dtype=torch.uint8)), "fid"
    else:
        data, default = images_of(args), "fid,kid"
    if isinstance(data, LatentSet):
        raise UserError(f"--data {args.data}: latents, which no detector can see; give the images themselves")
    metrics = tuple((args.metrics or default).split(","))
    detector = detector_named(args.detector, args.weights, device) if args.detector else detector_for(data)
    return Judge(data, detector, metrics, given, show=os.environ.get("RANK", "0") == "0")


def of_model(args: argparse.Namespace, task: Task, rank: int, world: int) -> None:
    from dataclasses import replace

    from onejump.evaluate import evaluate
    from onejump.parts import Workers, workers_beside
    from onejump.search_times import search_times

    began = time.monotonic()
    saved, judge = task.saved, task.judge
    with workers_beside(args.out, args.processes, rank, world) as workers:
        found = evaluate(judge, saved, task.steps, task.n, args.seed, how=replace(task.how, workers=workers))
        if rank:
            return
        about = {"model": str(args.model), "model_sha256": task.how.identity, "provenance": saved.provenance}
        if args.guidance != 1:
            about["guidance"] = {"scale": args.guidance, "guide": args.guide}
        record: dict[str, Any] = about | {"question": task.question, "reference": judge.reference, **found}
        if args.search_times is not None:
            ours = workers if world == 1 else Workers(workers.folder)  # of processes from outside, the first alone
            how = replace(task.how, workers=ours)
            record["search"] = search_times(judge, saved, args.search_times, args.n, args.seed, how=how)
        device = next(saved.model.parameters()).device
        finish(args, record, str(saved.provenance.get("stage", "model")), device, began)


def of_images(args: argparse.Namespace, device: "torch.device") -> Work:
    from onejump.data.load import load_images
    from onejump.evaluate import check_classes, evaluate_images, question_of
    from onejump.judge import same_classes
    from onejump.parts import workers_beside
    from onejump.types import UserError

    images: ImageSet = load_images(args.images)
    n = images.n if args.n is None else args.n
    if n > images.n or images.n < 2:
        raise UserError(f"--images {args.images}: {images.n} of them; {n if args.n else 'at least 2'} are needed")
    judge = judge_of(args, images.shape, device)
    check_shape(args, judge, images.shape, "those of --images are")
    check_classes(judge, images.class_names)
    labels = images.labels if same_classes(images.class_names, judge.data.class_names) else None
    question = question_of(judge, None, {"images": images.fingerprint, "n": n})
    refuse_over(args.out, question)

    def work() -> None:
        began = time.monotonic()
        with workers_beside(args.out, args.processes) as workers:
            found = evaluate_images(judge, images.images[:n], None if labels is None else labels[:n], workers)
            about = {"images": str(args.images), "fingerprint": images.fingerprint, "question": question}
            record = about | {"reference": judge.reference, "steps": {"-": found | {"nfe": 0}}}
            finish(args, record, images.name, device, began)

    return work
