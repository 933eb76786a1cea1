import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from processes import life
from training_setup import Recorder, run, stage_of, student

from onejump.checkpoint import load_checkpoint
from onejump.data.image_set import ImageSet
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.optim import Adam
from onejump.train import Every, Interrupted
from onejump.types import UserError

CLOCK = {"seconds", "train_seconds", "images_per_second"}


def state(out):
    """Everything a checkpoint holds, without the clock: student, EMA, optimiser, sums, scaler, counters."""
    saved = load_checkpoint(out / "checkpoints")
    meta = {name: value for name, value in saved.meta.items() if name not in CLOCK}
    meta["sums"] = {name: value for name, value in meta["sums"].items() if name not in CLOCK}
    return saved.step, {name: (t.dtype, t.numpy().tobytes()) for name, t in saved.tensors.items()}, meta


def told(out):
    """All lines of both files, without the clock."""
    files = [out / "metrics.jsonl", out / "evaluations.jsonl"]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def stop_at(step, number=signal.SIGINT):
    return Recorder(lambda done: os.kill(os.getpid(), number) if done == step else None)


def assert_equal_runs(a, b):
    (step_a, tensors_a, meta_a), (step_b, tensors_b, meta_b) = state(a), state(b)
    assert step_a == step_b and meta_a == meta_b
    assert tensors_a.keys() == tensors_b.keys()
    assert [name for name in tensors_a if tensors_a[name] != tensors_b[name]] == []
    assert told(a) == told(b)


