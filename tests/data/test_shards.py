"""WebDataset shards: order, labels and captions by key, any member at any time, and an index that is made once."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_files import encode, flat, noise, picture, tar

from onejump.data import shard_index
from onejump.data.load import load_images
from onejump.data.open import open_training_set
from onejump.data.shards import expanded
from onejump.data.sources import open_source
from onejump.types import UserError

PIXELS = [noise(seed) for seed in range(5)]
PNGS = [encode(picture(pixels)) for pixels in PIXELS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onejump" / "shards"


@pytest.fixture
def two(tmp_path) -> Path:
    """A folder of two shards, members not in the order of their keys."""
    tar(
        tmp_path / "set/000.tar",
        {"b.png": PNGS[1], "b.cls": "2", "a.cls": "0\n", "a.png": PNGS[0], "a.txt": " a cat\n"},
    )
    more = {"x/c.json": '{"label": 1, "caption": "a dog"}', "x/c.png": PNGS[2], "x/d.PNG": PNGS[3], "x/d.cls": "1"}
    tar(tmp_path / "set/001.tar", {**more, "._x.png": "junk", "readme.md": "hello"})
    return tmp_path / "set"


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_images(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_the_order_is_by_shard_and_key_and_labels_go_with_their_images(two):
    found = load_images(two)
    assert found.labels.tolist() == [0, 2, 1, 1] and found.class_names == ("0", "1", "2")
    assert np.array_equal(found.images.numpy(), np.stack(PIXELS[:4]).transpose(0, 3, 1, 2))
    assert load_images(two.parent / "set" / "{000..001}.tar").fingerprint == found.fingerprint
    assert load_images(two / "001.tar").labels.tolist() == [1, 1]


def test_captions_are_beside_their_images(two):
    source = open_source(two)
    assert source.names == ["000/a.png", "000/b.png", "001/x/c.png", "001/x/d.png"]
    assert [source.caption(name) for name in source.names] == ["a cat", "", "a dog", ""]


def test_any_image_can_be_read_in_any_order(two):
    source = open_source(two)
    for k in (3, 0, 2, 1, 0):
        assert source.read(source.names[k]) == PNGS[k]


def test_the_index_is_made_once_and_again_when_a_shard_changes(two, cache, monkeypatch):
    first = open_source(two)
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("the headers are read again"))
    again = open_source(two)
    assert again.names == first.names and again.labels == first.labels and again.caption(again.names[0]) == "a cat"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    tar(two / "001.tar", {"c.png": PNGS[2], "c.cls": "5"})
    assert open_source(two).labels == (0, 2, 5)


def test_a_damaged_or_unwritable_index_costs_nothing_but_time(two, cache):
    names = open_source(two).names
    (kept,) = cache.glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:-40])
    assert open_source(two).names == names
    kept.unlink()
    cache.rmdir()
    cache.write_text("in the way")
    assert open_source(two).names == names


def test_patterns_count_with_their_digits_and_list():
    assert expanded("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expanded("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]
    for pattern in ("{5..1}.tar", "{0..999999999}.tar", "{0..9999}{0..9999}.tar"):
        with pytest.raises(UserError):
            expanded(pattern)


def test_a_missing_shard_is_named(two):
    refused(two / "{000..002}.tar", "1 of 3", "002.tar")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.png", PNGS[0]), ("a.cls", "1"), ("b.png", PNGS[1])], ("s/b.png", "no label")),
        ([("a.png", PNGS[0]), ("a.cls", "one"), ("b.png", PNGS[1]), ("b.cls", "1")], ("s/a.png", "damaged .cls")),
        ([("a.png", PNGS[0]), ("a.cls", "-1"), ("b.png", PNGS[1]), ("b.cls", "1")], ("s/a.png", "-1")),
        ([("a.png", PNGS[0]), ("a.json", "{"), ("b.png", PNGS[1])], ("s/a.png", "damaged .json")),
        ([("a.png", PNGS[0]), ("a.json", '{"label": true}'), ("b.png", PNGS[1])], ("s/a.png", "True")),
        ([("a.png", PNGS[0]), ("a.png", PNGS[2]), ("b.png", PNGS[1])], ("s/a.png", "not the only one")),
        ([("a.png", PNGS[0]), ("a.cls", "1"), ("a.cls", "0"), ("b.png", PNGS[1]), ("b.cls", "1")], ("s/a.png", ".cls")),
        ([("../a.png", PNGS[0]), ("b.png", PNGS[1])], ("../a.png", "outside")),
        ([("a.txt", "x")], ("no images",)),
    ],
)
def test_what_is_wrong_with_a_sample_is_told(tmp_path, members, words):
    refused(tar(tmp_path / "s.tar", members), *words)


def test_bad_samples_are_left_out_and_the_others_keep_their_labels(tmp_path):
    files = [(f"{k}.png", PNGS[k]) for k in range(4)] + [("0.cls", "3"), ("1.cls", "x"), ("2.cls", "1")]
    path = tar(tmp_path / "s.tar", [*files, ("4.png", b"no image"), ("4.cls", "2"), ("5.png", PNGS[4]), ("5.cls", "0")])
    with pytest.warns(UserWarning, match="3 left out.*1.png.*3.png.*4.png"):
        found = load_images(path, skip_bad=True)
    assert found.labels.tolist() == [3, 1, 0]
    assert np.array_equal(found.images[1].permute(1, 2, 0).numpy(), PIXELS[2])


@pytest.mark.parametrize("damage", ["header", "cut", "boundary", "empty header", "no tar", "gzip"])
def test_a_damaged_shard_is_named_and_what_comes_before_can_be_kept(tmp_path, damage):
    files = {f"{k}.png": PNGS[k] for k in range(5)}
    path = tar(tmp_path / "s.tar", files)
    data = bytearray(path.read_bytes())
    third = sum(512 + -(-len(png) // 512) * 512 for png in PNGS[:3])
    if damage == "header":
        data[third + 150] ^= 1  # its checksum
    elif damage == "cut":
        del data[third + 600 :]
    elif damage == "boundary":
        del data[third:]  # where a member begins: all before it is whole
    elif damage == "empty header":
        data[third : third + 512] = bytes(512)  # as the end looks
    elif damage == "no tar":
        data = bytearray(os.urandom(2000))
    else:
        data = bytearray(tar(tmp_path / "z.tar", files, "w:gz").read_bytes())
    path.write_bytes(data)
    refused(path, "s.tar in ", "cut off" if damage == "boundary" else "damaged")
    if damage not in ("no tar", "gzip"):
        with pytest.warns(UserWarning, match="left out"):
            found = load_images(path, skip_bad=True)
        assert np.array_equal(found.images.numpy(), np.stack(PIXELS[:3]).transpose(0, 3, 1, 2))


def test_a_tar_may_end_with_one_empty_block_and_with_none_it_may_lack_images(tmp_path):
    path = tar(tmp_path / "s.tar", {f"{k}.png": PNGS[k] for k in range(2)})
    end = sum(512 + -(-len(png) // 512) * 512 for png in PNGS[:2])
    os.truncate(path, end + 512)
    assert len(open_source(path).names) == 2
    os.truncate(path, end)
    refused(path, "s.tar in ", f"cut off at byte {end:,}")


def test_a_shells_pattern_is_answered_with_ours(two):
    with pytest.raises(UserError, match=r"\*.tar: no such folder or file.*\{000\.\.002\}"):
        open_training_set(two / "*.tar")


def test_a_member_with_a_long_name_is_found(tmp_path):
    name = "deep/" * 30 + "x" * 120
    found = open_source(
        tar(tmp_path / "s.tar", {f"{name}.png": PNGS[0], f"{name}.cls": "1", "z.png": PNGS[1], "z.cls": "0"})
    )
    assert found.names == [f"s/{name}.png", "s/z.png"] and found.read(found.names[0]) == PNGS[0]


def test_a_text_too_large_to_be_a_label_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "MAX_TEXT", 100)
    refused(tar(tmp_path / "s.tar", {"a.png": flat(0), "a.txt": "x" * 101, "b.png": flat(0)}), "s/a.png", ".txt")
