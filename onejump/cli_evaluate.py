"""The command that says how good a model's samples, or given images, are."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onejump.cli_input import check_seed, device_of, images_of, numbers_of
from onejump.cli_sampling import STEPS, add_sampling, asked_sampler

if TYPE_CHECKING:
    import torch

    from onejump.data.image_set import ImageSet
    from onejump.data.training_set import TrainingSet
    from onejump.judge import Judge
    from onejump.parts import Workers
    from onejump.samplers import Sampler
    from onejump.saved import SavedModel

Work = Callable[[], None]
EPILOG = """metrics, separated by commas (default: fid,kid):
  fid          Frechet distance (FID with an Inception detector), always there
  kid          kernel distance; kid-subsets: its mean over 100 subsets of 1,000
  is           inception score; needs a detector that tells classes
  pr, dc       precision and recall; density and coverage
  sfid         Frechet distance of Inception's spatial features
  dfid         denoising FID, by noise level
  per-class    Frechet distance within each class

The numbers do not depend on --processes or on threads. With --out, an evaluation that was stopped goes on when the same
command is given again."""


def add_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    made = add("evaluate", evaluate_command, "Frechet distance and the rest, as a table or as JSON", EPILOG)
    made.add_argument("model", nargs="?", help="a model's folder, or a run's (its last stage)")
    made.add_argument("--images", metavar="PATH", help="evaluate these images instead of a model's")
    made.add_argument("--data", metavar="PATH", help="folder or zip of real images (default: digits)")
    made.add_argument("--size", type=int, metavar="N", help="crop and resize them to N x N")
    made.add_argument("--reference", type=Path, metavar="FILE", help="compare with published statistics, an .npz file")
    made.add_argument("--detector", metavar="NAME", help="inception-2048, dinov2, ... (default: digits or pixels)")
    made.add_argument("--weights", type=Path, metavar="PATH", help="the detector's file or folder")
    made.add_argument("--metrics", metavar="A,B", help="see below")
    made.add_argument("--steps", metavar="N,N", help=STEPS.format("1,2"))
    add_sampling(made)
    made.add_argument("--n", type=int, default=2000, help="samples for each (default: %(default)s)")
    made.add_argument("--seed", type=int, default=1234, help="(default: %(default)s)")
    made.add_argument("--block", type=int, metavar="N", help="images of a network call (default: 8; on a GPU 64)")
    made.add_argument("--rounding", choices=("round", "truncate"), default="round", help="to bytes (default: round)")
    made.add_argument("--denoise", metavar="T,T", help="noise levels of dfid (default: 1,2,3,4)")
    made.add_argument("--processes", type=int, default=1, metavar="N", help="work in N processes (default: 1)")
    made.add_argument("--search-times", type=int, metavar="K", help="find the best times of 2 to K steps")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the whole record there, as JSON")
    made.add_argument("--json", action="store_true", help="print the whole record instead of the table")
    made.add_argument("--device", help="cpu, cuda, ...")


def evaluate_command(args: argparse.Namespace) -> Work:
    from onejump.types import UserError

    if (args.model is None) == (args.images is None):
        raise UserError("evaluate: give a model, or --images with the images to evaluate")
    if args.n < 2:
        raise UserError(f"--n {args.n}: a distance needs at least 2 samples")
    for name in ("processes", "block"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: 1 or more")
    check_seed(args.seed)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and (args.processes > 1 or args.out is None):
        raise UserError("--out: processes started from outside (WORLD_SIZE) meet beside this file; without --processes")
    local = args.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if world > 1 and gpus() else None)
    device = device_of(local)
    if args.images is not None:
        return of_images(args, device)
    task = task_of(args, device)
    return lambda: of_model(args, task, rank, world)


def gpus() -> int:
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True)
class Task:
    """What to evaluate, checked."""

    saved: "SavedModel"
    judge: "Judge"
    sampler: "Sampler"
    steps: list[int]
    device: "torch.device"


def task_of(args: argparse.Namespace, device: "torch.device") -> Task:
    """The model, the real images and the numbers of steps, all of which fit each other."""
    from onejump.saved import load_model
    from onejump.types import UserError

    saved = load_model(args.model)
    judge = judge_of(args, saved.shape, device)
    if judge.data.shape != saved.shape:
        real, made = ("x".join(map(str, shape)) for shape in (judge.data.shape, saved.shape))
        raise UserError(f"--data: the images are {real}, the model makes {made}; see --size")
    saved.model.to(device)
    task = Task(saved, judge, *sampler_of(args, saved), device)
    check_extras(args, task)
    return task


def sampler_of(args: argparse.Namespace, saved: "SavedModel") -> "tuple[Sampler, list[int]]":
    """The sampler asked for, and numbers of steps that it can do."""
    from onejump.samplers import ODE, Jumps, Multistep, refuse_below
    from onejump.types import UserError

    given = [f"--{name}" for name in ("times", "gamma", "jumps", "solver") if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")
    sampler = asked_sampler(args, saved)
    default = (
        str(sampler.steps)
        if isinstance(sampler, ODE)
        else str(len(sampler.start))
        if isinstance(sampler, Jumps)
        else "1,2"
    )
    if args.times and isinstance(sampler, Multistep):
        default = str(sampler.max_steps)
    steps = numbers_of("--steps", args.steps or default, int)
    for k in steps:
        times = sampler.times(k)
        if isinstance(sampler, Multistep):
            refuse_below(saved.model.t_min, times)
    return sampler, steps


def check_extras(args: argparse.Namespace, task: Task) -> None:
    """Before hours of work: what dfid and --search-times would refuse."""
    from onejump.samplers import Multistep
    from onejump.types import UserError

    saved, data = task.saved, task.judge.data
    if "dfid" in task.judge.metrics and saved.class_names and saved.class_names != data.class_names:
        raise UserError("--metrics: dfid denoises the images as the classes they are; the model knows other classes")
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
    from onejump.evaluation.detectors import detector_named
    from onejump.judge import Judge, detector_for
    from onejump.reference import published_reference

    given = None if args.reference is None else published_reference(args.reference)
    data: TrainingSet
    if given and args.data is None:
        data, default = ImageSet(args.reference.name, torch.zeros(0, *shape, dtype=torch.uint8)), "fid"
    else:
        data, default = images_of(args), "fid,kid"
    metrics = tuple((args.metrics or default).split(","))
    detector = detector_named(args.detector, args.weights, device) if args.detector else detector_for(data)
    return Judge(data, detector, metrics, given, show=os.environ.get("RANK", "0") == "0")


@contextmanager
def workers_of(args: argparse.Namespace, rank: int = 0, world: int = 1) -> "Iterator[Workers]":
    """Parts lie beside --out, for the next attempt; else, if several processes have to meet, in a temporary folder."""
    import shutil
    import tempfile

    from onejump.parts import Workers

    if args.out is None and args.processes == 1:
        yield Workers()
    elif args.out is None:
        with tempfile.TemporaryDirectory(prefix="onejump-") as folder:
            yield Workers(Path(folder), args.processes)
    else:
        folder = args.out.with_name(f"{args.out.name}.parts")
        try:
            yield Workers(folder, args.processes, rank, world)
        except KeyboardInterrupt:
            print(f"\nThe parts done are kept in {folder}; the same command goes on from them", file=sys.stderr)
            raise
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def of_model(args: argparse.Namespace, task: Task, rank: int, world: int) -> None:
    from onejump.evaluate import DENOISE, How, evaluate
    from onejump.saved import model_sha256
    from onejump.search_times import search_times

    began = time.monotonic()
    saved, judge, identity = task.saved, task.judge, model_sha256(Path(args.model))
    denoise = DENOISE if args.denoise is None else tuple(numbers_of("--denoise", args.denoise, float))
    with workers_of(args, rank, world) as workers:
        how = How(args.block, args.rounding, denoise, workers, identity, task.sampler)
        found = evaluate(judge, saved, task.steps, args.n, args.seed, how=how)
        if rank:
            return
        record: dict[str, Any] = {"model": str(args.model), "model_sha256": identity, "provenance": saved.provenance}
        record |= {"reference": judge.reference, **found}
        if args.search_times is not None:
            alone = How(args.block, args.rounding, denoise, identity=identity)
            record["search"] = search_times(judge, saved, args.search_times, args.n, args.seed, how=alone)
        finish(args, record, str(saved.provenance.get("stage", "model")), task.device, began)


def of_images(args: argparse.Namespace, device: "torch.device") -> Work:
    from onejump.data.load import load_images
    from onejump.types import UserError

    images: ImageSet = load_images(args.images)
    if images.n < 2:
        raise UserError(f"--images {args.images}: {images.n} image; a distance needs at least 2")
    judge = judge_of(args, images.shape, device)
    if judge.data.shape != images.shape:
        real, made = ("x".join(map(str, shape)) for shape in (judge.data.shape, images.shape))
        raise UserError(f"--images: they are {made}, the real images {real}; see --size")
    if "dfid" in judge.metrics or args.search_times:
        raise UserError("--images: dfid and --search-times need a model")
    labels = images.labels if images.class_names and images.class_names == judge.data.class_names else None

    def work() -> None:
        from onejump.evaluate import evaluate_images

        began = time.monotonic()
        with workers_of(args) as workers:
            found = evaluate_images(judge, images.images, labels, workers)
            about = {"images": str(args.images), "fingerprint": images.fingerprint, "reference": judge.reference}
            finish(args, about | {"steps": {"-": found | {"nfe": 0}}}, images.name, device, began)

    return work


def finish(args: argparse.Namespace, record: dict[str, Any], name: str, device: "torch.device", began: float) -> None:
    """Writes the record and tells it."""
    import torch

    from onejump.cli_results import print_results, print_search
    from onejump.run_record import device_name, versions
    from onejump.saved import write_json

    threads = torch.get_num_threads()
    record |= {
        "device": f"{device_name(device)}, {threads} thread{'s' if threads > 1 else ''}",
        "processes": int(os.environ.get("WORLD_SIZE", args.processes)),
        "minutes": round((time.monotonic() - began) / 60, 3),
        "versions": versions(),
    }
    if args.out:
        write_json(args.out, record)
    if args.json:
        print(json.dumps(record, indent=1))
        return
    print_results(record["reference"], {name: record})
    if "search" in record:
        print_search(args.model, record["search"], record["steps"])
