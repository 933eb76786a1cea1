"""Comparisons: the numbers on file and no others, samples from one noise, and nothing that would lie."""

import re
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from compare_setup import NETWORK, PASSES, REFERENCE, STAGES, change, command, numbers_of, save, write, write_run

from onejump.compare import compare, flat
from onejump.compare_models import passes_of, targets_of
from onejump.config import Recipe, Stage
from onejump.config_json import to_json
from onejump.cost import cost_of
from onejump.lpips import LPIPS
from onejump.methods.cd import CD
from onejump.methods.continuous import ContinuousCT
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.networks.critic import SmallCriticConfig
from onejump.page import DASH
from onejump.precond import CM, Euler
from onejump.samplers import Multistep, Trajectory
from onejump.saved import model_sha256
from onejump.solvers import euler
from onejump.types import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return write_run(out / "a"), write_run(out / "b", seed=1, frechet=0.5)


def test_cost_of_training_adds_images_times_passes_over_the_chain(runs):
    flops = cost_of(NETWORK, 1).flops
    parts = [STAGES[name].steps * STAGES[name].batch * PASSES[name] * flops for name in STAGES]
    found = compare([f"{runs[0]}/{name}" for name in STAGES])
    assert [entry.training.flops for entry in found.entries] == list(accumulate(parts))
    assert [entry.training.seconds for entry in found.entries] == [60, 180, 360]
    assert [entry.flops for entry in found.entries] == [flops] * 3


TIME = "Time, s / 1,000 images"
CM_JUMP = {"jump": CM(), "batch": 64}
CTM_JUMP = {"jump": Euler(), "second_time": "zero", "sampler": Trajectory()}


@pytest.mark.parametrize(
    ("stage", "passes"),
    [
        (Stage(DSM(), 1), 3),
        (Stage(ECT(), 1), 4),
        (Stage(ICT(), 1, **CM_JUMP), 4),
        (Stage(TCM(), 1), 4),
        (Stage(CD(), 1, **CM_JUMP), 3 + 1 + 2),
        (Stage(CD(solver=euler), 1, **CM_JUMP), 3 + 1 + 1),
        (Stage(ContinuousCT(), 1, **CM_JUMP), 3 + 2),
        (Stage(CD(distance=LPIPS()), 1, **CM_JUMP), None),
        (Stage(CTMGAN(CTM()), 1, critic=SmallCriticConfig(), **CTM_JUMP), None),
    ],
)
def test_passes_of_a_step_are_those_of_the_algorithm(stage, passes):
    """3 for a pass with its backward pass, 1 for the target, 2 for a step of Heun, 2 for a derivative's."""
    assert passes_of(Recipe("r", NETWORK), stage) == passes


def test_passes_leave_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    passes_of(Recipe("r", NETWORK), STAGES["teacher"])
    assert torch.equal(torch.rand(2), expected)


def other_images(record):
    record["reference"]["fingerprint"] = "cafe"


def other_detector(record):
    record["reference"]["detector_sha256"] = "cafe"


def other_rounding(record):
    record["stages"]["stage2"]["rounding"] = "truncate"


def fewer_samples(record):
    for stage in record["stages"].values():
        for numbers in stage["steps"].values():
            numbers["n"] = 500


@pytest.mark.parametrize(
    ("edit", "note"),
    [
        (other_images, "measured against other real images (1,437, sha256 cafe; a/stage2: 1,437, sha256 f00d)"),
        (other_detector, "measured through another detector (some, sha256 cafe; a/stage2: some, sha256 beef)"),
        (other_rounding, "its pixels were made by --rounding truncate (a/stage2: round)"),
        (fewer_samples, "measured on 500 samples (a/stage2: 2,000)"),
    ],
)
def test_what_was_measured_another_way_is_marked_and_not_drawn(edit, note, runs, tmp_path):
    bad = write_run(tmp_path / "bad", seed=2, frechet=0.01)
    change(bad / "evaluation.json", edit)
    found = compare([str(runs[0]), str(bad), str(runs[1])])
    assert [entry.name for entry in found.comparable] == ["a/stage2", "b/stage2"]
    assert found.notes == [f"{note}: not comparable, left out of the charts"]
    assert [found.label(entry) for entry in found.entries] == ["a/stage2", "bad/stage2 [1]", "b/stage2"]


def test_marks_are_on_the_page_and_in_print(runs, tmp_path, capsys):
    bad = write_run(tmp_path / "bad", seed=2, frechet=0.01)
    change(bad / "evaluation.json", fewer_samples)
    out = tmp_path / "x.html"
    command(runs[0], bad, runs[1], "--n", 2, "--out", out)()
    source, printed = out.read_text(), capsys.readouterr().out
    assert '<tr class="real"><td>bad/stage2 [1]</td>' in source
    assert "bad" not in "".join(re.findall("<svg.*?</svg>", source)) + re.search('"verdict">(.*?)</p>', source)[1]
    assert "[1] measured on 500 samples (a/stage2: 2,000)" in printed and re.search(
        r"^bad/stage2 \[1\] +1 +1 +0\.00333", printed, re.MULTILINE
    )


