"""Files that ask for anything but tensors and plain containers are refused, and leave no trace."""

import functools
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import foreign_files as foreign
import numpy as np
import pytest
import torch
from torch import nn

from onejump.importers.torch_file import read_torch
from onejump.types import UserError

ROOT = Path(__file__).parents[2]
every_kind = pytest.mark.parametrize("write", foreign.KINDS.values(), ids=foreign.KINDS)


class Evil:
    def __init__(self, function: object, *args: object):
        self.reduced = function, args

    def __reduce__(self) -> tuple:
        return self.reduced


ATTACKS = {
    "posix.system": lambda do: Evil(os.system, do),
    "builtins.eval": lambda do: Evil(eval, f"__import__('os').system({do!r})"),
    "builtins.exec": lambda do: Evil(exec, f"__import__('os').system({do!r})"),
    "builtins.getattr": lambda do: Evil(getattr, Evil(__import__, "os"), "system"),
    "subprocess.Popen": lambda do: Evil(subprocess.Popen, ["sh", "-c", do]),
    "torch.serialization.load": lambda do: Evil(torch.load, do),
    "functools.partial": lambda do: Evil(functools.partial, os.system, do),
    "torch.nn.modules.module._addindent": lambda do: Evil(nn.modules.module._addindent, do, 2),
}
PLACES = {
    "value": lambda evil: {"ema": evil},
    "state": lambda evil: {"ema": foreign.PersistentObject("Net", {}, "", hidden=[{"deep": (evil,)}])},
    "kwargs": lambda evil: {"ema": foreign.PersistentObject("Net", {"sigma": evil})},
    "module": lambda evil: nn.Sequential(
        nn.Linear(1, 1), foreign.network({"w": torch.ones(1)}, {"": ("A", {"x": evil})})
    ),
    "source": lambda evil: foreign.PersistentObject("Net", {}, evil),
    "key": lambda evil: [evil, {"a": 1}],
}


