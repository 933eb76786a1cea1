"""What a pickle machine builds in place of calls, and what keeps a hostile file's cost within bounds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from onejump.types import UserError

MAX_STEPS = 1_000_000  # opcodes in one file; a network of 1,000 tensors has some 100,000


@dataclass(frozen=True)
class Global:
    """A name that a pickle asks for. It stands for itself."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Call:
    """What a pickle wants to have called or built, uninterpreted."""

    function: object
    args: object
    kwargs: object = None
    state: object = None
    items: list = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class LongText:
    """A text of more than a MiB: its bytes in the file, UTF-8."""

    data: memoryview


@dataclass
class Budget:
    """What all the pickles of one file may use together: opcodes, and bytes that have to be copied out of the file."""

    file: str
    copies: int
    steps: int = MAX_STEPS

    def spend(self, steps: int = 0, copied: int = 0) -> None:
        """Raises UserError if nothing is left."""
        self.steps -= steps
        self.copies -= copied
        if self.steps < 0 or self.copies < 0:
            raise UserError(f"{self.file}: not a readable pickle (it is far larger than any network's)")


@runtime_checkable
class Meaning(Protocol):
    """What the names in a pickle stand for."""

    def find(self, module: str, name: str) -> object: ...

    def call(self, function: object, args: tuple) -> object: ...

    def new(self, cls: object, args: tuple, kwargs: dict) -> object: ...

    def build(self, made: object, state: object) -> None: ...

    def persistent(self, identity: object) -> object: ...


@dataclass
class Inert:
    """No meaning at all: calls become records, and `identities` collects the persistent ids in order."""

    find: Callable[[str, str], object] = Global
    identities: list = field(default_factory=list)

    def call(self, function: object, args: tuple) -> Call:
        return Call(function, args)

    def new(self, cls: object, args: tuple, kwargs: dict) -> Call:
        return Call(cls, args, kwargs)

    def build(self, made: object, state: object) -> None:
        if isinstance(made, Call):
            made.state = state

    def persistent(self, identity: object) -> Call:
        self.identities.append(identity)
        return Call(None, identity)


def printable(text: object, limit: int = 100) -> str:
    """One short line of printable characters, whatever `text` holds."""
    line = "".join(c if c.isprintable() else "?" for c in str(text)[: limit + 1])
    return line if len(line) <= limit else line[:limit] + "..."
