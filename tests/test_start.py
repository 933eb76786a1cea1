"""A model that a stage cannot start from is refused with the overrides that would make it fit."""

from dataclasses import replace

import pytest
import torch
from saved_setup import NETWORKS, UNET, saved_model
from tiny_run import TINY

from onejump.cli import main
from onejump.data.digits import digits
from onejump.networks import ADMUNetConfig, EDM2UNetConfig, MLPConfig, SongUNetConfig
from onejump.overrides import apply_overrides
from onejump.recipes import build_recipe
from onejump.saved import save_model
from onejump.start import Start, differences, doubtful, starting_model, starts_from
from onejump.types import UserError


@pytest.mark.parametrize("source", [UNET, NETWORKS["openai"], MLPConfig(shape=(1, 8, 8), width=32)])
def test_the_overrides_that_are_named_make_it_fit(source):
    recipe = build_recipe("digits", digits())
    mended = apply_overrides(recipe, differences(recipe.network, source))
    assert not starts_from(recipe.network, source) and starts_from(mended.network, source)


def test_only_what_differs_is_named(tmp_path):
    recipe = build_recipe("digits", digits())
    assert differences(recipe.network, replace(recipe.network, model_channels=64, dropout=0.9)) == [
        "network.model_channels=64"
    ]
    save_model(tmp_path, saved_model(ADMUNetConfig(8, 3, 2, 8, (1, 2), 1, (4,), second_time="random", head_channels=8)))
    with pytest.raises(UserError, match="its network is not that of stage1; give network=ADMUNetConfig .*, or another"):
        starting_model(recipe, "stage1", Start(tmp_path, None, True))


def test_a_network_without_augmentation_starts_from_one_with_it_and_computes_the_same(tmp_path):
    """EDM's CIFAR-10 networks were trained with labels of augmentation, ECT's and TCM's start from them without."""
    source = SongUNetConfig(8, 1, 10, 8, (1, 2), 1, (4,), augment_dim=9)
    saved = saved_model(source)
    save_model(tmp_path, saved)
    recipe = apply_overrides(build_recipe("digits", digits()), ["stage1.precond.sigma_data=0.7"])
    recipe = replace(recipe, network=replace(source, augment_dim=0))
    model = starting_model(recipe, "stage1", Start(tmp_path, None, True)).eval()
    x, t, cond = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 20.0]), torch.tensor([1, 2, 3])
    assert torch.equal(model.denoise(x, t, cond=cond), saved.model.eval().denoise(x, t, cond=cond))
    assert not starts_from(replace(source, augment_dim=6), source)


@pytest.mark.parametrize(
    "asked",
    [
        lambda: SongUNetConfig(num_blocks=10**9),
        lambda: ADMUNetConfig(channel_mult=()),
        lambda: EDM2UNetConfig(channel_mult=(1,) * 13),
        lambda: ADMUNetConfig(model_channels=65536),
        lambda: MLPConfig(depth=10**6),
    ],
)
def test_a_file_cannot_ask_for_a_network_without_end(asked):
    with pytest.raises(UserError, match="are possible"):
        asked()


def test_tuning_a_diffusion_model_warns_once_where_there_is_none(tmp_path, capsys):
    """ECT and TCM begin at one in their papers; CT and iCT at random weights."""
    recipe, nothing = build_recipe("digits", digits()), Start(None, None)
    for stage, method in (("stage1", "ECT"), ("stage2", "TCM")):
        way_out = f"give one to onejump train with --stage {stage} --init MODEL, and another --out"
        expected = f"{stage}: starts from random weights, but {method} tunes a diffusion model; {way_out}"
        assert doubtful(recipe, stage, nothing) == expected and doubtful(recipe, stage, Start(tmp_path, "")) is None
    for method in ("ICT", "CT"):
        assert (
            doubtful(apply_overrides(recipe, ["stage1.jump=CM", f"stage1.method={method}"]), "stage1", nothing) is None
        )
    tuned = [*TINY, "teacher.method=ECT", "teacher.sampler=Multistep", "teacher.steps=2"]
    for times in (1, 0):  # when it starts; not when it goes on
        assert main(["train", "digits", *tuned, "--stage", "teacher", "--out", str(tmp_path / "run")]) == 0
        assert capsys.readouterr().err.count("starts from random weights") == times
        tuned[-1] = "teacher.steps=4"
        (tmp_path / "run" / "teacher" / "stage.json").unlink()
