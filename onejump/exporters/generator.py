"""A model and its sampler as one module with fixed times: what ONNX and torch.export make a graph of."""

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from onejump import __version__
from onejump.data.image_set import to_uint8
from onejump.samplers import ODE, Jumps, Multistep, Trajectory, multistep, noise_for, refuse_below, trajectory
from onejump.saved import SavedModel, not_written
from onejump.tensor_file import sha256_of
from onejump.types import Cond, UserError

TOLERANCE = 1e-4  # largest difference of a written graph's images from ours, relative to the largest of them


class GeneratorGraph(nn.Module):
    """The saved sampler in so many steps: a single module from noise (and classes) to images.

    forward(noise, classes): noise is standard normal, float32 [b, c, h, w] for one step and [steps, b, c, h, w] for
    several; classes int64 [b], for models with classes only. Returns the images, float32 [b, c, h, w] clamped to
    [-1, 1], and the same as uint8. Raises UserError for steps that this model does not make, and for diffusion models.
    """

    def __init__(self, saved: SavedModel, steps: int = 1):
        super().__init__()
        if isinstance(saved.sampler, ODE):
            raise UserError(
                f"sampler: {type(saved.sampler).__name__}; one graph is made of models that sample in a few jumps "
                "(Multistep, Trajectory or Jumps), and this is a diffusion model: distil it first"
            )
        self.model, self.steps, self.times = saved.model, steps, saved.sampler.times(steps)
        self.ends = ends_of(saved.sampler, steps)
        if self.ends is None:
            refuse_below(saved.model.t_min, self.times)

    def forward(self, noise: Tensor, classes: Cond = None) -> tuple[Tensor, Tensor]:
        draws = noise if self.steps > 1 else noise[None]
        if self.ends is None:
            x = multistep(self.model, draws, self.times, classes)
        else:
            x = trajectory(self.model, draws, self.times, self.ends, classes)
        images = x.clamp(-1, 1)
        return images, to_uint8(images)


def ends_of(sampler: Multistep | Trajectory | Jumps, steps: int) -> Sequence[float] | None:
    """Where the jumps end; None: at the data."""
    if isinstance(sampler, Multistep):
        return None
    return sampler.end if isinstance(sampler, Jumps) else sampler.ends(steps)


@dataclass(frozen=True)
class Exported:
    """What was written, how it is called, and how far its images are from ours (relative to the largest value)."""

    files: tuple[Path, ...]
    inputs: dict[str, str]  # name -> type, shape and meaning
    outputs: dict[str, str]
    facts: dict[str, str]  # the metadata inside
    difference: float


def traced(graph: GeneratorGraph, saved: SavedModel) -> torch.export.ExportedProgram:
    """The graph in eval mode (dropout is not in it), for batches of any size."""
    given = example(saved, graph.steps, 2)
    batch = torch.export.Dim("batch")
    sizes = {name: {axis: batch} for name, axis in batch_axes(saved, graph.steps).items()}
    with quiet():  # strict: only there does len(x) of a batch stay a symbol
        return torch.export.export(graph.eval(), given, dynamic_shapes=sizes, strict=True)


def batch_axes(saved: SavedModel, steps: int) -> dict[str, int]:
    """The inputs by name, and which of their axes is the batch."""
    return {"noise": 0 if steps == 1 else 1} | ({"classes": 0} if saved.network.label_dim else {})


def example(saved: SavedModel, steps: int, batch: int) -> tuple[Tensor, ...]:
    """Inputs: the noise of images 0 ... batch - 1 of seed 0, each of another class, on the model's device."""
    device = next(saved.model.parameters()).device
    noise = noise_for(range(batch), saved.shape, steps).to(device)
    noise = noise if steps > 1 else noise[0]
    classes = saved.network.label_dim
    return (noise, torch.arange(batch, device=device) % classes) if classes else (noise,)


def signature(saved: SavedModel, steps: int) -> tuple[dict[str, str], dict[str, str]]:
    """Inputs and outputs in words."""
    image = "batch, " + ", ".join(map(str, saved.shape))
    inputs = {"noise": f"float32 [{image if steps == 1 else f'{steps}, {image}'}], standard normal"}
    if saved.network.label_dim:
        inputs["classes"] = f"int64 [batch], 0 to {saved.network.label_dim - 1}"
    return inputs, {"images": f"float32 [{image}] in [-1, 1]", "pixels": f"uint8 [{image}], the same"}


def facts(saved: SavedModel, graph: GeneratorGraph) -> dict[str, str]:
    """What travels inside the file; empty facts are left out. sha256: of the weights, as in config.json."""
    known = {
        "onejump": __version__,
        "network": type(saved.network).__name__.removesuffix("Config"),
        "sampler": type(saved.sampler).__name__,
        "times": json.dumps(graph.times),
        "ends": json.dumps(graph.ends) if graph.ends else "",
        "class_names": json.dumps(saved.class_names) if saved.class_names else "",
        "licence": saved.licence,
        "ema": saved.ema,
        "sha256": sha256_of(saved.model.net.state_dict()),
    }
    return {name: value for name, value in known.items() if value}


@torch.no_grad()
def difference(
    graph: GeneratorGraph, saved: SavedModel, run: Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor]], runner: str
) -> float:
    """The largest difference between what run gives and our images, over batches of 1 and 3, relative to the largest.

    Raises UserError above the tolerance, and where bytes differ by more than one level.
    """
    floats, levels = [], []
    for batch in (1, 3):
        given = example(saved, graph.steps, batch)
        images, pixels = graph(*given)
        images_too, pixels_too = (out.to(images.device) for out in run(given))
        floats.append((images_too - images).abs().max() / images.abs().max())
        levels.append((pixels_too.int() - pixels.int()).abs().max())
    worst, level = float(torch.stack(floats).max()), int(torch.stack(levels).max())
    if not (worst <= TOLERANCE and level <= 1):  # also where it is not a number
        raise UserError(
            f"not written: in {runner} the images differ from PyTorch's by {worst:.1e} of the largest value "
            f"(limit {TOLERANCE:g}) and {level} of 255 levels (limit 1); keep the .safetensors"
        )
    return worst


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside it: what lies there at the end is moved to its place, else removed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".onejump-", dir=path.parent) as folder:
            yield Path(folder) / path.name
            for file in sorted(Path(folder).iterdir(), reverse=True):  # weights before the graph that names them
                file.replace(path.parent / file.name)
    except OSError as error:
        raise not_written(path, error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own warnings: what matters is checked afterwards."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
