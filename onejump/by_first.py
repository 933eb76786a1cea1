"""Work of the first process on which the others wait: where it fails, all end at once, and with its words."""

from collections.abc import Callable
from typing import Any, TypeVar

from onejump.distributed import Team
from onejump.types import UserError

T = TypeVar("T")


def led(team: Team, work: Callable[[], T]) -> T:
    """What `work`, which all processes call at the same place, returns on this one.

    Where the first one fails, it raises its own error, and the others a UserError of one line. One of the others that
    fails ends without them: its launcher sees it.
    """
    made: list[T] = []
    problem: Exception | None = None
    try:
        made.append(work())
    except Exception as error:  # whatever it is, the others wait
        if not team.first:
            raise
        problem = error
    told = team.told(None if problem is None else words(problem))
    if problem is not None:
        raise problem
    if told is not None:
        raise UserError(told)
    return made[0]


def by_first(team: Team, work: Callable[[], Any]) -> Any:
    """What `work` returns on the first process, JSON, told to all; the others do nothing. It fails as `led`."""
    return team.told(led(team, lambda: work() if team.first else None))


def words(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return text if isinstance(problem, UserError) else f"the first process failed: {type(problem).__name__}: {text}"
