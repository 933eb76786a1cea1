"""A second computation of LPIPS, in float64, written out from the papers' tables, and random weights of its layout."""

import torch
import torch.nn.functional as F

# Convolutions as (index in torchvision's `features`, in, out, kernel, stride, padding), fire modules as (index, in,
# squeezed, expanded), "pool"; a number after "tap" is the head of the layer before it.
VGG = [(0, 3, 64), (2, 64, 64), "tap 0", "pool", (5, 64, 128), (7, 128, 128), "tap 1", "pool"]
VGG += [(10, 128, 256), (12, 256, 256), (14, 256, 256), "tap 2", "pool", (17, 256, 512), (19, 512, 512)]
VGG += [(21, 512, 512), "tap 3", "pool", (24, 512, 512), (26, 512, 512), (28, 512, 512), "tap 4"]
VGG = [layer if isinstance(layer, str) else (*layer, 3, 1, 1) for layer in VGG]
ALEX = [(0, 3, 64, 11, 4, 2), "tap 0", "pool", (3, 64, 192, 5, 1, 2), "tap 1", "pool", (6, 192, 384, 3, 1, 1), "tap 2"]
ALEX += [(8, 384, 256, 3, 1, 1), "tap 3", (10, 256, 256, 3, 1, 1), "tap 4"]
SQUEEZE = [(0, 3, 64, 3, 2, 0), "tap 0", "pool", (3, 64, 16, 64), (4, 128, 16, 64), "tap 1", "pool", (6, 128, 32, 128)]
SQUEEZE += [(7, 256, 32, 128), "tap 2", "pool", (9, 256, 48, 192), "tap 3", (10, 384, 48, 192), "tap 4"]
SQUEEZE += [(11, 384, 64, 256), "tap 5", (12, 512, 64, 256), "tap 6"]
PLANS = {"vgg": VGG, "alex": ALEX, "squeeze": SQUEEZE}
HEADS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
HEADS["squeeze"] = (64, 128, 256, 384, 384, 512, 512)
FILES = {"vgg": "vgg16-397923af", "alex": "alexnet-owt-7be5be79", "squeeze": "squeezenet1_1-b8a52dc0"}
FIRE = ((3, 2), (4, 3), (6, 4), (7, 5), (9, 6), (10, 7), (11, 8), (12, 9))  # our index, number of the module
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()


def random_weights(backbone: str) -> dict[str, torch.Tensor]:
    shapes = {}
    for layer in PLANS[backbone]:
        if len(layer) == 6:
            i, inside, out, kernel, *_ = layer
            shapes[f"features.{i}"] = (out, inside, kernel, kernel)
        elif not isinstance(layer, str):
            i, inside, squeezed, expanded = layer
            shapes[f"features.{i}.squeeze"] = (squeezed, inside, 1, 1)
            shapes[f"features.{i}.expand1x1"] = (expanded, squeezed, 1, 1)
            shapes[f"features.{i}.expand3x3"] = (expanded, squeezed, 3, 3)
    g = torch.Generator().manual_seed(len(shapes))
    tensors = {"classifier.0.weight": torch.zeros(2, 2)}
    for name, shape in shapes.items():
        fan_in = shape[1] * shape[2] * shape[3]
        tensors[f"{name}.weight"] = torch.randn(shape, generator=g) * (2 / fan_in) ** 0.5
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=g) * 0.1
    return tensors


def random_heads(backbone: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1, generator=g) for i, n in enumerate(HEADS[backbone])}


def interpolation(n: int, m: int) -> torch.Tensor:
    """[m, n]: linear interpolation at (i + 1/2) n/m - 1/2, the edge values going on outside."""
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        place = min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
        low = min(int(place), n - 2)
        matrix[i, low], matrix[i, low + 1] = 1 - (place - low), place - low
    return matrix


def pool_rows(x: torch.Tensor, kernel: int, ceil: bool, pooling: str) -> torch.Tensor:
    n = x.shape[-2]
    last = n - 1 if ceil else n - kernel
    starts = [i for i in range(0, last + 1, 2) if not ceil or i == 0 or i - 2 + kernel < n]
    rows = [x[..., i : i + kernel, :] for i in starts]
    return torch.stack([r.mean(-2) if pooling == "average" else r.amax(-2) for r in rows], -2)


def pool(x, backbone: str, pooling: str):
    kernel = 2 if backbone == "vgg" else 3
    rows = pool_rows(x, kernel, backbone == "squeeze", pooling)
    return pool_rows(rows.transpose(2, 3), kernel, backbone == "squeeze", pooling).transpose(2, 3)


def taps(standardised, w, backbone: str, pooling: str):
    def conv(x, name, stride=1, padding=0):
        return F.conv2d(x, w[f"{name}.weight"].double(), w[f"{name}.bias"].double(), stride, padding).clamp_min(0)

    x, outputs = standardised, []
    for layer in PLANS[backbone]:
        if layer == "pool":
            x = pool(x, backbone, pooling)
        elif isinstance(layer, str):
            outputs.append(x)
        elif len(layer) == 6:
            x = conv(x, f"features.{layer[0]}", *layer[4:])
        else:
            name = f"features.{layer[0]}"
            x = conv(x, f"{name}.squeeze")
            x = torch.cat([conv(x, f"{name}.expand1x1"), conv(x, f"{name}.expand3x3", 1, 1)], 1)
    return outputs


def reference(x, y, w, backbone: str, pooling: str, resize: int | None):
    sums = []
    for image in (x.double(), y.double()):
        if resize:
            matrix = interpolation(image.shape[-1], resize)
            image = matrix @ image @ matrix.T
        image = ((image + 1) / 2 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
        sums.append([f / f.square().sum(1, keepdim=True).sqrt() for f in taps(image, w, backbone, pooling)])
    total = 0
    for fx, fy, head in zip(*sums, random_heads(backbone).values(), strict=True):
        total = total + (head.double() * (fx - fy) ** 2).sum(1).mean((1, 2))
    return total
