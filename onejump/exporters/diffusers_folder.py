"""To diffusers: a folder that ConsistencyModelPipeline.from_pretrained loads, and whose images are ours.

    model_index.json                      names the parts
    unet/                                 a stock UNet2DModel where it can be the network (ADM), else ours, wrapped
    scheduler/                            the jump and the times: its own second of two steps is the model's
    onejump.json, onejump.safetensors     for the way back, what diffusers has no place for
    README.md                             how to use it, and what it cannot do

diffusers itself is not needed to write it.
"""

from pathlib import Path
from typing import Any

from scipy.optimize import brentq
from torch import Tensor

from onejump import __version__
from onejump.config_json import to_json
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.diffusers_config import (
    ORIGINAL,
    OUR_UNET,
    OURS,
    PIPELINE,
    SCHEDULER,
    STORED,
    not_a_unet,
    unet_config,
)
from onejump.networks.diffusers_weights import NOISE_SCALE, REFIT_TIMES, REFITTED, to_unet
from onejump.networks.mlp import MLPConfig
from onejump.precond import CM, EDM, ToData
from onejump.samplers import Multistep, refuse_below
from onejump.saved import SavedModel, licence_on_hub, not_written, write_json
from onejump.tensor_file import write_tensors
from onejump.types import UserError

DIFFUSERS = "0.42.1"  # the version whose layout this is
TIMES = 201  # of the scheduler's grid, an odd number: its second of two steps is the middle one
PLACE = "onejump.exporters.onejump_unet"  # of OneJumpUNet and OneJumpPipeline


def export_diffusers(saved: SavedModel, folder: str | Path) -> None:
    """Writes the folder, model_index.json last.

    Raises UserError for models that this pipeline cannot sample: it jumps to the data from falling times, and gives
    the network one time. And if the folder cannot be written.
    """
    check(saved)
    folder = Path(folder)
    network, weights = saved.network, saved.model.net.state_dict()
    why = why_not_stock(saved)
    assert not isinstance(network, MLPConfig)
    if isinstance(network, ADMUNetConfig) and not why:
        unet, tensors = {"_class_name": "UNet2DModel"} | unet_config(network), to_unet(network, weights)
    else:
        unet, tensors = our_unet(saved), {f"net.{name}": tensor for name, tensor in weights.items()}
    sha256 = write_weights(folder / "unet/diffusion_pytorch_model.safetensors", tensors)
    if isinstance(network, ADMUNetConfig) and not why and network.noise_scale != NOISE_SCALE:
        write_weights(folder / ORIGINAL, {REFITTED: weights[REFITTED]})
    version = {"_diffusers_version": DIFFUSERS}
    write_json(folder / "unet/config.json", unet | version)
    write_json(folder / "scheduler/scheduler_config.json", scheduler(saved) | version)
    write_json(folder / OURS, for_the_way_back(saved) | {"sha256": sha256})
    readme = folder / "README.md"
    try:
        readme.write_text(card(saved, why), encoding="utf-8")
    except OSError as error:
        raise not_written(readme, error) from error
    parts = {
        "unet": ["diffusers" if unet["_class_name"] == "UNet2DModel" else PLACE, unet["_class_name"]],
        "scheduler": ["diffusers", SCHEDULER],
    }
    write_json(folder / "model_index.json", {"_class_name": PIPELINE} | version | parts)


def check(saved: SavedModel) -> None:
    """Raises UserError for what the pipeline cannot sample."""
    model, network, sampler = saved.model, saved.network, saved.sampler
    if isinstance(network, MLPConfig):
        raise UserError("network: MLPConfig; diffusers is given U-Nets (SongUNet, ADMUNet, EDM2UNet)")
    if network.second_time != "off":
        raise UserError(
            f"second_time: {network.second_time}; diffusers' {PIPELINE} gives the network one time, and CTM's reads "
            "two: export to ONNX or torch.export"
        )
    if not isinstance(model.jump, CM | ToData):
        raise UserError(f"jump: {type(model.jump).__name__}; diffusers' {PIPELINE} jumps as CM or ToData")
    if not isinstance(sampler, Multistep):
        raise UserError(
            f"sampler: {type(sampler).__name__}; diffusers' {PIPELINE} samples consistency models (Multistep); distil "
            "a diffusion model first"
        )
    assert isinstance(model.precond, EDM)
    inner = model.precond.sigma_data
    if isinstance(model.jump, CM) and model.jump.sigma_data != inner:
        raise UserError(
            f"jump.sigma_data: {model.jump.sigma_data:g}; diffusers has one, and precond.sigma_data is {inner:g}"
        )
    if saved.shape != (network.img_channels, network.img_resolution, network.img_resolution):
        raise UserError(f"shape: {saved.shape}; the network's is sampled, {network.img_channels} channels")
    refuse_below(model.t_min, sampler.times(sampler.max_steps))


def why_not_stock(saved: SavedModel) -> str:
    """Why UNet2DModel cannot be the network; "" if it can, so that the folder needs no onejump."""
    network = saved.network
    if not isinstance(network, ADMUNetConfig):
        return f"{type(network).__name__.removesuffix('Config')} is not diffusers' U-Net"
    times = saved.sampler.times(1)
    if network.noise_scale != NOISE_SCALE and max(times) > REFIT_TIMES[1]:
        return f"sigma_max={max(times):g}, above {REFIT_TIMES[1]:g}"
    return not_a_unet(network)


