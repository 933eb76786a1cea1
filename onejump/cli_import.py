"""The command `import`: a published checkpoint, said what it is and written as ours."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onejump.importers import Imported

Work = Callable[[], None]

TEXT = "a published checkpoint as a model of ours, and what it is"
KINDS = """reads, by content and never by name:
  pickles and training states of EDM, EDM2, ECT and TCM
  state dicts .pth and .pt of these, of OpenAI's consistency models and of CTM
  JAX checkpoints of consistency_models_cifar10
  diffusers folders of ConsistencyModelPipeline
Nothing in them is ever run."""
FUNCTION = re.compile(r"<function (\w+) at \w+>")
METHODS = "what trained it, where the file does not tell: edm (a diffusion model), cm, ctm, ict, ect or tcm"


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Its options; `add` makes a command."""
    made = add("import", import_command, TEXT, KINDS)
    made.add_argument("file", type=Path, help="the checkpoint, or a diffusers folder")
    made.add_argument(
        "out", type=Path, nargs="?", help="a folder, or FILE.safetensors (default: only print what it is)"
    )
    made.add_argument("--method", help=METHODS)
    made.add_argument("--t-min", type=float, metavar="T", help="the smallest time it may be asked for (TCM: t')")
    made.add_argument("--qkv", help="order of 3-d qkv weights of OpenAI's U-Net: block or heads")
    made.add_argument("--head-channels", type=int, metavar="N", help="of an attention head in a state dict (64)")


def import_command(args: argparse.Namespace) -> Work:
    from onejump.importers import import_model
    from onejump.types import UserError

    found = import_model(args.file, args.method, args.qkv, args.t_min, args.head_channels)
    if args.out is not None:
        if found.undecided:
            raise UserError(found.undecided)
        if args.out.exists() and args.out.resolve() == args.file.resolve():
            raise UserError(f"{args.out}: that is the checkpoint itself; name another place for the model")

    def work() -> None:
        for name, value in rows(found).items():
            print(f"{name:<17} {FUNCTION.sub(lambda match: match[1], str(value))}")
        if args.out is not None:
            found.save(args.out, source_of(args.file))
            print(f"\nWritten: {args.out}")

    return work


def source_of(file: Path) -> dict[str, str]:
    """Where a model came from."""
    from onejump.checkpoint import file_sha256

    return {"imported_from": file.name} | ({"source_sha256": file_sha256(file)} if file.is_file() else {})


def rows(found: "Imported") -> dict[str, object]:
    """What there is to know about a checkpoint."""
    from onejump.precond import ToData

    n = found.parameters()
    jump = "to the data" if isinstance(found.jump, ToData) else f"jump {found.jump}"
    return {
        "kind": found.kind,
        "network": found.network,
        "parameters": f"{n:,} ({4 * n / 2**20:,.1f} MiB)",
        "images": "x".join(map(str, found.shape)),
        "classes": len(found.class_names) or "none",
        "preconditioning": f"{found.precond}, {jump}",
        "sampler": found.sampler,
        "smallest time": f"t' = {found.t_min:g}" if found.t_min else "any",
        **found.facts,
        "ema": found.ema or "not known",
        "licence": found.licence or "not known",
        **dropped_rows(found.dropped),
    }


def dropped_rows(dropped: dict[str, str]) -> dict[str, str]:
    """One row: for each reason how many tensors, and the first of them."""
    from onejump.importers.imported import first

    by_reason: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        by_reason.setdefault(reason, []).append(name)
    texts = [f"{len(names)} ({first(names)}): {reason}" for reason, names in by_reason.items()]
    return {"dropped": "; ".join(texts) or "nothing"}
