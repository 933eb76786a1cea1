"""What an importer hands over, the account of a file's tensors that all of them give, and how it becomes a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onejump.config import Network, OneJump
from onejump.importers.inert import printable
from onejump.importers.module_record import ModuleRecord
from onejump.importers.use import Known, Use
from onejump.model import ConsistencyModel
from onejump.networks.layers import empty_network
from onejump.networks.song_unet import SongUNetConfig
from onejump.networks.unet_parts import smoothing
from onejump.precond import EDM
from onejump.samplers import Sampler
from onejump.saved import SavedModel, save_model
from onejump.types import UserError

MAX_DEPTH, MAX_NAME, MAX_NAMES = 50, 1000, 10_000  # of what is looked into for tensors to name


@dataclass(frozen=True)
class Imported:
    """A checkpoint of somebody else's, understood.

    weights: by our network's names. dropped: name in the file -> why it is not needed. ema: which average of the
    weights of training, licence: of the weights, both "" if nobody states it. facts: what else is known, to be printed.
    undecided: what the file does not say and without which it cannot be used, with the way out; "" if nothing is left
    open, and until then jump, sampler and t_min mean nothing. provenance: what it says itself of where it came from.
    """

    kind: str
    network: Network
    weights: Mapping[str, Tensor]
    dropped: dict[str, str]
    jump: OneJump
    precond: EDM
    sampler: Sampler
    t_min: float
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] = ()
    licence: str = ""
    ema: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    undecided: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in empty_network(self.network).parameters())

    def as_saved(self, provenance: dict[str, Any]) -> SavedModel:
        """Our model, its network on the meta device. Raises UserError if something has to be decided first."""
        if self.undecided:
            raise UserError(self.undecided)
        net = empty_network(self.network)
        model = ConsistencyModel(net, self.precond, self.jump, self.t_min, self.network.second_time != "off")
        known = {"kind": self.kind} | provenance | self.facts | self.provenance
        return SavedModel(
            model, self.network, self.sampler, self.shape, self.class_names, known, self.licence, self.ema
        )

    def save(self, out: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Writes our format, tensor by tensor. Raises UserError if it cannot."""
        save_model(out, self.as_saved(provenance or {}), self.weights)


def understood(
    kind: str,
    network: Known,
    weights: Mapping[str, Tensor],
    dropped: dict[str, str],
    use: Use,
    precond: EDM,
    ema: str,
    facts: dict[str, str],
) -> Imported:
    """A U-Net of images of which nobody states a licence or names the classes."""
    return Imported(
        kind=kind,
        network=network,
        weights=weights,
        dropped=dropped,
        jump=use.jump,
        precond=precond,
        sampler=use.sampler,
        t_min=use.t_min,
        shape=shape_of(network),
        class_names=numbered(network.label_dim),
        ema=ema,
        facts=use.facts | facts,
        undecided=use.undecided,
    )


def shape_of(network: Known) -> tuple[int, int, int]:
    """Of an image."""
    return network.img_channels, network.img_resolution, network.img_resolution


@dataclass(frozen=True)
class Made:
    """A tensor of ours as a function of tensors of the file."""

    sources: tuple[Tensor, ...]
    change: Callable[..., Tensor]


class Weights(Mapping[str, Tensor]):
    """Tensors of a file by our names, as float32. What has to change in one is done when it is asked for, and not kept.

    Where nothing has to change it is the view of the file, which may begin at any byte: copy it before calculating.
    """

    def __init__(self, tensors: Mapping[str, Tensor | Made]):
        self.tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        found = self.tensors[name]
        if not isinstance(found, Made):
            return found if found.dtype == torch.float32 else found.clone().float()
        return found.change(*(source.clone() for source in found.sources)).float()

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def outline(self, name: str) -> Tensor:
        """Its shape and kind, without a look at its numbers."""
        found = self.tensors[name]
        return found.change(*(source.to("meta") for source in found.sources)) if isinstance(found, Made) else found


