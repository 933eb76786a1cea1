"""Eight optimiser steps of the published ECT code: loss, gradients, RAdam and EMA of a real U-Net."""

import copy
import math
import zlib

import numpy as np
import torch
from golden_data import f32, f64, golden

from onejump.data.image_set import from_uint8
from onejump.ema import ConstantEMA
from onejump.methods.ect import ECT
from onejump.model import ConsistencyModel
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import RAdam
from onejump.times import Discretisation, LogNormal
from onejump.update import Updater


def recipe_weights(name, shape):
    """The golden run's first weights: pseudo-random numbers seeded by the parameter's name."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    if len(shape) == 1:
        w = name.endswith(".weight") + 0.1 * rng.standard_normal(shape)
    else:
        w = rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.tensor(np.round(w * 4096) / 4096, dtype=torch.float32)


def norms(tensors):
    return torch.stack([t.detach().double().norm() for t in tensors])


def relative(a, b):
    return ((a - f32(b)).abs() / f32(b).clamp_min(1e-3 * float(f32(b).max()))).max()


def test_eight_steps_of_ect(draws):
    data = golden("ect_8steps")
    config = SongUNetConfig(
        img_resolution=16, model_channels=16, channel_mult=(2, 2), num_blocks=1, attn_resolutions=(8,), dropout=0.0
    )
    model = ConsistencyModel(config.build())
    names = [name for name, _ in model.net.named_parameters()]
    for name, p in model.net.named_parameters():
        p.data.copy_(recipe_weights(f"model.{name}", p.shape))
    model.double()  # the published run was float32: its own rounding is then the only one
    published = [n.removeprefix("model.") for n in data["names"] if "resample_filter" not in n]
    order = [names.index(name) for name in published]
    parameters = [list(model.net.parameters())[i] for i in order]
    ema = copy.deepcopy(model)
    averages = [list(ema.net.parameters())[i] for i in order]
    start = [p.detach().clone() for p in parameters]
    updater = Updater(RAdam(), list(model.parameters()), [list(ema.parameters())])
    method = ECT(delta=Discretisation(q=2, double_every=1), c=0.0)
    for n in range(8):
        at = {key.split("/")[1]: value for key, value in data.items() if key.startswith(f"step{n}/")}
        draws(f64(at["eps"]), at["t"], LogNormal(-1.1, 2.0))
        loss, _ = method.loss(method.nets(model), from_uint8(torch.from_numpy(at["images_uint8"])).double(), None, 3, 8)
        loss.backward()
        torch.testing.assert_close(loss.detach(), f64(at["loss"]).mean(), rtol=2e-6, atol=0)
        tolerance = 1e-5 if n == 0 else 3e-5  # the weights have moved, in float32, on another machine
        assert relative(norms(p.grad for p in parameters), at["grad_norms"]) < tolerance
        updater.step(loss.detach(), 1e-4, [ConstantEMA(0.9999).decay(n + 1)], math.inf)
        moved = norms(p - q for p, q in zip(parameters, start, strict=True))
        assert relative(moved, at["delta_norms"]) < 5e-3  # differences of float32 weights
    for name in ("enc.16x16_conv.weight", "dec.16x16_aux_conv.weight", "map_layer0.bias"):
        i = published.index(name)
        torch.testing.assert_close(parameters[i].detach(), f64(data[f"final/model.{name}"]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(averages[i].detach(), f64(data[f"final_ema/model.{name}"]), rtol=1e-6, atol=1e-6)
