"""What Analytic-Precond is for: less is left to learn than with CTM's jump, and the bound on what is left."""

import math

import numpy as np
import pytest
import torch
from gaussian_mixture import Mixture, exact_teacher, random_mixture

from onejump.analytic import Estimator, Table, estimate
from onejump.precond import CM, Euler
from onejump.times import karras_grid

GRID = karras_grid(18).flip(0)


def pairs(grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of every t > s of the falling grid."""
    i, j = torch.triu_indices(len(grid), len(grid), 1)
    return i, j


@pytest.fixture(scope="module")
def power_law() -> tuple[Mixture, Table]:
    """Image-like: the spectrum of 64 coordinates falls as a power law, and the mean is not zero."""
    mixture = random_mixture(d=64, k=20, mean=0.2, power=1.0)
    x0 = mixture.sample(1024).float()
    return mixture, estimate(exact_teacher(mixture), x0, None, Estimator(samples=1024, batch=1024))


def trajectories(mixture: Mixture, times: torch.Tensor, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(n, len(mixture.variance), dtype=torch.float64, generator=generator)
    return mixture.flow(mixture.sample(n, seed=5) + times[0] * noise, times)


def denoise_each(mixture: Mixture, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    return torch.stack([mixture.denoise(xt, t.expand(len(xt))) for xt, t in zip(x, times, strict=True)])


def gaps(jump, x, D, times, at_end: bool) -> torch.Tensor:
    """The network that makes every jump exact, minus the teacher at the jump's end or start: [pairs, n, d]."""
    i, j = pairs(times)
    a, b = (c[:, None, None] for c in jump(times[i], times[j]))
    return (x[j] - a * x[i]) / b - D[j if at_end else i]


def test_the_network_has_less_to_learn_than_with_ctms_jump(power_law):
    """The consistency gap, most of all at intermediate jumps; to the data the two jumps are the same."""
    mixture, table = power_law
    x = trajectories(mixture, GRID, 256)
    D = denoise_each(mixture, x, GRID)

    def rms_of_gap(jump, at_end):
        return gaps(jump, x, D, GRID, at_end).square().mean((1, 2)).sqrt()

    ctm, analytic = (rms_of_gap(jump, at_end=True) for jump in (Euler(), table.jump()))
    i, j = pairs(GRID)
    to_data = j == len(GRID) - 1
    near, mid = (j - i <= 3) & ~to_data, (j - i > 3) & ~to_data
    assert analytic.mean() < 0.8 * ctm.mean()
    gain = [(ctm[part] - analytic[part]).mean() for part in (near, mid, to_data)]
    assert gain[1] > 2 * gain[0] > 0 and gain[1] > 10 * gain[2] > 0
    forward = [rms_of_gap(jump, at_end=False).mean() for jump in (table.jump("forward"), Euler())]
    assert forward[0] < 0.6 * forward[1]


def test_the_jump_to_the_data_is_ctms(power_law):
    _, table = power_law
    t, s = GRID[:-1], GRID[-1].expand(17)
    for other in (Euler(), CM()):
        a, b = ((x - y).abs()[t > 0.2].max() for x, y in zip(table.jump()(t, s), other(t, s), strict=True))
        assert a < 0.02 and b < 0.02
    assert table.jump("forward")(t[:1], s[:1])[1] > 2  # why the backward form is the one to use


@pytest.mark.parametrize("form", ["backward", "forward"])
def test_the_gap_stays_below_its_bound(power_law, form):
    """|D* - D| <= ((t/s)^C - 1) / C max |g' - s g| over the jump, C = max |s|, sample by sample."""
    mixture, table = power_law
    lam = torch.linspace(-math.log(80), -math.log(0.002), 17 * 12 + 1, dtype=torch.float64)
    times, coarse = torch.exp(-lam), torch.arange(0, 17 * 12 + 1, 12)
    x = trajectories(mixture, times, 48)
    D = denoise_each(mixture, x, times)
    nodes = np.linspace(lam[0].item(), lam[-1].item(), len(table.l_t))
    l_t, s_t = (torch.from_numpy(np.interp(lam, nodes, y))[:, None, None] for y in (table.l_t, table.s_t))
    g = D - l_t * x
    (g_slope,) = torch.gradient(g, spacing=(lam,), dim=0)
    size = (g_slope - s_t * g).norm(dim=2)
    gap = gaps(table.jump(form), x[coarse], D[coarse], times[coarse], form == "backward").norm(dim=2)
    for k, (i, j) in enumerate(zip(*(coarse[p] for p in pairs(coarse)), strict=True)):
        C, ratio = s_t[i : j + 1].abs().max(), times[i] / times[j]
        bound = (ratio**C - 1) / C * size[i : j + 1].max(0).values
        assert (gap[k] <= bound * 1.01 + 5e-4 * 8).all()  # norms of 64 coordinates