def assert_refused(path: Path, name: str, marker: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_torch(path)
    message = str(caught.value).replace("__builtin__", "builtins")
    assert message == f"{path}: refused: the pickle asks for {name}; only tensors and plain containers are read"
    assert not marker.exists()


@every_kind
@pytest.mark.parametrize("place", PLACES)
def test_a_call_hidden_anywhere_is_refused_by_name_and_leaves_no_trace(write, place, tmp_path):
    marker = tmp_path / "was-run"
    path = write(tmp_path / "a.pkl", PLACES[place](Evil(os.system, f"touch {marker}")))
    assert_refused(path, "posix.system", marker)


@pytest.mark.parametrize("name", ATTACKS)
def test_no_name_off_the_list_is_called(name, tmp_path):
    marker = tmp_path / "was-run"
    path = foreign.write_pickle(tmp_path / "a.pkl", [ATTACKS[name](f"touch {marker}")])
    asked = "builtins.__import__" if name == "builtins.getattr" else name
    with pytest.raises(UserError, match="refused: the pickle asks for") as caught:
        read_torch(path)
    assert asked in str(caught.value) or name in str(caught.value)
    assert not marker.exists()


RECORD = b"ctorch.nn.modules.linear\nLinear\n)\x81"


@pytest.mark.parametrize(
    "program, name",
    [
        (b"(cos\nsystem\nU\x04%sao.", "os.system"),
        (b"(U\x04%sios\nsystem\n.", "os.system"),
        (b"\x8c\x15torch_utils.persistence\x93.", None),
        (
            b"ctorch_utils.persistence_evil\n_reconstruct_persistent_obj\n}\x85R.",
            "torch_utils.persistence_evil._reconstruct_persistent_obj",
        ),
        (b"ctorch_utils.persistence\nos.system\n)R.", "torch_utils.persistence.os.system"),
        (b"ctorch.nn.modules.module\ntorch.os.system\n)R.", "torch.nn.modules.module.torch.os.system"),
        (b"ctorch.nn.modules.linear\nLinear\nK\x01K\x01\x86R.", "torch.nn.modules.linear.Linear"),
        (b"ctorch\nTensor\n)R.", "torch.Tensor"),
        (b"cos\nsystem\nQ.", "os.system"),
        (b"cbuiltins\ngetattr\nctorch\nTensor\nU\x04data\x86R.", "builtins.getattr"),
        (b"cbuiltins\ngetattr\n" + RECORD + b"U\x09__class__\x86R.", "builtins.getattr"),
        (b"cbuiltins\ngetattr\ncbuiltins\ngetattr\n" + RECORD + b"U\x01a\x86RU\x01b\x86R.", "builtins.getattr"),
        (b"cbuiltins\ngetattr\n" + RECORD + b"U\x04eval\x86R)R.", None),
        (b"(U\x07storagecos\nsystem\nU\x010U\x03cpuK\x01tQ.", "os.system"),
        (b"cnumpy.core.multiarray\n_reconstruct\ncos\nsystem\n)\x87R.", "os.system"),
        (b"ccopyreg\n_reconstructor\ncos\nsystem\nc__builtin__\nobject\nN\x87R.", "os.system"),
        (b"\x8c\x02os\x8c\x07s\n\x1b[31m\x93.", "os.s??[31m"),
    ],
)
def test_programs_no_pickler_writes_are_refused(program, name, tmp_path):
    path, marker = tmp_path / "a.pkl", tmp_path / "was-run"
    path.write_bytes(b"\x80\x04" + program.replace(b"%s", b"true"))
    if name is None:
        with pytest.raises(UserError, match="not a readable pickle"):
            read_torch(path)
    else:
        assert_refused(path, name, marker)


def test_a_call_in_the_bytes_of_a_storage_is_refused(tmp_path):
    inner = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    inner += pickle.dumps(Evil(os.system, f"touch {tmp_path}/was-run"), 2)
    path = foreign.write_pickle(tmp_path / "a.pkl", Evil(torch.storage._load_from_bytes, inner))
    assert_refused(path, "posix.system", tmp_path / "was-run")


def test_an_array_of_objects_is_refused(tmp_path):
    path = foreign.write_pickle(tmp_path / "a.pkl", np.array([None, {}], dtype=object))
    with pytest.raises(UserError, match="an array of something else than numbers"):
        read_torch(path)


def test_hostile_files_end_in_a_user_error_within_their_time_and_memory(tmp_path):
    program = Path(__file__).with_name("hostile_files.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


FIRST_BYTES = {
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"<!DOCTYPE html>": "a web page; the download went wrong",
    b"version https://git-lfs.github.com/spec/v1\n": "a pointer of Git LFS",
    b"\x1f\x8b\x08\x00": "a gzip archive",
    b'\x10\x00\x00\x00\x00\x00\x00\x00{"a": {}}': "safetensors",
    b"hello": "a text that begins with 'hello'",
    b"\x00\x01\xfe": "data that begins with 00 01 fe",
    b"\x80\x63": "data that begins with 80 63",
}


@pytest.mark.parametrize("data", FIRST_BYTES, ids=FIRST_BYTES.values())
def test_another_kind_of_file_is_named_by_its_first_bytes(data, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    with pytest.raises(UserError, match="not a checkpoint of PyTorch: it looks like") as caught:
        read_torch(path)
    assert FIRST_BYTES[data] in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.pt").touch()
    for name, why in {"empty.pt": "the file is empty", "none.pt": "No such file", ".": "Is a directory"}.items():
        with pytest.raises(UserError, match=why) as caught:
            read_torch(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


def zipped(path: Path, change: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> Path:
    """torch.save's archive of torch.ones(2), with members replaced, added or (None) left out."""
    foreign.write_zip(path, torch.ones(2))
    with zipfile.ZipFile(path) as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in (members | change).items():
            if content is not None:
                archive.writestr(name if name.startswith("/") or ".." in name else f"a/{name}", content)
    return path


@pytest.mark.parametrize(
    "change, why",
    [
        ({"byteorder": b"big"}, "its numbers are big-endian"),
        ({"data/0": b"123"}, "storage 0 holds 3 bytes, not 8"),
        ({"data/0": None}, "storage 0 is not in the archive"),
        ({"data.pkl": None}, "not of torch.save"),
        ({"constants.pkl": b""}, "a TorchScript archive"),
        ({"code/net.py": b""}, "a TorchScript archive"),
        ({"../evil": b""}, "no plain path"),
        ({"/etc/evil": b""}, "no plain path"),
    ],
)
def test_archives_that_are_not_of_torch_are_refused(change, why, tmp_path):
    assert torch.equal(read_torch(zipped(tmp_path / "a.pt", {})), torch.ones(2))
    with pytest.raises(UserError, match=why):
        read_torch(zipped(tmp_path / "a.pt", change))


def test_a_script_is_named_though_its_code_is_compressed(tmp_path):
    with pytest.raises(UserError, match="a TorchScript archive"):
        read_torch(zipped(tmp_path / "a.pt", {"code/net.py": b"pass\n" * 99}, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("write", [foreign.write_zip, foreign.write_legacy, foreign.write_pickle])
def test_a_cut_file_is_to_be_downloaded_again(write, tmp_path):
    path = write(tmp_path / "a.pt", {"a": torch.ones(200)})
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"not a readable .*; download it again$"):
        read_torch(path)


def test_a_compressed_archive_is_refused(tmp_path):
    with pytest.raises(UserError, match="is compressed or encrypted"):
        read_torch(zipped(tmp_path / "a.pt", {}, zipfile.ZIP_DEFLATED))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_or_elsewhere_is_refused(tmp_path):
    path = foreign.write_zip(tmp_path / "a.pt", torch.ones(2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data/0", bytes(8))
    with pytest.raises(UserError, match="is there twice"):
        read_torch(path)
    data = bytearray(foreign.write_zip(path, torch.ones(2)).read_bytes())
    entry = data.index(b"PK\x01\x02")
    for offset, why in ((len(data) - 8, "outside the file"), (entry, "a header of its own that differs")):
        data[entry + 42 : entry + 46] = struct.pack("<I", offset)
        path.write_bytes(data)
        with pytest.raises(UserError, match=why):
            read_torch(path)


def test_an_old_file_of_the_other_byte_order_is_refused(tmp_path):
    path = foreign.write_legacy(tmp_path / "a.pt", torch.ones(2))
    path.write_bytes(path.read_bytes().replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    with pytest.raises(UserError, match="its numbers are big-endian"):
        read_torch(path)


class Rebuilt:
    """A tensor of any layout in a storage of 6 bytes."""

    def __init__(self, *layout: object):
        self.layout = layout

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, (torch.zeros(6).byte().untyped_storage(), *self.layout, False, {})


@pytest.mark.parametrize(
    "offset, size, stride, why",
    [
        (0, (7,), (1,), "outside its storage"),
        (1, (3, 2), (2, 1), "outside its storage"),
        (0, (2, 2), (5, 1), "outside its storage"),
        (0, (30, 30), (0, 0), "outside its storage"),
        (0, (3, 3), (1, 1), "outside its storage"),  # more elements than there are
        (0, (2, 3), (0, 1), "stride 0"),
        (-1, (1,), (1,), "not of natural numbers"),
        (0, (-1,), (1,), "not of natural numbers"),
        (0, (2,), (-1,), "not of natural numbers"),
        (0, (2**62,), (1,), "not of natural numbers"),
        (0, (2**40, 2**40, 0), (1, 1, 1), "too large"),
        (0, (2,), (1, 1), "do not fit"),
        (0, (1,) * 65, (1,) * 65, "do not fit"),
        (True, (1,), (1,), "not of natural numbers"),
        (0, [2], (1,), "not of natural numbers"),
    ],
)
def test_a_tensor_lies_in_its_storage_and_shows_nothing_twice(offset, size, stride, why, tmp_path):
    assert read_torch(foreign.write_legacy(tmp_path / "a.pt", Rebuilt(1, (2, 2), (3, 1)))).shape == (2, 2)
    with pytest.raises(UserError, match=why):
        read_torch(foreign.write_legacy(tmp_path / "a.pt", Rebuilt(offset, size, stride)))
