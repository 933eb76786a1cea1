import json
from argparse import ArgumentParser

import pytest
import torch
from saved_setup import TINY, saved_model

from onejump import cli_ema
from onejump.ema import Profile, Snapshots
from onejump.posthoc import Averager, mapped, save_snapshot
from onejump.saved import load_model, save_model
from onejump.types import UserError


def ema(*argv) -> None:
    """`onejump ema` with these words."""
    parser = ArgumentParser()

    def add(name, command, text, epilog):
        parser.set_defaults(command=command)
        return parser

    cli_ema.add_commands(add)
    args = parser.parse_args([str(word) for word in argv])
    args.command(args)()


@pytest.fixture
def stage(tmp_path):
    """A finished stage of 40 steps with a snapshot every 5, and the average it would have of width 0.03."""
    folder, saved = tmp_path / "run" / "stage1", saved_model(TINY)
    parameters = dict(saved.model.net.named_parameters())
    averager = Averager(Snapshots(count=8), parameters)
    reference = Averager(Snapshots((0.075,)), parameters)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n in range(1, 41):
            for p in parameters.values():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
            for these in (averager, reference):
                for averages, decay in zip(these.lists, these.decays(n), strict=True):
                    torch._foreach_lerp_(averages, list(parameters.values()), 1 - decay)
            if averager.due(n, 40):
                averager.save(folder / "ema", n)
    save_model(folder / "model", saved)
    return folder, reference.named(0)


def test_a_model_of_another_width_is_written_with_how_it_was_made(stage, tmp_path, capsys):
    folder, reference = stage
    ema(folder, "--sigma-rel", "0.05,0.075", "--out", tmp_path / "made")
    made, same, trained = (load_model(path) for path in (tmp_path / "made/0.075", tmp_path / "made/0.05", folder))
    for name, tensor in reference.items():
        torch.testing.assert_close(made.model.net.state_dict()[name], tensor, rtol=0, atol=0.02)
    last = mapped(folder / "ema/step-00000040-0.05.safetensors")
    assert all(torch.equal(same.model.net.state_dict()[name], tensor) for name, tensor in last.items())
    about = made.provenance["post-hoc EMA"]
    assert made.provenance["stage"] == trained.provenance["stage"] and made.provenance["step"] == 40
    assert abs(sum(about["weights"]) - 1) < 1e-7 and len(about["sha256"]) == len(about["snapshots"])
    assert (made.ema, about["sigma_rel"]) == ("power sigma_rel 0.075, post-hoc", 0.075)
    assert (made.network, made.sampler, made.shape) == (trained.network, trained.sampler, trained.shape)
    out = capsys.readouterr().out
    assert "sigma_rel 0.05 at step 40, of 1 snapshot, error 0.0%" in out and "onejump evaluate" in out
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["0.05", "0.075"]


def test_one_width_may_be_a_single_file_at_an_earlier_step(stage, tmp_path):
    ema(stage[0] / "model", "--sigma-rel", "0.1", "--step", 25, "--out", tmp_path / "m.safetensors")
    snapshot = mapped(stage[0] / "ema/step-00000025-0.1.safetensors")
    found = load_model(tmp_path / "m.safetensors")
    assert all(torch.equal(found.model.net.state_dict()[name], t) for name, t in snapshot.items())
    assert found.provenance["step"] == 25


def test_what_is_there_is_listed(stage, capsys):
    ema(stage[0])
    out = capsys.readouterr().out
    assert "widths               0.05, 0.1" in out and "5, 10, 15, 20, 25, 30, 35, 40 (8)" in out
    row = next(line.split() for line in out.splitlines() if line.strip().startswith("0.075 "))
    assert row[1] == "3" and float(row[2].rstrip("%")) < 5
    assert any("0.01 " in line and line.endswith("too coarse") for line in out.splitlines())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "x"], "--sigma-rel: say which width"),
        (["--sigma-rel", "wide", "--out", "x"], "--sigma-rel wide: one or more numbers"),
        (["--sigma-rel", "0.4", "--out", "x"], "--sigma-rel: 0.4; a share of training"),
        (["--sigma-rel", "0.05", "--step", "12"], "nothing was saved at step 12; the nearest is 10"),
        (["--sigma-rel", "0.05", "--out", "TAKEN"], "not empty"),
    ],
)
def test_mistakes_are_one_line(stage, tmp_path, words, says):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    words = [str(tmp_path / "taken") if word == "TAKEN" else word for word in words]
    with pytest.raises(UserError, match=says):
        ema(stage[0], *words)


def test_snapshots_beside_another_or_no_model_are_refused(stage, tmp_path):
    folder, _ = stage
    config = folder / "model" / "config.json"
    for path in (folder / "ema").glob("*"):
        path.unlink()
    save_snapshot(folder / "ema", Profile(40, 0.05), 0, {"net.a": torch.zeros(3)})
    with pytest.raises(UserError, match="not of the model beside them"):
        ema(folder, "--sigma-rel", "0.05", "--out", tmp_path / "x")
    assert json.loads(config.read_text()) and not (tmp_path / "x").exists()
    (folder / "model").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="not finished"):
        ema(folder, "--sigma-rel", "0.05", "--out", tmp_path / "x")
    with pytest.raises(UserError, match="elsewhere: no snapshots|no snapshots there"):
        save_model(tmp_path / "alone", saved_model(TINY))
        ema(tmp_path / "alone", "--sigma-rel", "0.05", "--out", tmp_path / "x")
