import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from onejump import checkpoint
from onejump.checkpoint import load_checkpoint, save_checkpoint
from onejump.types import UserError


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(7, 5, generator=generator),
        "bf16": torch.randn(6, generator=generator).bfloat16(),
        "fp16": torch.randn(6, generator=generator).half(),
        "float64": torch.randn(3, generator=generator, dtype=torch.float64),
        "count": torch.tensor(2**62 + 1),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "special": torch.tensor([-0.0, float("inf"), float("nan"), 1e-45]),
        "empty": torch.zeros(0, 3),
    }


def bits(tensor):
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.contiguous().numpy(force=True).tobytes()
        if (tensor.dtype is not torch.bfloat16)
        else tensor.view(torch.int16).numpy().tobytes(),
    )


def same(a, b):
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def three(folder):
    for step in (10, 20):
        save_checkpoint(folder, step, tensors(step), {"step_again": step})
    return folder / "step-00000020"


def test_round_trip_is_bit_exact(tmp_path):
    meta = {"seconds": 0.1 + 0.2, "text": "naïve", "nested": {"none": None, "list": [1, 2.5]}}
    path = save_checkpoint(tmp_path, 1200, tensors(), meta)
    saved = load_checkpoint(tmp_path)
    assert path == tmp_path / "step-00001200" and sorted(p.name for p in path.iterdir()) == [
        "state.json",
        "state.safetensors",
    ]
    assert (saved.step, saved.meta, saved.warnings, saved.path) == (1200, meta, (), path)
    assert same(saved.tensors, tensors())


def test_aliased_and_strided_tensors_keep_their_values(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    views = {"base": base, "again": base, "row": base[1], "transposed": base.t(), "every_other": base[:, ::2]}
    save_checkpoint(tmp_path, 1, views, {})
    loaded = load_checkpoint(tmp_path).tensors
    assert same(loaded, {name: view.clone().contiguous() for name, view in views.items()})
    loaded["base"].zero_()
    assert loaded["again"].sum() == base.sum()


def test_loaded_tensors_outlive_their_file(tmp_path):
    path = save_checkpoint(tmp_path, 1, tensors(), {})
    saved = load_checkpoint(tmp_path)
    (path / "state.safetensors").write_bytes(b"")
    assert same(saved.tensors, tensors())


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_the_newest_two_are_kept(tmp_path):
    for step in (5, 100, 20, 30):  # 100: left by an abandoned run, never removed by an earlier step
        save_checkpoint(tmp_path, step, tensors(), {}, keep=2)
    assert checkpoint.saved_steps(tmp_path) == [20, 30, 100]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, name, share):
    file = three(tmp_path) / name
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    saved = load_checkpoint(tmp_path)
    assert saved.step == 10 and same(saved.tensors, tensors(10))
    (warning,) = saved.warnings
    assert "step-00000020" in warning and "step-00000010" in warning and "\n" not in warning


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path, name):
    file = three(tmp_path) / name
    content = file.read_bytes()
    for at in {0, 1, 7, 8, 9, 40, *range(0, len(content) - 1, max(len(content) // 40, 1)), len(content) - 2}:
        file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        assert load_checkpoint(tmp_path).step == 10, f"byte {at} of {len(content)}: {content[at : at + 1]!r}"
    file.write_bytes(content)
    assert load_checkpoint(tmp_path).step == 20


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_missing_file_falls_back_to_the_one_before(tmp_path, name):
    (three(tmp_path) / name).unlink()
    saved = load_checkpoint(tmp_path)
    assert saved.step == 10 and name in saved.warnings[0]


@pytest.mark.parametrize("content", ["[]", "null", "{}", "3", '"x"', '{"checksum": "0"}'])
def test_json_of_another_kind_falls_back(tmp_path, content):
    (three(tmp_path) / "state.json").write_text(content)
    assert load_checkpoint(tmp_path).step == 10


def test_a_renamed_checkpoint_is_refused(tmp_path):
    three(tmp_path).rename(tmp_path / "step-00000030")
    assert load_checkpoint(tmp_path).step == 10


def test_all_damaged_is_a_user_error_that_names_them(tmp_path):
    three(tmp_path)
    for file in tmp_path.glob("*/state.json"):
        file.unlink()
    with pytest.raises(UserError, match="step-00000020.*step-00000010.*delete") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    (three(tmp_path) / "state.json").unlink()
    save_checkpoint(tmp_path, 20, tensors(21), {})
    saved = load_checkpoint(tmp_path)
    assert saved.step == 20 and not saved.warnings and same(saved.tensors, tensors(21))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_no_pickle_is_ever_read(tmp_path):
    path = three(tmp_path)
    torch.save({"weight": torch.ones(2)}, path / "state.safetensors")
    content = json.loads((path / "state.json").read_text())
    content.pop("checksum")
    content["tensors_sha256"] = checkpoint.file_sha256(path / "state.safetensors")
    content["checksum"] = checkpoint._checksum(content)  # valid checksums, so that only the format can stop it
    (path / "state.json").write_text(json.dumps(content))
    assert load_checkpoint(tmp_path).step == 10


def raise_no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["save_file", "os.replace", "os.fsync", "json.dumps"])
def test_a_full_disk_loses_nothing_old(tmp_path, monkeypatch, where):
    three(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(f"onejump.checkpoint.{where}", raise_no_space)
        with pytest.raises(UserError) as error:
            save_checkpoint(tmp_path, 30, tensors(30), {})
    assert str(error.value) == (
        f"checkpoint: could not write {tmp_path / 'step-00000030'} (No space left on device); "
        "the last good one is step 20; free space and run the same command again"
    )
    assert sorted(tmp_path.rglob("*")) == before and load_checkpoint(tmp_path).step == 20
    save_checkpoint(tmp_path, 30, tensors(30), {})
    assert load_checkpoint(tmp_path).step == 30


def test_a_file_that_may_not_grow_loses_nothing_old(tmp_path):
    """A real failure of the operating system, inside safetensors' own writer."""
    save_checkpoint(tmp_path, 10, tensors(), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="could not write .*step-00000020.*last good one is step 10"):
            save_checkpoint(tmp_path, 20, {"large": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


def test_replacing_a_damaged_checkpoint_fails_without_a_trace(tmp_path, monkeypatch):
    (three(tmp_path) / "state.json").unlink()
    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: raise_no_space() if a.name == ".saving" else replace(a, b))
        with pytest.raises(UserError):
            save_checkpoint(tmp_path, 20, tensors(), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


KILLED = """
import os, signal, sys, pathlib, torch
from onejump.checkpoint import save_checkpoint
folder = pathlib.Path(sys.argv[1])
save_checkpoint(folder, 10, {"a": torch.ones(3)}, {})
os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(folder, 20, {"a": torch.zeros(3)}, {})
"""


def test_a_kill_before_the_rename_leaves_the_old_one(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == [".saving", "step-00000010"]
    saved = load_checkpoint(tmp_path)
    assert saved.step == 10 and saved.tensors["a"].sum() == 3 and not saved.warnings
    save_checkpoint(tmp_path, 20, {"a": torch.zeros(3)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_a_copied_folder_is_as_good(tmp_path):
    three(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_checkpoint(tmp_path / "b").step == 20