def test_columns_are_those_of_what_was_measured(runs, tmp_path):
    bare = compare(list(map(str, runs))).result_table()[0]
    assert bare == ("Model", "Steps", "NFE", "Fréchet, lower is better", "KID", "GFLOP, an image", TIME)
    more = {"frechet_interval": [0.9, 1.1], "inception_score": {"mean": 7.5, "std": 1}, "recall": 0.5}
    other = write_run(tmp_path / "c")
    change(other / "evaluation.json", lambda found: found["stages"]["stage2"]["steps"]["2"].update(more))
    header, rows = compare([str(runs[0]), str(other)]).result_table()
    assert header == (*bare[:4], "Interval, 95 %", "KID", "IS", "Recall", *bare[5:])
    assert rows[3][4:8] == ("0.900 to 1.10", "0.00250", "7.50", "0.500")
    assert rows[2][4:8] == (DASH, "0.00333", DASH, DASH)


def test_what_differs_besides_the_measure_is_said_and_still_drawn(runs, tmp_path):
    other = write_run(tmp_path / "c", seed=3)
    change(other / "run.json", lambda run: run.update(threads=4))
    origin = {"data": "dots", "data_fingerprint": "cafe"}
    save(other / "stage2" / "model", 5, Multistep(), origin, names=("x", "y"))
    sha256 = model_sha256(other / "stage2")
    change(other / "evaluation.json", lambda found: found["stages"]["stage2"].update(model_sha256=sha256))
    found = compare([str(runs[0]), str(other)])
    assert found.comparable == list(found.entries) and not found.one_device
    assert found.notes == [
        "trained on other images than a/stage2",
        "knows other classes than a/stage2: its samples are not asked for the same ones",
        "timed on another device (cpu, 4 threads)",
    ]


def test_evaluation_of_other_weights_is_not_believed(runs, tmp_path):
    run = write_run(tmp_path / "c", seed=3)
    save(run / "stage2" / "model", 5, Multistep(), {})
    stale, _ = compare([str(run), str(runs[0])]).entries
    assert stale.record is None and "of other weights" in stale.remarks[0]


def test_models_with_a_record_stand_beside_runs(runs, tmp_path):
    save(tmp_path / "single.safetensors", 7, Multistep(), {"method": {"type": "ECT", "c": 0.1}})
    sha256 = model_sha256(tmp_path / "single.safetensors")
    steps = {"2": numbers_of(0.25, 2, 2), "1": numbers_of(0.75, 1, 1)}
    record = {"model_sha256": sha256, "reference": REFERENCE, "sampler": to_json(Multistep(mid=(3.0,))), "steps": steps}
    write(tmp_path / "r=1.json", record)
    write(tmp_path / "r.json", record)
    found = compare([f"{tmp_path}/single.safetensors={tmp_path}/r.json", str(runs[0])], ["A", "B"])
    assert [row[:4] for row in found.result_table()[1][:2]] == [("A", "1", "1", "0.750"), ("A", "2", "2", "0.250")]
    assert found.model_rows()[0][:3] == ("A", "ECT", DASH) and found.model_rows()[0][4:] == (DASH,) * 3
    assert found.entries[0].sampler == Multistep(mid=(3.0,))
    with pytest.raises(UserError, match=r"r\.json: this is no record of .*stage2"):
        compare([f"{runs[1]}={tmp_path}/r.json", str(runs[0])])
    write(tmp_path / "r.json", {"model_sha256": sha256, "steps": {"1": {"kid": 1}}, "reference": {}})
    with pytest.raises(UserError, match=r"r\.json: no record of an evaluation \(KeyError\('frechet'\)\)"):
        compare([f"{tmp_path}/single.safetensors={tmp_path}/r.json", str(runs[0])])


def test_two_records_of_one_model_are_named_by_their_files(runs, tmp_path):
    save(tmp_path / "m", 7, Multistep(), {})
    steps = {"1": numbers_of(0.75, 1, 1)}
    for name in ("x", "y"):
        record = {"model_sha256": model_sha256(tmp_path / "m"), "reference": REFERENCE, "steps": steps}
        write(tmp_path / f"{name}.json", record)
    words = [f"{tmp_path}/m={tmp_path}/{name}.json" for name in ("x", "y")]
    assert [entry.name for entry in compare(words).entries] == ["m (x)", "m (y)"]
    with pytest.raises(UserError, match=r"2 models are called 'm \(x\)'"):
        compare([words[0], words[0]])


