"""What commands are given, read and checked: images, a device, names, lists of numbers; and what to say of mistakes."""

import argparse
from typing import TYPE_CHECKING, NoReturn

from onejump.recipes import NAMES

if TYPE_CHECKING:
    import torch

    from onejump.data.training_set import TrainingSet

LESS = {  # what makes a command need less memory
    "train": "give --max-memory, such as 8GiB, or a smaller STAGE.micro_batch",
    "sample": "give a smaller --n, or --device cpu",
    "evaluate": "give a smaller --block, or fewer --processes",
    "compare": "give a smaller --n, or --device cpu",
    "bench": "give a smaller --batch, or --checkpointing",
    "precond": "give a smaller --batch",
    "alignment": "give a smaller --n",
}


class Parser(argparse.ArgumentParser):
    """One whose mistakes are one line with the way out, as all others are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"onejump: {message.removeprefix('argument ')}; see {self.prog} --help\n")


def out_of_memory(error: Exception, command: str) -> str | None:
    """What to say of an error where memory was not enough, else None."""
    from torch import OutOfMemoryError

    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if not (isinstance(error, MemoryError | OutOfMemoryError) or on_cpu):
        return None
    way_out = LESS.get("train" if command == "run" else command)
    return f"out of memory; {way_out}" if way_out else "out of memory"


def images_of(args: argparse.Namespace) -> "TrainingSet":
    """--data with --size, and --skip-bad where the command has it: bad images are then left out and listed."""
    from onejump.types import UserError

    if args.data == "":
        raise UserError("--data: the path is empty; leave the option out for the digits")
    if args.data in (None, "digits"):
        if args.size not in (None, 8):
            raise UserError(f"--size {args.size}: the digits are 8x8; give --data FOLDER for other images")
        from onejump.data.digits import digits

        return digits()
    import sys

    from onejump.data.load import told
    from onejump.data.open import open_training_set

    bad: dict[str, str] | None = {} if "skip_bad" in args and args.skip_bad else None
    images = open_training_set(args.data, args.size, bad=bad)
    if bad:
        print(f"onejump: {args.data}: {told(bad)}", file=sys.stderr)
    return images


def device_of(name: str | None) -> "torch.device":
    import torch

    from onejump.types import UserError

    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name is None:
        return torch.device("cuda" if found else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here; there are {', '.join(['cpu', *found])}") from error
    return device


def check_name(recipe: str) -> None:
    """Before any image is read: a wrong name should not cost a minute."""
    from onejump.config_json import did_you_mean
    from onejump.types import UserError

    if recipe not in NAMES:
        raise UserError(f"recipe: no {recipe!r}; `onejump recipes` lists all{did_you_mean(recipe, NAMES)}")


def numbers_of(option: str, text: str, kind: type) -> list:
    """ "80,1" as [80.0, 1.0]; each above 0."""
    from onejump.types import UserError

    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        example = "80,1" if kind is float else "1,2"
        raise UserError(f"{option} {text}: numbers above 0 with commas between them are needed, such as {example}")
    return numbers


def check_seed(seed: int) -> None:
    from onejump.types import UserError

    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: a whole number from 0 to {2**63 - 1} is needed")
