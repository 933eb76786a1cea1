"""A run leaves all that it promises, goes on from what is there, and hands each stage's model to the next."""

import json
from pathlib import Path

import pytest
import torch
from tiny_run import STAGES, STEPS, TINY, command, finished_run, pictures, record, weights

from onejump.checkpoint import load_checkpoint
from onejump.cli import main
from onejump.saved import load_model


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_every_file_of_its_folder(tmp_path):
    out = finished_run(tmp_path)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    wanted = {".lock", "recipe.json", "run.json", "evaluation.json", "report.html", "report/real.png"}
    for stage, first, last in (("teacher", 0, 6), ("stage1", 0, 6), ("stage2", 6, 10)):
        wanted |= {f"{stage}/{name}.jsonl" for name in ("metrics", "evaluations")}
        wanted |= {f"{stage}/start.json", f"{stage}/stage.json"}
        wanted |= {f"{stage}/model/config.json", f"{stage}/model/model.safetensors"}
        for step in (last - 2, last):
            wanted |= {f"{stage}/checkpoints/step-{step:08}/state.{kind}" for kind in ("json", "safetensors")}
        wanted |= {f"{stage}/samples/step-{step:08}.png" for step in range(first + 1, last + 1) if step in (4, 8, last)}
        wanted |= {f"report/{stage}-{k}step.png" for k in ((3,) if stage == "teacher" else (1, 2))}
        wanted.add(f"report/neighbours-{stage}.png")
        assert {k: record(out / stage / "stage.json")[k] for k in ("first_step", "last_step", "images", "skipped")} == {
            "first_step": first,
            "last_step": last,
            "images": 16 * STEPS[stage],
            "skipped": 0,
        }
        assert [line["step"] for line in lines(out / stage / "metrics.jsonl")] == list(range(first + 2, last + 1, 2))
    assert found == wanted


def test_the_record_of_a_run_says_what_it_was_made_from(tmp_path, capsys):
    out = finished_run(tmp_path)
    run, evaluation = record(out / "run.json"), record(out / "evaluation.json")
    assert run["data"]["name"] == "digits" and run["data"]["n"] == 1797 and run["data"]["classes"] == 10
    assert run["data"]["fingerprint"] == evaluation["reference"]["fingerprint"]
    assert run["versions"]["torch"] == torch.__version__ and run["seed"] == 0
    assert list(evaluation["stages"]) == list(STAGES)
    steps = evaluation["stages"]["stage2"]["steps"]
    assert [(k, steps[k]["n"], steps[k]["nfe"], steps[k]["times"]) for k in steps] == [
        ("1", 40, 1, [80.0]),
        ("2", 40, 2, [80.0, 1.0]),
    ]
    assert evaluation["stages"]["teacher"]["steps"]["3"]["nfe"] == 5


