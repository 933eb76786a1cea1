"""The parts of a Stable Diffusion folder, as diffusers saves it, that are not trained: text encoder and autoencoder.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

Read by `diffusers` and `transformers` from the disk; nothing is fetched.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from onejump.data.image_set import from_uint8
from onejump.types import Images, Samples, UserError, beside

PIPELINE = "StableDiffusionPipeline"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
AT_ONCE = 8  # images of a call of the autoencoder


def is_stable_diffusion(path: Path) -> bool:
    """Whether it is a folder of a pipeline that makes images of text; which one, `check_folder` says."""
    index = path / "model_index.json"
    return index.is_file() and b"StableDiffusion" in index.read_bytes()[:4096]


def check_folder(folder: Path) -> None:
    """Raises UserError unless it is a whole folder of Stable Diffusion 1 or 2, and the libraries are there."""
    for package in ("diffusers", "transformers"):
        if not find_spec(package):
            raise UserError(
                f"Stable Diffusion is read by diffusers and transformers: pip install 'onejump[text]' ({package})"
            )
    content = read_config(folder / "model_index.json")
    kind = content.get("_class_name")
    if kind != PIPELINE:
        xl = ": Stable Diffusion XL is not supported" if "XL" in str(kind) else ""
        raise UserError(f"{folder}: {kind}{xl}; a folder of {PIPELINE} (Stable Diffusion 1 or 2) is read")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise UserError(f"{folder}: no {', '.join(missing)} there; fetch the whole folder")


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        way_out = "a Stable Diffusion folder, as diffusers saves it, has it"
        raise UserError(f"{file}: cannot be read ({error.strerror}); {way_out}") from error
    except ValueError as error:
        raise UserError(f"{file}: no JSON ({' '.join(str(error).split())[:100]}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: no JSON object; copy it again")
    return content


def part_sha256(folder: Path, *parts: str) -> str:
    """Of the names and bytes of all files in some parts of a folder."""
    files = sorted(file for part in parts for file in (folder / part).rglob("*") if file.is_file())
    digest = sha256()
    for file in files:
        status = file.stat()
        content = _file_sha256(str(file), status.st_size, status.st_mtime_ns)
        digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _file_sha256(path: str, size: int, changed: int) -> str:
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def text_sha256(folder: Path) -> str:
    """Of all that embeddings of text depend on."""
    return part_sha256(folder, "text_encoder", "tokenizer")


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """CLIP's text encoder, frozen: what Stable Diffusion's network is told of a text."""

    tokenizer: Any
    network: Any
    tokens: int
    width: int
    known: dict[str, bool] = field(default_factory=dict)  # of what was warned

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "b tokens width"]:
        """The last hidden state, float32, padded to the encoder's length; longer texts are cut, once with a warning."""
        asked, parameter = list(texts), next(self.network.parameters())
        rows = self.tokenizer(asked, verbose=False).input_ids
        ids = torch.full((len(rows), self.tokens), self.tokenizer.pad_token_id)
        for k, row in enumerate(rows):
            if len(row) > self.tokens:
                self._warn(asked[k], len(row))
                row = [*row[: self.tokens - 1], row[-1]]  # its end is marked
            ids[k, : len(row)] = torch.tensor(row)
        with torch.no_grad():
            return self.network(beside(ids, parameter)).last_hidden_state.float()

    def _warn(self, text: str, tokens: int) -> None:
        if not self.known:
            self.known["cut"] = True
            told = f"{text[:60]!r}... has {tokens} tokens; the encoder reads {self.tokens}, the rest is cut off"
            print(f"onejump: {told} (said once)", file=sys.stderr)


@lru_cache(maxsize=4)
def text_encoder(folder: Path, device: torch.device) -> TextEncoder:
    """Of a folder, on the device, frozen. Raises UserError if it cannot be read."""
    check_folder(folder)
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with torch.inference_mode(False):
            network = CLIPTextModel.from_pretrained(
                folder / "text_encoder", local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # a damaged folder can raise anything
        raise unreadable(folder / "text_encoder", error) from error
    config = network.config
    tokens = min(config.max_position_embeddings, tokenizer.model_max_length)
    return TextEncoder(tokenizer, network.eval().requires_grad_(False).to(device), tokens, config.hidden_size)


def unreadable(place: Path, error: Exception) -> UserError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{place}: cannot be read ({text[:200]}); weights as .safetensors are needed: fetch it anew")


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """Stable Diffusion's: images of 3 channels to latents, and back."""

    network: Any
    scaling: float  # x0 = scaling * z
    factor: int  # sides of an image are so many times the latents'

    def encode(self, images: Images) -> Float[Tensor, "n two_z h_z w_z"]:
        """Raw latents: means and then deviations, [n, 2z, h / factor, w / factor], float32, on the CPU."""
        device, parts = next(self.network.parameters()).device, []
        with torch.no_grad():
            for some in images.split(AT_ONCE):
                found = self.network.encode(from_uint8(some.expand(-1, 3, -1, -1)).to(device)).latent_dist
                parts.append(torch.cat([found.mean, found.std], 1).float().cpu())
        return torch.cat(parts)

    def decode(self, x0: Samples) -> Samples:
        """Images in [-1, 1] of scaled latents, on their device."""
        with torch.no_grad():
            return torch.cat([self.network.decode(some / self.scaling).sample for some in x0.split(AT_ONCE)])

    def to(self, device: torch.device) -> "Autoencoder":
        self.network.to(device)
        return self


@lru_cache(maxsize=4)
def autoencoder(folder: Path, device: torch.device) -> Autoencoder:
    """Of a folder, on the device, frozen, float32. Raises UserError if it cannot be read."""
    check_folder(folder)
    from diffusers import AutoencoderKL

    options = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        with torch.inference_mode(False):
            network: Any = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, **options)
    except Exception as error:  # as above
        raise unreadable(folder / "vae", error) from error
    factor = 2 ** (len(network.config.block_out_channels) - 1)
    scaling = float(network.config.scaling_factor)
    return Autoencoder(network.eval().requires_grad_(False).to(device), scaling, factor)
