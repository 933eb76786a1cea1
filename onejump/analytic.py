"""The teacher's statistics l_t and s_t that Analytic-Precond's jump is made of (Zheng et al. 2025), and their file.

    l_t = E tr(dD/dx) / d,   s_t = E<g, g'> / E|g|^2,   g = D(x_t, t) - l_t x_t,   g' along the teacher's ODE

over noised training images x_t, with the label of each, in lambda = -ln t. With D = c_skip x + c_out F both are taken
from the network F, without the cancellation that leaves nothing of g at small t (there D is almost x):

    l = c_skip + c_out tau,    tau = E tr(dF/dx) / d
    g = c_out G,               G = F - tau x,   G' = F' - tau' x - tau (D - x)
    s = E<G, G'> / E|G|^2 - c_skip,             since d ln c_out / dlambda = -c_skip
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from onejump.analytic_jump import Form, check_form
from onejump.analytic_table import FORMAT, Estimator, Table, load_table, read_sealed, save_table, write_sealed
from onejump.model import ConsistencyModel, per_sample
from onejump.precond import EDM
from onejump.types import Cond, Samples, Times, UserError

__all__ = ["AnalyticPrecond", "Estimator", "Table", "estimate", "load_table", "save_table"]

STEP = 0.02  # of a finite difference, in units of the noise: D bends over distances of about t
TINY = 1e-5  # a smaller G is the rounding of F, which is of order 1

Network = Callable[[Samples, Times], Samples]


@dataclass(frozen=True)
class AnalyticPrecond:
    """In a recipe: the jump of a teacher's table. table: its file, or "" to estimate it when the stage starts."""

    form: Form = "backward"
    table: str = ""
    estimator: Estimator = field(default_factory=Estimator)

    def __post_init__(self) -> None:
        check_form(self.form)

    @property
    def sigma_min(self) -> float:
        return self.estimator.sigma_min


def _silent(done: int, total: int) -> None:
    pass


def estimate(
    teacher: ConsistencyModel,
    x0: Samples,
    cond: Cond,
    estimator: Estimator,
    *,
    teacher_sha: str = "",
    data_name: str = "",
    data_fingerprint: str = "",
    partial: Path | None = None,
    progress: Callable[[int, int], None] = _silent,
) -> Table:
    """The table of this teacher, from the estimator.samples images x0 (float32) and their labels, on x0's device.

    All times see the same images, noise and probes: the statistics are smooth in t. partial: a file that keeps the sums
    after every time; from one of the same teacher, data and estimator the work goes on, to the same bits; the caller
    removes it once the table is saved. progress(done, total) counts the times of both parts, trace and slope. The
    teacher runs in its weights' precision. Raises UserError if it is no EDM denoiser in eval mode, or not finite.
    """
    _check(teacher, x0, cond, estimator)
    times = estimator.t
    work = _Work(teacher, x0, cond, estimator, *_noise_and_probes(x0, estimator.seed))
    sums = _Sums(partial, work.fingerprint() if partial else "")

    def rows(name: str, before: int, sums_at: Callable[[int], Tensor]) -> np.ndarray:
        for k in range(len(sums.rows[name]), len(times)):
            sums.add(name, sums_at(k).tolist(), times[k])
            progress(before + k + 1, 2 * len(times))
        return np.array(sums.rows[name]) / x0.numel()

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no forward derivative
        c_skip, c_out = work.scalings()
        trace = rows("trace", 0, lambda k: work.trace(times[k]))[:, 0]
        l_t = np.clip(c_skip + c_out * trace, 0, 1)
        tau = (l_t - c_skip) / c_out
        of_time = np.stack([c_skip, c_out, tau, np.gradient(tau, estimator.cell, edge_order=2)], 1)
        GG = rows("slope", len(times), lambda k: work.slope(times[k], *of_time[k].tolist()))
    l_t, s_t, rms = (tuple(v.tolist()) for v in (l_t, _s_t(GG, c_skip, estimator), c_out * np.sqrt(GG[:, 0])))
    passes = _passes(estimator, x0[0].numel()) * len(x0) * len(times)
    return Table(l_t, s_t, rms, estimator, teacher_sha, data_name, data_fingerprint, sums.seconds, passes)


def _passes(estimator: Estimator, d: int) -> int:
    """Through the network, for one image at one time; a derivative counts as two."""
    trace = {"hutchinson": 2, "exact": 2 * d, "finite_difference": 2}
    return trace[estimator.trace] + {"jvp": 3, "rms": 1}[estimator.slope]


