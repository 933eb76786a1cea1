"""The commands of Analytic-Precond: precond (a teacher's table) and alignment (gaps and errors along its ODE)."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onejump.cli_input import check_seed, device_of, images_of
from onejump.cli_sampling import add_guidance, guided_as_asked

if TYPE_CHECKING:
    from onejump.alignment import Alignment
    from onejump.analytic_table import Estimator
    from onejump.data.training_set import TrainingSet
    from onejump.precond import Jump
    from onejump.saved import SavedModel

Work = Callable[[], None]


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Their options; `add` makes a command."""
    made = add("precond", precond_command, "Analytic-Precond's table of a diffusion teacher, and a page about it")
    made.add_argument("teacher", help="a diffusion model's folder, such as RUN/teacher")
    add_data(made)
    made.add_argument("--times", type=int, default=120, help="intervals of the table (default: %(default)s)")
    made.add_argument("--samples", type=int, default=4096, help="images it is measured on (default: %(default)s)")
    made.add_argument("--batch", type=int, default=256, help="images a pass (default: %(default)s)")
    made.add_argument(
        "--trace",
        choices=("hutchinson", "exact", "finite_difference"),
        default="hutchinson",
        help="how l_t is measured; finite_difference: for networks without forward derivatives (default: %(default)s)",
    )
    made.add_argument(
        "--slope",
        choices=("jvp", "rms"),
        default="jvp",
        help="how s_t is measured; rms needs no derivative (default: %(default)s)",
    )
    made.add_argument("--out", type=Path, default=Path("table.json"), help="a .json; the page goes beside it as .html")
    made = add("alignment", alignment_command, "how far preconditionings, and a student, are from a teacher's ODE")
    made.add_argument("teacher", help="a diffusion model's folder, such as RUN/teacher")
    made.add_argument("--student", metavar="MODEL", help="also measure this model's own jumps")
    made.add_argument("--table", type=Path, help="a table of `onejump precond`: compares Analytic-Precond too")
    add_data(made)
    made.add_argument("--nodes", type=int, default=18, help="times of the Karras grid (default: %(default)s)")
    made.add_argument("--n", type=int, default=256, help="trajectories (default: %(default)s)")
    made.add_argument("--substeps", type=int, default=32, help="Heun steps between two times (default: %(default)s)")
    made.add_argument(
        "--out", type=Path, default=Path("alignment.html"), help="an .html; its numbers go beside it as .json"
    )


def add_data(made: argparse.ArgumentParser) -> None:
    made.add_argument("--data", metavar="PATH", help="folder or zip of the teacher's images (default: digits)")
    made.add_argument("--size", type=int, metavar="N", help="crop and resize them to N x N")
    add_guidance(made)
    made.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    made.add_argument("--device", help="cpu, cuda, ...")


def teacher_of(args: argparse.Namespace) -> "tuple[SavedModel, TrainingSet]":
    """The teacher, on its device, guided if asked for, and its images; without labels if it knows no classes."""
    from onejump.data.text_parts import is_stable_diffusion
    from onejump.fit import images_for
    from onejump.saved import load_model
    from onejump.teacher import check_diffusion, check_images
    from onejump.types import UserError

    path = Path(args.teacher)
    check_seed(args.seed)
    if is_stable_diffusion(path):
        raise UserError(f"{path}: Stable Diffusion, for which no such table is made; give a diffusion model of images")
    saved = load_model(path)
    check_diffusion(saved, path)
    data = images_of(args)
    if saved.network.label_dim == 0:
        data = images_for(saved.network, data)
    check_images(saved, path, data)
    saved.model.to(device_of(args.device))
    return guided_as_asked(args, path, saved), data


def sha256_of(args: argparse.Namespace) -> str:
    """Of the teacher with its guidance, as tables and runs name it."""
    from onejump.guidance import guided_sha256
    from onejump.saved import model_sha256

    return guided_sha256(model_sha256(Path(args.teacher)), args.guidance, args.guide)


def range_of(saved: "SavedModel") -> tuple[float, float, float]:
    """sigma_min, sigma_max and rho of a teacher's own grid."""
    from onejump.samplers import ODE

    assert isinstance(saved.sampler, ODE), "check_diffusion has let it pass"
    return saved.sampler.sigma_min, saved.sampler.sigma_max, saved.sampler.rho


def check_out(out: Path, suffix: str) -> None:
    from onejump.types import UserError

    if out.suffix.lower() != suffix:
        raise UserError(f"--out {out}: end it with {suffix}")


def precond_command(args: argparse.Namespace) -> Work:
    from onejump.analytic_table import Estimator

    check_out(args.out, ".json")
    estimator = Estimator(args.times, args.samples, args.trace, args.slope, args.seed, args.batch)
    saved, data = teacher_of(args)
    low, high, _ = range_of(saved)
    return lambda: precond(args, saved, data, replace(estimator, sigma_min=low, sigma_max=high))


def precond(args: argparse.Namespace, saved: "SavedModel", data: "TrainingSet", estimator: "Estimator") -> None:
    from onejump.analytic_page import cost
    from onejump.teacher import estimate_table

    table = estimate_table(saved, sha256_of(args), data, estimator, args.out, "precond")
    print(f"Table: {args.out} ({table.seconds:.1f} s)\nPage: {args.out.with_suffix('.html')}\nCost: {cost(table)}")


