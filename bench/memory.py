"""Is the memory that --dry-run predicts the memory that training takes? python bench/memory.py [--cases ect tcm]

On a CPU. Each case is trained by `onejump train` for a few steps in a process of its own, whose anonymous memory
(RssAnon: without mapped files, such as libraries) is read every 5 ms; the prediction is made in another one.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIDE = 32
DDPMPP = "network=SongUNetConfig(dropout=0.13)"
CASES = {  # the recipe, its stage, and what is changed of it
    "digits": ("digits", "teacher", []),
    "ect": ("digits", "teacher", [DDPMPP, "teacher.batch=4", "teacher.method=ECT()", "teacher.sampler=Multistep()"]),
    "ect in passes": (
        "digits",
        "teacher",
        [DDPMPP, "teacher.batch=16", "teacher.micro_batch=2", "teacher.method=ECT()", "teacher.sampler=Multistep()"],
    ),
    "ect checkpointing": (
        "digits",
        "teacher",
        [
            *(DDPMPP, "teacher.batch=16", "teacher.checkpointing=true"),
            *("teacher.method=ECT()", "teacher.sampler=Multistep()"),
        ],
    ),
    "tcm": (
        "digits",
        "teacher",
        [DDPMPP, "teacher.batch=4", "teacher.method=TCM()", "teacher.sampler=Multistep(mid=(1.0,))"],
    ),
    "ctm": ("digits-ctm", "ctm", [DDPMPP, "ctm.batch=2"]),
    "edm2-xs": (
        "digits",
        "teacher",
        [
            *("network=EDM2UNetConfig(img_resolution=32,img_channels=3,label_dim=0,model_channels=128)",),
            *("teacher.batch=4", "teacher.method=ECT()", "teacher.sampler=Multistep()"),
        ],
    ),
}


def command(case: str, folder: Path) -> list[str]:
    recipe, stage, changes = CASES[case]
    data = [] if case == "digits" else ["--data", str(folder / "images")]
    teacher = ["--teacher", str(folder / "teacher")] if recipe == "digits-ctm" else []
    often = ["log_every=1", "save_every=2", "sample_every=0", "evaluate_every=0"]
    options = [*data, *teacher, "--device", "cpu", "--out", str(folder / case.replace(" ", "-"))]
    return ["train", recipe, "--stage", stage, *changes, *often, *options]


def prepare(folder: Path) -> None:
    """A few images, and a teacher with random weights."""
    from onejump.model import ConsistencyModel
    from onejump.networks.song_unet import SongUNetConfig
    from onejump.samplers import ODE
    from onejump.saved import SavedModel, save_model

    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for k in range(40):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / "images" / f"{k}.png")
    network = SongUNetConfig(dropout=0.13)
    save_model(folder / "teacher", SavedModel(ConsistencyModel(network.build()), network, ODE(), (3, SIDE, SIDE)))


def predicted(argv: list[str]) -> int:
    from onejump import cli, pipeline  # noqa: F401  what training imports
    from onejump.cli_input import images_of
    from onejump.fit import images_for
    from onejump.memory import predict

    args = cli.read(argv)
    data = images_of(args)
    recipe = cli.recipe_of(args, data)
    return predict(recipe, recipe.stages[args.stage], images_for(recipe.network, data), torch.device("cpu")).peak


def measured(argv: list[str], lines: Path, steps: int) -> int:
    """The largest anonymous memory of the process until it has made so many steps."""
    log = lines.parent.parent.with_suffix(".log")
    process = subprocess.Popen([sys.executable, "-m", "onejump", *argv], stderr=open(log, "w"))
    most, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        most = max([most, *(int(line.split()[1]) * 1024 for line in found)])
        if lines.exists() and lines.read_bytes().count(b"\n") >= steps:
            process.kill()
        time.sleep(0.005)
    if process.returncode > 0:
        raise RuntimeError(log.read_text())
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--part", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(predicted(args.part))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for case in args.cases:
            argv = command(case, folder)
            part = [sys.executable, "-W", "ignore", __file__, "--part", *argv]
            guess = int(subprocess.run(part, stdout=subprocess.PIPE, check=True).stdout)
            stage = CASES[case][1]
            peak = measured(argv, folder / case.replace(" ", "-") / stage / "metrics.jsonl", args.steps)
            print(f"{case:<18} predicted {guess >> 20:>6} MiB, took {peak >> 20:>6}: {guess / peak:.2f}", flush=True)


if __name__ == "__main__":
    main()
