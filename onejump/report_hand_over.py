"""The section of the report on stages that end by a rule: what was decided, and from which evaluations."""

from html import escape
from typing import Any

from onejump.hand_over import in_words
from onejump.page import section, table
from onejump.run_folder import RunFolder


def hand_overs(run: RunFolder) -> str:
    """A sentence and a table a stage; nothing where no stage has a rule."""
    parts = []
    for stage in run.stages:
        if stage.stage.until is None:
            continue
        if record := stage.summary.get("hand_over"):
            parts += [f"<p><b>{escape(stage.name)}</b> {escape(in_words(record))}.</p>", evidence(record)]
        else:
            ending = "ended without a value to judge it by" if stage.summary else "is still judged"
            parts.append(f"<p><b>{escape(stage.name)}</b> {ending}.</p>")
    if not parts:
        return ""
    intro = "A stage with a rule ends by it, and hands over the model of its best evaluation, which is also its result."
    detector = (run.run.get("detector") or {}).get("name")
    by = f" Distances are those of the detector “{detector}”." if detector else ""
    return section("Hand-over", intro + by, *parts)


def evidence(record: dict[str, Any]) -> str:
    """All evaluations up to the decision; the best one is marked."""
    points = record["evaluations"]
    rows = [(f"{step:,}", "not finite" if value is None else f"{value:.4g}") for step, value in points]
    best = next(i for i, (step, _) in enumerate(points) if step == record["best_step"])
    rows[best] = (rows[best][0], f"{rows[best][1]} (best)")
    measure = record["measure"]
    return f"<details><summary>Evaluations</summary>{table(('Step', measure), rows, {best: 'total'})}</details>"
