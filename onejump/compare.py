"""Models side by side: which of their numbers can be compared, tables of them, and samples from the same noise."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from onejump.compare_models import Entry, Record, entry_of, targets_of
from onejump.config_json import join, to_json
from onejump.generate import balanced_labels
from onejump.importers.stable_diffusion import open_model
from onejump.page import DASH, duration, number, plural
from onejump.parts import Generated
from onejump.prompts import SHOWN, prompts_for, reads_text
from onejump.report import contact_sheet
from onejump.types import UserError

COLUMNS = 10  # of a sheet, unless each class can have one
MODELS = ("Model", "Method", "Data", "Parameters", "Images, in training", "Time, in training", "PFLOP, in training")


@dataclass(frozen=True)
class Sheet:
    """A picture of samples of one model."""

    entry: Entry
    steps: int
    path: Path


@dataclass(frozen=True)
class Comparison:
    """Two or more models that make images of one shape, in the order in which they were named."""

    entries: tuple[Entry, ...]

    @cached_property
    def first(self) -> Entry | None:
        """The first that was evaluated: the others are held against it."""
        return next((entry for entry in self.entries if entry.record), None)

    @cached_property
    def comparable(self) -> list[Entry]:
        """Those measured as the first was, through the same detector on as many samples against the same images."""
        return [entry for entry in self.entries if entry.record and not self.unlike(entry)]

    def unlike(self, entry: Entry) -> list[str]:
        """Why the numbers of this entry cannot be compared with those of the first."""
        if self.first is None or self.first.record is None or entry.record is None:
            return []
        texts = measured_otherwise(entry.record, self.first.record, self.first.name)
        return [f"{text}: not comparable, left out of the charts" for text in texts]

    def remarks(self, entry: Entry) -> list[str]:
        """All that a reader has to know about this entry."""
        out = [*self.unlike(entry), *entry.remarks]
        known = [other for other in self.entries if other.fingerprint]
        if entry.fingerprint and entry.fingerprint != known[0].fingerprint:
            out.append(f"trained on other images than {known[0].name}")
        if entry.saved.class_names != self.entries[0].saved.class_names:
            out.append(f"knows other classes than {self.entries[0].name}: its samples are not asked for the same ones")
        if entry.record and self.first and self.first.record and entry.record.device != self.first.record.device:
            device = entry.record.device
            out.append(f"timed on another device ({device})" if device else "its record tells no device for its times")
        return out

    @cached_property
    def notes(self) -> list[str]:
        """Every remark once; number k of them is referred to as [k + 1]."""
        return list(dict.fromkeys(text for entry in self.entries for text in self.remarks(entry)))

    def label(self, entry: Entry) -> str:
        """The name, with the numbers of its notes: "run/stage2 [1] [3]"."""
        numbers = sorted(self.notes.index(text) + 1 for text in self.remarks(entry))
        return " ".join([entry.name, *(f"[{k}]" for k in numbers)])

    @property
    def one_device(self) -> bool:
        """Whether the times of sampling can be compared."""
        devices = {entry.record.device for entry in self.comparable if entry.record}
        return len(devices) == 1 and None not in devices

    def model_rows(self) -> list[tuple[str, ...]]:
        """A row of MODELS for each."""
        rows = []
        for entry in self.entries:
            spent = entry.training
            cost = (number(spent.images), duration(spent.seconds), number(peta(spent.flops))) if spent else [DASH] * 3
            about = (entry.method or DASH, entry.data or DASH, number(entry.parameters))
            rows.append((self.label(entry), *about, *cost))
        return rows

    def result_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Titles, and a row for each model and number of steps; columns of RESULTS that hold nothing are left out."""
        found = [(entry, k) for entry in self.entries for k in entry.results]
        columns = {"Model": [self.label(entry) for entry, _ in found]}
        columns |= {title: [cell(entry, k) for entry, k in found] for title, cell in RESULTS.items()}
        held = {title: cells for title, cells in columns.items() if set(cells) - {DASH}}
        return tuple(held), list(zip(*held.values(), strict=True))

    def differences(self) -> list[tuple[str, ...]]:
        """Field by field of the configurations: a row where models that have the field disagree."""
        settings = [dict(settings_of(entry)) for entry in self.entries]
        fields = list(dict.fromkeys(field for own in settings for field in own))
        tops = [field.partition(".")[0] for field in fields]
        fields.sort(key=lambda field: tops.index(field.partition(".")[0]))
        rows = [(field, *(own.get(field, DASH) for own in settings)) for field in fields]
        return [row for row in rows if len(set(row[1:]) - {DASH}) > 1]


