"""How networks are run: layout in memory, compilation, activation checkpointing. No result changes beyond rounding.

A network names its repeated parts in `blocks`, in the order of their calls; each is called with maps first and the
dropout keys last. They are what is compiled and checkpointed; a network without blocks is taken as a whole.
"""

import functools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from onejump.model import ConsistencyModel
from onejump.networks.layers import Dropout, new_keys, shifted_key

Forward = Callable[..., Any]  # to a map, or several
MOST_GRAPHS = 32  # of one kind of block: sizes of maps, with and without gradients
Backend = str | Callable[..., Any]  # of torch.compile


@runtime_checkable
class InBlocks(Protocol):
    """A network made of repeated parts."""

    @property
    def blocks(self) -> Iterable[nn.Module]: ...


@dataclass(frozen=True)
class Engine:
    """compiled: the blocks are compiled, one graph a kind of block. channels_last: weights and maps are laid out so."""

    compiled: bool = False
    channels_last: bool = False

    @classmethod
    def for_device(cls, device: torch.device) -> "Engine":
        """What is fastest there: channels_last, which the large convolutions like, and on CUDA blocks compiled.

        A CPU's compiler takes minutes and gains nothing.
        """
        return cls(compiled=device.type == "cuda", channels_last=True)

    def prepare(self, model: ConsistencyModel, checkpointing: bool = False, backend: Backend = "inductor") -> None:
        """Changes how model.net runs, in place; its parameters keep their names and values.

        checkpointing: blocks keep their input alone for the backward pass, which calls them again (one pass in four
        more). To be called after the last copy of the model and before it is wrapped or sharded. backend: of
        torch.compile.
        """
        if self.channels_last:
            net: Any = model.net
            net.to(memory_format=torch.channels_last)
        kinds: dict[str, Forward] = {}
        for block in blocks_of(model.net):
            forward: Forward = block.forward
            if self.compiled:
                forward = compiled(block, kinds, backend)
            if checkpointing:
                forward = functools.partial(checkpointed, forward)
            if self.compiled or checkpointing:
                block.forward = forward  # as its own attribute; hooks, such as a sharded block's, run around it


def blocks_of(net: nn.Module) -> list[nn.Module]:
    return list(net.blocks) if isinstance(net, InBlocks) else [net]


def checkpointed(forward: Forward, *args: Any) -> Any:
    """No state of a generator is kept: what is dropped is a function of the keys, which are drawn before."""
    *maps, key = args
    key = new_keys(len(maps[0]), maps[0].device) if key is None else key
    return checkpoint(forward, *maps, key, use_reentrant=False, preserve_rng_state=False)


def compiled(block: nn.Module, kinds: dict[str, Forward], backend: Backend) -> Forward:
    """The block's forward, compiled; blocks of one kind share their graphs.

    torch keeps graphs, at most 8, with the code of a function, so every kind gets a copy of that code. Its graphs
    are one for each size of the maps, with and without gradients. Without gradients the number of rows is left open,
    since the target's changes from step to step.
    """
    shift = number_from_zero(block)
    kind = repr((block, plain_attributes(block)))
    if kind not in kinds:
        kinds[kind] = copied(type(block).forward, f"forward_{len(kinds)}")
    trains = any(p.requires_grad for p in block.parameters())
    torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    run = torch.compile(types.MethodType(kinds[kind], block), dynamic=False, backend=backend)

    def forward(*args: Any) -> Any:
        *maps, key = args
        key = None if key is None else shifted_key(key, shift)
        if not (trains and torch.is_grad_enabled()):  # targets: as many rows as need one
            for tensor in (*maps, key):
                if tensor is not None:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return run(*maps, key)

    return forward


def number_from_zero(block: nn.Module) -> int:
    """Numbers the block's dropout layers from 0, so that blocks of a kind are equal; returns the first's old number."""
    layers = [module for module in block.modules() if isinstance(module, Dropout)]
    first = min((layer.layer for layer in layers), default=0)
    for layer in layers:
        layer.layer -= first
    return first


def plain_attributes(block: nn.Module) -> dict[str, Any]:
    """What a block is besides its parts, which its repr already tells."""
    return {name: value for name, value in vars(block).items() if not name.startswith("_")}


def copied(function: Any, name: str) -> Forward:
    """The same function with code of its own."""
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
