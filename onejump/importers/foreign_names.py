"""What the names in the field's pickles mean: an allow-list. Nothing is imported and nothing called by name; any other
name is refused."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from onejump.importers.foreign_tensors import (
    DTYPES,
    Resolve,
    Storage,
    StoragesOnly,
    counts,
    read_legacy,
    refusal,
    storage_dtype,
    storage_id,
    tensor,
)
from onejump.importers.inert import Budget, Call, Global, LongText
from onejump.importers.module_record import ModuleRecord
from onejump.importers.pickle_values import elements, items_of
from onejump.types import UserError

SAME = {  # other versions' names of a module
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "dnnlib": "dnnlib.util",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
}
CLASS = re.compile(r"[A-Z]\w*", re.ASCII)
METHOD = re.compile(r"[a-z]\w*", re.ASCII)
NUMBERS = re.compile(r"[<|=]?(b1|[iu][1248]|f[248])")  # numpy's kinds of numbers that are plain bytes


@dataclass
class Meanings:
    """The meaning of a published checkpoint's names, for the Machine. `resolve` finds the storages of torch's files."""

    budget: Budget
    resolve: Resolve

    def find(self, module: str, name: str) -> object:
        place = Global(SAME.get(module, module), name)
        if place.module == "torch" and name in DTYPES:
            return DTYPES[name]
        if place in CALLS or place in TYPES or storage_dtype(place) is not None or is_module_class(place):
            return place
        raise refusal(self.budget.file, module, name)

    def call(self, function: object, args: tuple) -> object:
        act = CALLS.get(function) if isinstance(function, Global) else None
        if act is None:
            raise self.refused(function)
        return act(self, *args)

    def new(self, cls: object, args: tuple, kwargs: dict) -> object:
        if kwargs:
            raise ValueError("an object made with named arguments")
        if isinstance(cls, Global) and is_module_class(cls) and not args:
            return ModuleRecord(cls.name, file=self.budget.file)
        return self.call(cls, args)

    def build(self, made: object, state: object) -> None:
        """Gives what was made its state; what a dict or a tensor carries besides its content is left out."""
        if isinstance(made, ModuleRecord) and isinstance(state, dict) and not made.attributes:
            made.attributes = state
        elif isinstance(made, np.ndarray) and isinstance(state, tuple):
            fill_array(self, made, *state)
        elif isinstance(made, np.dtype) and isinstance(state, tuple) and len(state) > 1:
            if state[1] not in ("<", "|", "="):
                raise ValueError("an array of the other byte order")
        elif not (isinstance(made, dict | Tensor) and isinstance(state, dict)):
            raise ValueError("a state for what takes none")

    def persistent(self, identity: object) -> object:
        if isinstance(identity, tuple) and identity[:1] == ("module",) and len(identity) == 4:
            return identity[1]  # a class, and its source, which is not read
        return self.resolve(storage_id(identity))

    def refused(self, function: object) -> UserError:
        if isinstance(function, Global):
            return refusal(self.budget.file, function.module, function.name)
        return UserError(f"{self.budget.file}: not a readable pickle (it calls a {type(function).__name__})")


def is_module_class(place: Global) -> bool:
    return place.module.startswith("torch.nn.modules.") and CLASS.fullmatch(place.name) is not None


# Each of the following is what one name means when a pickle calls it: the arguments are the pickle's, so checked.


def rebuild_tensor(meanings: Meanings, storage: object, offset: object, size: object, stride: object) -> Tensor:
    return tensor(storage, offset, size, stride, meanings.budget)


def rebuild_tensor_v2(
    meanings: Meanings,
    storage: object,
    offset: object,
    size: object,
    stride: object,
    requires_grad: object,
    hooks: object,
    metadata: object = None,
) -> Tensor:
    if metadata:
        raise ValueError("a tensor that is kept negated or conjugated")
    return tensor(storage, offset, size, stride, meanings.budget)


def rebuild_parameter(meanings: Meanings, data: object, *_: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter that is not a tensor")
    return data


def rebuild_from_type(meanings: Meanings, function: object, cls: object, args: object, _: object) -> object:
    if not (isinstance(cls, Global) and cls in TYPES and function in TENSORS and isinstance(args, tuple)):
        raise ValueError("a tensor of an unknown class")
    return meanings.call(function, args)


def load_storage(meanings: Meanings, data: object) -> Storage:
    """A storage inside a pickle is a whole file of torch's old format."""
    file = meanings.budget.file
    found = read_legacy(as_bytes(meanings, data), meanings.budget, lambda resolve: StoragesOnly(file, resolve))
    if not isinstance(found, Storage):
        raise ValueError("a storage that is none")
    return found


