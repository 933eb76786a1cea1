"""diffusers itself makes our images from what we export, and what it saves we read."""

import importlib
import json

import pytest
import torch
from exporters.diffusers_setup import NETWORKS, OPENAI, STOCK, classes_of, images_of, noise_of, saved_model
from networks.network_setup import golden, recipe, relative_error

from onejump.exporters.diffusers_folder import export_diffusers
from onejump.importers.diffusers_folder import read
from onejump.importers.openai import read_openai
from onejump.importers.use import Given
from onejump.networks import ADMUNetConfig
from onejump.networks.diffusers_config import unet_config
from onejump.networks.diffusers_weights import to_unet
from onejump.precond import CM, ToData
from onejump.saved import load_model
from onejump.types import UserError

diffusers = pytest.importorskip("diffusers")
OneJumpPipeline = importlib.import_module("onejump.exporters.onejump_unet").OneJumpPipeline


def loaded(folder, pipeline=None):
    pipe = (pipeline or diffusers.ConsistencyModelPipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(pipe, saved, steps, n=3):
    """From the same noise as images_of."""
    generator = torch.Generator().manual_seed(0)
    labels = classes_of(saved, n)
    return pipe(n, labels, steps, generator=generator, output_type="pt").images


@pytest.mark.parametrize("name", NETWORKS)
def test_the_stock_pipeline_makes_our_images_in_one_and_two_steps(name, tmp_path):
    saved = saved_model(NETWORKS[name])
    export_diffusers(saved, tmp_path)
    pipe = loaded(tmp_path)
    assert (type(pipe.unet) is diffusers.UNet2DModel) == (name in STOCK)
    for steps in (1, 2):
        assert (stock_images(pipe, saved, steps) - images_of(saved, steps)).abs().max() < 1e-5, steps


@pytest.mark.parametrize("jump", [CM(), CM(0.003), ToData()], ids=str)
@pytest.mark.parametrize("mid", [0.15, 0.4, 0.821, 30.0])
def test_the_stock_pipelines_second_step_starts_at_the_models_time(jump, mid, tmp_path):
    saved = saved_model(jump=jump, mid=(mid,))
    export_diffusers(saved, tmp_path)
    scheduler = diffusers.CMStochasticIterativeScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(2)
    assert scheduler.sigmas.tolist() == pytest.approx([80, mid, jump.sigma_min], rel=1e-6, abs=0)


@pytest.mark.parametrize("name, heads", [("imagenet64", 32), ("lsun", 16)])
def test_openais_weights_give_openais_output_in_diffusers_unet(name, heads, tmp_path):
    z = golden("openai_unet.npz")
    z = {key.removeprefix(f"{name}/"): value for key, value in z.items() if key.startswith(f"{name}/")}
    shapes = [tuple(map(int, shape.split("x"))) for shape in z["shapes"].tolist()]
    weights = {key: recipe(key, shape) for key, shape in zip(z["names"].tolist(), shapes, strict=True)}
    imported = read_openai(tmp_path / f"{name}.pt", weights, Given(method="cm", head_channels=heads))
    imported.save(tmp_path / "ours")
    export_diffusers(load_model(tmp_path / "ours"), tmp_path / "theirs")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "theirs/unet")
    labels = torch.as_tensor(z["in/y"]) if "in/y" in z else None
    with torch.no_grad():
        out = unet(z["in/x"], z["in/timesteps"], labels).sample
    assert relative_error(out, z["out/f32"]) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        ADMUNetConfig(label_dim=1000),
        ADMUNetConfig(256, 3, 0, 256, (1, 1, 2, 2, 4, 4), 2, scale_shift=False, min_group=1, noise_scale=1000.0),
        ADMUNetConfig(32, 3, 0, 64, (1, 2), 2, (16,), min_group=1, resample="conv"),
        ADMUNetConfig(32, 3, 5, 64, (1,), 2, (), min_group=1),
    ],
    ids=["imagenet64", "lsun256", "conv", "one level"],
)
def test_every_tensor_of_full_networks_has_its_name_and_shape_in_diffusers_unet(config):
    with torch.device("meta"):
        theirs, ours = diffusers.UNet2DModel(**unet_config(config)).state_dict(), config.build().state_dict()
        if config.noise_scale != 1000:
            ours["map_layer0.weight"] = torch.zeros(ours["map_layer0.weight"].shape, device="cpu")
    named = {name: tensor.shape for name, tensor in to_unet(config, ours).items()}
    assert named == {name: tensor.shape for name, tensor in theirs.items()}


