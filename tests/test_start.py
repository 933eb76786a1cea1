"""A model that a stage cannot start from is refused with the overrides that would make it fit."""

from dataclasses import replace

import pytest
from saved_setup import NETWORKS, UNET, saved_model

from onejump.data.digits import digits
from onejump.networks import ADMUNetConfig, MLPConfig
from onejump.overrides import apply_overrides
from onejump.recipes import build_recipe
from onejump.saved import save_model
from onejump.start import Start, differences, starting_model, starts_from
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
