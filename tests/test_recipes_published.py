"""Published recipes: the papers' numbers, parameters and figures, each in its place, and the documents of them."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import torch

from onejump.cli import read
from onejump.cli_training import default_out
from onejump.config import Recipe
from onejump.config_json import from_json, to_json
from onejump.fit import network_of
from onejump.hand_over import Plateau
from onejump.networks.text_unet import TextUNetConfig
from onejump.overrides import apply_overrides
from onejump.recipes import NAMES, PUBLISHED, build_recipe, names
from onejump.recipes.effort import gpu_hours
from onejump.recipes.record import Published
from onejump.recipes.sequence import STARTS, in_its_place, sequence, starts
from onejump.recipes.table import records, results_table
from onejump.start import starts_from

ROOT = Path(__file__).parent.parent
ALL = names(PUBLISHED)

TCM = """delta.k=8 delta.b=1 t_prime=1 times.mu=0 times.sigma=0.2 times.df=0.01 w_b=0.1 rho=0.25 t_max=80"""
IMAGENET_STAGE = "method.delta.ratio_limit=0.9961 method.delta.q=4 method.delta.double_every=25000 method.c=0.06 "
IMAGENET_STAGE += "method.weight=t_over_c_out_squared_delta precision=fp16 ema.gamma=6.94"
TABLE_3 = "rate.lr=4e-4 ema.beta=0.999 method.mu=0.999 method.solver=heun precision=fp16"
ICT = "ict.method.s0=10 ict.method.s1=1280 ict.method.P_mean=-1.1 ict.method.P_std=2 ict.method.huber=0.00054"


def of(stage: str, facts: str) -> str:
    return " ".join(f"{stage}.{fact}" for fact in facts.split())


# What the papers state: overrides that must change nothing.
FACTS = {
    "ict-cifar10": ICT,
    "ict-deep-cifar10": ICT,
    "ict-imagenet64": ICT,
    "ict-deep-imagenet64": ICT,
    "tcm-cifar10": of("stage1", "steps=250000 batch=512 method.c=1e-8 method.delta.ratio_limit=0.999 method.delta.q=2")
    + " stage1.method.delta.double_every=25000 stage1.method.weight=inverse_delta "
    + of("stage2", "steps=200000 batch=1024 count_on=true method.c=1e-8 method.delta.ratio_limit=0.999")
    + " stage2.method.delta.q=2 stage2.method.delta.double_every=25000 stage2.method.weight=inverse_delta "
    + of("stage2.method", TCM),
    "tcm-imagenet64-s": " ".join(
        (
            of("stage1", f"{IMAGENET_STAGE} steps=150000 batch=2048 rate.lr=1e-3 rate.t_ref=2000"),
            of("stage2", f"{IMAGENET_STAGE} steps=120000 batch=1024 rate.lr=5e-4 rate.t_ref=8000 count_on=true"),
            "network.model_channels=192",
            of("stage2.method", TCM),
        )
    ),
    "tcm-imagenet64-xl": of("stage2", f"{IMAGENET_STAGE} steps=40000 batch=1024 rate.lr=1e-4 rate.t_ref=8000")
    + " network.model_channels=384 "
    + of("stage2.method", TCM),
    "tcm-sd15": "stage1.guidance=6 stage2.guidance=6 stage1.batch=512 stage2.batch=512 stage1.steps=80000 "
    "stage2.steps=200000 stage2.method.of.w_b=0.1 stage2.method.of.rho=0.25",
}
COLUMNS = {
    "cifar10-uncond": ("steps=200000 batch=256 method.n=18", "method.max_steps=17", "5 days on 4 A800"),
    "cifar10-cond": ("steps=150000 batch=512 method.n=18", "method.max_steps=17", "4 days on 8 A800"),
    "ffhq64": ("steps=150000 batch=256 method.n=18", "method.max_steps=17", "5 days on 8 A800"),
    "imagenet64": ("steps=60000 batch=2048 method.n=40", "method.max_steps=20", "8 days on 32 A800"),
}
for images, (both, ctm, _) in COLUMNS.items():
    for end in ("", "-analytic"):
        FACTS[f"cd-{images}{end}"] = of("cd", f"{TABLE_3} {both}")
        FACTS[f"ctm-{images}{end}"] = of("ctm", f"{TABLE_3} {both} {ctm} jump.sigma_min=0.002" if not end else both)
        if end:
            FACTS[f"ctm-{images}{end}"] += " ctm.jump.estimator.times=120 ctm.jump.estimator.samples=4096"
            FACTS[f"ctm-{images}{end}"] += " ctm.jump.form=backward ctm.jump.estimator.sigma_max=80 " + of("ctm", ctm)

RESULTS = {  # FID in one and two steps, as the papers state them
    "ict-deep-cifar10": (2.51, 2.24),
    "ict-deep-imagenet64": (3.25, 2.77),
    "tcm-cifar10": (2.46, 2.05),
    "tcm-imagenet64-s": (2.88, 2.31),
    "tcm-imagenet64-xl": (2.20, 1.62),
}
# Exact counts of the published networks, and what the papers print where it is another network's
PARAMETERS = {
    "edm-cifar10-uncond": 55_733_891,
    "edm-ffhq64": 61_805_571,
    "edm-imagenet64": 295_899_267,
    "edm2-imagenet64-s": 280_209_253,
    "edm2-imagenet64-xl": 1_119_276_709,
    "cm-cd-cifar10": 56_395_523,
    "cm-ct-imagenet64": 295_899_267,
    "ict-cifar10": 56_395_523,
    "ict-deep-cifar10": 97_610_499,
    "ict-imagenet64": 282_168_003,
    "ict-deep-imagenet64": 472_767_555,
    "ect-cifar10-200k": 55_732_739,
    "ect-imagenet64-s": 280_209_253,
    "ect-imagenet64-m": 497_803_045,
    "ect-imagenet64-l": 777_492_197,
    "ect-imagenet64-xl-100m": 1_119_276_709,
    "tcm-cifar10": 55_732_739,
    "tcm-imagenet64-s": 280_209_253,
    "tcm-imagenet64-xl": 1_119_276_709,
    "cd-cifar10-cond": 55_734_147,
    "ctm-cifar10-uncond": 60_395_267,
    "ctm-gan-imagenet64": 324_100_611,
}
PRINTED_OTHERWISE = {"ict-deep-cifar10": 112, "ict-imagenet64": 296, "ict-deep-imagenet64": 592}
GMAC = {"tcm-cifar10": 21.19, "edm-imagenet64": 109.7, "tcm-imagenet64-s": 100.8, "ect-imagenet64-m": 178.9}
GMAC |= {"ect-imagenet64-l": 279.3, "tcm-imagenet64-xl": 402.0, "cm-cd-cifar10": 21.40}


@functools.cache
def parameters(network) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in network.build().parameters())


def student_parameters(recipe: Recipe) -> int:
    return parameters(network_of(recipe, list(recipe.stages.values())[-1]))


def test_every_name_has_a_record_of_one_row():
    assert list(records()) == NAMES and len(set(NAMES)) == len(NAMES)
    rows = [record.what for record in records().values()]
    assert len(set(rows)) == len(rows)
    for name, record in records().items():
        assert record.name == name == record.build(None).name


@pytest.mark.parametrize("name", FACTS)
def test_what_the_papers_state_stands_in_the_recipe(name):
    recipe = build_recipe(name, None)
    assert apply_overrides(recipe, FACTS[name].split()) == recipe


def test_every_figure_of_the_papers_stands_in_exactly_one_recipe():
    for name, fids in RESULTS.items():
        found = [r.name for r in records().values() if tuple(r.paper.get(steps) for steps in (1, 2)) == fids]
        assert found == [name]
    for images, (*_, cost) in COLUMNS.items():
        assert all(f"-{images}" in r.name for r in records().values() if r.cost == cost)
        assert records()[f"ctm-{images}"].cost == cost
        assert "2x to 3x" in records()[f"ctm-{images}-analytic"].note
    overhead = [r.name for r in records().values() if "18 % more time" in r.cost and "15 % more memory" in r.cost]
    assert overhead == ["tcm-imagenet64-s"]
    for name in ALL:
        assert build_recipe(name, None).evaluation.n == 50_000


def test_networks_have_the_published_number_of_parameters():
    """Every recipe is built at full size, on tensors without data."""
    for name in ALL:
        built, printed = student_parameters(build_recipe(name, None)), records()[name].parameters
        assert built == PARAMETERS.get(name, built), name
        if name in PRINTED_OTHERWISE:
            assert printed == PRINTED_OTHERWISE[name] and f"{printed:g} M" in records()[name].note
            assert f"{built / 1e6:.1f} M" in records()[name].note
        else:
            assert built / 1e6 == pytest.approx(printed, abs=0.06), name


def test_iCT_deep_has_twice_the_blocks_and_nothing_else():
    for images in ("cifar10", "imagenet64"):
        base, deep = (build_recipe(f"ict{kind}-{images}", None) for kind in ("", "-deep"))
        assert deep.network.num_blocks == 2 * base.network.num_blocks
        assert apply_overrides(deep, [f"network.num_blocks={base.network.num_blocks}", f"name={base.name}"]) == base


def test_the_operations_of_a_pass_are_those_of_the_published_networks():
    for name, gmac in GMAC.items():
        assert records()[name].gflop == pytest.approx(2 * gmac, rel=0.01), name
    for name in ALL:
        assert records()[name].gflop > 40


def test_cost_counts_the_passes_of_the_network():
    """4 an image for TCM's stages; 23.3 of CTM's teacher and 11 of its student, and LPIPS' 92 GFLOP."""
    tcm = (250_000 * 512 + 200_000 * 1024) * 4 * 42.4e9 / 2e14 / 3600
    assert gpu_hours(build_recipe("tcm-cifar10", None), 42.4) == pytest.approx(tcm)
    ctm = 200_000 * 256 * ((2 * 35 / 3 + 11) * 42.4e9 + 92e9) / 2e14 / 3600
    assert gpu_hours(build_recipe("ctm-cifar10-uncond", None), 42.4) == pytest.approx(ctm)
    distilled = 80_000 * 512 * (4 + 2 * 1) * 800e9 / 2e14 / 3600  # two passes of a guided teacher, by Euler's solver
    assert gpu_hours(build_recipe("cd-sd15", None), 800) == pytest.approx(distilled)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_survives_json_and_its_commands_run_one_after_the_other(name):
    """Each line is a valid command, and what it reads lies where a line before it put it."""
    recipe = build_recipe(name, None)
    assert from_json(to_json(recipe)) == recipe
    made = {"stable-diffusion-v1-5", "coco-images"}  # folders that are used as they are published
    for line in sequence(records()[name], recipe):
        args = read(shlex.split(line)[1:])
        assert getattr(args, "recipe", name) == name
        assert getattr(args, "stage", None) in (None, *recipe.stages)
        read_by_it = {getattr(args, option, None) for option in ("data", "teacher", "init", "vae", "model")} - {None}
        assert {str(path) for path in read_by_it} <= made, line
        made.add(str(default_out(args) if "recipe" in args else args.out))


