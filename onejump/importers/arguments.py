"""The arguments of a foreign constructor, each asked for once: what has no counterpart in our networks is refused."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from onejump.importers.inert import printable
from onejump.networks.unet_parts import MAX_CHANNELS, MAX_LEVELS
from onejump.types import UserError


class Arguments:
    """of: what they were given to, for messages."""

    def __init__(self, path: Path, of: str, values: Mapping[str, object]):
        self.path, self.of, self.left = path, of, dict(values)
        for name, value in self.left.items():
            if not is_plain(value):
                raise self.refusal(name, value, "numbers, texts and lists of them are read")

    def refusal(self, name: str, value: object, way_out: str) -> UserError:
        return UserError(f"{self.path}: {self.of} has {printable(name)}={shown(value)}; {way_out}")

    def must_be(self, name: str, *allowed: object) -> object:
        """One of these; left out, it is the first, which is the foreign class's own default."""
        value = self.left.pop(name, allowed[0])
        if value not in allowed:
            raise self.refusal(name, value, f"only {' or '.join(map(str, allowed))} can be imported")
        return value

    def whole(self, name: str, default: int | None = None, at_least: int = 1, at_most: int = MAX_CHANNELS) -> int:
        value = self.left.pop(name, default)
        if type(value) is not int or not at_least <= value <= at_most:
            raise self.refusal(name, value, f"a whole number from {at_least} to {at_most} is needed")
        return value

    def wholes(self, name: str, default: Iterable[int]) -> tuple[int, ...]:
        values = self.left.pop(name, list(default))
        if not isinstance(values, list | tuple) or not all(type(v) is int and 0 <= v <= MAX_CHANNELS for v in values):
            raise self.refusal(name, values, "a list of whole numbers is needed")
        return tuple(values)

    def number(self, name: str, default: float) -> float:
        value = self.left.pop(name, default)
        number = finite(value)
        if number is None:
            raise self.refusal(name, value, "a number is needed")
        return number

    def levels(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """channel_mult."""
        mult = self.wholes("channel_mult", default)
        if not 0 < len(mult) <= MAX_LEVELS or 0 in mult:
            raise self.refusal("channel_mult", mult, f"1 to {MAX_LEVELS} levels are needed, each of 1 or more")
        return mult

    def ignore(self, *names: str) -> None:
        for name in names:
            self.left.pop(name, None)

    def done(self) -> None:
        """Raises UserError if something was never asked for."""
        for name, value in self.left.items():
            raise self.refusal(name, value, "our network has no such field")


def shown(value: object) -> str:
    """One short line, whatever a file holds."""
    if isinstance(value, list | tuple) and len(value) <= 16:
        return f"[{', '.join(printable(v, 30) if is_simple(v) else type(v).__name__ for v in value)}]"
    return printable(value, 60) if is_simple(value) else f"a {type(value).__name__}"


def finite(value: object) -> float | None:
    """A number as a float, None for what is none or has no finite one."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def is_plain(value: object) -> bool:
    """What such a constructor is given: to compare an array or a tensor would not give one answer."""
    return all(is_simple(v) for v in value) if isinstance(value, list | tuple) else is_simple(value)


def is_simple(value: object) -> bool:
    return isinstance(value, str | int | float | None)
