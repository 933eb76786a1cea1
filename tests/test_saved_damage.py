"""Damaged, foreign and hostile model files: one line that names the file, nothing run, nothing half loaded."""

import dataclasses
import hashlib
import pickle
import resource
import shutil

import pytest
import torch
from safetensors.torch import save_file
from saved_setup import PLACES, TINY, UNET, assert_same, rewrite, saved_model

from onejump.cli import main
from onejump.networks import MLPConfig
from onejump.saved import load_model, save_model
from onejump.types import UserError


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", saved_model())
    return tmp_path / "model"


@pytest.fixture
def single(tmp_path):
    save_model(tmp_path / "model.safetensors", saved_model(TINY, ()))
    return tmp_path / "model.safetensors"


def refusal(capsys, folder):
    """The line with which `sample` refuses the model."""
    assert main(["sample", str(folder), "--out", "x.png"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(folder) in err and len(err) < 900
    return err


def test_a_pickle_is_never_read(folder, capsys):
    """Neither under its own name nor as the weights."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(folder / "exploded"), "w"))

    (folder / "model.pt").write_bytes(pickle.dumps(Bomb()))
    load_model(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refusal(capsys, folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rewrite(folder, lambda content: content.update(sha256=digest))
    refusal(capsys, folder)
    (folder / "single.safetensors").write_bytes(pickle.dumps(Bomb()))
    refusal(capsys, folder / "single.safetensors")
    assert not (folder / "exploded").exists()


def test_changed_weights_are_refused(folder, capsys):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert "checksum" in refusal(capsys, folder)


def test_truncated_weights_are_refused(folder, capsys):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "bytes of data announced" in refusal(capsys, folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, capsys, missing):
    (folder / missing).unlink()
    assert missing in refusal(capsys, folder)


def test_weights_of_another_network_are_refused(folder, capsys):
    other = dataclasses.replace(UNET, model_channels=12).build().state_dict()
    save_file({name: value.contiguous() for name, value in other.items()}, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rewrite(folder, lambda content: content.update(sha256=digest))
    assert "map_label.weight is (12, 2), the network's (8, 2)" in refusal(capsys, folder)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c["network"].update(type="SongUnet"), "did you mean SongUNetConfig?"),
        (lambda c: c["network"].update(type="os.system"), "'os.system' is none of"),
        (lambda c: c["network"].update(blocks=3), "blocks: SongUNetConfig has no such field"),
        (lambda c: c["network"].update(num_blocks="many"), "num_blocks: expected a whole number"),
        (lambda c: c.update(network=c["precond"]), "not what its field says"),
        (lambda c: c.update(sampler=c["precond"]), "not what its field says"),
        (lambda c: c.update(jump=None), ""),
        (lambda c: c.pop("precond"), "configuration has no 'precond'"),
        (lambda c: c.pop("sha256"), "configuration has no 'sha256'"),
        (lambda c: c.update(t_min="low"), "'low'"),
        (lambda c: c.update(t_min=float("nan")), "a time, 0 or more, is needed"),
        (lambda c: c.update(format=3), "format 3, this version reads 1 to 2; install a newer onejump"),
        (lambda c: c.update(shape=[8, 8]), "channels, height and width"),
        (lambda c: c.update(shape="3x8"), "channels, height and width"),
        (lambda c: c.update(class_names=5), ""),
    ],
)
def test_an_edited_configuration_is_refused_in_one_line(folder, capsys, change, part):
    rewrite(folder, change)
    assert part in refusal(capsys, folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b'{"format', b"\xff\xfe\x00", b"null"])
def test_a_configuration_that_is_no_json_object_is_refused(folder, capsys, content):
    (folder / "config.json").write_bytes(content)
    refusal(capsys, folder)


def test_a_draft_of_a_save_that_was_killed_is_no_model(folder, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "other" / ".model.safetensors")
    shutil.copy(folder / "config.json", tmp_path / "other" / ".config.json")
    with pytest.raises(UserError, match="no model there"):
        load_model(tmp_path / "other")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_single_file_with_any_byte_changed_is_refused_or_the_same(single):
    """Bytes that mean nothing, such as spaces, may change; no other may."""
    data, same = single.read_bytes(), 0
    saved = load_model(single)
    header = 8 + int.from_bytes(data[:8], "little")
    for k in (*range(0, header, 5), *range(header, len(data), 9)):
        changed = bytearray(data)
        changed[k] ^= 1 << k % 8
        single.write_bytes(changed)
        try:
            back = load_model(single)
        except UserError as refusal:
            assert str(refusal).startswith(f"{single}: this model cannot be read (") and "\n" not in str(refusal)
        else:
            same += 1
            assert_same(back, saved)
    assert same < 5


def test_a_single_file_cut_anywhere_is_refused(single, capsys):
    data = single.read_bytes()
    for length in (0, 1, 8, 100, 2000, len(data) - 100, len(data) - 1):
        single.write_bytes(data[:length])
        with pytest.raises(UserError, match="this model cannot be read"):
            load_model(single)
    assert "bytes of data announced" in refusal(capsys, single)


def test_foreign_weights_are_told_from_ours(tmp_path, folder, capsys):
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors", {"format": "pt"})
    assert "no 'onejump' in its metadata" in refusal(capsys, tmp_path / "foreign.safetensors")
    line = refusal(capsys, folder / "model.safetensors")
    assert "if it belongs to a folder with config.json or model_index.json, name the folder" in line


def test_what_other_programs_wrote_is_told_to_be_imported_first(tmp_path, capsys):
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": 1}))
    assert f"has to be imported first: onejump import {tmp_path / 'net.pkl'} MODEL" in refusal(
        capsys, tmp_path / "net.pkl"
    )
    (tmp_path / "x.onnx").write_bytes(b"\x08\x08")
    assert "an exported graph" in refusal(capsys, tmp_path / "x.onnx")
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    (tmp_path / "pipe" / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for place in (tmp_path / "pipe", tmp_path / "pipe" / "unet"):
        assert f"onejump import {place} MODEL" in refusal(capsys, place)


def test_a_full_disk_leaves_the_model_that_was_there(tmp_path):
    big = MLPConfig(shape=(3, 8, 8), width=400, depth=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for place in PLACES:
        save_model(tmp_path / place, saved_model())
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        try:
            with pytest.raises(UserError, match="model.safetensors: could not write"):
                save_model(tmp_path / place, saved_model(big, ()))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_same(load_model(tmp_path / place), saved_model())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "model", *PLACES[1:], *PLACES[1:]]
