"""The command `recipes`: every recipe with its cost, the paper's figures and ours; or all of one."""

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onejump.config import Recipe
    from onejump.recipes.record import Published

Work = Callable[[], None]
TEXT = "every recipe: what it costs, the paper's figures and ours; or all of one"
HOURS = "GPU-hours: passes of the network at 2e14 operations a second, an estimate. FID: the paper's, in 1 / 2 steps."


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Its options; `add` makes a command."""
    made = add("recipes", recipes_command, TEXT)
    made.add_argument("name", nargs="?", metavar="NAME", help="tell all of this one")
    made.add_argument("--markdown", action="store_true", help="the table as docs/results.md has it")


def recipes_command(args: argparse.Namespace) -> Work:
    from onejump.cli_input import check_name
    from onejump.types import UserError

    if args.name is None:
        return print_markdown if args.markdown else print_table
    if args.markdown:
        raise UserError(f"--markdown: is of all recipes; leave {args.name} out")
    check_name(args.name)
    return lambda: print_record(args.name)


def print_markdown() -> None:
    from onejump.recipes.table import results_table

    print(results_table())


def print_table() -> None:
    """Two lines a recipe, under the paper it is from."""
    from onejump.recipes.table import cost_text, fid_text, ours_text, records, stages_text

    source, width = "", max(map(len, records())) + 2
    for name, record in records().items():
        if record.source != source:
            source = record.source
            print(f"\n{source}")
        recipe = record.build(None)
        figures = f"FID {fid_text(record.paper)}; ours {ours_text(record.ours)}"
        print(f"  {name:<{width}}{record.what}")
        print(f"  {'':<{width}}{stages_text(recipe)}; {cost_text(record, recipe)}; {figures}")
    print(f"\n{HOURS}")


def print_record(name: str) -> None:
    from onejump.overrides import describe, listing
    from onejump.recipes.sequence import in_its_place, sequence
    from onejump.recipes.table import records

    record = records()[name]
    recipe = record.build(None)
    print(listing(name, facts(record, recipe)))
    print("\nCommands, one after the other")
    for line in sequence(record, recipe):
        print(f"  {line}")
    for line in in_its_place(record):
        print(f"Without the published model: {line}")
    print("\nConfiguration (each line is an override)")
    print(describe(recipe))


def facts(record: "Published", recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """What the record says, and what --scale makes of it."""
    import torch

    from onejump.fit import network_of
    from onejump.networks.text_unet import TextUNetConfig
    from onejump.recipes import SCALES
    from onejump.recipes.scale import scaled
    from onejump.recipes.table import cost_text, fid_text, ours_text, stages_text

    ours_alone = not isinstance(recipe.network, TextUNetConfig)  # whose network and size are the teacher's folder's
    network = f"published {record.parameters:g} M parameters" if record.parameters else ""
    if ours_alone:
        with torch.device("meta"):
            last = list(recipe.stages.values())[-1]
            built = sum(p.numel() for p in network_of(recipe, last).build().parameters())
        network = f"{built:,} parameters" + (f"; {network}" if network else "")
    yield "what", record.what
    yield "source", record.source
    yield "stages", f"{stages_text(recipe)} (steps x images)"
    yield "network", network
    yield "cost", cost_text(record, recipe) + (f"; published: {record.cost}" if record.cost else "")
    yield "the paper's FID", fid_text(record.paper)
    yield "ours", ours_text(record.ours)
    if record.ours:
        yield "  how", f"{record.ours.command} ({record.ours.budget})"
    for title, text in (("note", record.note), ("second-hand", record.second_hand)):
        if text:
            yield title, text
    for scale in SCALES if record.gflop and ours_alone else ():
        yield f"--scale {scale}", stages_text(scaled(recipe, scale))
