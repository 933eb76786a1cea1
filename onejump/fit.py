"""Whether a recipe and a set of images fit each other, found out before anything is trained."""

from dataclasses import replace

from onejump.config import Network, Recipe, Stage
from onejump.data.training_set import TrainingSet
from onejump.lpips import LPIPS
from onejump.methods.cd import CD
from onejump.methods.continuous import ContinuousCD, ContinuousCT
from onejump.methods.ct import CT
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.types import UserError


def images_for(network: Network, data: TrainingSet) -> TrainingSet:
    """The images as this network is trained on them: without their labels if it knows no classes (label_dim = 0).

    Raises UserError if it knows another number of classes than the images have.
    """
    if network.label_dim == 0:
        return data.unlabelled()
    if network.label_dim != data.classes:
        has = f"have {data.classes} classes: give {data.classes}" if data.classes else "have no labels: give 0"
        or_none = ", or 0 for a model without classes" if data.classes else ""
        raise UserError(f"network.label_dim: {network.label_dim}, but the images ({data.name}) {has}{or_none}")
    return data


def network_of(recipe: Recipe, stage: Stage) -> Network:
    """The recipe's network; where the stage's jumps end anywhere, with an embedding of the second time."""
    return replace(recipe.network, second_time=stage.second_time)


def check_files(stage: Stage) -> None:
    """Raises UserError now, and not after the stages before, if weights that the distance reads are missing."""
    method = stage.method.ctm if isinstance(stage.method, CTMGAN) else stage.method
    if isinstance(method, CT | CD | ContinuousCT | ContinuousCD | CTM) and isinstance(method.distance, LPIPS):
        method.distance.check()


def check_chain(recipe: Recipe) -> None:
    """A stage takes over the weights of the one before, which mean something else under another sigma_data."""
    stages = list(recipe.stages.items())
    for (before, source), (name, stage) in zip(stages[:-1], stages[1:], strict=True):
        ours, theirs = stage.precond.sigma_data, source.precond.sigma_data
        if ours != theirs:
            raise UserError(
                f"{name}.precond.sigma_data: {ours:g}, but {before}, from which it starts, has {theirs:g}; "
                "give both the same"
            )
