"""report.html: one page, with everything inside it, that says what a run has made and how well."""

import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from onejump.config import Network
from onejump.networks.text_unet import TextUNetConfig
from onejump.overrides import describe
from onejump.page import DASH, definitions, duration, figure, missing, number, page, percent, plural, section, table
from onejump.report_charts import losses, quality
from onejump.report_hand_over import hand_overs
from onejump.run_folder import RunFolder, StageFolder, read_run
from onejump.types import Images, UserError

CELL, GAP, GREY = 32, 2, 128  # of contact sheets: least side of an image and gap, in pixels; brightness of the gap
TERMS = {
    "t": "the noise level: an image with noise of standard deviation t added, pixels from \N{MINUS SIGN}1 to 1",
    "Steps": "jumps from noise to an image, with some noise added again before each further one; the diffusion "
    "teacher steps along its differential equation instead",
    "NFE": "number of function evaluations, the network calls for one image; they are what sampling costs",
    "Fréchet distance": "how far apart real and generated images are as two clouds of features: 0 if they are alike, "
    "lower is better; smaller sets give larger values, so compare equal n only",
    "KID": "kernel distance between the same features, unbiased for small sets; near 0 (also below) is best",
    "Confidence": "how surely a classifier reads a sample: the mean of its largest probability",
    "As asked": "share of samples that the classifier reads as the class they were asked to show",
    "Imbalance": "share of samples that would have to change class to match the real shares: 0 is best",
    "Nearest": "root mean square pixel distance to the nearest training image, mean over samples; far below the value "
    "of real images means copies",
}


SHARES = ("Confidence", "As asked", "Imbalance")  # which the digits' classifier alone tells
SHEETS = 4  # of samples of latents, that are shown of a stage


def write_report(out: Path) -> Path:
    """Writes out/report.html from what the run's folder holds and returns its path; sections without data say so.

    Raises UserError if `out` is not the folder of a run.
    """
    run = read_run(out)
    sections = [pictures, results, quality, hand_overs, losses, neighbours, time_spent, configuration, origin]
    if is_of_latents(run):
        sections = [pictures_of_latents, hand_overs, losses, time_spent, configuration, origin]
    title = f"{run.recipe.name}: report"
    body = f'<header><h1>{escape(title)}</h1><p class="verdict">{verdict(run)}</p></header>\n<main>\n'
    parts = [make(run) for make in sections]
    path = out / "report.html"
    draft = out / ".report.html"
    draft.write_text(page(title, body + "\n".join(part for part in parts if part) + "\n</main>"), encoding="utf-8")
    os.replace(draft, path)
    return path


def is_of_latents(run: RunFolder) -> bool:
    """Whether it is not judged, since latents are no images."""
    reads_text = isinstance(run.recipe.network, TextUNetConfig)
    return reads_text or not run.evaluation and run.run.get("detector", "unknown") is None


def how_to_judge(network: Network, model: Path | str) -> tuple[str, str]:
    """Of models of latents, which a run does not judge: what to do, and the command."""
    if isinstance(network, TextUNetConfig):
        return "Latents are judged by", f"onejump evaluate {model} --prompts FILE --data IMAGES"
    return "Latents are judged once samples are decoded, by", "onejump evaluate --images DECODED --data IMAGES"


def verdict(run: RunFolder) -> str:
    """One sentence: quality of the last stage with its fewest steps, and the cost of the chain."""
    time = duration(sum(stage.train_seconds for stage in run.stages))
    spent = f"<strong>{time}</strong> of training on {escape(str(run.run.get('device', 'an unnamed device')))}"
    judged = [stage for stage in run.stages if stage.results]
    if is_of_latents(run):
        text, command = how_to_judge(run.recipe.network, run.path)
        return f"{spent}. {text} <code>{escape(command)}</code>."
    if not judged:
        return f"Not evaluated yet, after {spent}."
    stage = judged[-1]
    found = next(iter(stage.results.values()))
    sure = found.get("confidence", {}).get("mean")
    read = "" if sure is None else f", a classifier reads its samples with <strong>{percent(sure)}</strong> confidence"
    kind = " (the diffusion teacher)" if stage.is_diffusion else ""
    return (
        f"With <strong>{plural(found['nfe'], 'network call')}</strong> an image, {escape(stage.name)}{kind} is at a "
        f"Fréchet distance of <strong>{number(found['frechet'])}</strong> from the real images{read}, after {spent}."
    )


