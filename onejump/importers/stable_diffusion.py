"""A Stable Diffusion folder, as diffusers saves it, as a diffusion model of ours: a teacher, or a student's start.

Its network and its scheduler's noise levels are read; the text encoder and the autoencoder stay where they are
(`data.text_parts`), and the model's provenance says where that is.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from onejump.data.text_parts import check_folder, is_stable_diffusion, part_sha256, read_config, text_sha256
from onejump.importers.imported import first
from onejump.model import ConsistencyModel
from onejump.networks.layers import empty_network
from onejump.networks.text_unet import TextUNetConfig, our_name, text_config
from onejump.precond import StableDiffusion
from onejump.samplers import ODE
from onejump.saved import SavedModel, load_model, model_sha256
from onejump.solvers import euler
from onejump.tensor_file import open_tensors
from onejump.types import UserError
from onejump.vp import VPSchedule

WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = {"beta_schedule": ("linear", "scaled_linear"), "prediction_type": ("epsilon", "v_prediction")}
PLAIN = {"trained_betas": (None,), "rescale_betas_zero_snr": (False,), "use_flow_sigmas": (False,)}
STEPS = 50  # of the teacher's own sampler


def open_model(path: str | Path) -> SavedModel:
    """A model of ours (`load_model`), or a Stable Diffusion folder."""
    path = Path(path).expanduser()
    return read_stable_diffusion(path) if is_stable_diffusion(path) else load_model(path)


def open_sha256(path: Path) -> str:
    """The checksum of the weights that this path means."""
    return part_sha256(path, "unet", "scheduler") if is_stable_diffusion(path) else model_sha256(path)


def read_stable_diffusion(folder: Path) -> SavedModel:
    """The diffusion model, float32, on the CPU, in eval mode; it wants text embeddings as cond.

    Raises UserError for Stable Diffusion XL and other pipelines, schedules and predictions that are not its, and for
    missing or damaged parts, by name.
    """
    check_folder(folder)
    network, precond = network_of_folder(folder), precond_of_folder(folder)
    model = ConsistencyModel(empty_network(network), precond)
    weights = read_weights(folder / "unet" / WEIGHTS, network)
    model.net.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    schedule = precond.schedule
    sampler = ODE(schedule.sigma_min, schedule.sigma_max, 7.0, euler, STEPS)
    side = network.img_resolution
    shape = (network.img_channels, side, side)
    return SavedModel(model, network, sampler, shape, provenance={"text_to_image": parts_of(folder)})


def parts_of(folder: Path) -> dict[str, str]:
    """Where the text encoder and the autoencoder are, and which they are: for a model's provenance."""
    folder = folder.expanduser().absolute()
    return {
        "stable_diffusion": str(folder),
        "text_sha256": text_sha256(folder),
        "vae_sha256": part_sha256(folder, "vae"),
    }


def network_of_folder(folder: Path) -> TextUNetConfig:
    file, encoder = folder / "unet" / "config.json", read_config(folder / "text_encoder" / "config.json")
    try:
        network = text_config(read_config(file), tokens=int(encoder.get("max_position_embeddings", 77)))
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{file}: {error if isinstance(error, UserError) else f'damaged ({error!r})'}") from error
    if encoder.get("hidden_size") != network.text_width:
        told = f"embeddings of {encoder.get('hidden_size')} numbers, its network reads {network.text_width}"
        raise UserError(f"{folder}: its text encoder gives {told}; the parts are of different models")
    return network


def precond_of_folder(folder: Path) -> StableDiffusion:
    file = folder / "scheduler" / "scheduler_config.json"
    content = read_config(file)
    for name, known in (KINDS | PLAIN).items():
        value = content.get(name, known[0])
        if value not in known:
            read = f"{' and '.join(map(str, known))} {'are' if len(known) > 1 else 'is'} supported"
            raise UserError(f"{file}: {name}={value!r} is not supported; {read}")
    try:
        levels = VPSchedule(
            beta_start=float(content["beta_start"]),
            beta_end=float(content["beta_end"]),
            n=int(content.get("num_train_timesteps", 1000)),
            spacing=content.get("beta_schedule", "linear"),  # diffusers' own default
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: no noise levels can be made of it ({error}); copy it again") from error
    return StableDiffusion(content.get("prediction_type", "epsilon"), levels)


def read_weights(file: Path, network: TextUNetConfig) -> dict[str, Tensor]:
    """By our names, float32. Raises UserError for a file that is missing, damaged, or of another network."""
    if not file.is_file():
        there = sorted(other.name for other in file.parent.glob("*"))
        raise UserError(f"{file.parent}: no {WEIGHTS} there, only {', '.join(there)}; fetch it, or rename a variant")
    try:
        opened = open_tensors(file)
        tensors, _ = opened.load(opened.plain)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]}); copy it again") from error
    found: dict[str, Any] = {our_name(name): tensor for name, tensor in tensors.items()}
    wanted = empty_network(network).state_dict()
    for name, ours in wanted.items():
        if name not in found:
            raise UserError(f"{file}: no {name.replace('.block.', '.')}, which its config.json asks for")
        if found[name].shape != ours.shape:
            shapes = f"{tuple(found[name].shape)}, its config.json asks for {tuple(ours.shape)}"
            raise UserError(f"{file}: {name.replace('.block.', '.')} is {shapes}")
    strangers = [name for name in found if name not in wanted]
    if strangers:
        raise UserError(f"{file}: {first(strangers)} have no place in what its config.json describes")
    return {name: tensor.to(torch.float32) for name, tensor in found.items()}
