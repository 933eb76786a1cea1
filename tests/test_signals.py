import os
import signal
import threading

import pytest
from training_setup import Recorder, run, stage_of

from onejump.checkpoint import load_checkpoint
from onejump.train import Every, Interrupted

NEVER = Every(log=0, save=0, sample=0, evaluate=0)


def test_a_second_signal_stops_at_once(tmp_path):
    def twice(done):
        if done == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

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
