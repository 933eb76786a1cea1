"""Feature networks from timm, their weights read from local files, for ProjectedCritic."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onejump.types import UserError

Maps = Float[Tensor, "b _ _ _"]  # [batch, channels, height, width]
SIDE = 224  # pixels of the images that the networks are shown


@dataclass(frozen=True)
class TimmFeatures:
    """The maps of a timm network, its weights read from a local safetensors file; nothing is downloaded.

    CTM's two are TimmFeatures("deit_base_distilled_patch16_224", FILE, (2, 5, 8, 11)) and
    TimmFeatures("tf_efficientnet_lite0", FILE, (1, 2, 3, 4)).
    """

    name: str  # the model's name in timm
    weights: str  # path of the file; timm's models are on huggingface.co/timm as model.safetensors
    layers: tuple[int, int, int, int] = (1, 2, 3, 4)  # which maps: a convnet's stages or a transformer's blocks

    def build(self) -> "TimmNetwork":
        """The network. Raises UserError if timm or the file is missing, or if the file is not of this network."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not Path(self.weights).is_file():
            raise UserError(f"weights: no file {self.weights}; download model.safetensors of {self.name} to it")
        try:
            import timm
        except (ImportError, RuntimeError):
            raise UserError(f"features: {self.name} needs the package timm, which is not installed") from None
        if not timm.is_model(self.name):
            raise UserError(f"name: timm {timm.__version__} has no model {self.name}; see timm.list_models()")
        model = timm.create_model(self.name, pretrained=False)
        try:
            model.load_state_dict(load_file(self.weights))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"weights: {self.weights} does not hold the weights of {self.name}: {reason}") from None
        return TimmNetwork(model, self.layers)


class TimmNetwork(nn.Module):
    """Four maps of a timm model, each half as wide as the one before. Build it with TimmFeatures(...).build().

    The maps of a plain vision transformer are all 1/16 of the image; random layers bring them to 1/4, 1/8, 1/16, 1/32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, layers: tuple[int, int, int, int]):
        super().__init__()
        self.model, self.layers = model.eval(), list(layers)
        self.register_buffer("mean", torch.tensor(model.default_cfg["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(model.default_cfg["std"])[:, None, None])
        self.resample = nn.ModuleList(nn.Identity() for _ in layers)
        try:
            with torch.no_grad():
                maps = self(torch.zeros(1, 3, SIDE, SIDE))
        except AssertionError as error:  # timm's word for a layer that is not there
            raise UserError(f"layers: {layers} do not fit this network: {error}") from None
        if len({m.shape for m in maps}) == 1:
            c = maps[0].shape[1]
            self.resample = nn.ModuleList(
                [
                    nn.Sequential(nn.Conv2d(c, c // 8, 1), nn.ConvTranspose2d(c // 8, c // 8, 4, stride=4)),
                    nn.Sequential(nn.Conv2d(c, c // 4, 1), nn.ConvTranspose2d(c // 4, c // 4, 2, stride=2)),
                    nn.Conv2d(c, c // 2, 1),
                    nn.Sequential(nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 3, stride=2, padding=1)),
                ]
            )

    def forward(self, x: Maps) -> list[Maps]:
        """The maps, largest first, of images in [0, 1] of 224x224 pixels."""
        x = (x - self.mean) / self.std
        maps = self.model.forward_intermediates(x, indices=self.layers, stop_early=True, intermediates_only=True)
        return [resample(m) for resample, m in zip(self.resample, maps, strict=True)]
