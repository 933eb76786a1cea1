"""What commands do with text: prompts of `sample` and `evaluate`, captioned latents of `data prepare`."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from onejump.data.decode import Decoding
    from onejump.distributed import Team
    from onejump.prompts import Prompts
    from onejump.saved import SavedModel

Work = Callable[[], None]


def add_prompts(made: argparse.ArgumentParser, scored: bool = False) -> None:
    """scored: also the options that measure how well images fit their prompts."""
    if not scored:
        made.add_argument("--prompt", action="append", metavar="TEXT", help="text-to-image: what is wanted; repeatable")
    made.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, or .json: a list, or COCO's captions")
    made.add_argument("--stable-diffusion", type=Path, metavar="FOLDER", help="of its text encoder and autoencoder")
    if scored:
        made.add_argument(
            "--clip", type=Path, metavar="FOLDER", help="with --prompts: also the CLIP score, by this CLIP"
        )


def prompts_of(args: argparse.Namespace, saved: "SavedModel", device: "torch.device") -> "Prompts | None":
    """What a text-to-image model is asked for, None for other models. Raises UserError where they do not fit."""
    from onejump.prompts import prompts_for, read_prompts, reads_text
    from onejump.types import UserError

    single = getattr(args, "prompt", None)
    if single and args.prompts:
        raise UserError("--prompt and --prompts: give one of them")
    texts = read_prompts(args.prompts) if args.prompts else tuple(single or ())
    if not texts:
        if reads_text(saved):
            options = "--prompt TEXT or --prompts FILE" if "prompt" in args else "--prompts FILE"
            raise UserError(f"{args.model}: a text-to-image model; say what it shall make, with {options}")
        return None
    return prompts_for(saved, texts, args.stable_diffusion, device, getattr(args, "clip", None), args.model)


def null_of(args: argparse.Namespace, saved: "SavedModel", device: "torch.device") -> "torch.Tensor | None":
    """The empty prompt's embedding, where a model that reads text is guided."""
    if args.guidance == 1 or args.guide is not None:
        return None
    prompts = prompts_of(args, saved, device)
    return prompts.null() if prompts else None


def number_of(args: argparse.Namespace, prompts: "Prompts | None") -> int:
    """Samples to judge: --n, or as many as there are prompts, where those are fewer, which is said."""
    from onejump.run_record import say
    from onejump.types import UserError

    if prompts is None or args.n <= len(prompts.texts):
        return args.n
    held = len(prompts.texts)
    if held < 2:
        raise UserError(f"--prompts {args.prompts}: holds {held}, but a distance needs at least 2 samples; give more")
    if os.environ.get("RANK", "0") == "0":
        say(f"--prompts {args.prompts} holds {held}, so {held} of {args.n} images")
    return held


def sample_prompts(args: argparse.Namespace, saved: "SavedModel", team: "Team", write: Callable[..., None]) -> Work:
    """--n images, of the prompts in turn; one of each if no number is given. write: puts them where --out says.

    Each process of the team makes its share, and the first writes them.
    """
    from dataclasses import replace

    from onejump.cli_sampling import sampling, what_was_done
    from onejump.types import UserError

    prompts = prompts_of(args, saved, team.device)
    assert prompts is not None
    if args.label is not None:
        raise UserError(f"--class {args.label}: this model reads text and knows no classes; give --prompt")
    n = args.n or len(prompts.texts)
    asked = replace(prompts, texts=tuple(prompts.texts[k % len(prompts.texts)] for k in range(n)))
    sampler, steps = sampling(args, saved)

    def work() -> None:
        from onejump.generate import block_on, by_share
        from onejump.parts import Generated

        make = Generated(saved, sampler, steps, None, args.seed, prompts=asked)
        images = by_share(team, n, asked.image_shape(saved), block_on(team.device), make)
        if team.first:
            write(images, None, args.out, min(len(prompts.texts), 10))
            print(f"{n} images, {what_was_done(sampler, steps, saved.model)}, seed {args.seed}: {args.out}")
        team.leave()

    return work


def caption_facts(path: Path) -> list[tuple[str, str]]:
    """The lines that `data show` prints of captioned latents."""
    import torch

    from onejump.data.text_set import open_text_set

    found = open_text_set(path)
    first = found.captions(torch.arange(min(3, found.n)))
    lines = [("latents", f"{found.n:,}"), ("shape", "x".join(map(str, found.shape)))]
    lines += [("captions", "yes"), *(("", text[:90]) for text in first)]
    lines += [("scaling", f"{found.scaling:g}"), ("made by", str(found.folder))]
    return [*lines, ("fingerprint", found.fingerprint)]


def prepare_captions(args: argparse.Namespace, how: "Decoding") -> Work:
    """Images with captions to latents with captions."""
    from onejump.cli_input import device_of
    from onejump.data.text_parts import check_folder
    from onejump.types import UserError

    if args.out.suffix.lower() == ".zip":
        raise UserError(f"{args.out}: latents with captions are a folder; name one, without .zip")
    check_folder(args.vae)
    device = device_of(args.device)

    def work() -> None:
        from onejump.data.prepare_text import prepare_text
        from onejump.metrics_log import progress_of

        with progress_of("encoding") as progress:
            made = prepare_text(args.path, args.out, args.vae, how, args.skip_bad, device, progress)
        shape = "x".join(map(str, made.shape))
        print(f"{args.out}: {made.n:,} latents of {shape} with captions, {len(made.bad):,} left out")
        for why in made.bad.values():
            print(f"  {why}")

    return work
