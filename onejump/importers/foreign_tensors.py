"""Tensors and storages in the field's files: views of the file, checked, and torch's format before 1.6."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from onejump.importers.inert import Budget, Global, Inert, Meaning, printable
from onejump.importers.pickle_machine import Machine
from onejump.types import UserError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles of torch's format before 1.6
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}
MAX_DIMENSIONS = 64


@dataclass(frozen=True, eq=False)
class Storage:
    """Numbers of one kind, where they lie in the file."""

    data: memoryview
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return len(self.data) // self.dtype.itemsize


@dataclass(frozen=True)
class StorageId:
    """What a torch file writes in place of a storage."""

    key: str
    dtype: torch.dtype
    numel: int
    view: tuple[int, int] | None = None  # elements left out before it, elements

    @property
    def size(self) -> int:
        return self.numel * self.dtype.itemsize

    def of(self, data: memoryview) -> Storage:
        """The storage in the bytes of its key."""
        first, numel = self.view or (0, self.numel)
        first, size = first * self.dtype.itemsize, numel * self.dtype.itemsize
        if first + size > len(data) or self.size > len(data):
            raise ValueError(
                f"storage {printable(self.key)} holds {len(data)} bytes, not {max(first + size, self.size)}"
            )
        return Storage(data[first : first + size], self.dtype)


Resolve = Callable[[StorageId], Storage]


def storage_dtype(storage: object) -> torch.dtype | None:
    """The kind of numbers in a class of torch's storages; None for anything else."""
    if not (isinstance(storage, Global) and storage.module in ("torch", "torch.cuda", "torch.storage")):
        return None
    return STORAGES.get(storage.name)


def is_storage_id(identity: object) -> bool:
    return isinstance(identity, tuple) and identity[:1] == ("storage",)


def storage_id(identity: object) -> StorageId:
    """("storage", class, key, where it was, elements[, None or (key of the view, first, elements)])."""
    if not (isinstance(identity, tuple) and is_storage_id(identity) and len(identity) in (5, 6)):
        raise ValueError("a persistent id that is not a storage's")
    _, storage, key, _, numel, *view = identity
    dtype = storage_dtype(storage)
    if dtype is None or not isinstance(key, str) or not is_count(numel):
        raise ValueError("a storage's persistent id that is not torch's")
    if not view or view[0] is None:
        return StorageId(key, dtype, numel)
    _, first, size = view[0]
    if not (is_count(first) and is_count(size)):
        raise ValueError("a storage's view that is not torch's")
    return StorageId(key, dtype, numel, (first, size))


def is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 62


def counts(values: object) -> list[int]:
    if not (isinstance(values, tuple) and all(map(is_count, values))):
        raise ValueError("a size, stride or offset that is not of natural numbers")
    return list(values)


def tensor(storage: object, offset: object, size: object, stride: object, budget: Budget) -> Tensor:
    """The strided tensor in a storage: a view of it, whose address may be odd; booleans are copied.

    Raises ValueError if it does not lie in the storage, or shows elements more than once.
    """
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    (start,), shape, strides = counts((offset,)), counts(size), counts(stride)
    if not len(shape) == len(strides) <= MAX_DIMENSIONS:
        raise ValueError("a tensor's size and stride that do not fit")
    if math.prod(max(n, 1) for n in shape) >= 1 << 62:
        raise ValueError("a tensor too large for any machine")
    if 0 in shape:
        return torch.empty(shape, dtype=storage.dtype)
    steps = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    if start + sum(steps) >= storage.numel or math.prod(shape) > storage.numel:
        raise ValueError("a tensor outside its storage")
    if any(n > 1 and s == 0 for n, s in zip(shape, strides, strict=True)):
        raise ValueError("a tensor of stride 0")
    strides = [s if n > 1 else 1 for n, s in zip(shape, strides, strict=True)]
    return viewed(storage, budget).as_strided(shape, strides, start)


def viewed(storage: Storage, budget: Budget) -> Tensor:
    if storage.dtype != torch.bool:
        return torch.frombuffer(storage.data, dtype=storage.dtype, count=storage.numel)
    budget.spend(copied=storage.numel)  # bytes other than 0 and 1 are no booleans
    return torch.frombuffer(storage.data, dtype=torch.uint8).ne(0)


@dataclass
class StoragesOnly:
    """The meaning of a pickle that may hold one storage and nothing else."""

    file: str
    resolve: Resolve

    def find(self, module: str, name: str) -> object:
        if storage_dtype(Global(module, name)) is None:
            raise refusal(self.file, module, name)
        return Global(module, name)

    def call(self, function: object, args: tuple) -> object:
        raise ValueError("a call in a storage")

    def new(self, cls: object, args: tuple, kwargs: dict) -> object:
        raise ValueError("an object in a storage")

    def build(self, made: object, state: object) -> None:
        raise ValueError("an object's state in a storage")

    def persistent(self, identity: object) -> object:
        return self.resolve(storage_id(identity))


def refusal(file: str, module: str, name: str) -> UserError:
    asked = f"{printable(module)}.{printable(name)}"
    return UserError(f"{file}: refused: the pickle asks for {asked}; only tensors and plain containers are read")


def no_storage(identity: StorageId) -> Storage:
    raise ValueError("a persistent id outside of torch's formats")


def read_legacy(data: memoryview, budget: Budget, meaning: Callable[[Resolve], Meaning]) -> object:
    """The value in torch's format before 1.6: three pickles of facts, the value, its storages' keys, the storages.

    `meaning` makes the value's meaning from what finds a storage. The value is read twice, because its storages come
    after it: first for their ids, and to learn where it ends.
    """
    skim = Inert(meaning(no_storage).find)
    machine = Machine(data, skim, budget)
    magic, protocol, facts = machine.run(), machine.run(), machine.run()
    if magic != MAGIC or protocol != PROTOCOL or not isinstance(facts, dict):
        raise UserError(
            f"{budget.file}: not a readable torch file (its first numbers are not torch's); download it again"
        )
    check_byte_order(budget.file, "little" if facts.get("little_endian") is True else "big")
    begin = machine.at
    machine.run()
    try:
        identities = {one.key: one for one in map(storage_id, filter(is_storage_id, skim.identities))}
        found = storages_after(machine, identities)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{budget.file}: not a readable torch file ({printable(error)}); download it again") from error
    return Machine(data, meaning(lambda identity: identity.of(found[identity.key])), budget, begin).run()


def storages_after(machine: Machine, identities: dict[str, StorageId]) -> dict[str, memoryview]:
    """The bytes of each storage: a pickled list of keys, then a count and the numbers for each key."""
    keys, found = machine.run(), {}
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys) and len(keys) == len(set(keys))):
        raise ValueError("its list of storages is not one of names")
    if set(keys) != identities.keys():
        raise ValueError("its list of storages is not the list of those in it")
    for key in keys:
        if machine.count(8) != identities[key].numel:
            raise ValueError(f"storage {printable(key)} is not as long as announced")
        found[key] = machine.take(identities[key].size)
    return found


def check_byte_order(file: str, order: object) -> None:
    if order != "little" or sys.byteorder != "little":
        raise UserError(f"{file}: its numbers are {printable(order)}-endian and this machine is {sys.byteorder}-endian")
