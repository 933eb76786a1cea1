"""Stages that end by their rule, within a run: what is decided, what is kept, and what the next one makes of it."""

import json
import os
import signal

import pytest
from tiny_run import NETWORK, record

from onejump.cli import main
from onejump.data.digits import digits
from onejump.evaluate import Judge, detector_for
from onejump.generate import balanced_labels, generate
from onejump.hand_over import Plateau, decide
from onejump.run_folder import read_lines
from onejump.saved import load_model
from onejump.watch import Watch

RULE = Plateau(patience=2)
TINY = [NETWORK, "teacher.steps=2", "stage1.steps=20", "stage2.steps=2", "stage1.until=Plateau(patience=2)"]
TINY += [f"{stage}.batch=16" for stage in ("teacher", "stage1", "stage2")]
TINY += ["stage1.rate=ConstantRate(lr=0.1)", "stage1.ema=ConstantEMA(beta=0.5)"]  # it is best after a few steps
TINY += ["save_every=5", "evaluate_every=1", "sample_every=0", "evaluation.n=40", "evaluation.seed=5"]
CLOCK = ("seconds", "seconds_on_the_clock")


def train(out, stage, *more):
    return main(["train", "digits", *TINY, *more, "--stage", stage, "--out", str(out)])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("hand_over") / "run"
    assert [train(out, stage) for stage in ("teacher", "stage1", "stage2")] == [0, 0, 0]
    return out


def test_a_stage_ends_by_its_rule_with_its_best_model(out):
    stage = record(out / "stage1" / "stage.json")
    history = RULE.history(read_lines(out / "stage1" / "evaluations.jsonl"))
    found = decide(history, RULE)
    assert found is not None and 1 < found.best.step < found.step < 20 and found.step % 5
    assert stage["hand_over"] == found.record(RULE)
    assert stage["last_step"] == history[-1].step == found.step and stage["images"] == 16 * found.step
    saved = load_model(out / "stage1")
    assert saved.provenance["step"] == found.best.step
    images = generate(saved.model, saved.sampler, 1, range(40), saved.shape, balanced_labels(40, 10), 5)
    judge = Judge(digits(), detector_for(digits()))
    assert judge.frechet(images) == pytest.approx(found.best.value, rel=1e-5)  # the best model's samples, made again
    assert not (out / "stage1" / "best").exists()
    assert (out / "stage1" / "checkpoints" / f"step-{found.step:08d}").is_dir()  # the last one


def test_the_next_stage_counts_on_from_the_model_it_is_handed(out):
    first, second = (record(out / name / "stage.json") for name in ("stage1", "stage2"))
    best = first["hand_over"]["best_step"]
    assert (second["first_step"], second["last_step"]) == (best, best + 2)
    assert second["started_from"] == first["model_sha256"]
    assert [line["step"] for line in read_lines(out / "stage2" / "evaluations.jsonl")] == [best + 1, best + 2]


def test_the_report_shows_the_decision_and_its_evidence(out):
    assert main(["report", str(out)]) == 0
    page, found = (out / "report.html").read_text(), record(out / "stage1" / "stage.json")["hand_over"]
    assert "Hand-over" in page and f"ended at step {found['at_step']}" in page
    for step, value in found["evaluations"]:
        assert f"<td>{step}</td><td>{value:.4g}" in page


def test_a_stage_that_is_stopped_at_its_evaluations_decides_the_same(out, tmp_path, monkeypatch):
    """Also once the rule has spoken: an evaluation is on file before the process ends."""
    looked, again = Watch.on_evaluate, tmp_path / "run"

    def stops(self, ema, step):
        line = looked(self, ema, step)
        if step % 2:
            os.kill(os.getpid(), signal.SIGINT)
        return line

    assert train(again, "teacher") == 0
    monkeypatch.setattr(Watch, "on_evaluate", stops)
    stopped = 0
    while (code := train(again, "stage1")) != 0:
        stopped += 1
        assert code == 130 and stopped < 20
    assert stopped > 2
    files = ("model/model.safetensors", "model/config.json")
    assert all((again / "stage1" / file).read_bytes() == (out / "stage1" / file).read_bytes() for file in files)
    one, other = (record(run / "stage1" / "stage.json") for run in (out, again))
    assert {k: v for k, v in one.items() if k not in CLOCK} == {k: v for k, v in other.items() if k not in CLOCK}


def test_a_stage_whose_steps_are_done_hands_over_its_best_too(tmp_path):
    again = tmp_path / "run"
    short = ["stage1.steps=3", "stage1.until=Plateau(patience=9,t=2.0)"]
    assert [train(again, stage, *short) for stage in ("teacher", "stage1")] == [0, 0]
    found = record(again / "stage1" / "stage.json")["hand_over"]
    lines = read_lines(again / "stage1" / "evaluations.jsonl")
    values = {line["step"]: line["denoising_frechet"]["2"] for line in lines}
    assert found["why"] == "end" and found["at_step"] == 3 and len(values) == 3
    assert found["best_step"] == min(values, key=values.get) == load_model(again / "stage1").provenance["step"]
    assert json.loads((again / "stage1" / "start.json").read_text())["first_step"] == 0
