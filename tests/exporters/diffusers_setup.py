"""Small models of every network that is exported to diffusers, and their images."""

from dataclasses import replace

import torch
from networks.network_setup import with_recipe_weights

from onejump.model import ConsistencyModel
from onejump.networks import ADMUNetConfig, EDM2UNetConfig, SongUNetConfig
from onejump.precond import CM, EDM, ToData
from onejump.samplers import Multistep
from onejump.saved import SavedModel

OPENAI = ADMUNetConfig(8, 3, 10, 32, (1, 2), 1, (4,), 0.0, head_channels=32, min_group=1, noise_scale=1000.0)
STOCK = {  # a UNet2DModel can be these
    "openai": OPENAI,
    "lsun": replace(OPENAI, label_dim=0, head_channels=16, scale_shift=False, resample="conv"),
    "edm": replace(OPENAI, attn_resolutions=(8,), noise_scale=1.0, dropout=0.1, dropout_resolution=4),
}
WRAPPED = {
    "few groups": replace(OPENAI, img_channels=1, model_channels=16, min_group=4, augment_dim=2),
    "song": SongUNetConfig(8, 1, 10, 32, (1, 2), 1, (4,)),
    "edm2": EDM2UNetConfig(8, 3, 0, 32, (1, 2), 1, (4,), channels_per_head=32),
}
NETWORKS = STOCK | WRAPPED


def saved_model(network=OPENAI, jump=None, mid=(0.821,), t_min=0.0, sampler=None):
    net = with_recipe_weights(network.build()).eval().requires_grad_(False)
    jump = jump or (CM() if network.label_dim else ToData())
    model = ConsistencyModel(net, EDM(), jump, t_min, network.second_time != "off")
    side = network.img_resolution
    names = tuple(f"class {i}" for i in range(network.label_dim))
    return SavedModel(
        *(model, network, sampler or Multistep(80.0, mid), (network.img_channels, side, side)),
        *(names, {"stage": "stage2"}, "CC BY 4.0", "constant 0.9999"),
    )


def noise_of(saved, steps, n=3, seed=0):
    """[steps, n, c, h, w], drawn as a pipeline draws it: one batch after the other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(n, *saved.shape, generator=generator) for _ in range(steps)])


def classes_of(saved, n=3):
    return torch.arange(n) + 1 if saved.network.label_dim else None


def images_of(saved, steps, n=3, seed=0):
    """In [0, 1], as diffusers returns them."""
    images = saved.sampler(saved.model, noise_of(saved, steps, n, seed), steps, classes_of(saved, n))
    assert (images.abs() < 1).float().mean() > 0.9, "most pixels are not clamped"
    return (images / 2 + 0.5).clamp(0, 1)