def compare(wanted: Sequence[str], names: Sequence[str] | None = None, all_stages: bool = False) -> Comparison:
    """Raises UserError where nothing can be compared: fewer than two models, one name twice, other image shapes."""
    targets = [target for text in wanted for target in targets_of(text, all_stages)]
    if len(targets) < 2:
        way_out = "name another, or give --stages for every stage of this run"
        raise UserError(f"{' '.join(wanted)}: one model alone, nothing to compare; {way_out}")
    entries = tuple(entry_of(target) for target in targets)
    if names is not None:
        if len(names) != len(entries):
            found = ", ".join(entry.name for entry in entries)
            raise UserError(f"--names: {plural(len(names), 'name')} for {len(entries)} models ({found})")
        entries = tuple(replace(entry, name=name) for entry, name in zip(entries, names, strict=True))
    else:
        entries = named_by_record(entries)
    name, count = Counter(entry.name for entry in entries).most_common(1)[0]
    if count > 1 or not all(entry.name.strip() for entry in entries):
        what = f"{count} models are called {name!r}" if count > 1 else "a name is empty"
        raise UserError(f"--names: {what}; give each its own, such as --names A,B")
    for entry in entries[1:]:
        if entry.saved.shape != entries[0].saved.shape:
            shapes = ["x".join(map(str, other.saved.shape)) for other in (entry, entries[0])]
            told = f"{entry.name}: makes images of {shapes[0]}, {entries[0].name} of {shapes[1]}"
            raise UserError(f"{told}; only models of one image shape can be compared")
    return Comparison(entries)


