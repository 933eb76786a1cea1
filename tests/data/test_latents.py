"""Latents are read in every form with their labels, drawn afresh each step from (seed, step, rank), and scaled."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch

from onejump.data.image_set import ImageSet, epoch_order
from onejump.data.latents import EDM2_SCALING, LatentScaling, LatentSet, open_latents
from onejump.data.open import open_training_set
from onejump.types import UserError

N, C, SIDE = 11, 4, 3


def moments(seed: int = 0) -> np.ndarray:
    """N latents [2c, h, w]: means of other sizes in every channel, and deviations."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(N, C, SIDE, SIDE)) * np.arange(1, C + 1)[:, None, None] + 3
    return np.concatenate([mean, rng.uniform(0.5, 1, mean.shape)], 1).astype(np.float32)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def edm2(arrays: np.ndarray) -> dict[str, bytes]:
    """EDM2's layout: img-mean-std-XXXXXXXX.npy in sub-folders, and dataset.json; the class of latent i is i mod 3."""
    names = [f"{i // 5:05}/img-mean-std-{i:08}.npy" for i in range(len(arrays))]
    labels = json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]}).encode()
    return {name: npy(array) for name, array in zip(names, arrays, strict=True)} | {"dataset.json": labels}


@pytest.fixture(params=["folder", "zip"])
def put(request, tmp_path):
    def write(files):
        if request.param == "zip":
            with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
            return tmp_path / "set.zip"
        for name, data in files.items():
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_bytes(data)
        return tmp_path / "set"

    return write


@pytest.fixture
def opened(tmp_path):
    return lambda path, **options: open_latents(path, cache=tmp_path / "cache", **options)


def test_edm2_latents_are_drawn_afresh_from_mean_and_deviation(put, opened):
    arrays = moments()
    latents = opened(put(edm2(arrays)), scaling=EDM2_SCALING)
    assert (latents.n, latents.shape, latents.classes, latents.moments) == (N, (C, SIDE, SIDE), 3, True)
    order = torch.cat([epoch_order(N, 7, epoch)[0] for epoch in range(150)])
    mean, std = torch.from_numpy(arrays).chunk(2, 1)
    eps = []
    for step in range(80):
        x0, labels = latents.batch(step, 8, 7)
        here = order[8 * step : 8 * step + 8]
        assert torch.equal(labels, here % 3)
        eps.append((EDM2_SCALING.raw(x0) - mean[here]) / std[here])
        again = opened(latents.feeder.name, scaling=EDM2_SCALING) if step == 3 else latents
        assert torch.equal(again.batch(step, 8, 7)[0], x0)
    values = torch.stack(eps)
    assert abs(values.mean()) < 4 / values.numel() ** 0.5
    assert abs(values.var() - 1) < 4 * (2 / values.numel()) ** 0.5
    assert (values[1:] * values[:-1]).mean().abs() < 4 / values.numel() ** 0.5  # no step repeats another's
    one, two = (latents.batch(0, 4, 7, rank, 2)[0] for rank in (0, 1))
    assert torch.equal(latents.batch(0, 4, 7, 0, 2)[0], one) and one.shape == two.shape


def test_the_sets_own_scaling_gives_every_channel_mean_0_and_deviation_one_half(put, opened):
    latents = opened(put(edm2(moments())))
    x0 = torch.cat([latents.batch(step, N, 0)[0] for step in range(120)]).transpose(0, 1).flatten(1)
    assert x0.mean(1).abs().max() < 0.02 and (x0.std(1) - 0.5).abs().max() < 0.02
    assert torch.allclose(latents.scaling.raw(latents.scaling(x := torch.randn(2, C, 1, 1))), x, atol=1e-5)


def test_edm2_numbers_are_the_published_ones():
    z = torch.tensor([5.81 + 4.17, 3.25, 0.12, -2.15 - 3.28])[None, :, None, None]
    assert torch.allclose(EDM2_SCALING(z).flatten(), torch.tensor([0.5, 0, 0, -0.5]), atol=1e-6)


def test_plain_latents_pairs_and_one_mapped_array_are_the_same_sets(put, opened, tmp_path):
    arrays, plain = moments(), moments()[:, :C].astype(np.float16)
    labels = np.arange(N) % 2
    folders = {f"{'ab'[i % 2]}/{i:02}": array for i, array in enumerate(plain)}
    names = sorted(folders)
    np.save(tmp_path / "all.npy", np.stack([folders[name] for name in names]))
    np.save(tmp_path / "all_labels.npy", np.array(["ab".index(name[0]) for name in names]))
    files, array = opened(put({f"{k}.npy": npy(v) for k, v in folders.items()})), opened(tmp_path / "all.npy")
    assert files.class_names == ("a", "b") and array.class_names == ("0", "1") and labels.sum() == array.labels.sum()
    assert files.fingerprint == array.fingerprint and files.scaling == array.scaling and not files.moments
    for step in range(4):
        ours, theirs = files.batch(step, 5, 1), array.batch(step, 5, 1)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    halves = {"-mean.npy": arrays[:, :C], "-std.npy": arrays[:, C:]}
    pairs = {f"x/{i:02}{end}": npy(half[i]) for end, half in halves.items() for i in range(N)}
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        for name, data in pairs.items():
            archive.writestr(name, data)
    found = opened(tmp_path / "pairs.zip")
    assert found.moments and found.n == N
    assert torch.equal(torch.cat([chunk for chunk, _ in found.chunks(4)]), torch.from_numpy(arrays))
    assert torch.equal(found.pick(torch.tensor([3, 1])), torch.from_numpy(arrays)[[3, 1]])


