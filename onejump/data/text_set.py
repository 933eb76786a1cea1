"""Latents with captions, for text-to-image: images that Stable Diffusion's autoencoder has encoded once.

FOLDER/part-000000.npy         float16 [k, 2c, h, w]: means and deviations of raw latents
FOLDER/part-000000.captions    their captions (`data.captions`)
FOLDER/part-000000.json        the names of these, what was left out, checksums
FOLDER/text.json               what the parts are together; comes last
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onejump.data.arrays import HEADERS
from onejump.data.captions import read_caption
from onejump.data.feeder import WORKERS, Feeder, one_by_one
from onejump.data.image_set import Step
from onejump.data.latents import drawn
from onejump.data.source import DiskError, line
from onejump.data.text_parts import TextEncoder, read_config, text_encoder, text_sha256
from onejump.types import UserError

ABOUT, FORMAT = "text.json", 2


@dataclass(frozen=True, eq=False)
class TextSet:
    """Latents on a disk, read as training asks for them, and the embeddings of their captions.

    Every step draws z = mean + deviation * eps afresh from (seed, step). folder: of the Stable Diffusion whose text
    encoder reads the captions. parts: that folder, and the checksums of its text encoder and autoencoder.
    """

    path: Path
    feeder: Feeder
    starts: tuple[int, ...]  # of the parts, and n
    scaling: float
    fingerprint: str
    folder: Path
    parts: dict[str, str]
    labels: None = None
    class_names: tuple[str, ...] = ()
    _encoders: dict[str, TextEncoder] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def n(self) -> int:
        return self.feeder.n

    @property
    def shape(self) -> tuple[int, int, int]:
        c, h, w = self.feeder.shape
        return c // 2, h, w

    @property
    def classes(self) -> int:
        return 0

    def unlabelled(self) -> "TextSet":
        return self

    def captions(self, index: Int64[Tensor, " b"]) -> list[str]:
        return [self._caption(k) for k in index.tolist()]

    def _caption(self, k: int) -> str:
        part, place = place_of(self.starts, k)
        file = part_file(self.path, part, ".captions")
        return read_caption(file, self.starts[part + 1] - self.starts[part], place)

    def encoder(self, device: torch.device | str) -> TextEncoder:
        """Raises UserError if the text encoder is gone, or another one than when the captions were prepared."""
        key = str(device)
        if key not in self._encoders:  # looked at once, and not at every step
            way_out = "name the folder anew: onejump data prepare SHARDS OUT --vae FOLDER"
            check_encoder(self.path, self.folder, self.parts["text_sha256"], way_out)
            self._encoders[key] = text_encoder(self.folder, torch.device(device))
        return self._encoders[key]

    def batch(
        self, step: int, batch: int, seed: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b tokens width"]]:
        """(scaled latents x0, embeddings of their captions) of one step, float32; in the order of `ImageSet`."""
        wanted = Step(self.n, step, batch, seed, rank, world)
        stored, index = self.feeder.take(wanted, device)
        return drawn(stored.float(), wanted) * self.scaling, self.encoder(device)(self.captions(index))

    def pick(self, index: Int64[Tensor, " k"]) -> Tensor:
        """Means and deviations at these positions, raw."""
        return self.feeder.rows(index)

    def chunks(self, size: int) -> Iterator[tuple[Tensor, None]]:
        """All of them in the set's order, at most `size` at once."""
        for latents, _ in self.feeder.chunks(size):
            yield latents, None


def is_text_set(path: Path) -> bool:
    return (path / ABOUT).is_file()


def open_text_set(path: Path, workers: int = WORKERS) -> TextSet:
    """A folder that `prepare_text` made. Raises UserError if it is damaged; its latents are read when asked for."""
    about = read_config(path / ABOUT)
    try:
        if about["format"] != FORMAT:
            way_out = "prepare the latents again, or use the onejump that made them"
            raise UserError(f"{path}: format {about['format']}, this version reads {FORMAT}; {way_out}")
        starts = tuple(int(start) for start in about["starts"])
        shape, fingerprint = tuple(int(side) for side in about["shape"]), str(about["fingerprint"])
        parts = {name: str(about[name]) for name in ("stable_diffusion", "text_sha256", "vae_sha256")}
        scaling, folder = float(about["scaling"]), Path(parts["stable_diffusion"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path / ABOUT}: damaged ({line(error)}); prepare the latents again") from error
    feeder = Feeder(
        name=str(path),
        n=starts[-1],
        shape=shape,
        dtype=np.float16,
        make=one_by_one(lambda k: latent(path, starts, shape, k)),
        workers=workers,
    )
    return TextSet(path, feeder, starts, scaling, fingerprint, folder, parts)


def place_of(starts: tuple[int, ...], k: int) -> tuple[int, int]:
    """The part in which sample k is, and its place there."""
    part = bisect_right(starts, k) - 1
    return part, k - starts[part]


def part_file(path: Path, part: int, suffix: str) -> Path:
    return path / f"part-{part:06d}{suffix}"


def latent(path: Path, starts: tuple[int, ...], shape: tuple[int, ...], k: int) -> np.ndarray:
    part, place = place_of(starts, k)
    file = part_file(path, part, ".npy")
    try:
        with HEADERS:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        found = np.array(array[place])
    except OSError as error:
        raise DiskError(f"{file} cannot be read ({line(error)}): prepare the latents again") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{file} is damaged ({line(error)}): prepare the latents again") from error
    if found.shape != shape or found.dtype != np.float16 or not np.isfinite(found).all():
        raise UserError(f"{file} is damaged: prepare the latents again")
    return found


def check_encoder(what: Path | str, folder: Path, wanted: str, way_out: str) -> None:
    """Raises UserError unless the folder is there and holds the text encoder with this checksum.

    what: made with it. way_out: what else can be done than to bring the folder back.
    """
    if not folder.is_dir():
        raise UserError(f"{what}: its Stable Diffusion, {folder}, is gone; bring it back, or {way_out}")
    if text_sha256(folder) != wanted:
        raise UserError(f"{what}: the text encoder in {folder} is another than it was made with; bring that one back")