def test_the_same_command_keeps_what_is_finished_and_says_so(tmp_path, capsys):
    out = finished_run(tmp_path)
    before, times = weights(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    assert main(command(out)) == 0
    err = capsys.readouterr().err
    for part in (*STAGES, "evaluation"):
        assert f"{part}: finished before, kept" in err
    assert weights(out) == before and times == {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}


def test_only_what_is_missing_is_made_again_with_the_same_bits(tmp_path, capsys):
    out = finished_run(tmp_path)
    before, numbers = weights(out), record(out / "evaluation.json")
    (out / "stage2" / "stage.json").unlink()
    (out / "evaluation.json").unlink()
    for path in [*(out / "stage2" / "model").iterdir()]:
        path.unlink()
    assert main(command(out)) == 0
    err = capsys.readouterr().err
    assert "stage1: finished before, kept" in err and "stage2: finished" not in err
    assert weights(out) == before
    again = record(out / "evaluation.json")
    for stage in STAGES:
        for k, found in again["stages"][stage]["steps"].items():
            assert found | {"seconds": 0} == numbers["stages"][stage]["steps"][k] | {"seconds": 0}


def test_a_stage_trained_again_from_nothing_has_the_same_bits(tmp_path):
    out = finished_run(tmp_path)
    before = weights(out)
    for path in sorted((out / "stage2").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert main(command(out)) == 0
    assert weights(out) == before


@pytest.mark.parametrize(
    ("change", "names"),
    [(["stage1.batch=32"], "stage1.batch was 16, now 32"), (["seed=1"], "seed was 0, now 1")],
)
def test_another_configuration_in_the_same_folder_is_refused_by_name(tmp_path, capsys, change, names):
    out = finished_run(tmp_path)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(command(out, *change)) == 2
    assert f"{out} holds another run ({names})" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


NET8 = "network=MLPConfig(shape=(3,8,8),width=16,depth=1)"


def small(*more):
    return [*TINY[1:], *more]


def test_other_images_in_the_same_folder_are_refused(tmp_path, capsys):
    first, second = pictures(tmp_path / "a", 20, 8), pictures(tmp_path / "b", 21, 8)
    train = ["train", "digits", NET8, *small(), "--stage", "teacher", "--out", str(tmp_path / "run"), "--data"]
    assert main([*train, str(first)]) == 0
    assert main([*train, str(second)]) == 2
    assert "holds another run (other images)" in capsys.readouterr().err


def test_stage_2_counts_on_and_its_frozen_network_is_the_ema_of_stage_1(tmp_path):
    out = finished_run(tmp_path)
    saved = load_checkpoint(out / "stage2" / "checkpoints")
    assert saved.step == STEPS["stage1"] + STEPS["stage2"]
    ema = load_checkpoint(out / "stage1" / "checkpoints")
    model = load_model(out / "stage1").model
    from hashlib import sha256

    frozen = sha256()
    for name, value in model.net.named_parameters():
        assert torch.equal(value, ema.tensors[f"ema/net.{name}"])
        frozen.update(value.detach().numpy().data)
    assert saved.meta["frozen"] == frozen.hexdigest()
    assert load_model(out / "stage2").model.t_min == 1.0 and model.t_min == 0.0


def test_a_stage_starts_from_the_ema_of_the_one_before(tmp_path):
    """With a rate that is 0 in float32 nothing moves, so what comes out is what went in."""
    out = tmp_path / "run"
    still = [f"{stage}.rate=ConstantRate(lr=1e-300)" for stage in ("stage1", "stage2")]
    assert main(command(out, *still)) == 0
    found = weights(out)
    assert found["teacher"] == found["stage1"] == found["stage2"]


@pytest.mark.parametrize("kind", ["plain", "classes", "zip"])
def test_a_run_takes_folders_and_zips_of_images_of_any_size(tmp_path, capsys, kind):
    data = pictures(tmp_path / "digits photos", classes=2 if kind == "classes" else 0)
    if kind == "zip":
        import shutil

        data = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", data))
    out = tmp_path / "run"
    labels = ",label_dim=2" if kind == "classes" else ""
    network = f"network=MLPConfig(shape=(3,8,8),width=16,depth=1{labels})"
    argv = ["run", "digits", network, *small(), "--data", str(data), "--size", "8", "--out", str(out)]
    assert main(argv) == 0
    about = record(out / "run.json")["data"]
    assert about["shape"] == [3, 8, 8] and about["n"] == 20
    assert about["class_names"] == (["class0", "class1"] if kind == "classes" else [])
    assert record(out / "evaluation.json")["detector"] == "pixels-8x8"
    assert load_model(out).class_names == tuple(about["class_names"])
    assert "Frechet distance (pixels-8x8, 40 samples against 20 real images)" in capsys.readouterr().out


def test_the_recipes_own_u_net_runs_on_16x16_colour_images(tmp_path):
    out = tmp_path / "run"
    few = [f"{stage}.{field}" for stage in STAGES for field in ("steps=2", "batch=4")] + ["network.model_channels=8"]
    data = pictures(tmp_path / "photos", 8)
    argv = ["run", "digits", *small(*few, "evaluation.n=8"), "--data", str(data), "--size", "16", "--out", str(out)]
    assert main(argv) == 0
    assert load_model(out).shape == (3, 16, 16)