def our_unet(saved: SavedModel) -> dict[str, Any]:
    """OneJumpUNet's configuration. The pipeline reads all of it but the network."""
    channels, side, _ = saved.shape
    return {
        "_class_name": OUR_UNET,
        "network": to_json(saved.network),
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "num_class_embeds": saved.network.label_dim or None,
    }


def scheduler(saved: SavedModel) -> dict[str, Any]:
    """CMStochasticIterativeScheduler's configuration. Its jumps end at sigma_min: 0 is the data."""
    model, sampler = saved.model, saved.sampler
    assert isinstance(sampler, Multistep) and isinstance(model.precond, EDM)
    sigma_min = model.jump.sigma_min
    return {
        "_class_name": SCHEDULER,
        "num_train_timesteps": TIMES,
        "sigma_min": sigma_min,
        "sigma_max": sampler.sigma_max,
        "sigma_data": model.precond.sigma_data,
        "s_noise": 1.0,
        "rho": rho_for(sampler.mid[0], sigma_min, sampler.sigma_max) if stock_steps(saved) > 1 else 7.0,
        "clip_denoised": False,
        STORED: {"sampler": to_json(sampler), "t_min": model.t_min},
    }


def stock_steps(saved: SavedModel) -> int:
    """Up to how many steps the stock pipeline samples at the model's own times."""
    assert isinstance(saved.sampler, Multistep)
    middle = [
        t for t in saved.sampler.mid[:1] if 1.02 * saved.model.jump.sigma_min < t < 0.98 * saved.sampler.sigma_max
    ]
    return 1 + len(middle)


def rho_for(mid: float, sigma_min: float, sigma_max: float) -> float:
    """The rho with which the middle of the Karras grid from sigma_max to sigma_min is mid.

    The middle is the power mean of both ends with the exponent p = 1 / rho, which grows with p, from sigma_min over
    sqrt(sigma_min sigma_max) at p = 0 to sigma_max.
    """

    def excess(p: float) -> float:  # grows with p
        return (((sigma_min / mid) ** p + (sigma_max / mid) ** p) / 2 - 1) / p

    nearest = 1e-8  # to p = 0
    if excess(nearest) < 0:
        return 1 / brentq(excess, nearest, 40.0, xtol=1e-15)
    if excess(-nearest) < 0:
        return 1 / nearest
    return 1 / brentq(excess, -40.0, -nearest, xtol=1e-15)


def for_the_way_back(saved: SavedModel) -> dict[str, Any]:
    """What neither the unet nor the scheduler says."""
    return {
        "format": 1,
        "onejump": __version__,
        "network": to_json(saved.network),
        "class_names": list(saved.class_names),
        "licence": saved.licence,
        "ema": saved.ema,
        "provenance": saved.provenance,
    }


def write_weights(file: Path, tensors: dict[str, Tensor]) -> str:
    """The file's checksum. Raises UserError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return write_tensors(file, tensors)
    except OSError as error:
        raise not_written(file, error) from error


def card(saved: SavedModel, why_not: str) -> str:
    """The folder's README.md."""
    channels, side, _ = saved.shape
    assert isinstance(saved.sampler, Multistep)
    steps, stock, t_min = saved.sampler.max_steps, stock_steps(saved), saved.model.t_min
    classes = saved.network.label_dim
    names = ", ".join(saved.class_names[:20]) + (", ..." if len(saved.class_names) > 20 else "")
    needs = f"`pip install 'onejump[diffusers]'`, for {why_not}" if why_not else "`pip install diffusers` and no more"
    example = [
        f"from diffusers import {PIPELINE}",
        *([f"import {PLACE}  # its network"] if why_not else []),
        f"pipe = {PIPELINE}.from_pretrained(FOLDER)",
        f"image = pipe(num_inference_steps=1{', class_labels=[0]' if classes else ''}).images[0]",
    ]
    times = ", ".join(f"{t:g}" for t in saved.sampler.times(steps))
    of_its_own = f"; the stock pipeline's are these for {stock}, and `OneJumpPipeline` of `{PLACE}` has them for all"
    facts = [
        f"Its times (noise levels) for 1 to {steps} steps are {times}{of_its_own if stock < steps else ''}.",
        f"It was never trained below {t_min:g}, where the stock pipeline goes with 3 or more steps." if t_min else "",
        f"Classes: {names or f'0 to {classes - 1}'}." if classes else "",
        f"Licence of the weights: {saved.licence}." if saved.licence else "",
        f"Average of the weights of training: {saved.ema}." if saved.ema else "",
    ]
    lines = [
        *("---", "library_name: diffusers", "pipeline_tag: unconditional-image-generation"),
        *(f"{key}: {value}" for key, value in licence_on_hub(saved.licence).items()),
        "---",
        *(f"# A consistency model: {side}x{side} images of {channels} channel{'s' * (channels > 1)}", ""),
        *(f"Written by onejump {__version__}. It needs {needs}.", "", "```python", *example, "```", ""),
        *(f"* {fact}" for fact in facts if fact),
    ]
    return "\n".join(lines) + "\n"
