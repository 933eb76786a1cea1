"""Files of the published layouts with the golden networks' weights, and the names and shapes of the full-size ones."""

import math
import struct
import zlib
from dataclasses import dataclass, field

import foreign_files
import numpy as np
import torch
from golden_data import golden

from onejump.networks import SongUNetConfig

NAMES = golden("imports")
TINY_SONG = {
    **{"img_resolution": 16, "img_channels": 3, "use_fp16": False, "model_type": "SongUNet", "model_channels": 16},
    **{"channel_mult": [2, 2], "num_blocks": 2, "attn_resolutions": [8], "dropout": 0.0, "decoder_type": "standard"},
}
DDPMPP = {
    **{"embedding_type": "positional", "encoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1]},
}
NCSNPP = {
    **{"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2},
    **{"resample_filter": [1, 3, 3, 1]},
}
LABELS = {"label_dim": 10, "augment_dim": 9}
TINY_EDM2 = {
    **{"img_resolution": 16, "img_channels": 3, "label_dim": 10, "model_channels": 16, "channel_mult": [1, 2]},
    **{"num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 16},
}
SMALLEST = TINY_SONG | DDPMPP | {"img_resolution": 8, "model_channels": 4, "channel_mult": [1, 1], "num_blocks": 1}
FILTERS = {"2": [1, 1], "4": [1, 3, 3, 1]}


def shapes(case, file=NAMES):
    pairs = zip(file[f"{case}/names"].tolist(), file[f"{case}/shapes"].tolist(), strict=True)
    return {name: tuple(int(n) for n in shape.split("x") if n) for name, shape in pairs}


def recipe(name, shape):
    """The golden networks' weights: pseudo-random numbers seeded by the name."""
    leaf, rng = name.split(".")[-1], np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    if leaf == "resample_filter":
        row = torch.tensor(FILTERS[str(shape[-1])]) / sum(FILTERS[str(shape[-1])])
        return torch.outer(row, row)[None, None]
    if leaf in ("freqs", "phases"):
        draw = rng.standard_normal if leaf == "freqs" else rng.random_sample
        return torch.tensor(draw(shape) * (16 if "map_noise" in name else 2 * math.pi)).float()
    if not shape:
        w = 0.5 + 0.1 * rng.standard_normal()
    elif len(shape) == 1:
        w = (leaf == "weight") + 0.1 * rng.standard_normal(shape)
    else:
        w = rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
    return torch.tensor(np.round(w * 4096) / 4096).float()


def weights(case, file=NAMES):
    return {name: recipe(name, shape) for name, shape in shapes(case, file).items()}


def smallest():
    """Of the network that SMALLEST describes, where no golden numbers are needed: reading takes a tenth of the time."""
    net = SongUNetConfig(8, 3, 0, 4, (1, 1), 1, (8,)).build()
    return {f"model.{name}": w for name, w in net.state_dict().items()}


def module(tensors, class_name, arguments):
    """EDM's preconditioning class around its network, as torch_utils.persistence keeps it."""
    inner = "unet" if class_name == "Precond" else "model"
    classes = {"": (class_name, arguments), inner: (arguments.get("model_type", "UNet"), arguments)}
    buffers = {name for name in tensors if name.split(".")[-1] in ("freqs", "phases", "resample_filter")}
    return foreign_files.network(tensors, classes, buffers, {"": {"sigma_data": 0.5, "use_fp16": False}})


def snapshot(path, tensors, class_name, arguments, loss=None, **others):
    """As EDM, EDM2, ECT and TCM save: {"ema": network, "loss_fn": ..., "augment_pipe": ..., "dataset_kwargs": ...}."""
    content = {"ema": module(tensors, class_name, arguments), "loss_fn": loss, "augment_pipe": None}
    return foreign_files.write_pickle(path, content | {"dataset_kwargs": {"path": "cifar10.zip"}} | others)


class ECTLoss(foreign_files.PersistentObject):
    """ECT's loss keeps a method of its own as an attribute, which pickle writes as getattr(loss, its name)."""

    def __init__(self):
        super().__init__("ECMLoss", {"P_mean": -1.1}, P_mean=-1.1, P_std=2.0, sigma_data=0.5, q=2, stage=3, c=0.0)
        self.state["t_to_r"] = self.t_to_r_sigmoid

    def t_to_r_sigmoid(self, t): ...


def tcm_loss(t_lower):
    about = {"P_mean": 0.0, "P_std": 0.2, "t_lower": t_lower, "t_upper": 80, "tdist": "t", "df": 0.01, "q": 2}
    modules = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    return foreign_files.PersistentObject("ECMLoss", about, **modules, **about, boundary_prob=0.25)


@dataclass
class OpenAIShapes:
    """Names and shapes as OpenAI's UNetModel makes them. attention: the levels that have it."""

    channels: int
    mult: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    classes: int = 0
    scale_shift: bool = True
    updown: bool = True
    two_times: bool = False
    found: dict = field(default_factory=dict)

    def layer(self, name, *shape):
        self.found[f"{name}.weight"], self.found[f"{name}.bias"] = shape, shape[:1]

    def block(self, name, c_in, c_out):
        self.layer(f"{name}.in_layers.0", c_in)
        self.layer(f"{name}.in_layers.2", c_out, c_in, 3, 3)
        for part in ("emb_layers", "emb_layers_s")[: 1 + self.two_times]:
            self.layer(f"{name}.{part}.1", c_out * (1 + self.scale_shift), 4 * self.channels)
        self.layer(f"{name}.out_layers.0", c_out)
        self.layer(f"{name}.out_layers.3", c_out, c_out, 3, 3)
        if c_in != c_out:
            self.layer(f"{name}.skip_connection", c_out, c_in, 1, 1)

    def attend(self, name, c):
        self.layer(f"{name}.norm", c)
        self.layer(f"{name}.qkv", 3 * c, c, 1, 1)
        self.layer(f"{name}.proj_out", c, c, 1, 1)

    def resample(self, name, convolution, c):
        if self.updown:
            self.block(name, c, c)
        else:
            self.layer(f"{name}.{convolution}", c, c, 3, 3)

    def embedding(self):
        emb = 4 * self.channels
        for part in ("time_embed", "time_embed_s")[: 1 + self.two_times]:
            self.layer(f"{part}.0", emb, self.channels)
            self.layer(f"{part}.2", emb, emb)
        if self.classes:
            self.found["label_emb.weight"] = (self.classes, emb)

    def encoder(self):
        """Returns the channels of the maps that are kept for the decoder."""
        self.layer("input_blocks.0.0", self.channels, 3, 3, 3)
        kept = [self.channels]
        for level, m in enumerate(self.mult):
            for _ in range(self.blocks):
                self.block(f"input_blocks.{len(kept)}.0", kept[-1], m * self.channels)
                if level in self.attention:
                    self.attend(f"input_blocks.{len(kept)}.1", m * self.channels)
                kept.append(m * self.channels)
            if level < len(self.mult) - 1:
                self.resample(f"input_blocks.{len(kept)}.0", "op", kept[-1])
                kept.append(kept[-1])
        return kept

    def decoder(self, kept):
        last, n = kept[-1], 0
        self.block("middle_block.0", last, last)
        self.attend("middle_block.1", last)
        self.block("middle_block.2", last, last)
        for level, m in reversed(list(enumerate(self.mult))):
            for i in range(self.blocks + 1):
                self.block(f"output_blocks.{n}.0", last + kept.pop(), m * self.channels)
                last, attends = m * self.channels, level in self.attention
                if attends:
                    self.attend(f"output_blocks.{n}.1", last)
                if level and i == self.blocks:
                    self.resample(f"output_blocks.{n}.{1 + attends}", "conv", last)
                n += 1


def openai_shapes(*sizes, **how):
    net = OpenAIShapes(*sizes, **how)
    net.embedding()
    net.decoder(net.encoder())
    net.layer("out.0", net.channels)
    net.layer("out.2", 3, net.channels, 3, 3)
    return net.found


def recipe_of_jax(path, shape):
    """The JAX network's weights: kernels are [height, width, in, out]."""
    w = np.random.RandomState(zlib.crc32(b"jax/" + path.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if path.startswith("GaussianFourierProjection"):
        return (16 * w).astype(np.float32)
    if len(shape) == 1:
        return (path.endswith("/scale") + 0.1 * w).astype(np.float32)
    return (np.round(w / math.sqrt(math.prod(shape[:-1])) * 4096) / 4096).astype(np.float32)


def msgpack(value):
    """MessagePack as flax writes it: the shortest form of everything, arrays as extension 1."""
    if isinstance(value, np.ndarray):
        inner = msgpack([list(value.shape), value.dtype.name, value.tobytes()])
        fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}.get(len(inner))
        head = bytes([fixed]) if fixed else sized(len(inner), {1: 0xC7, 2: 0xC8, 4: 0xC9})
        return head + b"\x01" + inner
    if isinstance(value, bytes):
        return sized(len(value), {1: 0xC4, 2: 0xC5, 4: 0xC6}) + value
    if isinstance(value, str):
        text = value.encode()
        short = bytes([0xA0 | len(text)]) if len(text) < 32 else sized(len(text), {1: 0xD9, 2: 0xDA, 4: 0xDB})
        return short + text
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, int):
        return bytes([value]) if value < 0x80 else sized(value, {1: 0xCC, 2: 0xCD, 4: 0xCE})
    n = len(value)
    if isinstance(value, list):
        return (bytes([0x90 | n]) if n < 16 else sized(n, {2: 0xDC, 4: 0xDD})) + b"".join(map(msgpack, value))
    head = bytes([0x80 | n]) if n < 16 else sized(n, {2: 0xDE, 4: 0xDF})
    return head + b"".join(msgpack(part) for pair in value.items() for part in pair)


def sized(n, kinds):
    """The shortest of these lengths that can hold n."""
    width = next(width for width in kinds if n < 256**width)
    return bytes([kinds[width]]) + n.to_bytes(width, "big")


def nested(flat):
    """{"a/b": x} -> {"a": {"b": x}}."""
    found = {}
    for path, value in flat.items():
        *above, leaf = path.split("/")
        inner = found
        for part in above:
            inner = inner.setdefault(part, {})
        inner[leaf] = value
    return found


def jax_checkpoint(path, arrays, **others):
    """A flax checkpoint of consistency_models_cifar10, whose parameters without average are noise."""
    noise = {name: np.zeros_like(array) for name, array in arrays.items() if name.startswith("Dense")}
    numbers = {"step": 800000, "lr": 4e-4, "ema_rate": 0.9999}  # flax writes them as arrays without axes
    state = {name: np.array(number, np.float32) for name, number in numbers.items()}
    state |= {"params": nested(noise), **others}
    state |= {"params_ema": nested(arrays), "model_state": {}, "opt_state": {"0": {"count": np.array(7, np.int32)}}}
    path.write_bytes(msgpack(state | {"rng_state": {"0": np.arange(2, dtype=np.uint32)}}))
    return path
