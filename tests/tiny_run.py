"""A whole run in two seconds: a tiny MLP on the digits, a handful of steps a stage; and small folders of images."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from onejump.cli import main

NETWORK = "network=MLPConfig(shape=(1,8,8),label_dim=10,width=16,depth=1,dropout=0.1)"
STEPS = {"teacher": 6, "stage1": 6, "stage2": 4}
STAGES = tuple(STEPS)
SMALL = [f"{stage}.{field}" for stage in STAGES for field in (f"steps={STEPS[stage]}", "batch=16")]
SMALL += ["evaluation.n=40", "evaluation.teacher_steps=3"]
SMALL += ["log_every=2", "save_every=2", "sample_every=4", "evaluate_every=4"]
TINY = [NETWORK, *SMALL]


@functools.cache
def _finished() -> Path:
    out = Path(tempfile.mkdtemp(prefix="onejump-test-")) / "run"
    assert main(["run", "digits", *TINY, "--out", str(out)]) == 0
    return out


def finished_run(to: Path) -> Path:
    """A copy of one finished run, to do with as one likes."""
    return Path(shutil.copytree(_finished(), to / "run"))


def command(out: Path, *more: str) -> list[str]:
    """The command that made it."""
    return ["run", "digits", *TINY, "--out", str(out), *more]


def record(path: Path) -> Any:
    return json.loads(path.read_text())


def weights(out: Path) -> dict[str, bytes]:
    """The bytes of every stage's model."""
    return {stage: (out / stage / "model" / "model.safetensors").read_bytes() for stage in STAGES}


def pictures(folder: Path, n: int = 20, side: int | None = None, classes: int = 0) -> Path:
    """n colour images of random sizes, or side x side; in one sub-folder a class if there are any."""
    rng = np.random.default_rng(0)
    for k in range(n):
        height, width = (side, side) if side else rng.integers(12, 40, 2)
        path = folder / (f"class{k % classes}" if classes else "") / f"{k:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return folder


def arrays(out, path, *options):
    """(images, labels) that `sample` writes as .npz."""
    assert main(["sample", str(out), "--out", str(path), *options]) == 0
    with np.load(path) as made:
        return made["images"], made["labels"]


def said(capsys, argv, code):
    """The one line on standard error with which a command ends."""
    try:
        found = main([str(word) for word in argv])
    except SystemExit as stop:  # argparse's own
        found = stop.code
    out, err = capsys.readouterr()
    assert found == code, err
    assert "Traceback" not in err and out == ""
    lines = [line for line in err.splitlines() if "onejump" in line and "usage:" not in line]
    assert len(lines) == 1, err
    return lines[0]
