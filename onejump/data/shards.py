"""WebDataset shards as a random-access source, by an index of where each member lies (`shard_index`)."""

import json
import os
import re
from itertools import product
from pathlib import Path

import numpy as np

from onejump.data.files import check_size
from onejump.data.shard_index import NO_LABEL, Index, cache_folder, index_of, read_at
from onejump.data.source import Bad, Source, leave_out, numbered, shown, telling
from onejump.types import UserError

MAX_SHARDS = 100_000
CAPTIONS = ("caption", "text")  # keys of a .json that hold one


def shards_of(path: Path) -> list[Path]:
    """The tars that a path means: itself, those of a folder, or a pattern: shards-{000..010}.tar, {a,b}.tar."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix == ".tar" and not file.name.startswith("."))
    if path.exists() or "{" not in str(path):
        return [path]
    return [Path(text) for text in expanded(str(path))]


def expanded(pattern: str) -> list[str]:
    """{000..010} counts, with as many digits as its first number; {a,b} is each."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(pattern, piece) if k % 2 else [piece] for k, piece in enumerate(pieces)]
    if np.prod([len(choice) for choice in choices], dtype=float) > MAX_SHARDS:
        raise UserError(f"{pattern}: more than {MAX_SHARDS:,} shards")
    return ["".join(chosen) for chosen in product(*choices)]


def refuse_glob(path: Path) -> None:
    """A shell's pattern, or a list, would hide that a file is missing; ours says which shards there must be."""
    ours = "{" in str(path)
    where, marks = (path.name, "*?[") if ours else (str(path), "*?[,")
    if os.path.exists(path) or not any(mark in where for mark in marks):
        return
    way_out = "one path is needed, such as the folder that holds the images"
    if path.suffix == ".tar":
        way_out = "of shards, give their folder, or count them in quotes: 'NAME-{000..002}.tar'"
    raise UserError(f"{path}: no such folder or file; {way_out}")


def _choices(pattern: str, piece: str) -> list[str]:
    counted = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", piece)
    if counted is None:
        return piece.split(",")
    first, last = int(counted[1]), int(counted[2])
    if not 0 <= last - first < MAX_SHARDS:
        raise UserError(f"{pattern}: {{{piece}}} has to count up, over at most {MAX_SHARDS:,} shards")
    return [str(number).zfill(len(counted[1])) for number in range(first, last + 1)]


def shard_source(path: Path, shards: list[Path], bad: Bad | None = None) -> Source:
    """Images with what lies beside them under the same key: the class in .cls or "label" of .json, the caption in
    .txt or "caption" of .json. Set order: by shard, then by key; KEY.png of NAME.tar is the image NAME/KEY.png.
    """
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(shards)} shards are missing, e.g. {missing[0]}")
    index = index_of(shards, cache_folder())
    for name, why in index.problems.items():
        leave_out(bad, name, UserError(f"{shown(name)} in {path} {why}"))
    labelled = bool((index.rows["label"] > NO_LABEL).any())
    if labelled:
        for k in np.flatnonzero(index.rows["label"] <= NO_LABEL):
            name = index.names[k]
            leave_out(bad, name, UserError(f"{shown(name)} in {path} has no label: give it a .cls, or none to any"))
    places = [k for k, name in enumerate(index.names) if bad is None or name not in bad]
    row = {index.names[k]: k for k in places}

    def read(name: str) -> bytes:
        k = row[name]
        shard, start, size, *_ = index.rows[k].item()
        check_size(size, name, path)
        return read_at(shards[shard], start, size)

    labels = tuple(index.rows["label"][places].tolist()) if labelled else None
    caption = (lambda name: _caption(index, shards, row[name])) if index.rows["text_size"].any() else None
    return Source(path, list(row), telling(read, path), labels, numbered(labels or ()), caption)


def _caption(index: Index, shards: list[Path], k: int) -> str:
    """The text beside an image, "" if there is none."""
    shard, _, _, _, start, size, in_json = index.rows[k].item()
    if not size:
        return ""
    text = read_at(shards[shard], start, size).decode("utf-8", "replace")
    if not in_json:
        return text.strip()
    content = json.loads(text)
    return str(next((content[key] for key in CAPTIONS if key in content), ""))
