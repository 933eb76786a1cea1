"""The rule by which a stage ends, on curves like the published ones."""

import json
import math
from dataclasses import replace

import pytest
from tiny_run import TINY

from onejump.cli import main
from onejump.config import Recipe, Stage
from onejump.config_json import from_json, to_json
from onejump.hand_over import Judged, Plateau, at_end, best_of, check_rule, decide, in_words, undecided
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.networks.mlp import MLPConfig
from onejump.samplers import ODE, Multistep
from onejump.types import UserError

# TCM's figure of CIFAR-10, in thousands of steps: stage 1 is best at 250, then drifts.
CIFAR = [(50, 4.1), (75, 3.5), (100, 3.25), (125, 3.1), (150, 3.0), (175, 2.93), (200, 2.87), (225, 2.82), (250, 2.78)]
DRIFT = [(275, 2.85), (300, 2.9), (325, 2.88), (350, 2.96), (375, 3.0), (400, 2.97), (425, 3.05)]
# And of ImageNet-64: best at 140, a blow-up at 160.
IMAGENET = [
    (60, 4.6),
    (80, 4.0),
    (100, 3.6),
    (110, 3.55),
    (120, 3.52),
    (130, 3.5),
    (140, 3.48),
    (150, 3.55),
    (160, 9.7),
]


def curve(points):
    return tuple(Judged(1000 * step, value) for step, value in points)


def test_a_stage_that_drifts_ends_by_its_patience_and_hands_over_its_best():
    history, rule = curve(CIFAR + DRIFT), Plateau(patience=5)
    for n in range(len(CIFAR) + 5):
        assert decide(history[:n], rule) is None
    found = decide(history[: len(CIFAR) + 5], rule)
    assert (found.why, found.step, found.best) == ("plateau", 375_000, Judged(250_000, 2.78))


def test_a_blow_up_ends_a_stage_at_once():
    history, rule = curve(IMAGENET), Plateau(patience=5)
    assert decide(history[:-1], rule) is None
    found = decide(history, rule)
    assert (found.why, found.step, found.best) == ("rise", 160_000, Judged(140_000, 3.48))


def test_a_distance_that_is_not_finite_is_a_rise():
    found = decide(curve([*IMAGENET[:-1], (160, math.nan)]), Plateau())
    assert (found.why, found.best.step) == ("rise", 140_000)
    assert decide(curve([(step, math.inf) for step in range(20)]), Plateau()) is None  # there is nothing to hand over


def test_a_stage_that_still_improves_goes_on_to_its_end():
    history = curve(CIFAR)
    assert decide(history, Plateau(patience=1)) is None
    assert at_end(history).best == Judged(250_000, 2.78) and at_end(()) is None


def test_nothing_is_decided_while_the_first_evaluations_jump():
    """A student that starts from a diffusion model first makes noise of one kind or another."""
    history = curve([(1, 300), (2, 420), (3, 350), (4, 200)])
    assert decide(history, Plateau(patience=3, rise=0.25)) is None
    assert decide(history[:3], Plateau(patience=2, rise=0.1)).why == "rise"


def test_the_decision_is_that_of_the_first_call_for_one():
    """What is evaluated after it, as by a run that is resumed from there, changes nothing."""
    history, rule = curve([*CIFAR, *DRIFT, (450, 2.1)]), Plateau(patience=5)
    first = decide(history[: len(CIFAR) + 5], rule)
    assert decide(history, rule) == first
    assert best_of(history).step == 450_000


def test_an_equal_is_no_new_best():
    history = curve([(1, 3.0), (2, 2.0), (3, 2.0), (4, 2.0)])
    assert decide(history, Plateau(patience=2)).best.step == 2000
    assert decide(history[:3], Plateau(patience=2)) is None


