"""Feeds hostile files to read_torch: python hostile_files.py FOLDER. Ends with status 0 if each of them ends in a value
or a UserError, within 60 seconds of CPU and 700 MB of memory.

A program of its own, because the run-time checks of the test suite would make it 20 times slower.
"""

import gc
import random
import resource
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import foreign_files
import torch

from onejump.importers.foreign_names import CALLS, TYPES, Meanings
from onejump.importers.foreign_tensors import Storage, no_storage
from onejump.importers.inert import Budget, Inert
from onejump.importers.module_record import ModuleRecord
from onejump.importers.pickle_machine import OPCODES, Machine
from onejump.importers.torch_file import read_torch
from onejump.types import UserError

MEMORY, SECONDS = 700 << 20, 60
NAMES = [(place.module, place.name) for place in [*CALLS, *TYPES]]
NAMES += [("torch", "FloatStorage"), ("torch", "float32"), ("torch.nn.modules.linear", "Linear")]
WORDS = [b"f4", b"cpu", b"<", b"class", b"type", b"class_name", b"state", b"_modules", b"_parameters", b"latin1", b"C"]


def snapshot() -> dict:
    tensors = {
        "model.enc.8x8_conv.weight": torch.arange(16.0).view(2, 2, 4).transpose(0, 1),
        "model.map.bias": torch.arange(3).half(),
        "model.on": torch.tensor([True, False]),
    }
    net = foreign_files.network(tensors, {"": ("EDMPrecond", {"img_resolution": 8})}, {"model.on"})
    return {"ema": net, "loss_fn": foreign_files.PersistentObject("EDMLoss"), "kwargs": foreign_files.EasyDict(a="b")}


def read(path: Path) -> str:
    """Reads the file and looks at all of it; what went wrong, in the reader's words."""
    try:
        value = read_torch(path)
        if isinstance(value, dict) and isinstance(value.get("ema"), ModuleRecord):
            for tensor in value["ema"].state_dict().values():
                tensor.double().sum()
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error), error
        return str(error)
    return ""


def refused(path: Path, data: bytes, why: str) -> None:
    path.write_bytes(data)
    message = read(path)
    assert why in message, (why, message)


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def damaged_files(path: Path) -> None:
    """Truncations, flipped bits, splices of two files and overwritten bytes, of every kind of file."""
    whole = [foreign_files.write_pickle(path, snapshot(), protocol).read_bytes() for protocol in range(2, 6)]
    whole += [
        write(path, snapshot()).read_bytes() for write in (foreign_files.write_zip, foreign_files.write_legacy)
    ] * 2
    draw = random.Random(0)
    for count in range(2000):
        data = bytearray(whole[count % len(whole)])
        at, other = draw.randrange(len(data)), draw.choice(whole)
        if count % 5 == 0:
            del data[at:]
        elif count % 5 == 1:
            start = draw.randrange(len(other))
            data[at : at + draw.randrange(60)] = other[start : start + draw.randrange(60)]
        elif count % 5 == 2:
            data[at] = draw.randrange(256)
        else:
            for _ in range(draw.choice((1, 1, 20))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        read(path)


def random_programs(path: Path) -> None:
    """Opcodes and allowed names in random order, with and without their meaning."""
    draw = random.Random(1)

    def piece() -> bytes:
        word = draw.choice(WORDS)
        frequent = [
            global_(*draw.choice(NAMES)),
            b"K" + draw.choice([b"\0", b"\1", b"\2", b"\xc8"]),
            b"C\x08" + bytes(8),
        ]
        frequent += [
            b"\x8c" + bytes([len(word)]) + word,
            draw.choice([b"q", b"h"]) + draw.randbytes(1)[:1],
            b"(",
            b"t",
            b"R",
        ]
        return draw.choice([*frequent, *frequent, *map(bytes, zip(OPCODES))])  # noqa: B905

    for _ in range(4000):
        data = memoryview(bytearray(b"".join(piece() for _ in range(draw.randrange(50))) + b"."))
        budget = Budget("FILE", 100)
        for meaning in (Inert(), Meanings(budget, lambda _: Storage(memoryview(bytearray(64)), torch.float32))):
            try:
                Machine(data, meaning, budget).run()
            except UserError:
                pass


def endless_nesting(path: Path) -> None:
    """As a value, and as any argument of any allowed name: hashing or printing it would overflow the stack."""
    for opcode in (b"\x85", b"0]2a"):
        path.write_bytes(b"\x80\x04)" + opcode * 30_000 + b".")
        read(path)
    deep: tuple = ()
    for _ in range(300_000):
        deep = (deep,)
    budget = Budget("FILE", 100)
    meanings = Meanings(budget, no_storage)
    meanings.persistent = lambda _: deep  # type: ignore[method-assign]
    for name in NAMES:
        for call in [b"(" + b"h\0" * count + b"tR" for count in range(8)] + [b")Rh\0b", b"h\0\x81"]:
            try:
                Machine(memoryview(b"P\nq\0" + global_(*name) + call + b"."), meanings, budget).run()
            except UserError:
                pass
    refused(path, b"\x80\x04)" + b"\x85" * 30_000 + b"Q.", "persistent id")


def bombs_of_memory(path: Path) -> None:
    """Few bytes that stand for many: refused after a bounded number of steps and of copied bytes."""
    refused(path, b"\x80\x04" + b"\x8f" * 1_000_001 + b".", "far larger than any network")
    long = b"\x80\x04X" + struct.pack("<I", 2 << 20) + b"a" * (2 << 20) + b"q\x00"
    encode = global_("_codecs", "encode") + b"h\x00\x85R"
    refused(path, long + encode * 2000 + b".", "far larger than any network")
    array = global_("numpy.core.numeric", "_frombuffer") + b"(h\0h\1J\0\0\x10\0\x85\x8c\1CtR"
    dtype = global_("numpy", "dtype") + b"\x8c\2f2\x85Rq\1"
    refused(path, b"\x80\x04B\0\0\x20\0" + b"a" * (2 << 20) + b"q\0" + dtype + array * 2000 + b".", "far larger than")
    elements = b"\x80\x04(" + b"N" * 10_000 + b"lq\x00"
    refused(path, elements + (global_("builtins", "list") + b"h\x00\x85R") * 1000 + b".", "far larger than")


def bombs_of_work(path: Path) -> None:
    """A storage inside the pickle that is long to read, read again and again; memories whose numbers collide."""
    storage = foreign_files.write_legacy(path, torch.zeros(1).untyped_storage()).read_bytes()
    begin = storage.index(b"storage") - 6  # where its value begins
    inner = storage[:begin] + b"N0" * 10_000 + storage[begin:]
    load = global_("torch.storage", "_load_from_bytes") + b"h\x00\x85R"
    refused(
        path, b"\x80\x04B" + struct.pack("<I", len(inner)) + inner + b"q\x00" + load * 2000 + b".", "far larger than"
    )
    puts = b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(1, 50_000))
    refused(path, b"\x80\x04N" + puts + b".", "impossible number")


