"""Processes that are started once and then run functions of the tests together, as torchrun would start them."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import conftest  # noqa: F401  (annotations are checked there too)
import torch

from onejump.join import join

HEAVY = ("processes", "training_setup", "onejump.sharded", "torch.distributed.fsdp")  # imported once for all of them


@contextmanager
def warm() -> Iterator[ForkServerContext]:
    """Where processes are forked from one that has torch and ours imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(HEAVY))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for the server that forks them
    yield context
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def life(function: Callable[..., Any], *args: Any) -> int | None:
    """How a process that calls this ends: 0, or minus the signal that killed it."""
    with warm() as context:
        process = context.Process(target=alone, args=(function, *args))
        process.start()
    process.join(120)
    return process.exitcode


def alone(function: Callable[..., Any], *args: Any) -> None:
    torch.set_num_threads(1)
    function(*args)


class Crew:
    """Up to `size` processes."""

    def __init__(self, size: int):
        self.pipes, self.processes = [], []
        with warm() as context:
            for _ in range(size):
                here, there = context.Pipe()
                process = context.Process(target=serve, args=(there,), daemon=True)
                process.start()
                self.pipes.append(here)
                self.processes.append(process)

    def run(self, world: int, function: Callable[..., Any], *args: Any, shard: int = 1) -> list[Any]:
        """What function(team, *args) returns on each of `world` processes."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        for rank, pipe in enumerate(self.pipes[:world]):
            pipe.send((rank, world, port, shard, function, args))
        answers = [pipe.recv() if pipe.poll(120) else ("no answer in 120 s", None) for pipe in self.pipes[:world]]
        assert not any(problem for problem, _ in answers), "\n".join(str(problem) for problem, _ in answers)
        return [result for _, result in answers]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        rank, world, port, shard, function, args = pipe.recv()
        numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in (numbers | {"MASTER_PORT": port}).items()})
        team = None
        try:
            team = join("cpu", shard)
            pipe.send((None, function(team, *args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
        finally:
            if team is not None:
                team.leave()
