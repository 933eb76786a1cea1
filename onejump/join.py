"""How the processes of a team find one another: the environment of torchrun, or of a step of Slurm."""

import datetime
import os
import re
import time
import uuid
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from onejump.distributed import REPLICATE, SHARD, Team
from onejump.types import UserError

TIMEOUT = datetime.timedelta(hours=2)  # of a wait for the others, who may be evaluating; launchers see deaths at once


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun, or a step of Slurm, states them.

    {} for a process of its own. Raises UserError for a statement that cannot be.
    """
    if "WORLD_SIZE" in env or "RANK" in env:
        theirs = {"RANK": "RANK", "WORLD_SIZE": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_RANK"}
        found = {"LOCAL_RANK": "0"} | {
            name: env[name] for name in (*theirs, "MASTER_ADDR", "MASTER_PORT") if env.get(name)
        }
    elif "SLURM_STEP_ID" in env:
        theirs = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        found = {name: env[variable] for name, variable in theirs.items() if env.get(variable)}
        found["MASTER_ADDR"] = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", ""))
        found["MASTER_PORT"] = env.get("MASTER_PORT") or str(20_000 + int(env.get("SLURM_JOB_ID", "0")) % 20_000)
    else:
        return {}
    for name, variable in theirs.items():
        if not found.get(name, "").isdecimal():
            raise UserError(f"{variable}: {found.get(name, 'not set')}; a number is needed: start by torchrun or srun")
    rank, world = int(found["RANK"]), int(found["WORLD_SIZE"])
    if rank >= world:
        raise UserError(f"{theirs['RANK']}: {rank}; {theirs['WORLD_SIZE']}={world} needs a smaller one")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in found]
    if world > 1 and missing:
        raise UserError(f"{missing[0]}: not set, but there are {world} processes; start by torchrun or srun")
    return found if world > 1 else {}


def first_host(nodes: str) -> str:
    """The first of Slurm's list of machines: "gpu[07-09,12],login1" gives gpu07."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if not match:
        raise UserError("SLURM_STEP_NODELIST: not set; set MASTER_ADDR to the machine of rank 0")
    return match[1] + (match[2] or "")


def join(device: str | None = None, shard: int = 1) -> Team:
    """Meets the processes that were started with this one, by torchrun or srun; alone if there are none.

    device: None for the GPU of this process where there is one, else the CPU. Raises UserError for an environment
    that cannot be, for a GPU that is not there, and for `shard` that does not divide the processes.
    """
    found = environment(os.environ)
    if not found:
        if shard > 1:
            raise UserError(f"--shard {shard}: so many processes share the weights, and there is one; see torchrun")
        return Team(device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    os.environ.update(found)
    rank, world, local_rank = (int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if shard < 1 or world % shard:
        divisors = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise UserError(f"--shard {shard}: does not divide {world} processes; use one of {divisors}")
    own = own_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    store, _, _ = next(iter(dist.rendezvous("env://", rank, world, timeout=TIMEOUT)))
    dist.init_process_group(backend, store=unused(store, rank, world), timeout=TIMEOUT, rank=rank, world_size=world)
    mesh = None
    if shard > 1:
        mesh = init_device_mesh(own.type, (world // shard, shard), mesh_dim_names=(REPLICATE, SHARD))
    return Team(rank, world, local_rank, own, shard, mesh)


def unused(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of the store in which no earlier attempt of these processes has left anything.

    Launchers keep the store when they start dead processes again, and those would read the addresses of the dead. So
    the first process names a part that is new, in answer to a question that nobody has asked before.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"question/{rank}", own)
        part = store.get(f"answer/{own}").decode()  # waits for it
        store.set(f"heard/{part}/{rank}", "")
        return dist.PrefixStore(part, store)
    waiting = set(range(1, world))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"question/{other}"]):  # an old one, perhaps: then its answer is read by none
                store.set(f"answer/{store.get(f'question/{other}').decode()}", own)
        waiting = {other for other in waiting if not store.check([f"heard/{own}/{other}"])}
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


def own_device(device: str | None, local_rank: int) -> torch.device:
    """Of the process with this number on this machine."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type != "cuda":
        return kind
    if kind.index is not None:
        raise UserError(f"--device: {kind}; several processes take one GPU each: give cuda, or leave it out")
    if local_rank >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UserError(f"LOCAL_RANK: {local_rank}, but this machine has {there} GPU(s); start {there} processes on it")
    return torch.device("cuda", local_rank)
