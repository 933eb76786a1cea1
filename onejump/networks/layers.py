"""What the networks share: dropout whose mask is a function of a key, the embeddings of noise level and label, and how
one is built without weights.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from onejump.types import Cond, DropoutKey, Samples, Times, UserError

# The embedding of s, the time at which a jump ends: none; one that starts without effect, so that the network starts as
# its twin without it; or one that starts at random, as CTM's.
SecondTime = Literal["off", "zero", "random"]


def _signed(value: int, bits: int) -> int:
    """The integer that a two's complement word of `bits` bits holds after `value` overflowed it."""
    half = 1 << (bits - 1)
    return (value + half) % (2 * half) - half


def _shift_xor(h: Tensor, shift: int, bits: int) -> Tensor:
    """h ^ (h >>> shift) in place; torch's shift of signed words copies the sign bit, so it is masked away."""
    return h.bitwise_xor_((h >> shift).bitwise_and_((1 << (bits - shift)) - 1))


GAMMA = 0x9E3779B97F4A7C15  # splitmix64's step from one output to the next


def _key_words(key: Int64[Tensor, " b"], layer: int) -> Int32[Tensor, "b 2"]:
    """Output number `layer` of splitmix64 seeded with key, as two words: neighbouring keys share nothing."""
    h = key + _signed((layer + 1) * GAMMA, 64)
    h = _shift_xor(h, 30, 64).mul_(_signed(0xBF58476D1CE4E5B9, 64))
    h = _shift_xor(h, 27, 64).mul_(_signed(0x94D049BB133111EB, 64))
    return _shift_xor(h, 31, 64).unsqueeze(1).view(torch.int32)


def shifted_key(key: Int64[Tensor, " b"], layers: int) -> Int64[Tensor, " b"]:
    """The key that gives layer i the mask that `key` gives layer i + layers."""
    return key + _signed(layers * GAMMA, 64)


def dropout_mask(x: Samples, key: Int64[Tensor, " b"], layer: int, p: float) -> Samples:
    """What keyed_dropout multiplies x with: 0 or 1 / (1 - p), in the dtype of x and laid out as x is in memory."""
    k0, k1 = _key_words(key, layer).split(1, dim=1)
    i = torch.arange(math.prod(x.shape[1:]), dtype=torch.int32, device=x.device)
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if channels_last:
        i = i.view(x.shape[1:]).permute(1, 2, 0).flatten()
    h = (i * _signed(0x9E3779B1, 32)) ^ k0
    h = h.mul_(_signed(0x85EBCA6B, 32))
    h = _shift_xor(h, 16, 32).mul_(k1 | 1)
    h = _shift_xor(h, 15, 32).mul_(_signed(0xC2B2AE35, 32))
    keep = h.ge_(round(p * 2**32) - 2**31)  # h was uniform on [-2^31, 2^31); as 0/1 words, bools are slow on the CPU
    keep = keep.view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2) if channels_last else keep.view(x.shape)
    return keep.to(x.dtype).mul_(1 / (1 - p))


