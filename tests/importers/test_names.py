"""A file's name tells nothing, unless it is the whole name of a published file; and what is not stated stays empty."""

import pytest
import torch
from golden_data import golden
from published_files import SMALLEST, smallest, snapshot, weights

from onejump.importers import import_model
from onejump.importers.published import average_of, method_of, second_time
from onejump.precond import ToData
from onejump.samplers import Multistep


@pytest.mark.parametrize("name", ["net.pkl", "ecm-x.pkl", "tcm.pkl"])
def test_a_name_with_a_methods_word_decides_nothing(tmp_path, name):
    found = import_model(snapshot(tmp_path / name, smallest(), "ECMPrecond", SMALLEST))
    assert (found.jump, found.sampler, found.t_min) == (ToData(), Multistep(80.0, ()), 0.0)
    assert ("if its name, " in found.facts["sampling"]) == (name != "net.pkl")


def test_a_word_in_the_name_is_only_suggested(tmp_path):
    torch.save(smallest(), tmp_path / "ct-scans-lung.pth")
    found = import_model(tmp_path / "ct-scans-lung.pth")
    assert found.undecided.endswith("(--method cm if its name, ct-scans-lung.pth, is right)")
    assert found.facts["training method"] == "not known" and "sampling" not in found.facts
    assert (found.ema, found.licence) == ("", "")


def test_a_published_files_whole_name_tells_its_method_and_second_time(tmp_path):
    tensors = weights("imagenet64", golden("openai_unet"))
    torch.save(tensors, tmp_path / "cd_imagenet64_lpips.pt")
    found = import_model(tmp_path / "cd_imagenet64_lpips.pt", head_channels=32)
    assert found.sampler == Multistep(80.0, (1.3824,))
    assert "by its name, cd_imagenet64_lpips.pt" in found.facts["training method"]
    (tmp_path / "cd_imagenet64_lpips.pt").rename(tmp_path / "cd_imagenet64_lpips_mine.pt")
    assert import_model(tmp_path / "cd_imagenet64_lpips_mine.pt", head_channels=32).undecided
    assert import_model(tmp_path / "cd_imagenet64_lpips_mine.pt", "cm", head_channels=32).sampler.mid == ()


@pytest.mark.parametrize(
    ("name", "method", "average"),
    [
        ("edm_imagenet64_ema.pt", "edm", ""),
        ("ct_cat256.pt", "cm", ""),
        ("ct_cat256.pth", None, ""),
        ("my_ema.pt", None, ""),
        ("ema_0.999_049000.pt", None, "constant 0.999"),
        ("ema_mine_1.pt", None, ""),
        ("edm2-img512-xxl-0939524-0.015.pkl", None, "power sigma_rel 0.015"),
        ("network-snapshot-0000512-0.100.pkl", None, "power sigma_rel 0.1"),
        ("my-run-0000512-0.100.pkl", None, ""),
    ],
)
def test_names(tmp_path, name, method, average):
    path = tmp_path / name
    assert (method_of(path), average_of(path)[0]) == (method, average)
    assert bool(average_of(path)[1]) == bool(average or name.startswith("edm_"))


def test_published_second_steps():
    """Of N times of the grid with rho = 7 from 80 to 0.002, the one at this place."""
    for name, i, n in (("ct_imagenet64", 106, 201), ("cd_bedroom256_lpips", 17, 40)):
        t = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert second_time(name) == pytest.approx(t, abs=1e-4)
    assert second_time("cd_cat256_l2") is None
