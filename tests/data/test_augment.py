"""EDM's augmentation pipe: the published code's images and labels for its own draws, and what each transform means."""

import json
import math

import numpy as np
import pytest
import torch
from golden_data import golden

from onejump.config import Recipe, Stage
from onejump.config_json import from_json, to_json
from onejump.data.augment import WIDTHS, AugmentPipe, Seeded, resample, rotation, translation
from onejump.methods.dsm import DSM
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.overrides import apply_overrides
from onejump.samplers import ODE
from onejump.types import UserError

PRESET = AugmentPipe()
NONE = dict.fromkeys(WIDTHS, 0.0)
CASES = ("blit", "cifar_p0.12", "cifar_p1", "none_only_xflip")


class Replayed:
    """The recorded draws of one call, which must be asked for in their order."""

    def __init__(self, numbers: dict[str, np.ndarray], case: str):
        self.left = sorted(key for key in numbers if key.startswith(f"{case}/draw/"))
        self.numbers = numbers

    def next(self, kind: str, *shape: int) -> torch.Tensor:
        key = self.left.pop(0)
        assert key.endswith(f"_{kind}")
        return torch.from_numpy(self.numbers[key]).reshape(shape)

    def integers(self, below, n):
        return self.next("randint", n)

    def uniform(self, *shape):
        return self.next("rand", *shape)

    def normal(self, *shape):
        return self.next("randn", *shape)


def picture(n: int = 1, side: int = 32) -> torch.Tensor:
    """Smooth, so that reading between pixels is accurate, and without any symmetry."""
    y, x = torch.meshgrid(*[torch.arange(side) / side] * 2, indexing="ij")
    return torch.stack([(3 * x + y).sin(), (x - 2 * y).cos(), x * y])[None].expand(n, -1, -1, -1)


@pytest.mark.parametrize("case", CASES)
def test_images_and_labels_are_those_of_the_published_pipe(case):
    """Whole pixels and labels to the bit; between pixels to 1e-5 (3e-6 is seen: maps are float64 here)."""
    numbers = golden("augment")
    config = json.loads(str(numbers[f"{case}/config"]))
    pipe = AugmentPipe(**NONE | {name: float(config[name]) for name in (*WIDTHS, "p") if name in config})
    draws, x0 = Replayed(numbers, case), torch.from_numpy(numbers["images"])
    images, labels = pipe(x0, draws)
    assert not draws.left and pipe.width == labels.shape[1]
    assert torch.equal(labels, torch.from_numpy(numbers[f"{case}/out/labels"]))
    if case == "none_only_xflip":
        assert torch.equal(images, torch.where(labels.bool()[:, :, None, None], x0.flip(3), x0))
        return
    gap = (images - torch.from_numpy(numbers[f"{case}/out/images"])).abs().max()
    assert gap == 0 if case == "blit" else gap < 1e-5


def test_the_published_preset_is_the_default():
    numbers = golden("augment")
    config = json.loads(str(numbers["cifar_p0.12/config"]))
    assert AugmentPipe() == AugmentPipe(**NONE | {name: config[name] for name in (*WIDTHS, "p") if name in config})
    assert AugmentPipe().width == 9


def test_the_map_of_nothing_changes_nothing():
    x = torch.randn(3, 2, 16, 12, generator=torch.Generator().manual_seed(0))
    assert (resample(x, torch.eye(3).double().repeat(3, 1, 1)) - x).abs().max() < 5e-5


def test_maps_turn_and_shift_as_whole_pixels_do():
    """The map leads from the result back to the image, x to the right and y down; whole pixels are exact."""
    x = picture()
    turned = resample(x, rotation(torch.tensor([math.pi / 2])))
    inside = (slice(None), slice(None), slice(4, -4), slice(4, -4))  # what is mirrored at the border has a crease
    assert (turned - x.transpose(2, 3).flip(2))[inside].abs().max() < 0.02  # sym6 is not quite symmetric
    moved = resample(x, translation(*torch.tensor([[3.0], [-2.0]]).double()))
    assert (moved - x.roll((2, -3), (2, 3)))[inside].abs().max() < 1e-5


