"""The command `export`: a finished model for programs that know nothing of onejump, or as one file of its own."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from onejump.cli_sampling import sampling

if TYPE_CHECKING:
    from onejump.exporters.generator import Exported
    from onejump.saved import SavedModel

Work = Callable[[], None]
SUFFIXES = {"onnx": ".onnx", "program": ".pt2", "safetensors": ".safetensors", "diffusers": ""}  # kind -> end of OUT
GRAPHS = ("onnx", "program")  # kinds with the sampler inside


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Its options; `add` makes a command."""
    made = add("export", export_command, "a model for other programs: ONNX, torch.export, diffusers; or as one file")
    made.add_argument("model", help="a model's folder or file, or a run's folder (its last stage)")
    made.add_argument("out", type=Path, help="FILE.onnx, FILE.pt2 (torch.export), FILE.safetensors, FOLDER (diffusers)")
    made.add_argument("--to", choices=list(SUFFIXES), help="what to write (default: by the end of OUT)")
    made.add_argument("--steps", type=int, help="ONNX, torch.export: jumps, a network call each (default: 1)")
    made.add_argument("--times", metavar="T,T,..", help="ONNX, torch.export: falling noise levels of your own")
    made.add_argument("--gamma", type=float, help="ONNX, torch.export: as in `onejump sample`")
    made.add_argument("--jumps", metavar="T:S,..", help="ONNX, torch.export: as in `onejump sample`")
    made.set_defaults(solver=None)


def export_command(args: argparse.Namespace) -> Work:
    from dataclasses import replace

    from onejump.saved import load_model
    from onejump.types import UserError

    kind = kind_of(args.out, args.to)
    check_target(args.out, kind, Path(args.model))
    if kind not in GRAPHS:
        for name in ("steps", "times", "gamma", "jumps"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name}: goes with OUT.onnx and OUT.pt2; {kind} takes it when images are made")
        saved = load_model(args.model)
        check_reads_no_text(saved, kind)
        if kind == "diffusers":
            from onejump.exporters.diffusers_folder import check

            check(saved)
        export = export_file if kind == "safetensors" else export_folder
        return lambda: export(saved, args.out, args.model)
    if kind == "onnx":
        from onejump.exporters.onnx import check_installed

        check_installed()
    from onejump.exporters.generator import GeneratorGraph

    saved = load_model(args.model)
    check_reads_no_text(saved, kind)
    sampler, steps = sampling(args, saved)
    saved = replace(saved, sampler=sampler)
    GeneratorGraph(saved, steps)
    return lambda: export_graph(saved, args.out, kind, steps)


def kind_of(out: Path, asked: str | None) -> str:
    """What to write, by the end of OUT; --to must agree with it. A name without a known end is a folder."""
    from onejump.types import UserError

    suffix = out.suffix.lower()
    by_name = {suffix: kind for kind, suffix in SUFFIXES.items()}
    known = by_name.get(suffix)
    if asked is None and known is None and suffix.lstrip(".").isalpha():
        raise UserError(
            f"{out}: the kind {suffix} is not known; end it with .onnx, .pt2 (torch.export) or .safetensors, "
            "or name a folder without a suffix (diffusers)"
        )
    kind = asked or known or "diffusers"
    if known != kind and (kind != "diffusers" or known is not None):
        end = f"a file *{SUFFIXES[kind]}" if SUFFIXES[kind] else "a folder"
        raise UserError(f"{out}: --to {kind} writes {end}; name one")
    return kind


def check_target(out: Path, kind: str, model: Path) -> None:
    """Nothing is written over a model, over a folder, or into one that holds something."""
    from onejump.saved import CONFIG, WEIGHTS, check_new
    from onejump.types import UserError

    if out.resolve() == model.resolve() or (out.name == WEIGHTS and (out.parent / CONFIG).exists()):
        raise UserError(f"{out}: this is a model itself; give another name")
    check_new(out, folder=kind == "diffusers", over=kind in GRAPHS)


