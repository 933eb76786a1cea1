"""What samples are compared with: statistics of real images, measured once and kept, or published ones from a file."""

import hashlib
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onejump.data.training_set import TrainingSet
from onejump.evaluation.reading import FEATURES, SPATIAL, Reader
from onejump.evaluation.statistics import GaussianStatistics, Moments, frechet_distance
from onejump.tensor_file import open_tensors, write_tensors
from onejump.types import Features, UserError

SAMPLE = 10_000  # real images at most whose features are kept, for the metrics that look at pairs
NEAREST = 1000  # samples at most whose nearest training images are looked up
CHUNK = 512  # images measured at once
VERSION = 1  # of what a file holds, and of how detectors calculate; one of another version is measured again
KEEP_FROM = 5.0  # seconds that measuring must take to be worth a file
Tell = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images as a detector sees them. half: the distance of a random half of them from the other half.

    sample: features of up to 10,000 of them, in the set's order (all, if there are no more); None from a file.
    """

    statistics: GaussianStatistics
    half: float | None = None
    sample: Features | None = None
    spatial: GaussianStatistics | None = None
    of_class: tuple[GaussianStatistics | None, ...] = ()  # None for a class of fewer than 2 images
    file_sha256: str | None = None  # of a published file


def cache_folder() -> Path:
    """$ONEJUMP_CACHE, or ~/.cache/onejump."""
    return Path(os.environ.get("ONEJUMP_CACHE") or Path.home() / ".cache" / "onejump")


def reference_of(
    data: TrainingSet,
    reader: Reader,
    by_class: bool = False,
    cache: Path | None = None,
    tell: Tell | None = None,
    keep_from: float = KEEP_FROM,
) -> Reference:
    """Measured, or found in the cache under the content of the images and the hash of the detector.

    A file that is damaged, or of something else, is measured again, which is said. It is kept if measuring took
    `keep_from` seconds. Raises UserError for fewer than 2 images, and for latents, which a detector cannot see.
    """
    about = {"fingerprint": data.fingerprint, "detector": reader.detector.name, "sha256": reader.detector.hash}
    about |= {"version": str(VERSION)}
    path = cache and cache / "reference" / f"{about['fingerprint'][:20]}-{about['sha256'][:20]}.safetensors"
    wanted = [name for name, asked in (("spatial.mean", SPATIAL in reader.kinds), ("class.mean", by_class)) if asked]
    found = read_checked(path, about) if path else None
    if found and all(name in found for name in wanted):
        return _unpacked(found)
    if found:  # what it holds is measured with what it lacks, so that the new file has both
        by_class = by_class or "class.mean" in found
        reader = Reader(reader.detector, (*reader.kinds, *((SPATIAL,) if "spatial.mean" in found else ())))
    began = time.monotonic()
    made = _measured(data, reader, by_class, tell or (lambda done, total: None))
    if path and time.monotonic() - began >= keep_from:
        try:
            write_checked(path, _packed(made), about)
        except OSError as error:
            print(f"{path}: could not write ({error.strerror}); measured again next time", file=sys.stderr)
    return made


def _measured(data: TrainingSet, reader: Reader, by_class: bool, tell: Tell) -> Reference:
    order = torch.randperm(data.n, generator=torch.Generator().manual_seed(0))
    first_half = torch.zeros(data.n, dtype=torch.bool).index_fill_(0, order[: -(-data.n // 2)], True)
    chosen = torch.zeros(data.n, dtype=torch.bool).index_fill_(0, order[:SAMPLE], True)
    reader = Reader(reader.detector, tuple(kind for kind in reader.kinds if kind in (FEATURES, SPATIAL)))
    halves, spatial, sample, done = (Moments(), Moments()), Moments(), [], 0
    classes = [Moments() for _ in range(data.classes if by_class else 0)]
    tell(0, data.n)
    for images, labels in data.chunks(CHUNK):
        if images.dtype != torch.uint8:
            raise UserError(f"{data.name}: latents, which a detector cannot see; give the images themselves")
        here = slice(done, done + len(images))
        read = reader(images)
        _share_out(read[FEATURES], first_half[here].long(), halves)
        if classes and labels is not None:
            _share_out(read[FEATURES], labels, classes)
        if SPATIAL in read:
            spatial.add(read[SPATIAL])
        sample.append(read[FEATURES][chosen[here]])
        done += len(images)
        tell(done, data.n)
    rest, first = halves
    half = frechet_distance(first.statistics(), rest.statistics()) if rest.n > 1 else None
    first.merge(rest)
    of_class = tuple(moments.statistics() if moments.n > 1 else None for moments in classes)
    return Reference(first.statistics(), half, torch.cat(sample), spatial.statistics() if spatial.n else None, of_class)


def _share_out(features: Tensor, groups: Tensor, to: Sequence[Moments]) -> None:
    """Adds each row to the moments of its group."""
    for group in groups.unique().tolist():
        to[group].add(features[groups == group])


def _packed(reference: Reference) -> dict[str, Tensor]:
    assert reference.sample is not None
    half = math.nan if reference.half is None else reference.half
    tensors = {"sample": reference.sample, "half": torch.tensor(half, dtype=torch.float64)}
    tensors |= _stacked("features", [reference.statistics])
    tensors |= _stacked("spatial", [reference.spatial]) if reference.spatial else {}
    return tensors | (_stacked("class", reference.of_class) if any(reference.of_class) else {})


def _stacked(name: str, found: Sequence[GaussianStatistics | None]) -> dict[str, Tensor]:
    """One behind the other; n = 0 for what is not there."""
    some = next(one for one in found if one)
    nothing = GaussianStatistics(torch.zeros_like(some.mean), torch.zeros_like(some.covariance), 0)
    all_of = [one or nothing for one in found]
    return {
        f"{name}.mean": torch.stack([one.mean for one in all_of]),
        f"{name}.covariance": torch.stack([one.covariance for one in all_of]),
        f"{name}.n": torch.tensor([one.n for one in all_of]),
    }


def _unstacked(name: str, tensors: Mapping[str, Tensor]) -> list[GaussianStatistics | None]:
    if f"{name}.n" not in tensors:
        return []
    means, covariances, counts = (tensors[f"{name}.{part}"] for part in ("mean", "covariance", "n"))
    every = zip(means, covariances, counts.tolist(), strict=True)
    return [GaussianStatistics(mean, covariance, n) if n else None for mean, covariance, n in every]


def _unpacked(tensors: Mapping[str, Tensor]) -> Reference:
    half, (statistics,) = tensors["half"].item(), _unstacked("features", tensors)
    assert statistics is not None
    spatial = (*_unstacked("spatial", tensors), None)[0]
    of_class = tuple(_unstacked("class", tensors))
    return Reference(statistics, None if math.isnan(half) else half, tensors["sample"], spatial, of_class)


def published_reference(path: Path) -> Reference:
    """Statistics from an .npz file: mu and sigma (EDM, StyleGAN), and mu_s and sigma_s for sFID (guided-diffusion).

    Other arrays are left alone, and pickles refused. Raises UserError for a file that holds no such statistics.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in ("mu", "sigma", "mu_s", "sigma_s") if name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else "not readable as .npz"
        raise UserError(f"--reference {path}: {why}; a file with arrays mu and sigma is needed") from error
    found = {}
    for name, end in (("features", ""), ("spatial", "_s")):
        if f"mu{end}" in arrays and f"sigma{end}" in arrays:
            found[name] = _gaussian(path, arrays[f"mu{end}"], arrays[f"sigma{end}"])
    if "features" not in found:
        raise UserError(f"--reference {path}: no arrays mu and sigma; is it a file of images? Give those to --data")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Reference(found["features"], spatial=found.get("spatial"), file_sha256=digest)


