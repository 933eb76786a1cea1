"""Distilling stages in a run: who teaches, where the student starts, which jump it has; and what is refused at once."""

import shutil
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from tiny_run import NETWORK, arrays, pictures, record, said

from onejump.analytic import AnalyticPrecond
from onejump.analytic_jump import Analytic
from onejump.analytic_table import Estimator, load_table
from onejump.cli import main
from onejump.cli_sampling import sampling
from onejump.config import Stage
from onejump.data.digits import digits
from onejump.methods.ctm import CTM as CTMethod
from onejump.precond import Euler
from onejump.run_state import Run
from onejump.samplers import ODE, Trajectory
from onejump.saved import SavedModel, load_model, save_model
from onejump.solvers import dpm2
from onejump.teacher import Teacher, jump_of

COMMON = [NETWORK, "evaluation.n=40", "evaluation.teacher_steps=3", "log_every=2", "save_every=2"]
TEACHER = ["teacher.steps=6", "teacher.batch=16"]
CTM = ["ctm.steps=4", "ctm.batch=8", "ctm.method.n=5", "ctm.method.max_steps=2"]
TABLE = ["ctm.jump.estimator.times=6", "ctm.jump.estimator.samples=20"]
ANALYTIC = [*COMMON, *TEACHER, *CTM, *TABLE]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A finished run of digits-ctm-analytic."""
    out = tmp_path_factory.mktemp("distillation") / "run"
    assert main(["run", "digits-ctm-analytic", *ANALYTIC, "--out", str(out)]) == 0
    return out


def test_a_run_computes_the_jump_from_its_teacher_and_keeps_it_with_the_model(out):
    table, student = load_table(out / "ctm" / "precond.json"), load_model(out)
    assert table.teacher == record(out / "teacher" / "stage.json")["model_sha256"]
    assert isinstance(student.model.jump, Analytic) and student.model.jump == table.jump("backward")
    assert student.model.second_time and not load_model(out / "teacher").model.second_time
    assert student.provenance["teacher_sha256"] == table.teacher
    assert "<svg" in (out / "ctm" / "precond.html").read_text()
    assert not (out / "ctm" / "precond.partial.json").exists()


def test_the_run_evaluates_its_jumps(out):
    steps = record(out / "evaluation.json")["stages"]["ctm"]["steps"]
    assert {k: v["nfe"] for k, v in steps.items()} == {"1": 1, "2": 2, "4": 4}
    assert len(steps["4"]["times"]) == 4 and steps["1"]["times"] == [80.0]


def test_the_same_command_keeps_the_student_and_another_form_is_refused(out, capsys):
    assert main(["run", "digits-ctm-analytic", *ANALYTIC, "--out", str(out)]) == 0
    assert "ctm: finished before, kept" in capsys.readouterr().err
    again = ["run", "digits-ctm-analytic", *ANALYTIC, "ctm.jump.form=forward", "--out", str(out)]
    assert "ctm.jump.form" in said(capsys, again, 2)


def test_the_student_starts_as_its_teacher(tmp_path, out):
    """Its second time starts at zero: after a stage whose rate is next to nothing it still denoises as the teacher."""
    folder = tmp_path / "still"
    still = ["ctm.rate.lr=1e-30", "ctm.jump=Euler"]
    common = [*COMMON, *CTM, *still, "--stage", "ctm", "--teacher", str(out / "teacher"), "--out", str(folder)]
    assert main(["train", "digits-ctm", *common, "--init", str(out / "teacher")]) == 0
    student, teacher = load_model(folder / "ctm").model, load_model(out / "teacher").model
    assert student.jump == Euler()
    x, t, s = torch.randn(6, 1, 8, 8), torch.rand(6) * 5 + 1, torch.rand(6)
    labels = torch.arange(6)
    torch.testing.assert_close(student.denoise(x, t, s, labels), teacher.denoise(x, t, None, labels))


def test_a_teacher_that_is_there_is_distilled_as_it_is(out, tmp_path):
    """Of its network, which the recipe need not have; no other one is trained."""
    folder, words = tmp_path / "run", [word for word in [*COMMON[1:], *CTM] if "network" not in word]
    assert main(["run", "digits-ctm", *words, "--teacher", str(out / "teacher"), "--out", str(folder)]) == 0
    student = load_model(folder)
    assert student.provenance["teacher_sha256"] == record(out / "teacher" / "stage.json")["model_sha256"]
    assert not (folder / "teacher").exists() and student.network.width == 16


def test_the_adversarial_stage_goes_on_from_ctm_with_its_teacher(out, tmp_path):
    """In the recipe the teacher is two stages before; even steps train the student, odd ones the critic."""
    gan = [word.replace("ctm.", "gan.").replace("gan.method.", "gan.method.ctm.") for word in CTM]
    folder = tmp_path / "run"
    words = [*COMMON[1:], *CTM, *gan, "--teacher", str(out / "teacher"), "--out", str(folder)]
    assert main(["run", "digits-ctm-gan", *words]) == 0
    before, after = (load_model(folder / name) for name in ("ctm", "gan"))
    assert after.provenance["started_from"] == record(folder / "ctm" / "stage.json")["model_sha256"]
    assert after.provenance["teacher_sha256"] == before.provenance["teacher_sha256"]
    assert any((a != b).any() for a, b in zip(after.model.parameters(), before.model.parameters(), strict=True))


def test_samplers_of_a_trajectory_model(out, tmp_path, capsys):
    exact, _ = arrays(out, tmp_path / "a.npz", "--n", "6", "--steps", "2")
    middle = 2.515218976
    same, _ = arrays(out, tmp_path / "b.npz", "--n", "6", "--jumps", f"80:{middle},{middle}:0.002")
    assert abs(exact.astype(int) - same).max() <= 1
    still, _ = arrays(out, tmp_path / "c.npz", "--n", "6", "--steps", "2", "--gamma", "0")
    noisy, _ = arrays(out, tmp_path / "d.npz", "--n", "6", "--steps", "2", "--gamma", "1")
    assert (still == exact).all() and (noisy != exact).any()
    capsys.readouterr()
    arrays(out, tmp_path / "e.npz", "--n", "6", "--steps", "4", "--solver", "dpm2")
    assert "4 Dpm2 steps (7 network calls)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--times", "80,1"], "--times: this model jumps from any time to any other; give --jumps"),
        (["--jumps", "1:2"], "from 1 to 2; a jump ends below its start (s < t)"),
        (["--jumps", "80:2,1:0.002"], "ends at 2 and the next starts at 1; noise can be added, not removed"),
        (["--jumps", "90:0.002"], "this model was trained from 0.002 to 80; stay inside"),
        (["--jumps", "80:0.001"], "this model was trained from 0.002 to 80; stay inside"),
        (["--jumps", "80"], "start:end for each jump is needed"),
        (["--gamma", "2"], "gamma: 2"),
        (["--gamma", "0.5", "--solver", "heun"], "--gamma and --solver: give one of them"),
        (["--solver", "huen"], "--solver: no 'huen'; there are heun, euler, dpm2; did you mean heun?"),
        (["--steps", "0"], "steps: 0"),
    ],
)
def test_sampling_a_trajectory_model_refuses(out, options, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in said(capsys, ["sample", out, *options], 2)
    assert list(tmp_path.iterdir()) == []


def refused(capsys, tmp_path, *words):
    """Training does not start: one line, exit code 2, and no folder."""
    given = ["digits-ctm-analytic", *(word for word in ANALYTIC if not word.startswith("teacher."))]
    line = said(capsys, ["train", *given, "--stage", "ctm", *words, "--out", tmp_path / "new"], 2)
    assert not (tmp_path / "new").exists()
    return line


def changed(model, folder, change):
    """A copy of a model with weights changed by `change`."""
    saved = load_model(model)
    with torch.no_grad():
        change(saved.model.net)
    save_model(folder, saved)
    return folder


def test_a_teacher_that_is_not_finite_is_named(out, capsys, tmp_path):
    bad = changed(out / "teacher", tmp_path / "bad", lambda net: net.last_weight.fill_(float("nan")))
    line = refused(capsys, tmp_path, "--teacher", bad, "--init", out / "teacher")
    assert f"{bad}: this teacher's output is not finite at t = " in line


def test_a_consistency_model_is_no_teacher(out, capsys, tmp_path):
    line = refused(capsys, tmp_path, "--teacher", out / "ctm", "--init", out / "teacher")
    assert "not a diffusion model (trained by DSM), which is what a teacher must be" in line


@pytest.mark.parametrize(
    ("folder", "part"),
    [
        ({"side": 16}, "this teacher makes images of 1x8x8, these"),
        ({"side": 8, "classes": 2}, "this teacher makes images"),
    ],
)
def test_a_teacher_of_other_images_is_refused(out, folder, part, capsys, tmp_path):
    data = pictures(tmp_path / "data", **folder)
    side, classes = folder["side"], folder.get("classes", 0)
    words = [f"network=MLPConfig(shape=(3,{side},{side}),label_dim={classes},width=16,depth=1)", "--data", data]
    assert part in refused(capsys, tmp_path, *words, "--teacher", out / "teacher", "--init", out / "teacher")


def test_a_teacher_of_other_classes_is_refused(out, capsys, tmp_path):
    saved = load_model(out / "teacher")
    fewer = tmp_path / "fewer"
    network = saved.network.__class__(shape=(1, 8, 8), label_dim=3, width=16, depth=1)
    model = type(saved.model)(network.build(), saved.model.precond)
    save_model(fewer, SavedModel(model, network, saved.sampler, saved.shape, ("a", "b", "c")))
    line = refused(capsys, tmp_path, "--teacher", fewer, "--init", out / "teacher")
    assert "this teacher knows 3 classes, these images (digits) have 10 classes" in line


def test_a_recipe_that_distils_nothing_takes_no_teacher(out, capsys, tmp_path):
    line = said(capsys, ["run", "digits-ict", "--teacher", out / "teacher", "--out", tmp_path / "new"], 2)
    assert "--teacher: no stage of digits-ict distils" in line


def test_a_recipe_without_a_teacher_asks_for_one(capsys, tmp_path):
    line = said(capsys, ["train", "digits-ctm", *COMMON, "--stage", "ctm", "--out", tmp_path / "new"], 2)
    assert "ctm starts from teacher, which is not trained yet" in line and not (tmp_path / "new").exists()


def test_a_table_of_another_teacher_or_range_is_refused_before_training(out, capsys, tmp_path):
    words = ["--init", out / "teacher", "--teacher", out / "teacher"]
    other = changed(out / "teacher", tmp_path / "other", lambda net: net.last_weight.mul_(1.01))
    assert main(["precond", str(other), "--times", "4", "--samples", "10", "--out", str(tmp_path / "other.json")]) == 0
    capsys.readouterr()
    line = refused(capsys, tmp_path, f"ctm.jump.table={tmp_path / 'other.json'}", *words)
    assert "a table of another teacher" in line and "onejump precond" in line
    narrow = ["ctm.jump.estimator.sigma_min=0.01"]
    assert "ctm.jump: AnalyticPrecond ends at 0.01; CTM's first time is 0.002" in refused(
        capsys, tmp_path, *narrow, *words
    )
    missing = f"ctm.jump.table={tmp_path / 'nowhere.json'}"
    assert "nowhere.json" in refused(capsys, tmp_path, missing, *words)
    cut = tmp_path / "cut.json"
    cut.write_bytes((tmp_path / "other.json").read_bytes()[:200])
    assert "cut.json" in refused(capsys, tmp_path, f"ctm.jump.table={cut}", *words)


def test_a_missing_weights_file_is_named_before_anything_is_trained(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("ONEJUMP_WEIGHTS", raising=False)
    words = ["run", "digits-cd", *COMMON, "cd.method.distance=LPIPS", "--out", tmp_path / "new"]
    assert "LPIPS" in said(capsys, words, 2) and not (tmp_path / "new").exists()


def test_a_changed_teacher_makes_a_new_table_and_student(out, tmp_path, capsys):
    copy = shutil.copytree(out, tmp_path / "copy")
    before = load_table(copy / "ctm" / "precond.json")
    other = [word.replace("teacher.steps=6", "teacher.steps=8") for word in ANALYTIC]
    shutil.rmtree(copy / "teacher")
    assert main(["run", "digits-ctm-analytic", *other, "--out", str(copy)]) == 0
    assert load_table(copy / "ctm" / "precond.json").teacher != before.teacher


def test_a_table_left_by_a_kill_is_kept_if_it_is_the_one_asked_for_and_made_again_if_not(out, tmp_path):
    """Before the first checkpoint a stage may be given another estimator, teacher or images."""
    teacher, data = load_teacher_of(out), digits()
    wanted = AnalyticPrecond(estimator=Estimator(times=6, samples=20))
    kept = tmp_path / "precond.json"
    shutil.copy(out / "ctm" / "precond.json", kept)
    before = kept.read_bytes()
    assert jump_of(wanted, teacher, data, tmp_path, "ctm") == load_table(kept).jump() and kept.read_bytes() == before
    finer = AnalyticPrecond(estimator=Estimator(times=7, samples=20))
    assert len(jump_of(finer, teacher, data, tmp_path, "ctm").l_t) == 8
    other = replace(teacher, sha256="another")
    jump_of(finer, other, data, tmp_path, "ctm")
    assert load_table(kept).teacher == "another"
    jump_of(finer, other, replace(data, images=data.images.flip(0)), tmp_path, "ctm")
    assert load_table(kept).data_fingerprint != data.fingerprint
    kept.write_bytes(before[:200])
    assert jump_of(wanted, teacher, data, tmp_path, "ctm").teacher == teacher.sha256


def load_teacher_of(out):
    return Teacher(load_model(out / "teacher"), record(out / "teacher" / "stage.json")["model_sha256"], out / "teacher")


def test_another_teacher_for_a_stage_that_has_begun_is_refused(out, capsys, tmp_path):
    """Also where it starts from the same model as before."""
    other = changed(out / "teacher", tmp_path / "other", lambda net: net.last_weight.mul_(1.01))
    words = ["train", "digits-ctm", *COMMON, *CTM, "--stage", "ctm", "--init", str(out / "teacher")]
    words += ["--out", str(tmp_path / "new"), "--teacher"]
    assert main([*words, str(out / "teacher")]) == 0
    capsys.readouterr()
    assert f"--teacher {other}: ctm in {tmp_path / 'new'} began with another" in said(capsys, [*words, other], 2)
    assert main([*words, str(out / "teacher")]) == 0


def test_another_table_for_a_stage_that_has_begun_is_refused(out, tmp_path):
    """A file given by name may change between a kill and the resume; the student would not notice."""
    table, saved = load_table(out / "ctm" / "precond.json"), load_model(out)
    wanted = AnalyticPrecond(table="table.json")
    stage = Stage(CTMethod(n=5, max_steps=2), 1, jump=wanted, second_time="zero", sampler=Trajectory())
    sums = []
    for jump in (table.jump(), table.jump(), table.jump("forward")):
        saved.model.jump = jump
        nets = stage.method.nets(saved.model.requires_grad_(True), load_model(out / "teacher").model)
        sums.append(Run.start(stage, nets, 0, torch.device("cpu")).frozen)
    assert sums[0] == sums[1] != sums[2]


def test_jumps_of_ones_own_are_sampled_while_training_and_by_other_samplers(out, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["ctm.sampler=Jumps(start=(80,6),end=(1.5,0.002))", "evaluation.steps=2", "sample_every=2"]
    words = [*COMMON, *CTM, *words, "--teacher", str(out / "teacher"), "--out", str(folder)]
    assert main(["run", "digits-ctm", *words]) == 0
    still, _ = arrays(folder, tmp_path / "a.npz", "--n", "6", "--steps", "2", "--gamma", "0")
    noisy, _ = arrays(folder, tmp_path / "b.npz", "--n", "6", "--steps", "2", "--gamma", "1")
    assert (still != noisy).any()
    capsys.readouterr()
    assert "stay inside" in said(capsys, ["sample", folder, "--jumps", "90:0.002"], 2)


def test_another_solver_keeps_the_models_range_of_times(out):
    options = Namespace(times=None, gamma=None, jumps=None, solver="dpm2", steps=None)
    for name, own in (("teacher", ODE(0.01, 50.0, 5.0)), ("ctm", Trajectory(0.01, 50.0, 5.0))):
        sampler, _ = sampling(options, replace(load_model(out / name), sampler=own))
        assert sampler == ODE(0.01, 50.0, 5.0, dpm2)
