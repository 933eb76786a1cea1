"""Checkpoint files of the real layout are read to the bit; anything else is refused, and nothing is run."""

import gc
import importlib
import io
import pickle
import sys
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import foreign_files as foreign
import numpy as np
import pytest
import torch
from torch import nn

from onejump.importers.torch_file import ModuleRecord, read_torch

every_kind = pytest.mark.parametrize("write", foreign.KINDS.values(), ids=foreign.KINDS)

TENSORS = {
    "model.map_layer0.weight": torch.randn(4, 3, dtype=torch.float64),
    "model.enc.8x8_conv.weight": torch.randn(2, 2, 3, 3),
    "model.enc.8x8_conv.bias": torch.randn(2),
    "model.enc.8x8_block0.qkv.weight": torch.randn(6, 2, 1, 1).half(),
    "model.dec.8x8_up.resample_filter": torch.ones(1, 1, 2, 2) / 4,
    "model.out_norm.weight": torch.randn(2).bfloat16(),
}
CLASSES = {
    "": ("EDMPrecond", {"img_resolution": 8, "sigma_data": 0.5}),
    "model": ("SongUNet", {"channel_mult": [1, 2]}),
}


def snapshot(source: str = foreign.SOURCE) -> dict:
    """What EDM, ECT and TCM put in a network-snapshot-*.pkl."""
    net = foreign.network(TENSORS, CLASSES, {"model.dec.8x8_up.resample_filter"}, {"": {"sigma_max": 80.0}}, source)
    loss = foreign.PersistentObject("ECMLoss", {"q": 2}, source, q=2, P_mean=-1.1, ratio=np.float32(0.5))
    return {
        "ema": net,
        "loss_fn": loss,
        "augment_pipe": None,
        "dataset_kwargs": foreign.EasyDict(path="cifar10.zip", resolution=32, use_labels=False),
    }


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


@every_kind
def test_a_snapshot_of_the_field_is_read_to_the_bit(write, tmp_path):
    expected = snapshot()["ema"].state_dict()
    value = read_torch(write(tmp_path / "network-snapshot.pkl", snapshot()))
    net, loss = value["ema"], value["loss_fn"]
    assert list(value) == ["ema", "loss_fn", "augment_pipe", "dataset_kwargs"]
    assert set(expected) == set(TENSORS)
    assert_same(net.state_dict(), expected)
    assert (net.class_name, net.init_args, net.init_kwargs) == ("EDMPrecond", (), CLASSES[""][1])
    unet = net.attributes["_modules"]["model"]
    assert (unet.class_name, unet.init_kwargs) == ("SongUNet", {"channel_mult": [1, 2]})
    assert unet.attributes["_modules"]["enc"].class_name == "ModuleDict"
    assert net.attributes["sigma_max"] == 80.0 and net.attributes["training"] is False
    assert (loss.class_name, loss.init_kwargs, loss.attributes["ratio"]) == ("ECMLoss", {"q": 2}, 0.5)
    assert value["dataset_kwargs"] == {"path": "cifar10.zip", "resolution": 32, "use_labels": False}


def test_the_source_in_a_snapshot_is_never_run_nor_its_modules_imported(tmp_path, monkeypatch):
    marker = tmp_path / "was-run"
    packages = tmp_path / "packages"
    for name in ("torch_utils/persistence.py", "dnnlib/util.py"):
        (packages / name).parent.mkdir(parents=True)
        (packages / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    path = foreign.write_pickle(tmp_path / "a.pkl", snapshot(f"open({str(marker)!r}, 'w').close()\n"))
    monkeypatch.syspath_prepend(packages)
    importlib.invalidate_caches()
    assert isinstance(read_torch(path)["ema"], ModuleRecord)
    assert not marker.exists() and not {"torch_utils", "torch_utils.persistence", "dnnlib"} & set(sys.modules)
    import dnnlib.util  # noqa: F401

    assert marker.exists(), "the trap works"
    for name in ("dnnlib", "dnnlib.util"):
        del sys.modules[name]


def network() -> nn.Module:
    net = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(2, 3, 3), norm=nn.BatchNorm2d(3), act=nn.SiLU(), last=nn.Linear(3, 1))
    )
    net.norm.register_buffer("passing", torch.ones(1), persistent=False)
    net.add_module("none", None)
    return net


@every_kind
def test_modules_of_torch_and_their_state_dicts_are_read_in_order(write, tmp_path):
    net = network()
    value = read_torch(write(tmp_path / "a.pt", {"net": net, "state": net.state_dict(), "step": 3}))
    assert_same(value["net"].state_dict(), net.state_dict())
    assert_same(value["state"], net.state_dict())
    assert value["net"].class_name == "Sequential" and value["step"] == 3


