"""Power cuts, damaged files, full disks, Ctrl-C and kill -9: nothing that was finished is lost."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import command, finished_run, record, weights

from onejump.cli import main
from onejump.run_record import alone


@pytest.mark.parametrize("name", ["stage2/stage.json", "evaluation.json"])
@pytest.mark.parametrize("content", ["", '{"first_'])
def test_a_record_cut_short_by_a_power_cut_is_made_again(tmp_path, capsys, name, content):
    out = finished_run(tmp_path)
    before = weights(out)
    (out / name).write_text(content)
    assert main(command(out)) == 0
    assert f"{out / name}: damaged, is made again" in capsys.readouterr().err
    assert record(out / name) and weights(out) == before


@pytest.mark.parametrize("name", ["recipe.json", "run.json"])
def test_a_cut_configuration_is_refused_with_a_way_out_that_works(tmp_path, capsys, name):
    out = finished_run(tmp_path)
    before = weights(out)
    (out / name).write_text((out / name).read_text()[:30])
    assert main(command(out)) == 2
    err = capsys.readouterr().err
    assert f"{out / name}: cannot be read" in err and "delete recipe.json" in err and len(err.splitlines()) == 1
    (out / "recipe.json").unlink()
    assert main(command(out)) == 0
    assert weights(out) == before


def test_a_checkpoint_cut_in_half_costs_its_steps_only(tmp_path, capsys):
    out = finished_run(tmp_path)
    before = weights(out)
    (out / "stage2" / "stage.json").unlink()
    cut = out / "stage2" / "checkpoints" / "step-00000010" / "state.safetensors"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert main(command(out)) == 0
    err = capsys.readouterr().err
    assert "step-00000010 is damaged" in err and "using step-00000008 instead" in err
    assert weights(out) == before


def test_with_all_checkpoints_damaged_one_line_says_what_to_do(tmp_path, capsys):
    out = finished_run(tmp_path)
    (out / "stage2" / "stage.json").unlink()
    for path in (out / "stage2" / "checkpoints").glob("*/state.json"):
        path.write_text("")
    assert main(command(out)) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if "finished before" not in line]
    assert len(err) == 1 and "step-00000010 is damaged" in err[0] and "delete it to start afresh" in err[0]


class FullDisk:
    """os.fsync that finds no space left, for the files of one name; all our files are synced before they count."""

    def __init__(self, monkeypatch, name):
        self.name, self.sync, self.met = name, os.fsync, False
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor):
        if self.name in os.readlink(f"/proc/self/fd/{descriptor}"):
            self.met = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.sync(descriptor)


@pytest.mark.skipif(sys.platform != "linux", reason="names open files through /proc")
@pytest.mark.parametrize(
    "name", ["state.safetensors", "model.safetensors", "config.json", "stage.json", "evaluation.json"]
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch, name):
    out = finished_run(tmp_path)
    before = weights(out)
    for path in [out / "stage2" / "stage.json", out / "evaluation.json", *(out / "stage2" / "model").iterdir()]:
        path.unlink()
    last = out / "stage2" / "checkpoints" / "step-00000010" / "state.json"
    last.write_text("")
    with monkeypatch.context() as patch:
        disk = FullDisk(patch, name)
        assert main(command(out)) == 1
        assert disk.met
    err = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert len(err) == 1 and err[0].startswith("onejump: ") and "free space and run the same command again" in err[0]
    assert main(command(out)) == 0
    assert weights(out) == before


def test_a_full_disk_in_the_report_leaves_the_old_one(tmp_path, capsys, monkeypatch):
    out = finished_run(tmp_path)
    before = (out / "report.html").read_bytes()
    write = Path.write_text

    def full(path, *args, **options):
        if path.name == ".report.html":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["report", str(out)]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "No space left on device" in err
    assert (out / "report.html").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such lock")
def test_two_processes_never_train_in_one_folder(tmp_path, capsys):
    """The second would write over the files of the first."""
    out = finished_run(tmp_path)
    with alone(out):
        assert main(command(out)) == 1
        assert capsys.readouterr().err.startswith(f"onejump: {out}: another process trains there")
    assert main(command(out)) == 0


def until(done, seconds=60):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "the run did not come so far"
        time.sleep(0.02)


def test_interrupted_then_killed_it_ends_with_the_weights_of_an_undisturbed_run(tmp_path):
    """SIGINT in the teacher, SIGKILL in stage 1, then to the end; each time the same command."""
    longer = [
        "teacher.steps=250",
        "stage1.steps=250",
        "save_every=25",
        "evaluation.n=20",
        "evaluate_every=0",
        "sample_every=0",
    ]
    assert main(command(tmp_path / "whole", *longer)) == 0
    out = tmp_path / "run"
    argv = [sys.executable, "-m", "onejump", *command(out, *longer)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    first = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=env)
    until(lambda: (out / "teacher" / "checkpoints" / "step-00000025").exists())
    first.send_signal(signal.SIGINT)
    err = first.communicate(timeout=60)[1]
    assert first.returncode == 130, err
    assert "Traceback" not in err and "saved at step" in err
    assert err.splitlines()[-1].strip().startswith("onejump run digits")
    assert not (out / "teacher" / "stage.json").exists()

    second = subprocess.Popen(argv, stderr=subprocess.DEVNULL, env=env)
    until(lambda: (out / "stage1" / "checkpoints" / "step-00000025").exists())
    second.kill()
    second.wait(timeout=60)
    assert not (out / "stage1" / "stage.json").exists()

    assert main(argv[3:]) == 0
    assert weights(out) == weights(tmp_path / "whole")
