"""A recipe as JSON and back. Only the types and functions that `config` lists are ever built or looked up."""

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from onejump.config import CHOICES, CLASSES, FUNCTIONS
from onejump.losses import Distance
from onejump.lpips import LPIPS
from onejump.types import UserError


def to_json(value: Any) -> Any:
    """A recipe, or a part of one, as what JSON can hold; `from_json` is its inverse.

    A dataclass becomes {"type": its name, field: ...}, a function {"function": its name}, a tuple a list, and an
    infinite or undefined number a string. Raises UserError for what is not in CLASSES or FUNCTIONS.
    """
    if is_dataclass(value) and type(value) in CLASSES:
        return {"type": type(value).__name__} | {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if value in FUNCTIONS:
        return {"function": value.__name__}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, NoneType | bool | int | float | str):
        return value
    raise UserError(f"{value!r} cannot be written: add it to onejump.config.CLASSES or FUNCTIONS")


def from_json(value: Any) -> Any:
    """The object that `to_json` wrote. Only CLASSES and FUNCTIONS are ever built or looked up.

    A field left out keeps its default. Raises UserError for unknown types, functions and fields and for values of the
    wrong type or range, with the path of the field.
    """
    return _build(value, CLASSES, "")


def decode(value: Any, annotation: Any, path: str) -> Any:
    """JSON to a value of this annotation (of a field of one of CLASSES); `path` is for messages."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        others = tuple(a for a in args if a is not NoneType)
        return decode(value, others[0], path) if len(others) == 1 else _build(value, others, path)
    if isinstance(annotation, type) and is_dataclass(annotation):
        return _build(value, (annotation,), path)
    if origin is Literal:
        return value if value in args else _none_of(value, args, path)
    if origin is Callable:
        is_object = annotation == Distance and isinstance(value, dict) and "type" in value
        return _build(value, (LPIPS,), path) if is_object else _function(value, CHOICES[annotation], path)
    if origin is tuple:
        return _tuple(value, args, path)
    if origin is dict and isinstance(value, dict):
        return {name: decode(item, args[1], join(path, name)) for name, item in value.items()}
    return _plain(value, origin or annotation, path)


def join(path: str, name: str) -> str:
    """Dotted paths leave out `stages`: stage1.batch."""
    return name if path in ("", "stages") else f"{path}.{name}"


def _build(value: Any, classes: Iterable[type], path: str) -> Any:
    by_name = {cls.__name__: cls for cls in classes}
    name = str(value.get("type")) if isinstance(value, dict) else value
    if not isinstance(value, dict) or name not in by_name:
        _none_of(name, by_name, path)
    cls = by_name[name]
    known = {f.name: f for f in fields(cls)}
    given = {key: item for key, item in value.items() if key != "type"}
    for key in given:
        if key not in known:
            nearest = did_you_mean(key, known) or f"; there are {', '.join(known)}"
            raise UserError(f"{join(path, key)}: {name} has no such field{nearest}")
    missing = [key for key, f in known.items() if f.default is f.default_factory is MISSING and key not in given]
    if missing:
        raise UserError(f"{path or name}: {name} needs {', '.join(missing)}")
    arguments = {key: decode(item, known[key].type, join(path, key)) for key, item in given.items()}
    try:
        return cls(**arguments)
    except ValueError as e:
        raise UserError(_located(str(e), known, path)) from e


def _located(message: str, fields_known: Iterable[str], path: str) -> str:
    """The path in front of a message of __post_init__, which may start with one of its fields."""
    starts_with_field = re.split(r"\W", message, maxsplit=1)[0] in fields_known
    return join(path, message) if starts_with_field or not path else f"{path}: {message}"


def _function(value: Any, choices: tuple[Callable, ...], path: str) -> Callable:
    by_name = {f.__name__: f for f in choices}
    name = str(value.get("function")) if isinstance(value, dict) else value
    return by_name[name] if isinstance(value, dict) and name in by_name else _none_of(name, by_name, path)


def _tuple(value: Any, args: tuple, path: str) -> tuple:
    kinds = args[:1] * len(value) if isinstance(value, list) and args[1:] == (...,) else args
    if not isinstance(value, list) or len(value) != len(kinds):
        count = "numbers" if args[1:] == (...,) else f"{len(args)} numbers"
        raise UserError(f"{path}: expected {count} such as 1,2, got {value!r}")
    return tuple(decode(item, kind, path) for item, kind in zip(value, kinds, strict=True))


EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "names and values"}


def _plain(value: Any, kind: type, path: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and (number or value in ("inf", "-inf", "nan")):
        return float(value)
    if kind is int and number and value == value // 1:
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise UserError(f"{path}: expected {EXPECTED[kind]}, got {value!r}")


def _none_of(value: Any, names: Iterable, path: str) -> Any:
    choices = [str(name) for name in names]
    some = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    raise UserError(f"{path or 'type'}: {value!r} is none of {some}{did_you_mean(str(value), choices)}")


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The end of a message: the nearest name, nothing if none is near."""
    near = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
