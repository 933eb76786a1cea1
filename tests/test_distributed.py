"""Several processes on one model, over gloo: what they end with is what one process ends with."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import Crew
from team_setup import nets_of, stage, trained, weights
from test_cost import allocated
from training_setup import Recorder, stage_of, student

from onejump.checkpoint import load_checkpoint
from onejump.config import Recipe, Stage
from onejump.distributed import Team, hollow, local, whole
from onejump.generate import generate, generate_by
from onejump.join import environment, first_host, join
from onejump.memory import Setup, nets_for, step_bytes, typical_step
from onejump.methods.ctm import CTM
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.run_state import Run
from onejump.samplers import Multistep
from onejump.signals import Interrupted
from onejump.train import Drawn, accumulate, check
from onejump.types import UserError


@pytest.fixture(scope="module")
def crew():
    made = Crew(4)
    yield made
    made.close()


def numbers(lines):
    """What lines say, without the clock."""
    names = ("loss", "grad_norm", "loss_by_t", "skipped")
    return [line["frechet"]["1"] if "frechet" in line else [line[name] for name in names] for line in lines]


def flat(value):
    return [x for part in value for x in flat(part)] if isinstance(value, list) else [-1.0 if value is None else value]


SPREADS = {"DDP": (2, 1), "FSDP2": (4, 4), "HSDP": (4, 2)}


@pytest.mark.parametrize(
    "name, spread",
    [("ect", "DDP"), ("tcm", "FSDP2"), ("ect", "HSDP"), ("continuous", "DDP"), ("ctm", "DDP"), ("gan", "DDP")],
)
def test_many_processes_end_with_the_weights_of_one(tmp_path, crew, name, spread):
    """After 20 steps, to 1e-5: weights, and what is logged of all samples."""
    alone, told = trained(Team(), tmp_path / "one", stage(name))
    world, shard = SPREADS[spread]
    found = crew.run(world, trained, tmp_path / spread, stage(name), shard=shard)
    for ema, lines in found:
        torch.testing.assert_close(torch.tensor(ema), torch.tensor(alone), rtol=0, atol=1e-5)
        assert flat(numbers(lines)) == pytest.approx(flat(numbers(told)), abs=1e-4)
    assert (torch.tensor(alone) - weights(nets_of(stage(name).method).student)).abs().max() > 1e-3


def test_micro_batches_of_processes_end_with_the_weights_of_one(tmp_path, crew):
    """2 x 4 passes of 2 samples against one of 16; gradients meet in the last pass only."""
    alone, _ = trained(Team(), tmp_path / "one", stage("ect"))
    found = crew.run(2, trained, tmp_path / "two", stage("ect", micro_batch=2))
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shards", [(1, 1), (2, 3)], ids=["DDP", "FSDP2"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, crew, shards):
    """7 steps on two processes, 7 on three, 6 on one."""
    wanted = stage("ect", batch=12, steps=20)
    alone, told = trained(Team(), tmp_path / "one", wanted)
    out = tmp_path / "many"
    crew.run(2, trained_until, out, wanted, 7, shard=shards[0])
    crew.run(3, trained_until, out, wanted, 14, shard=shards[1])
    kept = load_checkpoint(out / "checkpoints")
    assert kept.step == 14 and not kept.warnings
    ema, lines = trained(Team(), out, wanted)
    torch.testing.assert_close(torch.tensor(ema), torch.tensor(alone), rtol=0, atol=1e-5)
    assert flat(numbers(lines)) == pytest.approx(flat(numbers(told)), abs=1e-4)


def trained_until(team, out, wanted, step):
    """A signal to one process stops all of them after this step; the checkpoint is whole when they end."""

    def at_step(done):
        if done == step and team.rank == team.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as error:
        trained(team, out, wanted, Recorder(at_step))
    assert (error.value.step, error.value.code) == (step, 0)
    assert load_checkpoint(out / "checkpoints").step == step


def edm2_weights(team):
    """A network with parameters that have no dimensions, which FSDP2 leaves whole; two steps of ECT."""
    config = EDM2UNetConfig(8, 1, 2, 8, (1,), 1, (), channels_per_head=8)
    wanted = stage("ect", batch=8, steps=2)
    torch.manual_seed(0)
    net = config.build()
    torch.nn.init.ones_(net.out_gain)
    model = ConsistencyModel(net)
    frame = hollow(model)
    run = Run.start(wanted, wanted.method.nets(model), 0, torch.device("cpu"), team)
    generator = torch.Generator().manual_seed(0)
    x0, cond = torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 2
    norms = []
    for step in range(2):
        drawn = Drawn(step, team.rank, team.world)
        mine = slice(team.rank, None, team.world)
        loss, stats = accumulate(wanted, run.nets, x0[mine], cond[mine], step, 2, drawn, run.at_turn.scale)
        run.update(loss, stats, step / 2, 2)
        norms.append(run.sums.grad_norm.item())
    return weights(whole(model, frame, "cpu") if team.sharded else model).tolist(), norms


def test_parameters_without_dimensions_are_trained_too(crew):
    alone, norms = edm2_weights(Team())
    found = crew.run(2, edm2_weights, shard=2)
    for ema, seen in found:
        torch.testing.assert_close(torch.tensor(ema), torch.tensor(alone), rtol=0, atol=1e-5)
        assert seen == pytest.approx(norms, rel=1e-5)


SONG = SongUNetConfig(8, 1, 0, model_channels=32, channel_mult=(1,), num_blocks=1, attn_resolutions=(8,))
HEAVY = MLPConfig((1, 8, 8), width=256, depth=2)  # weights outweigh maps
PIECES = {
    "maps": (SONG, Stage(ECT(), steps=1, batch=32, checkpointing=True)),
    "weights": (HEAVY, Stage(TCM(), steps=1, batch=64, sampler=Multistep(mid=(1.0,)))),
}


def taken(team, network, wanted):
    """(bytes that lie on this process between steps, the most that a step allocates besides)."""
    step = typical_step(wanted)
    nets = nets_for(Recipe("test", network, {"stage": wanted}), wanted, team.device)
    run = Run.start(wanted, nets, step, team.device, team)
    x0, drawn = torch.zeros(wanted.batch // team.world, 1, 8, 8), Drawn(1, team.rank, team.world)
    _, peak = allocated(lambda: accumulate(wanted, nets, x0, None, step, step + 1, drawn, run.at_turn.scale))
    kept = [p for model in (*nets.models, run.ema) for p in model.parameters()]
    return sum(local(t).nbytes for t in (*kept, *run.updater.exp_avg, *run.updater.exp_avg_sq)), peak


@pytest.mark.parametrize(("network", "wanted"), PIECES.values(), ids=PIECES)
def test_memory_with_weights_in_pieces_is_what_was_counted(crew, network, wanted):
    held, passes = step_bytes(Recipe("test", network, {"stage": wanted}), wanted, (1, 8, 8), Setup(2, 2))
    whole, _ = step_bytes(Recipe("test", network, {"stage": wanted}), wanted, (1, 8, 8), Setup(2))
    found = crew.run(2, taken, network, wanted, shard=2)
    assert max(lies for lies, _ in found) == held < 0.6 * whole
    for _, peak in found:
        assert 0.85 * peak < passes < 1.15 * peak


def made_together(team):
    model, sampler = student(), Multistep()
    labels = torch.arange(37) % 2
    together = generate_by(team, model, sampler, 1, 37, (1, 4, 4), labels, seed=5)
    return together.equal(generate(model, sampler, 1, range(37), (1, 4, 4), labels, seed=5))


def test_images_are_the_same_on_many_processes(crew):
    assert all(crew.run(3, made_together))


def talk(team):
    mine = torch.full((team.rank, 2), float(team.rank))
    return {
        "any": team.any(team.rank == 1),
        "none": team.any(False),
        "mean": team.mean(torch.tensor(float(team.rank))).item(),
        "gathered": team.gathered(mine).tolist(),
        "told": team.told({"from": team.rank, "text": "ä"}),
        "all": team.all_told([team.rank] * team.rank),
    }


def test_a_team_agrees(crew):
    expected = {"any": True, "none": False, "mean": 1.0, "gathered": [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]}
    expected |= {"told": {"from": 0, "text": "ä"}, "all": [[], [1], [2, 2]]}
    assert crew.run(3, talk) == [expected] * 3


def test_alone_every_call_returns_what_it_was_given():
    team, x = Team(), torch.ones(2)
    assert team.first and not team.any(False) and team.told("a") == "a" and team.all_told(1) == [1]
    assert team.mean(x) is x and team.gathered(x) is x and team.shard_sum(x) is x


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
SLURM |= {"SLURM_STEP_NODELIST": "gpu[07-08],login1", "SLURM_JOB_ID": "1234567"}


def test_the_environment_says_who_a_process_is():
    assert environment({}) == environment({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "8"}) == {}  # a batch script is no step
    assert environment(TORCHRUN) == environment(SLURM | TORCHRUN) == TORCHRUN
    address = {"MASTER_ADDR": "gpu07", "MASTER_PORT": "34567"}
    assert environment(SLURM) == {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"} | address
    assert [first_host(nodes) for nodes in ("a", "a,b", "n[3]", "n[3-5,7],m1")] == ["a", "a", "n3", "n3"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"RANK": "x"}, "RANK: x; a number"),
        ({"RANK": ""}, "RANK: not set; a number"),
        ({"RANK": "2"}, "RANK: 2; WORLD_SIZE=2 needs a smaller"),
        ({"MASTER_PORT": ""}, "MASTER_PORT: not set, but there are 2 processes"),
    ],
)
def test_a_wrong_environment_is_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        environment(TORCHRUN | changes)


def test_what_processes_cannot_do_is_said_before_training():
    with pytest.raises(UserError, match="--shard 2"):
        join("cpu", 2)
    with pytest.raises(UserError, match="16 images do not divide among 3"):
        check(stage("ect"), Team(world=3))
    with pytest.raises(UserError, match="12 in 2 passes would change the share"):
        check(stage("tcm", batch=12, micro_batch=0), Team(world=2))
    with pytest.raises(UserError, match="--shard: CTM "):
        check(stage_of(CTM(), batch=16), Team(world=2, shard=2))


def test_a_killed_process_is_started_again_and_changes_nothing(tmp_path):
    """By torchrun, which starts all of them again; they go on from the last checkpoint."""
    alone, _ = trained(Team(), tmp_path / "one", stage("ect"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["tests", "."])}
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        "tests/killed_process.py",
        str(tmp_path / "two"),
    ]
    ended = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stderr
    assert "Signal 9" in ended.stderr or "SIGKILL" in ended.stderr or "exitcode: -9" in ended.stderr, ended.stderr
    tensors = load_checkpoint(tmp_path / "two" / "checkpoints").tensors
    ema = torch.cat([tensors[f"ema/{name}"].flatten() for name, _ in student().named_parameters()])
    torch.testing.assert_close(ema, torch.tensor(alone), rtol=0, atol=1e-6)