def test_the_rule_reads_its_own_measure():
    lines = [
        {"step": 5, "frechet": {"1": 3.0, "2": 2.5}, "denoising_frechet": {"0.8": 1.5}},
        {"step": 9, "frechet": {}},
    ]
    assert Plateau().history(lines) == (Judged(5, 3.0),)
    assert Plateau(calls=2).history(lines) == (Judged(5, 2.5),)
    assert Plateau(t=0.8).history(lines) == (Judged(5, 1.5),)


def test_the_record_is_the_evidence():
    history, rule = curve([*IMAGENET[:-1], (160, math.inf)]), Plateau()
    record = decide(history, rule).record(rule)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["evaluations"][-2:] == [[150_000, 3.55], [160_000, None]]
    words = in_words(record)
    assert "step 160,000 (more than 25% above its best)" in words and "3.48 at step 140,000" in words


@pytest.mark.parametrize(
    ("rule", "given", "told"),
    [
        (Plateau(), {"judged": False}, "stage1.until: a diffusion model"),
        (Plateau(), {"evaluate_every": 0}, "stage1.until: without evaluations"),
        (Plateau(calls=3), {}, "stage1.until.calls: 3; evaluations make 1,2"),
        (Plateau(t=0.5), {}, "stage1.until.t: 0.5; the stage trains from 1 to 80"),
    ],
)
def test_a_rule_without_evaluations_to_look_at_is_refused(rule, given, told):
    usual = {"evaluate_every": 200, "calls": (1, 2), "judged": True, "times": (1.0, 80.0)}
    check_rule("stage1.until", Plateau(t=2.0, calls=9), **usual)
    with pytest.raises(UserError, match=told):
        check_rule("stage1.until", rule, **(usual | given))


@pytest.mark.parametrize("given", [{"patience": 0}, {"rise": 0.0}, {"calls": 0}, {"t": 0.0}, {"rise": math.nan}])
def test_a_rule_of_no_meaning_is_refused(given):
    with pytest.raises(UserError, match=next(iter(given))):
        Plateau(**given)


def test_recipes_check_the_rule_and_the_labels_that_are_left_out():
    network = MLPConfig(shape=(1, 4, 4), label_dim=2)
    stages = {
        "stage1": Stage(ECT(), steps=9, until=Plateau(t=0.8)),
        "stage2": Stage(TCM(), steps=9, sampler=Multistep(mid=(1.5,))),
    }
    recipe = Recipe("r", network, stages)
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    for change, told in (
        ({"stage2": replace(stages["stage2"], until=Plateau(t=0.5))}, "stage2.until.t: 0.5"),
        ({"stage1": replace(stages["stage1"], label_dropout=0.1)}, "stage1.label_dropout: ECT makes no diffusion"),
        ({"stage1": Stage(DSM(), steps=9, sampler=ODE(), until=Plateau())}, "stage1.until: a diffusion model"),
    ):
        with pytest.raises(UserError, match=told):
            replace(recipe, stages=stages | change)
    with pytest.raises(UserError, match="teacher.label_dropout: the network knows no classes"):
        teacher = Stage(DSM(), steps=9, sampler=ODE(), label_dropout=0.1)
        Recipe("r", replace(network, label_dim=0), {"teacher": teacher})


def test_a_rule_that_can_never_decide_is_told_of():
    rule = Plateau(patience=2)
    assert undecided("stage1", rule, 100, 0, 300) is None and undecided("stage1", rule, 100, 250, 250) is None
    told = undecided("stage1", rule, 100, 0, 299)
    assert told.startswith("stage1.until: it decides from 3 evaluations on, and 299 steps have 2")
    assert told.endswith("give evaluate_every=49, or a smaller stage1.until.patience")
    assert "give a smaller stage1.until.patience" in undecided("stage1", rule, 1, 0, 2)


def test_a_run_says_so_at_its_start(tmp_path, capsys):
    assert main(["run", "digits", *TINY, "stage1.until=Plateau", "--out", str(tmp_path), "--dry-run"]) == 0
    assert "stage1.until: it decides from 6 evaluations on, and 6 steps have 1" in capsys.readouterr().err
