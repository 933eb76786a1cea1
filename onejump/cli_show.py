"""The command `show`: what a model or a recipe is, what it costs, how it is sampled, and its preconditioning."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onejump.cli_input import images_of
from onejump.recipes import NAMES

if TYPE_CHECKING:
    from onejump.config import Network, Recipe, Stage
    from onejump.cost import Cost
    from onejump.methods.base import Nets
    from onejump.saved import SavedModel

Work = Callable[[], None]

TIMES = (0.002, 0.02, 0.1, 0.5, 1.0, 2.0, 10.0, 80.0)
CURVE = 240  # points of a line of the picture
COST = "(float32; a multiply-add is 2 FLOPs; workspaces of kernels come on top)"


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Its options; `add` makes a command."""
    made = add("show", show_command, "what a model or a recipe is, and what it costs")
    made.add_argument(
        "what", help="a model's folder or .safetensors file, a run's folder (its last stage), or a recipe"
    )
    made.add_argument(
        "--batch", type=int, default=64, metavar="B", help="memory for so many images at once (default: %(default)s)"
    )
    made.add_argument("--curve", type=Path, metavar="FILE.svg", help="draw the model's preconditioning")
    made.add_argument("--data", metavar="PATH", help="images for a recipe (default: digits)")
    made.add_argument("--size", type=int, metavar="N", help="crop and resize them to N x N")


def show_command(args: argparse.Namespace) -> Work:
    from onejump.types import UserError

    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: at least one image")
    if args.curve is not None and args.curve.suffix.lower() != ".svg":
        raise UserError(f"--curve {args.curve}: end it with .svg")
    if args.what in NAMES or not Path(args.what).exists():
        recipe = recipe_of(args)
        return lambda: show_recipe(recipe, args.batch)
    for name, value in (("--data", args.data), ("--size", args.size)):
        if value is not None:
            raise UserError(f"{name}: goes with a recipe, and {args.what} is a model; leave it out")
    from onejump.importers.stable_diffusion import open_model

    saved, title = open_model(args.what), title_of(Path(args.what))
    return lambda: show_model(title, saved, args.batch, args.curve)


def title_of(path: Path) -> str:
    """The path, and which stage is meant if it is a run's."""
    from onejump.data.text_parts import is_stable_diffusion
    from onejump.saved import model_folder

    stage = None if path.is_file() or is_stable_diffusion(path) else model_folder(path).parent
    return f"{path}: {stage.name}, its last finished stage" if stage and stage.parent == path else str(path)


def recipe_of(args: argparse.Namespace) -> "Recipe":
    from onejump.config_json import did_you_mean
    from onejump.recipes import PUBLISHED, build_recipe, names
    from onejump.types import UserError

    if args.what not in NAMES:
        choices = f"no such file or folder, and no such recipe ({', '.join(NAMES)})"
        raise UserError(f"{args.what}: {choices}{did_you_mean(args.what, NAMES)}")
    if args.curve is not None:
        raise UserError(f"--curve: {args.what} is a recipe, whose stages differ; name a model")
    images = None if args.what in names(PUBLISHED) and args.data is None else images_of(args)
    return build_recipe(args.what, images)


def show_recipe(recipe: "Recipe", batch: int) -> None:
    from onejump.cost import cost_of
    from onejump.overrides import describe

    print(describe(recipe))
    for network, stages in networks_of(recipe).items():
        of = "" if len(networks_of(recipe)) == 1 else f" of {', '.join(stages)}"
        print_facts(f"Cost{of} {COST}", costs(cost_of(network, batch)))
    print_facts("Stages", ((name, stage_text(recipe, stage)) for name, stage in recipe.stages.items()))
    print("\nonejump run with --dry-run measures the time and memory of whole stages.")


def networks_of(recipe: "Recipe") -> "dict[Network, list[str]]":
    """Each network that is trained, and in which stages: those of CTM read a second time."""
    from onejump.fit import network_of

    found: dict[Network, list[str]] = {}
    for name, stage in recipe.stages.items():
        found.setdefault(network_of(recipe, stage), []).append(name)
    return found or {recipe.network: []}


