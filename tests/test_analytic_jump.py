import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from gaussian_mixture import single

from onejump.analytic_jump import Analytic, Gaussian
from onejump.model import per_sample
from onejump.precond import Euler
from onejump.times import karras_grid
from onejump.types import UserError

FORMS = ("backward", "forward")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(n: int = 18) -> tuple[torch.Tensor, torch.Tensor]:
    """Every t >= s of the Karras grid."""
    grid = karras_grid(n).flip(0)
    i, j = torch.triu_indices(n, n)
    return grid[i], grid[j]


def gaussian_table(cells: int, form: str = "backward", std: float = 0.5) -> Analytic:
    t2 = 80.0**2 * torch.exp(-2 * torch.linspace(0, math.log(80 / 0.002), cells + 1, dtype=torch.float64))
    l_t = std**2 / (std**2 + t2)
    return Analytic(tuple(l_t.tolist()), tuple((-2 * l_t).tolist()), form=form)


def random_table(cells: int, form: str = "backward", seed: int = 0) -> Analytic:
    generator = torch.Generator().manual_seed(seed)
    l_t, s_t = torch.rand(2, cells + 1, dtype=torch.float64, generator=generator)
    return Analytic(tuple(l_t.tolist()), tuple((4 * s_t - 3).tolist()), form=form)


def error(jump, other, t, s) -> float:
    return max((x - y).abs().max().item() for x, y in zip(jump(t, s), other(t, s), strict=True))


ALL = [*(random_table(9, form) for form in FORMS), *(Gaussian(form=form) for form in FORMS)]