@pytest.mark.parametrize("name", WIDTHS)
def test_each_transform_is_applied_as_often_as_asked_and_its_labels_tell(name):
    """An image is changed where a label is not 0, and only there; labels 0 mean the image itself, to the bit."""
    x, n = picture(1, 16), 600
    images, labels = AugmentPipe(**NONE | {"p": 0.5, name: 0.6})(x.expand(n, -1, -1, -1), Seeded.of(1))
    told, changed = labels.any(1), (images != x).flatten(1).any(1)
    assert labels.shape == (n, WIDTHS[name]) and torch.equal(told, changed)
    nothing = {"xflip": 1 / 2, "yflip": 1 / 2, "rotate_int": 1 / 4, "translate_int": 1 / 16}.get(name, 0)
    expected = 0.3 * (1 - nothing)  # of those drawn, some come out as they are
    assert abs(changed.double().mean() - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


def test_draws_are_a_function_of_the_seed_alone():
    x, state = picture(20), torch.get_rng_state()
    one, two, other = (AugmentPipe()(x, Seeded.of(seed)) for seed in (5, 5, 6))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[1], other[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_an_untouched_image_keeps_its_bits_and_rows_do_not_mix():
    """Each image as if it were alone, although they share margins and a batch."""
    x = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images, labels = AugmentPipe(xflip=0)(x, Seeded.of(2))
    still = ~labels.any(1)
    assert 0 < still.sum() < 40 and torch.equal(images[still], x[still])
    again = x.clone()
    again[:20] = 0
    assert torch.equal(AugmentPipe(xflip=0)(again, Seeded.of(2))[0][20:], images[20:])


def unet(augment_dim: int) -> SongUNetConfig:
    return SongUNetConfig(8, 1, attn_resolutions=(4,), augment_dim=augment_dim)


def recipe_of(network, augment=PRESET):
    return Recipe("r", network, {"teacher": Stage(DSM(), 1, augment=augment, sampler=ODE())})


def test_a_network_that_does_not_read_the_labels_is_refused_before_training():
    assert recipe_of(unet(9)).stages["teacher"].augment.width == 9
    with pytest.raises(UserError, match=r"teacher.augment: 9 labels.* reads 0; give network.augment_dim=9, or .*none"):
        recipe_of(unet(0))
    with pytest.raises(UserError, match="teacher.augment: 6 labels.* reads 9; give network.augment_dim=6"):
        recipe_of(unet(9), AugmentPipe(aniso=0, yflip=0))
    with pytest.raises(UserError, match="teacher.augment: 9 labels.*MLPConfig reads 0; use network=SongUNetConfig"):
        recipe_of(MLPConfig(shape=(1, 8, 8)))


def test_recipes_hold_the_pipe_and_the_command_line_sets_it():
    recipe = recipe_of(unet(9))
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    assert apply_overrides(recipe, ["augment=none"]).stages["teacher"].augment is None
    assert apply_overrides(recipe, ["augment.p=0.15"]).stages["teacher"].augment == AugmentPipe(p=0.15)
    assert apply_overrides(recipe, ["augment=AugmentPipe(p=0.2)"]).stages["teacher"].augment == AugmentPipe(p=0.2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"p": 1.5}, "p: 1.5"),
        ({"scale": -1.0}, "scale: -1"),
        ({"aniso": math.inf}, "aniso: inf"),
        (NONE, "augment=none"),
    ],
)
def test_impossible_pipes_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        AugmentPipe(**changes)


def test_quarter_turns_need_squares():
    with pytest.raises(UserError, match="rotate_int: images of 8x12"):
        AugmentPipe(rotate_int=1)(torch.zeros(1, 1, 8, 12), Seeded.of(0))
