"""Command-line overrides: `stage1.method.delta.q=4` replaces one value of a recipe; `describe` lists all of them."""

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_origin

from onejump.config import CLASSES, FUNCTIONS, Recipe, Stage
from onejump.config_json import decode, did_you_mean, from_json, to_json
from onejump.types import UserError

TYPES = {cls.__name__: cls for cls in CLASSES}
FUNCTION_NAMES = {f.__name__ for f in FUNCTIONS}
RECIPE_FIELDS, STAGE_FIELDS = ([f.name for f in fields(cls)] for cls in (Recipe, Stage))
WORDS = {"true": True, "false": False, "none": None}


def apply_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with each `path=value` put in, in order; ranges are checked once all are in.

    A path starts with a field of Recipe (`seed=3`), a stage (`stage1.steps=100`) or, in a recipe of one stage, a field
    of Stage (`steps=100`). A value is a number, a word, a list (`1,2`), or an object by its name, with or without
    arguments (`PowerEMA(gamma=16.97)`); what is not given takes the defaults of that type, not the former values.
    Raises UserError, with the path and the nearest name, if a path or value does not fit.
    """
    tree = to_json(recipe)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UserError(f"{override}: write path=value, such as seed=3 or {_example(tree)}.batch=64")
        _put(tree, path.strip(), text.strip())
    return from_json(tree)


def describe(recipe: Recipe) -> str:
    """A table of every path and its value, both as `apply_overrides` reads them; a blank line before each part."""
    rows = list(_rows(to_json(recipe), ""))
    width = max(len(path) for path, _, _ in rows)
    return "\n".join(f"{gap}{path:<{width}}  {value}".rstrip() for path, value, gap in rows)


def _example(tree: dict) -> str:
    return next(iter(tree["stages"]), "stage1")


def _put(tree: dict, path: str, text: str) -> None:
    """Walks down `path`, checks the value against the annotation of the last field and stores it."""
    *parents, last = _full_path(tree, path)
    node: Any = tree
    for name in parents:
        _check_name(node, name, path)
        node = node[name]
    _check_name(node, last, path)
    if "type" in node:
        annotation = next(f.type for f in fields(TYPES[node["type"]]) if f.name == last)
    else:
        annotation = Stage
    node[last] = to_json(decode(_parse(text, annotation), annotation, path))


def _full_path(tree: dict, path: str) -> list[str]:
    first, *rest = path.split(".")
    stages = tree["stages"]
    if first in stages:
        return ["stages", first, *rest]
    if first in RECIPE_FIELDS:
        if path == "stages":
            raise UserError(f"{path}: set the fields of a stage, such as {_example(tree)}.batch=64")
        return [first, *rest]
    if first in STAGE_FIELDS and len(stages) == 1:
        return ["stages", *stages, first, *rest]
    if first in STAGE_FIELDS:
        raise UserError(f"{path}: say which stage: " + ", ".join(f"{stage}.{path}=..." for stage in stages))
    names = [*stages, *(name for name in RECIPE_FIELDS if name != "stages")]
    nearest = did_you_mean(first, [*names, *STAGE_FIELDS]) or f"; there are {', '.join(names)}"
    raise UserError(f"{path}: nothing is called {first}{nearest}")


def _check_name(node: Any, name: str, path: str) -> None:
    if not isinstance(node, dict) or "function" in node:
        raise UserError(f"{path}: no field {name}, since what it belongs to is the plain value {value_text(node)}")
    if name not in node or name == "type":
        names = [key for key in node if key != "type"]
        owner = node.get("type", "the recipe")
        nearest = did_you_mean(name, names) or f"; there are {', '.join(names)}"
        raise UserError(f"{path}: {owner} has no {name!r}{nearest}")


def _parse(text: str, annotation: Any) -> Any:
    """Text to JSON as `decode` reads it. Text that is no expression stays text, which `decode` refuses or wants."""
    if annotation is str:
        return text
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except UserError:
        raise
    except (SyntaxError, TypeError, ValueError):
        value = text
    return [value] if get_origin(annotation) is tuple and not isinstance(value, list) else value


def _value(node: ast.expr) -> Any:
    """The JSON of a literal, a name, a list of these, or a call of a type with named arguments; nothing is executed."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.args or any(argument.arg is None for argument in node.keywords):
            raise UserError(f"{ast.unparse(node)}: name each argument, as in PowerEMA(gamma=16.97)")
        return {"type": node.func.id} | {str(a.arg): _value(a.value) for a in node.keywords}
    if isinstance(node, ast.Tuple | ast.List):
        return [_value(item) for item in node.elts]
    if not isinstance(node, ast.Name):
        return ast.literal_eval(node)
    if node.id in TYPES:
        return {"type": node.id}
    return {"function": node.id} if node.id in FUNCTION_NAMES else WORDS.get(node.id.lower(), node.id)


def _rows(node: dict, path: str) -> Iterator[tuple[str, str, str]]:
    """(path, value, "" or a line break before it) for each field below; the recipe's own numbers come first."""
    for name, value in sorted(node.items(), key=lambda item: not path and isinstance(item[1], dict)):
        here = f"{path}.{name}" if path else name
        if name == "type":
            continue
        if here == "stages":
            yield from _rows(value, "")
            continue
        is_object = isinstance(value, dict) and "type" in value
        yield here, value_text(value), "\n" if is_object and "." not in here else ""
        if is_object:
            yield from _rows(value, here)


def value_text(value: Any) -> str:
    """A value, as to_json has it, as an override gives it."""
    if isinstance(value, dict):
        return value.get("type") or value.get("function") or ", ".join(value)
    if isinstance(value, list):
        return ",".join(value_text(item) for item in value) or "()"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def short(value: Any) -> str:
    """A value in a line; of long lists only how many, of objects their type and fields."""
    if isinstance(value, dict):
        inner = ", ".join(f"{key}={short(item)}" for key, item in value.items() if key not in ("type", "function"))
        name = value.get("type") or value.get("function") or ""
        return f"{name}({inner})" if inner else str(name)
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(f"{f.name}={short(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__name__}({inner})"
    if isinstance(value, tuple | list):
        return f"({len(value)} values)" if len(value) > 8 else f"({', '.join(map(short, value))})"
    if callable(value):
        return str(value.__name__)
    return f"{value:g}" if isinstance(value, float) else str(value)


def listing(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A title and below it names and what they are, one a line."""
    return "\n".join([title, *(f"  {name:<20} {value}".rstrip() for name, value in rows)])
