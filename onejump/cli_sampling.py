"""Which sampler a command asks for: the model's own, or another one from the options."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onejump.cli_input import numbers_of

if TYPE_CHECKING:
    import torch

    from onejump.model import ConsistencyModel
    from onejump.samplers import Jumps, Sampler, Trajectory
    from onejump.saved import SavedModel

STEPS = "jumps, a network call each (default: {}); a diffusion teacher: steps of its ODE (default: its own, 18)"


def add_guidance(made: argparse.ArgumentParser) -> None:
    """Of diffusion models."""
    text = "diffusion models: scale of the guidance by the class or the prompt (default: 1, none)"
    made.add_argument("--guidance", type=float, default=1.0, metavar="W", help=text)
    made.add_argument("--guide", metavar="MODEL", help="guide by this diffusion model (autoguidance), not by the label")


def guided_as_asked(
    args: argparse.Namespace, path: str | Path, saved: "SavedModel", null: "torch.Tensor | None" = None
) -> "SavedModel":
    """The model of this file with --guidance and --guide. null: the empty prompt's embedding, for those that read text.

    Raises UserError for models that are not guided.
    """
    from onejump.guidance import guide_of
    from onejump.types import UserError

    if args.guide is not None and args.guidance == 1:
        raise UserError(f"--guide {args.guide}: nothing is guided at scale 1; give --guidance too, such as 2")
    return guide_of(saved, path, args.guidance, args.guide, null)


def add_sampling(made: argparse.ArgumentParser) -> None:
    made.add_argument("--times", metavar="T,T,..", help="falling noise levels instead of the model's own, such as 80,1")
    made.add_argument(
        "--gamma", type=float, help="trajectory models (CTM): 0 follows the ODE (default), 1 adds new noise"
    )
    made.add_argument("--jumps", metavar="T:S,..", help="trajectory models: jumps of your own, such as 80:1.5,6:0.002")
    made.add_argument("--solver", help="heun, euler or dpm2: follow the ODE of the model's denoiser, in --steps steps")


def sampling(args: argparse.Namespace, saved: "SavedModel") -> "tuple[Sampler, int]":
    """The sampler and its number of steps. Raises UserError where the options do not fit the model."""
    from onejump.samplers import Multistep, refuse_below
    from onejump.types import UserError

    check_one_of(args)
    sampler = asked_sampler(args, saved)
    steps = default_steps(args, sampler) if args.steps is None else args.steps
    try:
        times = sampler.times(steps)
    except UserError as error:
        if not isinstance(sampler, Multistep) or steps <= sampler.max_steps:
            raise
        last = max(saved.model.t_min, 1.0)
        example = f"{sampler.sigma_max:g},{(sampler.sigma_max * last) ** 0.5:.0f},{last:g}"
        raise UserError(f"{error}; or give --times {example}") from error
    if isinstance(sampler, Multistep):
        refuse_below(saved.model.t_min, times)
    return sampler, steps


def check_one_of(args: argparse.Namespace) -> None:
    from onejump.types import UserError

    for name, value in (("--times", args.times), ("--jumps", args.jumps)):
        if value and args.steps is not None:
            raise UserError(f"--steps and {name}: give one of them; the number of {name[2:]} is the number of steps")
    given = [f"--{name}" for name in ("times", "gamma", "jumps", "solver") if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")


def asked_sampler(args: argparse.Namespace, saved: "SavedModel") -> "Sampler":
    from onejump import solvers
    from onejump.config_json import did_you_mean
    from onejump.samplers import ODE, Multistep
    from onejump.types import UserError

    sampler, two_times = saved.sampler, saved.model.second_time
    if args.solver is not None:
        known = {f.__name__: f for f in (solvers.heun, solvers.euler, solvers.dpm2)}
        if args.solver not in known:
            raise UserError(
                f"--solver: no {args.solver!r}; there are {', '.join(known)}{did_you_mean(args.solver, known)}"
            )
        if not isinstance(sampler, ODE) and not two_times:
            raise UserError("--solver: this model maps noise to data and is no denoiser; give --steps or --times")
        if isinstance(sampler, ODE):
            return replace(sampler, solver=known[args.solver])
        own = trajectory_of(sampler)
        return ODE(own.sigma_min, own.sigma_max, own.rho, known[args.solver])
    if args.times is not None:
        if isinstance(sampler, ODE):
            raise UserError("--times: this is a diffusion model, whose sampler takes --steps only")
        if two_times:
            raise UserError(
                "--times: this model jumps from any time to any other; give --jumps, such as 80:1.5,6:0.002"
            )
        first, *mid = numbers_of("--times", args.times, float)
        if mid != sorted(mid, reverse=True) or max(mid, default=0) > first:
            raise UserError(f"--times {args.times}: falling noise levels are needed, such as 80,1")
        return Multistep(first, tuple(mid))
    for name in ("gamma", "jumps"):
        if getattr(args, name) is not None and not two_times:
            raise UserError(f"--{name}: this model's jumps all end at the data; only trajectory models (CTM) have it")
    if args.jumps is not None:
        return asked_jumps(args.jumps, trajectory_of(sampler))
    return sampler if args.gamma is None else replace(trajectory_of(sampler), gamma=args.gamma)


def trajectory_of(sampler: "Sampler") -> "Trajectory":
    """A trajectory model's own, or one over the times of CTM's training."""
    from onejump.samplers import Trajectory

    return sampler if isinstance(sampler, Trajectory) else Trajectory()


def asked_jumps(text: str, trained: "Trajectory") -> "Jumps":
    """80:1.5,6:0.002 as jumps; none of them outside the times of training."""
    from onejump.samplers import Jumps
    from onejump.types import UserError

    pairs = [pair.split(":") for pair in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"--jumps {text}: start:end for each jump is needed, such as 80:1.5,6:0.002")
    start, end = (tuple(numbers_of("--jumps", ",".join(part), float)) for part in zip(*pairs, strict=True))
    jumps = Jumps(start, end)
    if not trained.sigma_min <= min(end) < max(start) <= trained.sigma_max:
        raise UserError(
            f"--jumps {text}: this model was trained from {trained.sigma_min:g} to {trained.sigma_max:g}; stay inside"
        )
    return jumps


def default_steps(args: argparse.Namespace, sampler: "Sampler") -> int:
    from onejump.samplers import Multistep
    from onejump.saved import usual_steps

    return sampler.max_steps if isinstance(sampler, Multistep) and args.times else usual_steps(sampler)


def what_was_done(sampler: "Sampler", steps: int, model: "ConsistencyModel | None" = None) -> str:
    """model: the one that was sampled, which calls two networks where it is guided."""
    from onejump.samplers import ODE, Jumps, Trajectory

    if isinstance(sampler, ODE):
        passes = model.passes if model else 1
        how = f"{sampler.solver.__name__.capitalize()} steps{' with guidance' if passes > 1 else ''}"
        return f"{steps} {how} ({sampler.calls(steps) * passes} network calls)"
    times = sampler.times(steps)
    if isinstance(sampler, Jumps | Trajectory):
        ends = sampler.end if isinstance(sampler, Jumps) else sampler.ends(steps)
        return f"jumps {', '.join(f'{t:.4g} to {s:.4g}' for t, s in zip(times, ends, strict=True))}"
    return f"times {', '.join(f'{t:g}' for t in times)}"
