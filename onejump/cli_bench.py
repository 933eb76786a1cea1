"""The command that times training steps."""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onejump.cli_input import check_name, device_of

if TYPE_CHECKING:
    from onejump.config import Recipe

Work = Callable[[], None]
ABOUT = """Without a recipe: DDPM++ on images of CIFAR-10's shape, easy consistency training at three places of its
curriculum and truncated training after it. Images are noise and weights random: neither changes the time. With one
thread of a CPU (OMP_NUM_THREADS=1) the times are processor time, which other work disturbs least."""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Their options; `add` makes a command."""
    made = add("bench", bench_command, "time training steps, phase by phase, and against the machine's peak", ABOUT)
    made.add_argument("recipe", nargs="?", help="a recipe's name (default: ECT and TCM on CIFAR-10's shape)")
    made.add_argument("--stage", help="this stage of it alone")
    made.add_argument("--vs", choices=("plain",), help="also the same steps in the plain way of the public code")
    made.add_argument("--batch", type=int, default=8, help="images a step (default: %(default)s)")
    made.add_argument("--steps", type=int, default=5, help="timed steps of each case (default: %(default)s)")
    made.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp16"), help="instead of the recipe's")
    made.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    made.add_argument("--device", help="cpu, cuda, ...")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")


def benched(name: str | None) -> "Recipe":
    """The recipe of this name; without one, ECT and TCM on CIFAR-10's shape."""
    from onejump.bench import cifar10
    from onejump.data.digits import digits
    from onejump.recipes import build_recipe

    if name is None:
        return cifar10()
    check_name(name)
    return build_recipe(name, digits() if name.startswith("digits") else None)


def bench_command(args: argparse.Namespace) -> Work:
    from dataclasses import replace

    from onejump.bench import noise_images
    from onejump.config_json import did_you_mean
    from onejump.plain import check_plain
    from onejump.types import UserError

    if min(args.batch, args.steps) < 1:
        raise UserError(f"--batch {args.batch}, --steps {args.steps}: 1 or more of each are needed")
    device, recipe = device_of(args.device), benched(args.recipe)
    names = [args.stage] if args.stage else list(recipe.stages)
    if not set(names) <= set(recipe.stages):
        hint = did_you_mean(args.stage, list(recipe.stages))
        raise UserError(f"--stage: no {args.stage!r}; there are {', '.join(recipe.stages)}{hint}")
    changes = {"batch": args.batch, "micro_batch": 0, "count_on": False, "checkpointing": args.checkpointing}
    changes |= {"precision": args.precision} if args.precision else {}
    recipe = replace(recipe, stages={name: replace(recipe.stages[name], **changes) for name in names})
    if args.vs:
        check_plain(recipe)

    def work() -> None:
        from onejump.bench import bench

        data = noise_images(recipe, args.batch)
        record = bench(recipe, data, device, args.vs == "plain", args.steps)
        print("\n".join(table(record)))
        if args.json:
            write(args.json, record)

    return work


def write(path: Path, record: dict[str, Any]) -> None:
    from onejump.saved import not_written

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise not_written(path, error) from error


def table(record: dict[str, Any]) -> list[str]:
    """A line a case: medians over the rounds. Then the ratios, each taken within a round."""
    cases = record["cases"]
    phases = list(cases[0]["rounds"][0]["phases"])
    width = max(len(label(case)) for case in cases)
    one_thread = record["device"].startswith("cpu") and record["threads"] == 1
    lines = [
        f"{record['recipe']}, batch {record['batch']}, {record['device']}, {record['threads']} threads, "
        f"load {record['load']:.1f}: {'processor' if one_thread else 'device'} time, medians of "
        f"{len(cases[0]['rounds'])} steps",
        f"\n{'':{width}}{'images/s':>10}{'ms':>9}  {''.join(f'{name:>10}' for name in phases)}"
        f"{'GFLOP/img':>11}{'of matmul':>11}{'of conv.':>10}{'GiB':>7}",
    ]
    return lines + [row(case, record, width) for case in cases] + ratios(cases)


def label(case: dict[str, Any]) -> str:
    return f"{case['name']}, {case['way']}"


def row(case: dict[str, Any], record: dict[str, Any], width: int) -> str:
    rounds, batch = case["rounds"], record["batch"]
    seconds = statistics.median(r["seconds"] for r in rounds)
    parts = [statistics.median(r["phases"][name] for r in rounds) for name in rounds[0]["phases"]]
    flops = statistics.median(r["passes"] for r in rounds) * case["flops"]
    peaks = record["large"][case["precision"]]
    shares = [flops / seconds / statistics.median(p[kind] for p in peaks) for kind in ("matmul", "convolution")]
    memory = "" if case["memory"] is None else f"{case['memory'] / 2**30:.2f}"
    return (
        f"{label(case):{width}}{batch / seconds:10.2f}{1e3 * seconds:9.1f}  "
        f"{''.join(f'{1e3 * part:10.1f}' for part in parts)}{flops / batch / 1e9:11.4g}"
        f"{shares[0]:11.0%}{shares[1]:10.0%}{memory:>7}"
    )


def ratios(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Plain over ours at each place, and each stage of ours over the one before it, at their ends."""
    lines = []
    ours = [case for case in cases if case["way"] == "ours"]
    for case in cases:
        if case["way"] != "ours":
            mine = next(other for other in ours if other["name"] == case["name"])
            found, apart = spread(by_round(case, mine)), abs(case["loss"] / mine["loss"] - 1)
            lines.append(f"{case['name']}: {found} times as fast as {case['way']}; first losses {apart:.0e} apart")
    late = [case for case in ours if case["name"].endswith(" late")]
    for before, case in itertools.pairwise(late):
        memory = f"; memory {case['memory'] / before['memory']:.3f}" if case["memory"] and before["memory"] else ""
        lines.append(f"{case['name']} over {before['name']}: {spread(by_round(case, before))} of its time{memory}")
    return ["", *lines] if lines else []


def by_round(a: dict[str, Any], b: dict[str, Any]) -> list[float]:
    return [x["seconds"] / y["seconds"] for x, y in zip(a["rounds"], b["rounds"], strict=True)]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
