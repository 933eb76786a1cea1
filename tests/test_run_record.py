"""A run's folder takes corrections of what has not happened yet, and makes again what has become stale."""

import json
import shutil

import pytest
from tiny_run import command, finished_run, record, said, weights

from onejump.cli import main
from onejump.saved import load_model, save_model


def change_weights(folder):
    """As if this stage had been trained otherwise."""
    saved = load_model(folder)
    for p in saved.model.parameters():
        p.data.mul_(1.5)
    save_model(folder / "model", saved)


def unfinish(out, *stages):
    for stage in stages:
        (out / stage / "stage.json").unlink()
    (out / "evaluation.json").unlink()


def test_the_records_name_the_weights_by_their_checksum(tmp_path):
    out = finished_run(tmp_path)
    hashes = {stage: record(out / stage / "model" / "config.json")["sha256"] for stage in weights(out)}
    started = {stage: record(out / stage / "stage.json")["started_from"] for stage in hashes}
    assert started == {"teacher": None, "stage1": hashes["teacher"], "stage2": hashes["stage1"]}
    assert hashes == {stage: record(out / stage / "stage.json")["model_sha256"] for stage in hashes}
    assert hashes == {k: found["model_sha256"] for k, found in record(out / "evaluation.json")["stages"].items()}


def test_what_was_made_from_weights_that_have_changed_is_made_again(tmp_path, capsys):
    out = finished_run(tmp_path)
    before, numbers = weights(out), record(out / "evaluation.json")["stages"]
    change_weights(out / "stage1")
    assert main(command(out)) == 0
    err = capsys.readouterr().err
    assert "stage1: finished before, kept" in err and "stage2: stage1 has changed since, trained again" in err
    assert "evaluation: stage1, stage2 changed since, made again" in err
    after, again = weights(out), record(out / "evaluation.json")["stages"]
    assert after["teacher"] == before["teacher"] and after["stage2"] != before["stage2"]
    assert again["teacher"]["steps"]["3"]["frechet"] == numbers["teacher"]["steps"]["3"]["frechet"]
    assert again["stage2"]["steps"]["1"]["frechet"] != numbers["stage2"]["steps"]["1"]["frechet"]
    assert main(command(out)) == 0
    assert "again" not in capsys.readouterr().err and weights(out) == after


def test_a_stage_that_had_only_begun_starts_again_too(tmp_path, capsys):
    """ECT has no frozen network that would tell; its checkpoints came from the teacher that is gone."""
    out = finished_run(tmp_path)
    unfinish(out, "stage1", "stage2")
    change_weights(out / "teacher")
    assert main(command(out)) == 0
    err = capsys.readouterr().err
    assert "stage1: teacher has changed since, trained again" in err and "stage2: stage1 has changed" in err
    steps = [json.loads(line)["step"] for line in (out / "stage1" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_a_stage_trained_again_to_the_same_bits_leaves_the_later_ones_as_they_are(tmp_path, capsys):
    out = finished_run(tmp_path)
    shutil.rmtree(out / "stage1")
    assert main(command(out)) == 0
    err = capsys.readouterr().err
    assert "stage2: finished before, kept" in err and "evaluation: finished before, kept" in err


def test_a_folder_where_nothing_has_begun_takes_any_correction(tmp_path):
    out = finished_run(tmp_path)
    for path in [*(out / stage for stage in weights(out))]:
        shutil.rmtree(path)
    (out / "evaluation.json").unlink()
    assert main(command(out, "seed=3", "teacher.batch=8", "--dry-run")) == 0
    assert record(out / "recipe.json")["seed"] == 0
    assert main(["train", *command(out, "seed=3", "teacher.batch=8", "--stage", "teacher")[1:]]) == 0
    assert record(out / "recipe.json")["seed"] == record(out / "run.json")["seed"] == 3
    assert "teacher.batch=8" in record(out / "run.json")["command"]


def test_what_has_not_begun_may_change_and_the_rest_may_not(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *command(out, "--stage", "teacher")[1:]]) == 0
    more = ["stage1.rate=ConstantRate(lr=0.25)", "stage2.method.w_b=0.5", "evaluation.n=30", "log_every=3"]
    assert "(seed was 0, now 1)" in said(capsys, command(out, *more, "seed=1"), 2)
    assert "(teacher.rate.lr was 0.001, now 0.5)" in said(capsys, command(out, *more, "teacher.rate.lr=0.5"), 2)
    assert main(["train", *command(out, *more, "--stage", "stage1")[1:]]) == 0
    assert "from here on" not in capsys.readouterr().err
    kept = record(out / "recipe.json")
    assert kept["stages"]["stage1"]["rate"]["lr"] == 0.25 and kept["log_every"] == 3
    assert "evaluation.n=30" in record(out / "run.json")["command"]
    assert main(command(out, *more)) == 0
    capsys.readouterr()
    line = said(capsys, command(out, *more, "evaluation.n=20"), 2)
    assert "(evaluation.n was 30, now 20)" in line


def test_a_stage_that_is_training_takes_the_ways_out_that_are_printed(tmp_path, capsys):
    out = finished_run(tmp_path)
    unfinish(out, "stage2")
    ways = ["stage2.rate.lr=0.0005", "stage2.clip=1.5", "stage2.precision=bf16", "stage2.steps=6"]
    assert main(command(out, *ways)) == 0
    err = capsys.readouterr().err
    assert "stage2.rate.lr was 0.002, now 0.0005 from here on" in err
    assert "stage2.steps was 4, now 6 from here on" in err and "stage1: finished before, kept" in err
    assert record(out / "stage2" / "stage.json")["last_step"] == 12
    assert record(out / "recipe.json")["stages"]["stage2"]["clip"] == 1.5


@pytest.mark.parametrize(
    "change", ["stage2.steps=2", "stage2.batch=8", "stage2.method.w_b=0.5", "stage2.ema=ConstantEMA"]
)
def test_a_stage_that_is_training_takes_nothing_else(tmp_path, capsys, change):
    out = finished_run(tmp_path)
    unfinish(out, "stage2")
    path = change.partition("=")[0]
    before = (out / "recipe.json").read_bytes()
    assert f"holds another run ({path} was " in said(capsys, command(out, change), 2)
    assert (out / "recipe.json").read_bytes() == before


def test_a_longer_stage_does_not_move_the_count_of_one_that_goes_on_from_it(tmp_path, capsys):
    out = finished_run(tmp_path)
    unfinish(out, "stage1")
    line = said(capsys, command(out, "stage1.steps=8"), 2)
    assert "stage1.steps was 6, now 8, from which stage2 counts on" in line
    shutil.rmtree(out / "stage2")
    assert main(command(out, "stage1.steps=8")) == 0
    assert record(out / "stage2" / "stage.json")["first_step"] == 8
