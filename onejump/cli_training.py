"""The commands `run` and `train`: recipes, images, processes, memory."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from onejump import cli_judge, cli_team
from onejump.cli_input import check_name, images_of
from onejump.recipes import LISTED, SCALES

if TYPE_CHECKING:
    from onejump.config import Recipe
    from onejump.data.training_set import TrainingSet
    from onejump.distributed import Team
    from onejump.judge import Judge
    from onejump.memory import Setup
    from onejump.start import Given

Work = Callable[[], None]


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Their options; `add` makes a command."""
    width = max(map(len, LISTED))
    recipes = "recipes:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in LISTED.items())
    for name, command, text in (
        ("run", run_command, "the whole chain of a recipe: training, evaluation, report; resumes"),
        ("train", train_command, "one stage of a recipe; resumes"),
    ):
        add_training(add(name, command, text, recipes), one_stage=name == "train")


def add_training(made: argparse.ArgumentParser, one_stage: bool) -> None:
    """The options of run and train."""
    made.add_argument("recipe", help="a recipe's name (see below)")
    made.add_argument("overrides", nargs="*", metavar="path=value", help="such as stage1.steps=500 or seed=3")
    made.add_argument("--data", metavar="PATH", help="folder or zip of images (default: scikit-learn's digits)")
    made.add_argument("--size", type=int, metavar="N", help="crop and resize the images to N x N")
    made.add_argument("--skip-bad", action="store_true", help="leave images that cannot be read out, and list them")
    made.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE[-IMAGES])")
    made.add_argument("--teacher", metavar="MODEL", help="distil this diffusion model")
    made.add_argument(
        "--scale", choices=SCALES, help="tiny: two steps a stage on a CPU; small: about an hour on one GPU"
    )
    made.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    made.add_argument(
        "--guidance", type=float, metavar="W", help="distilling: scale of the teacher's guidance (1: none)"
    )
    made.add_argument("--guide", metavar="MODEL", help="guide the teacher by this diffusion model, not by its labels")
    cli_judge.add_options(made)
    cli_team.add_option(made)
    made.add_argument("--max-memory", metavar="SIZE", help="as many images a pass as fit in it, such as 8GiB")
    made.add_argument("--dry-run", action="store_true", help="print the configuration, time and memory, and stop")
    made.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's files")
    if one_stage:
        made.add_argument("--stage", help="which stage (default: the only one)")
        made.add_argument("--init", metavar="MODEL", help="start from this model instead of the stage before")


def recipe_of(args: argparse.Namespace, data: "TrainingSet") -> "Recipe":
    from onejump.fit import images_for
    from onejump.overrides import apply_overrides
    from onejump.recipes import build_recipe
    from onejump.start import check_shape, distilled_from

    recipe = build_recipe(args.recipe, data)
    if args.scale is not None:
        from onejump.recipes.scale import scaled

        recipe = scaled(recipe, args.scale)
    if args.teacher is not None:
        recipe = distilled_from(recipe, args.teacher)
    if args.guidance is not None:
        recipe = with_guidance(recipe, args.guidance)
    recipe = apply_overrides(recipe, args.overrides)
    check_guide(args, recipe)
    images_for(recipe.network, data)
    check_shape(recipe.network, data, args.teacher)
    return recipe


def with_guidance(recipe: "Recipe", scale: float) -> "Recipe":
    """With the teachers of the stages that have one guided."""
    from dataclasses import replace

    from onejump.config import Distilling
    from onejump.types import UserError

    distilling = [name for name, stage in recipe.stages.items() if isinstance(stage.method, Distilling)]
    if not distilling:
        raise UserError(f"--guidance {scale:g}: no stage of {recipe.name} has a teacher; leave it out")
    guided = {name: replace(recipe.stages[name], guidance=scale) for name in distilling}
    return replace(recipe, stages=recipe.stages | guided)


def check_guide(args: argparse.Namespace, recipe: "Recipe") -> None:
    from onejump.types import UserError

    if args.guide is not None and all(stage.guidance == 1 for stage in recipe.stages.values()):
        raise UserError(f"--guide {args.guide}: nothing is guided at scale 1; give --guidance, such as 2")