def pictures(run: RunFolder) -> str:
    """Real images beside the samples of every stage."""
    intro = (
        "Image k of every sheet of samples starts from the same noise (and is asked for the same class), so the same "
        "places can be compared across stages and numbers of steps."
    )
    half = run.evaluation.get("reference", {}).get("real_half_frechet")
    note = "" if half is None else f"<br>Fréchet distance {number(half)}, half against half"
    figures = [figure(run.real, "real images", f"<b>real images</b>{note}")] if run.real.is_file() else []
    for stage in run.stages:
        for steps, path in stage.sheets.items():
            name = f"{stage.name}, {plural(steps, 'step')}"
            distance = stage.results.get(steps, {}).get("frechet")
            note = f"<br>Fréchet distance {number(distance)}" if distance is not None else ""
            figures.append(figure(path, f"samples of {name}", f"<b>{escape(name)}</b>{note}"))
    sheets = f'<div class="sheets">{"".join(figures)}</div>' if figures else ""
    without = [stage.name for stage in run.stages if not stage.sheets]
    note = missing(f"No samples yet of {', '.join(without)}.", run.command) if without else ""
    return section("Samples", intro, sheets, note)


def pictures_of_latents(run: RunFolder) -> str:
    """What the autoencoder made of samples while the stages trained."""
    figures = []
    for stage in run.stages:
        for path in some_of(sorted((run.path / stage.name / "samples").glob("step-*.png"))):
            name = f"{stage.name}, step {int(path.stem.removeprefix('step-')):,}"
            figures.append(figure(path, f"samples of {name}", f"<b>{escape(name)}</b>"))
    if not figures:
        return ""
    return section("Samples while training", "", f'<div class="sheets">{"".join(figures)}</div>')


