"""Does training survive everything? One small run is killed at random moments, and started again, until it ends.

    OMP_NUM_THREADS=1 python bench/soak.py --kills 200 --json runs/soak.json

The run is `onejump run digits` with a tiny network: three stages, samples, evaluations, a report. First it goes through
undisturbed. Then it is stopped at random moments: most often by SIGKILL, also by SIGTERM, Ctrl-C, and a disk that
takes no more than a few KiB a file; at times its newest checkpoint is cut short or one bit of it is turned over while
it is down. After every death all files are read, and at the end both runs must be the same bit by bit.

Every --fresh-th life is a fresh `python -m onejump ...`; the others are forks of a process that has imported everything
and run nothing, since that takes longer than a life. The exit code is 1 if anything was lost.
"""

import argparse
import json
import math
import os
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from onejump import cli, evaluate, pipeline  # noqa: F401  what a life imports
from onejump.checkpoint import checkpoint_path, load_checkpoint, saved_steps
from onejump.data.digits import digits
from onejump.types import UserError

STAGES = ("teacher", "stage1", "stage2")
SAVE = 5  # steps between checkpoints
CLOCK = {"seconds", "train_seconds", "images_per_second", "seconds_on_the_clock", "started"}
KINDS = {"SIGKILL": 55, "SIGTERM": 12, "SIGINT": 5, "cut": 10, "bit": 8, "disk": 10}  # and how often, of 100
ENDS = {  # the exit codes that are right; a negative one where the signal came before there was a handler
    "SIGKILL": {-signal.SIGKILL},
    "SIGTERM": {0, -signal.SIGTERM},
    "SIGINT": {130, -signal.SIGINT},
    "disk": {1},
}


@dataclass
class Life:
    """One process, from its start to its death."""

    argv: list[str]
    log: Path
    fresh: bool
    largest_file: int = 0  # bytes; 0: no limit
    pid: int = 0

    def __post_init__(self) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                code = self.live()
            finally:
                os._exit(code)

    def live(self) -> int:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
        if self.largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, self.largest_file))
        signal.signal(signal.SIGINT, signal.SIG_DFL if self.fresh else signal.default_int_handler)  # as of a terminal
        if self.fresh:
            os.execv(sys.executable, [sys.executable, "-m", "onejump", *self.argv])
        code = cli.main(self.argv)
        sys.stderr.flush()
        return code

    def ended(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self, seconds: float = 600.0) -> int:
        end = time.monotonic() + seconds
        while (code := self.ended()) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise Lost("it did not end by itself")
            time.sleep(0.005)
        return code


class Lost(Exception):
    """Something that must not happen."""