def images_for_recipe(args: argparse.Namespace) -> "TrainingSet":
    """--data; without it, images made up for a published recipe at --scale tiny."""
    from onejump.recipes import PUBLISHED, build_recipe, names

    if args.data is None and args.scale == "tiny" and args.recipe in names(PUBLISHED):
        from onejump.recipes.scale import made_up

        return made_up(build_recipe(args.recipe, None).network)
    return images_of(args)


def within_memory(
    args: argparse.Namespace, recipe: "Recipe", names: list[str], data: "TrainingSet", team: "Team"
) -> "Recipe":
    """The stages with passes that --max-memory has room for. Raises UserError for one that this team cannot train."""
    from onejump.train import check

    for name in names:
        check(recipe.stages[name], team, name)
    if args.max_memory is None:
        return recipe
    from dataclasses import replace

    from onejump.fit import images_for
    from onejump.memory import bytes_in, fitting
    from onejump.types import UserError

    limit = bytes_in("--max-memory", args.max_memory)
    about = (images_for(recipe.network, data), team.device, limit, setup_of(args, team))
    for name in names:
        size, problem, stage = 0, None, recipe.stages[name]
        if team.first:  # what a process holds already differs a little; what all do must not
            try:
                fits, memory = fitting(name, recipe, *about)
                size = fits.micro_batch
            except UserError as error:
                problem = str(error)
        if problem := team.told(problem):
            raise UserError(problem)
        size = team.told(size)
        if size != stage.micro_batch and team.first:
            text = f"{name}.micro_batch={size}, about {memory.peak / 2**20:,.0f} MiB"
            print(f"onejump: --max-memory {args.max_memory}: {text}", file=sys.stderr)
        recipe = replace(recipe, stages=recipe.stages | {name: replace(stage, micro_batch=size)})
    return recipe


def forewarn(recipe: "Recipe", names: list[str], out: Path, given: "Given", team: "Team") -> None:
    """Raises UserError for guidance that cannot be; says what else will not do what it is for."""
    from onejump.run_record import say
    from onejump.start import check_guided, doubts

    check_guided(recipe, names, out, given)
    for text in doubts(recipe, names, out, given) if team.first else ():
        say(text)


def default_out(args: argparse.Namespace) -> Path:
    """runs/RECIPE, or runs/RECIPE-NAME for images called NAME."""
    images = "" if args.data in (None, "digits") else f"-{Path(args.data).resolve().stem}"
    scale = f"-{args.scale}" if args.scale else ""
    return Path("runs") / f"{args.recipe}{scale}{images}"


def command_of(args: argparse.Namespace, out: Path) -> str:
    """The command that makes, or goes on with, the whole run; with --init, the very one that was given."""
    given = [("--scale", args.scale), ("--teacher", args.teacher), ("--data", args.data), ("--size", args.size)]
    given += [("--guidance", args.guidance), ("--guide", args.guide), ("--detector", args.detector)]
    given += [("--weights", args.weights), ("--device", args.device), ("--out", out)]
    name = "run"
    if "init" in args and args.init is not None:
        name, given = "train", [("--stage", args.stage), ("--init", args.init), *given]
    options = [word for option, value in given if value is not None for word in (option, str(value))]
    options += ["--skip-bad"] if args.skip_bad else []
    options += ["--max-memory", args.max_memory] if args.max_memory else []
    options += ["--shard", str(args.shard)] if args.shard > 1 else []
    return shlex.join(["onejump", name, args.recipe, *args.overrides, *options])


def opened(args: argparse.Namespace) -> "tuple[Team, Path, TrainingSet, Recipe, Judge]":
    """Of a run: its processes, folder, images, recipe, and what judges its models."""
    from onejump.distributed import in_turn

    check_name(args.recipe)
    team, out = cli_team.team_of(args.device, args.shard), args.out or default_out(args)
    detector = cli_judge.detector_of(args, out, team.device)  # what it lacks is told at once
    data = in_turn(team, lambda: images_for_recipe(args))
    return team, out, data, recipe_of(args, data), cli_judge.judge_of(args, data, detector, team)


