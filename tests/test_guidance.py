"""Guidance against its formula, and as a teacher's."""

import dataclasses

import pytest
import torch
from saved_setup import saved_model
from torch import nn

from onejump.guidance import NO_LABEL, autoguided, guide_of, guided, guided_sha256, unlabelled
from onejump.model import ConsistencyModel
from onejump.networks import EDM2UNetConfig, MLPConfig, SongUNetConfig
from onejump.precond import CM, EDM, ToData
from onejump.samplers import ODE, ode
from onejump.saved import save_model
from onejump.solvers import denoiser, heun
from onejump.types import UserError

SMALL = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (4,)}
NETWORKS = {
    "mlp": MLPConfig(shape=(3, 4, 4), label_dim=3, width=32, depth=1),
    "ddpmpp": SongUNetConfig(4, 3, 3, **SMALL),
    "edm2": EDM2UNetConfig(img_resolution=4, label_dim=3, **SMALL, channels_per_head=8),
}
T = torch.tensor([0.05, 1.0, 40.0])


def diffusion(config, seed=0, sigma_data=0.5):
    torch.manual_seed(seed)
    net = config.build()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return ConsistencyModel(net, EDM(sigma_data)).eval().requires_grad_(False)


def samples():
    return torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * (1 + T).view(-1, 1, 1, 1)


@pytest.mark.parametrize("config", NETWORKS.values(), ids=list(NETWORKS))
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guidance_moves_the_denoiser_along_what_the_label_tells(config, scale):
    model, x, cond = diffusion(config), samples(), torch.tensor([2, 0, 1])
    D_0, D_1 = model.denoise(x, T), model.denoise(x, T, cond=cond)
    assert (D_1 - D_0).abs().max() > 0.01
    found = guided(model, scale).denoise(x, T, cond=cond)
    torch.testing.assert_close(found, D_0 + scale * (D_1 - D_0), atol=2e-5, rtol=1e-5)


def test_both_passes_are_one_call_of_twice_the_batch():
    class Counted(nn.Module):
        calls = ()

        def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
            self.calls += (tuple(cond.tolist()),)
            return x

    net = Counted()
    guided(ConsistencyModel(net), 2.0).denoise(samples(), T, cond=torch.tensor([2, 0, 1]))
    assert net.calls == ((NO_LABEL, NO_LABEL, NO_LABEL, 2, 0, 1),)


def test_null_takes_the_place_of_a_text():
    """Without text a network is told of the empty one, the same for every sample."""

    class Reads(nn.Module):
        def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
            return x * cond.mean((1, 2)).view(-1, 1, 1, 1)

    null, cond, x = torch.ones(2, 5), torch.full((3, 2, 5), 3.0), samples()
    model = ConsistencyModel(Reads())
    found = guided(model, 6.0, null).denoise(x, T, cond=cond)
    D_0, D_1 = (model.denoise(x, T, cond=c) for c in (null.expand(3, 2, 5), cond))
    torch.testing.assert_close(found, D_0 + 6 * (D_1 - D_0), atol=1e-4, rtol=1e-5)


