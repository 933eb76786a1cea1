"""Whether a recipe and a set of images fit each other, found out before anything is trained."""

from dataclasses import replace

from onejump.config import Network, Recipe, Stage
from onejump.data.text_set import TextSet
from onejump.data.training_set import TrainingSet
from onejump.lpips import LPIPS
from onejump.methods.cd import CD
from onejump.methods.continuous import ContinuousCD, ContinuousCT
from onejump.methods.ct import CT
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.networks.text_unet import TextUNetConfig
from onejump.precond import EDM, Precond
from onejump.types import UserError


def images_for(network: Network, data: TrainingSet) -> TrainingSet:
    """The images as this network is trained on them: without their labels if it knows no classes (label_dim = 0).

    Raises UserError if it knows another number of classes than the images have, or if one has to do with text and the
    other has not.
    """
    reads_text, kind = isinstance(network, TextUNetConfig), type(network).__name__
    if isinstance(data, TextSet) and not reads_text:
        told = f"{data.name} holds latents with captions; they are for tcm-sd15 and cd-sd15"
        raise UserError(f"network: {kind} reads no text, and {told}")
    if reads_text and not isinstance(data, TextSet):
        way_out = "onejump data prepare SHARDS OUT --vae STABLE_DIFFUSION makes latents with captions"
        raise UserError(f"network: {kind} reads text, {data.name} is another kind of data; {way_out}")
    if network.label_dim == 0:
        return data.unlabelled()
    if network.label_dim != data.classes:
        has = f"have {data.classes} classes: give {data.classes}" if data.classes else "have no labels: give 0"
        or_none = ", or 0 for a model without classes" if data.classes else ""
        raise UserError(f"network.label_dim: {network.label_dim}, but the images ({data.name}) {has}{or_none}")
    return data


def network_of(recipe: Recipe, stage: Stage) -> Network:
    """The recipe's network; where the stage's jumps end anywhere, with an embedding of the second time."""
    if isinstance(recipe.network, TextUNetConfig):
        return recipe.network
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
        if found := differing(stage.precond, source.precond):
            field, ours, theirs = found
            raise UserError(
                f"{name}.{field}: {ours}, but {before}, from which it starts, has {theirs}; give both the same"
            )


def check_precond(source: str, theirs: Precond, name: str, ours: Precond) -> None:
    """Raises UserError unless weights of the source mean the same in stage `name`."""
    if found := differing(ours, theirs):
        field, own, its = found
        raise UserError(
            f"{source}: its {field} is {its}, but {name}.{field} is {own}; give it the same, or another model"
        )


def differing(ours: Precond, theirs: Precond) -> tuple[str, str, str] | None:
    """(field, our value, theirs), None if both are equal."""
    if ours == theirs:
        return None
    if isinstance(ours, EDM) and isinstance(theirs, EDM):
        return "precond.sigma_data", f"{ours.sigma_data:g}", f"{theirs.sigma_data:g}"
    return "precond", str(ours), str(theirs)
