"""Many processes that train one model, by torch.distributed: who they are, what they tell one another, and how the
weights lie on them (copies: DDP; pieces: FSDP2; pieces within a group and copies between groups: HSDP)."""

import contextlib
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from onejump.model import ConsistencyModel

T = TypeVar("T")
REPLICATE, SHARD = "replicate", "shard"  # the two sides of the mesh of processes


@dataclass(frozen=True)
class Team:
    """This process and its peers. Alone by default; then every call below returns at once what it was given.

    rank of world; local_rank: on this machine. shard: how many processes share one copy of the weights (1: each has a
    copy of its own, world: there is one copy in all).
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    shard: int = 1
    mesh: DeviceMesh | None = None  # (world / shard) x shard, where shard > 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and talks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.shard > 1

    def barrier(self) -> None:
        """Returns when all have called it."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether it is so for one of them at least. The device is not waited for."""
        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes."""
        return tensor if self.world == 1 else _reduced(tensor, None)

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor) / self.world if self.world > 1 else tensor

    def shard_sum(self, tensor: Tensor) -> Tensor:
        """Over the processes that share one copy of the weights, each of which has summed up its own part."""
        return _reduced(tensor, self.mesh.get_group(SHARD)) if self.mesh else tensor

    def gathered(self, tensor: Tensor) -> Tensor:
        """The rows of all, in the order of their ranks; they may have different numbers of them."""
        if self.world == 1:
            return tensor
        sizes = [int(size) for size in self.all_told(len(tensor))]
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def told(self, value: Any = None) -> Any:
        """What the first process has passed, JSON; the others' values are ignored."""
        return self.all_told(value if self.first else None)[0]

    def all_told(self, value: Any) -> list[Any]:
        """What each has passed, JSON, in the order of their ranks."""
        if self.world == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros((), dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor(len(text)))
        most = max(map(int, sizes))
        parts = [torch.zeros(most, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, torch.cat([text, text.new_zeros(most - len(text))]))
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def wrap(self, model: ConsistencyModel, trained: bool) -> None:
        """Lets these processes run the model together, in place, on this team's device.

        Copies of it (averages, frozen networks) must have been made before. trained: the mean of the processes'
        gradients is taken in the backward pass.
        """
        if self.sharded:
            shard_in_place(model.net, self.mesh, trained)
        elif self.world > 1 and trained:
            model.through(replicated(model.net, self.device))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of those whose gradients the backward pass has left to each process: the mean, in place."""
        grads = [p.grad for p in parameters if p.grad is not None and not spread(p.grad)]
        if self.world == 1 or not grads:
            return
        flat = self.mean(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def leave(self) -> None:
        """The end of the work together."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _reduced(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    out = tensor.detach().clone()
    dist.all_reduce(out, group=group)
    return out


def replicated(net: nn.Module, device: torch.device) -> nn.Module:
    """DDP: what its backward pass leaves is the mean of all processes' gradients. Buffers never change in training."""
    ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():  # the name of this option changes in torch 2.13
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard_in_place(net: nn.Module, mesh: DeviceMesh | None, trained: bool) -> None:
    """FSDP2: each block of the network, and what is left of it, becomes a unit that is gathered when it is called.

    Parameters keep their names and become DTensors; those without dimensions stay as they are, on every process. The
    trained one stays gathered up to its backward pass, so that the target's pass finds it there; others are let go of.
    """
    from torch.distributed.fsdp import fully_shard

    assert mesh is not None
    warnings.filterwarnings(
        "ignore", "FSDP2-wrapped module", UserWarning
    )  # on in-place changes, of which there are none
    whole = mesh if mesh.size(0) > 1 else mesh[SHARD]
    left_out = {p for p in net.parameters() if p.ndim == 0}
    blocks = [block for block in getattr(net, "blocks", ()) if isinstance(block, nn.Module)]
    for block in blocks:
        own = {p for p in block.parameters() if p.ndim == 0}
        fully_shard(block, mesh=whole, reshard_after_forward=not trained, ignored_params=own)
    fully_shard(net, mesh=whole, reshard_after_forward=not trained, ignored_params=left_out)


def apart(model: ConsistencyModel) -> contextlib.AbstractContextManager[Any]:
    """Within it, a backward pass leaves its gradients to each process: all but the last of several micro-batches.

    Weights in pieces have their gradients summed up in every pass, which takes no memory for whole ones.
    """
    runner = model.runner
    return runner.no_sync() if isinstance(runner, DistributedDataParallel) else contextlib.nullcontext()


def spread(tensor: Tensor) -> bool:
    """Whether it lies in pieces on several processes, as a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # a second to import, which only those runs need that have any
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of it that lies on this process, as a plain tensor that shares its memory."""
    return cast(Any, tensor).to_local() if spread(tensor) else tensor


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """`part`, which belongs to this process's part of `tensor` (such as a moment of its gradient), spread as it is."""
    if not spread(tensor) or spread(part) or part.ndim != tensor.ndim:
        return part
    from torch.distributed.tensor import DTensor

    shape, stride, whole = tensor.shape, tensor.stride(), cast(Any, tensor)
    return DTensor.from_local(part, whole.device_mesh, whole.placements, run_check=False, shape=shape, stride=stride)


def in_turn(team: Team, make: Callable[[], T]) -> T:
    """What `make` returns on each process; on the first before the others, who find on the disk what it left."""
    if team.first:
        made = make()
    team.barrier()
    if not team.first:
        made = make()
    return made


def hollow(model: ConsistencyModel) -> ConsistencyModel:
    """The model without its numbers, for `whole`; to be made before `Team.wrap`."""
    return copy.deepcopy(model).to("meta")


def whole(model: ConsistencyModel, frame: ConsistencyModel, device: torch.device | str) -> ConsistencyModel:
    """A model that is in one piece on each process, with the numbers of `model`, in eval mode; all must call it."""
    made = copy.deepcopy(frame).to_empty(device=device).eval().requires_grad_(False)
    numbers = model.state_dict()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            value = numbers[name]
            tensor.copy_(value.full_tensor() if spread(value) else value)
    return made
