"""What diffusers' scheduler of consistency models says of a model: its jump, and the times of its sampler."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from onejump.config_json import from_json
from onejump.importers.arguments import finite, shown
from onejump.networks.diffusers_config import SCHEDULER, STORED
from onejump.precond import CM, ToData
from onejump.samplers import Multistep
from onejump.types import UserError

MAX_JSON = 2**20  # bytes


def read_json(file: Path) -> dict[str, Any]:
    """An object of a small file. Raises UserError for anything else."""
    try:
        with open(file, "rb") as stream:
            text = stream.read(MAX_JSON + 1)
        content = json.loads(text) if len(text) <= MAX_JSON else None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); a folder that diffusers saved has it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: no JSON ({' '.join(str(error).split())[:100]}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: no JSON object of at most {MAX_JSON:,} bytes; copy it again")
    return content


@dataclass(frozen=True)
class Schedule:
    """CMStochasticIterativeScheduler's fields, with its defaults."""

    num_train_timesteps: int = 40
    sigma_min: float = 0.002  # where jumps end; 0: at the data
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    s_noise: float = 1.0
    rho: float = 7.0
    clip_denoised: bool = True

    @property
    def jump(self) -> CM | ToData:
        return CM(self.sigma_min, self.sigma_data) if self.sigma_min > 0 else ToData()

    def second_time(self) -> float | None:
        """Where the stock pipeline's second of two steps starts, None if it has none above sigma_min."""
        i, last = self.num_train_timesteps // 2, self.num_train_timesteps - 1
        if not 0 < i < last:
            return None
        low, high = (sigma ** (1 / self.rho) for sigma in (self.sigma_min, self.sigma_max))
        return float((high + i / last * (low - high)) ** self.rho)


def read_schedule(file: Path) -> tuple[Schedule, Multistep | None, float]:
    """The scheduler; and where we have written it, the model's own sampler and t'. Raises UserError for any other."""
    content = read_json(file)
    kind = content.get("_class_name")
    if kind != SCHEDULER:
        raise UserError(f"{file}: {kind}; {SCHEDULER} is read, that of consistency models")
    values = {name: value for name, value in content.items() if not name.startswith("_")}
    types = {field.name: field.type for field in fields(Schedule)}
    for name, value in values.items():
        if name not in types:
            raise UserError(f"{file}: {name}={value!r}: no field of {SCHEDULER} that is known here")
        if not isinstance(value, int | float) or types[name] is not float and type(value) is not types[name]:
            raise UserError(f"{file}: {name}={value!r}: a value as diffusers writes it is needed")
        if types[name] is float and finite(value) is None:
            raise UserError(f"{file}: {name}={shown(value)}: a finite number is needed")
    schedule = Schedule(**values)
    for name, ok, why in (
        ("s_noise", schedule.s_noise == 1, "1 is read: noise of the level that the times say"),
        ("sigma_min", 0 <= schedule.sigma_min < schedule.sigma_max, f"0 to sigma_max={schedule.sigma_max:g} is read"),
        ("rho", schedule.rho > 0 or schedule.rho < 0 < schedule.sigma_min, "more than 0 is read"),
        ("sigma_data", schedule.sigma_data > 0, "more than 0 is read"),
    ):
        if not ok:
            raise UserError(f"{file}: {name}={getattr(schedule, name)!r}: {why}")
    try:
        steps = math.isfinite(schedule.second_time() or 0.0)
    except ArithmeticError:
        steps = False
    if not steps:
        raise UserError(f"{file}: rho={schedule.rho!r}: times between sigma_min and sigma_max have to come of it")
    return schedule, *_stored(file, schedule, content.get(STORED))


def _stored(file: Path, schedule: Schedule, stored: Any) -> tuple[Multistep | None, float]:
    if stored is None:
        return None, 0.0
    try:
        sampler, t_min = from_json(stored["sampler"]), float(stored["t_min"])
        if (
            not isinstance(sampler, Multistep)
            or sampler.sigma_max != schedule.sigma_max
            or not 0 <= t_min < sampler.sigma_max
        ):
            raise ValueError("it is not the sampler of this schedule")
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{file}: {STORED} cannot be read ({error}); remove it to read the rest") from error
    return sampler, t_min
