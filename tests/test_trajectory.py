"""Samplers of consistency and trajectory models, and the solvers, against the published codes and exact solutions."""

import math

import pytest
import torch
from distillation_setup import EPS, Is, NoScaling, Replay, exact_cm, exact_ctm, flow, order, shrink, teacher, wavy
from golden_data import f32, golden

from onejump import solvers
from onejump.model import ConsistencyModel
from onejump.precond import Euler, ToData
from onejump.samplers import ODE, Jumps, Multistep, Trajectory, check_jumps, multistep, noise_for, ode, trajectory
from onejump.times import karras_grid
from onejump.types import UserError


def close(found, expected, rtol=1e-5):
    expected = f32(expected)
    assert found.dtype == torch.float32
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= rtol


def descending(n: int) -> list[float]:
    return karras_grid(n).flip(0).tolist()


def test_one_step_equals_the_published_sampler():
    data = golden("cm_losses")
    model = ConsistencyModel(Is(wavy), NoScaling(), ToData())
    close(multistep(model, f32(data["sampler/x_T"])[None] / 80, [80.0]).clamp(-1, 1), data["sampler/onestep"], 1e-6)


@pytest.mark.parametrize(("n", "indices"), [(40, [0, 22, 39]), (151, [0, 62, 150])])
def test_multistep_sampling_equals_the_published_sampler(n, indices):
    """Its noise has the deviation sqrt(t^2 - eps^2): the jumps end at eps and not at 0."""
    data = golden("cm_losses")
    model = ConsistencyModel(Is(wavy), NoScaling(), ToData())
    name, times = f"sampler/multistep_ts{indices}", [descending(n)[i] for i in indices[:-1]]
    noise = torch.stack([f32(data["sampler/x_T"]) / 80, f32(data[f"{name}_noise"])[0]])
    close(trajectory(model, noise, times, [EPS] * 2), data[name], 1e-6)
    close(multistep(model, noise, times), data[name], 1e-5)  # without that subtraction


@pytest.mark.parametrize(("name", "solver"), [("heun", solvers.heun), ("euler", solvers.euler), ("dpm", solvers.dpm2)])
def test_solver_steps_equal_the_published_samplers(name, solver):
    data = golden("cm_losses")
    model = ConsistencyModel(Is(wavy), NoScaling(), ToData())
    x_T, times = f32(data["sampler/x_T"]), descending(8)
    x = ode(model, x_T / 80, times, solver=solver)
    if name == "dpm":  # theirs ends with a step of the same kind to 0, and we with Euler's
        x, denoise = x_T, solvers.denoiser(model, None)
        for t, r in zip(times, [*times[1:], 0.0], strict=True):
            x = solver(denoise, x, torch.full((2,), t), torch.full((2,), r))
    close(x, data[f"sampler/{name}"], 5e-6)


def test_ctm_samplers_equal_the_published_ones():
    """Over t = 80 and a middle time. Theirs end at 0 (exact), or at the gamma rule's end for a next time of 0."""
    data = golden("ctm")
    model = ConsistencyModel(Is(wavy), NoScaling(), Euler(), second_time=True)
    t, first = descending(40)[26], f32(data["sampler/x_T"]) / 80
    noise = torch.stack([first, f32(data["sampler/cm_multistep_draw0_randn_like"])])
    close(trajectory(model, noise, [80.0, t], [t, 0.0]), data["sampler/exact"])
    close(trajectory(model, noise, [80.0, t], [EPS, EPS]), data["sampler/cm_multistep"])
    noise = torch.stack([first, f32(data["sampler/gamma_multistep_noise"])[0]])
    share = math.sqrt(1 - 0.3**2)  # gamma = 0.3
    ends = [share * (next_time - EPS) + EPS for next_time in (t, 0.0)]
    close(trajectory(model, noise, [80.0, t], ends), data["sampler/gamma_multistep"])


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_times_and_ends_of_a_trajectory(gamma, steps):
    sampler = Trajectory(gamma=gamma)
    nodes = descending(steps + 1)
    assert sampler.times(steps) == nodes[:-1] and sampler.draws(steps) == sampler.calls(steps) == steps
    share = math.sqrt(1 - gamma**2)
    expected = [share * (t - EPS) + EPS for t in nodes[1:-1]] + [EPS]
    assert sampler.ends(steps) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 1e-9, 0.3, 1.0])
def test_a_trajectory_of_any_number_of_steps_is_possible(gamma):
    """No end lies above the next time by a rounding; at gamma = 0 they are equal to the last digit."""
    sampler = Trajectory(gamma=gamma)
    for steps in range(1, 200):
        times, ends = sampler.times(steps), sampler.ends(steps)
        check_jumps(times, ends)
        assert gamma > 0 or ends == [*times[1:], EPS]


def test_nodes_of_ctm_in_its_own_figures():
    assert Trajectory().times(2) == pytest.approx([80, 2.5152], rel=1e-4)
    assert Trajectory().times(4) == pytest.approx([80, 17.528, 2.5152, 0.1698], rel=1e-3)


