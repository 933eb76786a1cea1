"""When a stage hands over to the next before its steps are done, and from which of its models: by a rule, not by eye.

TCM's first stage is best somewhere on the way: on CIFAR-10 it drifts upwards afterwards, on ImageNet-64 it blows up
(Lee et al. 2025). The rule looks at the stage's evaluations alone; it is a pure function of them, so a run that is
resumed decides as one that never stopped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from onejump.times import check_range
from onejump.types import UserError

Why = Literal["plateau", "rise", "end"]


class Judged(NamedTuple):
    """One evaluation: a Frechet distance, lower is better; one that is not finite is the worst."""

    step: int
    value: float


@dataclass(frozen=True)
class Plateau:
    """The end of a stage: `patience` evaluations in a row without a new best, or one that is worse by a share `rise`.

    Neither before patience + 1 evaluations are there. What is judged is the Frechet distance of samples made in `calls`
    jumps; with t, of real images that were noised to t and denoised in one jump (TCM's denoising FID).
    """

    patience: int = 5
    rise: float = 0.25  # 0.25: a quarter worse than the best
    calls: int = 1
    t: float | None = None

    def __post_init__(self) -> None:
        check_range(at_least=1, patience=self.patience, calls=self.calls)
        check_range(above=0, rise=self.rise)
        if self.t is not None:
            check_range(above=0, t=self.t)

    @property
    def measure(self) -> tuple[str, str]:
        """The two names of the value in a line of evaluations.jsonl."""
        return ("frechet", str(self.calls)) if self.t is None else ("denoising_frechet", f"{self.t:.15g}")

    @property
    def told(self) -> str:
        """What the value is."""
        return f"Frechet distance, {self.calls} step(s)" if self.t is None else f"denoising distance at t = {self.t:g}"

    def history(self, lines: Iterable[Mapping[str, Any]]) -> tuple[Judged, ...]:
        """The values in lines of evaluations.jsonl; lines without one are left out."""
        kind, which = self.measure
        found = ((line["step"], line.get(kind, {}).get(which)) for line in lines)
        return tuple(Judged(step, float(value)) for step, value in found if value is not None)


@dataclass(frozen=True)
class Decision:
    """A stage has ended at `step`, and hands over the model of `best`. history: what was known then."""

    why: Why
    best: Judged
    history: tuple[Judged, ...]

    @property
    def step(self) -> int:
        return self.history[-1].step

    def record(self, rule: Plateau) -> dict[str, Any]:
        """For stage.json: the decision and its evidence."""
        return {
            "why": self.why,
            "at_step": self.step,
            "best_step": self.best.step,
            "best": self.best.value,
            "measure": rule.told,
            "patience": rule.patience,
            "rise": rule.rise,
            "evaluations": [[step, value if math.isfinite(value) else None] for step, value in self.history],
        }


def best_of(history: Sequence[Judged]) -> Judged | None:
    """The lowest, the first of equals; None without one that is finite."""
    finite = [judged for judged in history if math.isfinite(judged.value)]
    return min(finite, key=lambda judged: judged.value, default=None)


def decide(history: Sequence[Judged], rule: Plateau) -> Decision | None:
    """Whether the stage has ended by the rule; None: it goes on.

    The decision is that of the first evaluation that calls for one, whatever came after.
    """
    for n in range(rule.patience + 1, len(history) + 1):
        known = tuple(history[:n])
        best = best_of(known)
        if best is None:
            continue
        if not known[-1].value <= best.value * (1 + rule.rise):
            return Decision("rise", best, known)
        if n - 1 - known.index(best) >= rule.patience:
            return Decision("plateau", best, known)
    return None


def at_end(history: Sequence[Judged]) -> Decision | None:
    """The decision of a stage whose steps are all done; None without a finite value."""
    best = best_of(history)
    return None if best is None else Decision("end", best, tuple(history))


def in_words(record: Mapping[str, Any]) -> str:
    """A decision as stage.json has it, in one sentence."""
    why = {
        "plateau": f"no new best in {record['patience']} evaluations",
        "rise": f"more than {record['rise']:.0%} above its best",
        "end": "all its steps are done",
    }[record["why"]]
    last = record["evaluations"][-1][1]
    found = "not finite" if last is None else f"{last:.4g}"
    return (
        f"ended at step {record['at_step']:,} ({why}): {record['measure']} {record['best']:.4g} at step "
        f"{record['best_step']:,}, which is handed over; {found} at the end"
    )


def check_rule(
    path: str, rule: Plateau, evaluate_every: int, calls: Sequence[int], judged: bool, times: tuple[float, float]
) -> None:
    """Whether a stage will have the evaluations that its rule looks at.

    path: of the rule, for messages. calls: the numbers of jumps that evaluations make. judged: whether the stage's
    models are judged while they train. times: the range that they are trained on. Raises UserError.
    """
    if not judged:
        raise UserError(f"{path}: a diffusion model is not judged while it trains; leave until=none")
    if not evaluate_every:
        raise UserError(f"{path}: without evaluations on the way nothing can be decided; give evaluate_every")
    if rule.t is None and rule.calls not in calls:
        steps = ",".join(map(str, calls))
        raise UserError(f"{path}.calls: {rule.calls}; evaluations make {steps} jump(s): use one of them")
    if rule.t is not None and not times[0] <= rule.t <= times[1]:
        raise UserError(f"{path}.t: {rule.t:g}; the stage trains from {times[0]:g} to {times[1]:g}: stay inside")


def undecided(stage: str, rule: Plateau, evaluate_every: int, first_step: int, steps: int) -> str | None:
    """What to say of a stage that has fewer evaluations than its rule decides from."""
    made = (first_step + steps) // evaluate_every - first_step // evaluate_every
    wanted = rule.patience + 1
    if made >= wanted:
        return None
    often = steps // (2 * wanted)
    more = f"give evaluate_every={often}, or a smaller" if often else "give a smaller"
    return (
        f"{stage}.until: it decides from {wanted} evaluations on, and {steps} steps have {made}, so the stage runs to "
        f"its end; {more} {stage}.until.patience"
    )