@pytest.mark.parametrize("jump", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_jump_to_where_it_starts_is_exactly_the_identity(jump, dtype):
    t = torch.cat([torch.logspace(-4, 3, 997, dtype=torch.float64), karras_grid(40), torch.zeros(1)]).to(dtype)
    a, b = jump(t, t.clone())
    assert a.dtype == b.dtype == dtype
    assert torch.equal(a, torch.ones_like(t)) and torch.equal(b, torch.zeros_like(t))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("constants", [(0.0, 0.0), (1.0, -1.0)])
def test_ctm_is_a_special_case(form, constants):
    l_t, s_t = ((value,) * 61 for value in constants)
    assert error(Analytic(l_t, s_t, form=form), Euler(), *pairs()) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_a_small_jump_is_a_step_of_the_ode_also_between_nodes(form):
    table, t = random_table(40, form), torch.logspace(math.log10(0.003), math.log10(79), 999, dtype=torch.float64)
    for h in (1e-3, 1e-4):
        a, b = table(t, t * math.exp(-h))
        torch.testing.assert_close((a - 1) / h, -torch.ones_like(t), rtol=0, atol=5 * h)
        torch.testing.assert_close(b / h, torch.ones_like(t), rtol=0, atol=5 * h)


def test_gaussian_vectors():
    t, s = f64(80, 5, 1, 0.3), f64(1, 0.5, 0.002, 0.1)
    a, b = Gaussian()(t, s)
    torch.testing.assert_close(a, f64(0.0112114579, 0.0756849274, 0.0000129441, 0.2113209942), rtol=0, atol=1e-10)
    torch.testing.assert_close(b, f64(0.9887885421, 0.9243150726, 0.9999870559, 0.7886790058), rtol=0, atol=1e-10)
    a, b = Gaussian(form="forward")(t, s)
    torch.testing.assert_close(a, f64(0.0139366353, 0.1321267040, 0.3090214665, 0.5257930550), rtol=0, atol=1e-10)
    torch.testing.assert_close(b, f64(0.9860633647, 0.8678732960, 0.6909785335, 0.4742069450), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_a_table_approaches_the_closed_form_with_order_two(form):
    errors = [error(gaussian_table(cells, form), Gaussian(form=form), *pairs()) for cells in (120, 480, 1920)]
    assert errors[0] < 7e-4
    assert all(14 < coarse / fine < 21 for coarse, fine in zip(errors, errors[1:], strict=False)), errors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mean", [0.7, 0.0])
def test_on_gaussian_data_the_jump_is_exact(form, mean):
    """Forward with the denoiser at the start, backward with the denoiser at the end."""
    mixture, (t, s) = single(mean, 0.3), pairs()
    xt = mean + torch.linspace(-2, 2, 4, dtype=torch.float64) * (0.3**2 + t[:, None] ** 2).sqrt()
    xs = mean + (xt - mean) * ((0.3**2 + s**2) / (0.3**2 + t**2)).sqrt()[:, None]
    D = mixture.denoise(xt, t) if form == "forward" else mixture.denoise(xs, s)
    for jump, atol in ((Gaussian(0.3, form=form), 1e-9), (gaussian_table(1920, form, 0.3), 2e-4)):
        a, b = jump(t, s)
        torch.testing.assert_close(per_sample(a, xt) * xt + per_sample(b, xt) * D, xs, rtol=0, atol=atol)


def test_the_gaussian_mixture_flow_is_exact_on_gaussian_data():
    times, x = karras_grid(18).flip(0), torch.linspace(-90, 90, 4, dtype=torch.float64)[None]
    expected = 0.2 + (x - 0.2) * ((0.3**2 + times**2) / (0.3**2 + times[0] ** 2)).sqrt()[:, None]
    torch.testing.assert_close(single(0.2, 0.3).flow(x, times)[:, 0], expected, rtol=1e-5, atol=1e-6)


def states_where_h_is_constant(table: Analytic, x: float, h: float, per_cell: int = 100):
    """t, l, s, S and x at even steps of ln t: dx/dlambda = -(1 - l) x + S h, by RK4 that meets the nodes."""
    cells = len(table.l_t) - 1
    fine = np.linspace(0, cells, 2 * cells * per_cell + 1)
    l_t, s_t = (np.interp(fine, np.arange(cells + 1), values) for values in (table.l_t, table.s_t))
    half = table.cell / per_cell / 2
    log_S = np.concatenate([[0], np.cumsum((s_t[1:] + s_t[:-1]) / 2 * half)])
    source, states = np.exp(log_S) * h, [x]
    for i in range(0, len(fine) - 1, 2):
        k1 = -(1 - l_t[i]) * x + source[i]
        k2 = -(1 - l_t[i + 1]) * (x + half * k1) + source[i + 1]
        k3 = -(1 - l_t[i + 1]) * (x + half * k2) + source[i + 1]
        k4 = -(1 - l_t[i + 2]) * (x + 2 * half * k3) + source[i + 2]
        x += half / 3 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(x)
    t = table.sigma_max * np.exp(-fine * table.cell)
    return (torch.from_numpy(values) for values in (t[::2], l_t[::2], source[::2], np.array(states)))


@pytest.mark.parametrize("form", FORMS)
def test_a_jump_is_exact_where_what_it_freezes_is_constant(form):
    """For any l and s, also between the nodes: the definition of the generalised ODE."""
    table = random_table(40, form, seed=1)
    t, l_t, source, x = states_where_h_is_constant(table, 3.0, -1.3)
    chosen = torch.arange(0, len(t), 123)
    i, j = (chosen[k] for k in torch.triu_indices(len(chosen), len(chosen)))
    D = (l_t * x + source)[i if form == "forward" else j]
    a, b = table(t[i], t[j])
    torch.testing.assert_close(a * x[i] + b * D, x[j], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_coefficients_are_continuous_at_the_nodes(form):
    table = random_table(9, form)
    nodes = 80 * torch.exp(-table.cell * torch.arange(1, 9, dtype=torch.float64))
    low, high = torch.full_like(nodes, 0.003), torch.full_like(nodes, 70.0)
    for t, s in ((nodes, low), (high, nodes)):
        above = table(t * (1 + 1e-11 * (t < 70)), s * (1 + 1e-11))
        below = table(t * (1 - 1e-11 * (t < 70)), s * (1 - 1e-11))
        torch.testing.assert_close(above, below, rtol=1e-9, atol=1e-9)


def test_times_outside_the_table_count_as_its_ends():
    table = random_table(9)
    outside, ends = table(f64(200, 80, 1000), f64(1, 0.0, 90)), table(f64(80, 80, 80), f64(1, 0.002, 80))
    torch.testing.assert_close(outside, ends, rtol=0, atol=0)


def test_half_precision_is_rounded_only_at_the_end():
    table, (t, s) = gaussian_table(120), (karras_grid(18)[1:].half(), karras_grid(18)[:-1].half())
    exact = table(t.double(), s.double())
    torch.testing.assert_close(table(t, s), tuple(x.half() for x in exact), rtol=0, atol=0)


def test_a_call_never_waits_for_the_device():
    """Nothing can be read from a tensor on the meta device."""
    for jump in ALL:
        a, _ = jump(torch.empty(3, device="meta"), torch.empty(3, device="meta"))
        assert a.device.type == "meta"


def test_a_table_first_used_in_inference_mode_still_trains():
    table = random_table(7, seed=3)
    with torch.inference_mode():
        table(f64(3), f64(1))
    D = f64(2).requires_grad_()
    a, b = table(f64(3), f64(1))
    (a + b * D).sum().backward()
    assert torch.equal(D.grad, b)


@pytest.mark.parametrize("jump", ALL, ids=str)
def test_the_fields_make_the_same_jump_again(jump):
    fields = json.loads(json.dumps(asdict(jump)))
    again = type(jump)(**{name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()})
    assert again == jump and hash(again) == hash(jump)
    assert error(jump, again, *pairs()) == 0


GOOD = random_table(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l_t": (), "s_t": ()}, "l_t, s_t: 0 and 0 values"),
        ({"l_t": (0.5,), "s_t": (0.0,)}, "2 or more"),
        ({"l_t": (0.5, 0.6)}, "2 and 5 values"),
        ({"l_t": (0.5, math.nan, 0.5, 0.5, 0.5)}, "l_t: nan"),
        ({"l_t": (0.5, 1.1, 0.5, 0.5, 0.5)}, "l_t: 1.1; 0 or more and 1 or less"),
        ({"s_t": (0.5, 0.5, 0.5, 0.5, math.inf)}, "s_t: inf"),
        ({"s_t": (-120.0, 0.5, 0.5, 0.5, 0.5)}, "S_t would span"),
        ({"sigma_min": 0.0}, "sigma_min: 0"),
        ({"sigma_min": 90.0}, "sigma_min: 90"),
        ({"sigma_max": math.nan}, "sigma_max: nan"),
    ],
)
def test_a_table_of_no_use_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as refused:
        replace(GOOD, **changes)
    assert "\n" not in str(refused.value)


def test_a_table_for_another_range_is_refused():
    GOOD.check_times(0.002, 80.0)
    GOOD.check_times(0.01, 10.0)
    for low, high in ((0.001, 80.0), (0.002, 100.0), (0.0, 80.0)):
        with pytest.raises(UserError, match=f"another sigma range, 0.002 to 80, .* {low:g} to {high:g} .* estimate"):
            GOOD.check_times(low, high)


@pytest.mark.parametrize("changes", [{"std": 0.0}, {"sigma_min": 0.0}, {"std": math.inf}])
def test_a_gaussian_jump_of_no_use_is_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        Gaussian(**changes)
