"""What is exported to diffusers comes back to the bit, and what is not understood is refused in one line."""

import json

import pytest
import torch
from exporters.diffusers_setup import NETWORKS, OPENAI, STOCK, saved_model
from safetensors.torch import load_file, save_file

from onejump.exporters.diffusers_folder import export_diffusers, rho_for
from onejump.importers.diffusers_folder import read
from onejump.networks import ADMUNetConfig, MLPConfig
from onejump.networks.diffusers_config import adm_config, unet_config
from onejump.networks.diffusers_weights import time_features
from onejump.precond import CM, Euler
from onejump.samplers import ODE
from onejump.types import UserError


def rewrite(file, **changes):
    """A value of ... takes the field away."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def assert_same_weights(imported, saved):
    ours = saved.model.net.state_dict()
    assert set(imported.weights) == set(ours)
    for name, tensor in ours.items():
        back = imported.weights[name]
        assert back.dtype == tensor.dtype and torch.equal(back, tensor), name


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_comes_back_to_the_bit(name, tmp_path):
    saved = saved_model(NETWORKS[name], mid=(5.0, 2.0), t_min=1.5)
    export_diffusers(saved, tmp_path)
    back = read(tmp_path)
    assert_same_weights(back, saved)
    for field in ("network", "sampler", "shape", "class_names", "licence", "ema"):
        assert getattr(back, field) == getattr(saved, field)
    for field in ("t_min", "precond", "jump"):
        assert getattr(back, field) == getattr(saved.model, field)
    assert back.as_saved({"imported_from": "folder"}).provenance.items() >= {"stage": "stage2"}.items()
    assert read(tmp_path / "model_index.json").network == read(tmp_path / "unet").network == saved.network
    assert not list(tmp_path.rglob(".*")), "no drafts are left"


@pytest.mark.parametrize("name", ["openai", "lsun"])
def test_openais_form_comes_back_without_our_additions(name, tmp_path):
    """As from a folder of diffusers' own; its second step is then the scheduler's, at the model's time all the same."""
    saved = saved_model(STOCK[name], mid=(5.0, 2.0))
    export_diffusers(saved, tmp_path)
    (tmp_path / "onejump.json").unlink()
    rewrite(tmp_path / "scheduler/scheduler_config.json", _onejump=...)
    back = read(tmp_path)
    assert_same_weights(back, saved)
    assert (back.network, back.jump) == (saved.network, saved.model.jump)
    assert back.sampler.times(2) == pytest.approx([80, 5], rel=1e-9)


def test_a_folder_named_as_published_has_the_published_second_step(tmp_path):
    export_diffusers(saved_model(OPENAI), tmp_path / "cd_imagenet64_l2-mine")
    rewrite(tmp_path / "cd_imagenet64_l2-mine/scheduler/scheduler_config.json", _onejump=...)
    assert read(tmp_path / "cd_imagenet64_l2-mine").sampler.mid != (1.3824,)
    export_diffusers(saved_model(OPENAI), tmp_path / "diffusers-cd_imagenet64_l2")
    rewrite(tmp_path / "diffusers-cd_imagenet64_l2/scheduler/scheduler_config.json", _onejump=...)
    assert read(tmp_path / "diffusers-cd_imagenet64_l2").sampler.mid == (1.3824,)
    cached = tmp_path / "models--openai--diffusers-cd_imagenet64_l2" / "snapshots" / "0123abcd"  # the Hub's cache
    cached.parent.mkdir(parents=True)
    (tmp_path / "diffusers-cd_imagenet64_l2").rename(cached)
    assert read(cached).sampler.mid == (1.3824,)


def test_diffusers_bin_file_and_half_precision_are_read(tmp_path):
    saved = saved_model(OPENAI)
    export_diffusers(saved, tmp_path)
    (tmp_path / "onejump.json").unlink()
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    file.unlink()
    torch.save(weights, file.with_suffix(".bin"))
    assert_same_weights(read(tmp_path), saved)
    save_file({name: tensor.half() for name, tensor in weights.items()}, file)
    halved = saved_model(OPENAI)
    halved.model.net.half().float()
    assert_same_weights(read(tmp_path), halved)
    assert "float16" in read(tmp_path).facts["precision"]


