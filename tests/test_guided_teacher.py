"""Guidance in training: a guided teacher in a run, and labels that are left out so that there is one."""

import shutil
from dataclasses import replace

import pytest
import torch
from tiny_run import NETWORK, pictures, record, said
from training_setup import run, stage_of, student

from onejump.analytic import estimate
from onejump.analytic_table import Estimator, load_table
from onejump.cli import main
from onejump.cli_training import with_guidance
from onejump.config_json import from_json
from onejump.data.augment import Seeded
from onejump.data.digits import digits
from onejump.evaluate import evaluate
from onejump.guidance import NO_LABEL, drop_labels, guided, guided_sha256
from onejump.judge import Judge, detector_for
from onejump.methods.base import Nets
from onejump.methods.dsm import DSM
from onejump.overrides import apply_overrides
from onejump.recipes import build_recipe
from onejump.saved import load_model, model_sha256
from onejump.start import Given, check_same_teacher, doubts, guide_of_stage
from onejump.teacher import load_teacher
from onejump.types import UserError

CPU = torch.device("cpu")
TINY = [NETWORK, "teacher.steps=3", "teacher.label_dropout=0.3", "cd.steps=3", "teacher.batch=16", "cd.batch=16"]
TINY += ["cd.method.n=5", "evaluation.n=40", "cd.guidance=3"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("guided") / "run"
    for stage in ("teacher", "cd"):
        assert main(["train", "digits-cd", *TINY, "--stage", stage, "--out", str(out)]) == 0
    return out


def test_a_stage_follows_its_teacher_with_guidance(out):
    """The teacher of a stage with guidance is the guided model, which counts as another for a table of its own."""
    recipe, plain = from_json(record(out / "recipe.json")), load_model(out / "teacher").model
    found = load_teacher(recipe, "cd", out / "teacher", digits(), CPU)
    x, t, cond = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0, 60.0]), torch.tensor([3, 1, 4, 1])
    D_0, D_1 = plain.denoise(x, t), plain.denoise(x, t, cond=cond)
    torch.testing.assert_close(found.saved.model.denoise(x, t, cond=cond), D_0 + 3 * (D_1 - D_0), atol=1e-5, rtol=1e-5)
    sha = model_sha256(out / "teacher")
    assert found.sha256 == guided_sha256(sha, 3.0) != sha
    assert record(out / "cd" / "start.json")["teacher_sha256"] == sha


def test_a_stage_keeps_to_the_guide_it_began_with(out, tmp_path):
    """Which is taken again without being named, and may be no other."""
    begun = tmp_path / "run"
    shutil.copytree(out, begun)
    assert guide_of_stage("cd", begun, Given()) is None
    with pytest.raises(UserError, match="--guide .*: cd in .* began without it"):
        check_same_teacher("cd", begun, Given(guide=str(out / "teacher")))
    about = record(begun / "cd" / "stage.json")
    about["guide"] = {"path": str(out / "teacher"), "sha256": model_sha256(out / "teacher")}
    (begun / "cd" / "stage.json").write_text(str(about).replace("'", '"'))
    assert guide_of_stage("cd", begun, Given()) == out / "teacher"
    check_same_teacher("cd", begun, Given(guide=str(out / "teacher")))
    with pytest.raises(UserError, match="or with another"):
        check_same_teacher("cd", begun, Given(guide=str(out / "cd")))


def test_a_consistency_model_cannot_be_the_guide(out):
    recipe = from_json(record(out / "recipe.json"))
    with pytest.raises(UserError, match="--guide .*cd: a consistency model"):
        load_teacher(recipe, "cd", out / "teacher", digits(), CPU, out / "cd")


def test_labels_are_left_out_by_the_place_in_the_batch_alone():
    cond = torch.arange(4000) % 7
    whole = drop_labels(cond, 0.25, Seeded.of(11))
    assert abs((whole == NO_LABEL).double().mean().item() - 0.25) < 0.02
    assert ((whole == cond) | (whole == NO_LABEL)).all()
    for rank in range(2):  # two processes
        assert torch.equal(drop_labels(cond[rank::2], 0.25, Seeded.of(11, rank, 2)), whole[rank::2])


def seen_in_training(tmp_path, **how):
    """The labels that the network is given, step by step, in micro-batches of `how`."""
    seen, model = [], student(dropout=0.0)
    model.net.register_forward_pre_hook(lambda net, args: seen.append(args[3].clone()))
    run(stage_of(DSM(), steps=8, **how), tmp_path, nets=Nets(model, target=model))
    return seen


def test_training_leaves_labels_out_in_the_same_places_whatever_the_passes(tmp_path):
    how = {"label_dropout": 0.4, "batch": 12}
    whole = [cond for cond in seen_in_training(tmp_path / "a", **how, micro_batch=0) if len(cond) == 12][:8]
    parts = [cond for cond in seen_in_training(tmp_path / "b", **how, micro_batch=6) if len(cond) == 6][:16]
    assert 0.2 < (torch.cat(whole) == NO_LABEL).double().mean() < 0.6
    for step, cond in enumerate(whole):
        assert torch.equal(parts[2 * step], cond[0::2]) and torch.equal(parts[2 * step + 1], cond[1::2])
    assert not (torch.cat(seen_in_training(tmp_path / "c", batch=12, micro_batch=0)) == NO_LABEL).any()


