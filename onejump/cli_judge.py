"""What models are judged by: in a run on the way and at its end, and by `evaluate`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from onejump.data.training_set import TrainingSet
    from onejump.distributed import Team
    from onejump.evaluation.features import Detector
    from onejump.judge import Judge


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--detector", metavar="NAME", help="inception-2048, dinov2, ... (default: digits or pixels)")
    made.add_argument("--weights", type=Path, metavar="PATH", help="the detector's file or folder")


def check_options(args: argparse.Namespace) -> None:
    from onejump.types import UserError

    if args.weights is not None and args.detector is None:
        raise UserError(f"--weights {args.weights}: of which detector? Give --detector too, or leave them out")


def detector_of(args: argparse.Namespace, out: Path, device: "torch.device") -> "Detector | None":
    """The one asked for, else the one that the run has begun with, which then stands in args; None: the usual one."""
    from onejump.evaluation.detectors import detector_named
    from onejump.run_record import detector_begun
    from onejump.types import UserError

    check_options(args)
    if args.detector is not None:
        return detector_named(args.detector, args.weights, device)
    known = detector_begun(out)
    if not known.get("asked"):
        return None
    there = known["weights"] is not None and Path(known["weights"]).exists()
    args.detector, args.weights = known["asked"], Path(known["weights"]) if there else None
    try:
        return detector_named(args.detector, args.weights, device)
    except UserError as error:
        raise UserError(f"{out} is judged by --detector {args.detector}: {error}") from error


def judge_of(args: argparse.Namespace, data: "TrainingSet", detector: "Detector | None", team: "Team") -> "Judge":
    """Of a run, from its start to its end. Raises UserError for a detector that cannot see the images."""
    import torch

    from onejump.data.latents import LatentSet
    from onejump.data.text_set import TextSet
    from onejump.judge import Judge, detector_for
    from onejump.types import UserError

    if detector is None:
        return Judge(data, detector_for(data))
    if isinstance(data, LatentSet | TextSet):
        way_out = f"leave it out, and then: onejump evaluate MODEL --detector {args.detector}"
        raise UserError(f"--detector {args.detector}: latents are not judged while training; {way_out}")
    detector(torch.zeros(1, *data.shape, dtype=torch.uint8))
    return Judge(data, detector, show=team.first)
