"""A mistake is one clear line and exit code 2, a failure one line and 1; neither leaves anything behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import TINY, arrays, finished_run, pictures, said

from onejump.cli import main


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("mistakes"))


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
        (["run", "digits", "--data", ""], "--data: the path is empty"),
        (["run", "digits", "--data", "nowhere"], "nowhere: no such folder or file"),
        (["run", "digits", "network.label_dim=7"], "network.label_dim: 7, but the images (digits) have 10 classes"),
        (
            ["run", "digits", "stage1.precond.sigma_data=0.7"],
            "stage1.precond.sigma_data: 0.7, but teacher, from which it starts, has 0.5",
        ),
        (["run", "digits", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["train", "digits"], "there are teacher, stage1, stage2"),
        (["train", "digits", "--stage", "stage_1"], "did you mean stage1?"),
        (["train", "digits-ict", "count_on=true"], "count_on"),
        (["show", "nowhere"], "nowhere: no such file or folder, and no such recipe (digits, digits-ict,"),
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
        (["--steps", "5"], "stores times for 1 to 2 steps; or give --times 80,9,1"),
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


def test_a_wrong_option_is_one_line_too(capsys):
    """As a pattern is that a shell has made files of."""
    for argv, told in (
        (["sample", "x", "--frob"], "--frob; see onejump sample --help"),
        (["data", "show", *(f"{k}.png" for k in range(50))], "1.png 2.png 3.png and 46 more; see onejump data --help"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert (stop.value.code, capsys.readouterr().err) == (2, f"onejump: unrecognized arguments: {told}\n")


def test_a_teacher_is_sampled_by_its_ode_alone(out, tmp_path, capsys):
    assert "needs at least 2" in said(capsys, ["sample", out / "teacher", "--steps", "1"], 2)
    assert "--steps only" in said(capsys, ["sample", out / "teacher", "--times", "80"], 2)
    made, _ = arrays(out / "teacher", tmp_path / "a.npz", "--n", "2", "--steps", "3")
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
    assert "give --size 8 or 12" in said(capsys, [*run, mixed, "--size", "9"], 2)
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
    assert f"{file}: a file, where a run needs a folder" in said(capsys, ["run", "digits", *TINY, "--out", file], 2)
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


def test_snapshots_of_another_stage_are_named(tmp_path, capsys):
    out = finished_run(tmp_path)
    (out / "stage1" / "ema").mkdir()
    assert said(capsys, ["ema", out], 2).endswith(f"{out / 'stage2'}: no snapshots there; some are in {out / 'stage1'}")


def test_a_setting_with_dashes_and_a_shortened_option_are_told_apart(capsys):
    assert "a setting has no dashes: stage1.steps=5" in said(capsys, ["run", "digits", "--stage1.steps=5"], 2)
    assert "unrecognized arguments: --det" in said(capsys, ["evaluate", "x", "--det", "pixels"], 2)
