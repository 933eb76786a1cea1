"""A recipe survives JSON, only known classes are built, and overrides change exactly what they name."""

import json
import math
from dataclasses import replace

import pytest

from onejump.config import Evaluation, Recipe, Stage
from onejump.config_json import decode, from_json, to_json
from onejump.ema import ConstantEMA, PowerEMA
from onejump.losses import inverse_c_out_squared, inverse_delta, uniform
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import Adam, CosineRate, InverseSqrtRate
from onejump.overrides import apply_overrides, describe
from onejump.precond import CM
from onejump.samplers import ODE, Multistep
from onejump.times import Discretisation, LogNormal
from onejump.types import UserError

NETWORK = SongUNetConfig(img_resolution=8, img_channels=1, channel_mult=(2, 2), attn_resolutions=(4,))
METHODS = (
    DSM(times=LogNormal(-1.0, 1.4)),
    ICT(s1=640),
    ECT(t_max=math.inf, weight=inverse_c_out_squared),
    TCM(times=LogNormal(0.5, 1.0), delta=Discretisation(q=4.0), weight=uniform),
)
CHAIN = Recipe(
    "digits",
    NETWORK,
    {
        "teacher": Stage(DSM(), 100, sampler=ODE(), rate=CosineRate()),
        "stage1": Stage(ECT(), 200),
        "stage2": Stage(TCM(), 300, sampler=Multistep(mid=(2.0,)), optimizer=Adam(betas=(0.9, 0.99))),
    },
)
SINGLE = Recipe("single", MLPConfig(shape=(1, 8, 8)), {"only": Stage(ICT(), 50, jump=CM())})


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("network", [NETWORK, MLPConfig()], ids=["unet", "mlp"])
def test_json_round_trip_is_the_same_recipe(method, network):
    optim = {"ema": PowerEMA(16.97), "rate": InverseSqrtRate()}
    sampler = ODE() if isinstance(method, DSM) else Multistep(mid=(1.0,))
    stage = Stage(method, 7, **optim, sampler=sampler, precision="bf16", jump=CM())
    recipe = Recipe(
        "r", network, {"b": stage, "a": replace(stage, ema=ConstantEMA())}, evaluation=Evaluation(steps=(2,))
    )
    text = json.dumps(to_json(recipe), allow_nan=False)
    again = from_json(json.loads(text))
    assert again == recipe
    assert list(again.stages) == ["b", "a"]
    assert to_json(again) == json.loads(text)


def test_parts_of_a_recipe_round_trip_too():
    assert from_json(to_json(CHAIN.stages["stage2"])) == CHAIN.stages["stage2"]
    assert from_json(to_json(NETWORK)) == NETWORK


def test_infinity_survives_json():
    assert from_json(json.loads(json.dumps(to_json(Stage(ECT(), 1, clip=math.inf)), allow_nan=False))).clip == math.inf


def test_fields_left_out_keep_their_defaults():
    assert from_json({"type": "ICT", "s1": 20}) == ICT(s1=20)


def test_whole_number_is_read_as_a_float_where_a_float_is_meant():
    c = from_json({"type": "ECT", "c": 1}).c
    assert c == 1 and isinstance(c, float)