def stage_text(recipe: "Recipe", stage: "Stage") -> str:
    """How long, and the memory of the networks besides the student."""
    import torch

    from onejump.cost import in_words
    from onejump.estimate import nets_for

    with torch.device("meta"):
        nets = nets_for(recipe, stage, torch.device("meta"))
    besides = [f"{what} ({in_words(size)})" for what, size in networks_besides(nets)]
    steps = f"{type(stage.method).__name__}, {stage.steps:,} steps of {stage.batch:,} images"
    return f"{steps}; besides the student {', '.join(besides) or 'no network'}"


def networks_besides(nets: "Nets") -> Iterator[tuple[str, int]]:
    """(what it is, its bytes) of each network that is held while the student trains."""
    from onejump.cost import bytes_of

    for model in nets.frozen:
        yield "a frozen copy of what it started as", bytes_of(model)
    if nets.average is not None:
        yield "its average as the target", bytes_of(nets.average.model)
    if nets.teacher is not None:
        yield "the teacher", bytes_of(nets.teacher)
    if nets.critic is not None:
        yield "the critic, its gradients and moments", 4 * bytes_of(nets.critic.net)


def show_model(title: str, saved: "SavedModel", batch: int, curve: Path | None) -> None:
    from onejump.cost import cost_of
    from onejump.overrides import short

    cost, model = cost_of(saved.network, batch), saved.model
    network, n = type(saved.network).__name__.removesuffix("Config"), cost.parameters
    print_facts(title, head(saved, f"{network}, {n:,} parameters"))
    print_facts(network, network_facts(saved))
    print_facts("Where it comes from", origin(saved.provenance))
    print_facts(f"Cost {COST}", costs(cost))
    t_min = f"no time below t' = {model.t_min:g}" if model.t_min else "any time"
    print_table(f"Sampling: {short(saved.sampler)}; {t_min}", sampling(saved, cost.flops))
    what = f"{short(model.precond)}, {short(model.jump)}; a, b of jumps to s = {model.jump.sigma_min:g}"
    print_table(f"Preconditioning: {what}", preconditioning(saved))
    if curve is not None:
        curve.parent.mkdir(parents=True, exist_ok=True)
        curve.write_text(draw(saved), encoding="utf-8")
        print(f"\nCurves: {curve}")


def print_facts(title: str, rows: Iterable[tuple[str, str]]) -> None:
    from onejump.overrides import listing

    print("\n" + listing(title, rows))


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Numbers to the right; what follows them in the last column to the left."""
    print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *numbers, last in rows:
        print("  " + "  ".join([*map(str.rjust, numbers, widths), last]).rstrip())


def head(saved: "SavedModel", network: str) -> Iterator[tuple[str, str]]:
    """What it is, first of all."""
    names, method = saved.class_names, saved.provenance.get("method")
    known = method.get("type") if isinstance(method, dict) else saved.provenance.get("training method")
    yield "method", str(known or "not stated")
    yield "network", network
    yield "images", "x".join(map(str, saved.shape))
    yield "classes", f"{len(names)}: {', '.join(names[:20])}{', ...' if names[20:] else ''}" if names else "none"
    yield "EMA", saved.ema or "not stated"
    yield "licence", saved.licence or "not stated"


def network_facts(saved: "SavedModel") -> Iterator[tuple[str, str]]:
    from onejump.overrides import short

    for f in fields(saved.network):
        yield f.name, short(getattr(saved.network, f.name))
    kinds = {str(p.dtype).removeprefix("torch.") for p in saved.model.net.parameters()}
    yield "weights stored as", ", ".join(sorted(kinds))


def origin(provenance: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was recorded when it was made."""
    from onejump.overrides import short

    if not provenance:
        yield "not stated", ""
    for key, value in provenance.items():
        if isinstance(value, dict):
            yield key, str(value.get("type", ""))
            yield from ((f"  {name}", short(item)) for name, item in value.items() if name != "type")
        else:
            yield key, short(value)