@pytest.mark.parametrize("config", [*STOCK.values(), ADMUNetConfig(label_dim=1000), ADMUNetConfig(attn_resolutions=())])
def test_a_configuration_comes_back_from_diffusers_fields(config):
    """All that diffusers has a field for."""
    back = adm_config(json.loads(json.dumps(unet_config(config))))
    assert unet_config(back) == unet_config(config)
    kept = ("img_resolution", "label_dim", "channel_mult", "attn_resolutions", "scale_shift", "resample", "num_blocks")
    assert all(getattr(back, field) == getattr(config, field) for field in kept)


WRONG = {
    "norm_eps=1e-06": {"norm_eps": 1e-6},
    "norm_num_groups=16": {"norm_num_groups": 16},
    "flip_sin_to_cos=False": {"flip_sin_to_cos": False},
    "time_embedding_type='fourier'": {"time_embedding_type": "fourier"},
    "class_embed_type='timestep'": {"class_embed_type": "timestep"},
    "attn_norm_num_groups=None": {"attn_norm_num_groups": None},
    "resnet_time_scale_shift='spatial'": {"resnet_time_scale_shift": "spatial"},
    "up_block_types=": {"up_block_types": ["ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"]},
    "down_block_types=": {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]},
    r"down_block_types=.*conv, resnet": {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]},
    "block_out_channels=": {"block_out_channels": [32, 48]},
    "block_out_channels='32'": {"block_out_channels": "32"},
    "attention_head_dim=24": {"attention_head_dim": 24},
    "layers_per_block=0": {"layers_per_block": 0},
    "layers_per_block=1000000000": {"layers_per_block": 10**9},
    r"up_block_types=\[\[\]": {"up_block_types": [[], {}]},
    "sample_size=None": {"sample_size": ...},
    "out_channels=6": {"out_channels": 6},
    "time_embedding_dim=64": {"time_embedding_dim": 64},
    "cross_attention_dim=768": {"cross_attention_dim": 768},
    "UNet2DConditionModel; UNet2DModel is read": {"_class_name": "UNet2DConditionModel"},
    "not the network of onejump.json": {"num_class_embeds": 7},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_network_of_another_form_is_refused_by_field_and_value(message, tmp_path):
    export_diffusers(saved_model(OPENAI), tmp_path)
    rewrite(tmp_path / "unet/config.json", **WRONG[message])
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/unet/config.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "network, message",
    [
        ({"type": "SongUNetConfig", "num_blocks": 10**9}, "num_blocks=1000000000"),
        ({"type": "SongUNetConfig", "model_channels": -4}, "model_channels=-4|negative"),
        ({"type": "MLPConfig"}, "MLPConfig is none of the networks"),
        ({"type": "Pipeline"}, "'Pipeline' is none of"),
        (None, "None is none of"),
    ],
)
def test_a_network_of_ours_that_cannot_be_is_refused(network, message, tmp_path):
    export_diffusers(saved_model(NETWORKS["song"]), tmp_path)
    rewrite(tmp_path / "unet/config.json", network=network)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/unet/config.json: ") and "\n" not in str(error.value)


SCHEDULES = {
    "EulerDiscreteScheduler; CMStoch": {"_class_name": "EulerDiscreteScheduler"},
    "s_noise=1.01": {"s_noise": 1.01},
    "sigma_min=90": {"sigma_min": 90},
    "rho=0": {"rho": 0},
    "num_train_timesteps='40'": {"num_train_timesteps": "40"},
    "beta_start=0.1": {"beta_start": 0.1},
    "_onejump cannot be read": {"_onejump": {"sampler": {"type": "ODE"}, "t_min": 0}},
}


