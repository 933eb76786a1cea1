"""How fast is our DDPM++? Forward and backward pass against the plain arithmetic of the same mathematics.

    OMP_NUM_THREADS=1 python bench/networks.py --batch 4 --rounds 5 --out runs/networks-cpu.json
    python bench/networks.py --device cuda --batch 256 --rounds 20 --out runs/networks-cuda.json

The plain arithmetic is in `plain`, written out over our weights: operation by operation in float32, biases added after
the convolutions, maps resampled by grouped convolutions, attention with its matrix, torch's dropout. Both are first
checked to agree without dropout, in output and gradients. Then all variants run in turn in one process, round by
round, with a large matmul and a large convolution between them as the speed of the machine; ratios are taken within a
round. docs/performance.md tells how to read the table. Needs a checkout of this repository.
"""

import argparse
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onejump.cost import flops_of
from onejump.networks.song_unet import SongUNetConfig
from onejump.run_record import device_name, versions

Weights = Mapping[str, Tensor]
Step = Callable[[], Any]
SQRT_HALF = 0.5**0.5
KINDS = ("matmul", "convolution")  # the large operations


def plain(w: Weights, config: SongUNetConfig, x: Tensor, c_noise: Tensor, dropout: float) -> Tensor:
    """F(x; c_noise) of an unconditional DDPM++ from its state dict."""
    n = config.model_channels // 2
    frequencies = 1e-4 ** (torch.arange(n, device=x.device) / (n - 1))
    angles = c_noise.outer(frequencies)
    emb = F.silu(plain_linear(torch.cat([angles.sin(), angles.cos()], dim=1), w, "map_layer0"))
    emb = F.silu(plain_linear(emb, w, "map_layer1"))
    kept: list[Tensor] = []
    for name in parts(w, "enc"):
        x = plain_conv(x, w, name) if not kept else plain_block(x, emb, w, name, dropout)
        kept.append(x)
    *blocks, norm, last = parts(w, "dec")
    for name in blocks:
        x = torch.cat([x, kept.pop()], dim=1) if "_block" in name else x
        x = plain_block(x, emb, w, name, dropout)
    return plain_conv(F.silu(plain_norm(x, w, norm)), w, last)


