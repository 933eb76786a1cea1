"""ONNX: a generator as one graph, for onnxruntime and everything else that reads the format."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from onejump.exporters.generator import (
    Exported,
    GeneratorGraph,
    batch_axes,
    difference,
    draft_of,
    facts,
    quiet,
    signature,
    traced,
)
from onejump.saved import SavedModel
from onejump.types import UserError

OPSET = 20


def check_installed() -> None:
    """Raises UserError that names the extra, unless all its packages are there."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX: {', '.join(missing)} not installed; pip install 'onejump[onnx]'")


def export_onnx(saved: SavedModel, path: str | Path, steps: int = 1) -> Exported:
    """Writes the saved sampler in so many steps as path (opset 20, float32, batches of any size).

    The metadata have sampler, times, classes, licence and the weights' checksum. Above 2 GB the weights go to a second
    file, PATH.data. Nothing is written unless onnxruntime makes our images from
    our noise to 1e-4 of the largest value. Raises UserError there, for diffusion models, and without the packages.
    """
    check_installed()
    path = Path(path)
    graph = GeneratorGraph(saved, steps)
    axes, known = batch_axes(saved, steps), facts(saved, graph)
    inputs, outputs = signature(saved, steps)
    program = traced(graph, saved)
    with quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(axes),
            output_names=list(outputs),
            dynamic_shapes={name: {axis: "batch"} for name, axis in axes.items()},
            opset_version=OPSET,
            verbose=False,
        )
        assert made is not None
        made.model.metadata_props.update(known)
    with draft_of(path) as draft:
        made.save(draft)
        names = sorted(file.name for file in draft.parent.iterdir())
        worst = difference(graph, saved, _in_onnxruntime(draft, list(axes)), "onnxruntime")
    return Exported(tuple(path.parent / name for name in names), inputs, outputs, known, worst)


def _in_onnxruntime(path: Path, names: list[str]) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor]]:
    """The file on the CPU, called with inputs in the order of these names."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        arrays = {name: value.cpu().numpy() for name, value in zip(names, given, strict=True)}
        images, pixels = session.run(["images", "pixels"], arrays)
        return torch.from_numpy(images), torch.from_numpy(pixels)

    return run
