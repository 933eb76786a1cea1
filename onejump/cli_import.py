"""The command `import`: a published checkpoint, said what it is and written as ours."""

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onejump.importers import Imported

Work = Callable[[], None]
Rows = Iterator[tuple[str, str]]

TEXT = "a published checkpoint as a model of ours, and what it is"
KINDS = """reads, by their content:
  pickles and training states of EDM, EDM2, ECT and TCM
  state dicts .pth and .pt of these, of OpenAI's consistency models and of CTM
  JAX checkpoints of consistency_models_cifar10
  diffusers folders of ConsistencyModelPipeline
Nothing in them is ever run. A name tells something only if it is the whole name of
a published file (docs/import.md lists them), and only what the content leaves open."""
METHODS = "what trained it, where the file does not tell: edm (a diffusion model), cm, ctm, ict, ect or tcm"


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Its options; `add` makes a command."""
    made = add("import", import_command, TEXT, KINDS)
    made.add_argument("file", type=Path, help="the checkpoint, or a diffusers folder")
    made.add_argument(
        "out", type=Path, nargs="?", help="a new folder, or a new FILE.safetensors (default: only print what it is)"
    )
    made.add_argument("--method", help=METHODS)
    made.add_argument("--t-min", type=float, metavar="T", help="the smallest time it may be asked for (TCM: t')")
    made.add_argument("--qkv", help="order of 3-d qkv weights of OpenAI's U-Net: block or heads")
    made.add_argument("--head-channels", type=int, metavar="N", help="of an attention head in a state dict (64)")


def import_command(args: argparse.Namespace) -> Work:
    from onejump.importers import import_model
    from onejump.types import UserError

    if args.out is not None:
        check_out(args.out)
    found = import_model(args.file, args.method, args.qkv, args.t_min, args.head_channels)
    if args.out is not None and found.undecided:
        raise UserError(found.undecided)

    def work() -> None:
        print_report(args.file, found)
        if args.out is None:
            print(f"\n{found.undecided}\n" * bool(found.undecided) + f"\nNext: {command(args, found.undecided)}")
            return
        found.save(args.out, source_of(args.file))
        print(f"\nWritten: {args.out}\nNext: onejump sample {shlex.quote(str(args.out))}")

    return work


def check_out(out: Path) -> None:
    """A new or empty folder, or a new single file: nothing that is there is written over."""
    from onejump.saved import SINGLE, check_new
    from onejump.types import UserError

    suffix = out.suffix.lower()
    if suffix != SINGLE and suffix.lstrip(".").isalpha():
        raise UserError(f"{out}: a model is a folder or a file {SINGLE}; end the name with that, or leave out {suffix}")
    check_new(out, folder=suffix != SINGLE)


def command(args: argparse.Namespace, undecided: str) -> str:
    """The line that writes the model, with what was given."""
    given = {"--method": args.method, "--t-min": args.t_min, "--qkv": args.qkv, "--head-channels": args.head_channels}
    options = [word for name, value in given.items() if value is not None for word in (name, f"{value}")]
    line = shlex.join(["onejump", "import", str(args.file), "MODEL", *options])
    return f"{line} --method METHOD" if undecided else line


def source_of(file: Path) -> dict[str, str]:
    """Where a model came from."""
    from onejump.checkpoint import file_sha256

    return {"imported_from": file.name} | ({"source_sha256": file_sha256(file)} if file.is_file() else {})


def print_report(file: Path, found: "Imported") -> None:
    """What there is to know about a checkpoint."""
    from onejump.overrides import listing, short

    print(listing(str(file), what_it_is(found)))
    network, rows = (
        type(found.network),
        ((f.name, short(getattr(found.network, f.name))) for f in fields(found.network)),
    )
    print("\n" + listing(network.__name__.removesuffix("Config"), rows))
    if found.dropped:
        print("\n" + listing("Tensors that are not needed", dropped_rows(found.dropped)))


def what_it_is(found: "Imported") -> Rows:
    """What was trained first; how it is sampled only if that is known."""
    from onejump.overrides import short

    n, names = found.parameters(), len(found.class_names)
    yield "kind", found.kind
    yield "training method", found.facts.get("training method", "not stated")
    yield "parameters", f"{n:,} ({4 * n / 2**20:,.1f} MiB)"
    yield "images", "x".join(map(str, found.shape))
    yield "classes", str(names or "none")
    yield "EMA", found.ema or "not stated"
    yield "licence", found.licence or "not stated"
    yield "preconditioning", short(found.precond)
    if not found.undecided:
        yield "jump", short(found.jump)
        yield "sampler", short(found.sampler)
        yield "smallest time", f"t' = {found.t_min:g}" if found.t_min else "any"
    yield from ((name, text) for name, text in found.facts.items() if name != "training method")


def dropped_rows(dropped: dict[str, str]) -> Rows:
    """For each reason how many tensors, and the first of them."""
    from onejump.importers.imported import first

    by_reason: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        by_reason.setdefault(reason, []).append(name)
    yield from ((f"{len(names):,}", f"{reason}: {first(names)}") for reason, names in by_reason.items())
