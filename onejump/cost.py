"""What a network costs, found without running it: parameters, FLOPs and memory, counted on tensors without data."""

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from onejump.config import Network
from onejump.networks.mlp import MLPConfig
from onejump.networks.text_unet import TextUNetConfig

TRAINED_COPIES = 5  # weights, gradients, Adam's two moments, EMA


@dataclass(frozen=True)
class Cost:
    """Of a network with float32 weights, and of its passes over `batch` images; all memory in bytes.

    flops: of one pass over one image. A multiply-add counts as 2; only matrix products and convolutions count.
    maps: the most that a pass without gradients holds at once besides the weights, workspaces of kernels left out.
    kept: what a pass in training keeps for its backward pass besides the weights.
    """

    batch: int
    parameters: int
    weights: int
    flops: int
    maps: int
    kept: int

    @property
    def sampling(self) -> int:
        return self.weights + self.maps

    @property
    def training(self) -> int:
        return TRAINED_COPIES * self.weights + self.kept


def cost_of(network: Network, batch: int) -> Cost:
    """Counts on tensors without data, as a CPU would lay them out.

    Attention keeps no matrix of weights, as the fused kernels of real devices; its FLOPs are those of its two products.
    """
    with FakeTensorMode():
        net = network.build()
        with torch.no_grad(), Live() as live:
            _pass(net.eval(), network, batch)
        kept: dict[int, int] = {}
        with counting_kept(kept, net):
            out = _pass(net.train(), network, batch)
        return Cost(
            batch=batch,
            parameters=sum(p.numel() for p in net.parameters()),
            weights=bytes_of(net),
            flops=flops_of(net, network),
            maps=live.peak,
            kept=sum(kept.values()) if out.requires_grad else 0,
        )


def flops_of(net: nn.Module, network: Network) -> int:
    """Of one pass over one image, on the default device."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _pass(net, network, 1)
    return counter.get_total_flops()


def _pass(net: nn.Module, network: Network, batch: int) -> Tensor:
    """One call, with the arguments that this network wants."""
    t = torch.ones(batch)
    s = None if network.second_time == "off" else t
    return net(torch.zeros(batch, *shape_of(network)), t, s, blank_cond(network, batch))


def blank_cond(network: Network, n: int) -> Tensor | None:
    """What the network is told of n images: the first class of each, a text of zeros, or nothing."""
    if isinstance(network, TextUNetConfig):
        return torch.zeros(n, network.tokens, network.text_width)
    return torch.zeros(n, dtype=torch.int64) if network.label_dim else None


def shape_of(network: Network) -> tuple[int, ...]:
    """Of one image."""
    if isinstance(network, MLPConfig):
        return network.shape
    return network.img_channels, network.img_resolution, network.img_resolution


def bytes_of(net: nn.Module, shard: int = 1) -> int:
    """Of its parameters; where `shard` processes share a copy of them, of the largest part (distributed.py)."""
    return sum(part_of(p, shard) * p.element_size() for p in net.parameters())


def part_of(p: Tensor, shard: int) -> int:
    """Numbers of the largest part: rows are divided, and what has none is everywhere."""
    return p.numel() if p.ndim == 0 else -(-len(p) // shard) * (p.numel() // len(p))


@dataclass
class Unit:
    """Parameters that lie in pieces and are gathered together, of a network of fake weights: where `follow` has given
    it a module, that module's passes allocate what those of FSDP2 would (distributed.shard_in_place).

    trained: they stay gathered up to the backward pass, at whose end their gradients are divided. messages: the last
    one of each kind, of all units, which stays until the next is there.
    """

    parameters: list[nn.Parameter]
    shard: int
    trained: bool
    messages: dict[str, Tensor]
    gathered: Tensor | None = None
    part: Tensor | None = None  # of the gradients
    arrived: int = 0

    def follow(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda module, args: self.gather())
        if not self.trained:
            module.register_forward_hook(lambda module, args, out: self.let_go())
        for p in self.parameters if self.trained else ():
            p.register_post_accumulate_grad_hook(lambda p: self.divide())

    def gather(self) -> None:
        if self.gathered is None:
            self.messages["gather"] = self.room()
            self.gathered = self.room()

    def let_go(self) -> None:
        self.gathered = None

    def divide(self) -> None:
        """Once all gradients are there."""
        self.arrived += 1
        if self.arrived < len(self.parameters):
            return
        self.arrived = 0
        self.messages.pop("divide", None)
        self.messages["divide"] = self.room()
        for p in self.parameters:
            p.grad = None
        if self.part is None:
            self.part = torch.empty(sum(part_of(p, self.shard) for p in self.parameters))
        self.let_go()

    def room(self) -> Tensor:
        return torch.empty(sum(p.numel() for p in self.parameters))


def follow_pieces(net: nn.Module, shard: int, trained: bool) -> list[Unit]:
    """From here on, passes of this network of fake weights allocate what they would if it lay in pieces."""
    blocks, taken = list(getattr(net, "blocks", ())), set[nn.Parameter]()
    units, messages = [], dict[str, Tensor]()
    for module in (*blocks, net):
        own = [p for p in module.parameters() if p.ndim and p not in taken]
        taken.update(own)
        if own:
            units.append(Unit(own, shard, trained, messages))
            units[-1].follow(module)
    return units


def counting_kept(sizes: dict[int, int], *nets: nn.Module) -> saved_tensors_hooks:
    """A context that enters into `sizes` the bytes of each storage that autograd keeps, but for the nets' own weights.

    The keys are unique only as long as the graph lives: read the sum before its backward pass.
    """
    own = {w.untyped_storage()._cdata for net in nets for part in (net.parameters(), net.buffers()) for w in part}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    return saved_tensors_hooks(count, lambda tensor: tensor)


class Live(TorchDispatchMode):
    """Follows the bytes of all tensors made inside this context; `peak` is the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known | given:
                self._enter(storage)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def in_words(size: float) -> str:
    """Bytes as KiB, MiB, or GiB."""
    if size < 0.1 * 2**20:
        return f"{size / 2**10:,.1f} KiB"
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def gflop(flops: int) -> str:
    """10^9 operations to four digits, never with an exponent."""
    digits = max(0, 3 - math.floor(math.log10(flops / 1e9))) if flops else 0
    return f"{flops / 1e9:,.{min(digits, 6)}f}"