def modules_in_modules(path: Path) -> None:
    """Each module holds the next one twice: 2^60 names; and one that holds itself."""
    module = ModuleRecord("Leaf", attributes={"_modules": {}}, file="FILE")
    for _ in range(60):
        module = ModuleRecord("Twice", attributes={"_modules": {"a": module, "b": module}}, file="FILE")
    itself = ModuleRecord("Itself", attributes={"_modules": {}}, file="FILE")
    itself.attributes["_modules"]["a"] = itself
    for one, why in ((module, "far larger"), (itself, "nested in itself")):
        try:
            raise AssertionError(one.state_dict())
        except UserError as error:
            assert why in str(error), error


def archive(members: list[tuple[bytes, bytes, int]], copies: int = 1) -> bytes:
    """A zip archive of (name, content, method), and its table of contents as often as asked."""
    body, table = b"", b""
    for name, content, method in members:
        stored = zlib.compress(content, 9, -15) if method else content
        facts = (0, method, 0, 0, zlib.crc32(content), len(stored), len(content), len(name))
        table += (
            struct.pack("<4s2H4H3IH", b"PK\1\2", 20, 20, *facts) + struct.pack("<4H2I", 0, 0, 0, 0, 0, len(body)) + name
        )
        body += struct.pack("<4sH4H3IH", b"PK\3\4", 20, *facts) + struct.pack("<H", 0) + name + stored
    count = min(len(members) * copies, 0xFFFF)
    return (
        body
        + table * copies
        + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(table) * copies, len(body), 0)
    )


def bombs_of_zip(path: Path) -> None:
    value = (b"a/data.pkl", b"\x80\x02N.", 0)
    refused(path, archive([value]), "")
    refused(path, archive([value, (b"a/data/0", bytes(64 << 20), 8)]), "is compressed")
    refused(path, archive([(b"a/data.pkl", bytes(64 << 20), 8)]), "is compressed")
    refused(path, archive([value, (b"b", b"", 0)], copies=90_000), "not a readable torch file")
    refused(path, archive([value, (b"b", b"", 0)], copies=400_000), "table of contents is too large")


CLAIMS: tuple[Callable[[Path], None], ...] = (
    damaged_files,
    random_programs,
    endless_nesting,
    bombs_of_memory,
    bombs_of_work,
    modules_in_modules,
    bombs_of_zip,
)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    for claim in CLAIMS:
        before = resource.getrusage(resource.RUSAGE_SELF)
        claim(folder / "file")
        gc.collect()
        after = resource.getrusage(resource.RUSAGE_SELF)
        print(f"{claim.__name__}: {after.ru_utime - before.ru_utime:.1f} s, {after.ru_maxrss >> 10} MB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
