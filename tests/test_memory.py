"""The memory of training, counted without it, against what real steps allocate; passes that fit a limit."""

from dataclasses import replace

import pytest
import torch
from test_cost import allocated

from onejump import draws
from onejump.config import Recipe, Stage
from onejump.cost import bytes_of, flops_of
from onejump.data.image_set import ImageSet
from onejump.engine import Engine
from onejump.guidance import autoguided, guided
from onejump.memory import Setup, bytes_in, fitting, nets_for, predict, step_bytes, teacher_for, typical_step
from onejump.methods.cd import CD
from onejump.methods.ctm import CTM
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.precond import CM, Euler
from onejump.samplers import Multistep, Trajectory
from onejump.types import UserError

CPU = torch.device("cpu")
SONG = SongUNetConfig(8, 3, 0, model_channels=32, channel_mult=(1,), num_blocks=1, attn_resolutions=(8,))
EDM2 = EDM2UNetConfig(8, 3, 0, model_channels=64, channel_mult=(1,), num_blocks=1, attn_resolutions=(8,))
MLP = MLPConfig((3, 8, 8), width=64, depth=2)
LATER = Multistep(mid=(1.0,))  # than TCM's t'
STAGES = {
    "ect in checkpointed passes": (SONG, Stage(ECT(), steps=1, batch=64, micro_batch=32, checkpointing=True)),
    "edm2": (EDM2, Stage(ECT(), steps=1, batch=16)),
    "tcm": (MLP, Stage(TCM(), steps=1, batch=512, sampler=LATER)),
    "ctm": (
        MLP,
        Stage(CTM(n=3, max_steps=1), steps=1, batch=512, jump=Euler(), second_time="zero", sampler=Trajectory()),
    ),
}


KNOWS = SongUNetConfig(8, 3, 2, model_channels=32, channel_mult=(1,), num_blocks=1, attn_resolutions=())
GUIDED = Stage(CD(n=4), steps=1, batch=16, jump=CM(), checkpointing=True, guidance=3.0)
SMALL = replace(KNOWS, model_channels=16)


@pytest.mark.parametrize("guide", [None, SMALL])
def test_a_guided_teacher_takes_its_second_pass(guide):
    """Against real steps, with a teacher whose guidance is made by hand; a guide of its own is held besides."""
    recipe = recipe_of(KNOWS, GUIDED)
    held, passes = step_bytes(recipe, GUIDED, (3, 8, 8), Setup(guide=guide))
    weights = bytes_of(KNOWS.build())
    assert held == 5 * weights + (bytes_of(guide.build()) if guide else 0)  # student, teacher, two moments, EMA
    teacher = ConsistencyModel(KNOWS.build()).eval()
    by = guided(teacher, 3.0)
    if guide:
        by = autoguided(teacher, ConsistencyModel(guide.build()).eval(), 3.0)
    student = ConsistencyModel(KNOWS.build(), jump=CM()).train()
    Engine().prepare(student, checkpointing=True)
    x0, cond, step = torch.zeros(16, 3, 8, 8), torch.zeros(16, dtype=torch.int64), typical_step(GUIDED)
    nets = GUIDED.method.nets(student, by)
    _, peak = allocated(lambda: GUIDED.method.loss(nets, x0, cond, step, step)[0].backward())
    assert 0.85 * peak < passes < 1.15 * peak


@pytest.mark.parametrize("network", [KNOWS, replace(KNOWS, label_dim=0)])
def test_a_guided_teacher_costs_two_calls_of_its_network(network):
    """By its labels; and without any, by its like."""
    with torch.device("meta"):
        teachers = [teacher_for(network, replace(GUIDED, guidance=w), torch.device("meta"), None) for w in (1.0, 3.0)]
        once, guided_once = (flops_of(teacher.net, network) for teacher in teachers)
    assert guided_once == 2 * once > 0


def images():
    return ImageSet("noise", torch.zeros(40, 3, 8, 8, dtype=torch.uint8), None, ())


def recipe_of(network, stage):
    return Recipe("test", network, {"stage": stage})


@pytest.mark.parametrize(("network", "stage"), STAGES.values(), ids=STAGES)
def test_a_step_takes_what_was_counted(network, stage):
    """Against the allocator's own events of a real step; what is beyond the count is workspace of kernels."""
    _, passes = step_bytes(recipe_of(network, stage), stage, (3, 8, 8))
    torch.manual_seed(0)
    nets, step = nets_for(recipe_of(network, stage), stage, CPU), typical_step(stage)
    Engine().prepare(nets.student, checkpointing=stage.checkpointing)
    micros = stage.batch // (stage.micro_batch or stage.batch)

    def once():
        x0 = torch.zeros(stage.batch, 3, 8, 8)
        for micro in range(micros):
            with draws.rows(micro, micros, stage.batch):
                loss, _ = stage.method.loss(nets, x0[micro::micros], None, step, step)
            loss.backward()

    _, peak = allocated(once)
    assert 0.85 * peak < passes < 1.15 * peak


def test_what_is_held_is_weights_moments_and_averages():
    weights = 4 * sum(p.numel() for p in MLP.build().parameters())
    stages = Stage(ECT(), steps=1), Stage(TCM(), steps=1, sampler=LATER)
    held = [step_bytes(recipe_of(MLP, stage), stage, (3, 8, 8))[0] for stage in stages]
    assert held == [4 * weights, 5 * weights]  # the student, two moments, EMA; and TCM's frozen network


def test_the_peak_is_the_sum_of_its_parts_and_says_so():
    stage = Stage(ECT(), steps=1)
    found = predict(recipe_of(MLP, stage), stage, images(), CPU)
    assert found.peak == found.held + found.passes + found.process
    assert str(found).startswith(f"{found.peak / 2**20:,.1f} MiB (networks and moments ")


def test_passes_are_cut_until_they_fit():
    stage = Stage(ECT(), steps=1, batch=480)
    recipe, data = recipe_of(MLP, stage), images()

    def peak(micro):
        return predict(recipe, replace(stage, micro_batch=micro), data, CPU).peak

    limit = (peak(120) + peak(160)) // 2
    chosen, memory = fitting("stage", recipe, data, CPU, limit)
    assert chosen.micro_batch == 120 and memory.peak <= limit
    assert fitting("stage", recipe, data, CPU, 2**40)[0] == stage
    with pytest.raises(UserError, match="--max-memory 1.0 MiB: stage takes .* MiB even with micro_batch=1; give more"):
        fitting("stage", recipe, data, CPU, 2**20)


def test_passes_of_tcm_keep_its_share_at_the_boundary():
    stage = Stage(TCM(rho=0.25), steps=1, batch=240, sampler=LATER)
    recipe, data = recipe_of(MLP, stage), images()
    limit = predict(recipe, replace(stage, micro_batch=40), data, CPU).peak - 1
    chosen, _ = fitting("stage", recipe, data, CPU, limit)
    assert chosen.micro_batch == 24  # not 30: a quarter of it is no whole number


def test_sizes_are_read_as_they_are_written():
    assert [bytes_in("--max-memory", text) for text in ("8GiB", "1.5 MiB", "900MB")] == [2**33, 3 * 2**19, 9 * 10**8]
    for text in ("8", "GiB", "-1GiB", "8 G", "infGiB", ""):
        with pytest.raises(UserError, match="a size such as 8GiB"):
            bytes_in("--max-memory", text)
