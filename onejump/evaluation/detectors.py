"""A detector by its name, with its weights found in local files."""

from pathlib import Path

import torch

from onejump.evaluation import foundation, inception_weights, resnet56
from onejump.evaluation.features import Detector, DigitsDetector, PixelDetector
from onejump.evaluation.foundation import CLIPDetector, DINOv2Detector
from onejump.evaluation.inception import InceptionDetector
from onejump.evaluation.resnet56 import ResNet56Detector
from onejump.evaluation.weight_files import find
from onejump.types import UserError

INCEPTION_TAPS = ("2048", "768", "192", "64")
NAMES = (*(f"inception-{tap}" for tap in INCEPTION_TAPS), "resnet56", "dinov2", "clip", "digits", "pixels")
INCEPTION = f"{inception_weights.PYTORCH_FID}; {inception_weights.STYLEGAN.name} will do as well"


def detector_named(name: str, weights: Path | None = None, device: torch.device | str = "cpu") -> Detector:
    """One of NAMES, its weights read, so that nothing is missing hours later.

    weights: the file, for DINOv2 and CLIP the folder, or a folder that has it under its usual name. None: the folder
    $ONEJUMP_DETECTORS, or ~/.cache/onejump/detectors. Nothing is downloaded. Raises UserError for another name, and for
    missing (it says what to fetch, and from where), damaged or foreign weights.
    """
    if name not in NAMES:
        raise UserError(f"detector: {name!r}; choose one of {', '.join(NAMES)}")
    if name in ("digits", "pixels"):
        if weights:
            raise UserError(f"detector {name} needs no weights, but {weights} is given: leave it out, or name another")
        return DigitsDetector(device) if name == "digits" else PixelDetector()
    return _read(name, weights, device)


def _read(name: str, weights: Path | None, device: torch.device | str) -> Detector:
    detector: InceptionDetector | ResNet56Detector | DINOv2Detector | CLIPDetector
    if name == "resnet56":
        detector = ResNet56Detector(find(name, weights, (resnet56.PUBLISHED.name,), str(resnet56.PUBLISHED)), device)
    elif name == "dinov2":
        detector = DINOv2Detector(_folder(name, weights, (foundation.DINOV2_FOLDER,), foundation.DINOV2), device)
    elif name == "clip":
        detector = CLIPDetector(_folder(name, weights, foundation.CLIP_FOLDERS, foundation.CLIP), device)
    else:
        path = find(name, weights, inception_weights.FILE_NAMES, INCEPTION)
        detector = InceptionDetector(path, name.removeprefix("inception-"), device)
    detector.check()
    return detector


def _folder(name: str, given: Path | None, names: tuple[str, ...], about: str) -> Path:
    """`given` itself if it holds a model, else as `find`."""
    if given and (given / "config.json").is_file():
        return given
    return find(name, given, names, about, "FOLDER")
