"""A consistency model as diffusers saves it: a folder with model_index.json, unet/ and scheduler/.

unet is a UNet2DModel in the form of OpenAI's ADM (such as openai/diffusers-cd_imagenet64_l2), or one of our networks as
exporters/diffusers_folder.py writes it, beside onejump.json with what diffusers has no place for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from onejump.checkpoint import file_sha256
from onejump.config_json import from_json
from onejump.data.text_parts import is_stable_diffusion
from onejump.importers.diffusers_scheduler import Schedule, read_json, read_schedule
from onejump.importers.imported import Imported, Made, first, fitting, numbered, placed, precision, shape_of
from onejump.importers.published import second_time
from onejump.importers.torch_file import read_torch
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.diffusers_config import ORIGINAL, OUR_PIPELINE, OUR_UNET, OURS, PIPELINE, adm_config, unet_config
from onejump.networks.diffusers_weights import NOISE_SCALE, REFITTED, renamed
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.layers import empty_network
from onejump.networks.song_unet import SongUNetConfig
from onejump.precond import EDM
from onejump.samplers import Multistep
from onejump.tensor_file import open_tensors
from onejump.types import UserError

INDEX, CONFIG, SCHEDULE = "model_index.json", "config.json", "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"


class Found(NamedTuple):
    """The network of a folder. weights: by our names."""

    network: SongUNetConfig | ADMUNetConfig | EDM2UNetConfig
    weights: dict[str, Tensor | Made]
    dropped: dict[str, str]


def read(path: Path) -> Imported:
    """The model of a pipeline's folder, or of its unet/ with scheduler/ beside it.

    Raises UserError for other pipelines, schedulers and networks, by name, and for weights that do not fit.
    """
    root, unet = _located(path)
    schedule, sampler, t_min = read_schedule(root / SCHEDULE)
    config, file = read_json(unet / CONFIG), _weights_file(unet)
    tensors = _tensors(file)
    ours = _ours(root / OURS, file)
    kind = config.get("_class_name")
    if kind == "UNet2DModel":
        network, weights, dropped = _unet_2d_model(unet / CONFIG, config, file, tensors, ours)
    elif kind == OUR_UNET:
        network, weights, dropped = _our_network(unet / CONFIG, config, file, tensors)
    else:
        raise UserError(f"{unet / CONFIG}: {kind}; UNet2DModel is read, and what onejump exported")
    sampler, how = (sampler, "its own") if sampler else _sampler(root, schedule)
    return Imported(
        kind=f"diffusers' {kind} with {PIPELINE}",
        network=network,
        weights=fitting(file, weights, network),
        dropped=dropped,
        jump=schedule.jump,
        precond=EDM(schedule.sigma_data),
        sampler=sampler,
        t_min=t_min,
        shape=shape_of(network),
        class_names=tuple(map(str, ours.get("class_names", ()))) or numbered(network.label_dim),
        licence=str(ours.get("licence", "")),
        ema=str(ours.get("ema", "")),
        facts=precision(tensors.values()) | _facts(schedule, how),
        provenance=ours.get("provenance", {}),
    )


def _located(path: Path) -> tuple[Path, Path]:
    """(the pipeline's folder, its unet's)."""
    folder = path.parent if path.name in (INDEX, CONFIG) else path
    if (folder / INDEX).is_file():
        pipeline = read_json(folder / INDEX).get("_class_name")
        if pipeline not in (PIPELINE, OUR_PIPELINE):
            hint = (
                "; Stable Diffusion needs no import, name its folder with --teacher"
                if is_stable_diffusion(folder)
                else ""
            )
            raise UserError(f"{folder}: {pipeline}; {PIPELINE} is read, that of consistency models in pixels{hint}")
        return folder, folder / "unet"
    if (folder / CONFIG).is_file():
        return folder.absolute().parent, folder
    raise UserError(f"{path}: no {INDEX} of a pipeline there, nor {CONFIG} of its unet")


def _facts(schedule: Schedule, times: str) -> dict[str, str]:
    known = {"times": times}
    if schedule.clip_denoised:
        known["clamping"] = "its scheduler clamps images to [-1, 1] after every step, we after the last"
    return known


def _sampler(root: Path, schedule: Schedule) -> tuple[Multistep, str]:
    """One and two steps: the published time of the second if the folder has the name of a published one, else the
    stock pipeline's."""
    *_, cached, snapshots, name = ("", "", *root.resolve().parts)
    if snapshots == "snapshots" and cached.startswith("models--"):  # as the Hub's cache: models--USER--NAME/snapshots/X
        name = cached.split("--")[-1]
    published = second_time(name.removeprefix("diffusers-")) if name.startswith("diffusers-") else None
    if published is not None:
        return Multistep(schedule.sigma_max, (published,)), f"as published for a folder of this name, {name}"
    mid = schedule.second_time()
    return Multistep(schedule.sigma_max, () if mid is None else (mid,)), "of its scheduler, in one and in two steps"


