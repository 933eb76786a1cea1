"""Files that are made to cost much or to break the arithmetic end in one line; and what TCM's files tell of TCM."""

import json
import resource
from pathlib import Path

import foreign_files
import numpy as np
import pytest
import torch
from published_files import SMALLEST, TINY_EDM2, module, msgpack, smallest, tcm_loss, weights
from test_import_mistakes import edm, refused

from onejump.importers import import_model
from onejump.importers.arguments import Arguments
from onejump.importers.diffusers_scheduler import read_schedule
from onejump.importers.edm import dropout_resolution
from onejump.importers.imported import tensor_names
from onejump.networks.diffusers_config import SCHEDULER, adm_config
from onejump.types import UserError

LITTLE = {"model.map_layer0.bias": torch.zeros(1)}  # too few tensors, where the arguments are refused before


def test_names_of_dropped_tensors_are_short_and_few():
    inner = [torch.zeros(1)] * 300_000
    for _ in range(40):
        inner = {"k" * 200: inner}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = tensor_names(inner, "state")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert max(map(len, names)) < 1100 and names[-1].endswith("and 290,000 more")


def test_long_and_deep_paths_of_flax_arrays_are_refused(tmp_path):
    for key, depth in (("k" * 4000, 3), ("k", 20)):
        inner = np.zeros(0, np.float32)
        for _ in range(depth):
            inner = {key: inner}
        for part in ("params_ema", "opt_state"):
            (tmp_path / "checkpoint").write_bytes(msgpack({"step": 1, "params_ema": {}} | {part: inner}))
            refused("an array's path of more than 16 parts or 1000 letters", tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "field",
    [
        {"decoder_type": np.zeros(3)},
        {"encoder_type": np.zeros(3)},
        {"resample_filter": [torch.zeros(2), 1]},
        {"sigma_data": 10**400},
        {"sigma_data": float("inf")},
        {"dropout": 10**400},
    ],
)
def test_arguments_that_are_no_plain_numbers_are_refused_by_name(tmp_path, field):
    message = refused(next(iter(field)), edm(tmp_path, LITTLE, SMALLEST | field))
    assert str(tmp_path) in message and "cannot be imported" not in message


@pytest.mark.parametrize("time", [-1, 80, 10**400])
def test_times_out_of_range_are_refused_by_name(tmp_path, time):
    path = edm(tmp_path, smallest(), SMALLEST | {"sigma_min": time}, "ECMPrecond")
    refused("state.pt: .*sigma_min=", path, method="ect")
    net = module(smallest(), "ECMPrecond", SMALLEST)
    refused("t_lower=", foreign_files.write_zip(path, {"ema": net, "loss_fn": tcm_loss(time)}))


def test_whatever_breaks_names_the_file(tmp_path):
    torch.save({"input_blocks.0.0.weight": torch.zeros(0, 3, 3, 3), "out.2.weight": torch.zeros(3)}, tmp_path / "a.pt")
    refused("a.pt: ", tmp_path / "a.pt")
    path = edm(tmp_path, LITTLE, TINY_EDM2 | {"channels_per_head": 5}, "Precond")
    refused("state.pt: ", path)


@pytest.mark.parametrize(
    "field", [{"rho": 0.001}, {"rho": -1e-6}, {"sigma_max": 10**400}, {"_onejump": {"sampler": {}, "t_min": 10**400}}]
)
def test_a_schedule_beyond_floats_is_refused_by_name(tmp_path, field):
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": SCHEDULER} | field))
    with pytest.raises(UserError, match=next(iter(field))):
        read_schedule(file)


@pytest.mark.parametrize("dropout", [10**400, float("nan"), -0.1])
def test_diffusers_dropout_is_a_probability(dropout):
    with pytest.raises(UserError, match="dropout="):
        adm_config({"sample_size": 32, "dropout": dropout})


@pytest.mark.parametrize("kind", ["training state", "module"])
def test_without_a_loss_tcm_is_known_by_what_only_it_writes(tmp_path, kind):
    if kind == "module":
        arguments = TINY_EDM2 | {"model_type": "EDM2UNet", "dout_resolutions": [16, 8, 4, 2, 1]}
        content = module(weights("tcm"), "ECMPrecond", arguments)
    else:
        content = {"net": module(smallest(), "ECMPrecond", SMALLEST), "resume_tick": 5}
    path = foreign_files.write_zip(tmp_path / "state.pt", content)
    found = import_model(path)
    assert found.t_min == 1 and found.facts["training method"].startswith("tcm (")
    assert found.sampler.mid == (1.0,) and "--t-min 0 for stage 1" in found.facts["t_min"]
    assert import_model(path, t_min=0.0).t_min == 0
    refused("is of tcm", path, method="ect")


def test_a_whole_float_is_a_resolution():
    arguments = Arguments(Path("file"), "Precond", {"dropout_res": 16.0})
    assert dropout_resolution(arguments, 64, (1, 2, 3, 4)) == 16
    with pytest.raises(UserError, match="dropout_res=16.5"):
        dropout_resolution(Arguments(Path("file"), "Precond", {"dropout_res": 16.5}), 64, (1, 2, 3, 4))
