"""Sets that are no folders of images: CIFAR, idx, arrays, Hugging Face; found by content, each mistake told."""

import gzip
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from image_files import encode, noise, picture, tar, write

from onejump.data.batch_pickle import read_batch
from onejump.data.load import load_images
from onejump.data.sources import open_source
from onejump.types import UserError

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_images(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    return [(random.integers(0, 256, (4, 3, 32, 32), np.uint8), random.integers(0, 10, 4)) for _ in range(5)]


def binary() -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {"batches.meta.txt": "\n".join(NAMES) + "\n\n"}
    for k, (images, labels) in enumerate(batches(), 1):
        files[f"data_batch_{k}.bin"] = b"".join(bytes([y]) + x.tobytes() for x, y in zip(images, labels, strict=True))
    return files


def python2(value: object) -> bytes:
    """What Python 2 wrote: strings of bytes, arrays by _reconstruct, protocol 2."""
    if isinstance(value, str | bytes):
        data = value.encode() if isinstance(value, str) else value
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(part) for pair in value.items() for part in pair) + b"u"
    assert isinstance(value, np.ndarray)
    shape = b"".join(b"M" + struct.pack("<H", side) for side in value.shape)
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    return made + b"(K\x01" + shape + b"\x86" + kind + b"\x89" + python2(value.tobytes()) + b"tb"


def python_files() -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {"batches.meta": b"\x80\x02" + python2({"label_names": NAMES}) + b"."}
    for k, (images, labels) in enumerate(batches(), 1):
        content = {"batch_label": "x", "labels": labels.tolist(), "data": images.reshape(4, -1), "filenames": ["a.png"]}
        files[f"data_batch_{k}"] = b"\x80\x02" + python2(content) + b"."
    return files


@pytest.mark.parametrize("files", [binary, python_files])
@pytest.mark.parametrize("form", ["folder", "around", "tar.gz"])
def test_cifar10_is_read_in_its_order_with_its_names(tmp_path, files, form):
    inside = {f"cifar-10/{name}": data for name, data in files().items()}
    path = tar(tmp_path / "c.tar.gz", inside, "w:gz") if form == "tar.gz" else write(tmp_path / "c", inside)
    found = load_images(path / "cifar-10" if form == "folder" else path)
    assert found.name == "cifar10" and found.class_names == tuple(NAMES)
    assert np.array_equal(found.images.numpy(), np.concatenate([images for images, _ in batches()]))
    assert found.labels.tolist() == np.concatenate([labels for _, labels in batches()]).tolist()