def _noise_and_probes(x0: Samples, seed: int) -> tuple[Samples, Samples]:
    """Gaussian, and +-1; drawn on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(x0.shape, generator=generator)
    return z.to(x0), (2 * torch.randint(2, x0.shape, generator=generator) - 1).to(x0)


def _check(teacher: ConsistencyModel, x0: Samples, cond: Cond, estimator: Estimator) -> None:
    if not isinstance(teacher.precond, EDM) or teacher.second_time or teacher.training:
        raise UserError(
            "teacher: an EDM denoiser of one time, in eval mode, is needed for Analytic-Precond's statistics"
        )
    if len(x0) != estimator.samples or (cond is not None and len(cond) != len(x0)):
        labels = "" if cond is None else f", {len(cond)} labels"
        raise UserError(
            f"samples: {estimator.samples} asked for, but {len(x0)} images{labels} given; use as many of each"
        )


def _s_t(GG: np.ndarray, c_skip: np.ndarray, estimator: Estimator) -> np.ndarray:
    """s_t from the means of G^2 and G G'; 0 where G vanishes, as for Gaussian data around 0."""
    floor = np.maximum(GG[:, 0], TINY**2)
    slope = (
        GG[:, 1] / floor if estimator.slope == "jvp" else np.gradient(np.log(floor) / 2, estimator.cell, edge_order=2)
    )
    return np.where(GG[:, 0] > TINY**2, slope - c_skip, 0.0)


@dataclass(frozen=True)
class _Work:
    """What every time sees, and the sums over all images at one time."""

    teacher: ConsistencyModel
    x0: Samples
    cond: Cond
    estimator: Estimator
    z: Samples
    v: Samples

    def scalings(self) -> tuple[np.ndarray, np.ndarray]:
        """c_skip and c_out at every time, float64."""
        c_skip, c_out, _, _ = self.teacher.precond(torch.tensor(self.estimator.t, dtype=torch.float64))
        return c_skip.numpy(), c_out.numpy()

    def batches(self, t: float) -> Iterator[tuple[Network, Samples, Times, Samples]]:
        """F as a function of the noisy image and its time, x_t, t and the probes."""
        for first in range(0, len(self.x0), self.estimator.batch):
            rows = slice(first, first + self.estimator.batch)
            cond, xt = None if self.cond is None else self.cond[rows], self.x0[rows] + t * self.z[rows]

            def F(x: Samples, t: Times, cond: Cond = cond) -> Samples:
                _, _, c_in, c_noise = self.teacher.precond(t)
                return self.teacher.net(per_sample(c_in, x) * x, c_noise, None, cond, None)

            yield F, xt, xt.new_full((len(xt),), t), self.v[rows]

    def trace(self, t: float) -> Tensor:
        """[sum of tr(dF/dx)], float64."""
        total = self.x0.new_zeros(1, dtype=torch.float64)
        for F, x, times, v in self.batches(t):
            if self.estimator.trace == "finite_difference":
                e = STEP * t
                Jv = (F(x + e * v, times) - F(x - e * v, times)) / (2 * e)
                total += (v * Jv).sum(dtype=torch.float64)
                continue
            for probe in _units(v) if self.estimator.trace == "exact" else [v]:
                Jv = jvp(F, (x, times), (probe, torch.zeros_like(times)))[1]
                total += (probe * Jv).sum(dtype=torch.float64)
        return total

    def slope(self, t: float, c_skip: float, c_out: float, tau: float, tau_slope: float) -> Tensor:
        """[sum of |G|^2, sum of <G, G'>], float64; the second only if it is asked for."""
        total = self.x0.new_zeros(2, dtype=torch.float64)
        for F, x, times, _ in self.batches(t):
            out = F(x, times)
            G = (out - tau * x).double()
            total[0] += (G * G).sum()
            if self.estimator.slope == "jvp":
                to_data = c_out * out - (1 - c_skip) * x  # D - x
                F_slope = jvp(F, (x, times), (to_data, -times))[1]
                G_slope = F_slope - tau_slope * x - tau * to_data
                total[1] += (G * G_slope.double()).sum()
        return total

    def fingerprint(self) -> str:
        """sha256 of all that the sums depend on: the estimator, the weights, the images and their labels."""
        digest = hashlib.sha256(repr((FORMAT, self.estimator, self.teacher.precond)).encode())
        for tensor in (*self.teacher.net.state_dict().values(), self.x0, self.cond):
            if tensor is not None:
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def _units(v: Samples) -> Iterator[Samples]:
    """One probe a coordinate."""
    for i in range(v[0].numel()):
        unit = torch.zeros_like(v)
        unit.flatten(1)[:, i] = 1
        yield unit


class _Sums:
    """The sums of the times that are done, on disk after each."""

    def __init__(self, path: Path | None, fingerprint: str):
        self.path, self.fingerprint, self.began = path, fingerprint, time.perf_counter()
        self.rows: dict[str, list[list[float]]] = {"trace": [], "slope": []}
        self.before = 0.0
        try:
            kept = read_sealed(path) if path else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # none yet, or damaged
        if kept.get("fingerprint") == fingerprint:
            self.rows, self.before = kept["rows"], kept["seconds"]

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def add(self, name: str, row: list[float], t: float) -> None:
        if not all(map(math.isfinite, row)):
            if self.path:
                self.path.unlink(missing_ok=True)
            raise UserError(f"teacher: its output at t = {t:.6g} is not finite; use a checkpoint that samples well")
        self.rows[name].append(row)
        if self.path:
            write_sealed(self.path, {"fingerprint": self.fingerprint, "rows": self.rows, "seconds": self.seconds})
