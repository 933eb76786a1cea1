"""DINOv2 and CLIP from a local folder, through the `transformers` library. Nothing is fetched from the network."""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from onejump.evaluation.precision import exact_float32
from onejump.evaluation.weight_files import sha256_of
from onejump.types import Features, Images, UserError

DINOV2_SHA256 = "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23"
DINOV2_FOLDER, CLIP_FOLDERS = "dinov2-large", ("clip-vit-base-patch32", "clip-vit-large-patch14")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINOV2 = (
    f"a folder {DINOV2_FOLDER} with config.json and model.safetensors (1.22 GB, sha256 {DINOV2_SHA256}), "
    "usually found at https://huggingface.co/facebook/dinov2-large"
)
CLIP = (
    f"a folder {CLIP_FOLDERS[0]} (605 MB) or {CLIP_FOLDERS[1]} (1.71 GB) with config.json, model.safetensors, "
    "vocab.json, merges.txt and tokenizer_config.json, usually found at "
    f"https://huggingface.co/openai/{CLIP_FOLDERS[0]}"
)


def _check(folder: Path, wanted: str) -> None:
    if not find_spec("transformers"):
        raise UserError("DINOv2 and CLIP are read by transformers: pip install 'onejump[foundation]'")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; give {wanted}")


def _content(folder: Path) -> str:
    return sha256_of(folder / "model.safetensors")


def _unreadable(folder: Path, error: Exception) -> UserError:
    text = str(error).strip().splitlines()[:1] or [type(error).__name__]
    return UserError(f"{folder}: transformers cannot read it ({text[0][:200]}): fetch it anew")


def square(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [h, w, 3] squeezed to side x side by Pillow's bicubic filter, as published FD-DINOv2 figures are made."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def centre(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [h, w, 3] with its shorter side made `side` by Pillow's bicubic filter, then cut in the middle (CLIP)."""
    from PIL import Image

    h, w = image.shape[:2]
    h, w = (max(side * n // min(h, w), side) for n in (h, w))
    resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
    top, left = round((h - side) / 2), round((w - side) / 2)
    return resized[top : top + side, left : left + side]


def _pixels(images: Images, crop: bool, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    if images.shape[1] not in (1, 3):
        raise UserError(f"DINOv2 and CLIP see images of 1 or 3 channels, not of {images.shape[1]}")
    arrays = images.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    resized = np.stack([(centre if crop else square)(image, side) for image in arrays])
    x = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def published_positions(positions: Float[Tensor, "1 n d"], places: int) -> Float[Tensor, "1 m d"]:
    """DINOv2's position embeddings for an image of places x places patches, as its own code interpolates them.

    Bicubic, sampled with the scale (places + 0.1) / n; other code takes places / n, which moves features slightly.
    """
    cls, grid = positions[:, :1], positions[:, 1:]
    n = round(grid.shape[1] ** 0.5)
    if n == places:
        return positions
    grid = grid.view(1, n, n, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(places + 0.1) / n, mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


@lru_cache(maxsize=1)
def _dinov2(folder: Path, content: str, side: int, device: torch.device) -> Any:
    from transformers import Dinov2Model

    try:
        with torch.inference_mode(False):
            network = Dinov2Model.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, attn_implementation="eager"
            )
            embeddings, patch = network.embeddings, network.config.patch_size
            assert isinstance(patch, int), patch
            positions = published_positions(embeddings.position_embeddings.detach(), side // patch)
            embeddings.position_embeddings = nn.Parameter(positions)
            return network.eval().requires_grad_(False).to(device)
    except Exception as error:  # a damaged folder can raise anything
        raise _unreadable(folder, error) from error


@dataclass(frozen=True)
class DINOv2Detector:
    """The class token of DINOv2 after the last norm, float32 [n, 1024] for ViT-L/14: FD-DINOv2 (Stein et al. 2023).

    folder: holds config.json and model.safetensors as `transformers` writes them. Images of any size are squeezed to
    224x224. Raises UserError if the library, the folder or a file is missing.
    """

    folder: Path
    device: torch.device | str = "cpu"
    batch: int = 16
    side: int = 224
    name: str = "dinov2"

    @property
    def hash(self) -> str:
        return sha256(f"{_content(self.folder)} {self.name} {self.side}".encode()).hexdigest()

    def __call__(self, images: Images) -> Features:
        network, device = self.check(), torch.device(self.device)
        with exact_float32(device):
            parts = [
                network(pixel_values=_pixels(x, False, self.side, MEAN, STD).to(device)).last_hidden_state[:, 0]
                for x in images.split(self.batch)
            ]
        return torch.cat(parts)

    def check(self) -> Any:
        """Reads the weights, or raises UserError."""
        _check(self.folder, DINOV2)
        return _dinov2(self.folder.absolute(), _content(self.folder), self.side, torch.device(self.device))


@lru_cache(maxsize=1)
def _clip(folder: Path, content: str, device: torch.device) -> Any:
    from transformers import CLIPModel

    try:
        with torch.inference_mode(False):
            network = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, attn_implementation="eager"
            )
            return network.eval().requires_grad_(False).to(device)
    except Exception as error:  # as above
        raise _unreadable(folder, error) from error


@dataclass(frozen=True)
class CLIPDetector:
    """CLIP's embeddings of images and of texts, float32 [n, d], not normalised (Radford et al. 2021).

    folder: as for DINOv2, with the tokenizer's files for texts. Raises UserError if the library or a file is missing.
    """

    folder: Path
    device: torch.device | str = "cpu"
    batch: int = 32
    name: str = "clip"

    @property
    def hash(self) -> str:
        return sha256(f"{_content(self.folder)} {self.name}".encode()).hexdigest()

    def __call__(self, images: Images) -> Features:
        network, device = self.check(), torch.device(self.device)
        side, parts = network.config.vision_config.image_size, []
        with exact_float32(device):
            for x in images.split(self.batch):
                pixels = _pixels(x, True, side, CLIP_MEAN, CLIP_STD).to(device)
                parts.append(network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output))
        return torch.cat(parts)

    def texts(self, texts: list[str]) -> Features:
        """Embeddings of texts; each is cut at the length that the network knows (77 tokens)."""
        network, device, parts = self.check(), torch.device(self.device), []
        tokenizer = _tokenizer(self.folder.absolute())
        length = network.config.text_config.max_position_embeddings
        with exact_float32(device):
            for i in range(0, len(texts), self.batch):
                some = texts[i : i + self.batch]
                tokens = tokenizer(some, padding=True, truncation=True, max_length=length, return_tensors="pt").to(
                    device
                )
                hidden = network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
                parts.append(network.text_projection(hidden.pooler_output))
        return torch.cat(parts)

    def score(self, images: Images, texts: list[str]) -> Float[Tensor, " n"]:
        """100 max(cos(image, text), 0), one number a pair: the CLIP score (Hessel et al. 2021, with w = 100)."""
        if len(images) != len(texts):
            raise UserError(f"{len(images)} images and {len(texts)} texts: the CLIP score needs one text an image")
        return 100 * F.cosine_similarity(self(images), self.texts(texts)).clamp(min=0)

    def check(self) -> Any:
        """Reads the weights, or raises UserError."""
        _check(self.folder, CLIP)
        return _clip(self.folder.absolute(), _content(self.folder), torch.device(self.device))


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise UserError(f"{folder}: its tokenizer cannot be read; give {CLIP}") from error
