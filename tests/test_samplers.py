import math

import pytest
import torch
from golden_data import f64, golden, sine_model

from onejump import solvers
from onejump.model import ConsistencyModel
from onejump.samplers import ODE, Multistep, multistep, noise_for, ode
from onejump.types import UserError


class GaussianScore(torch.nn.Module):
    """F for which D is the exact denoiser of N(mu, s^2), under EDM's preconditioning with sigma_data = 0.5."""

    def __init__(self, mu=0.0, s=0.5):
        super().__init__()
        self.mu, self.s = mu, s

    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        t = (4 * c_noise).exp().view(-1, *[1] * (x.ndim - 1))
        norm = (t**2 + 0.25).sqrt()
        xt = x * norm
        D = (self.s**2 * xt + t**2 * self.mu) / (self.s**2 + t**2)
        return (D - 0.25 / norm**2 * xt) / (0.5 * t / norm)


@pytest.mark.parametrize("steps", [18, 40])
def test_heun_equals_the_published_sampler(steps):
    data = golden("samplers")
    x = ode(sine_model(), f64(data["in/latents"]), ODE().times(steps))
    torch.testing.assert_close(x, f64(data[f"edm/heun{steps}_det_anet"]), rtol=1e-6, atol=1e-6)
    gauss = ConsistencyModel(GaussianScore(f64(data["in/mu"])))
    x = ode(gauss, f64(data["in/latents"]), ODE().times(steps))
    torch.testing.assert_close(x, f64(data[f"edm/heun{steps}_det_gauss"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("code", ["ect", "tcm"])
@pytest.mark.parametrize(
    ("name", "times"), [("1step", [80.0]), ("2step_mid0.821", [80.0, 0.821]), ("3step_mid[1.5,.4]", [80.0, 1.5, 0.4])]
)
def test_multistep_equals_the_published_sampler(code, name, times):
    data = golden("samplers")
    noise = [f64(data["in/latents"])]
    if len(times) > 1:
        noise += list(
            f64(data[f"{code if f'{code}/{len(times)}step_noise' in data else 'ect'}/{len(times)}step_noise"]).reshape(
                -1, *noise[0].shape
            )
        )
    x = multistep(sine_model(), torch.stack(noise), times)
    torch.testing.assert_close(x, f64(data[f"ect/{name}"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("step", "order"), [(solvers.euler, 1), (solvers.heun, 2)])
def test_order_of_convergence(step, order):
    """On N(0, s^2) the exact ODE is x_r = x_t sqrt((s^2 + r^2) / (s^2 + t^2))."""
    model = ConsistencyModel(GaussianScore(0.0, 0.7))
    x = torch.tensor([[1.3]], dtype=torch.float64)
    exact = x * math.sqrt((0.49 + 0.01) / (0.49 + 4.0))
    errors = []
    for n in (40, 80, 160):
        y, times = x, torch.linspace(2.0, 0.1, n + 1, dtype=torch.float64)
        for t, r in zip(times[:-1], times[1:], strict=True):
            y = step(model.denoise, y, t[None], r[None])
        errors.append(abs((y - exact).item()))
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert abs(math.log2(coarse / fine) - order) < 0.1


def test_noise_of_an_image_depends_on_its_number_and_seed_alone():
    together = noise_for(range(6), (1, 4, 4), steps=2, seed=5)
    torch.testing.assert_close(noise_for([3, 1], (1, 4, 4), steps=2, seed=5), together[:, [3, 1]], rtol=0, atol=0)
    torch.testing.assert_close(noise_for(range(6), (1, 4, 4), steps=1, seed=5), together[:1], rtol=0, atol=0)
    assert not torch.equal(noise_for([3], (1, 4, 4), seed=6), together[:1, 3:4])


def test_noise_is_standard_normal_and_independent_between_images():
    noise = noise_for(range(4000), (16,), steps=2, seed=1)
    assert abs(noise.mean()) < 5 / 128_000**0.5
    assert abs(noise.std() - 1) < 5 / 256_000**0.5
    neighbours = (noise[0, 1:] * noise[0, :-1]).mean()
    draws = (noise[0] * noise[1]).mean()
    assert abs(neighbours) < 5 / 64_000**0.5 and abs(draws) < 5 / 64_000**0.5


def test_a_truncated_model_is_never_asked_below_t_prime():
    model = sine_model()
    model.t_min = 1.0
    noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    multistep(model, noise, [80.0, 1.0])
    with pytest.raises(UserError, match="0.821 is below t' = 1"):
        multistep(model, noise, [80.0, 0.821])


def test_defaults_refuse_more_steps_than_they_hold():
    assert Multistep(mid=(1.0,)).times(2) == [80.0, 1.0]
    with pytest.raises(UserError, match="1 to 2 steps"):
        Multistep(mid=(1.0,)).times(3)
