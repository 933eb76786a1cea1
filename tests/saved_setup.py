"""Saved models of every network, small, and what it means that one came back."""

import dataclasses
import json

import torch

from onejump.generate import balanced_labels, generate
from onejump.model import ConsistencyModel
from onejump.networks import ADMUNetConfig, EDM2UNetConfig, MLPConfig, SongUNetConfig
from onejump.precond import CM, EDM
from onejump.samplers import Multistep, Trajectory
from onejump.saved import SavedModel

UNET = SongUNetConfig(8, 3, 2, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
SMALL = {"img_resolution": 8, "label_dim": 2, "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}
NETWORKS = {
    "ddpmpp": UNET,
    "ncsnpp": dataclasses.replace(UNET, variant="ncsnpp", fourier_scale=0.02, augment_dim=3),
    "adm": ADMUNetConfig(**SMALL, attn_resolutions=(4,), second_time="random"),
    "openai": ADMUNetConfig(**SMALL, attn_resolutions=(4,), min_group=1, noise_scale=1000.0, resample="conv"),
    "edm2": EDM2UNetConfig(**SMALL, attn_resolutions=(4,), channels_per_head=8),
    "mlp": MLPConfig(shape=(3, 8, 8), label_dim=2, width=8, depth=1),
}
TINY = MLPConfig(shape=(1, 2, 2), width=2, depth=1)
PLACES = ["model", "model.safetensors"]  # a folder, a single file


def saved_model(network=UNET, names=("cat", "dög"), sampler=None):
    torch.manual_seed(0)
    net = network.build()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    two_times = network.second_time != "off"
    model = ConsistencyModel(net, EDM(sigma_data=0.7), CM(sigma_data=0.7), 1.5, two_times)
    sampler = sampler or (Trajectory() if two_times else Multistep(mid=(2.0, 1.5)))
    shape = network.shape if isinstance(network, MLPConfig) else (3, 8, 8)
    about = {"stage": "stage2", "step": 7}
    return SavedModel(model, network, sampler, shape, names, about, "CC BY-NC-SA 4.0", "power sigma_rel 0.05")


def samples(saved, n=3):
    saved.model.eval()
    labels = balanced_labels(n, len(saved.class_names))
    return generate(saved.model, saved.sampler, 2, range(n), saved.shape, labels, seed=5)


def assert_same(back, saved):
    """Weights to the bit, and everything else."""
    before, after = saved.model.net.state_dict(), back.model.net.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
        assert before[name].contiguous().numpy().tobytes() == after[name].numpy().tobytes(), name
    for field in ("network", "sampler", "shape", "class_names", "provenance", "licence", "ema"):
        assert getattr(back, field) == getattr(saved, field)
    for field in ("t_min", "precond", "jump", "second_time"):
        assert getattr(back.model, field) == getattr(saved.model, field)
    assert not back.model.training and not any(p.requires_grad for p in back.model.parameters())


def rewrite(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))
