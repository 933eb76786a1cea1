"""A published result: its recipe, its command, what it costs, the paper's figures and ours."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from onejump.config import Evaluation, Network, Recipe, Stage
from onejump.cost import shape_of
from onejump.data.digits import digits
from onejump.data.latents import LatentSet
from onejump.data.text_set import TextSet
from onejump.data.training_set import TrainingSet
from onejump.types import UserError

Build = Callable[[TrainingSet | None], Recipe]


@dataclass(frozen=True)
class Ours:
    """What this code has reached. frechet: by number of steps."""

    frechet: dict[int, float]
    images: str  # how many samples, against what
    detector: str
    budget: str  # how much of the recipe was trained
    command: str
    date: str
    commit: str
    device: str
    by: str  # who ran it


@dataclass(frozen=True)
class Published:
    """A row of a paper's table. `paper`: its FID of 50,000 samples by number of steps; second_hand says where that, or
    a setting, is not read from the paper itself.
    """

    name: str
    what: str
    source: str  # the paper
    build: Build
    command: str  # how it is trained; several are joined by line breaks. `sequence` has those before and after
    paper: dict[int, float] = field(default_factory=dict)
    parameters: float = 0.0  # of the network, in millions, as the papers print it
    gflop: float = 0.0  # of one pass over one image
    cost: str = ""  # as the paper states it
    note: str = ""  # what the paper leaves open, or its released code does otherwise
    second_hand: str = ""
    ours: Ours | None = None


def published(
    name: str, network: Network, stages: dict[str, Stage], evaluation: tuple[int, ...] = (1, 2), teacher_steps: int = 18
) -> Recipe:
    """A recipe at full length, judged by 50,000 samples."""
    judged = Evaluation(n=50_000, steps=evaluation, teacher_steps=teacher_steps)
    every: dict[str, Any] = {"log_every": 100, "save_every": 1000, "sample_every": 5000, "evaluate_every": 20_000}
    return Recipe(name, network, stages, evaluation=judged, **every)


def for_images(recipe: Recipe) -> Build:
    """The function of the images that returns this recipe, once it has seen that they fit."""
    return partial(_checked, recipe)


def _checked(recipe: Recipe, data: TrainingSet | None) -> Recipe:
    """Raises UserError for images that the network is not for."""
    if data is None:
        return recipe
    network, found = recipe.network, "x".join(map(str, data.shape))
    wanted = shape_of(network)
    if data.shape != wanted:
        size, way_out = "x".join(map(str, wanted)), "give other --data"
        if data is digits():  # as without --data
            way_out = f"give --data IMAGES (`onejump recipes {recipe.name}` shows how to make them)"
        elif data.shape[0] == wanted[0] and not isinstance(data, LatentSet | TextSet):
            way_out = f"give --size {wanted[-1]}, or other --data"
        raise UserError(f"images are {found}: this recipe is for {size}; {way_out}")
    if network.label_dim not in (0, data.classes):
        raise UserError(
            f"images have {data.classes} classes: this recipe is for {network.label_dim}; give other --data"
        )
    return recipe
