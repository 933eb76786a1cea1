"""Images and networks with and without classes."""

import pytest
from tiny_run import TINY, arrays, pictures, record, said

from onejump.cli import main
from onejump.config import Evaluation, Recipe
from onejump.data.digits import digits
from onejump.fit import images_for
from onejump.networks.mlp import MLPConfig
from onejump.recipes import build_recipe
from onejump.saved import load_model
from onejump.types import UserError

NO_CLASSES = "network=MLPConfig(shape=(1,8,8),width=16,depth=1)"


def test_a_network_without_classes_trains_on_labelled_digits_which_still_judge_it(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["run", "digits", NO_CLASSES, *TINY[1:], "--out", str(out)]) == 0
    assert load_model(out).class_names == () and "classes" in record(out / "run.json")["data"]
    evaluation = record(out / "evaluation.json")
    assert evaluation["reference"]["detector"] == "digits-64" and evaluation["reference"]["n"] == 1797
    for stage in evaluation["stages"].values():
        for found in stage["steps"].values():
            assert found["confidence"]["as_asked"] is None and 0 <= found["balance_distance"] <= 1
    assert len(arrays(out, tmp_path / "a.npz", "--n", "3")[1]) == 0
    assert main(["evaluate", str(out), "--n", "20"]) == 0
    assert main(["run", "digits", NO_CLASSES, *TINY[1:], "--dry-run"]) == 0
    capsys.readouterr()
    assert "trained without classes" in said(capsys, ["sample", out, "--class", "1"], 2)


def test_images_keep_their_pixels_and_lose_their_labels():
    seen = images_for(MLPConfig(shape=(1, 8, 8)), digits())
    assert seen.labels is None and seen.classes == 0 and seen.images is digits().images
    assert images_for(MLPConfig(shape=(1, 8, 8), label_dim=10), digits()) is digits()
    x0, cond = seen.batch(3, 4, seed=0)
    assert cond is None and (x0 == digits().batch(3, 4, seed=0)[0]).all()


def test_another_number_of_classes_is_refused_before_anything_is_made(tmp_path, capsys):
    data = pictures(tmp_path / "photos", 10, 8)
    network = "network=MLPConfig(shape=(3,8,8),label_dim=10,width=16,depth=1)"
    argv = ["run", "digits", network, "--data", data, "--out", tmp_path / "run"]
    assert "network.label_dim: 10, but the images (photos) have no labels: give 0" in said(capsys, argv, 2)
    with pytest.raises(UserError, match="have 10 classes: give 10, or 0"):
        images_for(MLPConfig(shape=(1, 8, 8), label_dim=3), digits())
    assert not (tmp_path / "run").exists()


def test_the_recipes_fit_their_images():
    recipe = build_recipe("digits", digits())
    assert isinstance(recipe, Recipe) and recipe.evaluation == Evaluation()
    assert images_for(recipe.network, digits()) is digits()