def _ours(file: Path, weights: Path) -> dict[str, Any]:
    """What our exporter added, {} if nothing. Raises UserError if it is of other weights."""
    if not file.is_file():
        return {}
    content = read_json(file)
    if content.get("sha256") != file_sha256(weights):
        raise UserError(f"{file}: it is of other weights than {weights}; remove it to read these without")
    if not isinstance(content.get("class_names"), list):
        raise UserError(f"{file}: its class_names are no list; remove it to read the rest")
    if not isinstance(content.get("provenance", {}), dict):
        raise UserError(f"{file}: its provenance is no object; remove it to read the rest")
    return content


def _weights_file(unet: Path) -> Path:
    for name in (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin"):
        if (unet / name).is_file():
            return unet / name
    there = sorted(file.name for file in unet.glob("*") if file.suffix in (".safetensors", ".bin", ".json"))
    raise UserError(f"{unet}: no {WEIGHTS}.safetensors there, only {', '.join(there)}; fetch it, or rename a variant")


def _tensors(file: Path) -> dict[str, Tensor]:
    """Views of the mapped file. Raises UserError for a damaged one."""
    if file.suffix == ".bin":
        content = read_torch(file)
        if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise UserError(f"{file}: no state dict; names and tensors are read")
        return {str(name): tensor for name, tensor in content.items()}
    try:
        names = list(open_tensors(file).entries)
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())}); copy it again") from error


def _unet_2d_model(
    config_file: Path, config: dict[str, Any], file: Path, tensors: Mapping[str, Tensor], ours: dict[str, Any]
) -> Found:
    try:
        network = adm_config(config)
        if ours:
            network = _exported(network, ours)
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from error
    made: dict[str, Tensor | Made] = {}
    used, missing, dropped = set(), [], {}
    for name, entry in renamed(network).items():
        missing += [theirs for theirs in entry.theirs if theirs not in tensors]
        if not missing:
            made[name] = Made(tuple(tensors[theirs] for theirs in entry.theirs), entry.made)
        used |= set(entry.theirs)
    if missing:
        raise UserError(f"{file}: no {first(missing)}, which its {CONFIG} asks for")
    strangers = [name for name in tensors if name not in used]
    if strangers:
        raise UserError(f"{file}: {first(strangers)} have no place in what its {CONFIG} describes")
    if network.noise_scale != NOISE_SCALE:
        original = _tensors(config_file.parent.parent / ORIGINAL)
        if list(original) != [REFITTED]:
            raise UserError(f"{config_file.parent.parent / ORIGINAL}: {REFITTED} and no more is read; copy it again")
        made |= original
        dropped = {"time_embedding.linear_1.weight": f"fitted to diffusers' features; ours is in {ORIGINAL}"}
    return Found(network, made, dropped)


def _exported(read: ADMUNetConfig, ours: dict[str, Any]) -> ADMUNetConfig:
    """Our own configuration of what was read. Raises UserError if it is not of the same network."""
    network = from_json(ours.get("network"))
    if not isinstance(network, ADMUNetConfig) or adm_config(unet_config(network)) != read:
        raise UserError(f"not the network of {OURS}; remove {OURS} to read it without")
    return network


def _our_network(config_file: Path, config: dict[str, Any], file: Path, tensors: Mapping[str, Tensor]) -> Found:
    try:
        network = from_json(config.get("network"))
        if not isinstance(network, SongUNetConfig | ADMUNetConfig | EDM2UNetConfig):
            raise UserError(f"{type(network).__name__} is none of the networks that are exported")
        empty_network(network)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{config_file}: {' '.join(str(error).split())[:300]}") from error
    return Found(network, dict(placed(file, tensors, network, lambda name: name.removeprefix("net."))), {})
