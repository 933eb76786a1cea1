"""ResNet-56 for CIFAR-10 (He et al. 2016, section 4.2): a cheap detector, and a judge, for images of 3x32x32."""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from onejump.evaluation.precision import exact_float32
from onejump.evaluation.weight_files import WeightFile, check_published, read_tensors, sha256_of
from onejump.types import Images, UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what it was trained with: ImageNet's, of pixels in [0, 1]
PUBLISHED = WeightFile(
    "resnet56-4bfd9763.th",
    3471733,
    "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
    "pretrained_models in https://github.com/akamaster/pytorch_resnet_cifar10",
)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights: every second pixel, new channels zero on both sides."""

    def __init__(self, inside: int, out: int):
        super().__init__()
        self.grown = out - inside
        self.conv1 = nn.Conv2d(inside, out, 3, stride=2 if self.grown else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.grown:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grown // 2, self.grown // 2))
        return (x + y).relu()


class ResNet56(nn.Module):
    """Three stages of nine blocks with 16, 32 and 64 channels, averaged over places, ten classes."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            self.layer1, self.layer2, self.layer3 = (
                nn.Sequential(Block(inside, out), *(Block(out, out) for _ in range(8)))
                for inside, out in ((16, 16), (16, 32), (32, 64))
            )
            self.linear = nn.Linear(64, 10)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x: Float[Tensor, "b 3 32 32"]) -> tuple[Float[Tensor, "b 64"], Float[Tensor, "b 10"]]:
        """Pixels of 0..255 to (features, logits)."""
        x = self.bn1(self.conv1((x / 255 - self.mean) / self.std)).relu()
        features = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return features, self.linear(features)


@lru_cache(maxsize=2)
def _network(path: Path, content: str, device: torch.device) -> ResNet56:
    check_published(path, (PUBLISHED,))
    tensors = {name.removeprefix("module."): tensor for name, tensor in read_tensors(path).items()}
    with torch.inference_mode(False):
        network = ResNet56()
        wanted = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
        for name, meta in wanted.items():
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            if found != tuple(meta.shape):
                raise UserError(f"{path}: {name} is {found}, not {tuple(meta.shape)}: these are not those of ResNet-56")
        steps = {k: torch.zeros((), dtype=torch.long) for k in network.state_dict() if k not in wanted}
        network.load_state_dict({name: tensors[name].float() for name in wanted} | steps, assign=True)
        return network.to(device)


@dataclass(frozen=True)
class ResNet56Detector:
    """The 64 features, averaged over places, of a ResNet-56 that knows CIFAR-10's ten classes; float32 [n, 64].

    weights: the state dict of `PUBLISHED`, or of a network of the same shape. Images of 32x32 with 3 channels, or with
    1 that is repeated. Raises UserError for others, and for a damaged or foreign file.
    """

    weights: Path
    device: torch.device | str = "cpu"
    batch: int = 256
    name: str = "resnet56"

    @property
    def hash(self) -> str:
        return sha256(f"{sha256_of(self.weights)} {self.name}".encode()).hexdigest()

    def __call__(self, images: Images) -> Float[Tensor, "n 64"]:
        return self._measure(images)[0]

    def logits(self, images: Images) -> Float[Tensor, "n 10"]:
        """Of CIFAR-10's classes, in their usual order (airplane, automobile, bird, ...)."""
        return self._measure(images)[1]

    def accuracy(self, images: Images, labels: Int64[Tensor, " n"]) -> float:
        """Share of images whose likeliest class is their label."""
        return (self.logits(images).argmax(1).cpu() == labels.cpu()).double().mean().item()

    def check(self) -> ResNet56:
        """Reads the weights, or raises UserError."""
        return _network(self.weights.absolute(), sha256_of(self.weights), torch.device(self.device))

    def _measure(self, images: Images) -> tuple[Float[Tensor, "n 64"], Float[Tensor, "n 10"]]:
        if tuple(images.shape[1:]) not in ((1, 32, 32), (3, 32, 32)):
            shape = "x".join(map(str, images.shape[1:]))
            raise UserError(f"ResNet-56 sees images of 3x32x32 or 1x32x32, not {shape}: use Inception or pixels")
        network, device = self.check(), torch.device(self.device)
        with exact_float32(device):
            parts = [network(x.to(device).float().expand(-1, 3, -1, -1)) for x in images.split(self.batch)]
        return torch.cat([features for features, _ in parts]), torch.cat([logits for _, logits in parts])