class _KeyedDropout(torch.autograd.Function):
    """Keeps the keys alone for the backward pass, which makes the mask again."""

    @staticmethod
    def forward(x: Tensor, key: Tensor, layer: int, p: float) -> Tensor:
        return x * dropout_mask(x, key, layer, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, key, ctx.layer, ctx.p = inputs
        ctx.save_for_backward(key)
        ctx.save_for_forward(key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (key,) = ctx.saved_tensors
        return keyed_dropout(grad, key, ctx.layer, ctx.p), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Any:
        (key,) = ctx.saved_tensors
        return keyed_dropout(tangent, key, ctx.layer, ctx.p)


def keyed_dropout(x: Samples, key: Int64[Tensor, " b"], layer: int, p: float) -> Samples:
    """Zero each element of x with probability p and scale the others by 1 / (1 - p).

    Whether element i of sample b is kept is a pure function of (key[b], layer, i): a hash in 32-bit integers, with no
    generator behind it. Equal keys give equal masks in every network, batch, device, layout and compiled graph.
    """
    if torch.compiler.is_compiling():  # which knows no Function with a jvp, and itself finds what to make again
        return x * dropout_mask(x, key, layer, p)
    return _KeyedDropout.apply(x, key, layer, p)


def new_keys(n: int, device: torch.device) -> Int64[Tensor, " n"]:
    """n fresh dropout keys from torch's generator."""
    return torch.randint(2**63 - 1, (n,), device=device)


class Dropout(nn.Module):
    """Keyed dropout in train mode, the identity in eval mode. `layer` numbers the dropout layers of one network."""

    def __init__(self, p: float, layer: int):
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"dropout={p}: a probability in [0, 1) is needed")
        self.p, self.layer = p, layer

    def forward(self, x: Samples, key: DropoutKey) -> Samples:
        if not self.training or self.p == 0:
            return x
        return keyed_dropout(x, new_keys(len(x), x.device) if key is None else key, self.layer, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, layer={self.layer}"


def sinusoidal(c_noise: Times, frequencies: Float[Tensor, " n"]) -> Float[Tensor, "b 2*n"]:
    """[sin(w c_noise), cos(w c_noise)] for each angular frequency w."""
    angle = c_noise[:, None] * frequencies.to(c_noise)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def label_vectors(cond: Cond, label_dim: int, x: Samples, augment_dim: int = 0) -> Float[Tensor, "b d"]:
    """cond as one float vector a sample, label_dim numbers and then augment_dim, on x's device and in its dtype.

    int64 [b] class labels become one-hot vectors (all zero for a class outside [0, label_dim): looking would stall the
    device), float [b, label_dim + augment_dim] vectors are taken as they are, None becomes zeros: "no label". Classes,
    and vectors [b, label_dim], have the augmentation labels 0: "not augmented".
    Raises UserError where the shape of cond does not fit the network.
    """
    n, width = x.shape[0], label_dim + augment_dim
    if cond is None:
        return x.new_zeros(n, width)
    if width == 0:
        raise UserError("cond: labels were given to a network without classes (label_dim=0); pass cond=None")
    fits = cond.shape[:1] == (n,)
    if fits and cond.ndim == 1 and not cond.is_floating_point() and label_dim:
        cond = (cond[:, None] == torch.arange(label_dim, device=x.device)).to(x.dtype)
    if fits and cond.ndim == 2 and cond.is_floating_point() and cond.shape[1] in (label_dim, width):
        return pad(cond.to(x), (0, width - cond.shape[1]))
    raise UserError(
        f"cond: {cond.dtype} of shape {tuple(cond.shape)} does not fit; pass "
        + (f"int64 [{n}] class labels or " if label_dim else "")
        + f"float [{n}, {width}] vectors"
    )


def check_choice(field: str, value: str, choices: Any) -> None:
    """Raise UserError if the value of a field is none of those that its type, a Literal, names."""
    if value not in get_args(choices):
        raise UserError(f"{field}={value!r}: pick from {', '.join(get_args(choices))}")


def embeds_second_time(second_time: SecondTime) -> bool:
    """Whether a network with this field reads c_noise_s. Raises UserError if the field holds anything else."""
    check_choice("second_time", second_time, SecondTime)
    return second_time != "off"


def check_second_time(c_noise_s: Times | None, second_time: SecondTime, network: str) -> None:
    """Raise UserError if a second time is given to a network that has no embedding for it, or is missing."""
    if second_time == "off" and c_noise_s is not None:
        raise UserError(
            f"c_noise_s: {network} embeds one time only; use a jump that ends at the data (s=None), "
            'or build it with second_time="zero"'
        )
    if second_time != "off" and c_noise_s is None:
        raise UserError(
            f'c_noise_s: {network} with second_time="{second_time}" needs the time s at which the jump ends; '
            "use ConsistencyModel(..., second_time=True)"
        )


@runtime_checkable
class Buildable(Protocol):
    """The configuration of a network."""

    def build(self) -> nn.Module: ...


class NothingDrawn(TorchFunctionMode):
    """Weights get no memory, and what would be drawn at random no values; the few constants are computed.

    With torch.device("meta") instead, torch would import its compiler to compute those, for seconds.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:  # of torch's layers
            return func(*args, **kwargs | {"device": "meta"})
        if func is nn.init.normal_:
            return kwargs["tensor"]
        return (torch.empty if func in (torch.randn, torch.rand) else func)(*args, **kwargs)


def empty_network(network: Buildable) -> nn.Module:
    """The network on the meta device: names, shapes and kinds of its weights, and no memory for them."""
    with NothingDrawn():
        net = network.build()
    return net.to("meta")
