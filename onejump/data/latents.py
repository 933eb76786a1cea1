"""Latents: images that an autoencoder has encoded, as arrays of floats, with or without its uncertainty."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onejump.data.arrays import name_of
from onejump.data.feeder import WORKERS, Feeder, one_by_one, tell
from onejump.data.image_set import Step
from onejump.data.latent_files import LatentFiles, latent_files
from onejump.data.source import shown
from onejump.data.survey import Survey, kept, looked_at
from onejump.types import UserError, beside

SIGMA_DATA = 0.5  # the deviation that training expects of x0
NOTHING = 1e-12  # of the square of a mean: a variance that rounding alone leaves where all numbers are equal


@dataclass(frozen=True)
class LatentScaling:
    """x0 = (z - mean) / std * 0.5, channel by channel, of raw latents z."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not min(self.std, default=0) > 0:
            raise UserError(f"std: {self.std}; one number above 0 for each of the {len(self.mean)} channels is needed")

    def __call__(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (z - self._like(self.mean, z)) * (SIGMA_DATA / self._like(self.std, z))

    def raw(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """What the autoencoder decodes: the inverse."""
        return x0 * (self._like(self.std, x0) / SIGMA_DATA) + self._like(self.mean, x0)

    def _like(self, values: tuple[float, ...], z: Tensor) -> Tensor:
        return torch.tensor(values, dtype=z.dtype, device=z.device)[:, None, None]


# Stable Diffusion's autoencoder (sd-vae-ft-mse) on ImageNet-512, as in EDM2 (Karras et al. 2024).
EDM2_SCALING = LatentScaling((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28))


@dataclass(frozen=True, eq=False)
class LatentSet:
    """Latents on a disk, read as training asks for them. `moments`: they hold a mean and a deviation for each number,
    and every step draws z = mean + deviation * eps afresh from (seed, step)."""

    name: str
    feeder: Feeder
    moments: bool
    scaling: LatentScaling
    fingerprint: str
    labels: Int64[Tensor, " n"] | None = None
    class_names: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return self.feeder.n

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one latent as the network sees it."""
        c, h, w = self.feeder.shape
        return c // 2 if self.moments else c, h, w

    @property
    def classes(self) -> int:
        """Number of classes, 0 if unlabelled."""
        return len(self.class_names)

    def unlabelled(self) -> "LatentSet":
        """The same latents without their labels."""
        return replace(self, labels=None, class_names=())

    def batch(
        self, step: int, batch: int, seed: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, " b"] | None]:
        """Latents of one step as (x0 float32 of deviation 0.5, labels or None); in the order of `ImageSet`."""
        wanted = Step(self.n, step, batch, seed, rank, world)
        stored, index = self.feeder.take(wanted, device)
        z = drawn(stored, wanted) if self.moments else stored
        return self.scaling(z), None if self.labels is None else beside(self.labels[index], z)

    def pick(self, index: Int64[Tensor, " k"]) -> Float[Tensor, "k c h w"]:
        """The latents at these positions, as they lie: raw, with their deviations where they have some."""
        return self.feeder.rows(index)

    def chunks(self, size: int) -> Iterator[tuple[Float[Tensor, "k c h w"], Int64[Tensor, " k"] | None]]:
        """All latents, as they lie, and labels in the set's order, at most `size` at once."""
        for latents, index in self.feeder.chunks(size):
            yield latents, None if self.labels is None else self.labels[index]


def drawn(moments: Float[Tensor, "b c2 h w"], step: Step) -> Float[Tensor, "b c h w"]:
    """z = mean + deviation * eps of means and then deviations; eps is drawn, from (seed, step), for all processes."""
    mean, std = moments.chunk(2, dim=1)
    digest = sha256(f"noise of the latents, seed {step.seed}, step {step.step}".encode()).digest()
    generator = torch.Generator(mean.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    eps = torch.randn(step.batch * step.world, *mean.shape[1:], generator=generator, device=mean.device)
    return mean + std * eps[step.rank :: step.world]


def open_latents(
    path: str | Path,
    scaling: LatentScaling | None = None,
    skip_bad: bool = False,
    workers: int = WORKERS,
    cache: Path | None = None,
) -> LatentSet:
    """A folder or a zip of .npy files, one latent [c, h, w] each, or one .npy file [n, c, h, w], which is mapped.

    Files with "mean-std" in their names, as EDM2's img-mean-std-00000000.npy, hold means and then deviations, [2c, h,
    w]; NAME-mean.npy and NAME-std.npy are one latent together. Labels are those of folders of images: `dataset.json`,
    or one sub-folder a class; of one file, NAME_labels.npy beside it. Without `scaling` it is that of the set itself.
    The fingerprint is over numbers, labels and scaling. Raises UserError for what is missing, damaged, not finite or
    of another shape.
    """
    files = latent_files(Path(path).expanduser())
    survey = kept(files.path, f"latents {skip_bad}", partial(survey_of, files, skip_bad, workers), cache)
    rows = [i for i, name in enumerate(files.names) if name not in survey.bad]
    feeder = Feeder(
        name=str(files.path),
        n=len(rows),
        shape=survey.shape,
        dtype=np.float32,
        make=one_by_one(lambda k: checked(files, rows[k], survey.shape)),
        skip_bad=skip_bad,
        workers=workers,
    )
    labels = None if files.labels is None else torch.tensor(files.labels)[rows]
    if scaling is None and not min(survey.std) > 0:
        k = survey.std.index(min(survey.std))
        raise UserError(f"{path}: channel {k} is {survey.mean[k]:g} throughout, and cannot be scaled; leave it out")
    scaling = scaling or LatentScaling(survey.mean, survey.std)
    fingerprint = sha256(f"{survey.fingerprint} {files.moments} {scaling}".encode()).hexdigest()
    about = (fingerprint, labels, files.class_names)
    found = LatentSet(name_of(files.path), feeder, files.moments, scaling, *about)
    if len(scaling.mean) != found.shape[0]:
        raise UserError(f"{path}: {found.shape[0]} channels, but the scaling has numbers for {len(scaling.mean)}")
    return found


def checked(files: LatentFiles, i: int, shape: tuple[int, ...] | None) -> np.ndarray:
    """Latent i, with UserError if it is not finite or of another shape."""
    latent, where = files.get(i), f"{shown(files.names[i])} in {files.path}"
    if shape is not None and latent.shape != shape:
        raise not_like(files, i, latent.shape, shape)
    if files.moments and len(latent) % 2:
        raise UserError(f"{where} has {len(latent)} channels, where each mean needs a deviation: replace or remove it")
    if not np.isfinite(latent).all():
        raise UserError(f"{where} holds numbers that are not finite: replace or remove it")
    return latent


def not_like(files: LatentFiles, i: int, shape: tuple[int, ...], others: tuple[int, ...] | None) -> UserError:
    told = f"is {list(shape)}, others are {list(others or ())}"
    return UserError(f"{shown(files.names[i])} in {files.path} {told}: replace or remove it")


def survey_of(files: LatentFiles, skip_bad: bool, workers: int) -> Survey:
    """Reads every latent once; the fingerprint is over the numbers as float32, mean and deviation are those of z."""
    tell(f"{files.path}: {len(files.names):,} latents are read once, to know that all can be")
    bad: dict[str, str] = {}
    while (found := _survey(files, bad, skip_bad, workers)) is None:
        pass
    for why in bad.values():
        tell(f"{why}; left out")
    return found


def _survey(files: LatentFiles, bad: dict[str, str], skip_bad: bool, workers: int) -> Survey | None:
    """None, with what was learnt in `bad`, if the pass must start again."""
    rows = [i for i, name in enumerate(files.names) if name not in bad]
    if len(rows) < 2:
        raise UserError(f"{files.path}: {len(rows)} latents can be read; at least 2 are needed")
    known, shape, digest, sums = len(bad), None, sha256(), Sums(files.moments)
    for i, latent in looked_at(lambda i: checked(files, i, None), rows, skip_bad, workers):
        if shape is None and isinstance(latent, np.ndarray):
            shape = latent.shape
            digest.update(str((len(rows), *shape)).encode())
        if isinstance(latent, np.ndarray) and latent.shape != shape:
            latent = not_like(files, i, latent.shape, shape)
            if not skip_bad:
                raise latent
        if isinstance(latent, UserError):
            bad[files.names[i]] = str(latent)
            continue
        digest.update(np.ascontiguousarray(latent).data)
        sums.add(latent)
    if len(bad) > known:
        return None
    if files.labels is not None:
        digest.update(np.array(files.labels, "<i8")[rows].tobytes())
    assert shape is not None
    mean, std = sums.moments()
    return Survey(shape, digest.hexdigest(), bad, mean, std)


class Sums:
    """Mean and deviation of each channel of z, over latents of which each may be a mean and a deviation itself."""

    def __init__(self, moments: bool):
        self.halves, self.n, self.first, self.second = 2 if moments else 1, 0, np.zeros(()), np.zeros(())

    def add(self, latent: np.ndarray) -> None:
        mean, *std = np.split(latent.astype(np.float64), self.halves)
        self.n += mean[0].size
        self.first = self.first + mean.sum((1, 2))
        self.second = self.second + sum((part**2).sum((1, 2)) for part in (mean, *std))

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean = self.first / self.n
        variance = self.second / self.n - mean**2
        std = np.sqrt(np.where(variance > NOTHING * mean**2, variance, 0))
        return tuple(mean.tolist()), tuple(std.tolist())
