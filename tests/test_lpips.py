"""LPIPS against a second computation in float64, on files of the published layout with random weights."""

import sys

import pytest
import torch
from lpips_reference import FILES, FIRE, HEADS, random_heads, random_weights, reference, taps
from safetensors.torch import save_file

from onejump.lpips import LPIPS
from onejump.lpips_backbones import BACKBONES, Features
from onejump.types import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights and heads of AlexNet and SqueezeNet, in the published files' names and layouts."""
    folder = tmp_path_factory.mktemp("weights")
    for backbone in ("alex", "squeeze"):
        torch.save(random_weights(backbone), folder / f"{FILES[backbone]}.pth")
        torch.save(random_heads(backbone), folder / f"v0.1-{backbone}.pth")
    return folder


def pairs(n=2, channels=3, side=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, side, side, generator=g) * 2 - 1
    return x, (x + 0.3 * torch.randn(x.shape, generator=g)).clamp(-1, 1)


@pytest.mark.parametrize("backbone", ["alex", "squeeze"])
@pytest.mark.parametrize("pooling", ["average", "max"])
def test_it_is_the_distance_of_the_paper(folder, backbone, pooling):
    x, y = pairs(side=40)
    d = LPIPS(backbone, str(folder), pooling, resize=67)
    expected = reference(x, y, random_weights(backbone), backbone, pooling, 67)
    assert (expected > 0.1).all()
    torch.testing.assert_close(d(x, y).double(), expected, rtol=1e-4, atol=0)


def test_vgg_is_the_distance_of_the_paper(tmp_path):
    weights = random_weights("vgg")
    path = tmp_path / "vgg16-397923af.safetensors"
    save_file(weights, path)
    save_file(random_heads("vgg"), tmp_path / "v0.1-vgg.safetensors")
    x, y = pairs(n=1, side=20)
    for pooling in ("average", "max"):
        d = LPIPS(folder=str(tmp_path), pooling=pooling, resize=32)
        expected = reference(x, y, weights, "vgg", pooling, 32)
        torch.testing.assert_close(d(x, y).double(), expected, rtol=1e-4, atol=0)
    path.unlink()  # 59 MB


@pytest.mark.parametrize("backbone", list(FILES))
def test_the_layout_is_torchvisions(backbone):
    shapes = {name: t.shape for name, t in random_weights(backbone).items() if name.startswith("features")}
    network = Features(backbone, "average")
    assert {f"features.{name}": t.shape for name, t in network.features.state_dict().items()} == shapes
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    smallest = torch.empty(1, 3, *2 * [BACKBONES[backbone].min_side], device="meta")
    assert [f.shape[1] for f in network.to("meta")(smallest)] == list(HEADS[backbone])
    with pytest.raises(RuntimeError):
        network(smallest[..., 1:, 1:])


@pytest.mark.parametrize(
    ("keep_from", "resized"), [(256, {24, 40, 56}), (40, {24}), (None, {24, 40, 56}), (0, set())], ids=str
)
def test_which_images_are_resized(folder, keep_from, resized):
    """256: the PyTorch papers' rule; None: the JAX paper's; 0: LPIPS as published."""
    d = LPIPS("squeeze", str(folder), "max", resize=48, keep_from=keep_from)
    for side in (24, 40, 56):
        x, y = pairs(side=side)
        expected = reference(x, y, random_weights("squeeze"), "squeeze", "max", 48 if side in resized else None)
        torch.testing.assert_close(d(x, y).double(), expected, rtol=1e-4, atol=0)


def test_the_default_is_the_rule_of_the_pytorch_papers():
    assert LPIPS() == LPIPS("vgg", "", "average", 224, 256)


def test_it_is_symmetric_zero_for_equal_images_and_separate_for_each_pair(folder):
    x, y = pairs(n=3)
    d = LPIPS("squeeze", str(folder), resize=48)
    assert torch.equal(d(x, x), torch.zeros(3))
    assert torch.equal(d(x, y), d(y, x))
    torch.testing.assert_close(d(x, y), torch.cat([d(x[i : i + 1], y[i : i + 1]) for i in range(3)]))


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_gradients_reach_both_images(folder, pooling):
    """Along a random direction, against central differences of the float64 computation."""
    x, y = (v.requires_grad_() for v in pairs(n=1))
    LPIPS("alex", str(folder), pooling, resize=67)(x, y).sum().backward()
    weights, h = random_weights("alex"), 1e-6

    def at(a, b):
        return reference(a, b, weights, "alex", pooling, 67).item()

    for image, other in ((x, y), (y, x)):
        direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(3)).double()
        a, b = image.detach().double(), other.detach()
        slope = (at(a + h * direction, b) - at(a - h * direction, b)) / (2 * h)
        assert abs((image.grad.double() * direction).sum().item() - slope) < 2e-3 * abs(slope)


