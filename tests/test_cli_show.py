"""`show` tells what a model is, what it costs and how it is sampled, with the numbers of the object itself."""

import re
from xml.etree import ElementTree

import pytest
import torch
from tiny_run import finished_run, said

from onejump.cli import main
from onejump.config_json import to_json
from onejump.cost import cost_of, gflop, in_words
from onejump.methods.ctm import CTM
from onejump.model import ConsistencyModel
from onejump.networks.song_unet import SongUNetConfig
from onejump.precond import CM, EDM, Euler, ToData
from onejump.samplers import ODE, Jumps, Multistep, Trajectory
from onejump.saved import SavedModel, save_model

NETWORK = SongUNetConfig(8, 3, 2, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
TWO_TIMES = SongUNetConfig(8, 3, model_channels=8, channel_mult=(1,), attn_resolutions=(), second_time="zero")
TO_DATA, CM_SAMPLER = ToData(), Multistep()
SVG = "{http://www.w3.org/2000/svg}"


def saved_at(folder, network=NETWORK, jump=TO_DATA, sampler=CM_SAMPLER, t_min=0.0, provenance=None):
    two_times = network.second_time != "off"
    model = ConsistencyModel(network.build(), EDM(0.25), jump, t_min, two_times)
    names = ("cat", "dog") if network.label_dim else ()
    save_model(
        folder, SavedModel(model, network, sampler, (3, 8, 8), names, provenance or {}, "CC-BY-4.0", "power 0.05")
    )
    return str(folder)


def shown(capsys, *argv):
    assert main(["show", *map(str, argv)]) == 0
    return capsys.readouterr().out


def block(text, title):
    """The words of each line of the block that starts with this title."""
    found = next(part for part in text.split("\n\n") if part.strip().startswith(title))
    return [line.split() for line in found.strip().splitlines()[1:]]


def value(text, name):
    return re.search(rf"^ *{name} +(.*)$", text, re.MULTILINE)[1]


def test_a_model_is_told_with_its_configuration_origin_and_licence(tmp_path, capsys):
    provenance = {"recipe": "mine", "stage": "ctm", "step": 7, "method": to_json(CTM(n=33))}
    text = shown(capsys, saved_at(tmp_path / "m", provenance=provenance))
    for name, expected in {
        "channel_mult": "(1, 2)",
        "weights stored as": "float32",
        "classes": "2: cat, dog",
        "images": "3x8x8",
        "licence": "CC-BY-4.0",
        "EMA": "power 0.05",
        "stage": "ctm",
        "step": "7",
        "method": "CTM",
        "n": "33",
    }.items():
        assert value(text, name) == expected


def test_costs_are_those_of_the_network_at_the_batch(tmp_path, capsys):
    text, cost = shown(capsys, saved_at(tmp_path / "m"), "--batch", "128"), cost_of(NETWORK, 128)
    assert value(text, "parameters") == f"{cost.parameters:,}"
    assert value(text, "one network pass").startswith(f"{gflop(cost.flops)} GFLOP an image")
    assert value(text, "sampling 128 images") == in_words(cost.sampling)
    assert value(text, "training 128 images").startswith(in_words(cost.training))


@pytest.mark.parametrize(
    ("sampler", "calls", "last"),
    [
        (Multistep(mid=(2.0, 1.5)), {1: 1, 2: 2, 3: 3}, "times 80, 2, 1.5"),
        (Jumps((80.0, 6.0), (1.5, 0.002)), {2: 2}, "jumps 80 to 1.5, 6 to 0.002"),
        (ODE(), {18: 35}, "18 Heun steps (35 network calls)"),
    ],
)
def test_each_number_of_steps_costs_its_network_passes(tmp_path, capsys, sampler, calls, last):
    rows = block(shown(capsys, saved_at(tmp_path / "m", sampler=sampler)), "Sampling")[1:]
    assert {int(steps): int(passes) for steps, passes, *_ in rows} == calls
    flops = cost_of(NETWORK, 1).flops
    assert [row[2] for row in rows] == [gflop(n * flops) for n in calls.values()]
    assert " ".join(rows[-1][3:]) == last


@pytest.mark.parametrize(
    ("jump", "a_and_b"),
    [
        (ToData(), lambda t: (0.0, 1.0)),
        (Euler(), lambda t: (0.002 / t, 1 - 0.002 / t)),
        (CM(sigma_data=0.25), None),
    ],
)
def test_the_table_has_the_scalings_of_denoiser_and_jump(tmp_path, capsys, jump, a_and_b):
    sampler, network = (Trajectory(), TWO_TIMES) if isinstance(jump, Euler) else (Multistep(), NETWORK)
    header, *rows = block(shown(capsys, saved_at(tmp_path / "m", network, jump, sampler)), "Preconditioning")
    assert header == ["t", "c_skip", "c_out", "c_in", "c_noise", "a", "b"]
    table = {float(t): list(map(float, values)) for t, *values in rows}
    c_skip, c_out, c_in, c_noise, a, b = table[0.5]
    assert (c_skip, c_in) == pytest.approx((0.2, 5**-0.5 * 4), rel=1e-4)  # sigma_data = 0.25, t = 0.5: 1 / (1 + 4)
    assert (c_out, c_noise) == pytest.approx((0.5 * 5**-0.5, torch.tensor(0.5).log().item() / 4), rel=1e-4)
    if a_and_b:
        assert (a, b) == pytest.approx(a_and_b(0.5), rel=1e-4, abs=1e-9)
    if not isinstance(jump, ToData):
        assert table[0.002][-2:] == [1, 0]  # f(x, eps) = x
    assert min(table) == 0.002 and max(table) == 80


def test_times_that_a_model_was_never_trained_at_are_told(tmp_path, capsys):
    text = shown(capsys, saved_at(tmp_path / "m", sampler=Multistep(mid=(3.0,)), t_min=1.5))
    assert "no time below t' = 1.5" in text
    assert "1.5" in [row[0] for row in block(text, "Preconditioning")]


def test_the_curve_is_a_picture_of_the_same_numbers(tmp_path, capsys):
    path = tmp_path / "pictures" / "curve.svg"
    text = shown(capsys, saved_at(tmp_path / "m"), "--curve", path)
    assert str(path) in text
    root = ElementTree.parse(path).getroot()
    legend = [node.text for node in root.iter(f"{SVG}text")]
    assert {"c_skip", "c_out", "c_in", "a", "b", "noise level t"} <= set(legend)
    lines = [node.get("d") for node in root.iter(f"{SVG}path") if node.get("stroke-linejoin")]
    heights = [[float(point.split()[1]) for point in d[1:].split("L")] for d in lines]
    assert len(heights) == 5
    assert heights[0] == sorted(heights[0]) and heights[1] == sorted(heights[1], reverse=True)  # c_skip falls
    assert len(set(heights[3])) == len(set(heights[4])) == 1  # a = 0 and b = 1 for all times


def test_a_recipe_tells_what_each_stage_holds_besides_the_student(capsys):
    text = shown(capsys, "digits-ctm", "--batch", "8")
    stages = {words[0]: " ".join(words[1:]) for words in block(text, "Stages")}
    weights = re.search(r"weights +([\d.]+ MiB)", text)[1]
    assert stages["teacher"].endswith("besides the student no network")
    average = re.search(r"besides the student its average as the target \((.*) MiB\), ", stages["ctm"])[1]
    assert float(average) > float(weights.split()[0]) and stages["ctm"].endswith(f"the teacher ({weights})")
    assert f"besides the student a frozen copy of what it started as ({weights})" in shown(capsys, "digits")


def test_a_published_recipe_is_told_without_its_images(capsys):
    text = shown(capsys, "ctm-cifar10-uncond", "--batch", "1")
    assert value(text, "parameters") == "60,395,267" and "42.39 GFLOP" in text
    assert "the teacher (212.6 MiB)" in text and "CTM, 200,000 steps of 256 images" in text


def test_a_recipe_tells_the_cost_of_each_network(capsys):
    """CTM's student reads a second time: 86,784 parameters more than its teacher."""
    text = shown(capsys, "digits-ctm", "--batch", "1")
    counts = {name: re.search(rf"Cost of {name} .*\n +parameters +(.*)", text)[1] for name in ("teacher", "ctm")}
    assert counts == {"teacher": "749,089", "ctm": "835,873"}
    assert "Cost (float32" in shown(capsys, "digits", "--batch", "1")


def test_a_run_is_told_by_its_last_stage(tmp_path, capsys):
    run = finished_run(tmp_path)
    capsys.readouterr()
    text = shown(capsys, run)
    assert f"{run}: stage2, its last finished stage" in text
    assert value(text, "stage") == "stage2" and value(text, "method") == "TCM"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["digits", "--curve", "c.svg"], "digits is a recipe"),
        (["digits", "--curve", "c.png"], "end it with .svg"),
        (["digits", "--batch", "0"], "--batch 0"),
        (["digitz"], "did you mean digits"),
        (["digitz"], "no such file or folder"),
    ],
)
def test_mistakes_are_refused(capsys, argv, words):
    assert words in said(capsys, ["show", *argv], 2)


@pytest.mark.parametrize("option", ["--data", "--size"])
def test_what_belongs_to_recipes_is_refused_for_a_model(tmp_path, capsys, option):
    assert f"{option}: goes with a recipe" in said(capsys, ["show", saved_at(tmp_path / "m"), option, "9"], 2)
