"""timm itself is not needed here: a stand-in package holds two small models with timm's interface."""

import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from onejump.networks import ProjectedCriticConfig, TimmFeatures
from onejump.types import UserError


class Convnet(nn.Module):
    default_cfg = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0)}

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(c, 8, 2, 2) for c in (3, 8, 8, 8, 8))
        self.head = nn.Linear(8, 2)

    def forward_intermediates(self, x, indices, stop_early, intermediates_only):
        torch._assert(max(indices) < 5, f"feature index {max(indices)} is out of range")
        self.shown, maps = x, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [maps[i] for i in indices]


class Transformer(Convnet):
    """Every block's map has 1/16 of the image's side."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 16, 16, 16), *(nn.Conv2d(16, 16, 1) for _ in range(4))])


@pytest.fixture
def timm(monkeypatch):
    models = {"convnet": Convnet, "transformer": Transformer}
    package = types.ModuleType("timm")
    package.__version__ = "0"
    package.is_model = lambda name: name in models
    package.create_model = lambda name, pretrained: models[name]() if pretrained is False else None
    monkeypatch.setitem(sys.modules, "timm", package)
    return package


def saved(path, model):
    save_file(model.state_dict(), path)
    return str(path)


def test_maps_are_those_of_the_stored_weights_on_normalised_images(timm, tmp_path):
    model, x = Convnet(), torch.rand(2, 3, 224, 224)
    network = TimmFeatures("convnet", saved(tmp_path / "w", model)).build()
    x_norm = (x - torch.tensor([0.5, 0.25, 0.0]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 1.0]).view(3, 1, 1)
    expected = model.forward_intermediates(x_norm, (1, 2, 3, 4), True, True)
    assert all(torch.equal(a, b) for a, b in zip(network(x), expected, strict=True))


def test_a_transformers_maps_become_a_pyramid(timm, tmp_path):
    model = Transformer()
    network, x = (
        TimmFeatures("transformer", saved(tmp_path / "w", model), (0, 2, 3, 4)).build(),
        torch.rand(1, 3, 224, 224),
    )
    maps = network(x)
    assert [m.shape[1:] for m in maps] == [(2, 56, 56), (4, 28, 28), (8, 14, 14), (16, 7, 7)]
    with torch.no_grad():
        network.model.stages[3].weight.zero_()
    unchanged = [torch.equal(a, b) for a, b in zip(maps, network(x), strict=True)]
    assert unchanged == [True, True, False, False]


def test_a_critic_of_both_has_16_logits_a_scale_and_trains_its_own_part_only(timm, tmp_path):
    features = (
        TimmFeatures("transformer", saved(tmp_path / "t", Transformer()), (1, 2, 3, 4)),
        TimmFeatures("convnet", saved(tmp_path / "c", Convnet())),
    )
    critic = ProjectedCriticConfig(features, width=4).build()
    logits = critic(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 2 * 4 * 16)
    logits.sum().backward()
    assert all((p.grad is None) == (".critics." not in name) for name, p in critic.named_parameters())


def test_mistakes_are_refused_in_one_line(timm, tmp_path, monkeypatch):
    path, damaged = saved(tmp_path / "w.safetensors", Convnet()), tmp_path / "damaged"
    damaged.write_bytes(b"nothing of the kind")
    for features, message in (
        (TimmFeatures("convnet", str(tmp_path / "gone")), f"^weights: no file {tmp_path / 'gone'}[^\n]*$"),
        (TimmFeatures("resnet", path), "^name: timm 0 has no model resnet[^\n]*$"),
        (TimmFeatures("transformer", path), f"^weights: {path} does not hold the weights of transformer: [^\n]*$"),
        (TimmFeatures("convnet", str(damaged)), f"^weights: {damaged} does not hold[^\n]*$"),
        (TimmFeatures("convnet", path, (1, 2, 3, 5)), "^layers: .*feature index 5[^\n]*$"),
    ):
        with pytest.raises(UserError, match=message):
            features.build()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="^features: convnet needs the package timm[^\n]*$"):
        TimmFeatures("convnet", path).build()
