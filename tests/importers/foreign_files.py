"""Writes files as the field's own tools lay them out: the same opcodes, the same module names.

The modules that such pickles name (torch_utils.persistence, dnnlib.util) exist only while a file is written. They need
not do anything: their names and the arguments are what is written.
"""

import pickle
import sys
import types
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

NOTHING: Mapping = types.MappingProxyType({})
SOURCE = "raise SystemExit('the source in a pickle was run')\n"  # stands for the file that defines the class


class EasyDict(dict):
    """dnnlib's: a dict whose items are attributes too."""

    def __getattr__(self, name: str) -> object:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _reconstruct_persistent_obj(meta: dict) -> None: ...


def persistent_reduce(class_name: str, state: dict, source: str = SOURCE) -> tuple:
    """What torch_utils.persistence tells pickle about an object of a decorated class."""
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return _reconstruct_persistent_obj, (meta,), None


class PersistentObject:
    """An object of a decorated class that is no module: a loss, an augmentation."""

    def __init__(self, class_name: str, init_kwargs: Mapping = NOTHING, source: str = SOURCE, **attributes: object):
        self.state = {"_init_args": (), "_init_kwargs": EasyDict(init_kwargs), **attributes}
        self.class_name, self.source = class_name, source

    def __reduce__(self) -> tuple:
        return persistent_reduce(self.class_name, self.state, self.source)


class PersistentModule(nn.Module):
    """A module of a decorated class."""

    def __init__(self, class_name: str, init_kwargs: Mapping = NOTHING, init_args: tuple = (), source: str = SOURCE):
        super().__init__()
        self._init_args, self._init_kwargs = init_args, EasyDict(init_kwargs)
        self._written = class_name, source

    def __reduce__(self) -> tuple:
        state = {name: value for name, value in vars(self).items() if name != "_written"}
        return persistent_reduce(self._written[0], state, self._written[1])


def network(
    tensors: Mapping[str, Tensor],
    classes: Mapping[str, tuple[str, Mapping]],
    buffers: Collection[str] = (),
    attributes: Mapping[str, Mapping[str, object]] = NOTHING,
    source: str = SOURCE,
) -> PersistentModule:
    """The tree of modules that holds `tensors` under these dotted names; those in `buffers` as buffers.

    classes: dotted name of a module ("" is the whole) -> its class and what it was made with. A module that is not
    listed is of class "Module" if it holds tensors, else torch's ModuleDict. attributes: the same for other attributes.
    """
    holders = {name.rpartition(".")[0] for name in tensors}
    root = PersistentModule(*classes[""], source=source)
    for name, value in tensors.items():
        module, above = root, ""
        *path, leaf = name.split(".")
        for part in path:
            above = f"{above}.{part}" if above else part
            if part not in module._modules:
                plain = above not in holders and above not in classes
                made = classes.get(above, ("Module", {}))
                module.add_module(part, nn.ModuleDict() if plain else PersistentModule(*made, source=source))
            module = module._modules[part]
        if name in buffers:
            module.register_buffer(leaf, value)
        else:
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    for name, values in attributes.items():
        vars(root.get_submodule(name)).update(values)
    return root.eval()


@contextmanager
def nvidia_modules() -> Iterator[None]:
    """torch_utils.persistence and dnnlib.util, as far as pickle needs them to write their names."""
    packages = {
        name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    packages["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    packages["dnnlib.util"].EasyDict = EasyDict
    with (
        mock.patch.dict(sys.modules, packages),
        mock.patch.object(_reconstruct_persistent_obj, "__module__", "torch_utils.persistence"),
        mock.patch.object(EasyDict, "__module__", "dnnlib.util"),
    ):
        yield


def write_pickle(path: Path, value: object, protocol: int = 4) -> Path:
    """As pickle.dump writes it: EDM, EDM2, ECT and TCM snapshots."""
    with nvidia_modules(), path.open("wb") as file:
        pickle.dump(value, file, protocol)
    return path


def write_zip(path: Path, value: object) -> Path:
    """As torch.save writes it since 1.6."""
    with nvidia_modules():
        torch.save(value, path)
    return path


def write_legacy(path: Path, value: object) -> Path:
    """As torch.save wrote it before 1.6."""
    with nvidia_modules():
        torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


KINDS = {f"pickle{protocol}": partial(write_pickle, protocol=protocol) for protocol in range(2, 6)}
KINDS |= {"zip": write_zip, "legacy": write_legacy}
