"""What a step of text-to-image training costs: passes of the guided teacher count twice, wherever they are counted."""

from dataclasses import replace

import torch
from tiny_stable_diffusion import TOKENS, WIDTH

from onejump.bench import bench, noise_images
from onejump.compare_cost import passes_of
from onejump.networks.text_unet import TextUNetConfig
from onejump.recipes.text import cd_sd15, tcm_sd15

SMALL = TextUNetConfig(8, 4, (8,), (True,), 1, (2,), WIDTH, TOKENS, norm_groups=4)


def test_a_step_is_six_passes():
    """3 of the student, 1 of the target, 2 of the teacher for one Euler step; 5 without guidance."""
    tcm, cd = tcm_sd15(), cd_sd15()
    assert [passes_of(tcm, stage) for stage in tcm.stages.values()] == [6, 6]
    assert [passes_of(cd, replace(cd.stages["cd"], guidance=scale)) for scale in (6.0, 1.0)] == [6, 5]


def test_bench_times_text_to_image_on_noise():
    recipe, changes = cd_sd15(), {"batch": 2, "micro_batch": 0, "precision": "fp32", "checkpointing": False}
    recipe = replace(recipe, network=SMALL, stages={"cd": replace(recipe.stages["cd"], **changes)})
    data = noise_images(recipe, 2)
    x0, text = data.batch(3, 2, seed=1)
    assert x0.shape == (2, 4, 8, 8) and text.shape == (2, TOKENS, WIDTH)
    order = [(data.latents == latent).flatten(1).all(1).nonzero().item() for latent in x0]
    assert sorted(order) == [0, 1] and torch.equal(text, data.text[order])
    (case,) = bench(recipe, data, torch.device("cpu"), plain=False, rounds=1)["cases"]
    assert case["name"] == "cd late" and case["rounds"][0]["passes"] == 2 * 6
    assert torch.tensor(case["loss"]).isfinite() and case["memory"] > 0
