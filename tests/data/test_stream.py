"""A streamed set gives the tensors of the same images in memory, whatever the threads and the order of steps."""

import io
import threading
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from onejump.data import open as opening
from onejump.data.decode import Decoding
from onejump.data.feeder import DiskError
from onejump.data.image_set import ImageSet, epoch_order
from onejump.data.load import load_set
from onejump.data.open import bytes_of, free_memory, open_training_set
from onejump.data.sources import open_source
from onejump.data.stream import StreamedSet, streamed
from onejump.types import UserError

HOW = Decoding()


def png(colour: tuple[int, ...], size: int = 6) -> bytes:
    rng, stream = np.random.default_rng(sum(colour)), io.BytesIO()
    pixels = rng.integers(0, 256, (size, size, 3) if len(colour) == 3 else (size, size), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """23 images in two classes."""
    for k in range(23):
        path = tmp_path / "set" / ("cat" if k % 3 else "dog") / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((k, 1, 1)))
    return tmp_path / "set"


@pytest.fixture
def made(tmp_path):
    """Opens a folder as a stream, with the survey kept beside it."""
    return lambda path, how=HOW, bad=None, **options: streamed(
        open_source(path), how, bad, cache=tmp_path / "cache", **options
    )


def same(a, b) -> bool:
    return torch.equal(a[0], b[0]) and (a[1] is b[1] is None or torch.equal(a[1], b[1]))


def test_a_stream_is_the_set_in_memory_bit_for_bit(folder, made):
    memory, stream = load_set(folder, HOW), made(folder)
    assert isinstance(stream, StreamedSet)
    for name in ("name", "n", "shape", "classes", "class_names", "fingerprint"):
        assert getattr(stream, name) == getattr(memory, name), name
    memory, stream = replace(memory, flip=True), replace(stream, flip=True)
    for step in range(12):  # three epochs, the batches across their ends
        assert same(memory.batch(step, 7, 3), stream.batch(step, 7, 3))
    assert same(memory.batch(2, 4, 3, rank=1, world=2), stream.batch(2, 4, 3, rank=1, world=2))
    assert same(memory.batch(0, 60, 3), stream.batch(0, 60, 3))
    for ours, theirs in zip(stream.chunks(9), memory.chunks(9), strict=True):
        assert same(ours, theirs)
    index = torch.tensor([22, 0, 5, 5])
    assert torch.equal(stream.pick(index), memory.pick(index))
    plain = stream.unlabelled()
    assert plain.classes == 0 and plain.batch(1, 5, 0)[1] is None
    assert torch.equal(plain.batch(1, 5, 0)[0], memory.unlabelled().batch(1, 5, 0)[0])


@pytest.mark.parametrize(("workers", "ahead"), [(1, 0), (1, 3), (3, 1), (8, 5)])
def test_threads_and_prefetch_change_nothing_nor_does_the_order_of_asking(folder, made, workers, ahead):
    memory, stream = load_set(folder, HOW), made(folder, workers=workers)
    stream = replace(stream, feeder=replace(stream.feeder, ahead=ahead))
    for step in (0, 1, 2, 9, 4, 5, 4, 4, 1000, 1001, 3):
        assert same(memory.batch(step, 5, 0), stream.batch(step, 5, 0))
        assert len(stream.feeder._under_way) == ahead  # batches held, no more


def test_what_follows_is_decoded_before_it_is_asked_for(folder, made):
    stream = made(folder)
    stream.batch(0, 5, 0)
    for batch in stream.feeder._under_way.values():
        batch.result()
    stream = replace(stream, feeder=replace(stream.feeder, ahead=0))
    seen, make = [], stream.feeder.make
    stream = replace(stream, feeder=replace(stream.feeder, ahead=1, make=lambda ks: seen.extend(ks) or make(ks)))
    stream.batch(0, 5, 0)
    stream.feeder._under_way[next(iter(stream.feeder._under_way))].result()
    order = epoch_order(23, 0, 0)[0]
    assert sorted(seen) == sorted(order[:10].tolist())


def test_a_set_is_read_once_and_again_when_a_file_changes(folder, made, capsys):
    first = made(folder).fingerprint
    assert "23 images are read once" in capsys.readouterr().err
    assert made(folder).fingerprint == first
    assert made(folder, Decoding(size=4)).shape == (3, 4, 4)
    assert capsys.readouterr().err.count("read once") == 1
    (folder / "dog" / "00.png").write_bytes(png((100, 1, 1)) + b"longer")
    assert made(folder).fingerprint == load_set(folder, HOW).fingerprint != first
    (next((folder.parent / "cache").iterdir())).write_text("no json")
    assert made(folder).n == made(folder, Decoding(size=4)).n == 23


def test_a_survey_that_cannot_be_kept_costs_nothing_else(folder):
    (folder.parent / "file").write_text("")
    assert streamed(open_source(folder), HOW, cache=folder.parent / "file" / "cache").n == 23


