"""Does stage 2 pay? Truncated training against going on with stage 1 for the same training time, on the digits.

    python bench/digits_stages.py --seeds 0,1,2 --out runs/stages

For each seed: the recipe `digits` whole; and from the same teacher a stage 1 that is longer by as many steps as
stage 2 took time for (both measured in the recipe's run), its learning rate falling to 0 over its own length.
Prints one-step and two-step Frechet distances, mean and spread; OUT/stages.json holds them with their curves, which
OUT/stages.svg shows.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from onejump.svg import Style, line_chart


def onejump(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "onejump", *words], check=True)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def curve(stage: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (stage / "evaluations.jsonl").read_text().splitlines()]
    return [[line["step"], line["train_seconds"], line["frechet"]["1"]] for line in lines]


def compare(seed: int, out: Path, overrides: list[str]) -> dict:
    chain, longer = out / f"chain-{seed}", out / f"stage1-longer-{seed}"
    onejump("run", "digits", f"seed={seed}", *overrides, "--out", str(chain))
    first, second = (read(chain / name / "stage.json") for name in ("stage1", "stage2"))
    steps = round(first["last_step"] * (1 + second["seconds"] / first["seconds"]))
    onejump(
        *("train", "digits", f"seed={seed}", *overrides, f"stage1.steps={steps}", "--stage", "stage1"),
        *("--init", str(chain / "teacher"), "--out", str(longer)),
    )
    record = longer / "evaluated.json"
    onejump("evaluate", str(longer), "--n", "2000", "--out", str(record))
    chain_numbers = read(chain / "evaluation.json")["stages"]
    results = {"stage1": chain_numbers["stage1"], "stage2": chain_numbers["stage2"], "stage1 longer": read(record)}
    return {
        "seed": seed,
        "seconds": {"stage1": first["seconds"], "stage2": second["seconds"]}
        | {"stage1 longer": read(longer / "stage1" / "stage.json")["seconds"], "steps of it": steps},
        "frechet": {name: {k: v["frechet"] for k, v in found["steps"].items()} for name, found in results.items()},
        "curves": {
            "stage1": curve(chain / "stage1"),
            "stage2": curve(chain / "stage2"),
            "stage1 longer": curve(longer / "stage1"),
        },
    }


def draw(records: list[dict]) -> str:
    """One-step Frechet distance against seconds of training since stage 1 began, as SVG; a colour a seed."""
    series, styles = {}, {}
    for i, record in enumerate(records):
        before = record["seconds"]["stage1"]
        for name, offset, dash in (("stage1 longer", 0, True), ("stage1", 0, False), ("stage2", before, False)):
            points = [(offset + seconds, frechet) for _, seconds, frechet in record["curves"][name]]
            label = f"seed {record['seed']}, {name}"
            series[label] = points
            styles[label] = Style(i, dash=dash, markers=name == "stage2", opacity=0.5 if name == "stage1" else 1.0)
    labels = ("Digits: stage 2 against a longer stage 1", "seconds of training since stage 1 began", "Frechet distance")
    return line_chart(series, *labels, log_y=True, styles=styles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/stages"))
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as stage2.steps=600")
    args = parser.parse_args()
    records = [compare(int(seed), args.out, args.overrides) for seed in args.seeds.split(",")]
    (args.out / "stages.json").write_text(json.dumps(records, indent=1) + "\n")
    (args.out / "stages.svg").write_text(draw(records))
    for name in ("stage1", "stage1 longer", "stage2"):
        for k in ("1", "2"):
            values = [record["frechet"][name][k] for record in records]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"{name:<14} {k} step(s): {statistics.mean(values):.3f} +- {spread:.3f}   ({each})")


if __name__ == "__main__":
    main()
