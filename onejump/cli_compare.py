"""The command that sets models side by side."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onejump.cli_input import check_seed, device_of

if TYPE_CHECKING:
    from onejump.compare import Comparison

Work = Callable[[], None]
ABOUT = """A model is the folder of a run (its last finished stage), RUN/STAGE, or a model's folder or file.
Numbers come from the evaluation of the run, or from a record of `onejump evaluate MODEL --out RECORD.json`,
given as MODEL=RECORD.json. What was measured another way (other real images, detector or number of samples)
is marked and left out of the charts."""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Their options; `add` makes a command."""
    made = add("compare", compare_command, "runs and models side by side: tables, charts, samples", ABOUT)
    made.add_argument("models", nargs="+", metavar="RUN", help="RUN, RUN/STAGE, MODEL or MODEL=RECORD.json")
    made.add_argument("--stages", action="store_true", help="every finished stage of each run, not the last alone")
    made.add_argument("--names", metavar="A,B", help="what to call them, in their order")
    made.add_argument("--n", type=int, default=60, help="samples of each that are shown (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="their noise, as of `sample` (default: %(default)s)")
    made.add_argument(
        "--out", type=Path, default=Path("compare.html"), help="page; its samples also as .png (default: %(default)s)"
    )
    made.add_argument("--device", help="cpu, cuda, ...")


def compare_command(args: argparse.Namespace) -> Work:
    from onejump.compare import compare
    from onejump.types import UserError

    if args.n < 1:
        raise UserError(f"--n {args.n}: at least one image")
    check_seed(args.seed)
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: end it with .html; the samples are written beside it as .png")
    device = device_of(args.device)
    found = compare(args.models, args.names.split(",") if args.names is not None else None, args.stages)

    def work() -> None:
        from tempfile import TemporaryDirectory

        from onejump.compare import draw_sheets, real_sheet
        from onejump.compare_page import write_comparison, write_picture
        from onejump.metrics_log import progress_of

        real, picture = real_sheet(found), args.out.with_suffix(".png")
        with TemporaryDirectory() as folder, progress_of("samples") as progress:
            sheets = draw_sheets(found, args.n, args.seed, device, Path(folder), progress)
            write_comparison(args.out, found, sheets, real, f"seed {args.seed}")
            write_picture(picture, found, sheets, real)
        print_comparison(found)
        print(f"\nPage: {args.out}\nSamples: {picture}")

    return work


def print_comparison(found: "Comparison") -> None:
    """The tables of the page, but for the configurations."""
    from onejump.compare import MODELS

    print_table(MODELS, found.model_rows())
    if found.first:
        print_table(*found.result_table())
    for k, text in enumerate(found.notes, 1):
        print(f"[{k}] {text}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Text to the left, numbers to the right; what follows the comma of a title on a second line."""
    heads = [name.partition(", ")[::2] for name in header]
    lines = [[first for first, _ in heads], [second for _, second in heads], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        print("  ".join(cells).replace("\N{NO-BREAK SPACE}", " ").rstrip())
