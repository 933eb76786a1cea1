import pytest

from onejump.metrics_log import ProgressBar, ProgressLines, RunLog, duration


def test_progress_tells_loss_speed_and_time_left_on_a_terminal_and_in_a_file(capsys):
    metrics = {"loss": 0.25, "images_per_second": 123.4, "skipped": 2}
    for progress in (ProgressBar("stage1"), ProgressLines("stage1")):
        progress.start(100, 40)
        for done in range(41, 101):
            progress.update(done, metrics if done % 20 == 0 else None)
        progress.message("checkpoint: [bold] is text")
        progress.close()
    shown = capsys.readouterr().err
    first, last, message = shown.splitlines()[-3:]
    assert first.startswith("stage1: 60/100  loss 0.25  123 images/s  2 skipped  ") and first.endswith(" left")
    assert last.startswith("stage1: 100/100") and message == "stage1: checkpoint: [bold] is text"
    assert "100/100" in shown and "loss 0.25  123 images/s" in shown and "checkpoint: [bold] is text" in shown
    assert [duration(s) for s in (5, 65, 3600 * 2 + 61)] == ["5s", "1m05s", "2h01m"]


def test_tensorboard_gets_the_numbers_of_the_lines(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0, tensorboard=True)
    log.write(log.metrics, {"step": 3, "loss": 0.5, "loss_by_t": [None, 1.0]})
    log.write(log.evaluations, {"step": 3, "frechet": {"1": 7.5}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {"loss": [(3, 0.5)], "frechet/1": [(3, 7.5)]}