def test_latents_are_told_from_images_by_content(put, tmp_path):
    found = open_training_set(put(edm2(moments())), scaling=EDM2_SCALING, cache=tmp_path / "cache")
    assert isinstance(found, LatentSet) and found.scaling == EDM2_SCALING
    np.save(tmp_path / "images.npy", np.zeros((3, 4, 4, 3), np.uint8))
    assert open_training_set(tmp_path / "images.npy").shape == (3, 4, 4)
    assert found.unlabelled().batch(0, 2, 0)[1] is None


def test_bad_latents_are_named_or_left_out(put, opened):
    arrays = moments()
    arrays[4, 2, 1, 1] = np.nan
    files = edm2(arrays)
    with pytest.raises(UserError, match=r"img-mean-std-00000004.npy in .* not finite"):
        opened(put(files))
    files["00000/img-mean-std-00000000.npy"] = b"no array"
    files["00001/img-mean-std-00000007.npy"] = npy(arrays[7, :, :2])
    files["00002/img-mean-std-00000010.npy"] = npy(arrays[10].astype(np.uint8))
    latents = opened(put(files), skip_bad=True)
    assert latents.n == N - 4
    assert torch.equal(latents.labels, torch.tensor([i % 3 for i in (1, 2, 3, 5, 6, 8, 9)]))
    assert sorted(latents.batch(0, 7, 0)[1].tolist()) == sorted(latents.labels.tolist())


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.npy": npy(np.zeros((4, 2, 2), np.float32))}, "1 latents .* at least 2"),
        ({"a-mean.npy": b"", "b-mean.npy": b"", "a-std.npy": b""}, "each latent needs NAME-mean.npy and NAME-std.npy"),
        ({"mean-std-a.npy": b"", "b.npy": b""}, "b.npy has no mean-std in its name"),
        ({"a.npy": npy(np.zeros((4, 2), np.float32)), "b.npy": b""}, "a.npy in .* floats .c, h, w. are needed"),
        ({f"{k}-mean-std.npy": npy(np.zeros((3, 2, 2), np.float32)) for k in "ab"}, "3 channels, where each mean"),
    ],
)
def test_sets_that_cannot_be_meant_are_refused_in_one_line(put, opened, files, words):
    with pytest.raises(UserError, match=words) as error:
        opened(put(files))
    assert "\n" not in str(error.value)


def test_nothing_is_unpickled_and_scalings_must_fit(put, opened, tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object))
    with pytest.raises(UserError, match="objects.npy cannot be read"):
        opened(tmp_path / "objects.npy")
    with pytest.raises(UserError, match="4 channels, but the scaling has numbers for 3"):
        opened(put(edm2(moments())), scaling=LatentScaling((0.0,) * 3, (1.0,) * 3))
    np.save(tmp_path / "flat.npy", np.stack([np.full((4, 3, 3), 0.1), np.eye(3)[None].repeat(4, 0)], 1))
    with pytest.raises(UserError, match=r"flat\.npy: channel 0 is 0\.1 throughout"):
        open_latents(tmp_path / "flat.npy", cache=tmp_path)
    with pytest.raises(UserError, match="std: .* above 0 for each of the 2 channels"):
        LatentScaling((0.0, 1.0), (1.0, 0.0))


def test_a_folder_with_an_array_of_images_is_a_set_of_images(tmp_path):
    """images.npy and labels.npy of bytes: files of the same ending as latents."""
    np.save(tmp_path / "images.npy", np.zeros((6, 8, 8, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(6) % 2)
    found = open_training_set(tmp_path)
    assert isinstance(found, ImageSet) and found.shape == (3, 8, 8) and found.labels.tolist() == [0, 1] * 3


def test_a_zip_with_a_damaged_list_of_entries_is_told_in_one_line(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.npy", npy(moments()[0]))
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\1\2")
    data[at : at + 4] = b"XXXX"
    path.write_bytes(data)
    with pytest.raises(UserError, match="set.zip is a damaged zip file"):
        open_training_set(path)


def test_a_label_beyond_all_classes_is_refused(tmp_path, opened):
    """And no names are made for a thousand million of them."""
    np.save(tmp_path / "a.npy", moments())
    np.save(tmp_path / "a_labels.npy", np.full(N, 10**9))
    with pytest.raises(UserError, match="a_labels.npy: a class from 0 to 999,999"):
        opened(tmp_path / "a.npy")
