"""FID's Inception-v3 equals the network written out in float64 with its batch norms, from every file that holds it."""

import io
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onejump.evaluation import inception_weights
from onejump.evaluation.inception import CONVS, InceptionDetector, needed, resize_tf1
from onejump.evaluation.inception_weights import WeightFile, read_inception
from onejump.types import UserError

STEM = ("conv", "conv_1", "conv_2")


def random_norm(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def between(low: float, high: float) -> torch.Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    return {
        "weight": between(0.8, 1.2),
        "bias": between(-0.2, 0.3),
        "running_mean": between(-0.1, 0.1),
        "running_var": between(0.5, 1.5),
        "num_batches_tracked": torch.tensor(0),
    }


def random_conv(*shape: int, generator: torch.Generator) -> torch.Tensor:
    fan_in = shape[1] * shape[2] * shape[3]
    return torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5


class Written:
    """The published network as it is drawn, in float64; its first run makes random weights by pytorch-fid's names."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def c(self, name: str, x, out: int, kernel=(1, 1), stride: int = 1, padding=0):
        if f"{name}.conv.weight" not in self.state:
            self.state[f"{name}.conv.weight"] = random_conv(out, x.shape[1], *kernel, generator=self.generator)
            norm = random_norm(out, self.generator)
            self.state |= {f"{name}.bn.{part}": value for part, value in norm.items()}
        w, *norm = (
            self.state[f"{name}.{part}"].double()
            for part in ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias")
        )
        return F.batch_norm(F.conv2d(x, w, stride=stride, padding=padding), *norm, eps=0.001).relu()

    def a(self, m: str, x, pooled: int):
        five = self.c(f"{m}.branch5x5_2", self.c(f"{m}.branch5x5_1", x, 48), 64, (5, 5), padding=2)
        y = self.c(f"{m}.branch3x3dbl_2", self.c(f"{m}.branch3x3dbl_1", x, 64), 96, (3, 3), padding=1)
        three = self.c(f"{m}.branch3x3dbl_3", y, 96, (3, 3), padding=1)
        mean = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([self.c(f"{m}.branch1x1", x, 64), five, three, self.c(f"{m}.branch_pool", mean, pooled)], 1)

    def b(self, m: str, x):
        y = self.c(f"{m}.branch3x3dbl_2", self.c(f"{m}.branch3x3dbl_1", x, 64), 96, (3, 3), padding=1)
        y = self.c(f"{m}.branch3x3dbl_3", y, 96, (3, 3), stride=2)
        return torch.cat([self.c(f"{m}.branch3x3", x, 384, (3, 3), stride=2), y, F.max_pool2d(x, 3, 2)], 1)

    def sevens(self, name: str, x, *steps: tuple[int, bool]):
        for i, (out, wide) in enumerate(steps, 2):
            x = self.c(f"{name}_{i}", x, out, *(((1, 7), 1, (0, 3)) if wide else ((7, 1), 1, (3, 0))))
        return x

    def seven(self, m: str, x, width: int):
        one = self.sevens(f"{m}.branch7x7", self.c(f"{m}.branch7x7_1", x, width), (width, True), (192, False))
        two = self.c(f"{m}.branch7x7dbl_1", x, width)
        two = self.sevens(f"{m}.branch7x7dbl", two, (width, False), (width, True), (width, False), (192, True))
        mean = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([self.c(f"{m}.branch1x1", x, 192), one, two, self.c(f"{m}.branch_pool", mean, 192)], 1)

    def d(self, m: str, x):
        three = self.c(f"{m}.branch3x3_2", self.c(f"{m}.branch3x3_1", x, 192), 320, (3, 3), stride=2)
        y = self.sevens(f"{m}.branch7x7x3", self.c(f"{m}.branch7x7x3_1", x, 192), (192, True), (192, False))
        return torch.cat([three, self.c(f"{m}.branch7x7x3_4", y, 192, (3, 3), stride=2), F.max_pool2d(x, 3, 2)], 1)

    def fork(self, name: str, x):
        wide = self.c(f"{name}a", x, 384, (1, 3), padding=(0, 1))
        return torch.cat([wide, self.c(f"{name}b", x, 384, (3, 1), padding=(1, 0))], 1)

    def e(self, m: str, x, pooled):
        one = self.fork(f"{m}.branch3x3_2", self.c(f"{m}.branch3x3_1", x, 384))
        two = self.c(f"{m}.branch3x3dbl_2", self.c(f"{m}.branch3x3dbl_1", x, 448), 384, (3, 3), padding=1)
        two = self.fork(f"{m}.branch3x3dbl_3", two)
        return torch.cat([self.c(f"{m}.branch1x1", x, 320), one, two, self.c(f"{m}.branch_pool", pooled, 192)], 1)

    def __call__(self, x) -> dict[str, torch.Tensor]:
        x = self.c("Conv2d_2a_3x3", self.c("Conv2d_1a_3x3", x, 32, (3, 3), stride=2), 32, (3, 3))
        x = F.max_pool2d(self.c("Conv2d_2b_3x3", x, 64, (3, 3), padding=1), 3, 2)
        taps = {"64": x.mean((2, 3))}
        x = F.max_pool2d(self.c("Conv2d_4a_3x3", self.c("Conv2d_3b_1x1", x, 80), 192, (3, 3)), 3, 2)
        taps["192"] = x.mean((2, 3))
        x = self.b("Mixed_6a", self.a("Mixed_5d", self.a("Mixed_5c", self.a("Mixed_5b", x, 32), 64), 64))
        x = self.seven("Mixed_6c", self.seven("Mixed_6b", x, 128), 160)
        first = self.c("Mixed_6d.branch1x1", x, 192)[:, :7]
        taps["spatial"] = first.permute(0, 2, 3, 1).reshape(len(x), 17 * 17 * 7)
        x = self.seven("Mixed_6e", self.seven("Mixed_6d", x, 160), 192)
        taps["768"] = x.mean((2, 3))
        x = self.d("Mixed_7a", x)
        x = self.e("Mixed_7b", x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        x = self.e("Mixed_7c", x, F.max_pool2d(x, 3, 1, 1)).mean((2, 3))
        if "fc.weight" not in self.state:
            self.state["fc.weight"] = torch.randn(1008, 2048, generator=self.generator) / 45
            self.state["fc.bias"] = torch.randn(1008, generator=self.generator)
        return taps | {"2048": x, "logits": x @ self.state["fc.weight"].double().T}


def images(n: int, c: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, c, side, side), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def written_resize(image: np.ndarray, side: int) -> np.ndarray:
    """TensorFlow 1's rule for one channel, pixel by pixel."""
    h, w = image.shape
    out = np.empty((side, side))
    for i in range(side):
        for j in range(side):
            y, x = i * h / side, j * w / side
            top, left = int(np.floor(y)), int(np.floor(x))
            bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
            above = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
            below = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
            out[i, j] = above * (1 - y + top) + below * (y - top)
    return out


@pytest.fixture(scope="module")
def written() -> tuple[Written, dict[str, torch.Tensor]]:
    network = Written()
    with torch.no_grad():
        return network, network((resize_tf1(images(1).double()) - 128) / 128)


@pytest.fixture(scope="module")
def pytorch_fid(written, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "pytorch_fid.pth"
    torch.save(written[0].state, path)
    return path


@pytest.fixture
def stem(tmp_path):
    """An .npz that ends after conv_2."""
    generator, arrays = torch.Generator().manual_seed(2), {}
    for name in STEM:
        conv = CONVS[name]
        arrays[f"{name}.weight"] = random_conv(conv.out, conv.inside, *conv.kernel, generator=generator).numpy()
        arrays[f"{name}.bias"] = np.linspace(-0.1, 0.3, conv.out, dtype=np.float32)
    np.savez(tmp_path / "stem.npz", **arrays)
    return tmp_path / "stem.npz"


@pytest.mark.parametrize("h, w, side", [(5, 7, 11), (4, 4, 12), (13, 9, 5), (6, 6, 6), (1, 3, 4)])
def test_images_are_resized_as_tensorflow_1_does(h, w, side):
    image = np.random.RandomState(0).randint(0, 256, (h, w)).astype(np.float64)
    found = resize_tf1(torch.from_numpy(image)[None, None], side)[0, 0].numpy()
    np.testing.assert_allclose(found, written_resize(image, side), atol=1e-10)
    single = resize_tf1(torch.from_numpy(image)[None, None].float(), side)[0, 0].numpy()
    np.testing.assert_allclose(single, found, atol=1e-3)


def test_every_tap_equals_the_network_written_out_in_float64(written, pytorch_fid):
    expected = written[1]
    found = InceptionDetector(pytorch_fid).measure(images(1), tuple(expected))
    assert [found[tap].shape[1] for tap in expected] == [64, 192, 2023, 768, 2048, 1008]
    for tap in expected:
        assert expected[tap].std() > 0.01, tap  # the random network passes something on
        gap = (found[tap].double() - expected[tap]).abs().max() / expected[tap].abs().max()
        assert gap < 5e-6, (tap, gap)  # float32's rounding, in whatever order a layout sums


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # scripting, here only to write a file
def test_the_files_of_pytorch_fid_and_stylegan_and_an_npz_give_the_same_weights(written, pytorch_fid, tmp_path):
    state, found = written[0].state, read_inception(pytorch_fid)
    assert {name.removesuffix(".weight") for name in found if name.endswith("weight")} == set(needed("logits"))
    root = nn.Module()
    for path, layer in (("conv", "Conv2d_1a_3x3"), ("mixed_9.tower_1.mixed.conv_1", "Mixed_7b.branch3x3dbl_3b")):
        place = root
        for part in ("layers", *path.split(".")):
            place.add_module(part, place._modules.get(part) or Holder())
            place = place._modules[part]
        place.weight = nn.Parameter(state[f"{layer}.conv.weight"] * state[f"{layer}.bn.weight"][:, None, None, None])
        place.beta, place.var = nn.Parameter(state[f"{layer}.bn.bias"]), nn.Parameter(state[f"{layer}.bn.running_var"])
        place.mean = nn.Parameter(state[f"{layer}.bn.running_mean"] * state[f"{layer}.bn.weight"])
    holder = Holder()
    holder.layers, holder.output = root.layers, nn.Linear(2048, 3)
    torch.jit.save(torch.jit.script(holder), tmp_path / "scripted.pt")
    stylegan = read_inception(tmp_path / "scripted.pt")
    names = {"conv", "mixed_9_tower_1_mixed_conv_1", "output"}
    assert set(stylegan) == {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    for name in set(stylegan) - {"output.weight", "output.bias"}:
        torch.testing.assert_close(stylegan[name], found[name], rtol=1e-6, atol=1e-6)
    np.savez(tmp_path / "some.npz", **{name: found[name].numpy() for name in set(stylegan) & set(found)})
    again = read_inception(tmp_path / "some.npz")
    assert all(torch.equal(again[name], found[name]) for name in again)


class Holder(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_an_archive_whose_data_asks_for_a_function_is_refused_and_not_obeyed(tmp_path):
    marker = tmp_path / "ran"
    command = f"touch {marker}".encode()
    data = b"\x80\x02cposix\nsystem\nU" + bytes([len(command)]) + command + b"\x85R."
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        for name, content in (("data.pkl", data), ("constants.pkl", b"\x80\x02)."), ("version", b"3\n")):
            archive.writestr(f"bad/{name}", content)
    with pytest.raises(UserError, match="bad.pt: not a readable file of weights"):
        read_inception(tmp_path / "bad.pt")
    assert not marker.exists()


def test_grey_images_are_repeated_and_other_channels_refused(stem):
    detector, grey = InceptionDetector(stem, "64"), images(2, c=1)
    assert torch.equal(detector(grey), detector(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(UserError, match="1 or 3 channels, not of 4"):
        detector(images(1, c=4))


def test_features_depend_neither_on_the_batch_nor_on_autocast(stem):
    five, expected = images(5), InceptionDetector(stem, "64")(images(5))
    assert expected.dtype == torch.float32
    assert torch.allclose(InceptionDetector(stem, "64", batch=1)(five), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(InceptionDetector(stem, "64")(five), expected)


def test_a_file_that_ends_before_the_tap_says_what_is_missing(stem):
    with pytest.raises(UserError, match="stem.npz ends before inception-192: 2 layers are missing, conv_3 to conv_4"):
        InceptionDetector(stem, "192").check()
    with pytest.raises(UserError, match="'500'; choose one of 64, 192"):
        InceptionDetector(stem, "500")


def test_the_hash_tells_files_and_taps_apart(stem, tmp_path):
    other = tmp_path / "other.npz"
    np.savez(other, **{name: array * 2 for name, array in np.load(stem).items()})
    detectors = [InceptionDetector(stem, "64"), InceptionDetector(stem, "192"), InceptionDetector(other, "64")]
    assert len({detector.hash for detector in detectors}) == 3
    assert not torch.equal(detectors[0](images(1)), detectors[2](images(1)))


def test_foreign_and_damaged_files_are_refused_by_name(stem, tmp_path, monkeypatch):
    arrays = dict(np.load(stem))
    cases = {
        "head": (arrays | {"output.weight": np.zeros((1000, 2048), "f4")}, "output.weight is .1000, 2048., not .1008"),
        "bias": ({k: v for k, v in arrays.items() if k != "conv_1.bias"}, "conv_1.bias is missing"),
        "else": ({"w": np.zeros(3)}, "not the weights of Inception-v3 .it holds w"),
    }
    for name, (content, message) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **content)
        with pytest.raises(UserError, match=f"{name}.npz: {message}"):
            InceptionDetector(tmp_path / f"{name}.npz", "64").check()
    cut = io.BytesIO(stem.read_bytes()[:5000]).getvalue()
    (tmp_path / "cut.npz").write_bytes(cut)
    with pytest.raises(UserError, match="cut.npz: not a readable file of weights"):
        InceptionDetector(tmp_path / "cut.npz", "64").check()
    monkeypatch.setattr(inception_weights, "PUBLISHED", (WeightFile("stem.npz", 7, "0" * 64, "somewhere"),))
    with pytest.raises(UserError, match="stem.npz .7 bytes, sha256 000.*somewhere: fetch it anew, or rename"):
        read_inception(stem)
