"""The command line. Nothing heavy is imported before a command needs it.

A command first reads what it was given (mistakes end with exit code 2), then works (failures end with 1).
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable
from errno import EDQUOT, ENOSPC

from onejump import (
    __version__,
    cli_analytic,
    cli_bench,
    cli_compare,
    cli_data,
    cli_ema,
    cli_export,
    cli_import,
    cli_model,
    cli_recipes,
    cli_show,
    cli_training,
)
from onejump.cli_input import Parser, out_of_memory

Work = Callable[[], None]


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 (failed), 2 (wrong use) or 130 (interrupted, can go on)."""
    args = read(argv)
    code = 2
    try:
        from onejump.signals import Terminated, TermUnwinds
        from onejump.types import UserError  # the first to import torch: half a second in which Ctrl-C may come
    except KeyboardInterrupt:
        return 130
    try:
        work = args.command(args)
        code = 1
        with TermUnwinds():
            work()
        return 0
    except Terminated:  # by a scheduler, where there was nothing to save
        return 0
    except UserError as error:
        print(f"{speaker()}: {error}", file=sys.stderr)
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


def speaker() -> str:
    """The program's name; of several processes started together, with the number of this one."""
    rank = os.environ.get("RANK", "0")
    return "onejump" if rank == "0" else f"onejump (process {rank})"


def read(argv: list[str] | None) -> argparse.Namespace:
    """Options and overrides in any order (argparse alone takes overrides only in one piece)."""
    args, rest = parser().parse_known_args(argv)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in args):
        more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""  # a shell's pattern may have become thousands
        dashed = [word for word in rest if re.match(r"--\w+\.[\w.]+=", word)]
        hint = f"; a setting has no dashes: {dashed[0].lstrip('-')}" if dashed else ""
        args.parser.error(f"unrecognized arguments: {' '.join(rest[:3])}{more}{hint}")
    if rest:
        args.overrides += rest
    return args


def unexpected(error: Exception, argv: list[str]) -> int:
    """Training that was asked to stop is no failure; a full disk is one line; the rest is a defect of ours."""
    from onejump.signals import Interrupted

    if isinstance(error, Interrupted):
        again = shlex.join(["onejump", *argv])
        if speaker() == "onejump":
            print(f"\nonejump: saved at step {error.step} ({error.path}). Go on with:\n  {again}", file=sys.stderr)
        return error.code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        way_out = "; free space and run the same command again" if error.errno in (ENOSPC, EDQUOT) else ""
        print(f"onejump: {where}{error.strerror or error}{way_out}", file=sys.stderr)
        return 1
    if told := out_of_memory(error, argv[0]):
        print(f"{speaker()}: {told}", file=sys.stderr)
        return 1
    raise error


def parser() -> argparse.ArgumentParser:
    about = "Images in one or two network calls: consistency models."
    top = Parser(prog="onejump", description=about, allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"onejump {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace], Work], text: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(command=command, parser=made)
        return made

    cli_training.add_commands(add)
    cli_recipes.add_commands(add)
    cli_model.add_commands(add)
    cli_compare.add_commands(add)
    cli_show.add_commands(add)
    cli_import.add_commands(add)
    cli_export.add_commands(add)
    cli_data.add_commands(add)
    cli_ema.add_commands(add)
    cli_bench.add_commands(add)
    cli_analytic.add_commands(add)
    return top