def test_without_labels_a_guided_model_has_nothing_to_compare():
    with pytest.raises(UserError, match="got neither"):
        guided(student(dropout=0.0), 2.0).denoise(torch.zeros(2, 1, 4, 4), torch.ones(2))


def test_evaluate_judges_the_guided_model(out, tmp_path, capsys):
    """As it judges the same one made by hand; with guidance 1 the model itself; each is a record of its own."""
    saved = load_model(out / "teacher")
    judge = Judge(digits(), detector_for(digits()))
    found = {}
    for scale in (3, 1):
        words = ["evaluate", out / "teacher", "--n", "40", "--steps", "3", "--guidance", scale]
        assert main([str(word) for word in (*words, "--out", tmp_path / f"{scale}.json")]) == 0
        found[scale] = record(tmp_path / f"{scale}.json")
        model = guided(saved.model, float(scale)) if scale != 1 else saved.model
        expected = evaluate(judge, replace(saved, model=model), [3], 40, 1234)["steps"]["3"]
        assert found[scale]["steps"]["3"]["frechet"] == pytest.approx(expected["frechet"], rel=1e-4)
    sha = model_sha256(out / "teacher")
    assert found[3]["guidance"] == {"scale": 3, "guide": None} and "guidance" not in found[1]
    assert [found[scale]["model_sha256"] for scale in (1, 3)] == [sha, guided_sha256(sha, 3.0)]
    assert capsys.readouterr().out.count("\nteacher: guidance 3, which doubles the network calls\n") == 1
    line = said(capsys, ["compare", f"{out / 'teacher'}={tmp_path / '3.json'}", out / "teacher"], 2)
    assert f"{out / 'teacher'} was judged with guidance 3, which is not compared" in line
    assert main(["sample", str(out / "teacher"), "--n", "1", "--guidance", "3", "--out", str(tmp_path / "x.png")]) == 0
    assert "18 Heun steps with guidance (70 network calls)" in capsys.readouterr().out


def test_precond_makes_the_table_that_a_run_with_this_guidance_takes(out, tmp_path):
    words = ["precond", out / "teacher", "--times", "2", "--samples", "4", "--out", tmp_path / "table.json"]
    assert main([str(word) for word in (*words, "--guidance", "3")]) == 0
    found, saved = load_table(tmp_path / "table.json"), load_model(out / "teacher")
    x0, labels = digits().batch(0, 4, seed=0)
    same = estimate(guided(saved.model, 3.0), x0, labels, Estimator(2, 4))
    assert (same.l_t, same.s_t) == (found.l_t, found.s_t)
    recipe = from_json(record(out / "recipe.json"))
    assert found.teacher == load_teacher(recipe, "cd", out / "teacher", digits(), CPU).sha256


def test_what_cannot_be_guided_is_one_line(out, capsys):
    for command in ("evaluate", "precond"):
        told = "consistency model, and diffusion models alone" if command == "evaluate" else "not a diffusion model"
        assert told in said(capsys, [command, out / "cd", "--guidance", "2"], 2)
        line = said(capsys, [command, out / "teacher", "--guide", out / "teacher"], 2)
        assert "--guide" in line and "nothing is guided at scale 1; give --guidance too" in line
    assert "--guidance is for a model" in said(capsys, ["evaluate", "--images", "digits", "--guidance", "2"], 2)


@pytest.mark.parametrize("how", [["--guidance", "2"], ["cd.guidance=2"], ["--guidance", "2", "--dry-run"]])
def test_guidance_of_a_teacher_without_classes_is_refused_before_it_is_trained(tmp_path, capsys, how):
    data, run_ = pictures(tmp_path / "photos", 10, 16), tmp_path / "run"
    words = ["run", "digits-cd", "--data", data, "--out", run_, *how]
    told = "cd.guidance: 2, but the teacher knows no classes to guide by; leave guidance at 1, or give --guide MODEL"
    assert told in said(capsys, words, 2) and not run_.exists()


def test_a_teacher_that_will_not_know_what_no_label_is_is_warned_of(out, tmp_path):
    """Where it is trained in this very run, and guided by its labels."""
    recipe = with_guidance(build_recipe("digits-cd", digits()), 2.0)
    (told,) = doubts(recipe, ["teacher", "cd"], tmp_path, Given())
    assert told.startswith("teacher.label_dropout=0: ") and told.endswith("; give teacher.label_dropout=0.1")
    for given in (Given(teacher="published"), Given(guide="smaller")):
        assert not doubts(recipe, ["teacher", "cd"], tmp_path, given)
    assert not doubts(apply_overrides(recipe, ["teacher.label_dropout=0.1"]), ["teacher", "cd"], tmp_path, Given())
    assert not doubts(build_recipe("digits-cd", digits()), ["teacher", "cd"], tmp_path, Given())
    assert not doubts(recipe, ["cd"], tmp_path, Given()) and not doubts(recipe, ["teacher", "cd"], out, Given())
