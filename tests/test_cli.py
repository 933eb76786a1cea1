"""Commands do what their help says."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_run import TINY, arrays, finished_run, record, said

from onejump.cli import main
from onejump.generate import generate
from onejump.saved import load_model


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("cli"))


# ------------------------------------------------------------------------------------------------------------ sample


def test_image_k_is_the_same_for_any_number_of_images(out, tmp_path):
    """Equal noise and label; batches of another size may round another way, by one byte level at most."""
    three, labels = arrays(out, tmp_path / "3.npz", "--n", "3")
    seven, more = arrays(out, tmp_path / "7.npz", "--n", "7")
    assert three.shape == (3, 8, 8, 1) and list(labels) == [0, 1, 2] and list(more) == [0, 1, 2, 3, 4, 5, 6]
    assert np.abs(three.astype(int) - seven[:3]).max() <= 1


def test_the_seed_and_nothing_else_decides(out, tmp_path):
    one, _ = arrays(out, tmp_path / "a.npz", "--n", "5")
    again, _ = arrays(out, tmp_path / "b.npz", "--n", "5")
    other, _ = arrays(out, tmp_path / "c.npz", "--n", "5", "--seed", "1")
    assert (one == again).all() and (one != other).any()


def test_grid_folder_and_arrays_hold_the_same_arrays(out, tmp_path):
    made, _ = arrays(out, tmp_path / "a.npz", "--n", "12")
    assert main(["sample", str(out), "--n", "12", "--out", str(tmp_path / "grid.png")]) == 0
    assert main(["sample", str(out), "--n", "12", "--out", str(tmp_path / "new" / "folder")]) == 0
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [path.name for path in files] == [f"{k:06}.png" for k in range(12)]
    assert all((np.asarray(Image.open(path)) == image[:, :, 0]).all() for path, image in zip(files, made, strict=True))
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    scale = (grid.shape[1] + 2) // 10 - 2
    side = scale // 8
    eleventh = grid[scale + 2 : 2 * scale + 2, :scale]
    assert (eleventh[::side, ::side] == made[10, :, :, 0]).all()


def test_class_asks_for_one_class(out, tmp_path):
    mixed, _ = arrays(out, tmp_path / "a.npz", "--n", "4")
    threes, labels = arrays(out, tmp_path / "b.npz", "--n", "4", "--class", "3")
    assert list(labels) == [3, 3, 3, 3]
    assert np.abs(mixed[3].astype(int) - threes[3]).max() <= 1


def test_times_replace_the_models_own(out, tmp_path):
    two, _ = arrays(out, tmp_path / "a.npz", "--n", "4", "--steps", "2")
    same, _ = arrays(out, tmp_path / "b.npz", "--n", "4", "--times", "80,1")
    other, _ = arrays(out, tmp_path / "c.npz", "--n", "4", "--times", "80,20,1")
    assert (two == same).all() and (two != other).any()


def test_a_second_step_starts_from_the_first_steps_image(out):
    """The second step's noise vanishes as its time goes to 0, so f(x + t eps, t) tends to the one-step image."""
    saved = load_model(out / "stage1")
    one = generate(saved.model, saved.sampler, 1, range(6), saved.shape, None, seed=5)
    from onejump.samplers import Multistep

    two = generate(saved.model, Multistep(80.0, (1e-6,)), 2, range(6), saved.shape, None, seed=5)
    assert (one.int() - two.int()).abs().max() <= 1


def test_sample_finds_the_model_in_a_run_a_stage_or_its_own_folder(out, tmp_path):
    found = [
        arrays(path, tmp_path / "a.npz", "--n", "3")[0] for path in (out, out / "stage2", out / "stage2" / "model")
    ]
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


# ---------------------------------------------------------------------------------- report, show, dry run


def test_a_teachers_samples_are_told_by_their_steps_and_cost(out, tmp_path, capsys):
    path = str(tmp_path / "a.png")
    assert main(["sample", str(out / "teacher"), "--n", "2", "--out", path]) == 0
    assert capsys.readouterr().out == f"2 images, 18 Heun steps (35 network calls), seed 0: {path}\n"
    assert main(["sample", str(out), "--n", "2", "--steps", "2", "--out", path]) == 0
    assert capsys.readouterr().out == f"2 images, times 80, 1, seed 0: {path}\n"