def test_every_published_recipe_is_judged_as_its_paper_judges():
    for name in ALL:
        recipe, record = build_recipe(name, None), records()[name]
        args = read(shlex.split(sequence(record, recipe)[-1])[1:])
        assert (args.detector, args.n) == ("inception-2048", 50_000)
        assert set(map(int, args.steps.split(","))) & set(record.paper) or not record.paper


def test_models_to_start_from_are_of_the_network_that_a_recipe_of_ours_trains():
    """Where one does, its run can stand in for the published file."""
    for name in ALL:
        recipe, record = build_recipe(name, None), records()[name]
        for start in starts(record):
            if STARTS[start].recipe:
                assert starts_from(recipe.network, build_recipe(STARTS[start].recipe, None).network)
                assert any(f"runs/{STARTS[start].recipe}-" in line for line in in_its_place(record))


def test_notes_name_overrides_that_can_be_given():
    """The rule that ends stage 1 in place of its steps: for images, of which the evaluations on the way are."""
    for name in ("tcm-cifar10", "tcm-imagenet64-s"):
        given = re.findall(r"(?:stage1\.steps|stage1\.until)=[^ .]+", records()[name].note)
        stage = apply_overrides(build_recipe(name, None), given).stages["stage1"]
        assert len(given) == 2 and isinstance(stage.until, Plateau)
        assert stage.steps > build_recipe(name, None).stages["stage1"].steps
    assert "latents are not judged" in records()["tcm-sd15"].note


def test_what_starts_from_a_model_says_so():
    """ECT and TCM start from a model by --init, CD and CTM from a --teacher, and no other asks for one."""
    for name in ALL:
        command = records()[name].command
        assert ("--init" in command) == name.startswith(("ect-", "tcm-")), name
        assert ("--teacher" in command) == name.startswith(("cd-", "ctm-", "cm-cd")), name


def test_the_table_of_results_is_that_of_the_records():
    assert results_table() in (ROOT / "docs" / "results.md").read_text()


def test_the_page_of_recipes_names_each():
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert not [name for name in NAMES if f"`{name}`" not in page]


def test_ours_is_told_with_all_that_repeats_it():
    for record in records().values():
        assert isinstance(record, Published)
        if record.ours:
            for value in (record.ours.images, record.ours.detector, record.ours.budget, record.ours.device):
                assert value
            assert record.ours.by and record.ours.commit and record.ours.date[:2] == "20" and record.ours.command


def test_text_to_image_is_of_stable_diffusion():
    for name in ("tcm-sd15", "cd-sd15"):
        assert isinstance(build_recipe(name, None).network, TextUNetConfig)