def persistent_object(meanings: Meanings, meta: object) -> ModuleRecord:
    """torch_utils.persistence keeps a class as its source, which is dropped unread, beside the object's state."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise ValueError("a persistent object that is not a class's")
    state = {} if meta.get("state") is None else meta["state"]
    args, kwargs = (state.get("_init_args", ()), state.get("_init_kwargs", {})) if isinstance(state, dict) else (0, 0)
    if not (isinstance(args, tuple) and isinstance(kwargs, dict)):
        raise ValueError("a persistent object whose state is not a dict")
    return ModuleRecord(meta["class_name"], args, kwargs, state, meanings.budget.file)


def reconstructed(meanings: Meanings, cls: object, base: object, state: object) -> object:
    if base != Global("builtins", "object") or state is not None:
        raise ValueError("an object of an unknown base")
    return meanings.new(cls, (), {})


def method(meanings: Meanings, owner: object, name: object) -> Call:
    """An object's method that is kept as an attribute of its own, as ECT's loss does: a record that nobody can call."""
    if not (isinstance(owner, ModuleRecord) and isinstance(name, str) and METHOD.fullmatch(name)):
        raise refusal(meanings.budget.file, "builtins", "getattr")
    return Call(Global("builtins", "getattr"), (owner, name))


def container(kind: Callable) -> Callable:
    """list, tuple, set or frozenset of what the pickle lists."""

    def make(meanings: Meanings, values: object = ()) -> object:
        if not isinstance(values, list | tuple | set | frozenset):
            raise ValueError("a container of what is none")
        meanings.budget.spend(steps=len(values))
        return kind(elements(list(values)) if kind in (set, frozenset) else values)

    return make


def mapping(meanings: Meanings, pairs: object = ()) -> dict:
    """An empty dict, or one of pairs, as Python 2 writes an OrderedDict."""
    if not isinstance(pairs, list | tuple):
        raise ValueError("a dict of what are no pairs")
    meanings.budget.spend(steps=2 * len(pairs))
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("a dict of what are no pairs")
    return items_of([value for pair in pairs for value in pair])


def encoded(meanings: Meanings, data: object, encoding: object = "latin1") -> memoryview:
    """Protocol 2 writes bytes as a text whose letters are the bytes: the one kind of bytes that must be copied."""
    if not isinstance(data, str | LongText) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes in an unknown encoding")
    meanings.budget.spend(copied=len(data.data) if isinstance(data, LongText) else len(data))
    letters = str(data.data, "utf-8") if isinstance(data, LongText) else data
    return memoryview(bytearray(letters, "latin-1"))


def as_bytes(meanings: Meanings, data: object) -> memoryview:
    return data if isinstance(data, memoryview) else encoded(meanings, data)


def no_bytes(meanings: Meanings) -> memoryview:
    return memoryview(b"")


def device(meanings: Meanings, kind: object, index: object = None) -> str:
    if not (isinstance(kind, str) and re.fullmatch(r"[a-z]+(:\d+)?", kind) and isinstance(index, int | None)):
        raise ValueError("a device of an unknown kind")
    return kind if index is None else f"{kind}:{index}"


def array_dtype(meanings: Meanings, code: object, *_: object) -> np.dtype:
    if not (isinstance(code, str) and NUMBERS.fullmatch(code)):
        raise ValueError("an array of something else than numbers")
    return np.dtype(code)


def scalar(meanings: Meanings, dtype: object, data: object) -> int | float | bool:
    number = np.empty(0)
    fill_array(meanings, number, 1, (), dtype, False, data)
    return number.item()


def empty_array(meanings: Meanings, cls: object, *_: object) -> np.ndarray:
    if cls != Global("numpy", "ndarray"):
        raise ValueError("an array of an unknown class")
    return np.empty(0)


def array_of_bytes(meanings: Meanings, data: object, dtype: object, shape: object, order: object) -> np.ndarray:
    array = np.empty(0)
    fill_array(meanings, array, 1, shape, dtype, order == "F", data)
    return array


def fill_array(
    meanings: Meanings, array: np.ndarray, version: object, shape: object, dtype: object, fortran: object, data: object
) -> None:
    content, sizes = as_bytes(meanings, data), counts(shape)
    if not isinstance(dtype, np.dtype) or len(sizes) > 32:
        raise ValueError("an array without a shape or a type")
    if math.prod(sizes) * dtype.itemsize != len(content):
        raise ValueError("an array that is not as long as its shape says")
    meanings.budget.spend(copied=len(content))
    array.__setstate__((1, tuple(sizes), dtype, bool(fortran), bytes(content)))  # type: ignore[arg-type]


TENSORS = (Global("torch._utils", "_rebuild_tensor_v2"), Global("torch._utils", "_rebuild_parameter"))
TYPES = {
    Global("torch", "Tensor"),
    Global("torch.nn.parameter", "Parameter"),
    Global("torch.nn.parameter", "Buffer"),
    Global("numpy", "ndarray"),
    Global("builtins", "object"),
}
CALLS: dict[Global, Callable] = {
    Global("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor_v2,
    Global("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
    Global("torch._tensor", "_rebuild_from_type_v2"): rebuild_from_type,
    Global("torch.storage", "_load_from_bytes"): load_storage,
    Global("torch", "Size"): container(tuple),
    Global("torch", "device"): device,
    Global("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent_object,
    Global("dnnlib.util", "EasyDict"): mapping,
    Global("collections", "OrderedDict"): mapping,
    Global("copyreg", "_reconstructor"): reconstructed,
    Global("builtins", "getattr"): method,
    Global("builtins", "dict"): mapping,
    Global("builtins", "list"): container(list),
    Global("builtins", "tuple"): container(tuple),
    Global("builtins", "set"): container(set),
    Global("builtins", "frozenset"): container(frozenset),
    Global("builtins", "bytes"): no_bytes,
    Global("_codecs", "encode"): encoded,
    Global("numpy", "dtype"): array_dtype,
    Global("numpy.core.multiarray", "scalar"): scalar,
    Global("numpy.core.multiarray", "_reconstruct"): empty_array,
    Global("numpy.core.numeric", "_frombuffer"): array_of_bytes,
}