def test_equal_images_have_gradient_zero(folder):
    x = torch.zeros(2, 3, 40, 40, requires_grad=True)
    LPIPS("squeeze", str(folder), resize=48)(x, x.detach().clone()).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_features_that_are_zero_everywhere_give_zero_and_a_finite_gradient(tmp_path):
    weights = random_weights("squeeze")
    weights["features.0.bias"] -= 100  # the first layer is 0 everywhere, the others see nothing of the image
    torch.save(weights, tmp_path / "squeezenet1_1-b8a52dc0.pth")
    torch.save(random_heads("squeeze"), tmp_path / "v0.1-squeeze.pth")
    x, y = pairs()
    x.requires_grad_()
    d = LPIPS("squeeze", str(tmp_path), resize=48)(x, y)
    d.sum().backward()
    assert torch.equal(d, torch.zeros(2)) and torch.equal(x.grad, torch.zeros_like(x))


def test_one_channel_counts_as_three_equal_ones(folder):
    x, y = pairs(channels=1)
    d = LPIPS("squeeze", str(folder), resize=48)
    torch.testing.assert_close(d(x, y), d(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


def test_it_computes_in_float32_under_autocast(folder):
    x, y = pairs()
    d = LPIPS("squeeze", str(folder), resize=48)
    with torch.autocast("cpu", torch.bfloat16):
        inside = d(x, y)
    assert inside.dtype == torch.float32 and torch.equal(inside, d(x, y))


def test_loading_the_network_draws_no_random_numbers_and_may_happen_in_inference(folder, tmp_path):
    """Else a run that is resumed, which loads it at another step, would go another way."""
    x, y = pairs()
    fresh = tmp_path / "fresh"  # networks are kept by folder
    fresh.symlink_to(folder)
    before = torch.get_rng_state()
    d = LPIPS("alex", str(fresh), resize=66)
    with torch.inference_mode():
        d(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    x.requires_grad_()
    d(x, y).sum().backward()
    assert x.grad.abs().max() > 0


def test_the_folder_may_come_from_the_environment(folder, monkeypatch):
    x, y = pairs()
    monkeypatch.setenv("ONEJUMP_WEIGHTS", str(folder))
    LPIPS("squeeze").check()
    assert torch.equal(LPIPS("squeeze", resize=48)(x, y), LPIPS("squeeze", str(folder), resize=48)(x, y))
    monkeypatch.delenv("ONEJUMP_WEIGHTS")
    with pytest.raises(UserError, match="ONEJUMP_WEIGHTS.* v0.1-squeeze.pth and squeezenet1_1-b8a52dc0.pth"):
        LPIPS("squeeze").check()


def write_keras(path, weights: dict[str, torch.Tensor]) -> None:
    """The notop file of Keras: groups named after layers, kernels height x width x in x out, names in an attribute."""
    h5py = pytest.importorskip("h5py")
    layers = {"features.0": "conv1"}
    for index, number in FIRE:
        for ours in ("squeeze", "expand1x1", "expand3x3"):
            layers[f"features.{index}.{ours}"] = f"fire{number}/{ours.replace('squeeze', 'squeeze1x1')}"
    with h5py.File(path, "w") as f:
        for ours, layer in layers.items():
            group = f.create_group(layer)
            names = [f"{layer}_3/kernel:0", f"{layer}_3/bias:0"]
            group.attrs["weight_names"] = [name.encode() for name in names]
            group[names[0]] = weights[f"{ours}.weight"].permute(2, 3, 1, 0).numpy()
            group[names[1]] = weights[f"{ours}.bias"].numpy()


def test_a_keras_squeezenet_sees_what_it_was_trained_on(tmp_path):
    """BGR in [0, 255] less Keras's mean, at every place of the first layer, from images in [-1, 1]."""
    weights = random_weights("squeeze")
    weights["features.0.weight"] /= 60
    write_keras(tmp_path / "squeezenet_v1.1_notop_keras.h5", weights)
    torch.save(random_heads("squeeze"), tmp_path / "v0.1-squeeze.pth")
    x, y = pairs(side=40)
    features = []
    for image in (x.double(), y.double()):
        bgr = (image + 1) * 127.5 - torch.tensor([123.68, 116.779, 103.939]).double().view(3, 1, 1)
        outputs = taps(bgr.flip(1), weights, "squeeze", "max")
        features.append([f / f.square().sum(1, keepdim=True).sqrt() for f in outputs])
    layers = zip(*features, random_heads("squeeze").values(), strict=True)
    expected = sum((head.double() * (fx - fy) ** 2).sum(1).mean((1, 2)) for fx, fy, head in layers)
    d = LPIPS("squeeze", str(tmp_path), "max", keep_from=0)
    torch.testing.assert_close(d(x, y).double(), expected, rtol=1e-4, atol=0)


def refusal(call) -> str:
    with pytest.raises(UserError) as refused:
        call()
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_a_missing_file_is_named_with_its_size_checksum_and_source(tmp_path):
    x, y = pairs()
    d = LPIPS("alex", str(tmp_path))
    message = refusal(lambda: d(x, y))
    assert message == refusal(d.check)
    for part in (str(tmp_path), "alexnet-owt-7be5be79.pth", "244,408,911 bytes", "sha256 7be5be79", "pytorch.org"):
        assert part in message
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"")
    message = refusal(lambda: d(x, y))
    for part in (str(tmp_path), "v0.1-alex.pth", "6,009 bytes", "sha256 df73285e", "PerceptualSimilarity"):
        assert part in message


def test_the_published_names_hold_the_start_of_the_checksum():
    for backbone in BACKBONES.values():
        assert backbone.weights.sha256.startswith(backbone.weights.name.split("-")[-1].removesuffix(".pth"))
        assert len(backbone.weights.sha256) == len(backbone.heads.sha256) == 64


class RunsCode:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path, capsys):
    x, y = pairs()
    d, weights, heads = LPIPS("squeeze", str(tmp_path)), random_weights("squeeze"), random_heads("squeeze")
    path, heads_path = tmp_path / "squeezenet1_1-b8a52dc0.pth", tmp_path / "v0.1-squeeze.pth"
    torch.save(heads, heads_path)
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:-5000])
    assert f"{path} cannot be read" in refusal(lambda: d(x, y))
    torch.save({"features.0.weight": RunsCode()}, path)
    assert f"{path} cannot be read" in refusal(lambda: d(x, y))
    assert capsys.readouterr().out == ""
    torch.save(random_weights("alex"), path)
    assert f"{path}: features.0.weight is (64, 3, 11, 11), not (64, 3, 3, 3)" in refusal(lambda: d(x, y))
    torch.save(weights, path)
    torch.save({"lin0.model.1.weight": heads["lin0.model.1.weight"]}, heads_path)
    assert f"{heads_path}: lin1.model.1.weight is missing, not (1, 128, 1, 1)" in refusal(lambda: d(x, y))
    torch.save(heads, heads_path)  # what failed is not remembered
    assert (d(x, y) > 0).all()


def test_a_keras_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, monkeypatch):
    x, y = pairs()
    path = tmp_path / "squeezenet_v1.1_notop_keras.h5"
    path.write_bytes(b"no HDF5")
    torch.save(random_heads("squeeze"), tmp_path / "v0.1-squeeze.pth")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        assert "pip install h5py" in refusal(lambda: LPIPS("squeeze", str(tmp_path))(x, y))
    pytest.importorskip("h5py")
    assert f"{path} cannot be read" in refusal(lambda: LPIPS("squeeze", str(tmp_path))(x, y))


def test_what_cannot_be_compared_is_refused_by_name(folder):
    alex = LPIPS("alex", str(folder), keep_from=0)
    assert "samples of 2:" in refusal(lambda: alex(torch.zeros(2, 2), torch.zeros(2, 2)))
    assert "samples of 4x32x32:" in refusal(lambda: alex(torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32)))
    assert "31 or more, not 8" in refusal(lambda: alex(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)))
    assert refusal(lambda: LPIPS("alex", resize=30)).startswith("resize: 30;")
    assert refusal(lambda: LPIPS(keep_from=-1)).startswith("keep_from: -1;")