@dataclass
class Soak:
    """The run under test: its folder, what was done to it, and what was seen."""

    out: Path
    argv: list[str]
    steps: int  # of a stage
    fresh: int
    rng: random.Random
    spoilt: set[Path] = field(default_factory=set)  # checkpoints that this program has damaged
    lost: dict[str, list[int]] = field(default_factory=dict)  # steps between the last line and the last checkpoint
    ends: Counter = field(default_factory=Counter)
    lives: int = 0
    start_up: float = 1.0  # seconds that the last life had until its moment came

    def life(self, largest_file: int = 0) -> Life:
        self.lives += 1
        fresh = self.fresh > 0 and self.lives % self.fresh == 0
        return Life(self.argv, self.out.with_suffix(".log"), fresh, largest_file)

    def progress(self) -> int:
        """Steps of the whole chain for which there is a line in metrics.jsonl."""
        return sum(max(last_step(self.out / name) - first_step(name, self.steps), 0) for name in STAGES)

    def die(self, kind: str, at: int) -> None:
        """One life that ends by `kind`, once `at` steps are made."""
        signals = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
        limit = self.rng.randint(4, 64) * 1024 if kind == "disk" else 0
        life, began, before = self.life(limit), time.monotonic(), self.progress()
        end = began + self.rng.uniform(0, self.start_up) if before >= at and kind != "disk" else math.inf
        while (code := life.ended()) is None and time.monotonic() < end:
            time.sleep(0.004)
            if end == math.inf and kind != "disk" and self.progress() >= at:
                self.start_up = min(time.monotonic() - began, 30.0)
                end = time.monotonic() + self.rng.uniform(0, 0.02)
        if code is None:
            os.kill(life.pid, signals.get(kind, signal.SIGKILL))
            code = life.wait()
        self.judge(kind, code, life)

    def judge(self, kind: str, code: int, life: Life) -> None:
        """Its exit code, its words, and what it has left behind."""
        right = ENDS.get(kind, ENDS["SIGKILL"])
        said = life.log.read_text()
        finished = code == 0 and (self.out / "report.html").exists()
        if code not in right and not finished:  # a run may end just before its moment
            raise Lost(f"{kind}: exit code {code}\n{said}")
        if "Traceback" in said and code != -signal.SIGINT:
            raise Lost(f"{kind}: {said}")
        if code == 1 and sum(line.startswith("onejump: ") for line in said.splitlines()) != 1:
            raise Lost(f"{kind}: not one line\n{said}")
        if finished:
            self.ends[kind, "too late"] += 1
            return
        self.ends[kind, code] += 1
        self.lost.setdefault(kind, []).append(max(self.read(name) for name in STAGES))
        if kind in ("cut", "bit"):
            self.spoil(kind)

    def read(self, name: str) -> int:
        """Reads all that a stage has left; how many of its steps are in no checkpoint."""
        folder = self.out / name
        for path in [*self.out.glob("*.json"), *folder.glob("*.json"), *folder.glob("model/*.json")]:
            json.loads(path.read_text())
        for path in folder.glob("model/model.safetensors"):
            load_file(path)
        try:
            saved = load_checkpoint(folder / "checkpoints")
        except UserError as error:
            raise Lost(f"{name}: {error}") from error
        damaged = {p for p in self.spoilt if p.parent.parent == folder and p.exists()}
        if saved is not None and len(saved.warnings) > len(damaged):
            raise Lost(f"{name}: {saved.warnings}, but {damaged or 'none'} was damaged from outside")
        last, step = last_step(folder), saved.step if saved else first_step(name, self.steps)
        allowed = SAVE * (1 + len(damaged))
        if last and last - step > allowed:
            raise Lost(f"{name}: step {last} was made, but the newest checkpoint is of step {step}")
        return max(last - step, 0) if last else 0

    def spoil(self, kind: str) -> None:
        """Damages the newest checkpoint of the stage that trains, where there is an older one."""
        for folder in (self.out / name / "checkpoints" for name in STAGES):
            steps = saved_steps(folder)
            if (folder.parent / "stage.json").exists() or len(steps) < 2:
                continue
            if checkpoint_path(folder, steps[-2]) in self.spoilt:
                continue
            newest = checkpoint_path(folder, steps[-1])
            path = newest / self.rng.choice(["state.safetensors", "state.json"])
            content = bytearray(path.read_bytes())
            place = self.rng.randrange(len(content))
            if kind == "bit":
                content[place] ^= 1 << self.rng.randrange(8)
            path.write_bytes(content if kind == "bit" else content[:place])
            self.spoilt.add(newest)

    def run(self, kills: int) -> None:
        total = len(STAGES) * self.steps
        kinds = self.rng.choices(list(KINDS), KINDS.values(), k=kills)
        for n, (kind, at) in enumerate(zip(kinds, sorted(self.rng.uniform(0, total) for _ in kinds), strict=True), 1):
            if (self.out / "report.html").exists():
                print(f"the run ended after {n - 1} deaths: give it more --steps")
                break
            self.die(kind, round(at))
            self.spoilt = {path for path in self.spoilt if still_spoilt(path)}
            if n % 10 == 0:
                print(f"{n} deaths, {self.progress()} of {total} steps", flush=True)
        life = self.life()
        if code := life.wait():
            raise Lost(f"the last life: exit code {code}\n{life.log.read_text()}")


