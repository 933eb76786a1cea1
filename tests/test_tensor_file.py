"""Our files are the safetensors package's, byte for byte; they are written tensor by tensor, and read whole or not."""

import hashlib
import json
import resource
import weakref
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load, save

from onejump.tensor_file import DTYPES, MAX_HEADER, open_tensors, write_tensors
from onejump.types import UserError


def tensors():
    """One of every kind, and all that is unusual about shapes, strides and names."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 6, 5, generator=generator) * 50
    found = {f"{k % 3}.of {name}": noise[k % 4].abs().to(dtype) for k, (name, dtype) in enumerate(DTYPES.items())}
    found |= {"scalar": torch.tensor(2.5), "half scalar": torch.tensor(2.5, dtype=torch.bfloat16)}
    found |= {"empty": torch.zeros(0, 3), 'dög "quoted" \n': torch.ones(2)}
    found |= {"transposed": noise[0].T, "every second": noise[1, ::2, 1:4], "expanded": torch.ones(1, 1).expand(3, 4)}
    return found


def contiguous(found):
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_the_bytes_are_those_of_the_safetensors_package(tmp_path):
    path, found = tmp_path / "x.safetensors", tensors()
    digest = write_tensors(path, found)
    assert path.read_bytes() == save(contiguous(found))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    write_tensors(path, {"a": torch.ones(3)}, lambda digest: {"key": "välue"})
    assert path.read_bytes() == save({"a": torch.ones(3)}, {"key": "välue"})


def test_what_is_read_is_what_was_written_and_what_the_package_reads(tmp_path):
    path, found = tmp_path / "x.safetensors", tensors()
    write_tensors(path, found)
    file = open_tensors(path)
    read, digest = file.load(file.raw)
    theirs = load(path.read_bytes())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.keys() == theirs.keys() == found.keys()
    for name, tensor in found.items():
        assert bits(read[name]) == bits(theirs[name]) == bits(tensor), name


def test_metadata_are_told_a_checksum_that_does_not_depend_on_them(tmp_path):
    path, found = tmp_path / "x.safetensors", tensors()
    plain = write_tensors(tmp_path / "plain.safetensors", found)
    digest = write_tensors(path, found, lambda digest: {"sha256": digest, "other": "text"})
    file = open_tensors(path)
    assert digest == plain == file.metadata["sha256"] == file.load(file.plain)[1] != file.load(file.raw)[1]
    assert file.plain == open_tensors(tmp_path / "plain.safetensors").raw


class OneByOne(Mapping):
    """Makes each tensor when it is asked for, and counts how many are alive at once."""

    def __init__(self):
        self.alive, self.most = weakref.WeakSet(), 0

    def __getitem__(self, name):
        made = torch.full((64, 64), float(name)).T
        self.alive.add(made)
        self.most = max(self.most, len(self.alive))
        return made

    def __iter__(self):
        return map(str, range(20))

    def __len__(self):
        return 20


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    lazy = OneByOne()
    write_tensors(tmp_path / "x.safetensors", lazy)
    assert lazy.most <= 2  # the one before is let go when the next is there
    assert load((tmp_path / "x.safetensors").read_bytes())["7"][3, 3] == 7


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError):
            write_tensors(path, {"a": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(UserError, match="b: torch.complex64"):
        write_tensors(path, {"a": torch.ones(3), "b": torch.ones(3, dtype=torch.complex64)})
    with pytest.raises(UserError, match="4,194,304 are allowed"):
        write_tensors(path, {"a" * MAX_HEADER: torch.ones(3)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def file_of(path, header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def a(**changed):
    return {"a": {**GOOD["a"], **changed}}


@pytest.mark.parametrize(
    "header",
    [
        *(b"", b"{", b"[]", b"7", b"null", b"\xff{}", b'{"a": {}}', b'{"a": 3}', b"[" * 100_000, b"9" * 5_000),
        *(a(dtype="F31"), a(dtype=None), a(dtype=[]), a(shape=[3]), a(shape=[-2]), a(shape=[2.0]), a(shape=[True, 2])),
        *(a(shape=2), a(shape="2"), a(shape=[1] * 10**5), a(shape=[2**62, 2**62]), a(shape=[0])),
        *(a(data_offsets=[8, 16]), a(data_offsets=[0]), a(data_offsets=None), a(data_offsets=[-8, 0])),
        *(a(data_offsets=[0, 2**70]), a(shape=[2**60], data_offsets=[0, 2**62]), a(shape=[1], data_offsets=[0, 4])),
        {**GOOD, "b": GOOD["a"]},
        {**GOOD, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {**GOOD, "__metadata__": {"a": 3}},
        {**GOOD, "__metadata__": "text"},
        {**GOOD, "__metadata__": None},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header):
    path = file_of(tmp_path / "x.safetensors", GOOD)
    assert torch.equal(open_tensors(path).load(b"")[0]["a"], torch.zeros(2))
    with pytest.raises(ValueError, match="^the header of x.safetensors is damaged") as refusal:
        open_tensors(file_of(path, header))
    assert len(str(refusal.value)) < 300


def test_a_length_that_lies_reads_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in (2**64 - 1, 2**63, 10_000):
        with pytest.raises(ValueError, match="x.safetensors is no safetensors file, or only the beginning of one"):
            open_tensors(file_of(path, GOOD, length=length))
    with open(file_of(path, GOOD, length=MAX_HEADER + 1), "r+b") as file:
        file.truncate(2**40)  # a hole: no disk is used
    with pytest.raises(ValueError, match="4,194,304 are allowed"):
        open_tensors(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(6.0), "b": torch.arange(3)})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError):
            open_tensors(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="48 bytes of data announced, 49 there"):
        open_tensors(path)


def test_a_file_cut_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(6.0)})
    file = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut off"):
        file.load(file.raw)
