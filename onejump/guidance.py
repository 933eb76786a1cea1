"""Guided diffusion models: what a sample gains from its label, or from a better network, is taken more than once.

    D = D_0 + scale (D_1 - D_0)

With c_skip, c_out, c_in and c_noise the same in both, D_0 and D_1 differ in F alone, and guiding F is guiding D. So a
guided model is a ConsistencyModel like any other, around a network that holds the guided one: solvers, samplers,
methods and Analytic-Precond take it as a teacher, and learn what guidance makes of it.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onejump.data.augment import Seeded
from onejump.model import ConsistencyModel, beside
from onejump.precond import ToData
from onejump.samplers import ODE
from onejump.saved import SavedModel, load_model, model_sha256
from onejump.times import check_range
from onejump.types import Cond, DropoutKey, Samples, Times, UserError

NO_LABEL = -1  # a class that there is not: networks read it as "no label"


def unlabelled(cond: Tensor, classes: int | None = None) -> Tensor:
    """cond without its labels: class numbers become NO_LABEL, vectors [b, d] lose their first `classes` numbers.

    The rest of a vector says how an image was augmented, and stays. classes None: there is no rest.
    """
    if not cond.is_floating_point():
        return torch.full_like(cond, NO_LABEL)
    without = cond.clone()
    without[:, :classes] = 0
    return without


def drop_labels(cond: Tensor, share: float, draws: Seeded) -> Tensor:
    """Class numbers of which about this share, drawn one by one, has become NO_LABEL."""
    return torch.where(beside(draws.uniform(len(cond)) < share, cond), NO_LABEL, cond)


class GuidedNet(nn.Module):
    """F_0 + scale (F_1 - F_0), where 1 is told of cond, and 0 of `null` or of nothing, in one call of twice the batch.

    null: what the network is given instead of a sample's cond (such as the empty prompt's embedding, [tokens, width]);
    None: no label.
    """

    passes = 2  # of networks, in a call

    def __init__(self, net: nn.Module, scale: float, null: Tensor | None = None, classes: int | None = None):
        super().__init__()
        self.net, self.scale, self.classes = net, scale, classes
        self.null: Tensor | None
        self.register_buffer("null", null, persistent=False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts."""
        return _blocks(self.net)

    def forward(
        self, x: Samples, c_noise: Times, c_noise_s: Times | None = None, cond: Cond = None, key: DropoutKey = None
    ) -> Samples:
        """Raises UserError without cond."""
        if cond is None:
            raise UserError("cond: guidance compares with and without labels or text, and got neither; pass them")
        null = unlabelled(cond, self.classes) if self.null is None else self.null.to(cond).expand_as(cond)
        s, keys = (None if v is None else torch.cat([v, v]) for v in (c_noise_s, key))
        F = self.net(torch.cat([x, x]), torch.cat([c_noise, c_noise]), s, torch.cat([null, cond]), keys)
        F_0, F_1 = F.to(x.dtype).chunk(2)
        return F_0 + self.scale * (F_1 - F_0)


