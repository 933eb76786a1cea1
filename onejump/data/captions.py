"""The captions of a part of a `TextSet` in one file, any of which is read without the others.

A row a caption, of where its text ends and of the text's checksum; then the texts, UTF-8, one after the other.
"""

import os
import zlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from onejump.data.source import DiskError, line
from onejump.types import UserError

ROW = np.dtype([("end", "<u8"), ("crc32", "<u4")])


def write_captions(stream: BinaryIO, captions: Sequence[str]) -> str:
    """Returns the sha256 of what was written."""
    texts = [caption.encode("utf-8", "replace") for caption in captions]
    rows = np.zeros(len(texts), ROW)
    rows["end"] = np.cumsum([len(text) for text in texts], dtype=np.uint64)
    rows["crc32"] = [zlib.crc32(text) for text in texts]
    content = b"".join([rows.tobytes(), *texts])
    stream.write(content)
    return sha256(content).hexdigest()


def read_caption(file: Path, n: int, k: int) -> str:
    """Caption k of the n in a file. Raises UserError, in one line that names the file, if it is gone or damaged."""
    try:
        with open(file, "rb") as stream:
            before = ROW.itemsize if k else 0
            stream.seek(k * ROW.itemsize - before)
            rows = np.frombuffer(stream.read(ROW.itemsize + before), ROW)
            begin, end = int(rows["end"][0]) if k else 0, int(rows["end"][-1])
            if not begin <= end <= os.fstat(stream.fileno()).st_size - n * ROW.itemsize:
                raise ValueError("it is cut short")
            stream.seek(n * ROW.itemsize + begin)
            text = stream.read(end - begin)
        if zlib.crc32(text) != rows["crc32"][-1]:
            raise ValueError(f"caption {k} has changed")
        return text.decode("utf-8")
    except OSError as error:
        raise DiskError(f"{file} cannot be read ({error.strerror}): prepare the latents again") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"{file} is damaged ({line(error)}): prepare the latents again") from error
