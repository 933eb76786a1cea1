"""Latents and captions of noise: as costly to train on as real ones."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from onejump.data.image_set import Step


@dataclass(frozen=True)
class NoiseTexts:
    """Latents and embeddings of their captions, all noise."""

    latents: Tensor
    text: Tensor
    labels: None = None
    class_names: tuple[str, ...] = ()
    classes: int = 0
    name: str = "noise"
    fingerprint: str = "noise"

    @property
    def n(self) -> int:
        return len(self.latents)

    @property
    def shape(self) -> tuple[int, int, int]:
        c, h, w = self.latents.shape[1:]
        return c, h, w

    def batch(
        self, step: int, batch: int, seed: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        index = Step(self.n, step, batch, seed, rank, world).order[0]
        return self.pick(index).to(device), self.text[index].to(device)

    def chunks(self, size: int) -> Iterator[tuple[Tensor, None]]:
        for latents in self.latents.split(size):
            yield latents, None

    def pick(self, index: Tensor) -> Tensor:
        return self.latents[index]

    def unlabelled(self) -> "NoiseTexts":
        return self