@pytest.mark.parametrize("name", ["openai", "few groups"])
def test_our_pipeline_samples_at_the_models_own_times(name, tmp_path):
    saved = saved_model(NETWORKS[name], mid=(5.0, 2.0), t_min=1.5)
    export_diffusers(saved, tmp_path)
    pipe = loaded(tmp_path, OneJumpPipeline)
    for steps in (1, 2, 3):
        made = pipe(3, steps, classes_of(saved), noise=noise_of(saved, steps), output_type="pt").images
        assert (made - images_of(saved, steps)).abs().max() < 1e-5, steps
    with pytest.raises(UserError, match="steps: 4"):
        pipe(1, 4)
    generator = torch.Generator()
    first, again, other = (
        pipe(2, 2, generator=generator.manual_seed(seed), output_type="np").images for seed in (7, 7, 8)
    )
    assert (first == again).all() and not (first == other).any()
    picture = pipe(2, class_labels=[4, 4], generator=generator.manual_seed(1)).images[1]
    side = saved.network.img_resolution
    assert picture.size == (side, side) and picture.mode == ("RGB" if saved.network.img_channels == 3 else "L")
    with pytest.raises(UserError, match="class_labels: 10"):
        pipe(2, class_labels=10)


def test_our_times_and_weights_outlive_being_saved_by_diffusers(tmp_path):
    """Without onejump.json a refitted network comes back as one of OpenAI's form, with the same images."""
    saved = saved_model(NETWORKS["edm"], mid=(5.0, 2.0), t_min=1.5)
    export_diffusers(saved, tmp_path / "ours")
    loaded(tmp_path / "ours", OneJumpPipeline).save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs/onejump.json").exists()
    back = read(tmp_path / "theirs")
    assert (back.sampler, back.t_min, back.network.noise_scale) == (saved.sampler, 1.5, 1000)
    back.save(tmp_path / "again")
    for steps in (1, 3):
        assert (images_of(load_model(tmp_path / "again"), steps) - images_of(saved, steps)).abs().max() < 1e-5


FOREIGN = {
    "block": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "attention_head_dim": 16,
        "num_class_embeds": 4,
    },
    "conv": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
    },
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_consistency_model_that_diffusers_saved_is_read(name, tmp_path):
    """Also its unet's folder alone, and its second step is the stock pipeline's."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=8, layers_per_block=1, block_out_channels=(32, 64), **FOREIGN[name])
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    diffusers.ConsistencyModelPipeline(unet, scheduler).save_pretrained(tmp_path / "theirs")
    imported = read(tmp_path / "theirs")
    assert imported.jump == CM() and imported.network.resample == name
    imported.save(tmp_path / "ours")
    saved = load_model(tmp_path / "ours")
    pipe = loaded(tmp_path / "theirs")
    for steps in (1, 2):
        ours = saved.sampler(saved.model, noise_of(saved, steps), steps, classes_of(saved))
        assert (stock_images(pipe, saved, steps) - (ours / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5
    assert read(tmp_path / "theirs/unet").network == imported.network


def test_a_diffusion_model_of_diffusers_is_refused_by_name(tmp_path):
    unet = diffusers.UNet2DModel(
        8,
        layers_per_block=1,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="DDPMPipeline; ConsistencyModelPipeline is read"):
        read(tmp_path)
    with pytest.raises(UserError, match="DDPMScheduler; CMStochasticIterativeScheduler is read"):
        read(tmp_path / "unet")


def test_the_exported_folder_of_a_stock_unet_names_nothing_of_ours(tmp_path):
    export_diffusers(saved_model(OPENAI), tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {part[0] for name, part in index.items() if name[0] != "_"} == {"diffusers"}