def placed(
    path: Path, tensors: Mapping[str, Tensor], network: Network, ours: Callable[[str], str | None]
) -> dict[str, Tensor]:
    """The file's tensors under the names that `ours` gives them. Raises UserError for those that it has none for."""
    strangers = [name for name in tensors if ours(name) is None]
    if strangers:
        raise UserError(f"{path}: {counted(strangers)} with no place in {type(network).__name__}: {first(strangers)}")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found.setdefault(str(ours(name)), tensor) is not tensor:
            raise UserError(f"{path}: {printable(name)} is a second {ours(name)} of {type(network).__name__}")
    return found


def fitting(path: Path, tensors: Mapping[str, Tensor | Made], network: Network) -> Weights:
    """Exactly the network's tensors. Raises UserError that names the first of those that miss, or do not fit."""
    wanted = {name: tuple(tensor.shape) for name, tensor in empty_network(network).state_dict().items()}
    weights = Weights(tensors)
    what = type(network).__name__
    strangers = [name for name in weights if name not in wanted]
    if strangers:
        raise UserError(f"{path}: {counted(strangers)} with no place in {what}: {first(strangers)}")
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise UserError(f"{path}: {counted(missing)} of {what} missing: {first(missing)}")
    for name, shape in wanted.items():
        found = weights.outline(name)
        if tuple(found.shape) != shape:
            raise UserError(f"{path}: {name} has shape {tuple(found.shape)}, {what} needs {shape}")
        if not found.is_floating_point():
            raise UserError(f"{path}: {name} is {found.dtype}, floating point numbers are needed")
    return weights


def check_filters(path: Path, tensors: Mapping[str, Tensor], network: Network) -> None:
    """The filters of resampling are constants of our networks; others would be silently wrong."""
    expected = network.filter if isinstance(network, SongUNetConfig) else smoothing(1, 1)
    for name, tensor in tensors.items():
        if name.endswith(".resample_filter") and not tensor.is_meta:
            if tensor.shape != expected.shape or not torch.allclose(tensor.clone().float(), expected, atol=1e-4):
                raise UserError(
                    f"{path}: {printable(name)} is another filter than {type(network).__name__} has; only that is known"
                )


def counted(names: Iterable[str]) -> str:
    n = len(list(names))
    return f"{n} tensor{'s' * (n != 1)}"


def first(names: list[str], n: int = 3) -> str:
    """The first few, and that there are more."""
    return ", ".join(map(printable, names[:n])) + (", ..." if len(names) > n else "")


def precision(tensors: Iterable[Tensor]) -> dict[str, str]:
    """A fact, where numbers are not stored as float32."""
    others = sorted({str(t.dtype).removeprefix("torch.") for t in tensors} - {"float32"})
    return {"precision": f"{', '.join(others)} in the file, written as float32"} if others else {}


def numbered(classes: int) -> tuple[str, ...]:
    """Names for classes of which only the number is known."""
    return tuple(map(str, range(classes)))


def tensor_names(value: object, name: str) -> list[str]:
    """Of every tensor inside a value of this name; the value's own name if it holds none. The last stands for the rest,
    where a file has more tensors there than any network."""
    found = _inside(value, name[:MAX_NAME], set())
    names = list(islice(found, MAX_NAMES)) or [name[:MAX_NAME]]
    rest = sum(1 for _ in found)
    return [*names, f"{names[0]} and {rest:,} more"] if rest else names


def _inside(value: object, name: str, seen: set[int]) -> Iterator[str]:
    """A foreign file may hold a thing many times, or inside itself: each is looked into once."""
    if isinstance(value, Tensor):
        yield name
    held = value.attributes if isinstance(value, ModuleRecord) else value
    if not isinstance(held, dict | list | tuple) or id(held) in seen or name.count(".") > MAX_DEPTH:
        return
    seen.add(id(held))
    for key, item in held.items() if isinstance(held, dict) else enumerate(held):
        yield from _inside(item, f"{name}.{str(key)[:MAX_NAME]}"[:MAX_NAME], seen)
