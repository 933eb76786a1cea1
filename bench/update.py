"""What does the update after a backward pass cost? Plain loops, torch's lists of tensors, and ours.

    OMP_NUM_THREADS=1 python bench/update.py --rounds 9 --out runs/update-cpu.json
    python bench/update.py --device cuda --averages 3 --rounds 50 --out runs/update-cuda.json

plain: nan_to_num of every gradient, RAdam one parameter at a time, averages by copying an interpolation. foreach:
the norm's clip, a look at whether it is finite, RAdam and averages by operations on lists. ours: onejump.update.
For DDPM++ of CIFAR-10 and the digits' network. All three are first checked to agree; then they run in turn, round by
round, in one process. Processor time with one thread, else the wall clock. Needs a checkout of this repository.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import RAdam
from onejump.run_record import device_name, versions
from onejump.update import Updater

Step = Callable[[], Any]
NETWORKS = {
    "DDPM++ 32x32": SongUNetConfig(32, 3),
    "digits 8x8": SongUNetConfig(
        8, 1, 10, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.1
    ),
}
RATE, DECAY, CLIP, STEPS_BEFORE = 1e-4, 0.9999, 1e6, 8  # RAdam does its whole work from the sixth step on


class Weights:
    """One variant's own weights, averages and gradients, the same at the start for all."""

    def __init__(self, shapes: list[torch.Size], averages: int, device: torch.device):
        torch.manual_seed(0)
        self.parameters = [nn.Parameter(0.1 * torch.randn(shape, device=device)) for shape in shapes]
        self.gradients = [1e-3 * torch.randn(shape, device=device) for shape in shapes]
        self.averages = [[p.detach().clone() for p in self.parameters] for _ in range(averages)]
        self.loss = torch.ones((), device=device)

    def give(self) -> None:
        """As after a backward pass."""
        for p, g in zip(self.parameters, self.gradients, strict=True):
            p.grad = g


def plain(weights: Weights) -> Step:
    optimizer = torch.optim.RAdam(weights.parameters, lr=RATE, foreach=False)

    def step() -> None:
        for p in weights.parameters:
            assert p.grad is not None
            torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimizer.step()
        with torch.no_grad():
            for average in weights.averages:
                for a, p in zip(average, weights.parameters, strict=True):
                    a.copy_(p.lerp(a, DECAY))
        optimizer.zero_grad()

    return step


def foreach(weights: Weights) -> Step:
    optimizer = torch.optim.RAdam(weights.parameters, lr=RATE, foreach=True)

    def step() -> None:
        norm = nn.utils.clip_grad_norm_(weights.parameters, CLIP)
        if (weights.loss + norm).isfinite():
            optimizer.step()
            with torch.no_grad():
                for average in weights.averages:
                    torch._foreach_lerp_(average, [*weights.parameters], 1 - DECAY)
        optimizer.zero_grad()

    return step


def ours(weights: Weights) -> Step:
    updater = Updater(RAdam(), weights.parameters, weights.averages)
    decays = [DECAY] * len(weights.averages)
    return lambda: updater.step(weights.loss, RATE, decays, CLIP)


VARIANTS = {"plain": plain, "foreach": foreach, "ours": ours}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """The norm of the difference over the norm."""
    squares = sum((x - y).double().square().sum().item() for x, y in zip(a, b, strict=True))
    return math.sqrt(squares / sum(y.double().square().sum().item() for y in b))


def bench(config: SongUNetConfig, averages: int, rounds: int, device: torch.device) -> dict[str, Any]:
    with torch.device("meta"):
        shapes = [p.shape for p in config.build().parameters()]
    all_weights = {name: Weights(shapes, averages, device) for name in VARIANTS}
    steps = {name: variant(all_weights[name]) for name, variant in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for done in range(STEPS_BEFORE + rounds):
        for name, step in steps.items():
            all_weights[name].give()
            began = now(device)
            step()
            if done >= STEPS_BEFORE:
                seconds[name].append(now(device) - began)
    ends: dict[str, list[list[Tensor]]] = {
        name: [[*weights.parameters], *weights.averages] for name, weights in all_weights.items()
    }
    difference = max(apart(a, b) for end in ends.values() for a, b in zip(end, ends["plain"], strict=True))
    assert difference < 1e-6, f"the variants do not agree: {difference:.1e}"
    numbers = {"tensors": len(shapes), "parameters": sum(math.prod(shape) for shape in shapes)}
    return {**numbers, "difference": difference, "seconds": seconds}


def table(record: dict[str, Any]) -> str:
    lines = []
    for network, found in record["networks"].items():
        plain, size = found["seconds"]["plain"], f"{found['parameters'] / 1e6:.3g} M in {found['tensors']} tensors"
        lines.append(f"{network}, {size}{'':<10} ms   times as fast as plain: median (range)")
        for name, times in found["seconds"].items():
            ratios = sorted(p / t for p, t in zip(plain, times, strict=True))
            figures = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"
            lines.append(f"    {name:<30}{1e3 * statistics.median(times):>14.2f}   {figures}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--averages", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    torch.set_num_threads(threads)
    networks = {name: bench(config, args.averages, args.rounds, device) for name, config in NETWORKS.items()}
    record = {
        "device": device_name(device),
        "threads": threads,
        "versions": versions(),
        "averages": args.averages,
        "networks": networks,
    }
    print(table(record))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
