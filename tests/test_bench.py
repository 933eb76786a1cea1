"""The bench's two ways must be one and the same training, and its counts those of the step."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from onejump.bench import Ours, Plain, bench, cases_of, noise_images, timed
from onejump.cli_bench import by_round, table
from onejump.config import Recipe, Stage
from onejump.ema import ConstantEMA
from onejump.memory import nets_for
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import ConstantRate, RAdam
from onejump.phases import Phases
from onejump.plain import check_plain
from onejump.samplers import ODE, Multistep
from onejump.times import Discretisation
from onejump.types import UserError

CPU = torch.device("cpu")
NETWORK = SongUNetConfig(8, 3, 5, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
ECT_METHOD = ECT(delta=Discretisation(ratio_limit=1 - 2.0**-9))
ECT_STAGE = Stage(
    ECT_METHOD, steps=10, batch=8, ema=ConstantEMA(0.9), optimizer=RAdam(eps=1e-3), rate=ConstantRate(1e-3)
)
TCM_STAGE = replace(ECT_STAGE, method=TCM(), sampler=Multistep(mid=(1.0,)))


def recipe_of(**stages: Stage) -> Recipe:
    return Recipe("small", NETWORK, stages)


@pytest.mark.parametrize("stage, at", [(ECT_STAGE, 0), (ECT_STAGE, 10**9), (TCM_STAGE, 10**9)])
def test_plain_and_ours_are_the_same_training(stage, at):
    """Losses, weights and averages after four steps: the plain way computes another way, and nothing else."""
    torch.manual_seed(0)
    recipe = recipe_of(stage1=stage)
    nets, data = nets_for(recipe, stage, CPU), noise_images(recipe, stage.batch)
    for p in nets.student.parameters():  # some start near zero, and would hide a difference
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    plain = Plain(stage, copy.deepcopy(nets), data, 1, CPU)
    ours = Ours(stage, nets, data, 1, CPU)
    for k in range(4):
        losses = [float(trainer.step(at + k, Phases(CPU))) for trainer in (plain, ours)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for theirs, mine in ((plain.nets.student, ours.nets.student), (plain.plain.ema, ours.run.ema)):
        pairs = list(zip(theirs.parameters(), mine.parameters(), strict=True))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_images_through_networks_are_counted_at_each_place_of_the_curriculum():
    """Plain: 4 passes of ECT at every step, 5 of TCM. Ours: 4 late, and ECT's early targets on the rows with r > 0."""
    recipe = recipe_of(stage1=ECT_STAGE, stage2=TCM_STAGE)
    cases = cases_of(recipe, noise_images(recipe, 8), CPU, plain=True)
    passes = {(case.name, case.trainer.name): timed(case, CPU)["passes"] / 8 for case in cases}
    assert [passes[name, "plain"] for name in ("stage1 step 0", "stage1 step 25000", "stage1 late")] == [4, 4, 4]
    assert passes["stage2 late", "plain"] == 5 and passes["stage2 late", "ours"] == passes["stage1 late", "ours"] == 4
    assert 3 <= passes["stage1 step 0", "ours"] < passes["stage1 step 25000", "ours"] < 4


def test_the_record_is_json_and_its_table_names_every_case():
    recipe = recipe_of(stage1=replace(ECT_STAGE, batch=4), stage2=replace(TCM_STAGE, batch=4))
    record = json.loads(json.dumps(bench(recipe, noise_images(recipe, 4), CPU, plain=True, rounds=2)))
    text = "\n".join(table(record))
    for case in record["cases"]:
        assert f"{case['name']}, {case['way']}" in text and len(case["rounds"]) == 2
        assert case["rounds"][0]["seconds"] == pytest.approx(sum(case["rounds"][0]["phases"].values()))
    late = {(case["name"], case["way"]): case for case in record["cases"]}
    assert late["stage1 late", "plain"]["loss"] == pytest.approx(late["stage1 late", "ours"]["loss"], rel=1e-2)
    assert "stage2 late over stage1 late" in text and "times as fast as plain" in text
    for name in ("forward", "target", "backward", "optimiser"):
        assert all(r["phases"][name] > 0 for case in record["cases"] for r in case["rounds"] if "late" in case["name"])


def test_ratios_are_taken_within_a_round():
    a, b = ({"rounds": [{"seconds": s} for s in seconds]} for seconds in ((2.0, 8.0), (1.0, 2.0)))
    assert by_round(a, b) == [2.0, 4.0]


def test_what_has_no_plain_form_is_timed_alone_or_refused():
    teacher = Stage(DSM(), steps=1, batch=2, sampler=ODE())
    alone, chain = recipe_of(teacher=teacher), recipe_of(teacher=teacher, stage2=replace(TCM_STAGE, batch=2))
    with pytest.raises(UserError, match="--vs plain: ECT and TCM have a plain form, DSM has none"):
        check_plain(alone)
    check_plain(chain)
    cases = cases_of(chain, noise_images(chain, 2), CPU, plain=True)
    assert [(case.stage, case.trainer.name) for case in cases] == [
        ("teacher", "ours"),
        ("stage2", "ours"),
        ("stage2", "plain"),
    ]
