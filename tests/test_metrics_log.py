import re
import sys

import pytest

from onejump.metrics_log import ProgressBar, ProgressLines, RunLog, duration, summary


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
    rates = [summary({"loss": None, "images_per_second": rate, "skipped": 0}) for rate in (2910.4, 0.25)]
    assert rates == ["loss -  2,910 images/s", "loss -  0.25 images/s"]
    assert [duration(s) for s in (5, 65, 3600 * 2 + 61)] == ["5s", "1m05s", "2h01m"]


def screen(text):
    """What a terminal shows after these characters: new lines, returns, lines wiped, the cursor moved up."""
    lines, row, column = [""], 0, 0
    for code, char in re.findall(r"\x1b\[([?0-9;]*[A-Za-z])|([^\x1b])", text):
        if code.endswith("A"):
            row -= int(code[:-1])
        elif code == "2K":
            lines[row] = ""
        elif char == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif char == "\r":
            column = 0
        elif char:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
    return lines


def test_after_ctrl_c_a_terminal_shows_one_bar(capsys, monkeypatch):
    """A second one below what the signal's handler writes would be left behind."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    metrics = {"loss": 0.25, "images_per_second": 123.4, "skipped": 0}
    terminal, progress = sys.stderr, ProgressBar("stage1")  # a bar that runs puts something of its own there
    progress.start(100, 0)
    progress.update(40, metrics)
    progress.bar.refresh()
    print("^C\nStopping after this step", file=terminal)
    progress.update(41, metrics)
    progress.close()
    left = [line.split()[0] for line in screen(capsys.readouterr().err) if line.strip()]
    assert left == ["stage1", "Stopping"]


def test_tensorboard_gets_the_numbers_of_the_lines(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0, tensorboard=True)
    log.metric({"step": 3, "loss": 0.5, "loss_by_t": [None, 1.0]})
    log.evaluation({"step": 3, "frechet": {"1": 7.5}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {"loss": [(3, 0.5)], "frechet/1": [(3, 7.5)]}
