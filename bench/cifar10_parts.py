"""The parts of bench/cifar10.py: which commands each gives, and the choices for a few minutes of training."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cifar10_lab import Arm, Failed, Lab, last_line, read

TEACHER, ECT = 0.45, 0.80  # shares of the minutes at which the teacher, then ECT, have ended; TCM has the rest
LATER = ("log_every=10", "save_every=250", "sample_every=0")
SHORT = ("{0}.batch={1}", "{0}.precision=bf16", "{0}.clip=1", "{0}.rate=CosineRate(lr={2})", "{0}.ema=PowerEMA")


def short(stage: str, lr: float, batch: int = 512) -> tuple[str, ...]:
    """What a run of minutes wants: one long wave of the rate, an EMA as long as the run, small first steps."""
    return tuple(change.format(stage, batch, lr) for change in SHORT)


@dataclass(frozen=True)
class Choices:
    """What is trained and timed. curve: samples of one point of CTM's curves; table: of Analytic-Precond."""

    teacher: Arm
    ect: Arm
    tcm: Arm
    ict: Arm
    ctm: Arm
    curve: int
    table: tuple[str, ...]
    benched: tuple[tuple[str, tuple[str, ...]], ...]
    tests: tuple[str, ...] = ()
    probed: int = 50


NETWORK = ("network.dropout=0.1", *LATER)
FEW = "evaluation.n=64"  # of the distances in pixels on the way, which nobody looks at
CHAIN = (*NETWORK, FEW, *short("stage1", 4e-4), *short("stage2", 2e-4))
CHAIN += tuple(f"stage{k}.method.delta.q=256" for k in (1, 2))  # the hour of ECT: r = t - t / 256 from the start
VS_PLAIN = ("--vs", "plain", "--precision", "bf16", "--steps", "10")
CIFAR10 = Choices(
    teacher=Arm(
        "edm-cifar10-uncond",
        "teacher",
        (*NETWORK, FEW, "network.augment_dim=0", "teacher.augment=none", *short("teacher", 5e-4)),
    ),
    ect=Arm("tcm-cifar10", "stage1", CHAIN),
    tcm=Arm("tcm-cifar10", "stage2", CHAIN),
    ict=Arm("ict-cifar10", "ict", (*NETWORK, FEW, *short("ict", 4e-4), "ict.method.s1=160")),
    ctm=Arm(
        "ctm-cifar10-uncond",
        "ctm",
        (
            *(*LATER, "ctm.batch=128", "ctm.precision=bf16", "ctm.clip=1", "evaluation.steps=1,2"),
            *("ctm.method.n=10", "ctm.method.max_steps=5", "ctm.method.distance=mean_l2"),
        ),
    ),
    curve=5000,
    table=("--times", "60", "--samples", "512"),
    benched=(
        ("ddpmpp-512", (*VS_PLAIN, "--batch", "512")),
        ("ddpmpp-256", (*VS_PLAIN, "--batch", "256")),
        ("edm2-s-16", ("ect-imagenet64-s", *VS_PLAIN, "--batch", "16")),
    ),
)

MLP = ("network=MLPConfig(shape=(1,8,8),label_dim=10,width=16,depth=1)", "log_every=5", "evaluation.n=40")
BOTH = (*MLP, "stage1.batch=32", "stage2.batch=32")
TINY = Choices(
    teacher=Arm("digits", "teacher", (*MLP, "teacher.batch=32")),
    ect=Arm("digits", "stage1", BOTH),
    tcm=Arm("digits", "stage2", BOTH),
    ict=Arm("digits-ict", "ict", (*MLP, "ict.batch=32")),
    ctm=Arm("digits-ctm", "ctm", (*MLP, "ctm.batch=32", "ctm.method.max_steps=2")),
    curve=40,
    table=("--times", "4", "--samples", "16"),
    benched=(("digits-4", ("digits", "--stage", "stage1", "--vs", "plain", "--batch", "4", "--steps", "1")),),
    tests=("tests/networks/test_layers.py",),
    probed=3,
)


def env(lab: Lab, choices: Choices) -> None:
    """Device, driver, versions, commit, date; made anew in every OUT."""
    device = lab.device[1] if lab.device else "cpu"
    found = lab.probe(lab.out / "env.json", "env", device)
    lab.book.put(found | ({"commit": lab.commit} if lab.commit else {}), "env")