def test_a_recipe_of_another_version_is_named(runs, tmp_path):
    run = write_run(tmp_path / "old")
    change(run / "recipe.json", lambda recipe: recipe["stages"]["stage1"].update(gone=1))
    for word in (run, run / "stage2"):
        with pytest.raises(UserError, match=r"old/recipe\.json: cannot be read \(.*gone"):
            compare([str(word), str(runs[0])])


def test_training_that_began_elsewhere_is_counted_where_it_is_on_file(runs, tmp_path):
    run = write_run(tmp_path / "c", seed=3, stages={"stage1": STAGES["stage1"]})
    given = {"path": str(runs[0] / "teacher"), "sha256": model_sha256(runs[0] / "teacher")}
    began = {"started_from": given["sha256"], "initialised_from": given}
    change(run / "stage1" / "stage.json", lambda stage: stage.update(began))
    entry = compare([str(run), str(runs[0])]).entries[0]
    assert entry.training.whole and entry.training.images == 1000 + 2000
    change(run / "stage1" / "stage.json", lambda stage: stage["initialised_from"].update(path=str(tmp_path / "gone")))
    entry = compare([str(run), str(runs[0])]).entries[0]
    assert not entry.training.whole and entry.training.images == 2000
    assert "trained elsewhere" in entry.remarks[0]


def test_only_fields_that_differ_are_listed(tmp_path, runs):
    stages = STAGES | {"stage1": replace(STAGES["stage1"], steps=250), "stage2": replace(STAGES["stage2"], clip=2.0)}
    other = write_run(tmp_path / "c", stages=stages)
    found = compare([str(runs[0]), str(other)])
    assert found.differences() == [("clip", "1000000", "2"), ("stage1.steps", "200", "250")]
    fields = [row[0] for row in compare([f"{runs[0]}/stage1", f"{runs[0]}/stage2"]).differences()]
    assert fields[:2] == ["method", "method.times"] and fields[-1] == "sampler.mid"
    assert {"batch", "steps", "count_on"} <= set(fields) and not {"seed", "clip", "optimizer"} & set(fields)


def test_settings_are_dotted_paths_and_their_values():
    settings = dict(flat(to_json(Stage(CD(), 5, jump=CM())), ""))
    assert settings["method"] == "CD" and settings["method.solver"] == "heun"
    assert settings["jump"] == "CM" and settings["count_on"] == "false" and settings["clip"] == "1000000"


def test_a_run_is_its_last_finished_stage_or_all_or_the_one_named(runs, tmp_path):
    run = write_run(tmp_path / "c")
    (run / "stage2" / "stage.json").unlink()
    names = {
        text: [target.name for target in targets_of(str(run / text), stages)]
        for text, stages in (("", False), (".", True), ("teacher", True), ("stage1/model", False))
    }
    assert names == {
        "": ["c/stage1"],
        ".": ["c/teacher", "c/stage1"],
        "teacher": ["c/teacher"],
        "stage1/model": ["c/stage1"],
    }


def test_mistakes_are_one_line(runs, tmp_path):
    a, b = map(str, runs)
    unfinished, plain = tmp_path / "c", tmp_path / "plain"
    write(unfinished / "recipe.json", to_json(Recipe("r", NETWORK, STAGES)))
    (unfinished / "teacher").mkdir()
    save(plain, 1, Multistep(), {}, shape=(3, 8, 8))
    for words, message in (
        ([a], "one model alone, nothing to compare"),
        ([a, f"{tmp_path}/none"], "none: no such run or model"),
        ([a, f"{b}={tmp_path}/none.json"], "none.json: no such file; `onejump evaluate"),
        ([a, str(unfinished)], "no stage of this run is finished; it goes on with `onejump run`"),
        ([a, f"{unfinished}/teacher"], "this stage is not finished"),
        ([a, str(plain)], "plain: makes images of 3x8x8, a/stage2 of 1x8x8"),
        ([a, b, a], "2 models are called 'a/stage2'"),
        ([a, b, "--names", "x,x"], "2 models are called 'x'"),
        ([a, b, "--names", "x,"], "a name is empty"),
        ([a, b, "--names", "x"], "1 name for 2 models (a/stage2, b/stage2)"),
        ([a, f"{b}/report"], "report: no model there"),
        ([a, b, "--n", "0"], "--n 0"),
        ([a, b, "--seed", "-1"], "--seed -1"),
        ([a, b, "--out", "x.png"], "--out x.png: end it with .html"),
    ):
        with pytest.raises(UserError) as caught:
            command(*words)
        assert message in str(caught.value) and "\n" not in str(caught.value)
