"""A small classifier of 8x8 digits: the detector and the judge of the digits demo. Its weights ship with the package.

`python -m onejump.evaluation.digits_classifier` trains it again (seconds on one core) and writes the weights.
"""

from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onejump.types import Features, Images, UserError

WEIGHTS = Path(__file__).with_suffix(".safetensors")
BATCH = 4096  # images at once: the activations of a batch take about 100 MB


class DigitsClassifier(nn.Module):
    """Three 3x3 convolutions, a layer of 64 features, ten classes; for images of 1x8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 2 * 2, 64)
        self.classes = nn.Linear(64, 10)

    def forward(self, x: Float[Tensor, "b 1 8 8"]) -> tuple[Float[Tensor, "b 64"], Float[Tensor, "b 10"]]:
        """Images in [-1, 1] to (features, logits)."""
        y = F.silu(self.conv2(F.silu(self.conv1(x))))
        y = F.silu(self.conv3(F.max_pool2d(y, 2)))
        features = F.silu(self.hidden(F.max_pool2d(y, 2).flatten(1)))
        return features, self.classes(features)

    def features(self, images: Images) -> Features:
        """float32 [n, 64]: the layer before the classes."""
        return torch.cat([self(x)[0] for x in self._batches(images)])

    def probabilities(self, images: Images) -> Float[Tensor, "n 10"]:
        """float32 [n, 10]: how likely each image shows each digit."""
        return torch.cat([self(x)[1].softmax(1) for x in self._batches(images)])

    def _batches(self, images: Tensor) -> list[Tensor]:
        if images.shape[1:] != (1, 8, 8):
            shape = "x".join(map(str, images.shape[1:]))
            raise UserError(f"the digits classifier sees images of 1x8x8, not {shape}: use the pixel detector")
        device = self.classes.weight.device
        return [x.to(device).float() / 127.5 - 1 for x in images.split(BATCH)]


@cache
def load_digits_classifier(device: torch.device | str = "cpu") -> DigitsClassifier:
    """The trained classifier in eval mode, without gradients; one instance a device."""
    model = DigitsClassifier()
    model.load_state_dict({name: w.float() for name, w in load_file(WEIGHTS).items()})
    return model.eval().requires_grad_(False).to(device)


def weights_hash() -> str:
    """sha256 (hex) of the weights file: says which classifier a number was measured with."""
    return sha256(WEIGHTS.read_bytes()).hexdigest()


def accuracy(model: DigitsClassifier, images: Images, labels: Int64[Tensor, " n"]) -> float:
    """Share of images whose likeliest class is their label."""
    return (model.probabilities(images).argmax(1).cpu() == labels.cpu()).double().mean().item()


def augment(x: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "b 1 8 8"]:
    """Shifts each image by -1, 0 or 1 pixels in both directions (ink-free border) and adds a little noise."""
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    theta[:, :, 2] = torch.randint(-1, 2, (len(x), 2)) * (2 / 8)
    grid = F.affine_grid(theta, [len(x), 1, 8, 8], align_corners=False)
    shifted = F.grid_sample(x + 1, grid, mode="nearest", align_corners=False) - 1
    return shifted + 0.1 * torch.randn_like(x)


def train(images: Images, labels: Int64[Tensor, " n"], epochs: int = 60, seed: int = 0) -> DigitsClassifier:
    """Trains from scratch on the CPU; the same seed and machine give the same weights."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = DigitsClassifier()
        steps = epochs * (len(images) // 64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        x = images.float() / 127.5 - 1
        for _ in range(steps):
            i = torch.randint(len(x), (64,))
            loss = F.cross_entropy(model(augment(x[i]))[1], labels[i], label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def labelled_digits() -> tuple[Images, Int64[Tensor, " n"], Tensor]:
    """(images, labels, which are held out) of scikit-learn's digits; the same split as `data.digits`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None]
    return images, torch.from_numpy(data.target).long(), torch.arange(len(images)) % 5 == 0


def main() -> None:
    torch.set_num_threads(1)
    images, labels, held_out = labelled_digits()
    model = train(images[~held_out], labels[~held_out])
    half = {name: w.half().contiguous() for name, w in model.state_dict().items()}
    model.load_state_dict({name: w.float() for name, w in half.items()})
    for name, part in (("training", ~held_out), ("held out", held_out)):
        print(f"{name}: {accuracy(model, images[part], labels[part]):.2%} of {int(part.sum())} digits read rightly")
    save_file(half, WEIGHTS)
    print(f"{WEIGHTS} written, {WEIGHTS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