class AutoGuidedNet(nn.Module):
    """F_0 + scale (F_1 - F_0), where 1 is `net` and 0 is `guide`, which is told of cond too if it reads any."""

    passes = 2

    def __init__(self, net: nn.Module, guide: nn.Module, scale: float, guide_reads: bool = True):
        super().__init__()
        self.net, self.guide, self.scale, self.guide_reads = net, guide, scale, guide_reads

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts of both."""
        return [*_blocks(self.net), *_blocks(self.guide)]

    def forward(
        self, x: Samples, c_noise: Times, c_noise_s: Times | None = None, cond: Cond = None, key: DropoutKey = None
    ) -> Samples:
        F_1 = self.net(x, c_noise, c_noise_s, cond, key).to(x.dtype)
        F_0 = self.guide(x, c_noise, c_noise_s, cond if self.guide_reads else None, key).to(x.dtype)
        return F_0 + self.scale * (F_1 - F_0)


def _blocks(net: nn.Module) -> list[nn.Module]:
    return list(getattr(net, "blocks", [net]))


def guided(
    model: ConsistencyModel, scale: float, null: Tensor | None = None, classes: int | None = None
) -> ConsistencyModel:
    """Classifier-free guidance (Ho & Salimans 2022): D(x, t, null) + scale (D(x, t, cond) - D(x, t, null)).

    scale 1 is the model itself, 0 the one without labels. It shares the model's weights, its mode and its precision.
    null and classes: see GuidedNet, unlabelled. The model must have learnt what it does without labels
    (Stage.label_dropout). Raises UserError unless it is a diffusion model.
    """
    return _around(model, GuidedNet(model.net, _checked(scale), null, classes))


def autoguided(
    model: ConsistencyModel, guide: ConsistencyModel, scale: float, guide_reads: bool = True
) -> ConsistencyModel:
    """Autoguidance (Karras et al. 2024b, "Guiding a Diffusion Model with a Bad Version of Itself").

    D_guide + scale (D_model - D_guide), where the guide is a smaller or less trained model of the same images. One
    without classes (guide_reads=False) makes this EDM2's classifier-free guidance. Raises UserError unless both are
    diffusion models with one preconditioning.
    """
    _refuse_consistency(guide)
    if guide.precond != model.precond:
        raise UserError(f"guide: its precond is {guide.precond}, the model's {model.precond}; give one with the same")
    return _around(model, AutoGuidedNet(model.net, guide.net, _checked(scale), guide_reads))


def _around(model: ConsistencyModel, net: nn.Module) -> ConsistencyModel:
    _refuse_consistency(model)
    made = ConsistencyModel(net, model.precond, model.jump)
    made.autocast = model.autocast
    return made.train(model.training)


def _refuse_consistency(model: ConsistencyModel) -> None:
    if not isinstance(model.jump, ToData) or model.t_min or model.second_time:
        raise UserError("guidance: this is a consistency model, and diffusion models alone are guided; leave it out")


def _checked(scale: float) -> float:
    check_range(at_least=0, guidance=scale)
    return scale


def guide_of(
    saved: SavedModel, path: str | Path, scale: float, guide: str | Path | None = None, null: Tensor | None = None
) -> SavedModel:
    """A model file with guidance: by the model in the file `guide`, else by its own labels; scale 1 leaves it as it is.

    null: for models that read text, the empty prompt's embedding. On the model's device. Raises UserError with the
    name of the file that will not do.
    """
    if scale == 1:
        return saved
    if not isinstance(saved.sampler, ODE):
        raise UserError(f"{path}: a consistency model, and diffusion models alone are guided; leave --guidance out")
    if guide is not None:
        return replace(saved, model=_by_file(saved, scale, guide))
    if not saved.network.label_dim and null is None:
        raise UserError(f"{path}: it knows no classes to guide by; leave --guidance out, or give --guide MODEL")
    return replace(saved, model=guided(saved.model, scale, null, saved.network.label_dim or None))


def _by_file(saved: SavedModel, scale: float, guide: str | Path) -> ConsistencyModel:
    other = load_model(guide)
    if not isinstance(other.sampler, ODE):
        raise UserError(f"--guide {guide}: a consistency model; diffusion models alone guide")
    if other.shape != saved.shape:
        theirs, ours = ("x".join(map(str, shape)) for shape in (other.shape, saved.shape))
        raise UserError(f"--guide {guide}: it makes images of {theirs}, the model {ours}; give one of the same")
    known, wanted = other.network.label_dim, saved.network.label_dim
    if known not in (0, wanted):
        raise UserError(f"--guide {guide}: it knows {known} classes, the model {wanted}; give one of the same, or none")
    other.model.to(next(saved.model.parameters()).device)
    try:
        return autoguided(saved.model, other.model, scale, guide_reads=known == wanted)
    except UserError as error:
        raise UserError(f"--guide {guide}: {error}") from error


def guided_sha256(sha256: str, scale: float, guide: str | Path | None = None) -> str:
    """What tells a teacher with guidance from others: of its weights, the scale and the guide's weights."""
    if scale == 1:
        return sha256
    told = f"{sha256} {scale!r} {model_sha256(Path(guide)) if guide is not None else ''}"
    return hashlib.sha256(told.encode()).hexdigest()
