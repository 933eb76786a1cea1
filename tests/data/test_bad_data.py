"""Damage of any kind: refused in one line or left out by name; never a crash, a hang, or an image with another's label.

Each set holds images of one colour that tells their class: whatever can still be read must have the right one.
More cases: ONEJUMP_DAMAGED=10000 pytest tests/data/test_bad_data.py
"""

import gzip
import json
import os
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_files import encode, flat, pack, tar, write
from PIL import Image

from onejump.data import unfilter
from onejump.data.decode import Decoding
from onejump.data.describe import describe
from onejump.data.files import zip_source
from onejump.data.image_set import ImageSet
from onejump.data.load import load_images
from onejump.types import UserError

CASES = int(os.environ.get("ONEJUMP_DAMAGED", "330"))
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
KINDS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]


def images(choose: random.Random) -> list[tuple[bytes, int]]:
    """Encoded images with their classes."""
    kind = choose.choice(KINDS)
    classes = [choose.randrange(3) for _ in range(5)]
    return [(encode(Image.new("RGB", (8, 8), COLOURS[k]), kind), k) for k in classes]


def damaged(data: bytes, choose: random.Random) -> bytes:
    """Cut, flipped, overwritten, doubled, shifted, emptied, or another file altogether."""
    at, n = choose.randrange(len(data) + 1), choose.randrange(1, 40)
    junk = choose.randbytes(n)
    if choose.random() < 0.4:
        flipped = bytearray(data)
        for _ in range(choose.choice([1, 1, 2, 8])):
            if flipped:
                flipped[choose.randrange(len(flipped))] ^= 1 << choose.randrange(8)
        return bytes(flipped)
    sliced = [data[:at], data[:at] + junk + data[at + n :], data[:at] + data[at + n :], data[:at] + junk + data[at:]]
    return choose.choice([*sliced, data[:at] * 2 + data[at:], b"", junk, flat((1, 2, 3), size=(3, 9))])


def as_folder(root: Path, files: list[tuple[bytes, int]], choose: random.Random) -> Path:
    path = write(root / "set", {f"{k}/{n}.png": data for n, (data, k) in enumerate(files)})
    victim = choose.choice(sorted(path.rglob("*.png")))
    victim.write_bytes(damaged(victim.read_bytes(), choose))
    return path


def as_zip(root: Path, files: list[tuple[bytes, int]], choose: random.Random) -> Path:
    labels = json.dumps({"labels": [[f"{n}.png", k] for n, (_, k) in enumerate(files)]})
    path = pack(root / "s.zip", {f"{n}.png": data for n, (data, _) in enumerate(files)} | {"dataset.json": labels})
    return hurt(path, choose)


def as_shard(root: Path, files: list[tuple[bytes, int]], choose: random.Random) -> Path:
    members = [(f"{n}.{end}", x) for n, (data, k) in enumerate(files) for end, x in (("png", data), ("cls", str(k)))]
    return hurt(tar(root / "s.tar", members), choose)


def as_npz(root: Path, files: list[tuple[bytes, int]], choose: random.Random) -> Path:
    pixels = np.array([np.full((8, 8, 3), COLOURS[k], np.uint8) for _, k in files])
    choose.choice([np.savez, np.savez_compressed])(root / "s.npz", pixels, np.array([k for _, k in files]))
    return hurt(root / "s.npz", choose)


def as_idx(root: Path, files: list[tuple[bytes, int]], choose: random.Random) -> Path:
    grey = b"".join(bytes([80 * k]) * 64 for _, k in files)
    header = b"\0\0\x08\x03" + struct.pack(">III", len(files), 8, 8)
    labels = b"\0\0\x08\x01" + struct.pack(">I", len(files)) + bytes(k for _, k in files)
    names = ["a-images-idx3-ubyte.gz", "a-labels-idx1-ubyte.gz"]
    write(root, dict(zip(names, map(gzip.compress, (header + grey, labels)), strict=True)))
    hurt(root / choose.choice(names), choose)
    return root


def as_cifar(root: Path, files: list[tuple[bytes, int]], choose: random.Random) -> Path:
    record = b"".join(bytes([k]) + b"".join(bytes([c]) * 1024 for c in COLOURS[k]) for _, k in files)
    path = tar(root / "c.tar.gz", {f"c/data_batch_{k}.bin": record for k in range(1, 6)}, "w:gz")
    return hurt(path, choose)


def hurt(path: Path, choose: random.Random) -> Path:
    path.write_bytes(damaged(path.read_bytes(), choose))
    return path


def class_of(image: np.ndarray) -> int | None:
    """The class that an undamaged image's colour tells; None if its pixels are damaged."""
    for k, colour in enumerate(COLOURS):
        shade = colour if len(image) == 3 else [80 * k]
        if np.abs(image.reshape(len(image), -1).astype(int).T - shade).max() < 25:
            return k
    return None


def check(path: Path, skip_bad: bool) -> ImageSet | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load_images(path, skip_bad=skip_bad)
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return None
    assert found.n >= 1
    if found.labels is not None:
        for image, label in zip(found.images.numpy(), found.labels.tolist(), strict=True):
            seen = class_of(image)
            assert seen is None or found.class_names[label] == str(seen), "a label of another image"
    return found


