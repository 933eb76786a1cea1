"""A Stable Diffusion folder of the published structure, tiny and at random; and captioned shards."""

import functools
import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
WIDTH, TOKENS = 16, 12


def unet():
    torch.manual_seed(1)
    levels = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=levels[0],
        up_block_types=levels[1],
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def vae():
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    ).eval()


def text_encoder():
    torch.manual_seed(3)
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return transformers.CLIPTextModel(config).eval()


def save_tokenizer(folder: Path) -> None:
    """CLIP's, without merges: a token a letter."""
    letters = [chr(k) for k in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    marks = {"bos_token": words[-2], "eos_token": words[-1], "pad_token": words[-1], "unk_token": words[-1]}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | marks))


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="onejump-test-")) / "tiny-sd"
    unet().save_pretrained(folder / "unet")
    vae().save_pretrained(folder / "vae")
    text_encoder().save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer")
    diffusers.PNDMScheduler(**LEVELS, skip_prk_steps=True, steps_offset=1).save_pretrained(folder / "scheduler")
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "PNDMScheduler"}
    index = {name: ["diffusers", kind] for name, kind in parts.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | index))
    return folder


def tiny_folder() -> Path:
    """The same one for all tests: not to be changed."""
    return _folder()


def changed_folder(to: Path, file: str, **values: object) -> Path:
    """A copy with other values in one of its JSON files."""
    folder = Path(shutil.copytree(_folder(), to / "sd"))
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))
    return folder


def shard(file: Path, n: int = 24, first: int = 0, without: tuple[int, ...] = (), side: int = 20) -> Path:
    """n images as COYO has them: KEY.jpg with KEY.txt and KEY.json; some without their captions."""
    rng = np.random.default_rng(first)
    with tarfile.open(file, "w") as tar:
        for k in range(first, first + n):
            stream = io.BytesIO()
            colour = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(colour).save(stream, "JPEG")
            files = {"jpg": stream.getvalue()}
            if k not in without:
                files["txt"] = f"number {k}".encode()
            files["json"] = json.dumps({"url": f"https://example.org/{k}", "clip_similarity_vitb32": 0.3}).encode()
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{k:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file


def clip_folder(folder: Path) -> Path:
    """A CLIP with both towers, for the score."""
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 514, "max_position_embeddings": TOKENS, "bos_token_id": 512, "eos_token_id": 513}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