def export_graph(saved: "SavedModel", out: Path, kind: str, steps: int) -> None:
    """Writes one graph, and prints what it is and how it is called."""
    from onejump.cli_sampling import what_was_done
    from onejump.exporters.onnx import export_onnx
    from onejump.exporters.program import export_program

    export, runner = (export_onnx, "onnxruntime") if kind == "onnx" else (export_program, "torch.export")
    print(f"Making the graph of {steps} step{'s' * (steps > 1)} and comparing its images: up to a minute", flush=True)
    made = export(saved, out, steps)
    print_files(made.files)
    print(f"Checked: in {runner} the images equal ours to {made.difference:.1e}, in batches of 1 and 3")
    print(f"Sampler: {what_was_done(saved.sampler, steps)}")
    for title, words in (("Inputs:", made.inputs), ("Outputs:", made.outputs)):
        for name, value in words.items():
            print(f"{title:<8} {name} {value}")
            title = ""
    shape = (4, *saved.shape) if steps == 1 else (steps, 4, *saved.shape)
    print_use("import numpy as np, onnxruntime" if kind == "onnx" else "import torch", use_of_graph(made, kind, shape))


def use_of_graph(made: "Exported", kind: str, shape: tuple[int, ...]) -> list[str]:
    """Three lines of Python that make four images."""
    out, classes = made.files[0], "classes" in made.inputs
    if kind == "onnx":
        labels = ', "classes": np.zeros(4, "int64")' if classes else ""
        return [
            f'session = onnxruntime.InferenceSession("{out}")',
            f'noise = np.random.default_rng(0).standard_normal({shape}, "float32")',
            f'images, pixels = session.run(["images", "pixels"], {{"noise": noise{labels}}})',
        ]
    labels = ", torch.zeros(4, dtype=torch.int64)" if classes else ""
    return [
        f'generator = torch.export.load("{out}").module()',
        f"noise = torch.randn{shape}",
        f"images, pixels = generator(noise{labels})",
    ]


def check_reads_no_text(saved: "SavedModel", kind: str) -> None:
    """Other programs would need a text encoder and an autoencoder beside it."""
    from onejump.prompts import reads_text
    from onejump.types import UserError

    if reads_text(saved) and kind != "safetensors":
        raise UserError("a text-to-image model is exported as one file OUT.safetensors alone; `onejump sample` runs it")


def export_file(saved: "SavedModel", out: Path, model: str) -> None:
    """Writes our own format as one file, and prints what it is and how it is used."""
    from onejump.saved import load_model, model_sha256, save_model, usual_steps
    from onejump.types import UserError

    save_model(out, saved)
    load_model(out)  # compares the weights with their checksum
    before, after = (model_sha256(Path(path)) for path in (model, out))
    if before != after:
        raise UserError(f"{out}: its weights have the checksum {after[:12]}, the model's {before[:12]}; export again")
    print_files((out,))
    print(f"Checked: read back, every weight is the same bit for bit (sha256 {after[:12]}...)")
    steps, classes = usual_steps(saved.sampler), saved.network.label_dim
    lines = [
        f'saved = load_model("{out}")',
        f"labels = {f'balanced_labels(16, {classes})' if classes else None}",
        f"images = generate(saved.model, saved.sampler, {steps}, range(16), saved.shape, labels)",
    ]
    print_use("from onejump.saved import load_model; from onejump.generate import balanced_labels, generate", lines)


def export_folder(saved: "SavedModel", out: Path, model: str) -> None:
    """Writes a diffusers folder, and prints what it is and how it is used."""
    from onejump.exporters.diffusers_folder import export_diffusers, why_not_stock
    from onejump.importers.diffusers_folder import read
    from onejump.types import UserError

    export_diffusers(saved, out)
    there = read(out).weights
    for name, weight in saved.model.net.state_dict().items():
        if not there[name].equal(weight):
            raise UserError(f"{out}: {name}, read back, is not what {model} holds; export again")
    print_files(tuple(sorted(file for file in out.rglob("*") if file.is_file())))
    print("Checked: read back, every weight is the same bit for bit")
    why, asked = why_not_stock(saved), ", class_labels=[0]" if saved.network.label_dim else ""
    print(f"Needs:   {f'onejump[diffusers], because {why}' if why else 'diffusers alone'}; see README.md there")
    lines = [
        f'pipe = ConsistencyModelPipeline.from_pretrained("{out}")',
        f"image = pipe(num_inference_steps=1{asked}).images[0]",
        'image.save("image.png")',
    ]
    ours = "; import onejump.exporters.onejump_unet" if why else ""
    print_use(f"from diffusers import ConsistencyModelPipeline{ours}", lines)


def print_files(files: tuple[Path, ...]) -> None:
    for file in files:
        size = file.stat().st_size
        print(f"Written: {file} ({f'{size / 1e6:,.1f} MB' if size >= 1e5 else f'{size / 1e3:,.1f} kB'})")


def print_use(imports: str, lines: list[str]) -> None:
    print(f"\nTo use it ({imports}):")
    for line in lines:
        print(f"  {line}")
