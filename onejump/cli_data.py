"""The command `data`: `show` tells what a set of images is, `prepare` makes one zip of it."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from onejump.cli_text import caption_facts, prepare_captions

if TYPE_CHECKING:
    from onejump.data.decode import Decoding
    from onejump.data.describe import Description
    from onejump.data.latents import LatentSet

Work = Callable[[], None]

COLUMNS, ROWS = 10, 8  # of the contact sheet
CLASSES = 20  # that are listed
FORMS = """forms that are read, told apart by content:
  folder or zip of images, one sub-folder a class or none; EDM's layout (dataset.json)
  CIFAR-10 and CIFAR-100, binary or python version, as .tar.gz or unpacked; MNIST's idx files, .gz or not
  .npz and .npy arrays, uint8; WebDataset shards: folder, NAME.tar, or 'NAME-{000..010}.tar'
  a folder saved by Hugging Face datasets (needs the extra 'data')
  latents, of `show` alone: .npy files of floats, one each in a folder or zip, or one array"""


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Its two actions; `add` makes a command."""
    made = add("data", show_command, "look at a set of images, or prepare one for training", FORMS)
    actions = made.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, command, text in (
        ("show", show_command, "counts, classes, sizes, colours, fingerprint, and bad files"),
        ("prepare", prepare_command, "crop and resize once, into a zip in EDM's layout; resumes"),
    ):
        action = actions.add_parser(
            name, help=text, description=text, epilog=FORMS, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        action.set_defaults(command=command)
        action.add_argument("path", metavar="PATH", help="the images")
        if name == "prepare":
            action.add_argument(
                "out", type=Path, metavar="OUT.zip", help="appears when it is whole; with --vae, a folder"
            )
        action.add_argument("--size", type=int, metavar="N", help="make each image N x N (default: as they are)")
        action.add_argument(
            "--crop",
            default="center",
            metavar="HOW",
            help="center: central square, Lanczos; dhariwal: the published ImageNet steps (default: %(default)s)",
        )
        if name == "prepare":
            action.add_argument("--skip-bad", action="store_true", help="leave bad images out, and list them")
            action.add_argument("--workers", type=int, metavar="N", help="threads (default: one a core)")
            action.add_argument(
                "--vae", type=Path, metavar="FOLDER", help="text-to-image: captioned latents, by this Stable Diffusion"
            )
            action.add_argument("--device", help="of --vae: cpu, cuda, ...")
        else:
            action.add_argument("--sheet", type=Path, metavar="FILE.png", help="write a contact sheet")


def decoding_of(args: argparse.Namespace) -> "Decoding":
    from onejump.data.decode import Decoding
    from onejump.data.open import check_side
    from onejump.data.shards import refuse_glob

    check_side(args.size)
    refuse_glob(Path(args.path).expanduser())
    return Decoding(None, args.size, args.crop)


@contextmanager
def memory_told(way_out: str) -> Iterator[None]:
    from onejump.types import UserError

    try:
        yield
    except MemoryError as error:
        raise UserError(f"out of memory; {way_out}") from error


def show_command(args: argparse.Namespace) -> Work:
    from onejump.types import UserError

    how = decoding_of(args)
    if args.sheet is not None and args.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet {args.sheet}: end it with .png")
    return lambda: show(args.path, how, args.sheet)


def show(path: str, how: "Decoding", sheet: Path | None) -> None:
    from onejump.data.describe import describe, describe_latents
    from onejump.data.latent_files import is_latents
    from onejump.data.text_set import is_text_set
    from onejump.metrics_log import progress_of
    from onejump.types import UserError

    if is_text_set(Path(path).expanduser()):
        told(caption_facts(Path(path).expanduser()))
        return
    if is_latents(Path(path).expanduser()):
        if how.size is not None or sheet is not None:
            raise UserError(f"{path}: latents, which have no pixels: leave --{'sheet' if sheet else 'size'} out")
        told(latent_facts(*describe_latents(Path(path).expanduser())))
        return
    with memory_told("give a smaller --size"), progress_of("reading") as progress:
        found = describe(path, how, COLUMNS * ROWS if sheet is not None else 0, progress)
    told(facts(found))
    if sheet is not None and found.sheet is not None:
        from onejump.report import contact_sheet

        contact_sheet(found.sheet, COLUMNS, sheet)
        print(f"{'sheet':<12} {sheet}")


def told(lines: list[tuple[str, str]]) -> None:
    for name, value in lines:
        print(f"{name:<12} {value}")


def latent_facts(found: "LatentSet", bad: dict[str, str]) -> list[tuple[str, str]]:
    """The same for latents: shape as the network sees it, and the scaling that brings them to a deviation of 0.5."""
    counts = [] if found.labels is None else found.labels.bincount(minlength=found.classes).tolist()
    lines = [("latents", f"{found.n:,}"), ("shape", "x".join(map(str, found.shape)))]
    lines.append(("stored as", "means and deviations, drawn anew each step" if found.moments else "numbers"))
    lines.append(("mean", " ".join(f"{value:.8f}" for value in found.scaling.mean)))
    lines.append(("std", " ".join(f"{value:.8f}" for value in found.scaling.std)))
    lines += class_lines(list(zip(found.class_names, counts, strict=True)))
    return [*lines, ("fingerprint", found.fingerprint), *bad_lines(bad)]


def class_lines(classes: list[tuple[str, int]]) -> list[tuple[str, str]]:
    lines = [("classes", f"{len(classes):,}" if classes else "none")]
    lines += [("", f"{count:>9,}  {name}") for name, count in classes[:CLASSES]]
    if len(classes) > CLASSES:
        counts = [count for _, count in classes]
        lines.append(("", f"...        {min(counts):,} to {max(counts):,} images each"))
    return lines


def bad_lines(bad: dict[str, str]) -> list[tuple[str, str]]:
    return [("bad", f"{len(bad):,}" if bad else "none"), *(("", why) for why in bad.values())]


def facts(found: "Description") -> list[tuple[str, str]]:
    """The lines that are printed: (what, value)."""
    lines = [("images", f"{found.n:,}")]
    sizes = [f"{size} ({count:,})" if len(found.sizes) > 1 else size for size, count in found.sizes[:5]]
    more = f" and {len(found.sizes) - 5:,} more" if len(found.sizes) > 5 else ""
    lines.append(("size", ", ".join(sizes) + more or "-"))
    mixed = f"3, {found.grey:,} images are grey"
    lines.append(("channels", "1" if found.grey == found.n else "3" if not found.grey else mixed))
    lines.append(("mean", " ".join(f"{value:.8f}" for value in found.mean)))
    lines.append(("std", " ".join(f"{value:.8f}" for value in found.std)))
    lines.append(("captions", "yes" if found.captions else "none"))
    fingerprint = found.fingerprint or "none: the images have several sizes; give --size"
    return [*lines, *class_lines(found.classes), ("fingerprint", fingerprint), *bad_lines(found.bad)]


def prepare_command(args: argparse.Namespace) -> Work:
    from onejump.types import UserError

    how = decoding_of(args)
    if args.vae is not None:
        return prepare_captions(args, how)
    if args.out.suffix.lower() != ".zip":
        raise UserError(f"{args.out}: end it with .zip")
    if args.crop != "center" and args.size is None:
        raise UserError(f"--crop {args.crop}: give --size too")

    def work() -> None:
        from onejump.data.prepare import prepare
        from onejump.metrics_log import progress_of

        args.out.parent.mkdir(parents=True, exist_ok=True)
        with memory_told("give --workers 1, or a smaller --size"), progress_of("preparing") as progress:
            made = prepare(args.path, args.out, how, args.skip_bad, args.workers, progress)
        labels = f"{made.classes} classes" if made.classes else "no labels"
        print(f"{args.out}: {made.n:,} images of {made.extent}, {labels}, {len(made.bad):,} left out")
        for why in made.bad.values():
            print(f"  {why}")

    return work
