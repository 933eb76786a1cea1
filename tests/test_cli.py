"""Commands do what their help says; mistakes end with one line and exit code 2, failures with 1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import TINY, finished_run, pictures

from onejump.cli import main
from onejump.generate import generate
from onejump.saved import load_model


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("cli"))


def images(out, path, *options):
    """What `sample` writes as .npz."""
    assert main(["sample", str(out), "--out", str(path), *options]) == 0
    with np.load(path) as arrays:
        return arrays["images"], arrays["labels"]


def said(capsys, argv, code):
    """The one line on standard error with which a command ends."""
    try:
        found = main([str(word) for word in argv])
    except SystemExit as stop:  # argparse's own
        found = stop.code
    out, err = capsys.readouterr()
    assert found == code, err
    assert "Traceback" not in err and out == ""
    lines = [line for line in err.splitlines() if "onejump" in line and "usage:" not in line]
    assert len(lines) == 1, err
    return lines[0]


# ------------------------------------------------------------------------------------------------------------ sample


def test_image_k_is_the_same_for_any_number_of_images(out, tmp_path):
    """Equal noise and label; batches of another size may round another way, by one byte level at most."""
    three, labels = images(out, tmp_path / "3.npz", "--n", "3")
    seven, more = images(out, tmp_path / "7.npz", "--n", "7")
    assert three.shape == (3, 8, 8, 1) and list(labels) == [0, 1, 2] and list(more) == [0, 1, 2, 3, 4, 5, 6]
    assert np.abs(three.astype(int) - seven[:3]).max() <= 1


def test_the_seed_and_nothing_else_decides(out, tmp_path):
    one, _ = images(out, tmp_path / "a.npz", "--n", "5")
    again, _ = images(out, tmp_path / "b.npz", "--n", "5")
    other, _ = images(out, tmp_path / "c.npz", "--n", "5", "--seed", "1")
    assert (one == again).all() and (one != other).any()


def test_grid_folder_and_arrays_hold_the_same_images(out, tmp_path):
    arrays, _ = images(out, tmp_path / "a.npz", "--n", "12")
    assert main(["sample", str(out), "--n", "12", "--out", str(tmp_path / "grid.png")]) == 0
    assert main(["sample", str(out), "--n", "12", "--out", str(tmp_path / "new" / "folder")]) == 0
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [path.name for path in files] == [f"{k:06}.png" for k in range(12)]
    assert all(
        (np.asarray(Image.open(path)) == image[:, :, 0]).all() for path, image in zip(files, arrays, strict=True)
    )
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    scale = (grid.shape[1] + 2) // 10 - 2
    side = scale // 8
    eleventh = grid[scale + 2 : 2 * scale + 2, :scale]
    assert (eleventh[::side, ::side] == arrays[10, :, :, 0]).all()


def test_class_asks_for_one_class(out, tmp_path):
    mixed, _ = images(out, tmp_path / "a.npz", "--n", "4")
    threes, labels = images(out, tmp_path / "b.npz", "--n", "4", "--class", "3")
    assert list(labels) == [3, 3, 3, 3]
    assert np.abs(mixed[3].astype(int) - threes[3]).max() <= 1


def test_times_replace_the_models_own(out, tmp_path):
    two, _ = images(out, tmp_path / "a.npz", "--n", "4", "--steps", "2")
    same, _ = images(out, tmp_path / "b.npz", "--n", "4", "--times", "80,1")
    other, _ = images(out, tmp_path / "c.npz", "--n", "4", "--times", "80,20,1")
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
        images(path, tmp_path / "a.npz", "--n", "3")[0] for path in (out, out / "stage2", out / "stage2" / "model")
    ]
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


# ---------------------------------------------------------------------------------- evaluate, report, show, dry run


def test_evaluate_tells_what_a_number_rests_on_and_repeats_it(out, tmp_path, capsys):
    path = tmp_path / "numbers.json"
    argv = ["evaluate", str(out), "--n", "30", "--seed", "7", "--out", str(path)]
    assert main(argv) == 0
    first = json.loads(capsys.readouterr().out)
    assert first == json.loads(path.read_text())
    assert main(argv) == 0
    second = json.loads(capsys.readouterr().out)
    reference = first["reference"]
    assert len(reference["fingerprint"]) == len(reference["detector_sha256"]) == 64
    assert reference["detector"] == "digits-64" and reference["n"] == 1797
    assert [(k, found["n"], found["seed"], found["times"]) for k, found in first["steps"].items()] == [
        ("1", 30, 7, [80.0]),
        ("2", 30, 7, [80.0, 1.0]),
    ]
    assert first["provenance"]["stage"] == "stage2" and first["provenance"]["step"] == 10
    for record in (first, second):
        for found in record["steps"].values():
            del found["seconds"]
    assert first == second


def test_evaluate_gives_the_numbers_of_the_run(out, capsys):
    assert main(["evaluate", str(out), "--n", "40", "--steps", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["steps"]["1"]
    stored = json.loads((out / "evaluation.json").read_text())["stages"]["stage2"]["steps"]["1"]
    assert found | {"seconds": 0} == stored | {"seconds": 0}


def test_a_model_is_judged_by_images_without_its_labels(out, tmp_path, capsys):
    from onejump.data.digits import digits

    for k, image in enumerate(digits().images[:30, 0]):
        Image.fromarray(image.numpy()).save(tmp_path / f"{k:02}.png")
    assert main(["evaluate", str(out), "--n", "20", "--data", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["reference"]["n"] == 30 and record["reference"]["detector"] == "pixels-8x8"


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
    assert not (tmp_path / "a").exists() and not (tmp_path / "b" / "stage1").exists()


def test_train_refuses_a_model_of_another_network(out, tmp_path, capsys):
    argv = ["train", "digits", *TINY, "network.width=24", "--stage", "stage1", "--init", out / "teacher", "--out"]
    assert "width=16" in said(capsys, [*argv, tmp_path / "a"], 2)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["run", "digts"], "did you mean digits?"),
        (["run", "digits", "stage1.stepss=3"], "did you mean steps?"),
        (["run", "digits", "stage9.steps=3"], "did you mean stage"),
        (["run", "digits", "stage1.steps=many"], "stage1.steps: expected a whole number, got 'many'"),
        (["run", "digits", "stage1.steps"], "write path=value"),
        (["run", "digits", "--device", "abacus"], "--device abacus: not usable here; there are cpu"),
        (["run", "digits", "--device", "meta"], "--device meta: not usable here; there are cpu"),
        (["run", "digits", "--size", "16"], "the digits are 8x8"),
        (["run", "digits", "--data", "nowhere"], "nowhere: no such folder or zip file"),
        (["run", "digits", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["train", "digits"], "there are teacher, stage1, stage2"),
        (["train", "digits", "--stage", "stage_1"], "did you mean stage1?"),
        (["train", "digits-ict", "count_on=true"], "count_on"),
        (["show", "nowhere"], "nowhere: no such folder, and no such recipe (digits, digits-ict)"),
        (["report", "nowhere"], "nowhere: not a run's folder"),
        (["sample", "nowhere"], "nowhere: no such file or folder"),
        (["sample", "."], ".: no model there"),
        ([], "required: COMMAND"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in said(capsys, argv, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--n", "0"], "--n 0: at least one image"),
        (["--n", "few"], "invalid int value: 'few'"),
        (["--steps", "5"], "steps: 5; this model stores times for 1 to 2 steps"),
        (["--steps", "0"], "steps: 0"),
        (["--times", "80,0.5"], "0.5 is below t' = 1"),
        (["--times", "1,80"], "falling"),
        (["--times", "nan"], "--times nan"),
        (["--times", "80,x"], "--times 80,x"),
        (["--times", "80", "--steps", "1"], "give one of them"),
        (["--class", "x"], "--class: no 'x'; there are 0, 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", str(2**64)], "--seed"),
        (["--out", "samples.jpg"], "--out samples.jpg: end it with .png"),
    ],
)
def test_sample_refuses_what_the_model_cannot_do(out, options, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in said(capsys, ["sample", out, *options], 2)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_is_sampled_by_its_ode_alone(out, tmp_path, capsys):
    assert "needs at least 2" in said(capsys, ["sample", out / "teacher", "--steps", "1"], 2)
    assert "--steps only" in said(capsys, ["sample", out / "teacher", "--times", "80"], 2)
    made, _ = images(out / "teacher", tmp_path / "a.npz", "--n", "2", "--steps", "3")
    assert len(made) == 2


def test_evaluate_refuses_what_it_cannot_compare(out, tmp_path, capsys):
    assert "at least 2 samples" in said(capsys, ["evaluate", out, "--n", "1"], 2)
    assert "1 to 2 steps" in said(capsys, ["evaluate", out, "--steps", "1,3"], 2)
    data = pictures(tmp_path / "photos", 4, 8)
    assert "the images are 3x8x8, the model makes 1x8x8" in said(capsys, ["evaluate", out, "--data", data], 2)


def test_images_that_cannot_be_used_are_named(tmp_path, capsys):
    run = ["run", "digits", "--out", tmp_path / "run", "--data"]
    (tmp_path / "empty").mkdir()
    assert "no images found" in said(capsys, [*run, tmp_path / "empty"], 2)
    assert "only one image" in said(capsys, [*run, pictures(tmp_path / "one", 1)], 2)
    mixed = pictures(tmp_path / "mixed", 5)
    assert "pass --size" in said(capsys, [*run, mixed], 2)
    assert "needs squares of 8, 12, 16" in said(capsys, [*run, mixed, "--size", "9"], 2)
    assert "--size 0" in said(capsys, [*run, mixed, "--size", "0"], 2)
    (mixed / "002.png").write_bytes((mixed / "002.png").read_bytes()[:300])
    assert "002.png" in said(capsys, [*run, mixed, "--size", "8"], 2)
    assert not (tmp_path / "run").exists()


def test_class_needs_a_model_with_classes(tmp_path, capsys):
    data = pictures(tmp_path / "photos", 10, 8)
    net = "network=MLPConfig(shape=(3,8,8),width=16,depth=1)"
    train = ["train", "digits", net, *TINY[1:], "--stage", "teacher", "--data", data, "--out", tmp_path / "run"]
    assert main([str(word) for word in train]) == 0
    capsys.readouterr()
    assert "trained without classes" in said(capsys, ["sample", tmp_path / "run", "--class", "1"], 2)


def test_a_place_that_cannot_be_written_is_named(out, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    assert f"{file}/run.json: could not write" in said(capsys, ["run", "digits", *TINY, "--out", file], 2)
    assert str(file) in said(capsys, ["sample", out, "--n", "2", "--out", file / "x.png"], 1)
    assert str(file) in said(capsys, ["sample", out, "--n", "2", "--out", file], 1)
    assert file.read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_full_disk_while_sampling_is_one_line(out, tmp_path, capsys):
    (tmp_path / "grid.png").symlink_to("/dev/full")
    assert "No space left on device" in said(capsys, ["sample", out, "--n", "2", "--out", tmp_path / "grid.png"], 1)


def test_closed_input_and_a_reader_that_leaves_early_do_no_harm(out):
    """`onejump show RUN <&- | true`."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-c", "import os, sys; os.close(0); from onejump.cli import main; sys.exit(main())"]
    done = subprocess.run([*argv, "show", str(out)], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.returncode in (0, 1) and done.stderr == ""
