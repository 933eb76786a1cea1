"""What `run` and `train` do where several processes were started with the same command."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onejump.distributed import Team


def add_option(made: argparse.ArgumentParser) -> None:
    text = "of the processes started together, N share one copy of the weights (default: 1, a copy each)"
    made.add_argument("--shard", type=int, default=1, metavar="N", help=text)


def team_of(wanted: str | None, shard: int = 1) -> "Team":
    """The processes that torchrun or srun has started with this one, on the device that was asked for."""
    import os

    from onejump.cli_input import device_of
    from onejump.join import environment, join

    if wanted is not None and not environment(os.environ):
        device_of(wanted)  # names those that there are
    return join(wanted, shard)


@contextmanager
def alone_together(out: Path, team: "Team", begin: Callable[[], None]) -> Iterator[None]:
    """While it lasts, no other run trains in this folder; the first process calls `begin` before any goes on.

    Raises on all processes where the first cannot.
    """
    from onejump.by_first import by_first
    from onejump.run_record import alone

    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(alone(out))
            begin()

        by_first(team, claim)
        yield
