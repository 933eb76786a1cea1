"""The command line. Nothing heavy is imported before a command needs it.

A command first reads what it was given (mistakes end with exit code 2), then works (failures end with 1).
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING

from onejump import (
    __version__,
    cli_analytic,
    cli_compare,
    cli_data,
    cli_export,
    cli_import,
    cli_model,
    cli_show,
)
from onejump.cli_input import check_name, device_of, images_of
from onejump.recipes import LISTED

if TYPE_CHECKING:
    import torch

    from onejump.config import Recipe
    from onejump.data.training_set import TrainingSet

Work = Callable[[], None]


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 (failed), 2 (wrong use) or 130 (interrupted, can go on)."""
    args = read(argv)
    code = 2
    try:
        from onejump.types import UserError  # the first to import torch: half a second in which Ctrl-C may come
    except KeyboardInterrupt:
        return 130
    try:
        work = args.command(args)
        code = 1
        work()
        return 0
    except UserError as error:
        print(f"onejump: {error}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint" if "recipe" in args else ""
        print(f"\nonejump: stopped{goes_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return unexpected(error, sys.argv[1:] if argv is None else argv)


def read(argv: list[str] | None) -> argparse.Namespace:
    """Options and overrides in any order (argparse alone takes overrides only in one piece)."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in args):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def unexpected(error: Exception, argv: list[str]) -> int:
    """Training that was asked to stop is no failure; a full disk is one line; the rest is a defect of ours."""
    from torch import OutOfMemoryError

    from onejump.train import Interrupted

    if isinstance(error, Interrupted):
        again = shlex.join(["onejump", *argv])
        print(f"\nonejump: saved at step {error.step} ({error.path}). Go on with:\n  {again}", file=sys.stderr)
        return 130
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        way_out = "; free space and run the same command again" if error.errno in (ENOSPC, EDQUOT) else ""
        print(f"onejump: {where}{error.strerror or error}{way_out}", file=sys.stderr)
        return 1
    if isinstance(error, MemoryError | OutOfMemoryError):
        print("onejump: out of memory; in training, a smaller STAGE.micro_batch needs less", file=sys.stderr)
        return 1
    raise error


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="onejump", description="Images in one or two network calls: consistency models.")
    top.add_argument("--version", action="version", version=f"onejump {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    width = max(map(len, LISTED))
    recipes = "recipes:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in LISTED.items())

    def add(
        name: str, command: Callable[[argparse.Namespace], Work], text: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        made.set_defaults(command=command)
        return made

    for name, command, text in (
        ("run", run_command, "the whole chain of a recipe: training, evaluation, report; resumes"),
        ("train", train_command, "one stage of a recipe; resumes"),
    ):
        add_training(add(name, command, text, recipes), one_stage=name == "train")
    cli_model.add_commands(add)
    cli_compare.add_commands(add)
    cli_show.add_commands(add)
    cli_import.add_commands(add)
    cli_export.add_commands(add)
    cli_data.add_commands(add)
    cli_analytic.add_commands(add)
    return top


def add_training(made: argparse.ArgumentParser, one_stage: bool) -> None:
    """The options of run and train."""
    made.add_argument("recipe", help="a recipe's name (see below)")
    made.add_argument("overrides", nargs="*", metavar="path=value", help="such as stage1.steps=500 or seed=3")
    made.add_argument("--data", metavar="PATH", help="folder or zip of images (default: scikit-learn's digits)")
    made.add_argument("--size", type=int, metavar="N", help="crop and resize the images to N x N")
    made.add_argument("--skip-bad", action="store_true", help="leave images that cannot be read out, and list them")
    made.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE[-IMAGES])")
    made.add_argument("--teacher", metavar="MODEL", help="distil this diffusion model (CD, CTM)")
    made.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    made.add_argument("--dry-run", action="store_true", help="print the configuration, time and memory, and stop")
    made.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's files")
    if one_stage:
        made.add_argument("--stage", help="which stage (default: the only one)")
        made.add_argument("--init", metavar="MODEL", help="start from this model instead of the stage before")


def recipe_of(args: argparse.Namespace, data: "TrainingSet") -> "Recipe":
    from onejump.fit import images_for
    from onejump.overrides import apply_overrides
    from onejump.recipes import build_recipe
    from onejump.start import distilled_from

    recipe = build_recipe(args.recipe, data)
    if args.teacher is not None:
        recipe = distilled_from(recipe, args.teacher)
    recipe = apply_overrides(recipe, args.overrides)
    images_for(recipe.network, data)
    return recipe


def default_out(args: argparse.Namespace) -> Path:
    """runs/RECIPE, or runs/RECIPE-NAME for images called NAME."""
    images = "" if args.data in (None, "digits") else f"-{Path(args.data).resolve().stem}"
    return Path("runs") / f"{args.recipe}{images}"


def command_of(args: argparse.Namespace, out: Path) -> str:
    """The command that makes, or goes on with, the whole run; with --init, the very one that was given."""
    given = [("--teacher", args.teacher), ("--data", args.data), ("--size", args.size)]
    given += [("--device", args.device), ("--out", out)]
    name = "run"
    if "init" in args and args.init is not None:
        name, given = "train", [("--stage", args.stage), ("--init", args.init), *given]
    options = [word for option, value in given if value is not None for word in (option, str(value))]
    options += ["--skip-bad"] if args.skip_bad else []
    return shlex.join(["onejump", name, args.recipe, *args.overrides, *options])


def run_command(args: argparse.Namespace) -> Work:
    from onejump.cli_results import print_results
    from onejump.fit import check_chain
    from onejump.pipeline import check_teachers, run
    from onejump.run_record import alone, check_run, open_run, read_json
    from onejump.start import Given

    check_name(args.recipe)
    data = images_of(args)
    recipe, device = recipe_of(args, data), device_of(args.device)
    check_chain(recipe)
    if args.dry_run:
        return lambda: dry_run(recipe, list(recipe.stages), data, device)
    out = args.out or default_out(args)
    check_run(recipe, data, out)
    given = Given(teacher=args.teacher)
    check_teachers(recipe, list(recipe.stages), data, out, device, given)

    def work() -> None:
        with alone(out):
            open_run(recipe, data, out, device, command_of(args, out))
            report = run(recipe, data, out, device, given, args.tensorboard)
        evaluation = read_json(out / "evaluation.json")
        print_results(evaluation["reference"], evaluation["stages"])
        print(f"Report: {report}")

    return work


def train_command(args: argparse.Namespace) -> Work:
    from onejump.config_json import did_you_mean
    from onejump.evaluate import Judge, detector_for
    from onejump.pipeline import check_teachers, train_stage
    from onejump.run_record import alone, check_run, open_run
    from onejump.start import Given, start_of, starting_model
    from onejump.types import UserError

    check_name(args.recipe)
    data = images_of(args)
    recipe, device = recipe_of(args, data), device_of(args.device)
    names = list(recipe.stages)
    stage = args.stage or (names[0] if len(names) == 1 else None)
    if stage not in names:
        asked = f"no {stage!r}" if stage else "say which"
        raise UserError(f"--stage: {asked}; there are {', '.join(names)}{did_you_mean(stage or '', names)}")
    if args.dry_run:
        return lambda: dry_run(recipe, [stage], data, device)
    out = args.out or default_out(args)
    check_run(recipe, data, out)
    given = Given(args.init, args.teacher)
    check_teachers(recipe, [stage], data, out, device, given)
    starting_model(recipe, stage, start_of(recipe, stage, out, given))

    def work() -> None:
        with alone(out):
            open_run(recipe, data, out, device, command_of(args, out))
            train_stage(recipe, stage, Judge(data, detector_for(data)), out, device, given, args.tensorboard)

    return work


def dry_run(recipe: "Recipe", names: list[str], data: "TrainingSet", device: "torch.device") -> None:
    from onejump.estimate import estimate_stage
    from onejump.metrics_log import duration
    from onejump.overrides import describe

    print(describe(recipe))
    shape = "x".join(map(str, data.shape))
    print(f"\n{data.n} images of {shape}, {data.classes or 'no'} classes ({data.name})")
    estimates = {name: estimate_stage(recipe, recipe.stages[name], data, device) for name in names}
    for name, guess in estimates.items():
        print(f"{name:<12} about {duration(guess.seconds):>8}, {guess.bytes / 2**20:,.0f} MiB on {device}")
    total = sum(guess.seconds for guess in estimates.values())
    print(f"{'in all':<12} about {duration(total):>8} (measured on a few passes)")