def test_a_run_ends_with_a_table_of_its_numbers(out, capsys):
    """Also one that was finished before; every line fits a terminal of 80 columns but for the notes below it."""
    assert main(["run", "digits", *TINY, "--out", str(out)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    stages = json.loads((out / "evaluation.json").read_text())["stages"]
    for stage, k, calls in (("teacher", "3", "5"), ("stage1", "1", "1"), ("stage2", "2", "2")):
        found = stages[stage]["steps"][k]
        sure = found["confidence"]
        shares = [f"{share:.1%}" for share in (sure["mean"], sure["as_asked"], found["balance_distance"])]
        (row,) = [row for row in rows if row[:3] == [stage, k, calls]]
        assert float(row[3]) == pytest.approx(found["frechet"], rel=1e-3) and row[-3:] == shares


def test_report_makes_the_page_again(out, capsys):
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"Report: {out / 'report.html'}\n"
    assert "stage2" in (out / "report.html").read_text()


def test_show_tells_a_models_origin_and_scalings(out, capsys):
    assert main(["show", str(out)]) == 0
    text = capsys.readouterr().out
    for part in ("1x8x8", "t' = 1", "3,728", "stage2", "TCM", "Multistep"):
        assert part in text
    row = next(line.split() for line in text.splitlines() if line.split()[:1] == ["0.5"])
    assert [float(number) for number in row[1:3]] == [0.5, 0.35355]  # sigma_data = 0.5: 1/2 and 0.5/sqrt(2)


def test_show_tells_a_recipes_fields(capsys):
    assert main(["show", "digits"]) == 0
    text = capsys.readouterr().out
    assert "stage2.method.t_prime" in text and "teacher.steps" in text


def test_a_dry_run_estimates_every_stage_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "digits", *TINY, "evaluate_every=0", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "stage1.batch" in text and "1797 images of 1x8x8, 10 classes" in text
    for stage in ("teacher", "stage1", "stage2"):
        assert any(line.startswith(stage) and " MiB on " in line and "about" in line for line in text.splitlines())
    assert main(["train", "digits", *TINY, "--stage", "stage2", "--dry-run"]) == 0
    assert "stage2 " in capsys.readouterr().out.split(" classes ")[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["run", "train", "sample", "evaluate", "report", "show"])
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: onejump {name}" in capsys.readouterr().out


def test_overrides_and_options_come_in_any_order(tmp_path, capsys):
    argv = ["train", "seed=3", "--stage", "teacher", "digits"]
    assert "recipe: no 'seed=3'" in said(capsys, argv, 2)
    mixed = ["train", "digits", "seed=3", "--stage", "teacher", *TINY[:3], "--out", str(tmp_path / "run"), *TINY[3:]]
    assert main(mixed) == 0
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["seed"] == 3


# ------------------------------------------------------------------------------------------------------------- train


def test_train_makes_one_stage_from_the_one_before_or_from_init(out, tmp_path, capsys):
    train = ["train", "digits", *TINY, "--stage", "stage2", "--out"]
    assert "stage2 starts from stage1, which is not trained yet" in said(capsys, [*train, tmp_path / "a"], 2)
    assert main([*train, str(tmp_path / "b"), "--init", str(out / "stage1")]) == 0
    made, known = (path / "stage2" / "model" / "model.safetensors" for path in (tmp_path / "b", out))
    assert made.read_bytes() == known.read_bytes()
    digest = record(out / "stage1" / "stage.json")["model_sha256"]
    origin = {"path": str(out / "stage1"), "sha256": digest}
    for told in (
        record(tmp_path / "b/stage2/stage.json"),
        record(tmp_path / "b/stage2/model/config.json")["provenance"],
    ):
        assert told["initialised_from"] == origin and told["started_from"] == digest
    said_by_run = record(tmp_path / "b" / "run.json")["command"]
    assert said_by_run.startswith("onejump train digits") and f"--init {out / 'stage1'}" in said_by_run
    assert not (tmp_path / "a").exists() and not (tmp_path / "b" / "stage1").exists()


def test_a_stage_keeps_to_the_model_it_was_given(out, tmp_path, capsys):
    """`run` trains what comes before it, and leaves it as it is; another --init is refused."""
    train = ["train", "digits", *TINY, "--stage", "stage2", "--out", str(tmp_path / "b"), "--init"]
    assert main([*train, str(out / "teacher")]) == 0
    known = (tmp_path / "b/stage2/model/model.safetensors").read_bytes()
    assert main([*train, str(out / "teacher")]) == 0
    capsys.readouterr()
    assert "began from another model" in said(capsys, [*train, str(out / "stage1")], 2)
    assert main(["run", "digits", *TINY, "--out", str(tmp_path / "b")]) == 0
    assert "stage2: finished before, kept" in capsys.readouterr().err
    assert (tmp_path / "b/stage2/model/model.safetensors").read_bytes() == known
    first, then = record(tmp_path / "b" / "run.json")["command"].split(" && ")
    assert first.startswith("onejump train") and then.startswith("onejump run")


def test_train_refuses_a_model_of_another_sigma_data(out, tmp_path, capsys):
    argv = ["train", "digits", *TINY, "stage1.precond.sigma_data=0.25", "--stage", "stage1", "--init", out / "teacher"]
    line = said(capsys, [*argv, "--out", tmp_path / "a"], 2)
    assert "its precond.sigma_data is 0.5, but stage1.precond.sigma_data is 0.25" in line


def test_train_refuses_a_model_of_another_network(out, tmp_path, capsys):
    argv = ["train", "digits", *TINY, "network.width=24", "--stage", "stage1", "--init", out / "teacher", "--out"]
    assert "width=16" in said(capsys, [*argv, tmp_path / "a"], 2)
