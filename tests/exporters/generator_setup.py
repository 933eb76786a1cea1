"""Small models with weights that anyone can rebuild, and their images by the sampler itself."""

import sys
from pathlib import Path

import torch

from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.precond import CM
from onejump.samplers import Multistep
from onejump.saved import SavedModel

sys.path.append(str(Path(__file__).parent.parent / "networks"))
from network_setup import lively

MLP = MLPConfig(shape=(1, 4, 4), label_dim=3, width=16, depth=1, dropout=0.5)
SHALLOW = dict(img_resolution=4, label_dim=3, model_channels=8, channel_mult=(1, 1), num_blocks=0, dropout=0.5)


def saved_model(network, sampler=None, jump=None, t_min=0.0):
    """Left in train mode, so that dropout would show."""
    net = lively(network, torch.float32).requires_grad_(False)
    model = ConsistencyModel(net, jump=jump or CM(), t_min=t_min, second_time=network.second_time != "off").train()
    channels = 1 if isinstance(network, MLPConfig) else network.img_channels
    names = tuple("abc"[: network.label_dim])
    return SavedModel(model, network, sampler or Multistep(), (channels, 4, 4), names, licence="CC0-1.0")


def noise_and_classes(saved, steps, batch):
    """Other noise than the exporters check with."""
    g = torch.Generator().manual_seed(batch)
    noise = torch.randn(*([steps] if steps > 1 else []), batch, *saved.shape, generator=g)
    return noise, torch.randint(saved.network.label_dim, (batch,), generator=g)


@torch.no_grad()
def images_of(saved, steps, noise, classes):
    """Clamped; few of them by the clamp, and not the same for every class."""
    saved.model.eval()
    draws = noise if steps > 1 else noise[None]
    images = saved.sampler(saved.model, draws, steps, classes)
    assert (images.abs() < 1).float().mean() > 0.3
    assert not torch.allclose(images, saved.sampler(saved.model, draws, steps, (classes + 1) % 3), atol=1e-2)
    return images.clamp(-1, 1)


def largest(difference):
    return float(difference.abs().max())
