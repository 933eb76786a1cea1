"""The golden networks' weights under the names of the published code, and comparison with their numbers."""

import math
import zlib

import numpy as np
import torch
from network_setup import recipe, relative_error


def recipe_of(name, shape):
    """As recipe, also for Fourier frequencies."""
    if not name.endswith(".freqs"):
        return recipe(name, shape)
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return torch.tensor(16 * rng.standard_normal(shape), dtype=torch.float32)


def recipe_of_jax(path, shape):
    """The JAX network's weights: kernels are [height, width, in, out]."""
    rng = np.random.RandomState(zlib.crc32(b"jax/" + path.encode()) & 0x7FFFFFFF)
    w = rng.standard_normal(shape)
    if path.startswith("GaussianFourierProjection"):
        w = 16 * w
    elif len(shape) == 1:
        w = path.endswith("/scale") + 0.1 * w
    else:
        w = np.round(w / math.sqrt(math.prod(shape[:-1])) * 4096) / 4096
    return torch.tensor(w, dtype=torch.float32)


def shapes_of(z, prefix=""):
    """{name: shape} as the golden files list them."""
    names, shapes = z[f"{prefix}names"].tolist(), z[f"{prefix}shapes"].tolist()
    return {name: tuple(map(int, shape.split("x"))) for name, shape in zip(names, shapes, strict=True)}


def with_golden_weights(net, prefix=""):
    """Strict: whatever the published network has, also its frequencies and filters, is ours too."""
    weights = {name: recipe_of(prefix + name, v.shape) for name, v in net.state_dict().items() if "filter" not in name}
    filters = {name: v for name, v in net.state_dict().items() if "filter" in name}
    net.load_state_dict(weights | filters)
    return net


def parameters_of(config):
    """(network, number of its parameters) without memory for either."""
    with torch.device("meta"):
        net = config.build()
    return net, sum(p.numel() for p in net.parameters())


def assert_equal_in_both_precisions(net, args, in_float32, in_float64, small=1e-10):
    net.eval()
    assert relative_error(net(*args), in_float32) < 1e-5
    args = [v.double() if v is not None and v.is_floating_point() else v for v in args]
    assert relative_error(net.double()(*args), in_float64) < small


def assert_gradients_equal(net, args, z):
    """In float64, so that the float32 rounding of the golden numbers is the only error."""
    x, *others = (v.double() if v is not None else None for v in args)
    net.double()(x.requires_grad_(), *others).mul(z["in/proj"]).sum().backward()
    grad = {name: p.grad for name, p in net.named_parameters()} | {"x": x.grad}
    names = [k.removeprefix("grad/") for k in z if k.startswith("grad/") and k != "grad/_all_norm"]
    assert len(names) >= 3
    for name in names:
        assert relative_error(grad[name], z[f"grad/{name}"]) < 1e-5, name
    norms = torch.stack([p.grad.norm() for p in net.parameters()])
    assert ((norms - z["grad/_all_norm"]) / norms).abs().max() < 1e-5
