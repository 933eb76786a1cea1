"""The prepared zip: published layout, same bytes however it was made, whole or not there; and what `show` says."""

import io
import json
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from image_files import encode, flat, noise, pack, picture, write
from PIL import Image

from onejump.data import prepare as module
from onejump.data.decode import Decoding
from onejump.data.describe import describe
from onejump.data.load import load_images
from onejump.data.prepare import prepare
from onejump.types import UserError

BOTH = Decoding(size=8, crop="dhariwal")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART", 4)


def some(root: Path, n: int = 11) -> Path:
    """n images of several sizes in two classes."""
    files = {}
    for k in range(n):
        files[f"{'cat' if k % 3 else 'dog'}/{k:02}.png"] = encode(picture(noise(k, (16 + k, 20))))
    return write(root, files)


def test_the_layout_is_the_published_one(tmp_path):
    made = prepare(some(tmp_path / "set"), tmp_path / "out.zip", BOTH)
    assert (made.n, made.extent, made.classes, made.bad) == (11, "8x8", 2, {})
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        *names, last = archive.namelist()
        assert names == [f"00000/img{k:08d}.png" for k in range(11)] and last == "dataset.json"
        content = json.loads(archive.read(last))
        assert content == {"labels": [[n, int(k >= 7)] for k, n in enumerate(names)], "class_names": ["cat", "dog"]}
        image = Image.open(io.BytesIO(archive.read(names[0])))
        assert image.mode == "RGB" and image.size == (8, 8)
    assert not list(tmp_path.glob("*.part*"))


def test_it_holds_what_reading_the_original_gives(tmp_path):
    prepare(some(tmp_path / "set"), tmp_path / "out.zip", BOTH)
    original, prepared = load_images(tmp_path / "set", 8, "dhariwal"), load_images(tmp_path / "out.zip")
    assert prepared.fingerprint == original.fingerprint and prepared.class_names == ("cat", "dog")


def test_the_bytes_do_not_depend_on_workers_or_interruptions(tmp_path):
    source = some(tmp_path / "set")
    for workers in (1, 3):
        prepare(source, tmp_path / f"{workers}.zip", BOTH, workers=workers)

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "cut.zip", BOTH, progress=stop)
    assert not (tmp_path / "cut.zip").exists()
    seen = []
    made = prepare(source, tmp_path / "cut.zip", BOTH, progress=lambda done, total: seen.append(done))
    assert made.kept_parts == 2 and seen == [8, 11]
    first, *others = ((tmp_path / f"{name}.zip").read_bytes() for name in ("1", "3", "cut"))
    assert all(other == first for other in others)


def test_parts_of_another_job_are_not_used(tmp_path):
    source = some(tmp_path / "set")

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out.zip", Decoding(size=8), progress=stop)
    assert prepare(source, tmp_path / "out.zip", BOTH).kept_parts == 0
    assert load_images(tmp_path / "out.zip").fingerprint == load_images(source, 8, "dhariwal").fingerprint


def test_parts_of_images_that_changed_since_are_not_used(tmp_path):
    source = some(tmp_path / "set")

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out.zip", BOTH, progress=stop)
    write(source, {"cat/01.png": encode(picture(noise(99, (18, 20))))})
    assert prepare(source, tmp_path / "out.zip", BOTH).kept_parts == 0
    assert load_images(tmp_path / "out.zip").fingerprint == load_images(source, 8, "dhariwal").fingerprint


def test_grey_among_colours_becomes_colour_and_all_grey_stays_grey(tmp_path):
    grey = {f"{k}.png": encode(picture(noise(k, channels=1))) for k in range(9)}
    prepare(write(tmp_path / "grey", grey), tmp_path / "grey.zip", Decoding())
    assert load_images(tmp_path / "grey.zip").shape == (1, 8, 8)
    write(tmp_path / "grey", {"8.png": encode(picture(noise(8)))})
    prepare(tmp_path / "grey", tmp_path / "mixed.zip", Decoding())
    mixed = load_images(tmp_path / "mixed.zip")
    assert mixed.shape == (3, 8, 8) and mixed.fingerprint == load_images(tmp_path / "grey").fingerprint


def test_bad_files_are_left_out_and_the_others_numbered_through(tmp_path):
    source = some(tmp_path / "set")
    write(source, {"cat/00.png": "bad", "dog/zz.png": encode(picture(noise(1)))[:-60]})
    with pytest.raises(UserError, match="cat/00.png in "):
        prepare(source, tmp_path / "out.zip", BOTH)
    made = prepare(source, tmp_path / "out.zip", BOTH, skip_bad=True)
    assert list(made.bad) == ["cat/00.png", "dog/zz.png"] and made.n == 11
    prepared = load_images(tmp_path / "out.zip")
    assert prepared.fingerprint == load_images(some(tmp_path / "good"), 8, "dhariwal").fingerprint


def test_several_sizes_need_one(tmp_path):
    with pytest.raises(UserError, match="cat/02.png has 18x20 pixels, the first image 17x20.*--size"):
        prepare(some(tmp_path / "set"), tmp_path / "out.zip", Decoding())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out.zip").write_text("mine")
    with pytest.raises(UserError, match="out.zip is there already"):
        prepare(some(tmp_path / "set"), tmp_path / "out.zip", BOTH)
    (tmp_path / "new.zip.parts").mkdir()
    (tmp_path / "new.zip.parts" / "mine").write_text("")
    with pytest.raises(UserError, match="in the way"):
        prepare(tmp_path / "set", tmp_path / "new.zip", BOTH)


def test_arrays_can_be_prepared(tmp_path):
    images, labels = np.stack([noise(k) for k in range(6)]), np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "a.npz", images, labels)
    prepare(tmp_path / "a.npz", tmp_path / "a.zip", Decoding())
    assert load_images(tmp_path / "a.zip").fingerprint == load_images(tmp_path / "a.npz").fingerprint


# ------------------------------------------------------------------------------------------------------------- show


@pytest.mark.parametrize("kind", ["all good", "one bad", "some grey", "both"])
def test_the_description_has_the_numbers_of_the_set_in_memory(tmp_path, kind):
    files = {f"{'ab'[k % 2]}/{k}.png": encode(picture(noise(k))) for k in range(7)}
    if kind in ("one bad", "both"):
        files["a/2.png"] = b"bad"
    if kind in ("some grey", "both"):
        files["a/0.png"] = encode(picture(noise(0, channels=1)))
    found = describe(pack(tmp_path / "s.zip", files), Decoding())
    with pytest.warns(UserWarning) if "a/2.png" in found.bad else nullcontext():
        images = load_images(tmp_path / "s.zip", skip_bad=True)
    pixels = images.images.double() / 255
    assert found.fingerprint == images.fingerprint and found.n == images.n
    assert found.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert found.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    assert found.classes == [(name, int((images.labels == k).sum())) for k, name in enumerate("ab")]


def test_sizes_are_counted_and_pictured(tmp_path):
    files = {"a.png": flat(9, "L"), "b.png": flat((1, 2, 3)), "c.png": flat((1, 2, 3), size=(9, 6)), "d.png": b"bad"}
    found = describe(write(tmp_path, files), Decoding(), sheet=4)
    assert found.sizes == [("4x4", 2), ("9x6", 1)] and found.grey == 1 and found.fingerprint is None
    assert list(found.bad) == ["d.png"] and len(found.sheet) == 3
    assert describe(tmp_path, Decoding(size=4)).sizes == [("4x4", 3)]
