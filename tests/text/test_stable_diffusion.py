"""A Stable Diffusion folder as teacher: its guided steps are diffusers' own, the student starts as its denoiser."""

import json

import pytest
import torch
from tiny_stable_diffusion import LEVELS, TOKENS, WIDTH, changed_folder, diffusers, tiny_folder, unet

from onejump.config_json import from_json, to_json
from onejump.data.text_parts import text_encoder
from onejump.guidance import guided
from onejump.importers.stable_diffusion import open_model, open_sha256, read_stable_diffusion
from onejump.methods.base import two_samples
from onejump.recipes.text import at_levels, cd_sd15, tcm_sd15
from onejump.solvers import denoiser, euler
from onejump.start import Start, starting_model
from onejump.types import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def embeddings():
    return text_encoder(tiny_folder(), CPU)(["a dog", "robot", ""])


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_guided_step_is_diffusers_own_scheduler_step(prediction, embeddings, tmp_path):
    folder = changed_folder(tmp_path, "scheduler/scheduler_config.json", prediction_type=prediction)
    theirs = diffusers.EulerDiscreteScheduler(**LEVELS, prediction_type=prediction)
    theirs.set_timesteps(10)
    text, null, net, scale = embeddings[:2], embeddings[2:].expand(2, -1, -1), unet(), 6.0
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * theirs.init_noise_sigma
    saved = read_stable_diffusion(folder)
    denoise = denoiser(guided(saved.model, scale, embeddings[2]), text)
    for k, time in enumerate(theirs.timesteps):
        t, r = (theirs.sigmas[i].expand(2) for i in (k, k + 1))
        ours = euler(denoise, x, t, r)
        seen = theirs.scale_model_input(x, time)
        without, of_text = net(torch.cat([seen, seen]), time, torch.cat([null, text])).sample.chunk(2)
        x = theirs.step(without + scale * (of_text - without), time, x).prev_sample
        assert (ours - x).abs().max() <= 1e-4 * x.abs().max(), k


@torch.no_grad()
def test_embeddings_are_those_of_diffusers_pipeline(embeddings):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        tiny_folder(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    text, null = pipe.encode_prompt(["a dog", "robot"], CPU, 1, True)
    torch.testing.assert_close(torch.cat([text, null[:1]]), embeddings, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tcm-sd15", "cd-sd15"])
def test_the_student_starts_as_the_teachers_denoiser(name, embeddings):
    saved = read_stable_diffusion(tiny_folder())
    recipe = {"tcm-sd15": tcm_sd15, "cd-sd15": cd_sd15}[name]()
    recipe = at_levels(recipe, saved.network, saved.model.precond)
    stage = next(iter(recipe.stages))
    student = starting_model(recipe, stage, Start(tiny_folder(), open_sha256(tiny_folder()), True)).eval()
    t = torch.tensor([0.0292, 1.0, 14.6])
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * t.view(-1, 1, 1, 1)
    assert torch.equal(student(x, t, cond=embeddings), saved.model.denoise(x, t, cond=embeddings))


def test_distillation_takes_the_second_sample_from_the_guided_teacher(embeddings):
    """x_r is the solver's step from x_t, whatever the noise would have given."""
    saved = read_stable_diffusion(tiny_folder())
    recipe = at_levels(tcm_sd15(), saved.network, saved.model.precond)
    teacher = guided(saved.model, 6.0, embeddings[2])
    method = recipe.stages["stage2"].method
    nets = method.nets(open_model(tiny_folder()).model.requires_grad_(True), teacher)
    t = torch.tensor([14.6146, 3.0, 1.0])
    r = method.of.delta.r(t, 100_000)
    x0 = torch.randn(3, 4, 8, 8)
    xt, xr = two_samples(nets, x0, t, r, embeddings)
    D = teacher.denoise(xt, t, cond=embeddings)
    ratio = (r / t).view(-1, 1, 1, 1)
    torch.testing.assert_close(xr, ratio * xt + (1 - ratio) * D, rtol=1e-4, atol=1e-4)
    loss, stats = method.loss(nets, x0, embeddings, 100_000, 280_000)
    assert loss.requires_grad and stats["t"].min() == torch.tensor(method.of.t_prime)
    loss.backward()
    assert all(p.grad is None for p in saved.model.parameters())


def test_recipes_keep_to_the_levels_of_the_folder_and_survive_json(tmp_path):
    folder = changed_folder(tmp_path, "scheduler/scheduler_config.json", beta_end=0.02, prediction_type="v_prediction")
    saved = open_model(folder)
    for recipe in (tcm_sd15(), cd_sd15()):
        fitted = at_levels(recipe, saved.network, saved.model.precond)
        assert from_json(to_json(fitted)) == fitted
        for stage in fitted.stages.values():
            levels = stage.precond.schedule
            assert levels.beta_end == 0.02 and stage.precond.prediction == "v_prediction"
            assert stage.sampler.times(2) == [levels.sigma_max, levels.near(1.0)]
    stage2 = at_levels(tcm_sd15(), saved.network, saved.model.precond).stages["stage2"]
    assert stage2.method.of.t_prime == levels.near(1.0) and stage2.method.of.times.schedule == levels


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "Stable Diffusion XL is not supported"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "StableDiffusion3Pipeline; a folder of"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type='sample' is not supported"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ("scheduler/scheduler_config.json", {"beta_end": None}, "no noise levels can be made"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ("unet/config.json", {"cross_attention_dim": 24}, "text encoder gives embeddings of 16 numbers"),
        ("unet/config.json", {"layers_per_block": 2}, "no down_blocks.0.* which its config.json asks for"),
    ],
)
def test_folders_of_another_kind_are_refused_by_name(file, values, told, tmp_path):
    with pytest.raises(UserError, match=told):
        open_model(changed_folder(tmp_path, file, **values))


def test_folders_that_lack_something_are_refused(tmp_path):
    folder = changed_folder(tmp_path, "model_index.json")
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.safetensors: cannot be read"):
        open_model(folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="only config.json, diffusion_pytorch_model.bin"):
        open_model(folder)
    (folder / "vae").rename(folder / "vee")
    with pytest.raises(UserError, match="no vae there; fetch the whole folder"):
        open_model(folder)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"')
    with pytest.raises(UserError, match="model_index.json: no JSON"):
        open_model(folder)


def test_the_network_says_how_many_tokens_the_encoder_gives():
    saved = open_model(tiny_folder())
    assert (saved.network.tokens, saved.network.text_width, saved.shape) == (TOKENS, WIDTH, (4, 8, 8))
    assert json.loads(json.dumps(saved.provenance))["text_to_image"]["stable_diffusion"] == str(tiny_folder())
