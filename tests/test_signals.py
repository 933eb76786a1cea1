import os
import signal
import threading

import pytest
from training_setup import Recorder, run, stage_of

from onejump.checkpoint import load_checkpoint
from onejump.signals import Interrupted, StopOnSignal, Terminated, TermUnwinds
from onejump.train import Every

NEVER = Every(log=0, save=0, sample=0, evaluate=0)


def test_a_second_signal_stops_at_once(tmp_path):
    def twice(done):
        if done == 4:
            signal.raise_signal(signal.SIGINT)  # heard before the next line, as one from elsewhere may not be
            signal.raise_signal(signal.SIGINT)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    progress = Recorder(twice)
    with pytest.raises(KeyboardInterrupt):
        run(stage_of(), tmp_path, progress=progress)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert progress.closed and load_checkpoint(tmp_path / "checkpoints").step == 3


def test_training_works_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(stage_of(steps=3), tmp_path)))
    thread.start()
    thread.join()
    assert results[0].last_step == 3


def test_a_signal_during_the_last_evaluation_is_heard(tmp_path):
    def evaluate(ema, step):
        os.kill(os.getpid(), signal.SIGINT)
        return {"frechet": {}}

    with pytest.raises(Interrupted) as stop:
        run(stage_of(steps=3), tmp_path, every=NEVER, on_evaluate=evaluate)
    assert stop.value.step == 3 and load_checkpoint(tmp_path / "checkpoints").step == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_what_a_scheduler_stops_has_not_failed(tmp_path, number, code):
    progress = Recorder(lambda done: os.kill(os.getpid(), number) if done == 4 else None)
    with pytest.raises(Interrupted) as stop:
        run(stage_of(), tmp_path, every=NEVER, progress=progress)
    assert (stop.value.code, stop.value.step) == (code, 4)
    assert load_checkpoint(stop.value.path.parent).step == 4


def test_sigterm_sent_twice_still_saves_the_step(tmp_path):
    """As a scheduler and a launcher both do."""

    def twice(done):
        if done == 4:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as stop:
        run(stage_of(), tmp_path, every=NEVER, progress=Recorder(twice))
    assert (stop.value.code, load_checkpoint(tmp_path / "checkpoints").step) == (0, 4)


def test_sigterm_outside_of_training_unwinds_and_inside_it_finishes_the_step():
    before, log = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(Terminated):
        with TermUnwinds():
            with StopOnSignal() as stop:
                signal.raise_signal(signal.SIGTERM)
                log.append((stop.requested, stop.code))
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)  # not heard: it would meet the unwinding
                log.append("closed")
    assert log == [(True, 0), "closed"] and signal.getsignal(signal.SIGTERM) == before
