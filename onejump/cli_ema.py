"""The command `ema`: models with averages of other widths, from the snapshots that a stage has saved."""

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onejump.ema import Mix
    from onejump.posthoc import Track
    from onejump.saved import SavedModel

Work = Callable[[], None]

TEXT = "a trained stage's EMA of any width, from its snapshots (STAGE.snapshots)"
EPILOG = "sigma_rel is the width of the average as a share of training up to the step; docs/ema.md has more."
WIDTHS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)  # that the table lists
COARSE = 0.1  # errors above it are remarked on


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Its options; `add` makes a command."""
    made = add("ema", ema_command, TEXT, EPILOG)
    made.add_argument("model", type=Path, help="a stage's folder, or a run's (its last finished stage)")
    made.add_argument("--sigma-rel", metavar="S,S,..", help="the width, or several: 0.05 is a twentieth of training")
    made.add_argument("--step", type=int, metavar="N", help="at this step, one of the snapshots' (default: the last)")
    made.add_argument(
        "--out",
        type=Path,
        metavar="MODEL",
        help="a new folder or FILE.safetensors; for several widths S, MODEL/S or FILE-S.safetensors "
        "(default: only print what there is)",
    )


def ema_command(args: argparse.Namespace) -> Work:
    from onejump.ema import Profile
    from onejump.posthoc import track_in
    from onejump.types import UserError

    widths = widths_of(args.sigma_rel)
    stage = stage_of(args.model)
    track = track_in(stage / "ema")
    step = track.steps[-1] if args.step is None else args.step
    mixes = [track.mix(Profile(step, width)) for width in widths or WIDTHS]
    if args.out is None:
        return lambda: print_track(args.model, stage, track, mixes)
    if not widths:
        raise UserError("--sigma-rel: say which width is to be made, such as --sigma-rel 0.05")
    places = places_of(args.out, widths)
    saved, rest = model_around(stage, track)
    return lambda: make(track, mixes, places, saved, rest)


def widths_of(text: str | None) -> list[float]:
    """Of --sigma-rel, each once; none if it is not given."""
    from onejump.ema import check_sigma_rel
    from onejump.types import UserError

    if text is None:
        return []
    try:
        widths = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--sigma-rel {text}: one or more numbers are needed, such as 0.05 or 0.02,0.05,0.1") from error
    for width in widths:
        check_sigma_rel("--sigma-rel", width)
    return list(dict.fromkeys(widths))


def stage_of(path: Path) -> Path:
    """The stage whose snapshots are meant: it may not be finished, where it is named itself."""
    from onejump.saved import model_folder
    from onejump.types import UserError

    if (path / "ema").is_dir():
        return path
    stage = path.parent if path.is_file() else model_folder(path).parent
    if not (stage / "ema").is_dir():
        others = ", ".join(str(folder.parent) for folder in sorted(path.glob("*/ema")))
        way_out = f"some are in {others}" if others else "a stage trained with STAGE.snapshots=Snapshots has them"
        raise UserError(f"{stage}: no snapshots there; {way_out}")
    return stage


def places_of(out: Path, widths: Sequence[float]) -> list[Path]:
    """Where each model is written; nothing that is there is written over."""
    from onejump.saved import SINGLE, check_new

    single = out.suffix.lower() == SINGLE
    names = [f"{width:.15g}" for width in widths]
    if len(names) == 1:
        check_new(out, folder=not single)
        return [out]
    places = [out.with_name(f"{out.stem}-{name}{out.suffix}") if single else out / name for name in names]
    for place in places if single else [out]:
        check_new(place, folder=not single)
    return places


def model_around(stage: Path, track: "Track") -> "tuple[SavedModel, dict[str, Any]]":
    """The stage's model, its network on the meta device, and of its weights those that are not averaged."""
    from onejump.saved import check_fit, load_model
    from onejump.types import UserError

    if not (stage / "model").is_dir():
        raise UserError(f"{stage}: this stage is not finished; its averages can be made when it is")
    saved = load_model(stage / "model")
    rest = {name: t for name, t in saved.model.net.state_dict().items() if name not in track.entries}
    try:
        check_fit(rest | track.entries, saved.model.net)
    except UserError as error:
        raise UserError(f"{track.folder}: the snapshots are not of the model beside them ({error})") from error
    saved.model.net.to("meta")
    return saved, rest


