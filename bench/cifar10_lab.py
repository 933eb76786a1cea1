"""What bench/cifar10.py works with: results on disk, commands with a time limit, stages trained within minutes."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onejump.saved import write_json

HERE = Path(__file__).resolve().parent
GRACE = 180.0  # seconds in which a command that is asked to stop saves what it has done
HEADROOM = 0.97  # of the minutes; the rest is for what a measured rate leaves out

Run = Callable[[list[str], float, Path], int | None]


class Failed(Exception):
    """A command did not end well; the line that it said last."""


class Stopped(Exception):
    """The time of this call of the script is over; the next one goes on."""


def spawn(argv: list[str], seconds: float, log: Path) -> int | None:
    """Runs a command for so long at most, then asks it to stop. Its exit code; None if it was asked."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    place = {"ONEJUMP_CACHE": str(log.parent.parent / "cache"), **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with open(log, "a") as file:
        child = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, cwd=HERE.parent, env=place)
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also after Ctrl-C here
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(GRACE)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Arm:
    """A stage to train: which recipe's, and what is changed of it."""

    recipe: str
    stage: str
    changes: tuple[str, ...] = ()


@dataclass
class Book:
    """results.json, written whole after every change."""

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.content = read(self.path)

    def of(self, *names: str) -> dict[str, Any]:
        """The table at this place, empty if nothing is there."""
        found = self.content
        for name in names:
            found = found.get(name, {})
        return found

    def put(self, value: Any, *names: str) -> None:
        found = self.content
        for name in names[:-1]:
            found = found.setdefault(name, {})
        found[names[-1]] = value
        write_json(self.path, self.content)


@dataclass
class Lab:
    """What every part is given. minutes, seconds: of training, or of the whole part; deadline: of this call."""

    out: Path
    book: Book
    data: list[str]  # options that name the images
    device: list[str]
    detectors: tuple[str, ...]
    samples: int
    seed: int
    commit: str | None = None
    minutes: float = 0.0  # of the part that runs
    deadline: float = float("inf")
    part_deadline: float = float("inf")
    probed: int = 50  # steps that are timed
    run: Run = spawn

    def command(self, name: str, argv: list[str]) -> int:
        """Its exit code. Raises Stopped or Failed if the time is over before it is done."""
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            file.write(f"$ {shlex.join(argv)}\n")
        left = min(self.deadline, self.part_deadline) - time.monotonic()
        code = self.run(argv, left, log) if left > 0 else None
        if code is None and self.deadline <= self.part_deadline:
            raise Stopped
        if code is None:
            raise Failed(f"{name}: the part's time was over; see --minutes")
        return code

    def made(self, path: Path, name: str, argv: list[str], draft: Path | None = None) -> Path:
        """What the command makes, made unless it is there. draft: where it writes, if it may leave half of it."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            code = self.command(name, argv)
            if code == 0 and draft is not None:
                os.replace(draft, path)
            if code or not path.exists():
                raise Failed(f"{name}: {last_line(self.out / 'logs' / f'{name}.log')}")
        return path

    def probe(self, path: Path, *words: str) -> Any:
        """What bench/cifar10_probe.py finds out, in a process of its own so that none holds the device."""
        draft = path.with_name(f".{path.name}")
        script = [sys.executable, str(HERE / "cifar10_probe.py"), str(draft)]
        return read(self.made(path, path.stem, [*script, *words], draft))

    def onejump(self, path: Path, name: str, *words: str, draft: Path | None = None) -> Path:
        return self.made(path, name, [sys.executable, "-m", "onejump", *words], draft)

    def trained(
        self, name: str, arm: Arm, out: Path, seconds: float, *options: str, steps: int | None = None
    ) -> dict[str, Any]:
        """The stage's record, trained for so many seconds as measured before; what is begun keeps its steps.

        steps: in place of those that the seconds are for.
        """
        words = ["train", arm.recipe, "--stage", arm.stage, *arm.changes, f"seed={self.seed}"]
        words += [*self.data, *self.device, "--out", str(out), *options]
        plan = self.book.of("models", name, "plan")
        if not plan:
            if steps is None:
                found = self.probe(self.out / "rates" / f"rate-{name}.json", "rate", str(self.probed), *words)
                steps = max(int((seconds * HEADROOM - found["start_seconds"]) / found["step_seconds"]), 1)
                plan = {"seconds": seconds, **found}
            plan |= {"steps": steps}
            self.book.put(plan, "models", name, "plan")
        words += [word.format(stage=arm.stage, steps=plan["steps"], part=-(-plan["steps"] // 6)) for word in LENGTH]
        self.onejump(out / arm.stage / "stage.json", name, *words)
        record = {"plan": plan, "command": shlex.join(["onejump", *words]), **read(out / arm.stage / "stage.json")}
        lines = [json.loads(line) for line in (out / arm.stage / "metrics.jsonl").read_text().splitlines()]
        rates = sorted(line["images_per_second"] for line in lines)
        record |= {"images_per_second": rates[len(rates) // 2], "loss": lines[-1]["loss"]}
        self.book.put(record, "models", name)
        return record

    def judged(self, name: str, model: Path, *steps: int) -> None:
        """Frechet distances of samples in so many steps. All that can be had are; Failed names those that cannot."""
        problems = []
        for k in steps:
            for detector in self.detectors:
                place = ("frechet", name, str(k), detector)
                if "frechet" in self.book.of(*place):
                    continue
                try:
                    self.book.put(self.distance(name, model, k, detector), *place)
                except Failed as error:
                    self.book.put({"error": str(error)}, *place)
                    problems.append(str(error))
        if problems:
            raise Failed(problems[0])
        for k in steps:
            shutil.rmtree(self.out / "samples" / f"{name}-{k}", ignore_errors=True)

    def distance(self, name: str, model: Path, k: int, detector: str) -> dict[str, Any]:
        """Of the same samples for all detectors."""
        images = self.out / "samples" / f"{name}-{k}"
        draft, record = images.with_name(f"draft-{images.name}"), self.out / "judged" / f"{name}-{k}-{detector}.json"
        if not record.exists():
            asked = ["--n", str(self.samples), "--steps", str(k), "--seed", str(self.seed + 1), *self.device]
            self.onejump(images, f"sample-{name}-{k}", "sample", str(model), *asked, "--out", str(draft), draft=draft)
        asked = ["--images", str(images), *self.data, "--detector", detector, "--metrics", "fid", *self.device]
        self.onejump(record, f"judge-{name}-{k}-{detector}", "evaluate", *asked, "--out", str(record))
        found = read(record)
        about = {"real": found["reference"]["n"], "detector_sha256": found["reference"]["detector_sha256"]}
        numbers = found["steps"]["-"]
        return {"frechet": numbers["frechet"], "interval": numbers["frechet_interval"], "n": numbers["n"], **about}


LENGTH = ("{stage}.steps={steps}", "evaluate_every={part}")