@every_kind
def test_the_state_of_an_optimiser_is_read(write, tmp_path):
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.randn(3, 2), "exp_avg_sq": torch.rand(3, 2)}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.99), "foreach": None, "maximize": False, "params": [0, 1]}]
    expected = {"state": {0: moments, 1: moments}, "param_groups": groups}
    value = read_torch(write(tmp_path / "a.pt", {"optimizer_state": expected, "resume_tick": 7}))["optimizer_state"]
    assert value["param_groups"] == expected["param_groups"]
    assert list(value["state"]) == list(expected["state"])
    for index, state in expected["state"].items():
        assert_same(value["state"][index], state)


@every_kind
def test_plain_values_and_arrays_keep_their_meaning(write, tmp_path):
    whole = torch.arange(24.0)
    value = {
        "text": "é",
        "bytes": b"\x00\xff",
        "no bytes": b"",
        "set": {1, 2},
        "frozen": frozenset("a"),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cuda", 1),
        "ordered": OrderedDict(b=1, a=2),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "empty": np.zeros((0, 2)),
        "number": np.float64(0.25),
        "flag": np.bool_(True),
    }
    tensors = {
        "strided": whole.view(4, 6)[1:3, ::2].t(),
        "part": whole[5:7],
        "whole": whole,
        "flags": torch.tensor([True, False]),
        "int": torch.tensor(-5),
        "uint8": torch.arange(3, dtype=torch.uint8),
        "nothing": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "buffer": nn.Buffer(torch.ones(1)),
    }
    found = read_torch(write(tmp_path / "a.pt", value | tensors))
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.data) and found[name].dtype == tensor.dtype, name
        assert not found[name].requires_grad
    assert found["strided"].stride() == tensors["strided"].stride()
    for name in ("array", "columns", "empty"):
        assert np.array_equal(found[name], value[name]) and found[name].dtype == value[name].dtype, name
    plain = value | {"size": (2, 3), "device": "cuda:1", "number": 0.25, "flag": True, "ordered": {"b": 1, "a": 2}}
    for name in plain.keys() - {"array", "columns", "empty"}:
        assert found[name] == plain[name] and type(found[name]) in (type(plain[name]), memoryview), name


class OwnMethod(foreign.PersistentObject):
    """ECT's loss, which keeps a method of its own as an attribute: pickle writes getattr(loss, its name)."""

    def __init__(self):
        super().__init__("ECMLoss", q=2)
        self.state["t_to_r"] = self.t_to_r_const

    def t_to_r_const(self) -> None: ...


@every_kind
def test_an_object_that_keeps_its_own_method_is_read(write, tmp_path):
    loss = read_torch(write(tmp_path / "a.pkl", {"loss_fn": OwnMethod()}))["loss_fn"]
    owner, name = loss.attributes["t_to_r"].args
    assert name == "t_to_r_const" and owner.attributes is loss.attributes and loss.attributes["q"] == 2


class Storage:
    """Pickled as the persistent id of a storage."""


class Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return ("storage", torch.FloatStorage, "7", "cuda:0", 6, ("8", 2, 3)) if isinstance(value, Storage) else None


class Rebuilt:
    """A tensor as the first versions of torch wrote it."""

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor, (Storage(), 1, (2,), (1,))


def test_a_view_of_a_storage_from_a_gpu_in_an_old_file_is_read(tmp_path):
    file = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}):
        pickle.dump(value, file, 2)
    Pickler(file, 2).dump([Rebuilt()])
    pickle.dump(["7"], file, 2)
    path = tmp_path / "old.pt"
    path.write_bytes(file.getvalue() + (6).to_bytes(8, "little") + torch.arange(6.0).numpy().tobytes())
    assert read_torch(path)[0].tolist() == [3.0, 4.0]


def anonymous_memory() -> int:
    """Bytes of this process that are no file's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) << 10


@pytest.mark.parametrize("kind", ["pickle4", "pickle5", "zip", "legacy"])
def test_tensors_are_views_of_the_file(kind, tmp_path):
    path = foreign.KINDS[kind](tmp_path / "a.pt", {"a": torch.arange(12_500_000, dtype=torch.int32)})  # 50 MB
    gc.collect()
    before = anonymous_memory()
    tracemalloc.start()
    tensor = read_torch(path)["a"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert int(tensor[::1000].sum(dtype=torch.int64)) == sum(range(0, 12_500_000, 1000))
    assert peak < 2 << 20 and anonymous_memory() - before < 4 << 20