def _gaussian(path: Path, mu: np.ndarray, sigma: np.ndarray) -> GaussianStatistics:
    numbers = all(np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all() for array in (mu, sigma))
    if not numbers or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(
            f"--reference {path}: mu {mu.shape} and sigma {sigma.shape}; a finite mean and covariance are needed"
        )
    if not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * float(np.abs(sigma).max())):
        raise UserError(f"--reference {path}: sigma is not symmetric, so it is no covariance; fetch the file anew")
    covariance = torch.from_numpy(sigma.astype(np.float64))
    return GaussianStatistics(torch.from_numpy(mu.astype(np.float64)), (covariance + covariance.T) / 2, 0)


def write_checked(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """A safetensors file that knows its checksum and what it is about; whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = torch.frombuffer(bytearray(json.dumps(about, sort_keys=True).encode()), dtype=torch.uint8)
    write_tensors(path, {**tensors, "about": text}, lambda digest: {"sha256": digest})


def read_checked(path: Path, about: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors; None where there is no file, or one that is damaged or about something else, which is said."""
    try:
        file = open_tensors(path)
        tensors, digest = file.load(file.plain)
        known = bytes(tensors.pop("about").numpy().tobytes()).decode()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, UserError) as error:
        print(f"{path}: damaged ({error}), is made again", file=sys.stderr)
        return None
    if file.metadata.get("sha256") != digest or known != json.dumps(about, sort_keys=True):
        why = "damaged (its checksum is another)" if file.metadata.get("sha256") != digest else "about something else"
        print(f"{path}: {why}, is made again", file=sys.stderr)
        return None
    return tensors