@pytest.mark.parametrize("message", SCHEDULES)
def test_a_schedule_that_is_not_understood_is_refused_by_field_and_value(message, tmp_path):
    export_diffusers(saved_model(OPENAI), tmp_path)
    rewrite(tmp_path / "scheduler/scheduler_config.json", **SCHEDULES[message])
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    export_diffusers(saved_model(OPENAI), tmp_path)
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"conv_in.bias": torch.zeros(32)}, file)
    with pytest.raises(UserError, match="onejump.json: it is of other weights"):
        read(tmp_path)
    (tmp_path / "onejump.json").unlink()
    for changed, message in [
        (weights | {"more.weight": torch.zeros(2)}, "more.weight"),
        (
            {name: w for name, w in weights.items() if name != "mid_block.attentions.0.to_k.bias"},
            "attentions.0.to_k.bias",
        ),
        (weights | {"conv_in.bias": torch.zeros(31)}, r"enc.8x8_conv.bias has shape \(31,\)"),
    ]:
        save_file(changed, file)
        with pytest.raises(UserError, match=message):
            read(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors: cannot be read"):
        read(tmp_path)
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(UserError, match=r"no diffusion_pytorch_model.safetensors there, only .*fp16"):
        read(tmp_path)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="no model_index.json of a pipeline"):
        read(tmp_path)
    (tmp_path / "model_index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="no JSON"):
        read(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="StableDiffusionPipeline; ConsistencyModelPipeline is read"):
        read(tmp_path)


def test_what_the_pipeline_cannot_sample_is_not_exported(tmp_path):
    two_times = ADMUNetConfig(8, 3, 0, 32, (1, 2), 1, (4,), second_time="zero")
    for saved, message in [
        (saved_model(two_times), "second_time: zero"),
        (saved_model(OPENAI, jump=Euler()), "jump: Euler"),
        (saved_model(OPENAI, sampler=ODE()), "sampler: ODE"),
        (saved_model(OPENAI, jump=CM(sigma_data=0.7)), r"jump.sigma_data: 0.7"),
        (saved_model(OPENAI, mid=(0.5,), t_min=1.0), "times: 0.5 is below t' = 1"),
    ]:
        with pytest.raises(UserError, match=message):
            export_diffusers(saved, tmp_path)
    network = MLPConfig((1, 8, 8))
    flat = saved_model(OPENAI)
    object.__setattr__(flat, "network", network)
    with pytest.raises(UserError, match="network: MLPConfig"):
        export_diffusers(flat, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_folders_card_says_what_it_needs_and_where_it_ends(tmp_path):
    saved = saved_model(OPENAI, mid=(5.0, 2.0), t_min=1.5)
    export_diffusers(saved, tmp_path)
    text = (tmp_path / "README.md").read_text()
    for words in (
        "1 to 3 steps are 80, 5, 2;",
        "never trained below 1.5",
        "Classes: class 0, class 1",
        "CC BY 4.0",
        "\nlicense: cc-by-4.0\n",
    ):
        assert words in text
    assert "pip install diffusers` and no more" in text and "import onejump" not in text
    export_diffusers(saved_model(NETWORKS["song"]), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "onejump[diffusers]'`, for SongUNet is not" in text and "import onejump.exporters.onejump_unet" in text


@pytest.mark.parametrize("sigma_min", [0.0, 0.002])
@pytest.mark.parametrize("mid", [0.003, 0.15, 0.4, 0.4000001, 0.821, 30.0, 78.0])
def test_rho_puts_the_middle_of_the_grid_at_the_second_step(mid, sigma_min):
    rho = rho_for(mid, sigma_min, 80.0)
    middle = (80 ** (1 / rho) / 2 + sigma_min ** (1 / rho) / 2) ** rho
    assert middle == pytest.approx(mid, rel=1e-6)


@pytest.mark.parametrize("channels, scale", [(32, 1.0), (192, 1.0), (192, 0.5), (64, 100.0)])
def test_refitted_features_of_the_noise_level_are_ours(channels, scale):
    """At random noise levels, none of them a node of the fit, and with weights that do not amplify rounding."""
    found, error = time_features(ADMUNetConfig(model_channels=channels, noise_scale=scale))
    w = torch.tensor(1e-4, dtype=torch.float64) ** (torch.arange(channels // 2, dtype=torch.float64) * 2 / channels)
    c_noise = torch.empty(500, 1, dtype=torch.float64).uniform_(0.002, 80).log() / 4
    theirs, ours = (torch.cat([(k * c_noise * w).cos(), (k * c_noise * w).sin()], 1) for k in (1000, scale))
    assert (theirs @ found - ours).abs().max() <= 1.01 * error < 2e-8
    assert found.abs().sum(0).max() < 4
