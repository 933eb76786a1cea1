"""A saved model comes back bit for bit, from a folder and from a single file, for every network."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_setup import NETWORKS, PLACES, TINY, UNET, assert_same, rewrite, samples, saved_model
from tiny_run import finished_run

from onejump.analytic_jump import Analytic
from onejump.cli import main
from onejump.config_json import from_json
from onejump.ema import ConstantEMA, PowerEMA
from onejump.model import ConsistencyModel
from onejump.networks.layers import empty_network
from onejump.precond import ToData
from onejump.samplers import ODE, Trajectory
from onejump.saved import load_model, model_folder, model_sha256, save_model
from onejump.types import UserError


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", saved_model())
    return tmp_path / "model"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_round_trip_is_bit_exact_in_weights_samples_and_configuration(tmp_path, kind, place):
    saved = saved_model(NETWORKS[kind])
    save_model(tmp_path / place, saved)
    assert (tmp_path / place).is_file() == (place != "model")
    back = load_model(tmp_path / place)
    assert_same(back, saved)
    assert torch.equal(samples(saved), samples(back)) and samples(back).float().std() > 1


@pytest.mark.parametrize("place", PLACES)
def test_jumps_and_samplers_of_every_kind_come_back(tmp_path, place):
    table = Analytic((0.1, 0.3, 0.9), (-0.1, 1 / 3, 1e-17), teacher="0" * 64)
    for jump, sampler in ((table, Trajectory(gamma=0.1)), (ToData(), ODE(sigma_max=50.0))):
        saved = saved_model(TINY, (), sampler)
        saved.model.jump = jump
        save_model(tmp_path / place, saved)
        assert_same(load_model(tmp_path / place), saved)


@pytest.mark.parametrize("place", PLACES)
def test_weights_given_are_written_as_they_are_and_the_network_needs_none(tmp_path, place):
    """Mapped from a file, transposed, in half precision."""
    saved = saved_model()
    wanted = saved.model.net.state_dict()
    save_file({name: value.contiguous() for name, value in wanted.items()}, tmp_path / "other")
    given = load_file(tmp_path / "other")
    name = next(name for name, value in given.items() if value.ndim == 4 and len(set(value.shape)) > 2)
    given[name] = given[name].transpose(0, 1).contiguous().transpose(0, 1)
    assert not given[name].is_contiguous()
    empty = ConsistencyModel(empty_network(UNET), saved.model.precond, saved.model.jump, 1.5)
    save_model(tmp_path / place, dataclasses.replace(saved, model=empty), weights=given)
    assert_same(load_model(tmp_path / place), saved)
    half = {name: value.bfloat16() for name, value in wanted.items()}
    save_model(tmp_path / place, dataclasses.replace(saved, model=empty), weights=half)
    found = load_model(tmp_path / place).model.net.state_dict()
    assert all(found[name].dtype == torch.bfloat16 and torch.equal(found[name], half[name]) for name in half)
    with pytest.raises(UserError, match="on the meta device and has no weights"):
        save_model(tmp_path / place, dataclasses.replace(saved, model=empty))


@pytest.mark.parametrize("place", PLACES)
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, place):
    saved = saved_model()
    good = saved.model.net.state_dict()
    first = "map_layer0.bias"
    for weights, part in (
        ({name: value for name, value in good.items() if name != first}, f"{first} is missing"),
        (good | {"other": torch.ones(2)}, "other is none of this network's"),
        (good | {first: torch.ones(5)}, rf"{first} is \(5,\), the network's \(32,\)"),
        (good | {first: torch.ones(32, dtype=torch.int32)}, f"{first} is torch.int32, the network's torch.float32"),
    ):
        with pytest.raises(UserError, match=f"weights: {part}"):
            save_model(tmp_path / place, saved, weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", NETWORKS)
def test_all_that_a_network_holds_is_in_its_state_dict(kind):
    """Or a network built on the meta device and filled from a file would lack something."""
    net = empty_network(NETWORKS[kind])
    held = {name for name, _ in (*net.named_parameters(), *net.named_buffers())}
    full = NETWORKS[kind].build().state_dict()
    assert held == net.state_dict().keys() == full.keys()
    assert all(value.is_meta and value.shape == full[name].shape for name, value in net.state_dict().items())
    for module in net.modules():
        loose = {k for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
        assert not loose, f"{type(module).__name__}.{loose}"


@pytest.mark.parametrize("kind", NETWORKS)
def test_an_empty_network_draws_no_random_numbers(kind):
    state = torch.get_rng_state()
    empty_network(NETWORKS[kind])
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_does_without_torchs_compiler(tmp_path):
    """Which takes seconds to import, and 70 MB."""
    for kind, network in NETWORKS.items():
        save_model(tmp_path / kind, saved_model(network))
    code = """
import sys
from onejump.saved import load_model
for path in sys.argv[1:]:
    load_model(path)
print({"torch._dynamo", "sympy"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code, *(str(path) for path in tmp_path.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_a_folder_and_a_single_file_share_a_checksum(tmp_path, folder):
    save_model(tmp_path / "one.safetensors", load_model(folder))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert model_sha256(folder) == model_sha256(tmp_path / "one.safetensors") == digest
    assert load_file(tmp_path / "one.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_the_command_line_samples_from_a_single_file(tmp_path, folder):
    save_model(tmp_path / "one.safetensors", load_model(folder))
    for name, place in (("a.npz", folder), ("b.npz", tmp_path / "one.safetensors")):
        assert main(["sample", str(place), "--n", "4", "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_folder_of_format_1_still_loads(folder):
    def to_format_1(content):
        content["format"] = 1
        del content["licence"], content["ema"]

    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors")  # by the package, as then
    rewrite(folder, to_format_1)
    back = load_model(folder)
    assert (back.licence, back.ema) == ("", "")
    assert_same(dataclasses.replace(back, licence="CC BY-NC-SA 4.0", ema="power sigma_rel 0.05"), saved_model())


def test_the_finished_stages_of_a_run_say_which_average_they_are(tmp_path):
    run = finished_run(tmp_path)
    recipe = json.loads((run / "recipe.json").read_text())
    for name, stage in recipe["stages"].items():
        assert load_model(run / name).ema == from_json(stage["ema"]).name
    assert (ConstantEMA(0.9999).name, PowerEMA(16.97).name) == ("constant 0.9999", "power sigma_rel 0.05")


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


def test_saving_again_replaces_both_files(folder):
    other = saved_model(dataclasses.replace(UNET, model_channels=12))
    save_model(folder, other)
    assert load_model(folder).network.model_channels == 12
    assert load_file(folder / "model.safetensors").keys() == other.model.net.state_dict().keys()