def run_command(args: argparse.Namespace) -> Work:
    from onejump.cli_results import print_results
    from onejump.fit import check_chain
    from onejump.pipeline import check_teachers, run
    from onejump.run_record import about_detector, check_detector, check_run, open_run, read_json
    from onejump.start import Given

    team, out, data, recipe, judge = opened(args)
    given = Given(teacher=args.teacher, guide=args.guide)
    check_chain(recipe)
    forewarn(recipe, list(recipe.stages), out, given, team)
    recipe = within_memory(args, recipe, list(recipe.stages), data, team)
    if args.dry_run:
        return lambda: dry_run(args, recipe, list(recipe.stages), data, team)
    check_run(recipe, data, out)
    check_detector(judge, out)
    check_teachers(recipe, list(recipe.stages), data, out, team.device, given)
    about = command_of(args, out), about_detector(judge, args.detector, args.weights)

    def work() -> None:
        with cli_team.alone_together(out, team, lambda: open_run(recipe, data, out, team.device, *about)):
            report = run(recipe, data, out, team.device, given, args.tensorboard, team, judge)
        if team.first:
            if (out / "evaluation.json").exists():  # latents are not judged
                evaluation = read_json(out / "evaluation.json")
                print_results(evaluation["reference"], evaluation["stages"])
            print(f"Report: {report}")
        team.leave()

    return work


def train_command(args: argparse.Namespace) -> Work:
    from onejump.config_json import did_you_mean
    from onejump.pipeline import check_teachers, train_stage
    from onejump.run_record import about_detector, check_detector, check_run, open_run
    from onejump.start import Given, start_of, starting_model
    from onejump.types import UserError

    team, out, data, recipe, judge = opened(args)
    names = list(recipe.stages)
    stage = args.stage or (names[0] if len(names) == 1 else None)
    if stage not in names:
        asked = f"no {stage!r}" if stage else "say which"
        raise UserError(f"--stage: {asked}; there are {', '.join(names)}{did_you_mean(stage or '', names)}")
    given = Given(args.init, args.teacher, args.guide)
    forewarn(recipe, [stage], out, given, team)
    recipe = within_memory(args, recipe, [stage], data, team)
    if args.dry_run:
        return lambda: dry_run(args, recipe, [stage], data, team)
    check_run(recipe, data, out)
    check_detector(judge, out)
    check_teachers(recipe, [stage], data, out, team.device, given)
    starting_model(recipe, stage, start_of(recipe, stage, out, given))
    about = command_of(args, out), about_detector(judge, args.detector, args.weights)

    def work() -> None:
        with cli_team.alone_together(out, team, lambda: open_run(recipe, data, out, team.device, *about)):
            train_stage(recipe, stage, judge, out, team.device, given, args.tensorboard, team)
        team.leave()

    return work


def setup_of(args: argparse.Namespace, team: "Team") -> "Setup":
    from onejump.importers.stable_diffusion import open_model
    from onejump.memory import Setup

    return Setup(team.world, team.shard, None if args.guide is None else open_model(args.guide).network)


def dry_run(args: argparse.Namespace, recipe: "Recipe", names: list[str], data: "TrainingSet", team: "Team") -> None:
    from onejump.estimate import estimate_stage
    from onejump.metrics_log import duration
    from onejump.overrides import describe

    if not team.first:
        return
    print(describe(recipe))
    shape = "x".join(map(str, data.shape))
    print(f"\n{data.n} images of {shape}, {data.classes or 'no'} classes ({data.name})")
    about = (data, team.device, setup_of(args, team))
    estimates = {name: estimate_stage(recipe, recipe.stages[name], *about) for name in names}
    each = f", on each of {team.world} processes" if team.world > 1 else ""
    for name, guess in estimates.items():
        print(f"{name:<12} about {duration(guess.seconds):>8}, {guess.bytes / 2**20:,.0f} MiB on {team.device}{each}")
    total = sum(guess.seconds for guess in estimates.values())
    print(f"{'in all':<12} about {duration(total):>8} (measured on a few passes)")
