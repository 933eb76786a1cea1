"""The one kind of pickle that CIFAR's Python files are, read without running anything that is in it.

Such a file is a dict of strings, whole numbers, lists of them, and one array of bytes, as Python 2 wrote it, or any
Python 3 that has loaded it and saved it again. Its instructions are listed by the standard library's `pickletools` and
followed here on a stack; whatever this layout does not need is refused.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

from onejump.data.source import line, shown
from onejump.types import UserError

ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
BUFFER = ("numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer")  # an array in protocol 5
ENCODE = "_codecs encode"  # bytes in protocol 2, which has none of its own: a text, to be encoded as latin1
NAMES = (*ARRAY, *BUFFER, ENCODE, "numpy ndarray", "numpy dtype")
VALUES = (
    *("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "STRING", "BINBYTES"),
    *("SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2", "NONE"),
)
MARK = object()


@dataclass
class Recipe:
    """What would be called, with its arguments: an array or its type of numbers, filled in by a state."""

    name: str
    state: Any = None


def read_batch(data: bytes, where: str) -> dict[str, Any]:
    """The dict of a file, arrays as uint8. Raises UserError for whatever is no such file."""
    try:
        content = _follow(data)
        return {_text(key): _value(value) for key, value in content.items()}
    except MemoryError:
        raise
    except Exception as error:  # instructions without their values, in any order
        way_out = "download it again, or take the binary version"
        raise UserError(f"{where} is not a batch of CIFAR's Python version ({line(error)}): {way_out}") from error


def _follow(data: bytes) -> dict:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for code, value, _ in pickletools.genops(data):
        match code.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[code.name]())
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[value])
            case "MARK":
                stack.append(MARK)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(code.name == "NEWTRUE")
            case "GLOBAL":
                stack.append(_known(str(value)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_known(f"{module} {name}"))
            case name if name in VALUES:
                stack.append(value)
            case name:
                _combine(name, stack)
    raise ValueError("it has no end")


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"it asks for {shown(name[:40])}")
    return name


def _combine(name: str, stack: list[Any]) -> None:
    """An instruction that takes values off the stack."""
    match name:
        case "TUPLE":
            stack.append(tuple(_above_mark(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        case "APPEND":
            stack[-2].append(stack.pop())
        case "APPENDS":
            values = _above_mark(stack)
            stack[-1].extend(values)
        case "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        case "SETITEMS":
            values = _above_mark(stack)
            stack[-1].update(zip(values[::2], values[1::2], strict=True))
        case "REDUCE":
            arguments = stack.pop()
            stack.append(_made(stack.pop(), arguments))
        case "BUILD":
            state = stack.pop()
            stack[-1].state = state
        case _:
            raise ValueError(f"it uses {name}")


def _above_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1 - stack[::-1].index(MARK)
    values = stack[at + 1 :]
    del stack[at:]
    return values


def _made(name: Any, arguments: tuple) -> Recipe | bytes:
    if name == ENCODE:
        if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] != "latin1":
            raise ValueError(f"it asks for {ENCODE} of something else than a plain byte string")
        return arguments[0].encode("latin-1")
    if name in BUFFER:
        content, kind, shape, order = arguments
        return Recipe("array", (1, shape, kind, order != "C", content))
    if name in ARRAY and arguments[0] == "numpy ndarray":
        return Recipe("array")
    if name == "numpy dtype" and arguments[0] == "u1":
        return Recipe("u1")
    raise ValueError(f"it calls {str(name)[:40]}")


def _value(value: Any) -> Any:
    """An array from its recipe; lists of strings as text; the rest as it is."""
    if isinstance(value, Recipe):
        _, shape, kind, fortran, content = value.state
        if value.name != "array" or kind.name != "u1" or fortran:
            raise ValueError("an array of other than bytes in rows")
        return np.frombuffer(_bytes(content), np.uint8).reshape(shape)
    return [_text(v) if isinstance(v, str | bytes) else v for v in value] if isinstance(value, list) else value


def _bytes(content: str | bytes | bytearray) -> bytes:
    return content.encode("latin-1") if isinstance(content, str) else bytes(content)


def _text(content: str | bytes) -> str:
    return _bytes(content).decode("utf-8", "replace")
