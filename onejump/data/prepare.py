"""A set of images as a zip in EDM's layout: decoded, cropped and resized once, for this and the published tools."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from onejump.data.decode import Decoding
from onejump.data.latent_files import is_latents
from onejump.data.load import Pixels, as_source, check_any, check_enough, decoded, extent
from onejump.data.png import read_png, write_png
from onejump.data.source import Bad, Source, leave_out, numbered, shown
from onejump.types import UserError

PART = 500  # images of a part; finished parts are kept if the work is interrupted
VERSION = 2  # of what parts hold

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """What is known of a finished part: places of its images in the source, which are grey, what was left out."""

    extent: str = ""  # of the set's images, the first one's
    places: list[int] = field(default_factory=list)
    grey: list[int] = field(default_factory=list)
    bad: Bad = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """What was written."""

    n: int
    extent: str
    classes: int
    bad: Bad
    kept_parts: int  # found finished from an earlier run


def prepare(
    path: str | Path,
    out: Path,
    how: Decoding,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Prepared:
    """Writes `out`, which appears only when it is whole. The bytes depend on the images, labels and `how` alone.

    00000/img00000000.png, ... in the source's order, each an uncompressed PNG, all grey or all RGB, and dataset.json.
    Finished parts lie in OUT.parts meanwhile: the same call again goes on from them. Raises UserError for bad images
    (with `skip_bad` they are left out and told of), for latents, and if `out` is there already.
    """
    if is_latents(Path(path).expanduser()):
        raise UserError(f"{path}: latents, not images: train on them as they are, there is nothing to prepare")
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or name another file")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: at least one is needed")
    bad: Bad | None = {} if skip_bad else None
    source = as_source(path, bad)
    check_any(source)
    parts = _parts_folder(out, source, how, skip_bad)
    files = [parts / f"{k:06d}.zip" for k in range(-(-len(source.names) // PART))]
    kept = [file for file in files if file.exists()]
    _decode_parts(source, files, how, skip_bad, workers, progress)
    prepared = _assemble(source, files, out, bad, len(kept))
    shutil.rmtree(parts)
    return prepared


def _parts_folder(out: Path, source: Source, how: Decoding, skip_bad: bool) -> Path:
    """Finished parts of another job (other images, labels or options, or files that changed) are thrown away."""
    parts = out.with_name(f"{out.name}.parts")
    images = [str(source.path.absolute()), source.names, source.labels, _state(source)]
    job = sha256(json.dumps([VERSION, PART, asdict(how), skip_bad, *images]).encode()).hexdigest()
    if parts.exists() and not (parts / "job").exists():
        raise UserError(f"{parts} is in the way, and not from an earlier run: move it, or name another file")
    if parts.exists() and (parts / "job").read_text() != job:
        shutil.rmtree(parts)
    parts.mkdir(parents=True, exist_ok=True)
    (parts / "job").write_text(job)
    return parts


def _state(source: Source) -> str:
    """Of sizes and times of change: of the one file of the set, or of its images where they lie in a folder."""
    path, digest = source.path, sha256()
    for file in (path / name for name in source.names) if path.is_dir() else (path,):
        with suppress(OSError):  # no file of its own: told when it is read
            found = file.stat()
            digest.update(f"{found.st_size} {found.st_mtime_ns} ".encode())
    return digest.hexdigest()


def _decode_parts(
    source: Source, files: list[Path], how: Decoding, skip_bad: bool, workers: int | None, progress: Progress
) -> None:
    """Writes the parts that are missing, decoding ahead across their borders."""
    missing = [k for k, file in enumerate(files) if not file.exists()]
    places = [place for k in missing for place in range(k * PART, min((k + 1) * PART, len(source.names)))]
    bad: Bad | None = {} if skip_bad else None
    stream = decoded(replace(source, names=[source.names[place] for place in places]), how, bad, workers)
    ahead = next(stream, None)
    first = next((read_part(file).extent for file in files if file.exists() and read_part(file).extent), "")
    done = len(source.names) - len(places)
    progress(done, len(source.names))
    for k in missing:
        end = min((k + 1) * PART, len(source.names))
        part = Part(first)
        writing = files[k].with_suffix(f".{os.getpid()}.part")
        with ZipFile(writing, "w", ZIP_STORED) as archive:
            while ahead is not None and places[ahead[0]] < end:
                place, pixels = places[ahead[0]], ahead[1]
                part = replace(part, extent=part.extent or extent(pixels))
                if extent(pixels) == part.extent:
                    _put(archive, part, place, pixels)
                else:
                    told = f"{shown(source.names[place])} has {extent(pixels)} pixels, the first image {part.extent}"
                    leave_out(bad, source.names[place], UserError(f"{source.path}: {told}; pass --size"))
                ahead = next(stream, None)
            names = set(source.names[k * PART : end])
            part = replace(part, bad={name: why for name, why in (bad or {}).items() if name in names})
            archive.writestr("part.json", json.dumps(asdict(part)))
        os.replace(writing, files[k])
        first = part.extent
        done += len(names)
        progress(done, len(source.names))


def _put(archive: ZipFile, part: Part, place: int, pixels: Pixels) -> None:
    archive.writestr(str(place), write_png(pixels.transpose(1, 2, 0)))
    part.places.append(place)
    if len(pixels) == 1:
        part.grey.append(place)


def read_part(file: Path) -> Part:
    with ZipFile(file) as archive:
        return Part(**json.loads(archive.read("part.json")))


def _assemble(source: Source, files: list[Path], out: Path, bad: Bad | None, kept: int) -> Prepared:
    """One zip of all parts, numbered anew; grey images become RGB if any image is."""
    parts = [read_part(file) for file in files]
    if bad is not None:
        for part in parts:
            bad |= part.bad
    places = [place for part in parts for place in part.places]
    check_enough(source, len(places), bad)
    colour = any(len(part.grey) < len(part.places) for part in parts)
    writing = out.with_name(f"{out.name}.{os.getpid()}.part")
    names = [f"{k // 1000:05d}/img{k:08d}.png" for k in range(len(places))]
    with ZipFile(writing, "w", ZIP_STORED) as archive:
        for name, png in zip(names, _images(files, parts, colour), strict=True):
            archive.writestr(ZipInfo(name), png)
        labels = None if source.labels is None else [[n, source.labels[p]] for n, p in zip(names, places, strict=True)]
        content: dict = {"labels": labels}
        if source.labels and source.class_names != numbered(source.labels):
            content["class_names"] = source.class_names
        archive.writestr(ZipInfo("dataset.json"), json.dumps(content))
    os.replace(writing, out)
    return Prepared(len(places), next(p.extent for p in parts if p.places), len(source.class_names), bad or {}, kept)


def _images(files: list[Path], parts: list[Part], colour: bool) -> Iterator[bytes]:
    for file, part in zip(files, parts, strict=True):
        grey = set(part.grey)
        with ZipFile(file) as archive:
            for place in part.places:
                png = archive.read(str(place))
                if colour and place in grey:
                    pixels = read_png(png, str(file))
                    assert pixels is not None
                    png = write_png(np.repeat(pixels, 3, axis=2))
                yield png
