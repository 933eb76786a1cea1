"""A foreign network as data."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from onejump.importers.inert import Budget, printable
from onejump.types import UserError

MAX_MEMBERS, MAX_DEPTH, MAX_NAME = 200_000, 64, 1000  # of a network, as state_dict() walks it


@dataclass(eq=False)
class ModuleRecord:
    """An object of a foreign class: what it was made with and what it holds. Its code is not read."""

    class_name: str
    init_args: tuple = ()
    init_kwargs: dict = field(default_factory=dict)
    attributes: dict = field(default_factory=dict)
    file: str = ""

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer under its dotted name, in torch's order: a module's parameters, its
        buffers, then the modules in it. Raises UserError if this is not a network, or is nested in itself."""
        if not isinstance(self.attributes.get("_modules"), dict):
            raise UserError(f"{self.file}: {printable(self.class_name)} is not a network: it holds no modules")
        budget, found = Budget(self.file, 0, MAX_MEMBERS), {}
        for prefix, module in self._modules("", (), budget):
            for name, value in module._tensors(budget):
                if len(prefix) + len(name) > MAX_NAME:
                    raise UserError(f"{self.file}: a tensor's name of more than {MAX_NAME} letters")
                found[prefix + name] = value
        return found

    def _modules(self, prefix: str, above: tuple, budget: Budget) -> "Iterator[tuple[str, ModuleRecord]]":
        """This module and all in it, with the dotted prefix of their names; `above` are those that hold it."""
        if any(module is self for module in above):
            raise UserError(f"{self.file}: the module {printable(prefix)} is nested in itself")
        if len(above) > MAX_DEPTH or len(prefix) > MAX_NAME:
            raise UserError(f"{self.file}: modules are nested more than {MAX_DEPTH} deep")
        yield prefix, self
        for name, module in self._members("_modules", budget):
            if isinstance(module, ModuleRecord):
                yield from module._modules(f"{prefix}{name}.", (*above, self), budget)
            elif module is not None:
                raise UserError(f"{self.file}: {printable(prefix + name)} is not a module")

    def _tensors(self, budget: Budget) -> Iterator[tuple[str, Tensor]]:
        passing = self.attributes.get("_non_persistent_buffers_set", set())
        if not isinstance(passing, set | frozenset):
            raise UserError(f"{self.file}: the buffers of {printable(self.class_name)} are not named")
        buffers = [(name, value) for name, value in self._members("_buffers", budget) if name not in passing]
        for name, value in [*self._members("_parameters", budget), *buffers]:
            if isinstance(value, Tensor):
                yield name, value
            elif value is not None:
                raise UserError(f"{self.file}: {printable(name)} is not a tensor")

    def _members(self, group: str, budget: Budget) -> list[tuple[str, object]]:
        members = self.attributes.get(group, {})
        if not isinstance(members, dict) or not all(isinstance(name, str) for name in members):
            raise UserError(f"{self.file}: {group} of {printable(self.class_name)} does not map names")
        budget.spend(steps=len(members) + 1)
        return list(members.items())