def test_the_labels_of_augmentation_stay():
    cond = torch.tensor([[0.0, 1.0, 0.5, -2.0]])
    assert unlabelled(cond, 2).tolist() == [[0, 0, 0.5, -2]]
    assert unlabelled(cond).tolist() == [[0, 0, 0, 0]] and cond[0, 1] == 1
    config = dataclasses.replace(NETWORKS["ddpmpp"], augment_dim=2)
    model, x = diffusion(config), samples()
    cond = torch.tensor([[0, 0, 1, 0.5, -1], [1, 0, 0, 0.2, 0.1], [0, 1, 0, 0, 0.7]])
    without = cond.clone()
    without[:, :3] = 0
    D_0, D_1 = (model.denoise(x, T, cond=c) for c in (without, cond))
    found = guided(model, 2.0, classes=3).denoise(x, T, cond=cond)
    torch.testing.assert_close(found, 2 * D_1 - D_0, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("guide_classes", [3, 0])
def test_autoguidance_moves_away_from_the_worse_model(guide_classes):
    model, cond, x = diffusion(NETWORKS["mlp"]), torch.tensor([2, 0, 1]), samples()
    guide = diffusion(dataclasses.replace(NETWORKS["mlp"], width=24, label_dim=guide_classes), seed=5)
    D_1, D_0 = model.denoise(x, T, cond=cond), guide.denoise(x, T, cond=cond if guide_classes else None)
    both = autoguided(model, guide, 1.7, guide_reads=guide_classes > 0)
    torch.testing.assert_close(both.denoise(x, T, cond=cond), D_0 + 1.7 * (D_1 - D_0), atol=2e-5, rtol=1e-5)


def test_a_guided_model_is_a_teacher_and_samples():
    """One step of the ODE and a whole one follow the guided denoiser; scale 1 follows the model's own."""
    model, cond, x = diffusion(NETWORKS["mlp"]), torch.tensor([2, 0, 1]), samples()
    both = guided(model, 3.0)

    def D(x, t):
        return 3 * model.denoise(x, t, cond=cond) - 2 * model.denoise(x, t)

    torch.testing.assert_close(heun(denoiser(both, cond), x, T, T / 2), heun(D, x, T, T / 2), atol=1e-4, rtol=1e-4)
    own = (ode(m, x, [80.0, 4.0, 0.5], cond) for m in (guided(model, 1.0), model))
    torch.testing.assert_close(next(own), next(own), atol=1e-3, rtol=1e-4)
    assert list(both.parameters()) == list(model.parameters()) and not both.training


def test_half_precision_rounds_the_network_alone():
    """The difference is taken in float32, or a large scale would magnify the rounding of the sum."""
    model, cond, x = diffusion(NETWORKS["mlp"]), torch.tensor([2, 0, 1]), samples()
    exact = guided(model, 1.0).denoise(x, T, cond=cond)
    model.autocast = torch.bfloat16
    both = guided(model, 1.0)
    assert both.autocast is torch.bfloat16
    found = both.denoise(x, T, cond=cond)
    assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 0.05


def test_guided_networks_keep_their_blocks_for_the_engine():
    net, guide = (diffusion(NETWORKS["ddpmpp"], seed) for seed in (0, 1))
    assert guided(net, 2.0).net.blocks == list(net.net.blocks)
    assert autoguided(net, guide, 2.0).net.blocks == [*net.net.blocks, *guide.net.blocks]


def test_consistency_models_are_not_guided():
    for bad in ({"jump": CM()}, {"t_min": 1.0}, {"second_time": True}):
        model = ConsistencyModel(nn.Identity(), **bad)
        with pytest.raises(UserError, match="diffusion models alone"):
            guided(model, 2.0)
        with pytest.raises(UserError, match="diffusion models alone"):
            autoguided(ConsistencyModel(nn.Identity()), model, 2.0)


def test_mistakes_with_a_scale_or_without_labels_are_one_line():
    model = diffusion(NETWORKS["mlp"])
    with pytest.raises(UserError, match="guidance: -1; 0 or more"):
        guided(model, -1.0)
    with pytest.raises(UserError, match="cond: guidance compares"):
        guided(model, 2.0).denoise(samples(), T)
    with pytest.raises(UserError, match="guide: its precond is EDM.sigma_data=0.7."):
        autoguided(model, diffusion(NETWORKS["mlp"], sigma_data=0.7), 2.0)


def teacher(network=NETWORKS["mlp"], shape=(3, 4, 4), sampler=None):
    names = tuple("abc")[: network.label_dim]
    saved = saved_model(network, names, sampler or ODE(steps=3))
    return dataclasses.replace(saved, model=ConsistencyModel(saved.model.net, EDM(), ToData()).eval(), shape=shape)


def test_files_guide_and_say_what_they_are(tmp_path):
    saved = teacher()
    save_model(tmp_path / "guide", teacher(dataclasses.replace(NETWORKS["mlp"], width=24, label_dim=0)))
    assert guide_of(saved, "m", 1.0) is saved
    x, cond = samples(), torch.tensor([2, 0, 1])
    by_label, by_file = (guide_of(saved, "m", 2.0, guide).model for guide in (None, tmp_path / "guide"))
    both = [m.denoise(x, T, cond=cond) for m in (by_label, by_file, saved.model)]
    assert all((a - b).abs().max() > 0.01 for a, b in zip(both, both[1:] + both[:1], strict=True))
    marks = {guided_sha256("0" * 64, *how) for how in ((1.0,), (2.0,), (3.0,), (2.0, tmp_path / "guide"))}
    assert len(marks) == 4 and "0" * 64 in marks


def test_files_that_cannot_be_guided_or_guide_are_named(tmp_path):
    save_model(tmp_path / "jumps", saved_model(NETWORKS["mlp"], tuple("abc")))
    save_model(tmp_path / "two", teacher(dataclasses.replace(NETWORKS["mlp"], label_dim=2)))
    save_model(tmp_path / "wide", teacher(dataclasses.replace(NETWORKS["mlp"], shape=(3, 8, 8)), (3, 8, 8)))
    for name, told in (("jumps", "a consistency model"), ("two", "2 classes"), ("wide", "images of 3x8x8")):
        with pytest.raises(UserError, match=f"--guide .*{name}: .*{told}"):
            guide_of(teacher(), "m", 2.0, tmp_path / name)
    with pytest.raises(UserError, match="m: a consistency model"):
        guide_of(saved_model(NETWORKS["mlp"], tuple("abc")), "m", 2.0)
    with pytest.raises(UserError, match="m: it knows no classes to guide by"):
        guide_of(teacher(dataclasses.replace(NETWORKS["mlp"], label_dim=0)), "m", 2.0)
