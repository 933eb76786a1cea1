"""Full-size published networks: every name and shape finds its place, none is left. No memory for weights is taken."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_data import golden
from published_files import DDPMPP, NCSNPP, openai_shapes, shapes

from onejump.importers.edm import read_pickle
from onejump.importers.flax_msgpack import Array
from onejump.importers.imported import fitting
from onejump.importers.jax import network_of, ours_from_flax
from onejump.importers.module_record import ModuleRecord
from onejump.importers.openai import read_openai
from onejump.importers.state_dicts import read_state_dict
from onejump.importers.use import Given
from onejump.networks import ADMUNetConfig, EDM2UNetConfig, SongUNetConfig

FILE = Path("file")
OPENAI = golden("openai_unet")


def unseen(sizes):
    return {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}


def record(class_name, sizes, arguments):
    """As a pickle's module, without the tree."""
    found = ModuleRecord(class_name, (), arguments, {"_modules": {}, "sigma_data": 0.5})
    for name, tensor in unseen(sizes).items():
        *path, leaf = name.split(".")
        inner = found
        for part in path:
            inner = inner.attributes["_modules"].setdefault(part, ModuleRecord("Module", (), {}, {"_modules": {}}))
        inner.attributes.setdefault("_parameters", {})[leaf] = tensor
    return found


SONG = {"img_resolution": 32, "img_channels": 3, "model_type": "SongUNet", "channel_mult": [2, 2, 2], "dropout": 0.13}
CIFAR10 = SongUNetConfig()
EDM2_S = EDM2UNetConfig(dropout_resolution=0)
PICKLES = {
    "ect_ddpmpp_cifar10_uncond": ("ECMPrecond", SONG | DDPMPP, CIFAR10, 55_732_739),
    "tcm_ddpmpp_cifar10_uncond": ("ECMPrecond", SONG | DDPMPP, CIFAR10, 55_732_739),
    "edm_ddpmpp_cifar10_cond_aug": (
        *("EDMPrecond", SONG | DDPMPP | {"label_dim": 10, "augment_dim": 9}),
        *(replace(CIFAR10, label_dim=10, augment_dim=9), 55_735_299),
    ),
    "edm_ncsnpp_cifar10_uncond_aug": (
        *("EDMPrecond", SONG | NCSNPP | {"augment_dim": 9}),
        *(replace(CIFAR10, variant="ncsnpp", augment_dim=9), 56_397_827),
    ),
    "edm_adm_imagenet64_cond": (
        *("EDMPrecond", {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"}),
        *(ADMUNetConfig(label_dim=1000), 295_899_267),
    ),
    "edm2_xs_img64": (
        *("Precond", {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_channels": 128}),
        *(replace(EDM2_S, model_channels=128), 124_710_821),
    ),
    "edm2_s_img64": (
        *("Precond", {"img_resolution": 64, "img_channels": 3, "label_dim": 1000}),
        *(EDM2_S, 280_209_253),
    ),
    "tcm_edm2_s_img64": (
        "ECMPrecond",
        {
            **{"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "EDM2UNet", "dropout": 0.4},
            "dout_resolutions": [16, 8, 4, 2, 1],
        },
        *(EDM2UNetConfig(dropout=0.4), 280_209_253),
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_and_state_dicts_of_edms_family(case):
    class_name, arguments, network, parameters = PICKLES[case]
    sizes = shapes(f"full/{case}")
    found = read_pickle(FILE, {"ema": record(class_name, sizes, arguments)}, Given())
    assert found.network == network and found.parameters() == parameters
    assert len(found.weights) + len(found.dropped) == len(sizes)
    found = read_state_dict(FILE, unseen(sizes), Given("edm"))
    assert replace(found.network, dropout=0, **({"dropout_resolution": 0} if "edm2" in case else {})) == replace(
        network, dropout=0, **({"dropout_resolution": 0} if "edm2" in case else {})
    )
    assert found.parameters() == parameters and len(found.weights) + len(found.dropped) == len(sizes)


def test_the_published_second_times_embedding_of_cifar10():
    """CTM's network is EDM's with a twin of the embedding and of its use in each of the 33 blocks."""
    sizes = shapes("full/ect_ddpmpp_cifar10_uncond")
    twins = {
        name.replace(part, f"{part}_s"): shape
        for name, shape in sizes.items()
        for part in ("map_layer0", "map_layer1", "affine")
        if f".{part}." in name
    }
    found = read_state_dict(FILE, unseen(sizes | twins), Given())
    assert len(found.weights) == 494 and found.parameters() == 60_395_267
    assert found.network == replace(CIFAR10, second_time="random", dropout=0)


@pytest.mark.parametrize(
    "case, how",
    [
        ("imagenet64", {"classes": 10}),
        ("lsun", {"scale_shift": False, "updown": False}),
        ("ctm", {"classes": 10, "two_times": True}),
    ],
)
def test_openais_names_are_those_of_the_golden_networks(case, how):
    mult = (1, 1) if case == "lsun" else (1, 2)
    assert openai_shapes(32, mult, 1, (1,), **how) == shapes(case, OPENAI)


IMAGENET64 = (192, (1, 2, 3, 4), 3, (1, 2, 3))
LSUN256 = (256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5))


@pytest.mark.parametrize(
    "sizes, how, entries, parameters, resolution",
    [
        (IMAGENET64, {"classes": 1000}, 541, 295_899_267, 64),
        (IMAGENET64, {"classes": 1000, "two_times": True}, 617, 324_100_611, 64),
        (LSUN256, {"scale_shift": False}, 566, 526_304_771, 256),
        (LSUN256, {"scale_shift": False, "updown": False}, 486, None, 256),
    ],
)
def test_openais_networks(sizes, how, entries, parameters, resolution):
    theirs = openai_shapes(*sizes, **how)
    assert len(theirs) == entries
    found = read_openai(FILE, unseen(theirs), Given(None if "two_times" in how else "cm"))
    assert found.network.img_resolution == resolution and found.network.attn_resolutions == (32, 16, 8)
    total = sum(map(math.prod, theirs.values()))
    assert found.parameters() == total and total == (parameters or total)
    filters = [name for name in found.weights if name.endswith("resample_filter")]
    assert len(found.weights) == entries + len(filters)


def test_jax_network():
    z = golden("ncsnpp_jax")
    sizes = shapes("cifar10", z)
    arrays = {
        name: Array(torch.empty(4 * math.prod(shape), dtype=torch.uint8, device="meta"), torch.float32, shape)
        for name, shape in sizes.items()
    }
    network = network_of(FILE, arrays)
    assert network == replace(CIFAR10, variant="ncsnpp", dropout=0) and len(sizes) == 445
    weights = fitting(FILE, ours_from_flax(FILE, arrays, network), network)
    filters = [name for name in weights if name.endswith("resample_filter")]
    assert len(weights) == 445 - 2 * 2 * 6 + len(filters)  # q, k and v of six blocks with attention are one


def test_a_network_of_one_more_block_is_another():
    sizes = openai_shapes(32, (1, 2), 2, (1,), classes=10)
    assert read_openai(FILE, unseen(sizes), Given("cm", head_channels=32)).network.num_blocks == 2
