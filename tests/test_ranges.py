"""Numbers out of range are refused before anything runs, by one line with the field, the value and the nearest one."""

import math
from dataclasses import replace

import pytest

from onejump.config import Evaluation, Recipe, Stage
from onejump.ema import ConstantEMA, PowerEMA
from onejump.methods.ctm import CTM
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.ict import ICT
from onejump.methods.tcm import TCM
from onejump.networks.mlp import MLPConfig
from onejump.optim import Adam, ConstantRate, CosineRate, InverseSqrtRate, RAdam
from onejump.overrides import apply_overrides
from onejump.precond import CM, EDM, Euler
from onejump.samplers import ODE, Multistep, Trajectory
from onejump.times import Discretisation, LogNormal, LogStudentT
from onejump.types import UserError

CHAIN = Recipe(
    "chain",
    MLPConfig(),
    {
        "teacher": Stage(DSM(), 1, sampler=ODE()),
        "stage1": Stage(ECT(), 1),
        "stage2": Stage(TCM(), 1, sampler=Multistep(mid=(2.0,))),
    },
)
DISTILLED = Recipe(
    "distilled",
    MLPConfig(),
    {"ctm": Stage(CTM(), 1, jump=Euler(), second_time="zero", sampler=Trajectory())},
    evaluation=Evaluation(steps=(1, 2, 4)),
)
OUT_OF_RANGE = [
    (lambda: ICT(s1=5), "s1: 5; 10 or more is needed"),
    (lambda: ICT(s0=0), "s0: 0; 1 or more is needed"),
    (lambda: ICT(huber=0.0), "huber: 0; more than 0 is needed"),
    (lambda: ICT(P_std=0.0), "P_std: 0; more than 0 is needed"),
    (lambda: LogNormal(P_std=-1.0), "P_std: -1; more than 0 is needed"),
    (lambda: LogNormal(P_mean=math.nan), "P_mean: nan; a finite number is needed"),
    (lambda: LogStudentT(sigma=0.0), "sigma: 0; more than 0 is needed"),
    (lambda: LogStudentT(df=0.0), "df: 0; more than 0 is needed"),
    (lambda: LogStudentT(mu=math.inf), "mu: inf; a finite number is needed"),
    (lambda: Discretisation(q=1.0), "q: 1; more than 1 is needed"),
    (lambda: Discretisation(double_every=0), "double_every: 0; 1 or more is needed"),
    (lambda: Discretisation(ratio_limit=0.0), "ratio_limit: 0; more than 0 and 1 or less is needed"),
    (lambda: Discretisation(ratio_limit=1.01), "ratio_limit: 1.01; more than 0 and 1 or less is needed"),
    (lambda: Discretisation(k=-1.0), "k: -1; 0 or more is needed"),
    (lambda: Discretisation(r_min=-1e-6), "r_min: -1e-06; 0 or more is needed"),
    (lambda: ECT(t_min=80.0, t_max=80.0), "t_max: 80; more than t_min=80 is needed"),
    (lambda: ECT(t_min=-1.0), "t_min: -1; 0 or more is needed"),
    (lambda: ECT(c=math.nan), "c: nan; a finite number is needed"),
    (lambda: ECT(c=-0.1), "c: -0.1; 0 or more is needed"),
    (lambda: TCM(t_prime=80.0), "t_prime: 80; more than 0 and less than 80 is needed"),
    (lambda: TCM(t_prime=0.0), "t_prime: 0; more than 0 and less than 80 is needed"),
    (lambda: TCM(t_max=math.inf), "t_max: inf; a finite number is needed"),
    (lambda: Stage(TCM(rho=1.0), 1), "rho: 1; a share of the batch, more than 0 and less than 1, is needed"),
    (lambda: Stage(TCM(rho=0.0), 1), "rho: 0; a share of the batch, more than 0 and less than 1, is needed"),
    (lambda: TCM(w_b=-0.1), "w_b: -0.1; 0 or more is needed"),
    (lambda: TCM(c=-0.1), "c: -0.1; 0 or more is needed"),
    (lambda: PowerEMA(gamma=-2.0), "gamma: -2; a number above -1 is needed"),
    (lambda: PowerEMA(gamma=-1.0), "gamma: -1; a number above -1 is needed"),
    (lambda: ConstantEMA(beta=1.0), "beta: 1; 0 or more and less than 1 is needed"),
    (lambda: ConstantEMA(beta=-0.1), "beta: -0.1; 0 or more and less than 1 is needed"),
    (lambda: ConstantRate(lr=0.0), "lr: 0; a rate above 0 is needed, such as 1e-4"),
    (lambda: CosineRate(lr=math.nan), "lr: nan; a rate above 0 is needed, such as 1e-4"),
    (lambda: ConstantRate(rampup=-1), "rampup: -1; 0 (none) or more steps are needed"),
    (lambda: InverseSqrtRate(t_ref=-1.0), "t_ref: -1; 0 (a constant rate) or more steps are needed"),
    (lambda: Adam(betas=(0.9, 1.0)), "betas: 0.9,1; each must be 0 or more and less than 1"),
    (lambda: RAdam(eps=-1.0), "eps: -1; 0 or more is needed"),
    (lambda: ODE(sigma_min=0.0), "sigma_min: 0; more than 0 and less than 80 is needed"),
    (lambda: ODE(sigma_min=80.0), "sigma_min: 80; more than 0 and less than 80 is needed"),
    (lambda: ODE(rho=0.0), "rho: 0; more than 0 is needed"),
    (lambda: Multistep(sigma_max=0.0, mid=()), "sigma_max: 0; more than 0 is needed"),
    (lambda: Multistep(mid=(1.0, 2.0)), "mid: 1,2; falling times below sigma_max=80 and above 0 are needed"),
    (lambda: Multistep(mid=(90.0,)), "mid: 90; falling times below sigma_max=80 and above 0 are needed"),
    (lambda: Multistep(mid=(1.0, 0.0)), "mid: 1,0; falling times below sigma_max=80 and above 0 are needed"),
    (lambda: EDM(sigma_data=0.0), "sigma_data: 0; more than 0 is needed (0.5 is usual for images)"),
    (lambda: CM(sigma_min=0.0), "sigma_min: 0; more than 0 is needed (0.002 is usual)"),
    (lambda: Evaluation(seed=2**63), f"seed: {2**63}; 0 or more and {2**63 - 1} or less is needed"),
    (lambda: replace(CHAIN, seed=2**63), f"seed: {2**63}; 0 or more and {2**63 - 1} or less is needed"),
]


