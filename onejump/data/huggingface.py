"""A set that Hugging Face `datasets` saved to disk: Arrow files beside dataset_info.json."""

import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

from onejump.data.files import check_size
from onejump.data.source import Bad, Source, leave_out, line, numbered, telling
from onejump.types import UserError

PIP = "pip install 'onejump[data]'"


def is_huggingface(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def huggingface_source(path: Path, bad: Bad | None = None) -> Source:
    """The column of images and, if there is one, the first column of classes; of several splits, `train`.

    Names are row numbers, since rows have none.
    """
    folder = _split(path)
    features = _json(folder / "dataset_info.json").get("features") or {}
    image = next((name for name, kind in features.items() if _kind(kind) == "Image"), None)
    label = next((name for name, kind in features.items() if _kind(kind) == "ClassLabel"), None)
    if image is None:
        raise UserError(f"{folder}: no column of images among {', '.join(features)[:200] or 'its columns'}")
    chunks, classes = _columns(folder, image, label)
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + len(chunk))

    def read(name: str) -> bytes:
        k = bisect_right(starts, int(name)) - 1
        content = chunks[k].field("bytes")[int(name) - starts[k]].as_buffer()
        if content is None:
            told = f"image {name} of {folder} is not in the file, only its path is"
            raise UserError(f"{told}: save the set with its images")
        check_size(content.size, name, folder)
        return content.to_pybytes()

    names = [f"{k:08d}" for k in range(starts[-1])]
    if label is None or not any(value is not None and value >= 0 for value in classes):
        return Source(path, names, telling(read, folder))
    known = tuple(map(str, features[label].get("names") or numbered([max(v for v in classes if v is not None)])))
    for name, value in zip(names, classes, strict=True):
        if value is None or not 0 <= value < len(known):
            told = f"image {name} of {folder} has the label {value}; there are {len(known)} classes, from 0 on"
            leave_out(bad, name, UserError(told))
    kept = [k for k, name in enumerate(names) if bad is None or name not in bad]
    return Source(path, [names[k] for k in kept], telling(read, folder), tuple(classes[k] for k in kept), known)


def _kind(feature: Any) -> str:
    return str(feature.get("_type")) if isinstance(feature, dict) else ""


def _split(path: Path) -> Path:
    if not (path / "dataset_dict.json").is_file():
        return path
    splits = _json(path / "dataset_dict.json").get("splits") or []
    if "train" not in splits and len(splits) != 1:
        raise UserError(f"{path} has the splits {', '.join(map(str, splits))[:200]}: name the folder of one")
    return path / ("train" if "train" in splits else Path(str(splits[0])).name)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({line(error)}): download or copy the set again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not describe a set: download or copy the set again")
    return content


def _arrow_files(folder: Path) -> list[Path]:
    if (folder / "state.json").is_file():
        state = _json(folder / "state.json")
        if state.get("_indices_data_files"):
            raise UserError(f"{folder} is a selection of rows: save it after flatten_indices()")
        return [folder / Path(str(file.get("filename"))).name for file in state.get("_data_files") or []]
    found = sorted(folder.glob("*.arrow"))
    return [file for file in found if "-train" in file.name] or found


def _columns(folder: Path, image: str, label: str | None) -> tuple[list[Any], list[Any]]:
    """Arrow arrays of the images, mapped, and the labels."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{folder}: reading it needs pyarrow: {PIP}") from error
    chunks: list[Any] = []
    labels: list[Any] = []
    for file in _arrow_files(folder):
        try:
            with pyarrow.memory_map(str(file)) as stream:
                table = pyarrow.ipc.open_stream(stream).read_all()
            column = table.column(image)
            if not pyarrow.types.is_struct(column.type) or "bytes" not in [field.name for field in column.type]:
                raise ValueError(f"{image} is {column.type}, not bytes and paths of images")
            chunks += column.chunks
            labels += table.column(label).to_pylist() if label else []
        except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
            raise UserError(f"{file} cannot be read ({line(error)}): download or copy the set again") from error
    return chunks, labels
