"""Files of a folder or zip as a set: which are images, in which order, and which class each belongs to."""

import json
from collections import Counter
from collections.abc import Callable
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from onejump.data.feeder import tell
from onejump.data.source import SUFFIXES, Bad, Source, label_of, leave_out, numbered, shown, telling
from onejump.types import UserError

LABELS = "dataset.json"
EXPECTED = 'expected is {"labels": [["file.png", 0], ...]} or {"labels": null}'

Parts = tuple[str, ...]


def parts_of(name: str) -> Parts:
    """The folders and the file that a relative name goes through."""
    return tuple([part for part in name.split("/") if part not in ("", ".")])


def source_of(path: Path, files: list[str], read: Callable[[str], bytes], bad: Bad | None) -> Source:
    """Keeps images and the label file, drops hidden files, and looks through a single folder around everything."""
    split = [parts_of(file) for file in files]
    times, file_of = Counter(split), dict(zip(split, files, strict=True))
    parts = [p for p in file_of if p and (p[-1].lower().endswith(SUFFIXES) or p[-1] == LABELS)]
    parts = [p for p in parts if not any([part.startswith((".", "__MACOSX")) for part in p])]
    depth = 0
    while parts and all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts):
        depth += 1
    original = {"/".join(p[depth:]): p for p in parts}
    for name, p in list(original.items()):
        if times[p] > 1:
            why = f"{shown(name)} is in {path} {times[p]} times: leave one"
            leave_out(None if name == LABELS else bad, name, UserError(why))
            del original[name]
    images = sorted(name for name in original if name.lower().endswith(SUFFIXES))
    read_one = telling(lambda name: read(file_of[original[name]]), path)
    source = Source(path, images, read_one)
    return labelled_by_file(source, bad) if LABELS in original else labelled_by_folders(source)


def labelled_by_folders(source: Source) -> Source:
    inside = [name for name in source.names if "/" not in name]
    nested = [name for name in source.names if "/" in name]
    if inside and nested:
        raise UserError(
            f"{source.path}: {shown(inside[0])} lies directly inside and {shown(nested[0])} in a sub-folder; "
            "put every image in the sub-folder of its class, or all directly inside"
        )
    if inside:
        return source
    folders = [name.split("/")[0] for name in nested]
    class_names = tuple(sorted(set(folders)))
    number = {name: i for i, name in enumerate(class_names)}
    labels = tuple(number[folder] for folder in folders)
    return Source(source.path, source.names, source.read, labels, tuple(map(shown, class_names)))


def labelled_by_file(source: Source, bad: Bad | None) -> Source:
    """EDM's `dataset.json`: {"labels": [[file, class], ...] or null}, with "class_names" if `prepare` knew them."""
    where = f"{LABELS} of {source.path}"
    pairs, class_names = _content(source, where)
    if pairs is None:
        return source
    label_of_file: dict[str, Any] = {}
    twice: dict[str, UserError] = {}
    for file, label in pairs:
        known = label_of_file.setdefault(file, label)
        if type(known) is not type(label) or known != label:
            told = f"{shown(file)} is labelled {shown(str(known)[:40])} and {shown(str(label)[:40])}"
            twice[file] = UserError(f"{where}: {told}; leave one")
    gone = sorted(label_of_file.keys() - {*source.names, *(bad or ())})
    if gone:
        tell(f"{where}: {len(gone):,} of its labels are of images that are not there, e.g. {shown(gone[0])}")
    missing = [name for name in source.names if name not in label_of_file]
    if missing and bad is None:
        example = f"{len(missing)} of {len(source.names)} images, e.g. {shown(missing[0])}"
        raise UserError(f"{where}: no label for {example}")
    names, labels = [], []
    for name in source.names:
        try:
            if name in twice:
                raise twice[name]
            if name not in label_of_file:
                raise UserError(f"{where}: no label for {shown(name)}")
            labels.append(label_of(label_of_file[name], name, where))
            names.append(name)
        except UserError as error:
            leave_out(bad, name, error)
    enough = labels and len(class_names) > max(labels)
    return Source(source.path, names, source.read, tuple(labels), class_names if enough else numbered(labels))


def _content(source: Source, where: str) -> tuple[list[tuple[str, Any]] | None, tuple[str, ...]]:
    """The pairs of file and label, and the names of the classes, () if there are none ("class_names" is ours)."""
    try:
        content = json.loads(source.read(LABELS))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        place = f" from line {error.lineno}, column {error.colno} on" if isinstance(error, JSONDecodeError) else ""
        raise UserError(f"{where}: no JSON{place}; {EXPECTED}") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise UserError(f'{where}: it has no "labels"; {EXPECTED}')
    pairs, names = content["labels"], content.get("class_names") or []
    if not isinstance(pairs, list | None) or not isinstance(names, list):
        raise UserError(f'{where}: its "labels" or "class_names" are no list; {EXPECTED}')
    for k, pair in enumerate(pairs or ()):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{where}: label {k} is {shown(json.dumps(pair)[:40])}; {EXPECTED}")
    known = tuple(map(str, names))
    return None if pairs is None else [(str(file).replace("\\", "/"), label) for file, label in pairs], known