def parts(w: Weights, half: str) -> list[str]:
    """enc.32x32_conv, enc.32x32_block0, ... in the order of their use."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in w if name.startswith(f"{half}.")))


def plain_block(x: Tensor, emb: Tensor, w: Weights, name: str, dropout: float) -> Tensor:
    up, down = name.endswith("_up"), name.endswith("_down")
    h = plain_conv(F.silu(plain_norm(x, w, f"{name}.norm0")), w, f"{name}.conv0", up, down)
    shift = plain_linear(emb, w, f"{name}.affine")[:, :, None, None]
    h = F.silu(plain_norm(h.add_(shift), w, f"{name}.norm1"))
    h = plain_conv(F.dropout(h, dropout), w, f"{name}.conv1")
    skip = plain_conv(x, w, f"{name}.skip", up, down) if f"{name}.skip.weight" in w else x
    x = h.add_(skip) * SQRT_HALF
    if f"{name}.qkv.weight" not in w:
        return x
    q, k, v = plain_conv(plain_norm(x, w, f"{name}.norm2"), w, f"{name}.qkv").unflatten(1, (-1, 3)).flatten(3).unbind(2)
    attention = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(q.shape[1])).float().softmax(dim=2).to(q.dtype)
    a = torch.einsum("bqk,bck->bcq", attention, v).reshape(x.shape)
    return plain_conv(a, w, f"{name}.proj").add_(x) * SQRT_HALF


def plain_conv(x: Tensor, w: Weights, name: str, up: bool = False, down: bool = False) -> Tensor:
    weight, c = w[f"{name}.weight"], x.shape[1]
    f = torch.full((c, 1, 2, 2), 0.25, dtype=x.dtype, device=x.device)
    if up:
        x = F.conv_transpose2d(x, 4 * f, stride=2, groups=c)
    if down:
        x = F.conv2d(x, f, stride=2, groups=c)
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return x.add_(w[f"{name}.bias"].to(x.dtype).view(1, -1, 1, 1))


def plain_linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def plain_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    weight = w[f"{name}.weight"]
    groups = min(32, len(weight) // 4)
    return F.group_norm(x, groups, weight, w[f"{name}.bias"], eps=1e-6)


@dataclass(frozen=True)
class Variant:
    """One way to compute the pass. precision: of autocast, None for float32 throughout."""

    ours: bool
    precision: torch.dtype | None = None
    channels_last: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        extras = ("channels_last" if self.channels_last else "", "compiled" if self.compiled else "")
        words = ("ours" if self.ours else "plain", str(self.precision or torch.float32).removeprefix("torch."), *extras)
        return " ".join(word for word in words if word)

    def step(self, config: SongUNetConfig, w: Weights, inputs: tuple[Tensor, Tensor, Tensor]) -> Step:
        """Runs forwards and backwards once; returns the output and the gradients of sum(output * projection)."""
        x, t, projection = inputs
        net: Any = config.build().to(x.device)
        net.load_state_dict(w)
        if self.channels_last:
            net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        parameters = dict(net.named_parameters())
        forward: Any = net if self.ours else functools.partial(plain, parameters, config, dropout=config.dropout)
        if self.compiled:
            forward = torch.compile(forward)

        def run() -> list[Tensor]:
            with torch.autocast(x.device.type, self.precision, enabled=self.precision is not None):
                out = forward(x, t).float()
            return [out.detach(), *torch.autograd.grad((out * projection).sum(), list(parameters.values()))]

        return run


def variants(device: torch.device) -> list[Variant]:
    """The first is what the others are compared with."""
    if device.type == "cuda":
        low = torch.bfloat16
        fast = Variant(ours=True, precision=low, channels_last=True, compiled=True)
        return [Variant(ours=False), Variant(ours=False, precision=low), Variant(ours=True), fast]
    found = [Variant(ours=False), Variant(ours=True), Variant(ours=True, channels_last=True)]
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return found + ([Variant(ours=True, precision=torch.bfloat16)] if has_bf16 else [])


def difference(ours: Step, reference: Step) -> dict[str, float]:
    """Of the output and of all gradients as one vector: the norm of the difference over the norm."""
    pairs = list(zip(ours(), reference(), strict=True))

    def relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
        apart = sum((a - b).double().square().sum().item() for a, b in pairs)
        return math.sqrt(apart / sum(b.double().square().sum().item() for _, b in pairs))

    return {"output": relative(pairs[:1]), "gradients": relative(pairs[1:])}


def large(batch: int, precision: torch.dtype, device: torch.device) -> dict[str, tuple[Step, int]]:
    """A square matmul and the network's widest 3x3 convolution, each with its FLOPs."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=precision) for _ in range(2))
    x = torch.randn(batch, 256, 32, 32, device=device, dtype=precision).to(memory_format=torch.channels_last)
    k = torch.randn(256, 256, 3, 3, device=device, dtype=precision).to(memory_format=torch.channels_last)
    found = ((lambda: a @ b, 2 * n**3), (lambda: F.conv2d(x, k, padding=1), 2 * x.numel() * 9 * 256))
    return dict(zip(KINDS, found, strict=True))


