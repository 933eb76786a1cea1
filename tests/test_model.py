import pytest
import torch
from golden_data import golden

from onejump.model import ConsistencyModel
from onejump.precond import CM, EDM, Euler, ToData


class WildNet(torch.nn.Module):
    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        return 1e3 * torch.sin(7 * x) + 5


def test_cm_scalings_equal_the_published_codes():
    """c_skip and c_out on top of the network F: a + b c_skip^EDM and b c_out^EDM."""
    data = golden("cm_scalings")
    t = torch.from_numpy(data["in/sigmas"])
    c_skip, c_out, c_in, _ = EDM()(t)
    for jump, key in ((CM(), "True"), (ToData(), "False")):
        a, b = jump(t, torch.full_like(t, jump.sigma_min))
        for name, value in (("c_skip", a + b * c_skip), ("c_out", b * c_out), ("c_in", c_in)):
            torch.testing.assert_close(
                value, torch.from_numpy(data[f"scalings_distill{key}/{name}"]), rtol=2e-6, atol=0
            )


@pytest.mark.parametrize("jump", [ToData(), CM(), Euler(), CM(0.01, 0.7)], ids=repr)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_boundary_is_the_identity_exactly(jump, autocast):
    model = ConsistencyModel(WildNet(), EDM(), jump)
    model.autocast = autocast
    x = torch.randn(5, 3, 4, 4)
    assert (model(x, torch.full((5,), jump.sigma_min)) == x).all()


def test_a_jump_of_no_length_is_the_identity_anywhere():
    model = ConsistencyModel(WildNet(), EDM(), Euler())
    x, t = torch.randn(50, 3, 4, 4), torch.rand(50) * 80
    assert (model(x, t, t) == x).all()


def test_cm_is_an_euler_step_but_for_a_thousandth():
    """Of the skip; the out coefficient is the same."""
    t = torch.logspace(-2.6, 1.9, 200, dtype=torch.float64)
    (a, b), (a_euler, b_euler) = (jump(t, torch.full_like(t, 0.002)) for jump in (CM(), Euler()))
    torch.testing.assert_close(b, b_euler)
    assert 0.9e-3 < (a - a_euler).abs().max() < 1.1e-3


def test_bcm_is_an_euler_step():
    """BCM's coefficients on F, skip (sd^2 + t s) / (sd^2 + t^2) and out sd (t - s) / sqrt(sd^2 + t^2)."""
    t = torch.logspace(-2.6, 1.9, 200, dtype=torch.float64)
    s = t * torch.linspace(0.01, 1, 200, dtype=torch.float64)
    c_skip, c_out, _, _ = EDM()(t)
    a, b = Euler()(t, s)
    torch.testing.assert_close(a + b * c_skip, (0.25 + t * s) / (0.25 + t**2), rtol=1e-12, atol=0)
    torch.testing.assert_close(b * c_out, 0.5 * (t - s) / (0.25 + t**2).sqrt(), rtol=1e-12, atol=1e-16)


def test_denoiser_is_exact_for_gaussian_data_when_the_network_is_zero():
    """With F = 0, D is the posterior mean of N(0, sigma_data^2) data: EDM's skip is the exact denoiser."""

    class Zero(torch.nn.Module):
        def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
            return torch.zeros_like(x)

    model = ConsistencyModel(Zero())
    torch.manual_seed(0)
    x0 = 0.5 * torch.randn(200_000, 1)
    for sigma in (0.1, 0.5, 3.0):
        t = torch.full((len(x0),), sigma)
        xt = x0 + sigma * torch.randn_like(x0)
        residual = x0 - model.denoise(xt, t)
        assert abs((residual * xt).mean()) < 5e-3 * sigma  # the error is orthogonal to the observation


def test_skip_path_stays_float32_under_autocast():
    class HalfZero(torch.nn.Module):
        def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
            return torch.zeros_like(x, dtype=torch.bfloat16)

    model = ConsistencyModel(HalfZero())
    model.autocast = torch.bfloat16
    x = torch.randn(4, 3, 2, 2) * 80
    t = torch.full((4,), 1e-2)
    torch.testing.assert_close(model(x, t), 0.25 / (0.25 + 1e-4) * x, rtol=1e-6, atol=0)
