"""What a detector reads off images, the same to the bit however the work is shared out."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from onejump.evaluation.digits_classifier import load_digits_classifier
from onejump.evaluation.features import Detector, DigitsDetector
from onejump.evaluation.inception import InceptionDetector
from onejump.types import Features, Images, UserError

FEATURES, PROBABILITIES, SPATIAL = KINDS = ("features", "probabilities", "spatial")
CHUNK = 64  # images that a detector sees at once
Item, Result = TypeVar("Item"), TypeVar("Result")


def one_core_each(work: Callable[[Item], Result], items: Sequence[Item], most: int | None = None) -> list[Result]:
    """[work(item) for item in items], each by one thread, as many at once as torch has threads (`most` at the most).

    How torch shares one operation out among threads changes how it rounds; here no operation is shared. Each item must
    be independent of the others. The number of torch's threads is afterwards what it was.
    """
    threads = torch.get_num_threads()
    at_once = min(threads, len(items), most or threads)
    try:
        torch.set_num_threads(1)
        if at_once <= 1:
            return [work(item) for item in items]
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)


@runtime_checkable
class Classifier(Protocol):
    """A detector that also tells classes."""

    def logits(self, images: Images) -> Features: ...


@dataclass(frozen=True)
class Reader:
    """Reads the kinds asked for off images: float on the CPU, a row an image.

    features: the detector's. probabilities: of its classes, float32 (inception score). spatial: Inception's, for sFID.
    A row depends on the images of its own call alone, in chunks from the first on, and not on the number of threads.
    Raises UserError at once for a kind that the detector does not have.
    """

    detector: Detector
    kinds: tuple[str, ...] = (FEATURES,)

    def __post_init__(self) -> None:
        name = self.detector.name
        if SPATIAL in self.kinds and not isinstance(self.detector, InceptionDetector):
            raise UserError(f"sfid: the detector {name} has no spatial features; use --detector inception-2048")
        if PROBABILITIES in self.kinds and not isinstance(self.detector, Classifier | DigitsDetector):
            raise UserError(f"is: the detector {name} tells no classes; use --detector inception-2048")
        if isinstance(self.detector, InceptionDetector):
            self.detector.check(*self._taps.values())

    @property
    def _taps(self) -> dict[str, str]:
        assert isinstance(self.detector, InceptionDetector)
        taps = {FEATURES: str(self.detector.tap), PROBABILITIES: "logits", SPATIAL: "spatial"}
        return {kind: taps[kind] for kind in self.kinds}

    def on(self, device: torch.device | str) -> "Reader":
        """The same on another device, for a detector that has one."""
        if self.device is None:
            return self
        return replace(self, detector=replace(self.detector, device=device))  # type: ignore[type-var]

    @property
    def device(self) -> torch.device | str | None:
        """Where the detector calculates; None for one that has no choice."""
        return getattr(self.detector, "device", None)

    def __call__(self, images: Images) -> dict[str, Tensor]:
        chunks = images.split(CHUNK)
        on_cpu = torch.device(self.device or "cpu").type == "cpu"
        found = one_core_each(self._chunk, chunks) if on_cpu else [self._chunk(chunk) for chunk in chunks]
        return {kind: torch.cat([part[kind] for part in found]).cpu() for kind in self.kinds}

    def _chunk(self, images: Images) -> dict[str, Tensor]:
        if isinstance(self.detector, InceptionDetector):
            taps = self._taps
            read = self.detector.measure(images, tuple(taps.values()))
            found = {kind: read[tap] for kind, tap in taps.items()}
            if PROBABILITIES in found:
                found[PROBABILITIES] = found[PROBABILITIES].double().softmax(1).float()
            return found
        found = {FEATURES: self.detector(images)}
        if PROBABILITIES in self.kinds:
            found[PROBABILITIES] = self._probabilities(images)
        return found

    def _probabilities(self, images: Images) -> Tensor:
        if isinstance(self.detector, Classifier):
            return self.detector.logits(images).double().softmax(1).float()
        assert isinstance(self.detector, DigitsDetector)
        return load_digits_classifier(self.detector.device).probabilities(images)
