"""What cannot be imported is refused in one line that names the tensor, the field or the way out; and the command."""

import re

import foreign_files
import pytest
import torch
from golden_data import golden
from published_files import (
    NCSNPP,
    SMALLEST,
    TINY_EDM2,
    jax_checkpoint,
    module,
    msgpack,
    recipe_of_jax,
    smallest,
    snapshot,
    tcm_loss,
    weights,
)
from test_import_golden import by_head

from onejump.cli import main
from onejump.importers import import_model
from onejump.types import UserError

OPENAI, JAX = golden("openai_unet"), golden("ncsnpp_jax")


def refused(why, path, **given):
    with pytest.raises(UserError, match=why) as caught:
        import_model(path, **given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def test_a_tensor_too_many_in_a_pickle(tmp_path):
    extra = smallest() | {"model.enc.8x8_block9.norm0.bias": torch.zeros(3)}
    path = snapshot(tmp_path / "net.pkl", extra, "EDMPrecond", SMALLEST)
    refused("1 tensor with no place in SongUNetConfig: enc.8x8_block9", path)
    path = edm(tmp_path, smallest() | {"u": torch.zeros(3)}, SMALLEST)
    refused("EDMPrecond holds u, which has no place", path)


def test_a_tensor_too_few_of_another_shape_or_kind_or_another_filter(tmp_path):
    tensors, path = smallest(), tmp_path / "net.pth"

    def with_(**others):
        torch.save(tensors | {f"model.{name.replace('__', '.')}": w for name, w in others.items()}, path)
        return path

    refused("1 tensor with no place in SongUNetConfig: map_extra.bias", with_(map_extra__bias=torch.zeros(3)))
    refused(r"map_layer0.bias has shape \(15,\), .* needs \(16,\)", with_(map_layer0__bias=torch.zeros(15)))
    refused("map_layer0.bias is torch.int32", with_(map_layer0__bias=torch.zeros(16, dtype=torch.int32)))
    sharp = {"enc__4x4_down__skip__resample_filter": torch.full((1, 1, 2, 2), 0.5)}
    refused("resample_filter is another filter than SongUNet", with_(**sharp))
    torch.save({name: w for name, w in tensors.items() if ".bias" not in name}, path)
    refused(r"\d+ tensors of SongUNetConfig missing: map_layer0.bias, .*, \.\.\.", path)


def edm(tmp_path, tensors, arguments, class_name="EDMPrecond"):
    """A training state: torch's zip is read ten times faster than as many storages inside a pickle."""
    return foreign_files.write_zip(tmp_path / "state.pt", {"net": module(tensors, class_name, arguments)})


@pytest.mark.parametrize(
    "field",
    [
        {"decoder_type": "skip"},
        {"encoder_type": "skip"},
        {"embedding_type": "fourier"},
        {"channel_mult_emb": 2},
        {"label_dropout": 0.1},
        {"emb_norm": True},
        {"attn_type": "l2"},
        {"learnable_scale": True},
        {"model_type": "DiT"},
        {"some_field": 7},
        {"num_blocks": 10**9},
        {"model_channels": "many"},
        {"channel_mult": [2] * 1000},
    ],
)
def test_fields_that_we_do_not_have_are_refused_by_name(tmp_path, field):
    path = edm(tmp_path, {"model.map_layer0.bias": torch.zeros(1)}, SMALLEST | field)
    assert f"{next(iter(field))}=" in refused(".", path)


@pytest.mark.parametrize(
    "field", [{"clip_act": None}, {"res_balance": 0.5}, {"channel_mult_emb": 8}, {"dropout_res": -1}]
)
def test_fields_of_edm2_that_we_do_not_have_are_refused_by_name(tmp_path, field):
    path = edm(tmp_path, {"unet.out_gain": torch.zeros(())}, TINY_EDM2 | field, "Precond")
    assert f"{next(iter(field))}=" in refused(".", path)


@pytest.mark.parametrize("class_name", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_other_preconditionings_are_refused_by_name(tmp_path, class_name):
    refused(f"{class_name} .its preconditioning is another", edm(tmp_path, smallest(), SMALLEST, class_name))


def test_what_is_no_checkpoint(tmp_path):
    refused("no such file", tmp_path / "nothing")
    (tmp_path / "empty.pkl").touch()
    refused("empty", tmp_path / "empty.pkl")
    (tmp_path / "notes.txt").write_text("A list of things to do\n")
    refused("a text", tmp_path / "notes.txt")
    (tmp_path / "folder").mkdir()
    refused("nothing to import in this folder", tmp_path / "folder")
    generator = foreign_files.PersistentModule("Generator", {"z_dim": 512})
    foreign_files.write_pickle(tmp_path / "ffhq.pkl", {"G": generator, "D": None, "G_ema": generator})
    refused("a GAN's generator", tmp_path / "ffhq.pkl")
    torch.save({"epoch": 3, "weights": [torch.zeros(2)]}, tmp_path / "other.pt")
    refused("no network that is known here .it holds epoch, weights", tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    refused("it holds no network .a list", tmp_path / "list.pt")
    torch.save({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, tmp_path / "unet.bin")
    refused("name the folder with its config.json", tmp_path / "unet.bin")


def test_openais_qkv_has_to_be_said_where_it_is_3d(tmp_path):
    tensors = weights("imagenet64", OPENAI)
    torch.save(by_head(tensors, 32), tmp_path / "cm.pt")
    refused("give --qkv heads .its default. or --qkv block", tmp_path / "cm.pt", method="cm", head_channels=32)
    torch.save(tensors, tmp_path / "cm.pt")
    refused("4-d, which is always in blocks", tmp_path / "cm.pt", method="cm", qkv="heads", head_channels=32)
    refused("there are block, heads", tmp_path / "cm.pt", qkv="rows")
    torch.save(tensors | {"out.2.weight": torch.zeros(6, 32, 3, 3)}, tmp_path / "cm.pt")
    refused("6 channels out for 3 in; a variance", tmp_path / "cm.pt")
    torch.save({k: w for k, w in tensors.items() if "output_blocks.3" not in k}, tmp_path / "cm.pt")
    refused("no whole levels", tmp_path / "cm.pt")
    torch.save(tensors | {"input_blocks.0.1.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "cm.pt")
    refused("input_blocks.0.1.weight is a second enc.16x16_conv.weight", tmp_path / "cm.pt", method="cm")


def test_damaged_flax_checkpoints(tmp_path):
    pairs = zip(JAX["names"].tolist(), JAX["shapes"].tolist(), strict=True)
    arrays = {name: recipe_of_jax(name, tuple(map(int, shape.split("x")))) for name, shape in pairs}
    whole = jax_checkpoint(tmp_path / "checkpoint_80", arrays)
    data = whole.read_bytes()
    for cut in (len(data) - 1, len(data) // 2, 9):
        whole.write_bytes(data[:cut])
        refused("not a readable flax checkpoint", whole, method="cm")
    whole.write_bytes(data + b"\x00")
    refused("something behind its end", whole, method="cm")
    whole.write_bytes(msgpack({"params_ema": {}})[:-1] + b"\xdf\xff\xff\xff\xff")  # a map of four billion values
    refused("not a readable flax checkpoint", whole)
    whole.write_bytes(b"\x81\xa1a" + b"\x91" * 100_000)
    refused("nested too deep", whole)
    jax_checkpoint(whole, arrays | {"Dense_2/kernel": arrays["Dense_1/kernel"]})
    refused("params_ema/Dense_2/kernel has no place", whole, method="cm")
    jax_checkpoint(whole, {k: w for k, w in arrays.items() if k != "AttnBlockpp_0/NIN_1/W"})
    refused("the q, k or v of dec|the q, k or v of enc", whole, method="cm")
    jax_checkpoint(whole, {k: w for k, w in arrays.items() if k != "Conv_1/bias"})
    refused("1 tensor of SongUNetConfig missing: dec.16x16_aux_conv.bias", whole, method="cm")
    refused("without params_ema", (whole.write_bytes(msgpack({"step": 1})), whole)[1])


def test_what_is_given_may_not_contradict_the_file(tmp_path):
    net = module(smallest(), "ECMPrecond", SMALLEST)
    path = foreign_files.write_zip(tmp_path / "net.pt", {"ema": net, "loss_fn": tcm_loss(1.0)})
    refused("--method ect: .* is of tcm", path, method="ect")
    refused("--method fm: there are edm, cm", path, method="fm")
    refused("--qkv: .* is a file of EDM's family", path, qkv="block")
    refused("--head-channels: .* is a file of EDM's family", path, head_channels=64)
    refused("--t-min 90", path, t_min=90.0)
    assert import_model(path, t_min=2.0).sampler.mid == ()  # the published second time is below
    torch.save(weights("ctm"), tmp_path / "ctm.pt")
    refused("is of ctm .its network reads a second time", tmp_path / "ctm.pt", method="cm")


def test_ect_or_tcm_is_sampled_in_one_step_until_it_is_known(tmp_path):
    found = import_model(edm(tmp_path, smallest(), SMALLEST, "ECMPrecond"))
    assert found.sampler.mid == () and "ECT or TCM" in found.facts["training method"] and not found.undecided


def test_the_command_says_what_it_is_and_writes_what_samples(tmp_path, capsys):
    path, out = tmp_path / "model.pth", tmp_path / "model"
    torch.save(smallest(), path)
    assert main(["import", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"{sum(w.numel() for n, w in smallest().items() if 'filter' not in n):,}" in text
    for line in (
        "training method      not known",
        "licence              not stated",
        "EMA                  not stated",
    ):
        assert f"  {line}\n" in text
    assert not re.search("^  (jump|sampler|sampling|smallest time) ", text, re.MULTILINE)
    assert f"Next: onejump import {path} MODEL --method METHOD" in text
    assert main(["import", str(path), str(out)]) == 2 and not out.exists()
    assert "give --method edm, ect, tcm or ict" in capsys.readouterr().err
    assert main(["import", str(path), str(out), "--method", "tcm"]) == 0
    assert "t' = 1" in capsys.readouterr().out
    assert main(["sample", str(out), "--n", "2", "--steps", "2", "--out", str(tmp_path / "images.npz")]) == 0
    assert "times 80, 1" in capsys.readouterr().out
    assert main(["import", str(out)]) == 2 and "own format already" in capsys.readouterr().err
    single = tmp_path / "single.safetensors"
    assert main(["import", str(path), str(single), "--method", "edm"]) == 0
    assert main(["import", str(single)]) == 2 and "own format already" in capsys.readouterr().err


def test_nothing_that_is_there_is_written_over(tmp_path, capsys):
    """Neither a trained stage, nor its run's folder, nor a file; and no folder gets the name of a file."""
    path, model = tmp_path / "model.pth", tmp_path / "run/stage2/model"
    torch.save(smallest(), path)
    assert main(["import", str(path), str(model), "--method", "ect"]) == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    (tmp_path / "new.safetensors").write_bytes(b"mine")
    for out, why in (
        ("run/stage2/model", "not empty"),
        ("run", "not empty"),
        ("model.pth", "without|leave out .pth"),
        ("back.pth", "leave out .pth"),
        ("out.safetensors.bak", "leave out .bak"),
        ("new.safetensors", "is there already"),
        ("model.pth/in", "is a file"),
    ):
        assert main(["import", str(path), str(tmp_path / out), "--method", "ect"]) == 2
        out, err = capsys.readouterr()
        assert re.search(why, err)
    assert (tmp_path / "new.safetensors").read_bytes() == b"mine"
    (tmp_path / "new.safetensors").unlink()
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_ncsnpp_and_ddpmpp_are_told_apart_by_all_their_fields(tmp_path):
    refused(
        "SongUNet with embedding_type=positional, encoder_type=residual",
        edm(tmp_path, {}, SMALLEST | NCSNPP | {"embedding_type": "positional"}),
    )
