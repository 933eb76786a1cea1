"""The page of `onejump compare`, with everything inside it, and all its pictures in one PNG."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from onejump.analytic_page import write_page
from onejump.compare import MODELS, Comparison, Sheet, gflop_of, peta, time_of
from onejump.compare_models import Entry
from onejump.compare_verdict import frechet, verdict
from onejump.page import charts, definitions, figure, number, plural, section, table
from onejump.svg import GREY, Points, Style, line_chart

FRECHET = "Fréchet distance"
TERMS = {
    "Steps": "jumps from noise to an image; a diffusion model steps along its differential equation instead",
    "NFE": "number of function evaluations, the network calls for one image",
    FRECHET: "how far apart real and generated images are as two clouds of features: 0 if they are alike, lower is "
    "better; it depends on the detector, the real images and the number of samples, so only equal ones are compared",
    "Interval": "holds 95 % of the distances that other samples of the same model would have, by bootstrap; another "
    "training of the same model can differ by more",
    "KID": "kernel distance between the same features, unbiased for small sets; near 0 (also below) is best",
    "GFLOP": "10\N{SUPERSCRIPT NINE} operations of matrix products and convolutions, a multiply-add counted as 2; "
    "1 PFLOP is 10\N{SUPERSCRIPT SIX} of them",
    "Training": "of the model and of all that it started from or was distilled from: images seen, time without "
    "evaluation, and images \N{MULTIPLICATION SIGN} passes \N{MULTIPLICATION SIGN} FLOP of a pass, where a backward "
    "pass counts as two and passes are those at the end of a curriculum",
}
WIDTH, MARGIN, TITLE = 1600, 16, 44  # of the PNG: about its width, between its pictures, above each of them


def write_comparison(path: Path, found: Comparison, sheets: Sequence[Sheet], real: Path | None, about: str) -> None:
    """One HTML file. about: how the samples were drawn."""
    sections = [results(found), quality(found), pictures(found, sheets, real, about), models(found), differences(found)]
    sections += [section("Terms", "", definitions(TERMS, "terms")), origin(found)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, f"Comparison of {len(found.entries)} models", verdict(found), sections)


def pictures(found: Comparison, sheets: Sequence[Sheet], real: Path | None, about: str) -> str:
    """Real images beside the samples of every model."""
    intro = (
        f"Image k of every sheet of samples starts from the same noise ({about}), and is asked for the same class by "
        "models of the same classes, so the same places can be compared."
    )
    figures = [figure(real, "real images", f"<b>real images</b><br>{real_note(found)}")] if real else []
    for sheet in sheets:
        name = f"{sheet.entry.name}, {plural(sheet.steps, 'step')}"
        caption = f"<b>{escape(name)}</b><br>{note_of(found, sheet)}"
        figures.append(figure(sheet.path, f"samples of {name}", caption))
    told = "No real images: no report of these models' runs shows any (a run of latents never does)."
    note = "" if real else f'<p class="missing">{escape(told)}</p>'
    return section("Samples", intro, f'<div class="sheets">{"".join(figures)}</div>', note)


def note_of(found: Comparison, sheet: Sheet) -> str:
    """The distance of what a sheet shows."""
    if sheet.entry not in found.comparable:
        return "not comparable" if sheet.entry.record else "not evaluated"
    return f"{FRECHET} {number(frechet(sheet.entry, sheet.steps))}"


def real_note(found: Comparison) -> str:
    half = half_of(found)
    return "" if half is None else f"{FRECHET} {number(half)}, half against half"


def half_of(found: Comparison) -> float | None:
    """What real images get, one half of them against the other."""
    return found.first.record.reference.get("real_half_frechet") if found.first and found.first.record else None


def results(found: Comparison) -> str:
    """A row for each model and number of steps; those that cannot be compared in another colour."""
    first = found.first.record if found.first else None
    if first is None:
        return section("Results", "None of these models was evaluated.", remarks(found))
    intro = (
        f"{plural(first.samples, 'sample')} in each row, compared with {number(first.reference.get('n'))} real images "
        f"through the detector “{first.reference.get('detector', 'unknown')}”, unless a note says otherwise."
    )
    aside = {found.label(entry) for entry in found.entries if entry not in found.comparable}
    header, rows = found.result_table()
    looks = {i: "real" for i, row in enumerate(rows) if row[0] in aside}
    return section("Results", intro, table(header, rows, looks), remarks(found))


def remarks(found: Comparison) -> str:
    notes = "<br>".join(f"[{k}] {escape(text)}" for k, text in enumerate(found.notes, 1))
    return f'<p class="missing">{notes}</p>' if notes else ""


def models(found: Comparison) -> str:
    intro = "Training counts everything that a model was trained from: its teacher and the stages before it."
    return section("Models and their training", intro, table(MODELS, found.model_rows()))


def differences(found: Comparison) -> str:
    """Only the fields in which the configurations differ."""
    rows = found.differences()
    if not rows:
        return section("Configuration", "No field differs between the models that have it.")
    intro = "Fields in which the models differ: the model's own stage, the stages before it under their names."
    return section(
        "Configuration", intro, table(("Field", *(e.name.replace("/", ", ", 1) for e in found.entries)), rows)
    )


def origin(found: Comparison) -> str:
    """What is needed to make sure of the same numbers."""
    facts = {}
    for entry in found.entries:
        facts[entry.name] = f"{entry.target.path}, trained on images {entry.fingerprint or 'unknown'}"
    if found.first and found.first.record:
        reference = found.first.record.reference
        facts["Real images sha256"] = str(reference.get("fingerprint", "unknown"))
        facts["Detector sha256"] = str(reference.get("detector_sha256", "unknown"))
    return section("Origin", "", definitions(facts, "facts"))


def quality(found: Comparison) -> str:
    """Charts of the comparable models; a model keeps its colour through all of them."""
    shown = found.comparable
    if not shown:
        return section("Quality", "", '<p class="missing">Nothing to draw: no model was evaluated.</p>')
    intro = (
        "Lower is better. In the chart against training a model is one place on the axis, with a mark for each of its "
        "numbers of steps. While training, the model is judged with its fewest steps."
    )
    notes = []
    training = against_training(found)
    drawn = [against_steps(found), per_image(found, "GFLOP")]
    if found.one_device:
        drawn.append(per_image(found, "seconds"))
    else:
        notes.append("Time for an image is not drawn: it was measured on different or unknown devices.")
    drawn += [chart for chart in (training, while_training(found)) if chart]
    if not training:
        notes.append("The cost of training is not drawn: fewer than two models have all of it on file, in one measure.")
    if not one_measure(found):
        notes.append("The distances while training are not drawn: the recipes judge different numbers of samples.")
    text = "".join(f'<p class="missing">{escape(note)}</p>' for note in notes)
    return section("Quality", intro, charts(*drawn), text)


def style_of(found: Comparison, entry: Entry, dash: bool = False, markers: bool = True) -> Style:
    """A colour each; from the seventh on dashed, too."""
    i = found.comparable.index(entry)
    return Style(i % GREY, dash or i >= GREY, markers, 1.0 if i < 2 * GREY else 0.5)


def distances(entry: Entry) -> list[tuple[int, float]]:
    return [(k, frechet(entry, k)) for k in entry.results]


def chart(
    series: Mapping[str, Points], styles: Mapping[str, Style], title: str, x: str, y: str, log_x: bool = False
) -> str:
    """Distances on a log axis. Of lines that lie over each other each stays to be seen, or is told.

    The later one changes to dashes without markers, through which the earlier one shows; a single point cannot, and
    says in its name over which it lies.
    """
    lines: dict[str, Points] = {}
    looks: dict[str, Style] = {}
    below: Counter[tuple] = Counter()
    alone: dict[tuple, str] = {}
    for name, points in series.items():
        stretches = set(zip(points, points[1:], strict=False))
        depth, style = max((below[stretch] for stretch in stretches), default=0), styles[name]
        if depth:
            style = replace(style, dash=not style.dash, markers=False, opacity=(0.5 if style.dash else 1) / depth)
        below.update(stretches)
        if len(points) == 1 and (other := alone.setdefault(points[0], name)) != name:
            name = f"{name} (over {other})"
        lines[name], looks[name] = points, style
    return line_chart(lines, title, x, y, log_x=log_x, log_y=True, styles=looks)


def against_steps(found: Comparison) -> str:
    """A line a model; diffusion models and halves of the real images as level lines."""
    series: dict[str, Points] = {}
    styles = {}
    few = [k for entry in found.comparable if not entry.is_diffusion for k in entry.results]
    most = max(2, *few) if few else max(k for entry in found.comparable for k in entry.results)
    for entry in found.comparable:
        points, name = distances(entry), entry.name
        if entry.is_diffusion and few:
            name = f"{name}, {plural(points[-1][0], 'step')}"
            points = [(1, points[-1][1]), (most, points[-1][1])]
        level = entry.is_diffusion
        series[name], styles[name] = points, style_of(found, entry, dash=level, markers=not level)
    half = half_of(found)
    if half is not None:
        series["half of the real images"] = [(1, half), (most, half)]
        styles["half of the real images"] = Style(GREY, dash=True)
    labels = ("Against sampling steps", "sampling steps", FRECHET)
    return chart(series, styles, *labels, log_x=True)


def per_image(found: Comparison, unit: str) -> str:
    """A line a model over what an image costs, in seconds or in GFLOP."""
    title, label = "Against time for an image", "seconds for 1,000 images"
    if unit == "GFLOP":
        title, label = "Against compute for an image", "GFLOP for one image"
    series: dict[str, Points] = {}
    for entry in found.comparable:
        cost = {k: gflop_of(entry, k) if unit == "GFLOP" else time_of(own) for k, own in entry.results.items()}
        series[entry.name] = [(x, y) for k, y in distances(entry) if (x := cost[k]) is not None]
    styles = {entry.name: style_of(found, entry) for entry in found.comparable}
    return chart(series, styles, title, label, FRECHET, log_x=far_apart(series))


def far_apart(series: Mapping[str, Points]) -> bool:
    """Whether their places on the axis want a logarithmic one."""
    places = [x for points in series.values() for x, _ in points]
    return max(places, default=1) > 10 * min(places, default=1) > 0


def against_training(found: Comparison) -> str:
    """Over the compute of training where that is known of every model, else over its time on one device; else ""."""
    spent = {entry.name: entry.training for entry in found.comparable if entry.training and entry.training.whole}
    known = [entry for entry in found.comparable if entry.name in spent]
    compute = {name: peta(training.flops) for name, training in spent.items()}
    label, cost = "PFLOP of training", compute
    if None in compute.values():
        devices = set().union(*(training.devices for training in spent.values()))
        if len(devices) > 1 or None in devices:
            return ""
        label, cost = "hours of training", {name: training.seconds / 3600 for name, training in spent.items()}
    if len(known) < 2:
        return ""
    places = {name: value for name, value in cost.items() if value is not None}
    series: dict[str, Points] = {e.name: [(places[e.name], y) for _, y in distances(e)] for e in known}
    styles = {entry.name: style_of(found, entry) for entry in known}
    labels = ("Against training", label, FRECHET)
    return chart(series, styles, *labels, log_x=far_apart(series))


def one_measure(found: Comparison) -> bool:
    """Whether all runs judge as many samples while they train."""
    return len({run.recipe.evaluation.n for entry in found.comparable if (run := entry.target.run)}) <= 1


def while_training(found: Comparison) -> str:
    """The distance with the fewest steps over the images of a model's own stage; "" if none is on file."""
    series: dict[str, Points] = {}
    styles = {}
    for entry in found.comparable if one_measure(found) else []:
        stage = entry.stage
        lines = [line for line in stage.evaluations if line["frechet"]] if stage else []
        if stage and lines:
            k = min(lines[0]["frechet"], key=int)
            name = f"{entry.name}, {plural(int(k), 'step')}"
            seen = [(line["step"] - stage.first_step) * stage.stage.batch for line in lines]
            series[name] = [(x, line["frechet"].get(k)) for x, line in zip(seen, lines, strict=True)]
            styles[name] = style_of(found, entry)
    labels = ("While training", "images, in the model's own stage", FRECHET)
    return chart(series, styles, *labels) if series else ""