def last_step(folder: Path) -> int:
    """Of the last whole line in metrics.jsonl, 0 if there is none."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 4096, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    for line in reversed(lines[:-1]):
        return int(json.loads(line)["step"]) if line.startswith(b"{") else 0
    return 0


def first_step(name: str, steps: int) -> int:
    """The last stage counts on from the one before it."""
    return steps if name == "stage2" else 0


def still_spoilt(path: Path) -> bool:
    """Whether it has not been written anew."""
    try:
        saved = load_checkpoint(path.parent)
    except UserError:
        return True
    return path.exists() and saved is not None and any(path.name in warning for warning in saved.warnings)


def facts(out: Path) -> dict[str, Any]:
    """All that a run is, without its clock."""
    found: dict[str, Any] = {}
    for name in STAGES:
        found[f"{name}/model"] = (out / name / "model" / "model.safetensors").read_bytes()
        newest = checkpoint_path(out / name / "checkpoints", saved_steps(out / name / "checkpoints")[-1])
        found[f"{name}/checkpoint"] = (newest / "state.safetensors").read_bytes()
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            found[f"{name}/{file}"] = [timeless(json.loads(text)) for text in (out / name / file).open()]
        for path in sorted((out / name / "samples").glob("*.png")):
            found[f"{name}/samples/{path.name}"] = path.read_bytes()
    found["evaluation.json"] = timeless(json.loads((out / "evaluation.json").read_text()))
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in CLOCK}
    return value


def command(out: Path, steps: int) -> list[str]:
    network = "network=MLPConfig(shape=(1,8,8),label_dim=10,width=16,depth=1,dropout=0.1)"
    each = [f"{stage}.{what}" for stage in STAGES for what in (f"steps={steps}", "batch=16")]
    often = ["log_every=1", f"save_every={SAVE}", "sample_every=40", "evaluate_every=100"]
    return ["run", "digits", network, *each, *often, "evaluation.n=20", "evaluation.teacher_steps=3", "--out", str(out)]


def table(soak: Soak) -> Iterator[str]:
    yield f"{'what':<9} {'times':>5} {'steps lost: mean':>17} {'most':>5}   exit codes"
    for kind in KINDS:
        lost = soak.lost.get(kind, [])
        ends = ", ".join(f"{code}: {n}" for (k, code), n in sorted(soak.ends.items(), key=str) if k == kind)
        yield f"{kind:<9} {len(lost):>5} {statistics.mean(lost or [0]):>17.1f} {max(lost, default=0):>5}   {ends}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300, help="of each of the three stages")
    parser.add_argument("--fresh", type=int, default=20, help="every so many lives a fresh interpreter; 0: never")
    parser.add_argument("--seed", type=int, help="of the moments and kinds (default: the clock)")
    parser.add_argument("--json", type=Path, help="also write the table there")
    args = parser.parse_args()
    seed = time.time_ns() if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    digits()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "run"
        began = time.monotonic()
        undisturbed = Soak(whole, command(whole, args.steps), args.steps, 0, random.Random(0))
        undisturbed.run(0)
        print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
        soak = Soak(out, command(out, args.steps), args.steps, args.fresh, random.Random(seed))
        try:
            soak.run(args.kills)
            ours, theirs = facts(out), facts(whole)
            differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            verdict = f"differs: {', '.join(differ)}" if differ else "bit-equal to the undisturbed run"
        except Lost as error:
            verdict = f"LOST after {soak.lives} lives: {error}"
        seconds = time.monotonic() - began
    print("\n".join(table(soak)))
    print(f"{soak.lives} lives, {sum(map(len, soak.lost.values()))} deaths in {seconds:.0f} s; {verdict}")
    if args.json:
        ends = {f"{kind} {code}": n for (kind, code), n in soak.ends.items()}
        record = {"seed": seed, "deaths": args.kills, "lost": soak.lost, "ends": ends, "verdict": verdict}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if verdict.startswith("bit-equal") else 1


if __name__ == "__main__":
    sys.exit(main())