def some_of(paths: Sequence[Path]) -> list[Path]:
    """At most SHEETS, evenly, with the last."""
    n = len(paths)
    return [paths[(k + 1) * n // min(n, SHEETS) - 1] for k in range(min(n, SHEETS))]


def results(run: RunFolder) -> str:
    """A row for each stage and number of steps, and one for real images."""
    reference = run.evaluation.get("reference", {})
    rows = [_result_row(stage.name, k, found) for stage in run.stages for k, found in stage.results.items()]
    if not rows:
        return section("Results", "", missing("Not evaluated yet.", run.command))
    half, nearest = (number(reference.get(key)) for key in ("real_half_frechet", "nearest_rms_of_real"))
    rows.append(("real images", DASH, DASH, half, DASH, DASH, DASH, DASH, nearest, DASH))
    header = ("Stage", "Steps", "NFE", "Fréchet, lower is better", "KID", "Confidence, mean", "As asked", "Imbalance")
    n = max(found["n"] for stage in run.stages for found in stage.results.values())
    intro = (
        f"{plural(n, 'sample')} in each row, compared with {number(reference.get('n'))} real images through the "
        f"detector “{reference.get('detector', 'unknown')}”. The last row is what real images get: half against "
        "half, and each against its nearest other."
    )
    titles, rows = without_empty((*header, "Nearest, rms", "Time, s / 1,000 images"), rows)
    said = {name.partition(",")[0] for name in titles}
    terms = {term: text for term, text in TERMS.items() if term not in SHARES or term in said}
    return section("Results", intro, table(titles, rows, {len(rows) - 1: "real"}), definitions(terms, "terms"))


def without_empty(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table without the columns of SHARES that hold dashes alone."""
    columns = list(zip(header, *rows, strict=True))
    kept = [column for column in columns if column[0].partition(",")[0] not in SHARES or set(column[1:]) - {DASH}]
    first, *others = zip(*kept, strict=True)
    return first, others


def _result_row(name: str, steps: int, found: dict[str, Any]) -> tuple[str, ...]:
    sure = found.get("confidence") or {}
    seconds = found.get("seconds")
    return (
        name,
        str(steps),
        number(found.get("nfe")),
        number(found.get("frechet")),
        number(found.get("kid")),
        percent(sure.get("mean")),
        percent(sure.get("as_asked")),
        percent(found.get("balance_distance")),
        number(found.get("nearest_rms")),
        number(None if seconds is None else 1000.0 * seconds / found["n"]),
    )


def neighbours(run: RunFolder) -> str:
    """Samples over the training images nearest to them."""
    shown = [stage for stage in run.stages if stage.neighbours.is_file()]
    if not shown:
        note = missing("No pictures yet.", run.command)
        return section("Nearest training images", "", note)
    intro = (
        "In each pair the upper image is generated and the lower one is the training image nearest to it, pixel by "
        "pixel. A good generator makes images of the same kind that differ in shape and detail; pairs that match pixel "
        "for pixel would mean that it copies what it was trained on."
    )
    alt = "samples of {} and their nearest training images"
    figures = [figure(s.neighbours, alt.format(s.name), f"<b>{escape(s.name)}</b>") for s in shown]
    return section("Nearest training images", intro, f'<div class="neighbours">{"".join(figures)}</div>')


def time_spent(run: RunFolder) -> str:
    """What each stage has cost."""
    rows = [_time_row(stage) for stage in run.stages]
    images = sum(stage.summary.get("images", 0) for stage in run.stages)
    skipped = sum(stage.summary.get("skipped", 0) for stage in run.stages)
    times = [duration(sum(s.train_seconds for s in run.stages)), duration(sum(s.clock_seconds for s in run.stages))]
    rows.append(("all stages", "", "", number(images), *times, "", number(skipped), ""))
    header = ("Stage", "Method", "Steps", "Images", "Time, training", "Time, on the clock", "Images / s")
    intro = (
        "The time on the clock includes sampling, evaluating and saving on the way; images / s counts training alone. "
        "A step is skipped when its gradient is not finite."
    )
    late = [stage.name for stage in run.stages if not stage.summary]
    note = missing(f"Not finished: {', '.join(late)}.", run.command) if late else ""
    return section(
        "Time", intro, table((*header, "Skipped, steps", "Parameters"), rows, {len(rows) - 1: "total"}), note
    )


def _time_row(stage: StageFolder) -> tuple[str, ...]:
    done, last = stage.summary, stage.last_line
    times = (duration(seconds) if done or last else DASH for seconds in (stage.train_seconds, stage.clock_seconds))
    rate = done["images"] / done["seconds"] if done else last.get("images_per_second")
    return (
        stage.name,
        type(stage.stage.method).__name__,
        number(done["last_step"] - done["first_step"]) if done else f"of {stage.stage.steps:,}",
        number(done.get("images")),
        *times,
        number(rate),
        number(done.get("skipped", last.get("skipped"))),
        number(done.get("parameters")),
    )


def configuration(run: RunFolder) -> str:
    intro = "Each line can be given on the command line as path=value."
    text = escape(describe(run.recipe))
    return section("Configuration", intro, f"<details><summary>All values</summary><pre>{text}</pre></details>")


def origin(run: RunFolder) -> str:
    """What is needed to get the same numbers again."""
    info, data, reference = run.run, run.run.get("data", {}), run.evaluation.get("reference", {})
    if not info:
        return section("Origin", "", missing("No run.json in this folder.", run.command))
    shape = " \N{MULTIPLICATION SIGN} ".join(str(side) for side in data.get("shape", ()))
    labels = f"{data['classes']} classes" if data.get("classes") else "no labels"
    judged = info.get("detector") or {}  # of the evaluations on the way, also before there is one of the whole run
    pairs = {
        "Command": info.get("command"),
        "Data": f"{data.get('name', DASH)}: {number(data.get('n'))} images of {shape}, {labels}",
        "Data sha256": data.get("fingerprint"),
        "Detector": reference.get("detector", judged.get("name")),
        "Detector sha256": reference.get("detector_sha256", judged.get("sha256")),
        "Seeds": f"training {run.recipe.seed}, evaluation {run.recipe.evaluation.seed}",
        "Device": info.get("device"),
        "Threads": info.get("threads"),
        "Versions": ", ".join(f"{name} {version}" for name, version in info.get("versions", {}).items()) or None,
        "Started": info.get("started"),
    }
    return section("Origin", "", definitions({k: DASH if v is None else str(v) for k, v in pairs.items()}, "facts"))


def contact_sheet(images: Images, columns: int, path: Path, scale: int | None = None) -> None:
    """Writes a PNG grid of the images, row by row, with gaps of 2 pixels.

    Each is enlarged `scale` times without smoothing; by default so that its sides are 32 pixels or more. Raises
    UserError for images that are neither grey (1 channel) nor RGB (3).
    """
    cells = enlarge(images, scale)
    n, c, h, w = cells.shape
    rows, columns = math.ceil(n / columns), min(n, columns)
    sheet = torch.full((c, rows * (h + GAP) - GAP, columns * (w + GAP) - GAP), GREY, dtype=torch.uint8)
    for k, cell in enumerate(cells):
        y, x = k // columns * (h + GAP), k % columns * (w + GAP)
        sheet[:, y : y + h, x : x + w] = cell
    path.parent.mkdir(parents=True, exist_ok=True)
    to_picture(sheet).save(path, format="PNG", optimize=True)


def to_picture(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    """One image for Pillow: grey from 1 channel, RGB from 3. Raises UserError for other numbers of channels."""
    if len(image) not in (1, 3):
        raise UserError(f"images of {len(image)} channels: pictures have 1 or 3")
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels)


def enlarge(images: Images, scale: int | None = None) -> UInt8[Tensor, "n c H W"]:
    """Each pixel `scale` by `scale` times, on the CPU."""
    scale = scale or max(math.ceil(CELL / min(images.shape[2:])), 1)
    return images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def neighbour_sheet(samples: Images, nearest: Images, columns: int, path: Path) -> None:
    """A contact sheet of pairs: a sample, and close below it the training image nearest to it."""
    above, below = enlarge(samples), enlarge(nearest)
    near, far = (torch.full_like(above[:, :, :size], GREY) for size in (GAP, 2 * GAP))
    contact_sheet(torch.cat([far, above, near, below, far], dim=2), columns, path, scale=1)