MAKERS: list[Callable[[Path, list[tuple[bytes, int]], random.Random], Path]] = [
    *(as_folder, as_zip, as_zip, as_shard, as_shard, as_npz, as_idx, as_cifar)
]


@pytest.mark.parametrize("block", range(10))
def test_no_damage_crashes_hangs_or_mislabels(tmp_path, monkeypatch, block):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(unfilter, "DIAGONAL", block % 2 * unfilter.DIAGONAL)  # PNGs together, or each by itself
    refused = read = 0
    for case in range(block * CASES // 10, (block + 1) * CASES // 10):
        choose = random.Random(case)
        root = tmp_path / str(case)
        root.mkdir()
        path = choose.choice(MAKERS)(root, images(choose), choose)
        strict, lenient = check(path, False), check(path, True)
        if strict is not None:
            assert lenient is not None and lenient.fingerprint == strict.fingerprint
        refused, read = refused + (strict is None), read + (lenient is not None)
    assert refused and read


# ------------------------------------------------------------------------------------------ what each kind of file does


def test_skipping_keeps_the_order_of_the_others(tmp_path):
    files = {f"{k:02}.png": flat((k, 0, 0)) for k in range(12)} | {"03.png": b"", "07.png": flat(0, size=(5, 5))}
    with pytest.warns(UserWarning, match=r"2 left out: 03.png .*07.png 5x5"):
        found = load_images(write(tmp_path, files), skip_bad=True)
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]


def test_most_images_bad_is_something_else_than_a_few(tmp_path):
    files = {"a.png": flat(0), "b.png": flat(0), **{f"c{k}.png": b"bad" for k in range(3)}}
    with pytest.raises(UserError, match="more images are bad than good, 3 left out"):
        load_images(write(tmp_path, files), skip_bad=True)
    assert len(describe(tmp_path, Decoding()).bad) == 3


def test_an_entry_twice_in_a_zip_is_not_guessed_at(tmp_path):
    import zipfile

    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name, colour in (("a.png", 1), ("b.png", 2), ("b.png", 3), ("c.png", 4)):
            archive.writestr(name, flat((colour, 0, 0)))
    with pytest.raises(UserError, match="b.png is in .* 2 times"):
        load_images(tmp_path / "s.zip")
    with pytest.warns(UserWarning, match="1 left out"):
        assert load_images(tmp_path / "s.zip", skip_bad=True).images[:, 0, 0, 0].tolist() == [1, 4]


def test_a_label_given_twice_is_not_guessed_at(tmp_path):
    labels = {"labels": [["a.png", 0], ["b.png", 1], ["b.png", 2], ["c.png", 1], ["c.png", 1], ["d.png", 0.0]]}
    files = {f"{name}.png": flat(0) for name in "abcde"} | {"dataset.json": json.dumps(labels)}
    with pytest.raises(UserError, match="no label for 1 of 5 images, e.g. e.png"):
        load_images(write(tmp_path, files))
    with pytest.raises(UserError, match="more images are bad than good"):
        load_images(tmp_path, skip_bad=True)
    found = describe(tmp_path, Decoding())
    assert [why.split(": ", 1)[1].split(" is ")[0] for why in found.bad.values()] == [
        *("b.png", "the label of d.png", "no label for e.png")
    ]


def test_links_and_pipes_are_told(tmp_path):
    write(tmp_path, {"set/a.png": flat(0), "set/b.png": flat(0), "else.png": flat((9, 9, 9))})
    (tmp_path / "set/c.png").symlink_to(tmp_path / "else.png")
    assert load_images(tmp_path / "set").n == 3
    (tmp_path / "set/d.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match="d.png in .* cannot be read .*No such file"):
        load_images(tmp_path / "set")
    (tmp_path / "set/d.png").unlink()
    os.mkfifo(tmp_path / "set/d.png")
    with pytest.raises(UserError, match="d.png in .* is no plain file"):
        load_images(tmp_path / "set")


def test_names_that_cannot_be_printed_are_escaped(tmp_path):
    write(tmp_path, {"a.png": flat(0), "b.png": flat(0)})
    with open(os.fsencode(tmp_path) + b"/c\xff\n.png", "wb") as file:
        file.write(b"bad")
    with pytest.raises(UserError) as caught:
        load_images(tmp_path)
    assert str(caught.value).isprintable() and "c?" in str(caught.value)


def test_a_stored_entry_is_checked_as_it_is_read(tmp_path):
    path = pack(tmp_path / "s.zip", {"a.png": flat(0), "b.png": flat((1, 2, 3))})
    source = zip_source(path)
    assert source.read("b.png") == flat((1, 2, 3))
    data = path.read_bytes()
    path.write_bytes(data.replace(flat((1, 2, 3))[-30:], flat((1, 2, 3))[-30:-1] + b"?"))
    with pytest.raises(UserError, match="b.png in .* checksum"):
        source.read("b.png")
    path.write_bytes(data[:60])  # cut while training
    with pytest.raises(UserError, match="b.png in "):
        source.read("b.png")