def costs(cost: "Cost") -> Iterator[tuple[str, str]]:
    from onejump.cost import gflop, in_words

    weights, images = in_words(cost.weights), "1 image" if cost.batch == 1 else f"{cost.batch:,} images"
    yield "parameters", f"{cost.parameters:,}"
    yield "one network pass", f"{gflop(cost.flops)} GFLOP an image; forwards and backwards 3 times that"
    yield f"sampling {images}", in_words(cost.sampling)
    yield "  weights", weights
    yield "  maps", f"{in_words(cost.maps)}, the most at once"
    yield f"training {images}", f"{in_words(cost.training)}; methods with several passes with gradients (CTM) keep more"
    yield "  weights", f"{weights}, and as much for gradients, for EMA, and twice for Adam's moments"
    yield "  maps", f"{in_words(cost.kept)} kept for backward, {in_words(cost.kept / cost.batch)} an image"
    yield "a frozen network", f"{weights} more for each: teacher (CD, CTM), average (CT, CD, CTM), stage 1 (TCM)"


def sampling(saved: "SavedModel", flops: int) -> list[tuple[str, ...]]:
    """A row for each number of steps that the model stores times for, or a few of any."""
    from onejump.cli_sampling import what_was_done
    from onejump.cost import gflop

    rows: list[tuple[str, ...]] = [("steps", "passes", "GFLOP an image", "how")]
    for steps in stored_steps(saved.sampler):
        calls = saved.sampler.calls(steps)
        rows.append((str(steps), str(calls), gflop(calls * flops), what_was_done(saved.sampler, steps)))
    return rows


def stored_steps(sampler: Any) -> list[int]:
    from onejump.samplers import ODE, Jumps, Multistep

    if isinstance(sampler, Multistep):
        return list(range(1, sampler.max_steps + 1))
    if isinstance(sampler, Jumps):
        return [len(sampler.start)]
    return [sampler.steps] if isinstance(sampler, ODE) else [1, 2, 4]


def preconditioning(saved: "SavedModel") -> list[list[str]]:
    """c_skip, c_out, c_in, c_noise, and a, b of the jump to where the model's jumps end, at a few times."""
    low, high = ends(saved)
    inside = [t for t in (*TIMES, low, saved.model.t_min) if 0 < t < high and t >= low]
    times = sorted({*inside, high})
    scalings = scalings_of(saved, times)
    rows = zip(times, *scalings.values(), strict=True)
    return [["t", *scalings, ""], *([f"{t:g}", *(f"{value:.5g}" for value in values), ""] for t, *values in rows)]


def ends(saved: "SavedModel") -> tuple[float, float]:
    """The smallest and the largest time of interest."""
    first = saved.sampler.times(stored_steps(saved.sampler)[0])[0]
    return saved.model.jump.sigma_min, round(first, 9)


def scalings_of(saved: "SavedModel", times: Sequence[float]) -> dict[str, list[float]]:
    import torch

    t = torch.tensor(times, dtype=torch.float64)
    a, b = saved.model.jump(t, torch.full_like(t, saved.model.jump.sigma_min))
    named = {**saved.model.precond(t)._asdict(), "a": a, "b": b}
    return {name: values.tolist() for name, values in named.items()}


def draw(saved: "SavedModel") -> str:
    """The table as an SVG, without c_noise, which is on another scale."""
    import math

    from onejump.svg import Style, line_chart

    low, high = ends(saved)
    low = low or min(TIMES[0], high / 1000)
    times = [low * math.exp(k / (CURVE - 1) * math.log(high / low)) for k in range(CURVE)]
    lines = {name: list(zip(times, c, strict=True)) for name, c in scalings_of(saved, times).items()}
    del lines["c_noise"]
    styles = {"a": Style(3, dash=True), "b": Style(4, dash=True)}
    title = f"{type(saved.model.precond).__name__} preconditioning, {type(saved.model.jump).__name__} jump"
    return line_chart(lines, title, "noise level t", "", log_x=True, styles=styles)