def seconds(step: Step, device: torch.device) -> tuple[float, float]:
    """Of one call: on the clock, and of processor time over all threads."""
    synchronise(device)
    clock, processor = time.perf_counter(), time.process_time()
    step()
    synchronise(device)
    return time.perf_counter() - clock, time.process_time() - processor


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, list[tuple[float, float]]]:
    """Each step once a round, in turn, after two calls that do not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(seconds(step, device))
    return found


def bench(config: SongUNetConfig, batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    net = config.build().to(device)
    for p in net.parameters():  # some weights start near zero, and would hide a difference
        if p.ndim > 1:
            nn.init.normal_(p, std=1 / math.sqrt(p[0].numel()))
    w, shape = net.state_dict(), (batch, config.img_channels, config.img_resolution, config.img_resolution)
    inputs = (torch.randn(shape, device=device), torch.randn(batch, device=device), torch.randn(shape, device=device))
    base, *others = variants(device)
    still = replace(config, dropout=0.0)
    differences = {
        other.name: difference(other.step(still, w, inputs), base.step(still, w, inputs)) for other in others
    }
    for other in others:
        apart = max(differences[other.name].values())
        assert apart < (1e-5 if other.precision is None else 0.1), f"{other.name} is another function: {apart:.1e}"
    steps: dict[str, Step] = {v.name: v.step(config, w, inputs) for v in (base, *others)}
    peaks: dict[str, int] = {}
    for precision in dict.fromkeys(v.precision or torch.float32 for v in (base, *others)):
        for kind, (step, flops) in large(batch, precision, device).items():
            name = f"{kind} {precision}".replace("torch.", "")
            steps[name], peaks[name] = step, flops
    with torch.device("meta"):
        flops = flops_of(config.build(), config)
    return {
        "flops_per_image": flops,
        "flops_of_large": peaks,
        "difference": differences,
        "seconds": measure(steps, rounds, device),
    }


def table(record: Mapping[str, Any]) -> str:
    """A line a variant: time, speed, shares of the large operations' speed, ratio to the first within each round.

    One thread of a CPU is timed by the processor time it took, which other work on the machine disturbs least.
    """
    one_thread = record["device"].startswith("cpu") and record["threads"] == 1
    times = {name: [both[one_thread] for both in rounds] for name, rounds in record["seconds"].items()}
    median = {name: statistics.median(rounds) for name, rounds in times.items()}
    large, base = record["flops_of_large"], next(iter(times))
    clock = "processor time" if one_thread else "wall clock"
    head = f"{'seconds':>8} {'images/s':>9} {'GFLOP/s':>9} {'of matmul':>10} {'of conv.':>9}"
    lines = [f"{clock:<34}{head}   times as fast as {base}: median (range)"]
    lines += [
        f"{name:<34}{median[name]:8.4f} {'':>9} {flops / median[name] / 1e9:9,.0f}" for name, flops in large.items()
    ]
    for name, rounds in times.items():
        if name in large:
            continue
        speed, precision = 3 * record["flops_per_image"] * record["batch"] / median[name], name.split()[1]
        shares = [speed * median[f"{kind} {precision}"] / large[f"{kind} {precision}"] for kind in KINDS]
        ratios = [first / this for first, this in zip(times[base], rounds, strict=True)]
        lines.append(
            f"{name:<34}{median[name]:8.4f} {record['batch'] / median[name]:9.2f} {speed / 1e9:9,.0f} "
            f"{shares[0]:10.0%} {shares[1]:9.0%}   "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    return "\n".join(lines)


def conditions(device: torch.device) -> dict[str, Any]:
    """What a figure rests on besides the code's own numbers."""
    here = Path(__file__).parent
    commit, changed = (
        subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": device_name(device),
        "processor": models[0].partition(":")[2].strip() if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": versions() | {"cuda": torch.version.cuda},
        "commit": f"{commit}{' and changes' if changed else ''}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=0.13)
    parser.add_argument("--out", type=Path, help="write the record there, as JSON")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    torch.backends.cudnn.benchmark = True
    config = SongUNetConfig(dropout=args.dropout)
    given = {"batch": args.batch, "rounds": args.rounds, "dropout": args.dropout}
    record = {**conditions(args.device), **given, **bench(config, args.batch, args.rounds, args.device)}
    print(table(record))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
