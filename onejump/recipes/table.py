"""All recipes by name, and what is told of each in a line."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from onejump.config import Recipe
from onejump.data.image_set import ImageSet
from onejump.data.training_set import TrainingSet
from onejump.recipes import NAMES, cm, ctm_gan, distillation, ect, edm, ict, published, tcm
from onejump.recipes.digits import digits, digits_ict
from onejump.recipes.effort import gpu_hours
from onejump.recipes.record import Build, Ours, Published
from onejump.recipes.text import cd_sd15, tcm_sd15

STAGES = Ours(
    frechet={1: 0.714, 2: 0.536},
    images="2,000 against 1,797 real ones, 3 seeds",
    detector="digits classifier",
    budget="all of it",
    command="python bench/digits_stages.py --seeds 0,1,2",
    date="2026-11-21",
    commit="e45e9a5",
    device="2 CPU cores",
    by="this project",
)


def once(name: str, frechet: dict[int, float]) -> Ours:
    """One run of a recipe as it stands, seed 0."""
    return replace(
        STAGES,
        frechet=frechet,
        images="2,000 against 1,797 real ones, 1 seed",
        command=f"onejump run {name}",
        commit="14d4be4",
        device="1 CPU core",
    )


def on_digits(name: str, what: str, build: Build, ours: Ours | None = None) -> Published:
    return Published(name, what, "Ours, for a laptop", build, f"onejump run {name}", ours=ours)


def sized(function: Callable[[TrainingSet], Recipe]) -> Build:
    """For these images; without any, for digits."""

    def build(data: TrainingSet | None) -> Recipe:
        blank = ImageSet("digits", torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10), tuple("0123456789"))
        return function(data or blank)

    return build


DIGITS = (
    on_digits("digits", "teacher, ECT, TCM", sized(digits), STAGES),
    on_digits("digits-ict", "iCT", sized(digits_ict), once("digits-ict", {1: 0.711, 2: 0.506})),
    on_digits("digits-cd", "teacher, CD", sized(distillation.digits_cd)),
    on_digits("digits-cd-analytic", "teacher, CD + Analytic-Precond", sized(distillation.digits_cd_analytic)),
    on_digits("digits-ctm", "teacher, CTM", sized(distillation.digits_ctm)),
    on_digits("digits-ctm-analytic", "teacher, CTM + Analytic-Precond", sized(distillation.digits_ctm_analytic)),
    on_digits("digits-ctm-gan", "teacher, CTM, CTM with a small critic", sized(distillation.digits_ctm_gan)),
)
COCO = "coco-30k.txt: 30,000 captions of MSCOCO, one a line; coco-images: its images."
ON_LATENTS = "onejump run {0} --data coyo-latents --teacher stable-diffusion-v1-5"
TEXT = (
    Published(
        name="tcm-sd15",
        what="TCM stages 1 and 2, distilled from Stable Diffusion 1.5, guidance 6",
        source=f"{tcm.PAPER}, text-to-image",
        build=tcm_sd15,
        command=ON_LATENTS.format("tcm-sd15"),
        parameters=859.5,
        gflop=803.2,
        note="The paper gives guidance, batch and steps; all else is ours. Its FID on MSCOCO is not at hand. "
        "Stage 1 ends with its steps: a rule (stage1.until=Plateau) wants images, and latents are not judged while "
        f"training. {COCO}",
    ),
    Published(
        name="cd-sd15",
        what="CD, distilled from Stable Diffusion 1.5, guidance 6",
        source=f"{tcm.PAPER}, text-to-image",
        build=cd_sd15,
        command=ON_LATENTS.format("cd-sd15"),
        parameters=859.5,
        gflop=803.2,
        note=f"What tcm-sd15 is compared with, at the steps of its stage 1. {COCO}",
    ),
)
MODULES = (edm.RECORDS, cm.RECORDS, ict.RECORDS, ect.RECORDS, tcm.RECORDS, published.RECORDS, ctm_gan.RECORDS)


@cache
def records() -> dict[str, Published]:
    """By name, in the order of NAMES."""
    found = {record.name: record for group in (DIGITS, *MODULES, TEXT) for record in group}
    return {name: found[name] for name in NAMES}


def stages_text(recipe: Recipe) -> str:
    """stage1 250k x 512, stage2 200k x 1024: steps and images a step."""
    return ", ".join(f"{name} {thousands(stage.steps)} x {stage.batch}" for name, stage in recipe.stages.items())


def thousands(n: int) -> str:
    """In full below ten thousand; else in thousands, to a digit behind the point where it is not round."""
    return str(n) if n < 10_000 else f"{n / 1000:.1f}k".replace(".0k", "k")


def fid_text(fids: dict[int, float]) -> str:
    """One and two steps as a / b; others with their number of steps."""
    both = {1, 2} <= set(fids)
    short = [f"{fids[1]:.2f} / {fids[2]:.2f}"] if both else []
    named = [f"{fid:.2f} in {steps}" for steps, fid in fids.items() if not (both and steps < 3)]
    return ", ".join(short + named) or "-"


def cost_text(record: Published, recipe: Recipe) -> str:
    if not record.gflop:
        return "minutes on a CPU"
    hours = gpu_hours(recipe, record.gflop)
    return f"{hours:,.0f} GPU-hours" if hours >= 10 else f"{hours:.2g} GPU-hours"


def ours_text(ours: Ours | None) -> str:
    if ours is None:
        return "not yet"
    figures = " / ".join(f"{ours.frechet[steps]:.3f}" for steps in sorted(ours.frechet))
    return f"{figures} ({ours.detector}; {ours.images}; {ours.by}, {ours.date}, {ours.commit}, {ours.device})"


def results_table() -> str:
    """The table in docs/results.md."""
    head = "recipe | what | steps x batch | cost | the paper's FID in 1 / 2 steps | ours | command"
    rows = [head, "|".join(["---"] * (head.count("|") + 1))]
    for name, record in records().items():
        recipe = record.build(None)
        paper = fid_text(record.paper) + (" †" if record.paper and "FID" in record.second_hand else "")
        cost = cost_text(record, recipe) + (f" (published: {record.cost})" if record.cost else "")
        command = "; ".join(f"`{line}`" for line in record.command.splitlines())
        cells = (f"`{name}`", record.what, stages_text(recipe), cost, paper, ours_text(record.ours), command)
        rows.append(" | ".join(cells))
    return "\n".join(f"| {row} |" for row in rows)