@pytest.mark.parametrize(("build", "message"), OUT_OF_RANGE, ids=[m.split(";")[0] for _, m in OUT_OF_RANGE])
def test_a_number_out_of_range_is_named_with_the_nearest_that_is_not(build, message):
    with pytest.raises(UserError) as error:
        build()
    assert str(error.value) == message


def test_the_ends_of_the_ranges_are_allowed():
    assert ICT(s0=1, s1=1) and ECT(c=0.0, t_min=0.0) and TCM(w_b=0.0) and Discretisation(k=0.0, r_min=0.0)
    assert ConstantEMA(0.0) and ConstantRate(rampup=0) and InverseSqrtRate(t_ref=0.0) and Adam(betas=(0.0, 0.0))
    assert Multistep(mid=()) and Evaluation(seed=2**63 - 1) and Discretisation(ratio_limit=1.0)


@pytest.mark.parametrize(
    ("batch", "micro_batch", "rho", "nearest"),
    [
        (12, 5, 0.25, 4),  # 5 + 5 + 2
        (12, 6, 0.25, 4),  # one of 6 at t', twice: 1/6, not 1/4
        (16, 1, 0.25, 4),
        (16, 2, 0.25, 4),  # one of 2 would be half
        (64, 63, 0.25, 64),
        (100, 50, 0.25, 20),  # twice 12, not 25
        (6, 3, 0.25, 6),  # one of 6 at t' as a whole
    ],
)
def test_micro_batches_of_tcm_keep_its_shares(batch, micro_batch, rho, nearest):
    with pytest.raises(UserError, match=rf"^micro_batch: {micro_batch}; with batch={batch}.*; use {nearest}$"):
        Stage(TCM(rho=rho), 1, batch=batch, micro_batch=micro_batch)
    Stage(TCM(rho=rho), 1, batch=batch, micro_batch=nearest)
    Stage(TCM(rho=rho), 1, batch=batch)
    Stage(ECT(), 1, batch=batch, micro_batch=micro_batch)


def test_tcm_needs_two_samples_a_pass():
    with pytest.raises(UserError, match=r"^batch: 1 sample\(s\) a pass; TCM needs 2 or more"):
        Stage(TCM(), 1, batch=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.method.delta.q=1", "stage1.method.delta.q: 1; more than 1 is needed"),
        ("teacher.sampler.sigma_min=0", "teacher.sampler.sigma_min: 0; more than 0 and less than 80 is needed"),
        ("stage1.ema=PowerEMA(gamma=-2)", "stage1.ema.gamma: -2; a number above -1 is needed"),
        (
            "stage2.micro_batch=30",
            "stage2.micro_batch: 30; with batch=64 and method.rho=0.25 it would change the share",
        ),
        ("stage1.jump=AnalyticPrecond", "stage1.jump: AnalyticPrecond needs a teacher, and ECT has none"),
        (
            "stage1.method=ICT",
            "stage1.jump: ToData ends at 0; ICT's first time is 0.002, where f must be the identity: use jump=CM",
        ),
    ],
)
def test_a_number_out_of_range_is_located(override, message):
    with pytest.raises(UserError) as error:
        apply_overrides(CHAIN, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["ctm.jump=AnalyticPrecond", "ctm.jump.estimator.sigma_max=50"],
            "ctm.jump.estimator.sigma_max: 50; 80 or more is needed",
        ),
        (
            ["ctm.sampler=Jumps(start=(80,6),end=(1.5,0.002))"],
            "evaluation.steps: 1,2,4; the sampler of ctm makes 2 jumps: give 2, no other",
        ),
        (
            ["ctm.method=CD", "ctm.sampler=Multistep"],
            "ctm.second_time: zero; CD's jumps end in one place only: use second_time=off",
        ),
    ],
)
def test_what_would_fail_or_mislead_after_hours_is_refused_at_once(overrides, message):
    with pytest.raises(UserError) as error:
        apply_overrides(DISTILLED, overrides)
    assert message in str(error.value)
