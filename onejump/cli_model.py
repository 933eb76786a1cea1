"""The commands on finished models and runs: sample, report, and the place of evaluate among them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from onejump import cli_evaluate
from onejump.cli_input import check_seed
from onejump.cli_sampling import STEPS, add_guidance, add_sampling, guided_as_asked, sampling, what_was_done
from onejump.cli_team import team_of
from onejump.cli_text import add_prompts, null_of, prompts_of, sample_prompts

if TYPE_CHECKING:
    from onejump.types import Images

Work = Callable[[], None]


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Their options; `add` makes a command."""
    made = add("sample", sample_command, "images from a model")
    made.add_argument("model", help="a model's folder, or a run's (its last stage)")
    made.add_argument("--n", type=int, help="how many (default: 60, or one a prompt)")
    made.add_argument("--steps", type=int, help=STEPS.format("1"))
    add_sampling(made)
    add_prompts(made)
    add_guidance(made)
    made.add_argument("--class", dest="label", metavar="NAME", help="one class only (default: all in turn)")
    made.add_argument("--seed", type=int, default=0, help="image k depends on (seed, k) alone (default: %(default)s)")
    made.add_argument("--out", type=Path, default=Path("samples.png"), help="grid .png, arrays .npz, or a folder")
    made.add_argument("--device", help="cpu, cuda, ...")
    cli_evaluate.add_command(add)
    made = add("report", report_command, "make a run's report.html again")
    made.add_argument("run", type=Path, help="a run's folder")


def sample_command(args: argparse.Namespace) -> Work:
    from onejump.importers.stable_diffusion import open_model
    from onejump.types import UserError

    if args.n is not None and args.n < 1:
        raise UserError(f"--n {args.n}: at least one image")
    check_seed(args.seed)
    check_kind(args.out)
    saved = open_model(args.model)
    team = team_of(args.device)
    saved.model.to(team.device)
    saved = guided_as_asked(args, args.model, saved, null_of(args, saved, team.device))
    if prompts_of(args, saved, team.device):
        return sample_prompts(args, saved, team, write_samples)
    n = args.n or 60
    sampler, steps = sampling(args, saved)
    label = None if args.label is None else class_number(args.label, saved.class_names)

    def work() -> None:
        import torch

        from onejump.generate import balanced_labels, generate_by

        labels = balanced_labels(n, len(saved.class_names))
        if label is not None:
            labels = torch.full((n,), label)
        images = generate_by(team, saved.model, sampler, steps, n, saved.shape, labels, args.seed)
        if team.first:
            columns = 10 if len(saved.class_names) in (0, 10) else len(saved.class_names)
            write_samples(images, labels, args.out, columns)
            print(f"{n} images, {what_was_done(sampler, steps, saved.model)}, seed {args.seed}: {args.out}")
        team.leave()

    return work


def class_number(name: str, class_names: tuple[str, ...]) -> int:
    from onejump.config_json import did_you_mean
    from onejump.types import UserError

    if not class_names:
        raise UserError(f"--class {name}: this model was trained without classes")
    if name not in class_names:
        some = ", ".join(class_names[:20])
        raise UserError(f"--class: no {name!r}; there are {some}{did_you_mean(name, class_names)}")
    return class_names.index(name)


def check_kind(out: Path) -> None:
    from onejump.types import UserError

    suffix = out.suffix.lower()
    if suffix.lstrip(".").isalpha() and suffix not in (".png", ".npz") and not out.is_dir():
        raise UserError(f"--out {out}: end it with .png (a grid) or .npz (arrays), or name a folder without a suffix")


def write_samples(images: "Images", labels: object, out: Path, columns: int) -> None:
    """One grid (.png), arrays (.npz: images uint8 [n, h, w, c] and labels, empty without), or a folder of PNGs."""
    import numpy as np
    import torch

    from onejump.report import contact_sheet, to_picture

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() == ".npz":
        arrays = images.permute(0, 2, 3, 1).numpy()
        classes = labels.numpy() if isinstance(labels, torch.Tensor) else np.empty(0, np.int64)
        np.savez(out, images=arrays, labels=classes)
    elif out.suffix.lower() == ".png":
        contact_sheet(images, min(columns, len(images)), out)
    else:
        out.mkdir(exist_ok=True)
        for k, image in enumerate(images):
            to_picture(image).save(out / f"{k:06d}.png")


def report_command(args: argparse.Namespace) -> Work:
    from onejump.types import UserError

    if not (args.run / "recipe.json").is_file():
        raise UserError(f"{args.run}: not a run's folder (no recipe.json)")

    def work() -> None:
        from onejump.report import write_report

        print(f"Report: {write_report(args.run)}")

    return work
