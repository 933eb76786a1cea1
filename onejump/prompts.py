"""Prompts: what a text-to-image model is asked for, and the two networks that turn them into images with it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onejump.data.text_parts import autoencoder, part_sha256, text_encoder
from onejump.data.text_set import TextSet, check_encoder
from onejump.evaluation.foundation import CLIPDetector
from onejump.generate import block_on, blocks_of, generate
from onejump.model import ConsistencyModel
from onejump.networks.text_unet import TextUNetConfig
from onejump.samplers import Sampler
from onejump.saved import SavedModel
from onejump.types import Images, Samples, UserError

PARTS = "text_to_image"  # of a model's provenance: where its text encoder and autoencoder are
MAX_FILE = 2**30
SHOWN = (  # while a model trains: prompts of the TCM paper's figures
    "A photo of an astronaut riding a horse on Mars",
    "Robot serving dinner, metallic textures, futuristic atmosphere, high-tech kitchen, elegant plating, intricate "
    "details, high quality, misc-architectural style, warm and inviting lighting",
    "A photo of a dog",
)


@dataclass(frozen=True)
class Prompts:
    """Prompt k asks for image k. folder: of the Stable Diffusion whose parts are used. clip: of what scores images.

    It is told to other processes, so it holds no networks; each process reads them once.
    """

    texts: tuple[str, ...]
    folder: Path
    device: torch.device = torch.device("cpu")
    clip: CLIPDetector | None = field(default=None)

    def on(self, device: torch.device) -> "Prompts":
        return replace(self, device=device, clip=replace(self.clip, device=device) if self.clip else None)

    @cached_property
    def sha256(self) -> str:
        return sha256(json.dumps(self.texts).encode()).hexdigest()

    def embeddings(self, places: Sequence[int]) -> Tensor:
        """Of these prompts, float32 [k, tokens, width], on the CPU.

        As images are, each is made in its row of a block, so that its bits do not depend on which others are asked for.
        """
        autoencoder(self.folder, self.device)  # read now, not by the threads that decode
        encoder, size = text_encoder(self.folder, self.device), block_on(self.device)
        found: dict[int, Tensor] = {}
        for block in blocks_of(places, size):
            texts = [""] * size
            for place in block:
                texts[places[place] % size] = self.texts[places[place]]
            made = encoder(texts).cpu()
            found |= {place: made[places[place] % size] for place in block}
        return torch.stack([found[place] for place in range(len(places))])

    @property
    def about(self) -> dict[str, str]:
        """What images of these prompts depend on, and their scores, besides the model."""
        known = {"prompts_sha256": self.sha256, "vae_sha256": part_sha256(self.folder, "vae")}
        return known | ({"clip": self.clip.hash} if self.clip else {})

    def null(self) -> Tensor:
        """The embedding of the empty text, [tokens, width], against which guidance compares."""
        return text_encoder(self.folder, self.device)([""])[0]

    def decode(self, x0: Samples) -> Samples:
        """Images in [-1, 1] of latents."""
        return autoencoder(self.folder, self.device).decode(x0)

    def scores(self, images: Images, places: Sequence[int]) -> dict[str, Tensor]:
        """The CLIP score of each image with its prompt, by a name of its own; {} without CLIP."""
        return {"clip": self.clip.score(images, [self.texts[k] for k in places])} if self.clip else {}

    def image_shape(self, saved: SavedModel) -> tuple[int, int, int]:
        """Of what comes of the model's latents."""
        factor = autoencoder(self.folder, self.device).factor
        return 3, saved.shape[1] * factor, saved.shape[2] * factor


def shown(model: ConsistencyModel, sampler: Sampler, data: TextSet, seed: int) -> Images:
    """One image of each of SHOWN, in one step, by the text encoder and autoencoder of these latents."""
    prompts = Prompts(SHOWN, data.folder, next(model.parameters()).device)
    places = range(len(SHOWN))
    text = prompts.embeddings(places)
    return generate(model, sampler, 1, places, data.shape, text, seed, decode=prompts.decode)


def reads_text(saved: SavedModel) -> bool:
    return isinstance(saved.network, TextUNetConfig)


def prompts_for(
    saved: SavedModel,
    texts: Sequence[str],
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    clip: Path | None = None,
    name: Path | str = "this model",
) -> Prompts:
    """For this model, with the parts it was trained beside; `folder` says where those are now. name: for errors.

    Raises UserError if the model reads no text, or the text encoder is another one.
    """
    if not reads_text(saved):
        raise UserError("--prompt: this model reads no text; leave it out, or give a text-to-image model")
    about: dict[str, Any] = saved.provenance.get(PARTS, {})
    if folder is None and "stable_diffusion" not in about:
        raise UserError("--stable-diffusion: the model does not say whose text encoder it reads; give that folder")
    if folder is not None and not folder.expanduser().is_dir():
        raise UserError(f"--stable-diffusion {folder}: no such folder; give the one that the model was made with")
    place = Path(folder or about["stable_diffusion"]).expanduser().absolute()
    if "text_sha256" in about:
        way_out = "say where it is now: sample and evaluate have --stable-diffusion FOLDER"
        check_encoder(name, place, about["text_sha256"], way_out)
    device = torch.device(device)
    text_encoder(place, device), autoencoder(place, device)
    scorer = None if clip is None else CLIPDetector(clip, device)
    if scorer:
        scorer.check()
    return Prompts(tuple(texts), place, device, scorer)


def read_prompts(file: Path) -> tuple[str, ...]:
    """One a line of a text file; or of a .json: a list of texts, or COCO's captions (of each image, the first).

    Raises UserError for a file that is missing, empty or damaged.
    """
    try:
        if file.stat().st_size > MAX_FILE:
            raise UserError(f"{file}: larger than {MAX_FILE // 2**20:,} MiB; no file of prompts")
        text = file.read_text(encoding="utf-8")
        found = _of_json(json.loads(text)) if file.suffix.lower() == ".json" else text.splitlines()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        wanted = "text, one prompt a line, or JSON: a list of texts, or COCO's captions"
        raise UserError(f"{file}: no file of prompts ({type(error).__name__}); {wanted} is read") from error
    prompts = tuple(prompt.strip() for prompt in found if prompt.strip())
    if not prompts:
        raise UserError(f"{file}: no prompts in it; give one a line")
    return prompts


def _of_json(content: Any) -> list[str]:
    if isinstance(content, list):
        if not all(isinstance(item, str) for item in content):
            raise TypeError("not texts alone")
        return content
    first: dict[int, tuple[int, str]] = {}
    for item in content["annotations"]:
        image, number, caption = int(item["image_id"]), int(item["id"]), str(item["caption"])
        first[image] = min(first.get(image, (number, caption)), (number, caption))
    return [first[image][1] for image in sorted(first)]