def make(
    track: "Track", mixes: "Sequence[Mix]", places: Sequence[Path], saved: "SavedModel", rest: dict[str, Any]
) -> None:
    """Writes every model, and says how near it comes."""
    from dataclasses import replace

    from onejump.posthoc import mapped
    from onejump.saved import not_written, save_model

    try:
        places[0].parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".ema-", dir=places[0].parent) as drafts:
            files = [Path(drafts) / place.name for place in places]
            track.combine(mixes, files)
            for made, file, place in zip(mixes, files, places, strict=True):
                about = saved.provenance | {"step": made.wanted.step, "post-hoc EMA": origin(track, made)}
                ema = f"power sigma_rel {made.wanted.sigma_rel:.3g}, post-hoc"
                save_model(place, replace(saved, provenance=about, ema=ema), rest | mapped(file))
                print(f"Written: {place}: {what(made)}")
    except OSError as error:
        raise not_written(places[0].parent, error) from error
    print(f"\nNext: onejump evaluate {shlex.quote(str(places[0]))}")


def origin(track: "Track", made: "Mix") -> dict[str, Any]:
    """How an average was made, for the model's record."""
    used = [(s, w) for s, w in zip(track.snapshots, made.weights, strict=True) if w]
    return {
        "sigma_rel": made.wanted.sigma_rel,
        "error": made.error,
        "first_step": track.first_step,
        "snapshots": [snapshot.path.name for snapshot, _ in used],
        "weights": [weight for _, weight in used],
        "sha256": [snapshot.sha256[:16] for snapshot, _ in used],
    }


def what(made: "Mix") -> str:
    """An average and how near it comes, in a line."""
    files = sum(weight != 0 for weight in made.weights)
    of = f"{files} snapshot{'s' * (files > 1)}, error {made.error:.1%}"
    coarse = "; too few snapshots for such an average" * (made.error > COARSE)
    return f"sigma_rel {made.wanted.sigma_rel:.3g} at step {made.wanted.step:,}, of {of}{coarse}"


def print_track(model: Path, stage: Path, track: "Track", mixes: "Sequence[Mix]") -> None:
    """What there is, and how near averages of several widths come."""
    from onejump.overrides import listing

    step = mixes[0].wanted.step
    print(listing(f"{stage}: snapshots of its EMAs", facts(track)))
    print(f"\nAt step {step:,}\n  sigma_rel       steps   error  files" + "  of its start" * (track.first_step > 0))
    for made in mixes:
        width, files = made.wanted.sigma_rel, sum(weight != 0 for weight in made.weights)
        start = f"{made.wanted.share(track.first_step):14.1%}" if track.first_step else ""
        coarse = "  too coarse" * (made.error > COARSE)
        print(f"  {width:9.3g}  {width * step:10,.0f}  {made.error:6.1%}  {files:5}{start}{coarse}")
    best = min(mixes, key=lambda made: made.error).wanted.sigma_rel
    print(f"\nNext: onejump ema {shlex.quote(str(model))} --sigma-rel {best:.3g} --out MODEL")


def facts(track: "Track") -> Iterator[tuple[str, str]]:
    from onejump.cost import in_words

    steps, widths = track.steps, sorted({snapshot.profile.sigma_rel for snapshot in track.snapshots})
    words = [f"{step:,}" for step in steps]
    yield "widths", ", ".join(f"{width:.3g}" for width in widths)
    yield "steps", ", ".join(words if len(words) <= 8 else [*words[:3], "...", words[-1]]) + f" ({len(words)})"
    if track.first_step:
        yield "began", f"at step {track.first_step:,}; its first weights stand for all steps before"
    yield "size", in_words(sum(snapshot.path.stat().st_size for snapshot in track.snapshots))