def write_picture(path: Path, found: Comparison, sheets: Sequence[Sheet], real: Path | None) -> None:
    """All sheets in one PNG, each under its name."""
    titles = [("real images", real_note(found), real)] if real else []
    titles += [(f"{s.entry.name}, {plural(s.steps, 'step')}", note_of(found, s), s.path) for s in sheets]
    tiles = [(name, note, Image.open(file).convert("RGB")) for name, note, file in titles]
    wide, high = (max(size) for size in zip(*(tile.size for *_, tile in tiles), strict=True))
    columns = min(len(tiles), max(1, WIDTH // (wide + MARGIN)))
    rows = -(-len(tiles) // columns)
    out = Image.new("RGB", (columns * (wide + MARGIN) + MARGIN, rows * (high + TITLE + MARGIN) + MARGIN), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(15)
    for i, (name, note, tile) in enumerate(tiles):
        x, y = MARGIN + i % columns * (wide + MARGIN), MARGIN + i // columns * (high + TITLE + MARGIN)
        for line, (text, colour) in enumerate(((name, "black"), (note, "#57606a"))):
            draw.text((x, y + 20 * line), fitting(text, lambda t: draw.textlength(t, font) <= wide), colour, font)
        out.paste(tile, (x, y + TITLE))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    out.save(draft, format="PNG", optimize=True)
    os.replace(draft, path)


def fitting(text: str, fits: Callable[[str], bool]) -> str:
    """The text in plain letters, which the font has, its beginning left out where it is too wide."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    first = next(i for i in range(len(plain) + 1) if fits("..." * (i > 0) + plain[i:]))
    return "..." * (first > 0) + plain[first:]