def test_a_pickle_that_would_run_something_is_refused_unrun(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    files = python_files()
    files["data_batch_3"] = pickle.dumps({"data": Evil()}, 2)
    refused(write(tmp_path / "c", files), "data_batch_3", "binary version")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("keys", [str, str.encode])
def test_a_batch_that_python_3_saved_again_is_read(protocol, keys):
    """Loaded with encoding="latin1" or "bytes"; protocol 2 writes byte strings as texts that are to be encoded."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    content = {"data": pixels, "labels": [3, 7], "filenames": [b"a.png", b"\xff.png"]}
    data = pickle.dumps({keys(name): value for name, value in content.items()}, protocol)
    assert (b"_codecs" in data) == (protocol == 2)
    found = read_batch(data, "it")
    assert np.array_equal(found["data"], pixels) and found["labels"] == [3, 7]


def test_only_a_plain_byte_string_is_encoded():
    data = pickle.dumps({"filenames": b"\xff"}, 2).replace(b"latin1", b"base64")
    with pytest.raises(UserError, match="it asks for _codecs encode of something else than a plain byte string"):
        read_batch(data, "it")


def test_cifar100_has_its_fine_classes(tmp_path):
    names = [f"class{k}" for k in range(100)]
    image = noise(0, (32, 32)).transpose(2, 0, 1).tobytes()
    files = {"train.bin": bytes([3, 77]) + image + bytes([0, 5]) + image, "fine_label_names.txt": "\n".join(names)}
    found = load_images(write(tmp_path, files))
    assert found.labels.tolist() == [77, 5] and found.class_names == tuple(names)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.pop("data_batch_3.bin"), ("data_batch_3.bin is missing",)),
        (lambda f: f.update({"data_batch_2.bin": f["data_batch_2.bin"][:-1]}), ("data_batch_2.bin", "not whole")),
        (lambda f: f.update({"data_batch_2.bin": f["data_batch_2.bin"][:-3073]}), ("data_batch_2.bin", "fewer")),
        (
            lambda f: f.update({"data_batch_5.bin": b"\x0a" + f["data_batch_5.bin"][1:]}),
            ("data_batch_5.bin", "label 10"),
        ),
    ],
)
def test_damaged_cifar_names_the_batch(tmp_path, change, words):
    files = binary()
    change(files)
    refused(write(tmp_path, files), *words)


# --------------------------------------------------------------------------------------------------------------- idx


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", side) for side in array.shape) + array.tobytes()


DIGITS = np.random.default_rng(1).integers(0, 256, (6, 5, 4), np.uint8)
CLASSES = np.array([3, 0, 1, 2, 3, 1], np.uint8)


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress])
@pytest.mark.parametrize("dash", ["-", "."])
def test_idx_images_find_their_labels(tmp_path, pack, dash):
    end = "" if pack(b"x") == b"x" else ".gz"
    train, test = f"train-images{dash}idx3-ubyte{end}", f"t10k-images{dash}idx3-ubyte{end}"
    labels = f"train-labels{dash}idx1-ubyte{end}"
    write(tmp_path, {train: pack(idx(DIGITS)), labels: pack(idx(CLASSES)), test: pack(idx(DIGITS[:2]))})
    for path in (tmp_path, tmp_path / train):
        found = load_images(path)
        assert np.array_equal(found.images[:, 0].numpy(), DIGITS) and found.labels.tolist() == CLASSES.tolist()
        assert found.class_names == ("0", "1", "2", "3")
    assert load_images(tmp_path / test).n == 2 and load_images(tmp_path / test).labels is None


def test_damaged_idx_files_are_named(tmp_path):
    write(tmp_path, {"a-images-idx3-ubyte": idx(DIGITS), "a-labels-idx1-ubyte": idx(CLASSES[:5])})
    refused(tmp_path, "5 labels for 6 images")
    write(tmp_path, {"a-labels-idx1-ubyte": idx(CLASSES)[:-1]})
    refused(tmp_path, "a-labels-idx1-ubyte", "not whole")
    write(tmp_path, {"a-images-idx3-ubyte": idx(DIGITS) + b"x"})
    refused(tmp_path, "a-images-idx3-ubyte", "not whole")
    (tmp_path / "a-images-idx3-ubyte").unlink()
    write(tmp_path, {"a-images-idx3-ubyte.gz": gzip.compress(idx(DIGITS))[:-20]})
    refused(tmp_path, "a-images-idx3-ubyte.gz")


def test_an_idx_header_cannot_ask_for_more_memory_than_there_is(tmp_path):
    huge = bytes([0, 0, 8, 3]) + struct.pack(">III", 2**31, 2**31, 2**31)
    write(tmp_path, {"x-images-idx3-ubyte": huge + b"ab", "y-images-idx3-ubyte.gz": gzip.compress(huge + b"ab")})
    refused(tmp_path / "x-images-idx3-ubyte", "not whole")
    refused(tmp_path / "y-images-idx3-ubyte.gz", "not whole")


# ------------------------------------------------------------------------------------------------------------ arrays

IMAGES = np.random.default_rng(2).integers(0, 256, (5, 6, 7, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_takes_the_bytes_as_images_and_the_whole_numbers_as_labels(tmp_path, save):
    save(tmp_path / "samples.npz", IMAGES, np.array([1, 0, 2, 1, 0]))
    found = load_images(tmp_path / "samples.npz")
    assert found.name == "samples" and found.labels.tolist() == [1, 0, 2, 1, 0] and found.classes == 3
    assert np.array_equal(found.images.numpy(), IMAGES.transpose(0, 3, 1, 2))
    save(tmp_path / "b.npz", x=IMAGES.transpose(0, 3, 1, 2), mu=np.zeros(9), sigma=np.eye(3))
    assert load_images(tmp_path / "b.npz").fingerprint == load_images(write_npy(tmp_path / "c.npy", IMAGES)).fingerprint
    save(tmp_path / "d.npz", images=IMAGES, labels=np.empty(0, np.int64))  # samples of a model without classes
    assert load_images(tmp_path / "d.npz").labels is None


def test_the_training_half_of_an_npz_is_taken(tmp_path):
    halves = {"x_train": IMAGES[..., 0], "y_train": np.arange(5), "x_test": IMAGES[:2, ..., 0], "y_test": np.arange(2)}
    np.savez(tmp_path / "mnist.npz", **halves)
    found = load_images(tmp_path / "mnist.npz")
    assert found.shape == (1, 6, 7) and found.labels.tolist() == [0, 1, 2, 3, 4]


def write_npy(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def test_a_large_array_is_mapped_and_not_read(tmp_path):
    shape = (400_000, 64, 64, 3)  # 4.9 GB that are not on the disk
    np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.uint8, shape)
    found = load_images(tmp_path / "big.npy")
    assert found.n == 400_000 and found.shape == (3, 64, 64) and not found.images[399_999].any()


def test_labels_lie_beside_an_npy(tmp_path):
    write_npy(tmp_path / "images.npy", IMAGES)
    write_npy(tmp_path / "labels.npy", np.array([[0], [1], [1], [0], [1]]))
    assert load_images(tmp_path / "images.npy").labels.tolist() == [0, 1, 1, 0, 1]
    write_npy(tmp_path / "set.npy", IMAGES)
    write_npy(tmp_path / "set_labels.npy", np.array([0, 1, 1, 0, -2]))
    refused(tmp_path / "set.npy", "image 4", "-2")


def test_arrays_are_resized_as_images_are(tmp_path):
    write_npy(tmp_path / "a.npy", IMAGES)
    write(tmp_path / "f", {f"{k}.png": encode(picture(pixels)) for k, pixels in enumerate(IMAGES)})
    assert np.array_equal(load_images(tmp_path / "a.npy", 4).images, load_images(tmp_path / "f", 4).images)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": IMAGES.astype(np.float32)}, ("uint8", "float32 [5, 6, 7, 3]")),
        ({"x": IMAGES[..., :2]}, ("1 or 3 channels", "[5, 6, 7, 2]")),
        ({"a": IMAGES, "b": IMAGES}, ("a, b", "images")),
        ({"x": IMAGES, "y": np.array([0, 1])}, ("2 labels for 5 images",)),
        ({"x": IMAGES, "y": np.array([0, 1, 2, 3, 10**7])}, ("image 4", "10000000")),
        ({"x": np.array([object()])}, ("object",)),
    ],
)
def test_wrong_arrays_are_told(tmp_path, arrays, words):
    np.savez(tmp_path / "s.npz", **arrays)
    refused(tmp_path / "s.npz", "s.npz", *words)


# ------------------------------------------------------------------------------------------------------ Hugging Face


def hf(folder: Path, rows: list[dict], labelled: bool = True) -> Path:
    """A saved set in two Arrow files."""
    arrow = pytest.importorskip("pyarrow")
    kinds = [("image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]))]
    features: dict = {"image": {"_type": "Image"}}
    if labelled:
        kinds.append(("label", arrow.int64()))
        features["label"] = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (rows[:2], rows[2:]), strict=True):
        table = arrow.Table.from_pylist(part, schema=arrow.schema(kinds))
        with arrow.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=1)
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def hf_rows(labels: list) -> list[dict]:
    images = [encode(picture(pixels)) for pixels in IMAGES]
    return [{"image": {"bytes": x, "path": None}, "label": y} for x, y in zip(images, labels, strict=True)]


def test_a_saved_hugging_face_set_is_read_in_the_order_of_its_rows(tmp_path):
    hf(tmp_path / "set" / "train", hf_rows([1, 0, 0, 1, 1]))
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    found = load_images(tmp_path / "set")
    assert np.array_equal(found.images.numpy(), IMAGES.transpose(0, 3, 1, 2))
    assert found.labels.tolist() == [1, 0, 0, 1, 1] and found.class_names == ("cat", "dog")


def test_bad_rows_of_a_hugging_face_set_are_named(tmp_path):
    path = hf(tmp_path / "a", hf_rows([1, 0, None, 1, 7]))
    refused(path, "image 00000002", "label None")
    with pytest.warns(UserWarning, match="2 left out"):
        assert load_images(path, skip_bad=True).labels.tolist() == [1, 0, 1]
    rows = hf_rows([1, 0, 0, 1, 1])
    rows[1]["image"] = {"bytes": None, "path": "/etc/hostname"}
    refused(hf(tmp_path / "b", rows), "image 00000001", "only its path")
    (tmp_path / "b" / "data-00001-of-00002.arrow").write_bytes(b"ARROW1 no")
    refused(tmp_path / "b", "data-00001-of-00002.arrow")


def test_without_pyarrow_the_way_out_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "dataset_info.json").write_text('{"features": {"image": {"_type": "Image"}}}')
    with pytest.raises(UserError, match=r"pip install 'onejump\[data\]'"):
        open_source(tmp_path)
