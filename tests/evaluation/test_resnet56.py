"""ResNet-56 equals the network written out, and reads the published layout only."""

import pytest
import torch
import torch.nn.functional as F

from onejump.evaluation.resnet56 import MEAN, STD, ResNet56, ResNet56Detector
from onejump.types import UserError


def random_state() -> dict[str, torch.Tensor]:
    generator, state = torch.Generator().manual_seed(0), {}
    for name, meta in ResNet56().state_dict().items():
        noise = torch.randn(meta.shape, generator=generator)
        if name.endswith("running_var") or "bn" in name and name.endswith("weight"):
            state[name] = 1 + 0.2 * noise.tanh()
        elif not name.endswith("num_batches_tracked"):
            state[name] = noise * (0.1 if noise.ndim < 4 else (2 / noise[0].numel()) ** 0.5)
    return state


def written_out(state: dict[str, torch.Tensor], images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, name):
        mean, var, gain, bias = (
            s[f"{name}.{k}"].view(-1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    x = (images.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
    x = norm(F.conv2d(x, s["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for i in range(9):
            b, stride = f"layer{stage}.{i}", 2 if i == 0 and stage > 1 else 1
            y = norm(F.conv2d(x, s[f"{b}.conv1.weight"], stride=stride, padding=1), f"{b}.bn1").relu()
            y = norm(F.conv2d(y, s[f"{b}.conv2.weight"], padding=1), f"{b}.bn2")
            if stride == 2:
                zeros = torch.zeros_like(y[:, : y.shape[1] // 4])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = (x + y).relu()
    features = x.flatten(2).mean(2)
    return features, features @ s["linear.weight"].T + s["linear.bias"]


@pytest.fixture
def weights(tmp_path):
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in random_state().items()}, "best_prec1": 0.1}, tmp_path / "r.th"
    )
    return tmp_path / "r.th"


def images(n: int, c: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (n, c, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_features_and_logits_equal_the_network_written_out_in_float64(weights):
    detector, (features, logits) = ResNet56Detector(weights), written_out(random_state(), images(2))
    torch.testing.assert_close(detector(images(2)).double(), features, rtol=1e-4, atol=1e-5 * features.max().item())
    torch.testing.assert_close(
        detector.logits(images(2)).double(), logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item()
    )
    best = logits.argmax(1)
    assert detector.accuracy(images(2), best) == 1
    assert detector.accuracy(images(2), torch.stack([best[0], (best[1] + 1) % 10])) == 0.5


def test_features_do_not_depend_on_the_batch_and_grey_is_repeated(weights):
    grey = images(3, c=1)
    expected = ResNet56Detector(weights)(grey.repeat(1, 3, 1, 1))
    torch.testing.assert_close(ResNet56Detector(weights, batch=1)(grey), expected, rtol=1e-5, atol=1e-5)


def test_other_images_and_other_networks_are_refused(weights, tmp_path):
    with pytest.raises(UserError, match="3x64x64: use Inception"):
        ResNet56Detector(weights)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    state = random_state()
    del state["layer3.8.bn2.bias"]
    torch.save(state, tmp_path / "part.th")
    with pytest.raises(UserError, match="part.th: layer3.8.bn2.bias is missing, not .64,."):
        ResNet56Detector(tmp_path / "part.th").check()
    (tmp_path / "resnet56-4bfd9763.th").write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match="3,471,733 bytes, sha256 4bfd9763.*fetch it anew, or rename"):
        ResNet56Detector(tmp_path / "resnet56-4bfd9763.th").check()
