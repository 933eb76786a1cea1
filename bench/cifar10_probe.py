"""What bench/cifar10.py asks of the machine, each time in a process of its own: its environment, the rate of a stage.

python bench/cifar10_probe.py OUT.json env DEVICE
python bench/cifar10_probe.py OUT.json rate STEPS train RECIPE --stage STAGE ...   (words of `onejump train`)
"""

import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

WARM = 10  # steps before those that are timed: optimisers begin with cheaper ones, and graphs are compiled


def said(*words: str) -> str | None:
    """The first line of what a program says; None where there is no such program, or it fails."""
    if shutil.which(words[0]) is None:
        return None
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent)
    return next(iter(done.stdout.splitlines()), "") if done.returncode == 0 else None


def environment(device: torch.device) -> dict[str, Any]:
    from onejump.bench import conditions

    changed = said("git", "status", "--porcelain", "--untracked-files=no")
    found = conditions(device) | {"python": platform.python_version(), "cuda": torch.version.cuda}
    found |= {"commit": said("git", "rev-parse", "HEAD"), "uncommitted_changes": bool(changed)}
    asked = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    return found | {
        "gpu": {"asked": asked, "told": said("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader")}
    }


def finished(device: torch.device) -> float:
    """The clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rate(steps: int, words: list[str]) -> dict[str, float]:
    """step_seconds: the mean of so many warm steps at the end of the stage's curriculum, where none is spared work.

    start_seconds: what the first steps take beyond that where kernels have been compiled before, as they will have.
    """
    from onejump import cli, cli_training
    from onejump.bench import cases_of
    from onejump.cli_input import device_of
    from onejump.fit import images_for
    from onejump.phases import Phases

    args = cli.read(words)
    device, data = device_of(args.device), cli_training.images_for_recipe(args)
    recipe = cli_training.recipe_of(args, data)
    stage = replace(recipe.stages[args.stage], count_on=False)
    recipe, data = replace(recipe, stages={args.stage: stage}), images_for(recipe.network, data)

    def timed(count: int, case: Any, first: int) -> float:
        began = finished(device)
        for k in range(first, first + count):
            case.trainer.step(case.at + k, Phases(device))
        return finished(device) - began

    if device.type == "cuda":  # compiles; what it leaves on disk is there when training begins
        timed(WARM, cases_of(recipe, data, device, plain=False)[-1], 0)
        torch.compiler.reset()
    case = cases_of(recipe, data, device, plain=False)[-1]
    warm, step = timed(WARM, case, 0), timed(steps, case, WARM) / steps
    found = {"step_seconds": step, "start_seconds": max(warm - WARM * step, 0.0), "timed_steps": steps}
    return found | {"images_per_second": stage.batch / step}


def main(argv: list[str]) -> None:
    out, what, first, *words = argv
    found = environment(torch.device(first)) if what == "env" else rate(int(first), words)
    Path(out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
