"""The sections of the report that are charts. A stage keeps its colour through all of them."""

import math

from onejump.page import charts, missing, plural, section
from onejump.run_folder import RunFolder, StageFolder
from onejump.running_sums import BINS, T_HIGH, T_LOW
from onejump.svg import GREY, Points, Style, line_chart

CURVE_POINTS = 200  # of a loss curve; more are averaged in blocks


def quality(run: RunFolder) -> str:
    """Fréchet distance against training and against sampling steps."""
    intro = (
        "Lower is better. Level lines are for comparison: the diffusion teacher, and one half of the real images "
        "against the other. While training, fewer samples may be judged than after it."
    )
    during, styles = {}, {}
    for i, stage in enumerate(run.stages):
        for k in sorted({int(k) for line in stage.evaluations for k in line["frechet"]}):
            name = f"{stage.name}, {plural(k, 'step')}"
            during[name] = [(stage.step_of(line), line["frechet"].get(str(k))) for line in stage.evaluations]
            styles[name] = Style(i, dash=k > 1, markers=True)
    notes, drawn = [], []
    if during:
        labels = ("While training", "optimiser steps, counted over all stages", "Fréchet distance")
        drawn.append(line_chart(during, *labels, log_y=True, styles=styles))
    else:
        notes.append(missing("No evaluation while training is on file.", run.command))
    if any(stage.results for stage in run.stages):
        drawn.append(_steps_chart(run))
    else:
        notes.append(missing("No evaluation after training yet.", run.command))
    return section("Quality", intro if drawn else "", charts(*drawn), *notes)


def _steps_chart(run: RunFolder) -> str:
    """A line a stage; the teacher and the halves of the real images as level lines to compare with."""
    series: dict[str, Points] = {}
    styles = {}
    most = max(k for stage in run.stages for k in stage.results)
    for i, stage in enumerate(run.stages):
        points: Points = [(k, found.get("frechet")) for k, found in stage.results.items()]
        if stage.is_diffusion and points:
            name = f"{stage.name}, {plural(max(stage.results), 'step')}"
            series[name], styles[name] = [(1, points[-1][1]), points[-1]], Style(i, dash=True)
        elif points:
            series[stage.name], styles[stage.name] = points, Style(i, markers=True)
    half = run.evaluation.get("reference", {}).get("real_half_frechet")
    if half is not None:
        name = "half of the real images"
        series[name], styles[name] = [(1, half), (most, half)], Style(GREY, dash=True)
    labels = ("After training", "sampling steps", "Fréchet distance")
    return line_chart(series, *labels, log_x=True, log_y=True, styles=styles)


def losses(run: RunFolder) -> str:
    """A chart a stage of the distance by t, early, midway and at the end; then the loss against steps."""
    drawn = [loss_by_noise(stage, colour) for colour, stage in enumerate(run.stages)]
    curves = {stage.name: thin([(stage.step_of(line), line["loss"]) for line in stage.metrics]) for stage in run.stages}
    if not any(curves.values()):
        return section("Loss", "", missing("Nothing logged yet.", run.command))
    labels = ("Training loss", "optimiser steps, counted over all stages", "loss")
    styles = {stage.name: Style(colour) for colour, stage in enumerate(run.stages)}
    drawn.append(line_chart(curves, *labels, log_y=True, styles=styles))
    intro = (
        "By noise level t: the distance that a stage minimises, before its weight; faint lines are early in the stage, "
        "the full one is its end. Training loss: weights included. Each stage has a distance and a loss of its own, so "
        "compare within a stage only."
    )
    return section("Loss", intro, charts(*(svg for svg in drawn if svg)))


def loss_by_noise(stage: StageFolder, colour: int) -> str:
    """The first, the middle and the last log line that have one; empty if none has."""
    lines = [line for line in stage.metrics if any(v is not None for v in line["loss_by_t"])]
    if not lines:
        return ""
    chosen = dict.fromkeys((0, len(lines) // 2, len(lines) - 1))
    series: dict[str, Points] = {}
    styles = {}
    for at, opacity in zip(chosen, (0.4, 0.7, 1.0)[-len(chosen) :], strict=True):
        name = f"step {lines[at]['step'] - stage.first_step:,}"
        series[name] = list(zip(bin_centres(), lines[at]["loss_by_t"], strict=True))
        styles[name] = Style(colour, opacity=opacity)
    labels = (f"{stage.name} by noise level", "noise level t", "distance")
    return line_chart(series, *labels, log_x=True, log_y=True, styles=styles)


def bin_centres() -> list[float]:
    """t in the middle of each bin of loss_by_t."""
    return [T_LOW * (T_HIGH / T_LOW) ** ((i + 0.5) / BINS) for i in range(BINS)]


def thin(points: Points, most: int = CURVE_POINTS) -> Points:
    """At most this many points: each the mean of a block of neighbours, at the block's last x."""
    finite = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    size = max(math.ceil(len(finite) / most), 1)
    blocks = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(block[-1][0], sum(y for _, y in block) / len(block)) for block in blocks]