def test_following_the_ode_uses_the_first_noise_alone_and_ends_where_one_jump_does():
    """The exact student's jumps compose, in any number."""
    torch.manual_seed(0)
    noise = torch.randn(7, 3, 5, dtype=torch.float64)
    one = Jumps()(exact_ctm(), noise[:1], 1)
    for steps in (1, 2, 7):
        x = Trajectory()(exact_ctm(), noise[:steps], steps)
        torch.testing.assert_close(x, one, rtol=1e-9, atol=1e-12)
    k = shrink(torch.tensor(80.0, dtype=torch.float64), torch.tensor(EPS, dtype=torch.float64))
    torch.testing.assert_close(one, k * 80 * noise[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("sampler", [Trajectory(gamma=0.5), Trajectory(gamma=1.0), Jumps((80.0, 3.0), (0.7, EPS))])
def test_every_trajectory_keeps_the_law_of_the_data(sampler):
    """An exact student, started from the law of x_T, ends with the data's deviation (and that of the noise at eps)."""
    steps, n = 2, 60_000
    noise = torch.randn(steps, n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise[0] *= math.sqrt(80**2 + 0.25) / 80
    deviation = sampler(exact_ctm(), noise, steps).std()
    assert abs(deviation / math.sqrt(0.25 + EPS**2) - 1) < 4 / math.sqrt(2 * n)


def test_gamma_one_is_consistency_sampling_with_ends_at_eps():
    noise = noise_for(range(4), (5,), steps=3, seed=2)
    sampler = Trajectory(gamma=1.0)
    times = sampler.times(3)
    x = 80 * noise[0]
    for t, eps in zip(times, [*noise[1:], torch.zeros(4, 5)], strict=True):
        x = exact_cm()(x, torch.full((4,), t))
        x = x + math.sqrt(max(([*times, EPS][times.index(t) + 1]) ** 2 - EPS**2, 0)) * eps
    torch.testing.assert_close(sampler(exact_ctm(), noise, 3), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jumps((80.0, 1.0), (2.0, EPS)), "ends at 2 and the next starts at 1; noise can be added, not removed"),
        (lambda: Jumps((80.0,), (80.0,)), "from 80 to 80; a jump ends below its start"),
        (lambda: Jumps((80.0, 1.0), (EPS,)), "end: 1 ends for 2 starts"),
        (lambda: Jumps((), ()), "one for each is needed"),
        (lambda: Jumps()(exact_ctm(), torch.zeros(2, 1, 1), 2), "steps: 2; these are 1 jumps"),
        (lambda: Trajectory(gamma=1.1), "gamma: 1.1; .*1 or less"),
        (lambda: Trajectory(sigma_min=90.0), "sigma_min: 90"),
        (lambda: Trajectory().times(0), "steps: 0; 1 or more"),
        (lambda: Multistep(mid=(1.0, 2.0)), "mid: 1,2; falling times"),
    ],
)
def test_jumps_that_cannot_be_made_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(("solver", "expected"), [(solvers.euler, 1), (solvers.heun, 2), (solvers.dpm2, 2)])
def test_solvers_have_their_order(solver, expected):
    """On the ODE of Gaussian data from t = 2 to 0.1, whose solution is known."""
    denoise, errors = solvers.denoiser(teacher(), None), []
    x_T = torch.tensor([[1.7], [-0.4]], dtype=torch.float64)
    for n in (40, 80, 160):
        x, times = x_T, torch.linspace(2.0, 0.1, n + 1, dtype=torch.float64)[:, None].expand(-1, 2)
        for t, r in zip(times[:-1], times[1:], strict=True):
            x = solver(denoise, x, t, r)
        errors.append((x - flow(None, x_T, times[0], times[-1])).abs().max().item())
    assert all(abs(found - expected) < 0.1 for found in order(errors))


@pytest.mark.parametrize("solver", [solvers.euler, solvers.heun, solvers.dpm2])
def test_the_defaults_of_a_diffusion_model_count_their_network_calls(solver):
    calls = []
    model = ConsistencyModel(Is(lambda x, t: calls.append(t) or wavy(x, t)), NoScaling())
    sampler = ODE(solver=solver)
    x = sampler(model, torch.randn(1, 2, 3), 5)
    assert len(calls) == sampler.calls(5) and sampler.draws(5) == 1 and x.shape == (2, 3)


def test_noise_of_a_jump_is_fresh(monkeypatch):
    """trajectory draws nothing itself: it uses what it is handed, one row a jump."""
    Replay(monkeypatch).noise(torch.full((1,), math.nan))
    noise = torch.randn(2, 3, 5, dtype=torch.float64)
    a = trajectory(exact_ctm(), noise, [80.0, 1.0], [EPS, EPS])
    noise[1] = 0
    b = trajectory(exact_ctm(), noise, [80.0, 1.0], [EPS, EPS])
    one = torch.ones(3, dtype=torch.float64)
    x = exact_ctm()(80 * noise[0], 80 * one, EPS * one)
    torch.testing.assert_close(b, exact_ctm()(x, one, EPS * one), rtol=1e-9, atol=0)
    assert a.isfinite().all() and not torch.equal(a, b)
