"""CIFAR-10 in a fixed number of minutes: teacher -> ECT -> TCM, iCT, and CTM with and without Analytic-Precond.

    export ONEJUMP_DETECTORS=detectors  # the folder with Inception's and ResNet-56's weights (docs/detectors.md)
    python bench/cifar10.py --data cifar10.zip --device cuda --minutes 20 --out runs/cifar10
    python bench/cifar10.py --data cifar10.zip --device cuda --out runs/cifar10 --parts env,bench --stop-after 9.5
    python bench/cifar10.py --tiny --minutes 0.05 --samples 100 --out runs/cifar10-tiny  # digits, on a CPU

Its parts are commands of onejump; their lines are in the results.

* env: device, driver, versions, commit, date. tests: those marked gpu. bench: `onejump bench --vs plain` of DDPM++ at
  batch 512 and 256, bf16, and of EDM2-S at 16 images.
* tcm: 45 % of the minutes for EDM's teacher, 35 % for ECT, 20 % for TCM, all of DDPM++ in bf16, batches of 512,
  dropout 0.1. At 2,300 images a second in ECT and TCM and a third more in the teacher (what an H100 should do), 20
  minutes are about 3,100 + 1,800 + 1,000 steps: 60 times the images, where the papers have thousands. So the teacher
  goes without augmentation, rates (5e-4, 4e-4, 2e-4) fall along a cosine, gradients are clipped to 1, EMAs are as
  long as the run (power, 6.94), and the curriculum is that of ECT's hour, Delta_t = (1 + k sigmoid) t / 256 from the
  start, in TCM too.
* ict: all the minutes for iCT, NCSN++, batch 512, bf16, dropout 0.1, rate 4e-4, from 10 to 160 intervals.
* ctm: half of the minutes each for CTM and CTM + Analytic-Precond from the same teacher: the same seed and steps, batch
  128, 10 times, up to 5 Heun steps, squared distance, else as published; FID of 5,000 samples at six points on the way.
  The teacher is tcm's; where there is none it is trained first, in its 45 % of the minutes.

None of these numbers was tuned. Before a stage is trained its step is timed, over 50 warm ones, and it gets as many as
its minutes hold. They include compiling, and not what evaluates and saves; models are judged after them: --samples in 1
and 2 steps, by every detector.

OUT/results.json is written whole after every command. The same command goes on where the last one ended, was stopped
(--stop-after, Ctrl-C) or was killed. What fails is recorded with the line that it ended with, the next part runs, and
the next call tries again. Parts that results.json calls done are not repeated, whatever else is left of OUT: its runs/
has the models, logs/ all that was printed. Commands without checkpoints (tests, bench, rates, sampling) begin again:
give them the minutes for it. env, tests and bench end after their --minutes; the others, evaluation included, after
twice theirs and a quarter of an hour.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from cifar10_lab import Book, Failed, Lab, Run, Stopped, spawn
from cifar10_parts import CIFAR10, PARTS, TINY, TRAIN

USUAL = {"env": 2.0, "tests": 8.0, "bench": 9.0, "tcm": 20.0, "ict": 20.0, "ctm": 20.0}


def minutes_of(text: str) -> dict[str, float]:
    """20,bench=5: for the parts that train, and for one part."""
    found = dict(USUAL)
    for item in filter(None, text.split(",")):
        name, _, value = item.rpartition("=")
        if name and name not in PARTS:
            raise argparse.ArgumentTypeError(f"no part {name!r}; there are {', '.join(PARTS)}")
        found |= dict.fromkeys([name] if name else TRAIN, float(value))
    if not min(found.values()) > 0:
        raise argparse.ArgumentTypeError(f"{text}: more than 0 are needed")
    return found


def names_of(text: str) -> list[str]:
    names = text.split(",")
    if wrong := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {wrong[0]!r}; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def attempt(name: str, lab: Lab, args: argparse.Namespace) -> bool:
    """Does a part, unless it is done, and notes how that went. True: the time of this call is over."""
    asked = {"data": lab.data, "minutes": args.minutes[name], "samples": lab.samples, "seed": lab.seed}
    before = lab.book.of("parts", name)
    if before.get("state") == "done":
        print(f"{name}: done before", flush=True)
        return False
    if name in TRAIN and before and before["asked"] != asked:
        changed = next(key for key in asked if asked[key] != before["asked"].get(key))
        raise SystemExit(
            f"{lab.out}: {name} began with {changed} {before['asked'][changed]}; give it, or another --out"
        )
    began, state, problem = time.monotonic(), "done", None
    lab.minutes = args.minutes[name]
    lab.part_deadline = began + 60 * (2 * lab.minutes + 15 if name in TRAIN else lab.minutes)
    lab.book.put({"state": "begun", "asked": asked, "seconds": before.get("seconds", 0.0)}, "parts", name)
    try:
        PARTS[name](lab, TINY if args.tiny else CIFAR10)
    except (Stopped, KeyboardInterrupt) as error:
        state, problem = "stopped", "" if isinstance(error, Stopped) else "by hand"
    except Exception as error:
        state, problem = "failed", str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
    seconds = before.get("seconds", 0.0) + time.monotonic() - began
    lab.book.put({"state": state, "asked": asked, "seconds": seconds, "problem": problem}, "parts", name)
    print(f"{name}: {state}, {seconds:.0f} s in all{f': {problem}' if problem else ''}", flush=True)
    return state == "stopped"


def summary(book: Book) -> list[str]:
    """What has been found so far, a line each."""
    lines = [f"tests: {book.of('tests')['summary']}"] if book.of("tests") else []
    for name, found in book.of("bench").items():
        told = [line for line in found.get("table", ()) if "times as fast" in line or " of its time" in line]
        lines += [f"bench {name}: {line}" for line in told or [found.get("error", "no ratios")]]
    for name, found in book.of("models").items():
        if "images" in found:
            about = f"{found['plan']['steps']:,} steps, {found['images']:,} images, {found['seconds']:.0f} s"
            lines.append(f"{name}: {about}, {found['images_per_second']:,.0f} images/s, skipped {found['skipped']}")
    for name, by_steps in book.of("frechet").items():
        for k, by_detector in by_steps.items():
            told = [f"{d} {found.get('frechet', found.get('error'))}" for d, found in by_detector.items()]
            lines.append(f"{name}, {k} step(s): {', '.join(told)}")
    for name, curve in book.of("curves").items():
        lines += [f"{name} at step {point['step']:,}: {point['frechet']}" for point in curve]
    return lines


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--data", type=Path, help="CIFAR-10: a zip in EDM's layout, or the folder of its batches")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--parts", type=names_of, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--minutes", type=minutes_of, default=USUAL, help="20, or 20,bench=5: see above")
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="MINUTES", help="of this call")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--detectors", help="separated by commas (default: inception-768,resnet56; digits if tiny)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of this code, for the record (default: what git says)")
    parser.add_argument("--tiny", action="store_true", help="digits and a small network: is this script in order?")
    args = parser.parse_args(argv)
    if args.data is None and not args.tiny:
        parser.error("--data: say where CIFAR-10 is, or give --tiny")
    return args


def main(argv: list[str] | None = None, run: Run = spawn) -> int:
    """0; 1 if a part has failed. What has stopped is no failure. run: how commands are run."""
    began, args = time.monotonic(), read_options(argv)
    detectors = args.detectors or ("digits" if args.tiny else "inception-768,resnet56")
    lab = Lab(
        out=args.out.resolve(),
        book=Book(args.out.resolve() / "results.json"),
        data=[] if args.tiny else ["--data", str(args.data.resolve())],
        device=["--device", args.device] if args.device else [],
        detectors=tuple(detectors.split(",")),
        samples=args.samples,
        seed=args.seed,
        commit=args.commit,
        deadline=began + 60 * args.stop_after,
        probed=(TINY if args.tiny else CIFAR10).probed,
        run=run,
    )
    for name in args.parts:
        if attempt(name, lab, args):
            print("stopped; the same command goes on", flush=True)
            break
    print("\n".join(summary(lab.book)))
    return int(any(lab.book.of("parts", name).get("state") == "failed" for name in args.parts))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a command that runs is asked to stop, too
    sys.exit(main())