def named_by_record(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Models of one name are told apart by the names of their records, where those were given."""
    count = Counter(entry.name for entry in entries)

    def named(entry: Entry) -> Entry:
        record = entry.target.record
        return replace(entry, name=f"{entry.name} ({record.stem})") if record and count[entry.name] > 1 else entry

    return tuple(map(named, entries))


def measured_otherwise(ours: Record, theirs: Record, other: str) -> list[str]:
    """In which ways one evaluation is not like another, that of the model called `other`."""

    def told(record: Record, name: str, key: str) -> str:
        value, sha256 = record.reference.get(name), record.reference.get(key)
        what = number(value) if isinstance(value, int) else value or "unknown"
        return f"{what}, sha256 {str(sha256)[:8]}" if sha256 else str(what)

    out = []
    for key, what, name in (
        ("fingerprint", "against other real images", "n"),
        ("reference_sha256", "against other statistics of real images", "n"),
        ("detector_sha256", "through another detector", "detector"),
        ("prompts_sha256", "on other prompts", "prompts"),
    ):
        if ours.reference.get(key) != theirs.reference.get(key):
            out.append(f"measured {what} ({told(ours, name, key)}; {other}: {told(theirs, name, key)})")
    if ours.samples != theirs.samples:
        out.append(f"measured on {ours.samples:,} samples ({other}: {theirs.samples:,})")
    if ours.rounding != theirs.rounding:
        out.append(f"its pixels were made by --rounding {ours.rounding} ({other}: {theirs.rounding})")
    return out


def peta(flops: int | None) -> float | None:
    return None if flops is None else flops / 1e15


def gflop_of(entry: Entry, steps: int) -> float:
    """For one image in this many steps."""
    return entry.results[steps]["nfe"] * entry.flops / 1e9


def time_of(found: dict[str, Any]) -> float | None:
    """Seconds for 1,000 images."""
    return None if found.get("seconds") is None else 1000.0 * found["seconds"] / found["n"]


def cell_of(*path: str) -> Callable[[Entry, int], str]:
    """What gives the text of one number of a record, a dash where it is not."""

    def cell(entry: Entry, steps: int) -> str:
        value: Any = entry.results[steps]
        for name in path:
            value = value.get(name) if value else None
        return number(value)

    return cell


def interval_of(entry: Entry, steps: int) -> str:
    found = entry.results[steps].get("frechet_interval")
    return f"{number(found[0])} to {number(found[1])}" if found else DASH


RESULTS: dict[str, Callable[[Entry, int], str]] = {
    "Steps": lambda entry, k: str(k),
    "NFE": cell_of("nfe"),
    "Fréchet, lower is better": cell_of("frechet"),
    "Interval, 95 %": interval_of,
    "KID": cell_of("kid"),
    "sFID": cell_of("spatial_frechet"),
    "IS": cell_of("inception_score", "mean"),
    "CLIP score": cell_of("clip_score"),
    "Precision": cell_of("precision"),
    "Recall": cell_of("recall"),
    "Density": cell_of("density"),
    "Coverage": cell_of("coverage"),
    "GFLOP, an image": lambda entry, k: number(gflop_of(entry, k)),
    "Time, s / 1,000 images": lambda entry, k: number(time_of(entry.results[k])),
}


def settings_of(entry: Entry) -> Iterator[tuple[str, str]]:
    """Every field of what made this model, as text: the network's, the seed, its stage's, those of the stages before.

    Of a model that was made elsewhere, what its file tells.
    """
    saved, origin = entry.saved, entry.saved.provenance
    yield from flat(to_json(saved.network), "network")
    if "seed" in origin:
        yield "seed", text_of(origin["seed"])
    if entry.training is None:
        made = {"precond": to_json(saved.model.precond), "jump": to_json(saved.model.jump)}
        yield from flat(made | ({"method": origin["method"]} if "method" in origin else {}), "")
    else:
        *before, own = (part.stage for part in entry.training.parts)
        for stage in (own, *before):
            for field, value in flat(to_json(stage.stage), ""):
                if field and field.partition(".")[0] != "sampler":
                    yield field if stage is own else join(stage.name, field), value
    yield from flat(to_json(entry.sampler), "sampler")


def flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Dotted paths and values; an object is its type, and its fields after it."""
    if not isinstance(value, dict):
        yield path, text_of(value)
    elif "function" in value:
        yield path, value["function"]
    else:
        if "type" in value:
            yield path, value["type"]
        for name, item in value.items():
            if name != "type":
                yield from flat(item, join(path, name))


def text_of(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(text_of, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def draw_sheets(
    found: Comparison, n: int, seed: int, device: torch.device, folder: Path, progress: Callable[[int, int], None]
) -> list[Sheet]:
    """A PNG in `folder` for each model and number of steps: images 0 .. n - 1 of this seed, as `sample` makes them."""
    sheets: list[Sheet] = []
    total = sum(len(entry.sheet_steps) for entry in found.entries)
    progress(0, total)
    for entry in found.entries:
        saved = open_model(entry.target.path)
        saved.model.to(device)
        labels, prompts, columns = balanced_labels(n, len(saved.class_names)), None, len(saved.class_names)
        if reads_text(saved):
            prompts, columns = prompts_for(saved, (SHOWN * n)[:n], None, device, name=entry.target.path), 3 * len(SHOWN)
        for k in entry.sheet_steps:
            images = Generated(saved, entry.sampler, k, labels, seed, prompts=prompts)(range(n))
            path = folder / f"{len(sheets):03d}.png"
            contact_sheet(images, columns_for(columns), path)
            sheets.append(Sheet(entry, k, path))
            progress(len(sheets), total)
    return sorted(sheets, key=lambda sheet: sheet.steps)


def columns_for(classes: int) -> int:
    """A class a column where that fits."""
    return classes if 1 < classes <= 2 * COLUMNS else COLUMNS


def real_sheet(found: Comparison) -> Path | None:
    """Real images from the report of the first run that has some and was measured as the first model was."""
    for entry in found.comparable or found.entries:
        if entry.target.run and entry.target.run.real.is_file():
            return entry.target.run.real
    return None