STAGES = {
    "dsm": stage_of(DSM()),
    "ect, Adam": stage_of(ECT(), optimizer=Adam(), micro_batch=0),
    "tcm": stage_of(TCM()),
    "tcm, fp16": stage_of(TCM(), precision="fp16"),
    "tcm, bf16": stage_of(TCM(), precision="bf16"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_resume_is_bit_exact(tmp_path, stage, number):
    """20 steps in one go, and stopped after 7 and 16, amid a log interval: with dropout and micro-batches."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(stage, straight, first_step=40)
    for done in (7, 16):
        with pytest.raises(Interrupted) as error:
            run(stage, stopped, first_step=40, progress=stop_at(done, number))
        assert error.value.step == 40 + done == load_checkpoint(stopped / "checkpoints").step
        assert error.value.path == stopped / "checkpoints" / f"step-000000{40 + done}"
    progress = Recorder()
    result = run(stage, stopped, first_step=40, progress=progress)
    assert_equal_runs(straight, stopped)
    assert progress.started == (20, 16) and not progress.messages
    assert (result.last_step, result.images) == (60, 240)


def test_what_a_callback_draws_changes_nothing(tmp_path):
    run(stage_of(), tmp_path / "a")
    run(stage_of(), tmp_path / "b", on_sample=lambda ema, step: torch.randn(step))
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def test_a_damaged_checkpoint_costs_its_steps_only(tmp_path):
    run(stage_of(), tmp_path / "a")
    with pytest.raises(Interrupted):
        run(stage_of(), tmp_path / "b", progress=stop_at(11))
    file = tmp_path / "b" / "checkpoints" / "step-00000011" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    progress = Recorder()
    run(stage_of(), tmp_path / "b", progress=progress)
    assert progress.started == (20, 9)
    assert len(progress.messages) == 1 and "step-00000011" in progress.messages[0]
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def test_lines_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    run(stage_of(), tmp_path / "a")
    with pytest.raises(RuntimeError):  # dies at step 18: logged 4, 8, 12, 16; evaluated 6, 12; saved 15
        run(stage_of(), tmp_path / "b", progress=Recorder(die_at(17)))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        with open(tmp_path / "b" / name, "a") as file:
            file.write('{"step": 1, "lo')
    run(stage_of(), tmp_path / "b")
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def die_at(step):
    def at_step(done):
        if done == step:
            raise RuntimeError("the machine is gone")

    return at_step


def test_a_failed_evaluation_is_made_up_for(tmp_path):
    """The checkpoint comes first: a failure costs no steps, and the resumed run begins with what is missing."""

    def fails(ema, step):
        if step == 12:
            raise RuntimeError("no memory")
        return {"frechet": {"1": 1.0 / step}}

    run(stage_of(), tmp_path / "a")
    with pytest.raises(RuntimeError):
        run(stage_of(), tmp_path / "b", on_evaluate=fails)
    progress = Recorder()
    run(stage_of(), tmp_path / "b", progress=progress)
    assert progress.started == (20, 12)
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def test_a_finished_run_is_not_run_again(tmp_path):
    evaluated = []

    def evaluate(ema, step):
        evaluated.append(step)
        return {}

    first = run(stage_of(), tmp_path, on_evaluate=evaluate)
    lines = told(tmp_path)
    again = run(stage_of(), tmp_path, on_evaluate=evaluate)
    assert told(tmp_path) == lines and evaluated == [6, 12, 18, 20]
    assert all(p.equal(q) for p, q in zip(first.ema.parameters(), again.ema.parameters(), strict=True))
    assert (again.images, again.skipped, again.train_seconds) == (first.images, first.skipped, first.train_seconds)


def test_data_that_cannot_be_read_costs_no_checkpoint(tmp_path, monkeypatch):
    run(stage_of(), tmp_path / "a")
    batch = ImageSet.batch

    def broken(self, step, *args):
        if step == 8:
            raise OSError("the network drive is gone")
        return batch(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ImageSet, "batch", broken)
        with pytest.raises(OSError, match="drive"):
            run(stage_of(), tmp_path / "b")
    assert load_checkpoint(tmp_path / "b" / "checkpoints").step == 6
    run(stage_of(), tmp_path / "b")
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def test_a_full_disk_costs_no_checkpoint(tmp_path, monkeypatch):
    run(stage_of(), tmp_path / "a")
    replace = os.replace

    def full(source, target):
        if target.name == "step-00000009":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left on device.*last good one is step 6"):
            run(stage_of(), tmp_path / "b")
    run(stage_of(), tmp_path / "b")
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def test_skips_are_counted_across_a_resume(tmp_path):
    """Nine bad steps, stopped after five of them; one more bad one would be the tenth."""

    class Bad:
        def nets(self, student):
            return DSM().nets(student)

        def loss(self, nets, x0, cond, step, steps):
            loss, stats = DSM().loss(nets, x0, cond, step, steps)
            return (loss * float("nan") if 4 <= step < 14 else loss), stats

    with pytest.raises(Interrupted):
        run(stage_of(Bad()), tmp_path, progress=stop_at(9))
    tensors = load_checkpoint(tmp_path / "checkpoints").tensors
    assert (tensors["optimizer/skipped"], tensors["optimizer/skipped_in_row"]) == (5, 5)
    with pytest.raises(UserError, match="step 14: .*10 steps in a row"):
        run(stage_of(Bad()), tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(stage_of(steps=5), tmp_path)
    with pytest.raises(UserError, match="frozen network is not the one"):
        run(stage_of(steps=5), tmp_path, nets=TCM().nets(student(seed=1)))
    with pytest.raises(UserError, match="RAdam .* this is Adam"):
        run(stage_of(steps=5, optimizer=Adam()), tmp_path)
    with pytest.raises(UserError, match="step 5, this stage would end at 3"):
        run(stage_of(steps=3), tmp_path)


def driver(out: Path, kill_after: int, delay: float) -> None:
    """Train; a timer that starts after step `kill_after` kills this very process."""

    def at_step(done: int) -> None:
        if done == kill_after:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        time.sleep(1e-3)  # so that the timer meets a run that still runs

    run(stage_of(TCM(), steps=90), out, every=Every(10, 2, 7, 9), progress=Recorder(at_step))


def test_killed_five_times_at_random_moments_ends_with_the_same_bits(tmp_path):
    run(stage_of(TCM(), steps=90), tmp_path / "straight", every=Every(10, 2, 7, 9))
    rng = random.Random(time.time_ns())
    for kill_after in (12, 25, 38, 51, 64, 1000):
        ended = life(driver, tmp_path / "killed", kill_after, rng.uniform(0, 0.03))
        assert ended == (0 if kill_after == 1000 else -signal.SIGKILL)
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed")
