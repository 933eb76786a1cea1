"""A saved model comes back bit for bit, or not at all; nothing in its folder is ever run."""

import dataclasses
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import finished_run

from onejump.cli import main
from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.precond import CM, EDM
from onejump.samplers import ODE, Multistep
from onejump.saved import SavedModel, load_model, model_folder, save_model
from onejump.types import UserError

UNET = SongUNetConfig(8, 3, 2, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
TWO_MORE = Multistep(mid=(2.0, 1.5))


def saved_model(network=UNET, shape=(3, 8, 8), sampler=TWO_MORE, names=("cat", "dög")):
    torch.manual_seed(0)
    net = network.build()
    for p in net.parameters():
        torch.nn.init.normal_(p)
    model = ConsistencyModel(net, EDM(sigma_data=0.7), CM(sigma_data=0.7), t_min=1.5)
    return SavedModel(model, network, sampler, shape, names, {"stage": "stage2", "step": 7})


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", saved_model())
    return tmp_path / "model"


def rewrite(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def refusal(capsys, folder):
    """The line with which `sample` refuses the model."""
    assert main(["sample", str(folder), "--out", str(folder / "x.png")]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(folder) in err
    return err


@pytest.mark.parametrize(
    "saved",
    [
        saved_model(),
        saved_model(MLPConfig(shape=(1, 4, 4), width=8, depth=1), (1, 4, 4), ODE(sigma_max=50.0), ()),
    ],
)
def test_round_trip_is_bit_exact(tmp_path, saved):
    save_model(tmp_path / "model", saved)
    back = load_model(tmp_path / "model")
    before, after = saved.model.net.state_dict(), back.model.net.state_dict()
    assert before.keys() == after.keys()
    assert all(
        a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
        for a, b in zip(before.values(), after.values(), strict=True)
    )
    for field in ("network", "sampler", "shape", "class_names", "provenance"):
        assert getattr(back, field) == getattr(saved, field)
    assert (back.model.t_min, back.model.precond, back.model.jump) == (1.5, saved.model.precond, saved.model.jump)
    assert not back.model.training and not any(p.requires_grad for p in back.model.parameters())


def test_what_comes_back_computes_the_same_bits(folder):
    model = saved_model().model.eval()
    x, t, cond = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 50.0]), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(model(x, t, cond=cond), load_model(folder).model(x, t, cond=cond))


def test_a_model_is_found_from_its_stage_and_its_run_the_last_finished_stage_first(tmp_path):
    run = finished_run(tmp_path)
    assert model_folder(run) == run / "stage2" / "model" == model_folder(run / "stage2")
    os.utime(run / "teacher" / "model" / "config.json")  # as copying a folder may: the order is the recipe's
    assert model_folder(run) == run / "stage2" / "model"
    (run / "stage2" / "stage.json").unlink()
    assert model_folder(run) == run / "stage1" / "model"
    (run / "recipe.json").write_text('{"stages')
    with pytest.raises(UserError, match="recipe.json: cannot be read"):
        model_folder(run)


def test_a_pickle_is_never_read(folder, capsys):
    """Neither under its own name nor as the weights."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(folder / "exploded"), "w"))

    (folder / "model.pt").write_bytes(pickle.dumps(Bomb()))
    load_model(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    refusal(capsys, folder)
    import hashlib

    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rewrite(folder, lambda content: content.update(sha256=digest))
    refusal(capsys, folder)
    assert not (folder / "exploded").exists()


def test_changed_weights_are_refused(folder, capsys):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert "checksum" in refusal(capsys, folder)


def test_truncated_weights_are_refused(folder, capsys):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "checksum" in refusal(capsys, folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, capsys, missing):
    (folder / missing).unlink()
    assert missing in refusal(capsys, folder)


def test_weights_of_another_network_are_refused(folder, capsys):
    import hashlib

    other = dataclasses.replace(UNET, model_channels=12).build().state_dict()
    save_file({name: value.contiguous() for name, value in other.items()}, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rewrite(folder, lambda content: content.update(sha256=digest))
    assert "size mismatch" in refusal(capsys, folder)


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
        (lambda c: c.pop("precond"), "config.json has no 'precond'"),
        (lambda c: c.pop("sha256"), "config.json has no 'sha256'"),
        (lambda c: c.update(t_min="low"), "'low'"),
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


def test_saving_again_replaces_both_files(folder):
    other = saved_model(dataclasses.replace(UNET, model_channels=12))
    save_model(folder, other)
    assert load_model(folder).network.model_channels == 12
    assert load_file(folder / "model.safetensors").keys() == other.model.net.state_dict().keys()
