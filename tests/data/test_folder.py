"""Folders and zips of images: what is read, in which order, with which labels, and what each mistake says."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from image_files import encode, flat, pack, write
from PIL import Image

from onejump.data import files
from onejump.data.load import load_images
from onejump.types import UserError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def colours(images) -> list[tuple[int, ...]]:
    """The colour of the top left pixel of each image."""
    return [tuple(image[:, 0, 0].tolist()) for image in images.images]


@pytest.fixture(params=["folder", "zip"])
def make(request, tmp_path):
    """Writes files as a folder or as a zip: both must read the same."""
    return lambda files: (
        write(tmp_path / "set", files) if request.param == "folder" else pack(tmp_path / "set.zip", files)
    )


@pytest.fixture
def refused(tmp_path):
    """The one line that refuses a path."""

    def line(path: Path, size: int | None = None) -> str:
        with pytest.raises(UserError) as caught:
            load_images(path, size)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return line


# ------------------------------------------------------------------------------------------------- order and labels


def test_images_directly_inside_are_unlabelled_and_sorted_by_name(make):
    images = load_images(make({"b.png": flat(BLUE), "c.png": flat(GREEN), "a.png": flat(RED), "notes.txt": "x"}))
    assert images.name == "set" and images.labels is None and images.classes == 0
    assert colours(images) == [RED, BLUE, GREEN]


def test_sub_folders_are_classes_in_sorted_order(make):
    files = {"dog/1.png": flat(BLUE), "cat/2.png": flat(GREEN), "dog/deep/0.png": flat(RED), "empty/x.txt": "x"}
    images = load_images(make(files))
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 1, 1]
    assert colours(images) == [GREEN, BLUE, RED]


def test_one_folder_around_everything_is_looked_through(make):
    images = load_images(make({"photos/x/a.png": flat(RED), "photos/y/b.png": flat(BLUE), "notes.txt": "x"}))
    assert images.class_names == ("x", "y")
    assert images.labels.tolist() == [0, 1]


def test_a_single_class_is_no_class(make):
    images = load_images(make({"cat/a.png": flat(RED), "cat/b.png": flat(BLUE)}))
    assert images.n == 2 and images.labels is None


def test_hidden_files_are_ignored(make):
    files = {"a.png": flat(RED), "b.png": flat(BLUE), ".trash/c.png": "x", "__MACOSX/._a.png": "x", "._b.png": "x"}
    assert colours(load_images(make(files))) == [RED, BLUE]


def test_dataset_json_gives_the_labels(make):
    labels = {"labels": [["00000/img1.png", 2], ["00000\\img0.png", 0], ["gone.png", 9]]}
    files = {"00000/img0.png": flat(RED), "00000/img1.png": flat(BLUE), "dataset.json": json.dumps(labels)}
    images = load_images(make(files))
    assert images.labels.tolist() == [0, 2] and images.class_names == ("0", "1", "2")
    assert colours(images) == [RED, BLUE]


def test_labels_of_images_that_are_not_there_are_told(make, capsys):
    labels = {"labels": [["a.png", 0], ["b.png", 1], ["c.png", 2], ["d.png", 1]]}
    found = load_images(make({"a.png": flat(RED), "b.png": flat(BLUE), "dataset.json": json.dumps(labels)}))
    assert found.labels.tolist() == [0, 1]
    assert "2 of its labels are of images that are not there, e.g. c.png" in capsys.readouterr().err


def test_dataset_json_without_labels_leaves_nested_images_unlabelled(make):
    files = {"00000/a.png": flat(RED), "00001/b.png": flat(BLUE), "dataset.json": '{"labels": null}'}
    images = load_images(make(files))
    assert images.labels is None and images.classes == 0 and images.n == 2


def test_zip_names_with_a_leading_dot_are_found(tmp_path):
    assert load_images(pack(tmp_path / "s.zip", {"./a.png": flat(RED), "./b.png": flat(BLUE)})).n == 2


def test_linked_folders_are_followed_and_circles_are_not(tmp_path):
    write(tmp_path, {"elsewhere/1.png": flat(RED), "set/b/2.png": flat(BLUE)})
    (tmp_path / "set/a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/b/up").symlink_to(tmp_path / "set")
    images = load_images(tmp_path / "set")
    assert images.class_names == ("a", "b") and images.n == 2


# ----------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "gif"])
def test_lossless_formats_give_the_very_pixels(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 2, (6, 5, 3), np.uint8) * 255  # eight colours: a GIF holds them
    options = {"lossless": True} if kind == "webp" else {}
    data = encode(Image.fromarray(pixels), kind, **options)
    images = load_images(write(tmp_path, {f"a.{kind}": data, f"b.{kind.upper()}": data}))
    assert images.shape == (3, 6, 5)
    assert np.array_equal(images.images[0].permute(1, 2, 0).numpy(), pixels)


def test_jpeg_is_read_under_both_suffixes(tmp_path):
    data = encode(Image.new("RGB", (8, 8), (200, 100, 50)), "JPEG", quality=95)
    images = load_images(write(tmp_path, {"a.jpg": data, "b.jpeg": data}))
    assert np.abs(np.array(colours(images)) - (200, 100, 50)).max() <= 3


def test_a_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert colours(load_images(write(tmp_path, {"a.gif": data, "b.gif": data}))) == [RED, RED]


def test_all_grey_is_one_channel_and_one_colour_makes_all_rgb(tmp_path):
    write(tmp_path, {"a.png": flat(7, "L"), "b.png": flat(1, "1"), "c.png": flat((9, 255), "LA")})
    assert colours(load_images(tmp_path)) == [(7,), (255,), (9,)]
    write(tmp_path, {"d.png": flat(RED)})
    assert colours(load_images(tmp_path)) == [(7, 7, 7), (255, 255, 255), (9, 9, 9), RED]


def test_transparency_is_laid_on_white(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255])
    files = {
        "a.png": flat((255, 0, 0, 0), "RGBA"),
        "b.png": flat((255, 0, 0, 51), "RGBA"),
        "c.png": encode(palette, transparency=0),
        "d.png": flat((0, 51), "LA"),
    }
    expected = [(255, 255, 255), (255, 204, 204), (255, 255, 255), (204, 204, 204)]
    assert colours(load_images(write(tmp_path, files))) == expected


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 128, 129], [257, 51400, 65535]], np.uint16)
    data = encode(Image.fromarray(values))
    images = load_images(write(tmp_path, {"a.png": data, "b.png": data}))
    assert images.images[0, 0].tolist() == [[0, 0, 1], [1, 200, 255]]


def test_exif_orientation_is_applied(tmp_path):
    upright = Image.new("RGB", (2, 3), BLUE)
    upright.putpixel((0, 0), RED)
    stored = upright.transpose(Image.Transpose.ROTATE_90)  # orientation 6: turn clockwise to see it upright
    exif = Image.Exif()
    exif[0x0112] = 6
    images = load_images(write(tmp_path, {"a.png": encode(stored, exif=exif), "b.png": encode(upright)}))
    assert images.shape == (3, 3, 2)
    assert np.array_equal(images.images[0], images.images[1])


def test_size_crops_the_central_square_and_averages(tmp_path):
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, 8:16] = 100  # the central square
    pixels[4:, 8:16] = 200
    columns = np.indices((16, 16))[1] % 2 * 200  # stripes finer than the result: an aliased resize would be 0 or 200
    files = {"a.png": encode(Image.fromarray(pixels)), "b.png": encode(Image.fromarray(columns.astype(np.uint8)))}
    images = load_images(write(tmp_path, files), size=8)
    assert images.shape == (1, 8, 8)
    assert np.array_equal(images.images[0, 0].numpy(), pixels[:, 8:16])
    assert np.abs(images.images[1, 0, :, 2:6].double().numpy() - 100).max() < 30


# ---------------------------------------------------------------------------------------------------------- mistakes


def test_a_missing_path_is_named(tmp_path, refused):
    assert "nowhere" in refused(tmp_path / "nowhere") and "no such" in refused(tmp_path / "nowhere")


def test_a_plain_file_is_refused(tmp_path, refused):
    write(tmp_path, {"x.txt": "hello", "x.zip": "PK but not really"})
    assert "not a folder of images or a zip" in refused(tmp_path / "x.txt")
    assert "damaged zip" in refused(tmp_path / "x.zip")


def test_no_images_says_what_was_looked_for(make, refused):
    message = refused(make({"a.txt": "x", "b.tiff": "x"}))
    assert "no images" in message and "png, jpg, jpeg, webp, bmp, gif" in message


def test_one_image_is_not_enough(make, refused):
    message = refused(make({"only.png": flat(RED)}))
    assert "only.png" in message and "at least 2" in message


def test_two_sizes_name_both_files_and_the_way_out(make, refused):
    path = make({"a.png": flat(RED), "b.png": flat(RED), "wide.png": flat(RED, size=(6, 4))})
    message = refused(path)
    assert all(word in message for word in ("a.png", "4x4", "wide.png", "6x4", "--size"))
    assert load_images(path, size=3).shape == (3, 3, 3)


@pytest.mark.parametrize("content", ["truncated", "no image", "empty", "other format"])
def test_a_bad_image_is_named(make, refused, content):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    bad = {"truncated": encode(noise)[:1500], "no image": b"hello", "empty": b"", "other format": encode(noise, "TIFF")}
    message = refused(make({"a.png": encode(noise), "bad.png": bad[content], "c.png": encode(noise)}))
    assert message.startswith("bad.png in ") and "0x" not in message


def test_a_decompression_bomb_is_refused(make, refused, monkeypatch):
    path = make({"a.png": flat(RED), "bomb.png": flat(RED, size=(40, 40)), "huge.png": flat(RED, size=(400, 400))})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    message = refused(path, 4)
    assert "bomb.png" in message and "1,000 pixels" in message


def test_images_both_inside_and_in_sub_folders_are_ambiguous(make, refused):
    message = refused(make({"a.png": flat(RED), "cats/b.png": flat(RED)}))
    assert "a.png" in message and "cats/b.png" in message


@pytest.mark.parametrize("size", [0, -8])
def test_an_impossible_size_is_named(tmp_path, refused, size):
    assert f"--size {size}" in refused(tmp_path, size)


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/etc/a.png", "C:/a.png", "..\\a.png"])
def test_a_zip_that_points_outside_is_refused(tmp_path, refused, name):
    message = refused(pack(tmp_path / "s.zip", {"b.png": flat(RED), "c.png": flat(RED), name: flat(RED)}))
    assert "outside" in message


def test_a_damaged_zip_entry_is_named(tmp_path, refused):
    path = pack(tmp_path / "s.zip", {"a.png": flat(RED), "b.png": flat(BLUE, size=(9, 9))})
    path.write_bytes(path.read_bytes().replace(flat(BLUE, size=(9, 9)), flat(BLUE, size=(9, 9))[:-1] + b"?"))
    assert "b.png in" in refused(path)
    path.write_bytes(path.read_bytes()[:-30])
    assert "damaged zip" in refused(path)


def test_a_zip_entry_that_unpacks_too_large_is_refused(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(files, "MAX_ENTRY", 2**20)
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", flat(RED))
        archive.writestr("b.png", bytes(3 * 2**20))
    message = refused(tmp_path / "s.zip")
    assert "b.png" in message and "3 MB" in message and "1 MB" in message


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ('{"labels": [["a.png", 0]]}', ("no label", "b.png", "1 of 2")),
        ('{"labels": [["a.png", 0], ["b.png", -1]]}', ("b.png", "-1")),
        ('{"labels": [["a.png", 0], ["b.png", [0.1, 2]]]}', ("b.png", "[0.1, 2]")),
        ('{"labels": [["a.png", 0], ["b.png", true]]}', ("b.png", "True")),
        ('{"labels": [["a.png", 0], 2]}', ("label 1 is 2; expected is {",)),
        ('{"labels": [["a.png"]]}', ('label 0 is ["a.png"]; expected',)),
        ('{"labels": {}}', ("no list; expected",)),
        ('{"classes": []}', ('it has no "labels"; expected',)),
        ("[]", ('it has no "labels"; expected',)),
        ('{"labels":\n x', ("no JSON from line 2, column 2 on; expected",)),
        ("[" * 100_000, ("no JSON; expected",)),
    ],
)
def test_bad_labels_are_named(make, refused, labels, words):
    message = refused(make({"a.png": flat(RED), "b.png": flat(BLUE), "dataset.json": labels}))
    assert "dataset.json" in message and all(word in message for word in words)