def tests(lab: Lab, choices: Choices) -> None:
    """The tests marked gpu; where some fail, that is the result, and the part is done."""
    words = ["-o", "addopts=", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider", *choices.tests]
    code = lab.command("tests", [sys.executable, "-m", "pytest", *words])
    log = lab.out / "logs" / "tests.log"
    bad = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    lab.book.put({"exit_code": code, "summary": last_line(log), "not_passed": bad}, "tests")


def bench(lab: Lab, choices: Choices) -> None:
    """Each case that fails, as where memory is short, leaves its line; the others follow."""
    problems = []
    for name, words in choices.benched:
        path = lab.out / "bench" / f"{name}.json"
        draft = path.with_name(f"draft-{path.name}")
        try:
            lab.onejump(path, f"bench-{name}", "bench", *words, *lab.device, "--json", str(draft), draft=draft)
            log = (lab.out / "logs" / f"bench-{name}.log").read_text(errors="replace")
            table = log.rpartition("$ ")[2].splitlines()[1:]
            lab.book.put({"table": table, "record": read(path)}, "bench", name)
        except Failed as error:
            lab.book.put({"error": str(error)}, "bench", name)
            problems.append(str(error))
    if problems:
        raise Failed(problems[0])


def teacher(lab: Lab, choices: Choices) -> Path:
    """Its run, trained by the first part that needs it."""
    out = lab.out / "runs" / "teacher"
    lab.trained("teacher", choices.teacher, out, lab.minutes * 60 * TEACHER)
    return out / choices.teacher.stage


def tcm(lab: Lab, choices: Choices) -> None:
    """Teacher, ECT, TCM: what one of them took more or less than its share, the next has less or more."""
    start, out, seconds = teacher(lab, choices), lab.out / "runs" / "tcm", lab.minutes * 60
    spent = lab.book.of("models", "teacher")["seconds"]
    ect = lab.trained("ect", choices.ect, out, seconds * ECT - spent, "--init", str(start))
    after = replace(choices.tcm, changes=(*choices.tcm.changes, f"stage1.steps={ect['plan']['steps']}"))
    found = lab.trained("tcm", after, out, seconds - spent - ect["seconds"])
    lab.book.put({"minutes": lab.minutes, "trained": (spent + ect["seconds"] + found["seconds"]) / 60}, "budget", "tcm")
    every(lambda: lab.judged("ect", out / choices.ect.stage, 1, 2), lambda: lab.judged("tcm", out / after.stage, 1, 2))


def ict(lab: Lab, choices: Choices) -> None:
    """All the minutes in one stage, from random weights."""
    out = lab.out / "runs" / "ict"
    found = lab.trained("ict", choices.ict, out, lab.minutes * 60)
    lab.book.put({"minutes": lab.minutes, "trained": found["seconds"] / 60}, "budget", "ict")
    lab.judged("ict", out / choices.ict.stage, 1, 2)


def ctm(lab: Lab, choices: Choices) -> None:
    """Half of the minutes each, after the teacher: the same steps, images, noise and times, another jump."""
    start, seconds = teacher(lab, choices), lab.minutes * 30
    table = lab.out / "runs" / "table.json"
    lab.onejump(table, "table", "precond", str(start), *lab.data, *choices.table, *lab.device, "--out", str(table))
    points = f"evaluation.n={min(choices.curve, lab.samples)}"
    common = replace(choices.ctm, changes=(*choices.ctm.changes, points))
    options = ("--init", str(start), "--teacher", str(start), "--detector", lab.detectors[0])
    steps, ends = None, []
    for name, jump in (("ctm", ()), ("ctm-analytic", ("ctm.jump=AnalyticPrecond", f"ctm.jump.table={table}"))):
        arm, out = replace(common, changes=(*common.changes, *jump)), lab.out / "runs" / name
        found = lab.trained(name, arm, out, seconds, *options, steps=steps)
        steps = found["plan"]["steps"]
        lines = [line for line in (out / arm.stage / "evaluations.jsonl").read_text().splitlines() if line]
        lab.book.put([take(line) for line in lines], "curves", name)
        ends.append(lambda name=name, model=out / arm.stage: lab.judged(name, model, 1, 2))
    trained = sum(lab.book.of("models", name)["seconds"] for name in ("ctm", "ctm-analytic")) / 60
    lab.book.put({"minutes": lab.minutes, "trained": trained}, "budget", "ctm")
    every(*ends)


def take(line: str) -> dict:
    """A point of a curve: step, seconds of training, Frechet distances by number of jumps."""
    found = json.loads(line)
    return {name: found[name] for name in ("step", "train_seconds", "frechet")}


def every(*works: Callable[[], None]) -> None:
    """All of them, whichever fail; then the first failure."""
    problems = []
    for work in works:
        try:
            work()
        except Failed as error:
            problems.append(error)
    if problems:
        raise problems[0]


Part = Callable[[Lab, Choices], None]
PARTS: dict[str, Part] = {"env": env, "tests": tests, "bench": bench, "tcm": tcm, "ict": ict, "ctm": ctm}
TRAIN = ("tcm", "ict", "ctm")