def alignment_command(args: argparse.Namespace) -> Work:
    from onejump.times import check_range
    from onejump.types import UserError

    check_out(args.out, ".html")
    check_range(at_least=2, nodes=args.nodes, substeps=args.substeps)
    if args.substeps % 2:
        raise UserError(f"--substeps {args.substeps}: an even number is needed, as half of them tell the error")
    check_range(at_least=1, n=args.n)
    numbers = args.out.with_suffix(".json")
    if args.table is not None and numbers.resolve() == args.table.resolve():
        raise UserError(f"--out {args.out}: its numbers would go to {numbers}, which is the table; give another name")
    saved, data = teacher_of(args)
    student = None if args.student is None else student_of(args, saved)
    jumps = jumps_for(args, saved, student)
    return lambda: align(args, saved, data, jumps, student)


def student_of(args: argparse.Namespace, teacher: "SavedModel") -> "SavedModel":
    """Raises UserError for a diffusion model and for one of other images."""
    from onejump.samplers import ODE
    from onejump.saved import load_model
    from onejump.types import UserError

    student = load_model(args.student)
    if isinstance(student.sampler, ODE):
        raise UserError(f"--student {args.student}: a diffusion model; leave it out for a student not trained yet")
    if (student.shape, student.network.label_dim) != (teacher.shape, teacher.network.label_dim):
        ours, theirs = (f"{'x'.join(map(str, m.shape))}, {m.network.label_dim} classes" for m in (student, teacher))
        raise UserError(f"--student {args.student}: it makes images of {ours}, its teacher of {theirs}")
    student.model.to(device_of(args.device))
    return student


def jumps_for(args: argparse.Namespace, saved: "SavedModel", student: "SavedModel | None") -> "dict[str, Jump]":
    """CTM's; both forms of the table, if one is given; else the student's own, if it is Analytic-Precond's."""
    from onejump.analytic_jump import Analytic
    from onejump.analytic_page import BACKWARD, EULER, FORWARD
    from onejump.analytic_table import load_table
    from onejump.precond import Euler
    from onejump.types import UserError

    low, high, _ = range_of(saved)
    found: dict[str, Jump] = {EULER: Euler(low)}
    own = None if student is None else student.model.jump
    if args.table is not None:
        table = load_table(args.table)
        if table.teacher != sha256_of(args):
            told = f"of another teacher than {args.teacher}, or of other --guidance"
            raise UserError(f"--table {args.table}: {told}; make one with onejump precond")
        table.jump().check_times(low, high)
        return found | {BACKWARD: table.jump(), FORWARD: table.jump("forward")}
    if isinstance(own, Analytic):
        own.check_times(low, high)
        return found | {BACKWARD: replace(own, form="backward"), FORWARD: replace(own, form="forward")}
    return found


def align(
    args: argparse.Namespace,
    saved: "SavedModel",
    data: "TrainingSet",
    jumps: "dict[str, Jump]",
    student: "SavedModel | None",
) -> None:
    from onejump.alignment import alignment, record
    from onejump.alignment_page import summary, write_alignment_page
    from onejump.metrics_log import progress_of
    from onejump.samplers import noise_for
    from onejump.saved import write_json
    from onejump.times import karras_grid

    device = device_of(args.device)
    low, high, rho = range_of(saved)
    grid = karras_grid(args.nodes, low, high, rho)
    x0, cond = data.batch(0, args.n, args.seed, device=device)
    xT = x0 + high * noise_for(range(args.n), saved.shape, seed=args.seed)[0].to(device)
    other = None if student is None else student.model
    with progress_of("alignment") as progress:
        found = alignment(saved.model, jumps, xT, cond, grid, args.substeps, other, progress=progress)
    about = about_alignment(args, found, data)
    write_json(args.out.with_suffix(".json"), {"about": about, **record(found)})
    write_alignment_page(args.out, found, about)
    print("\n".join(summary(found)).replace("\N{NO-BREAK SPACE}", " "))
    print(f"Page: {args.out}\nNumbers: {args.out.with_suffix('.json')}")


def guidance_text(args: argparse.Namespace) -> str:
    return f"{args.guidance:g}" if args.guide is None else f"{args.guidance:g}, by {args.guide}"


def about_alignment(args: argparse.Namespace, found: "Alignment", data: "TrainingSet") -> dict[str, str]:
    from onejump.saved import model_sha256

    models = {"Teacher": args.teacher} | ({} if args.student is None else {"Student": args.student})
    low, high = found.grid[0].item(), found.grid[-1].item()
    return {
        **{role: f"{path}, sha256 {model_sha256(Path(path))}" for role, path in models.items()},
        **({} if args.guidance == 1 else {"Guidance": guidance_text(args)}),
        **({} if args.table is None else {"Table": str(args.table)}),
        "Trajectories": f"{found.trajectories:,}, from images of {data.name} at t = {high:g}, seed {args.seed}",
        "Times": f"{len(found.grid)} of the Karras grid from {high:g} to {low:g}",
        "Teacher's ODE": f"{found.substeps} Heun steps between two times; error of the end point about "
        f"{found.flow_error:.1e} RMS a coordinate",
    }