def test_optional_value_may_be_absent():
    assert decode(None, int | None, "x") is None
    assert decode(3, int | None, "x") == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "ICTT"}, "'ICTT'.*did you mean ICT"),
        ({"type": "Popen", "args": "true"}, "'Popen' is none of"),
        ({"type": "ECT", "weight": {"function": "system"}}, "weight: 'system' is none of uniform"),
        ({"type": "ECT", "weight": {"function": "inverse_detla"}}, "did you mean inverse_delta"),
        ({"type": "ECT", "times": {"type": "Discretisation"}}, "times: 'Discretisation' is none of LogNormal"),
        ({"type": "ICT", "s2": 3}, "s2: ICT has no such field; did you mean s"),
        ({"type": "ICT", "s1": "many"}, "s1: expected a whole number, got 'many'"),
        ({"type": "ICT", "s1": 1.5}, "s1: expected a whole number, got 1.5"),
        ({"type": "ICT", "s1": True}, "s1: expected a whole number, got True"),
        ({"type": "Adam", "betas": [1]}, "betas: expected 2 numbers"),
        ({"type": "Multistep", "mid": 3}, "mid: expected numbers such as 1,2, got 3"),
        ({"type": "Stage", "method": {"type": "ICT"}}, "Stage needs steps"),
        ({"type": "Recipe", "name": "r", "network": {"type": "MLPConfig"}, "stages": 3}, "stages: expected names"),
        ([1, 2], "is none of"),
    ],
)
def test_json_of_unknown_types_and_fields_is_refused(value, message):
    with pytest.raises(UserError, match=message) as error:
        from_json(value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_read_back_is_not_written():
    with pytest.raises(UserError, match="FUNCTIONS"):
        to_json(ECT(weight=lambda t, r: t))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Stage(ECT(), 0), "steps: 0"),
        (lambda: Stage(ECT(), 1, batch=0), "batch: 0"),
        (lambda: Stage(ECT(), 1, batch=4, micro_batch=5), "micro_batch: 5"),
        (lambda: Stage(ECT(), 1, clip=0.0), "clip: 0"),
        (lambda: Evaluation(n=1), "n: 1"),
        (lambda: Evaluation(steps=()), "steps"),
        (lambda: Evaluation(steps=(0, 1)), "steps"),
        (lambda: replace(CHAIN, save_every=-1), "save_every: -1"),
        (lambda: replace(CHAIN, stages={"first": Stage(ECT(), 1, count_on=True)}), "first.count_on"),
        (lambda: replace(CHAIN, stages={"batch": Stage(ECT(), 1)}), "'batch'"),
        (lambda: replace(CHAIN, stages={"../x": Stage(ECT(), 1)}), "'../x'"),
        (lambda: replace(CHAIN, evaluation=Evaluation(steps=(1, 3))), "stage1.sampler.mid"),
        (lambda: replace(CHAIN, stages={"late": Stage(TCM(), 1)}), "late.method.t_prime=1"),
    ],
)
def test_values_out_of_range_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stage1.method.delta.q=4", lambda r: r.stages["stage1"].method.delta == Discretisation(q=4.0)),
        ("stages.stage1.batch=8", lambda r: r.stages["stage1"].batch == 8),
        ("teacher.steps=1e3", lambda r: r.stages["teacher"].steps == 1000),
        ("stage1.rate=CosineRate(lr=1e-4)", lambda r: r.stages["stage1"].rate == CosineRate(lr=1e-4)),
        ("stage1.method.t_max=80", lambda r: r.stages["stage1"].method.t_max == 80.0),
        ("stage2.clip=inf", lambda r: r.stages["stage2"].clip == math.inf),
        ("stage2.method.times.mu=-1.5", lambda r: r.stages["stage2"].method.times.mu == -1.5),
        ("stage1.ema=PowerEMA", lambda r: r.stages["stage1"].ema == PowerEMA()),
        ("stage1.ema=PowerEMA(gamma=16.97)", lambda r: r.stages["stage1"].ema == PowerEMA(gamma=16.97)),
        (
            "stage1.method.weight=inverse_c_out_squared",
            lambda r: r.stages["stage1"].method.weight is inverse_c_out_squared,
        ),
        ("stage1.optimizer=Adam(betas=(0.5, 0.9))", lambda r: r.stages["stage1"].optimizer == Adam(betas=(0.5, 0.9))),
        (
            "stage1.method=TCM(delta=Discretisation(q=3), t_prime=0.5, weight=uniform)",
            lambda r: r.stages["stage1"].method == TCM(delta=Discretisation(q=3.0), t_prime=0.5, weight=uniform),
        ),
        ("stage1.precision=bf16", lambda r: r.stages["stage1"].precision == "bf16"),
        ("evaluation.steps=1", lambda r: r.evaluation.steps == (1,)),
        ("evaluation.steps=2,1", lambda r: r.evaluation.steps == (2, 1)),
        ("network.attn_resolutions=()", lambda r: r.network.attn_resolutions == ()),
        ("network=MLPConfig(shape=(1, 8, 8))", lambda r: r.network == MLPConfig(shape=(1, 8, 8))),
        ("name=1,2", lambda r: r.name == "1,2"),
        ("seed=3", lambda r: r.seed == 3),
    ],
)
def test_override_sets_the_named_value_and_no_other(override, expected):
    before = to_json(CHAIN)
    changed = apply_overrides(CHAIN, [override])
    assert expected(changed)
    assert to_json(CHAIN) == before
    path = override.split("=")[0].removeprefix("stages.")
    rows, old_rows = (
        dict(line.split(maxsplit=1) for line in describe(r).split("\n") if line) for r in (changed, CHAIN)
    )
    assert all(key.startswith(path) for key in rows.keys() | old_rows.keys() if rows.get(key) != old_rows.get(key))


