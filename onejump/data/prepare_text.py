"""Images with captions, from shards or folders, to the latents and captions of a `TextSet`; resumes, part by part."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from onejump.data.captions import write_captions
from onejump.data.decode import Decoding
from onejump.data.load import as_source, check_any, check_enough, decoded
from onejump.data.source import Bad, Source, leave_out, line, shown
from onejump.data.text_parts import (
    AT_ONCE,
    Autoencoder,
    autoencoder,
    check_folder,
    part_sha256,
    read_config,
    text_sha256,
)
from onejump.data.text_set import ABOUT, FORMAT, part_file
from onejump.types import UserError

PART = 512  # images of a part

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PreparedText:
    """What was written. kept_parts: found finished from an earlier run."""

    n: int
    shape: tuple[int, int, int]
    bad: Bad
    kept_parts: int


def prepare_text(
    path: str | Path,
    out: Path,
    folder: Path,
    how: Decoding,
    skip_bad: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
) -> PreparedText:
    """Encodes every captioned image once, with the autoencoder of a Stable Diffusion folder.

    A part is written whole or not at all, and kept: the same call again goes on from there. A folder that is finished
    is told again where its Stable Diffusion lies, if that has the same autoencoder and text encoder. how.size: None is
    what the folder's network was trained on. Raises UserError for images that are bad or have no caption (with
    `skip_bad` they are left out), and if `out` is there already with something else.
    """
    folder = folder.expanduser().absolute()
    check_folder(folder)
    bad: Bad | None = {} if skip_bad else None
    source = captioned(as_source(path, bad), bad)
    check_any(source)
    vae = autoencoder(folder, torch.device(device))
    side = how.size or int(read_config(folder / "unet" / "config.json")["sample_size"]) * vae.factor
    if side % vae.factor:
        raise UserError(f"--size {side}: a multiple of {vae.factor} is needed, by which the autoencoder divides it")
    how = replace(how, size=side, grey=False)
    models = {"vae": part_sha256(folder, "vae"), "text": text_sha256(folder)}
    begin(out, source, how, skip_bad, models)
    parts = [range(i, min(i + PART, len(source.names))) for i in range(0, len(source.names), PART)]
    kept = sum(_part(out, k).exists() for k in range(len(parts)))
    for k, places in enumerate(parts):
        progress(places.start, len(source.names))
        if not _part(out, k).exists():
            encode_part(out, k, replace(source, names=[source.names[i] for i in places]), how, skip_bad, vae)
    progress(len(source.names), len(source.names))
    return finish(out, len(parts), source, folder, vae, models, bad, kept)


def captioned(source: Source, bad: Bad | None) -> Source:
    """The images that have a caption. Raises UserError if none has, or for the first without (noted with `bad`)."""
    read = source.caption
    if read is None:
        way_out = 'give each a .txt beside it, or a .json with "caption" (WebDataset, as COYO\'s)'
        raise UserError(f"{source.path}: these images have no captions; {way_out}")
    names = []
    for name in source.names:
        try:
            text = read(name).strip()
        except (UserError, ValueError, OSError) as error:
            text, why = "", f"cannot be read ({line(error)})"
        else:
            why = "is missing"
        if text:
            names.append(name)
        else:
            told = f"the caption of {shown(name)} in {source.path} {why}: give it one, or leave such images out"
            leave_out(bad, name, UserError(f"{told} with --skip-bad"))
    return replace(source, names=names, labels=None, class_names=())


def begin(out: Path, source: Source, how: Decoding, skip_bad: bool, models: dict[str, str]) -> None:
    """Makes the folder; parts in it of another job, from other images or models, are refused."""
    whole = [FORMAT, PART, asdict(how), skip_bad, models, str(source.path.absolute())]
    digest, note = sha256(json.dumps(whole).encode()), out / "job"
    for name in source.names:
        digest.update(json.dumps(name).encode())
    job = digest.hexdigest()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file; name a folder that is new or empty")
    if out.is_dir() and any(out.iterdir()) and not (note.is_file() and note.read_text() == job):
        raise UserError(f"{out}: holds something else than these images' latents; name a folder that is new or empty")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(job)


def encode_part(out: Path, k: int, source: Source, how: Decoding, skip_bad: bool, vae: Autoencoder) -> None:
    """Decodes, encodes and writes one part."""
    bad: Bad | None = {} if skip_bad else None
    assert source.caption is not None
    made, names = [], []
    for images, places in batches(decoded(source, how, bad), AT_ONCE):
        made.append(vae.encode(images).numpy())
        names += [source.names[place] for place in places]
    latents = np.concatenate(made).astype(np.float16) if made else np.zeros((0,), np.float16)
    if not np.isfinite(latents).all():
        raise UserError(f"{source.path}: the autoencoder gave numbers that are not finite; use another one")
    put(part_file(out, k, ".npy"), lambda stream: np.save(stream, latents))
    captions = [source.caption(name).strip() for name in names]
    sums = {
        "sha256": sha256(np.ascontiguousarray(latents).data).hexdigest(),
        "captions_sha256": put(part_file(out, k, ".captions"), lambda stream: write_captions(stream, captions)),
    }
    about = {"names": [shown(name) for name in names], "bad": bad or {}, "shape": list(latents.shape[1:])}
    write_json(_part(out, k), about | sums)


def batches(found: Iterator[tuple[int, Any]], size: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Images of one size, uint8 [b, 3, h, w], with their places; `size` at once."""
    while some := list(islice(found, size)):
        yield torch.from_numpy(np.stack([pixels for _, pixels in some])), [place for place, _ in some]


def finish(
    out: Path,
    parts: int,
    source: Source,
    folder: Path,
    vae: Autoencoder,
    models: dict[str, str],
    bad: Bad | None,
    kept: int,
) -> PreparedText:
    """text.json, of what the parts hold, one of which is in memory at once."""
    starts, left_out, digest = [0], dict(bad or {}), sha256()
    shape: tuple[int, ...] = ()
    for k in range(parts):
        part = read_part(_part(out, k))
        starts.append(starts[-1] + len(part["names"]))
        shape = shape or tuple(part["shape"])
        left_out |= part["bad"]
        digest.update(json.dumps([part["sha256"], part["captions_sha256"]]).encode())
    check_enough(source, starts[-1], left_out)
    digest.update(json.dumps([vae.scaling, models["text"], *shape]).encode())
    about = {"format": FORMAT, "starts": starts, "shape": list(shape), "scaling": vae.scaling}
    about |= {"stable_diffusion": str(folder), "vae_sha256": models["vae"], "text_sha256": models["text"]}
    write_json(out / ABOUT, about | {"fingerprint": digest.hexdigest()})
    c, h, w = shape
    return PreparedText(starts[-1], (c // 2, h, w), left_out, kept)


def read_part(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({line(error)}): remove it, and give the same command again") from error


def _part(out: Path, k: int) -> Path:
    """There once the others of the part are."""
    return part_file(out, k, ".json")


def put(file: Path, write: Callable[[BinaryIO], Any]) -> Any:
    """The file, whole or not at all; returns what `write` does."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with open(draft, "wb") as stream:
        found = write(stream)
    os.replace(draft, file)
    return found


def write_json(file: Path, content: dict[str, Any]) -> None:
    put(file, lambda stream: stream.write(json.dumps(content).encode()))
