"""Does Analytic-Precond speed CTM up? The same students with three preconditionings, on the digits.

    python bench/digits_ctm.py --seeds 0,1,2 --out runs/ctm

For each seed one teacher, and from it students that differ in their jump alone: CTM's Euler step, Analytic-Precond in
its backward form (the paper's) and in its forward form; same weights at the start, images, noise, times and steps.
Frechet distances with 1, 2 and 4 jumps while they train, and how many steps each needs to reach what CTM reaches at
its end. OUT/ctm.json holds all numbers, OUT/ctm-N.svg the curves. Goes on where it was stopped.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

from onejump.svg import Style, line_chart

JUMPS = {"CTM": "Euler", "backward": "AnalyticPrecond", "forward": "AnalyticPrecond"}


def onejump(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "onejump", *words], check=True)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def student(seed: int, arm: str, out: Path, overrides: list[str]) -> dict:
    """Trains one student, and the teacher and its table if they are not there yet."""
    teacher, table = out / f"teacher-{seed}", out / f"table-{seed}.json"
    onejump("train", "digits-ctm", f"seed={seed}", *overrides, "--stage", "teacher", "--out", str(teacher))
    chosen = [f"ctm.jump={JUMPS[arm]}"]
    if arm != "CTM":
        if not table.exists():
            onejump("precond", str(teacher), "--times", "60", "--samples", "512", "--out", str(table))
        chosen += [f"ctm.jump.form={arm}", f"ctm.jump.table={table}"]
    folder = out / f"{arm}-{seed}"
    given = ("--init", str(teacher), "--teacher", str(teacher), "--out", str(folder))
    onejump("train", "digits-ctm", f"seed={seed}", *overrides, *chosen, "--stage", "ctm", *given)
    curve = [(line["step"], line["frechet"]) for line in lines(folder / "ctm" / "evaluations.jsonl")]
    return {"seed": seed, "arm": arm, "curve": curve, "stage": json.loads((folder / "ctm" / "stage.json").read_text())}


def steps_to(curve: list, jumps: str, level: float) -> float:
    """The step at which the curve first comes down to `level`, linear between its points; inf if it never does."""
    before = None
    for step, frechet in curve:
        if frechet[jumps] <= level:
            if before is None:
                return step
            last_step, last = before
            return last_step + (step - last_step) * (last - level) / (last - frechet[jumps])
        before = step, frechet[jumps]
    return math.inf


def mean_curve(records: list[dict], arm: str, jumps: str) -> list[tuple[float, float]]:
    curves = [record["curve"] for record in records if record["arm"] == arm]
    return [(at[0][0], statistics.mean(frechet[jumps] for _, frechet in at)) for at in zip(*curves, strict=True)]


def draw(records: list[dict], jumps: str) -> str:
    """Frechet distance against steps: each seed faint, the means strong."""
    series, styles = {}, {}
    for i, arm in enumerate(dict.fromkeys(record["arm"] for record in records)):
        for record in records:
            if record["arm"] == arm:
                label = f"{arm}, seed {record['seed']}"
                series[label] = [(step, frechet[jumps]) for step, frechet in record["curve"]]
                styles[label] = Style(i, opacity=0.35)
        series[f"{arm}, mean"] = mean_curve(records, arm, jumps)
        styles[f"{arm}, mean"] = Style(i, markers=True)
    title = f"CTM on digits, {jumps} jump(s)"
    return line_chart(series, title, "steps", "Frechet distance", log_y=True, styles=styles)


def table(records: list[dict]) -> None:
    arms = list(dict.fromkeys(record["arm"] for record in records))
    ends = {(r["arm"], r["seed"], k): v for r in records for k, v in r["curve"][-1][1].items()}
    for k in records[0]["curve"][0][1]:
        for arm in arms:
            mine = [r for r in records if r["arm"] == arm]
            final = [ends[arm, r["seed"], k] for r in mine]
            spread = statistics.stdev(final) if len(final) > 1 else 0.0
            line = f"{k} jump(s)  {arm:<9} {statistics.mean(final):.3f} +- {spread:.3f}"
            if arm != "CTM" and "CTM" in arms:
                steps = [steps_to(r["curve"], k, ends["CTM", r["seed"], k]) for r in mine]
                line += f"   CTM's end reached at step {', '.join(f'{s:.0f}' for s in steps)}"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default="CTM,backward,forward")
    parser.add_argument("--out", type=Path, default=Path("runs/ctm"))
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as ctm.steps=800")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    records = [student(seed, arm, args.out, args.overrides) for seed in seeds for arm in args.arms.split(",")]
    (args.out / "ctm.json").write_text(json.dumps(records, indent=1) + "\n")
    for jumps in records[0]["curve"][0][1]:
        (args.out / f"ctm-{jumps}.svg").write_text(draw(records, jumps))
    table(records)


if __name__ == "__main__":
    main()