def test_overrides_apply_in_order_and_ranges_are_checked_together():
    overrides = ("method=ICT", "method.s1=20", "jump=CM", "micro_batch=100", "batch=200")
    recipe = apply_overrides(CHAIN, [f"stage1.{override}" for override in overrides])
    assert recipe.stages["stage1"] == replace(
        CHAIN.stages["stage1"], method=ICT(s1=20), jump=CM(), micro_batch=100, batch=200
    )


def test_stage_fields_need_no_stage_name_in_a_recipe_of_one_stage():
    recipe = apply_overrides(SINGLE, ["method.s1=640", "steps=9", "batch=2"])
    assert recipe.stages == {"only": Stage(ICT(s1=640), 9, batch=2, jump=CM())}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch=3", "say which stage: teacher.batch=..., stage1.batch=..., stage2.batch=..."),
        ("stage1.method.delta.r_mn=0", "stage1.method.delta.r_mn: Discretisation has no 'r_mn'; did you mean r_min?"),
        ("stge1.steps=4", "did you mean stage1?"),
        ("sed=4", "did you mean seed?"),
        ("stage1.ema=PoweEMA", "stage1.ema: 'PoweEMA' is none of ConstantEMA, PowerEMA; did you mean PowerEMA?"),
        ("stage1.ema=PowerEMA(gama=2)", "stage1.ema.gama: PowerEMA has no such field; did you mean gamma?"),
        ("stage1.ema=PowerEMA(2)", "name each argument"),
        ("stage1.ema=ICT", "stage1.ema: 'ICT' is none of ConstantEMA, PowerEMA"),
        ("stage1.precision=fp8", "stage1.precision: 'fp8' is none of fp32, tf32, bf16, fp16"),
        ("stage1.steps=many", "stage1.steps: expected a whole number, got 'many'"),
        ("stage1.steps=1.5", "stage1.steps: expected a whole number, got 1.5"),
        ("stage1.steps.x=4", "stage1.steps.x: no field x"),
        ("stage1.batch=0", "stage1.batch: 0; 1 or more is needed"),
        ("evaluation.n=1", "evaluation.n: 1; 2 or more is needed"),
        ("network.img_resolution=7", "network.img_resolution=7: channel_mult"),
        ("stage1.method=TCM", "stage1.sampler: time 0.821 is below stage1.method.t_prime=1"),
        ("evaluation.steps=1,x", "evaluation.steps: expected a whole number, got 'x'"),
        ("stages=3", "set the fields of a stage"),
        ("stage1.type=x", "Stage has no 'type'"),
        ("seed", "write path=value"),
        ("=3", "write path=value"),
    ],
)
def test_a_wrong_override_names_path_and_way_out(override, message):
    with pytest.raises(UserError) as error:
        apply_overrides(CHAIN, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["__import__('os').mkdir('{0}')", "PowerEMA(gamma=__import__('os').mkdir('{0}'))"])
def test_override_text_is_never_executed(text, tmp_path):
    with pytest.raises(UserError):
        apply_overrides(CHAIN, ["stage1.ema=" + text.format(tmp_path / "made")])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("recipe", [CHAIN, SINGLE], ids=lambda r: r.name)
def test_describe_is_a_list_of_overrides_that_makes_the_recipe(recipe):
    lines = [line.split(maxsplit=1) for line in describe(recipe).split("\n") if line]
    start = replace(
        recipe,
        name="other",
        seed=9,
        network=MLPConfig(width=7),
        stages={name: Stage(DSM(), 1, sampler=ODE(), clip=3.0) for name in recipe.stages},
        evaluation=Evaluation(n=5),
    )
    assert (
        apply_overrides(start, [f"{p}={v}" for p, v in lines if p not in recipe.stages and p != "evaluation"]) == recipe
    )


def test_describe_aligns_its_values():
    lines = [line for line in describe(CHAIN).split("\n") if line]
    column = max(line.index(" ") for line in lines) + 2
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    assert f"{'stage1.method.weight':<{column}}{inverse_delta.__name__}" in lines
