"""What is known of a teacher's l_t and s_t, how it was estimated, and the file that it is kept in."""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from onejump.analytic_jump import Analytic, Form
from onejump.times import check_range
from onejump.types import UserError

FORMAT = 1


@dataclass(frozen=True)
class Estimator:
    """How the statistics are estimated: at times + 1 times even in ln t, from `samples` training images.

    trace: of dF/dx by one random probe an image ("hutchinson"), by d of them ("exact", for small d), or by central
    differences along the probe for networks without forward-mode derivatives.
    slope: g' by a derivative along the ODE ("jvp"), or s = d ln rms(g) / dlambda, which needs no derivative ("rms").
    batch: images at once; it changes the memory and the last digits only.
    """

    times: int = 120
    samples: int = 4096
    trace: Literal["hutchinson", "exact", "finite_difference"] = "hutchinson"
    slope: Literal["jvp", "rms"] = "jvp"
    seed: int = 0
    batch: int = 256
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_range(at_least=2, times=self.times)
        check_range(at_least=1, samples=self.samples, batch=self.batch)
        check_range(at_least=0, seed=self.seed)
        check_range(above=0, sigma_max=self.sigma_max)
        check_range(above=0, below=self.sigma_max, sigma_min=self.sigma_min)

    @property
    def cell(self) -> float:
        """The distance of two times in lambda = -ln t."""
        return math.log(self.sigma_max / self.sigma_min) / self.times

    @property
    def t(self) -> list[float]:
        """The times + 1 times, from sigma_max down to sigma_min."""
        inner = [self.sigma_max * math.exp(-i * self.cell) for i in range(1, self.times)]
        return [self.sigma_max, *inner, self.sigma_min]


@dataclass(frozen=True)
class Table:
    """l_t, s_t and the root mean square of g a coordinate, at the estimator's times; whose they are and what they cost.

    teacher: sha256 of its weights. network_passes: images through the network; a derivative (JVP) counts as 2.
    """

    l_t: tuple[float, ...]
    s_t: tuple[float, ...]
    rms: tuple[float, ...]
    estimator: Estimator
    teacher: str
    data: str
    data_fingerprint: str
    seconds: float
    network_passes: int

    def __post_init__(self) -> None:
        lengths = {len(self.l_t), len(self.s_t), len(self.rms)}
        if lengths != {self.estimator.times + 1}:
            raise UserError(f"l_t, s_t, rms: {self.estimator.times + 1} values of each are needed, not {lengths}")
        self.jump()

    def jump(self, form: Form = "backward") -> Analytic:
        return Analytic(
            self.l_t, self.s_t, self.estimator.sigma_min, self.estimator.sigma_max, form=form, teacher=self.teacher
        )


def save_table(path: Path, table: Table) -> None:
    """One JSON file, from which every float comes back to the bit. Raises UserError if it cannot be written."""
    write_sealed(path, {"format": FORMAT, **asdict(table)})


def load_table(path: Path) -> Table:
    """The table that save_table wrote. Raises UserError for a missing, damaged, changed or foreign file."""
    try:
        content = read_sealed(path)
        if content.pop("format") != FORMAT:
            raise ValueError("a later format; use a newer onejump")
        estimator = Estimator(**content.pop("estimator"))
        l_t, s_t, rms = (tuple(map(float, content.pop(name))) for name in ("l_t", "s_t", "rms"))
        return Table(l_t, s_t, rms, estimator, **content)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such table; make one with `onejump precond MODEL --out {path}`") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        reason = f"it has no {error}" if isinstance(error, KeyError) else reason
        raise UserError(
            f"{path}: no table of a teacher's statistics can be read ({reason}); estimate it again"
        ) from error


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """JSON with its own checksum, whole or not at all, also if the power is cut."""
    draft = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "w") as file:
            json.dump({**content, "sha256": _sha256(content)}, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise UserError(f"{path}: could not write ({error.strerror}); free space or make it writable") from error


def read_sealed(path: Path) -> dict[str, Any]:
    """What write_sealed wrote. Raises OSError, ValueError, KeyError, TypeError or AttributeError if it cannot."""
    content = json.loads(path.read_bytes())
    if content.pop("sha256") != _sha256(content):
        raise ValueError("its checksum is wrong: it was cut or changed")
    return content


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