def test_grey_and_coloured_images_are_told_apart_as_in_memory(tmp_path, made):
    files = {"a.png": png((1,)), "b.png": png((2,)), "c.png": png((3,))}
    for more in ({}, {"d.png": png((4, 4, 4))}):
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for name, data in (files | more).items():
                archive.writestr(name, data)
        memory, stream = load_set(tmp_path / "set.zip", HOW), made(tmp_path / "set.zip")
        assert stream.shape == memory.shape == (3 if more else 1, 6, 6)
        assert stream.fingerprint == memory.fingerprint and stream.name == memory.name == "set"
        assert same(memory.batch(1, 2, 0), stream.batch(1, 2, 0))


# ---------------------------------------------------------------------------------------------------------- bad files


def test_what_is_bad_from_the_start_is_left_out_as_in_memory(folder, made, capsys):
    (folder / "cat" / "01.png").write_bytes(b"broken")
    (folder / "cat" / "05.png").write_bytes(png((5, 5, 5), size=9))
    with pytest.raises(UserError, match="cat/01.png in .* cannot be read"):
        made(folder)
    found, known = {}, {}
    stream, memory = made(folder, bad=found), load_set(folder, HOW, known)
    assert list(found) == list(known) == ["cat/01.png", "cat/05.png"] and stream.n == memory.n == 21
    assert stream.fingerprint == memory.fingerprint
    assert all(same(memory.batch(step, 8, 1), stream.batch(step, 8, 1)) for step in range(6))
    again = {}
    assert made(folder, bad=again).n == 21 and again == found  # from the kept survey


def test_a_file_damaged_while_training_has_its_place_taken_by_the_next_good_one(folder, made, capsys):
    memory = load_set(folder, HOW)
    order = epoch_order(23, 1, 1)[0].tolist()
    damaged = order[4], order[5], order[-1]
    streams = [made(folder, bad={}, workers=workers) for workers in (1, 4)]
    names = open_source(folder).names
    capsys.readouterr()
    for i in damaged:
        (folder / names[i]).write_bytes(b"broken")
    expected = [6 if place in (4, 5) else place for place in range(22)] + [0]
    for stream in streams:
        images = torch.cat([stream.batch(23 + k, 1, 1)[0] for k in range(23)])
        labels = torch.cat([stream.batch(23 + k, 1, 1)[1] for k in range(23)])
        rows = torch.tensor(order)[expected]
        assert torch.equal(images, memory.pick(rows).float() / 127.5 - 1)
        assert torch.equal(labels, memory.labels[rows])
        assert sorted(stream.feeder.bad) == sorted(damaged)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 6 and all("takes its place" in line for line in told)  # three a stream, each once
    assert same(streams[0].batch(2, 16, 1), streams[1].batch(2, 16, 1))


def test_without_skip_bad_the_step_that_needs_it_names_the_file_and_no_step_before(folder, made):
    stream, order = made(folder), epoch_order(23, 0, 0)[0]
    name = open_source(folder).names[order[7]]
    (folder / name).write_bytes(b"broken")
    stream.batch(0, 5, 0)
    with pytest.raises(UserError, match=f"{name} in .* cannot be read"):
        stream.batch(1, 5, 0)
    (folder / name).write_bytes(png((3, 3, 3), size=8))
    with pytest.raises(UserError, match=f"{name} in .* no longer the image it was"):
        stream.batch(1, 5, 0)
    assert stream.batch(2, 5, 0)[0].shape == (5, 3, 6, 6)


def test_a_disk_that_is_gone_is_no_bad_file(folder, made):
    stream = made(folder, bad={})
    folder.rename(folder.with_name("away"))
    with pytest.raises(DiskError, match=r"\.png in .*cannot be read"):
        stream.batch(0, 5, 0)
    folder.with_name("away").rename(folder)
    assert same(stream.batch(0, 5, 0), load_set(folder, HOW).batch(0, 5, 0)) and not stream.feeder.bad


def test_nothing_left_to_read_ends_with_a_line(folder, made):
    stream = made(folder, bad={})
    for name in open_source(folder).names:
        (folder / name).write_bytes(b"broken")
    with pytest.raises(UserError, match="none of 23 can be read"):
        stream.batch(0, 5, 0)


# ------------------------------------------------------------------------------------------------- where it is opened


def test_a_set_is_streamed_when_it_would_take_more_than_a_quarter_of_the_memory(folder, tmp_path, monkeypatch, capsys):
    need = bytes_of(open_source(folder), HOW)
    assert need == 23 * 3 * 6 * 6 and bytes_of(open_source(folder), Decoding(size=32)) == 23 * 3 * 32 * 32
    for free, kind in ((4 * need, ImageSet), (4 * need - 4, StreamedSet)):
        monkeypatch.setattr(opening, "free_memory", lambda free=free: free)
        found = open_training_set(folder, cache=tmp_path / "cache")
        assert isinstance(found, kind) and found.fingerprint == load_set(folder, HOW).fingerprint
    assert "decoded while training" in capsys.readouterr().err
    assert isinstance(open_training_set(folder, stream=False), ImageSet)


def test_free_memory_is_a_part_of_this_machine():
    assert 2**26 < free_memory() < 2**50


def test_threads_end_with_their_set(folder, made):
    before = threading.active_count()
    stream = made(folder)
    stream.batch(0, 5, 0)
    assert threading.active_count() > before
    stream.feeder._threads.shutdown(wait=True)
    assert threading.active_count() == before
