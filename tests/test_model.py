import pytest
import torch
from golden_data import golden

from onejump.model import ConsistencyModel
from onejump.precond import EDM, ToData


class WildNet(torch.nn.Module):
    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        return 1e3 * torch.sin(7 * x) + 5


def test_cm_scalings_equal_the_published_codes():
    data = golden("cm_scalings")
    t = torch.from_numpy(data["in/sigmas"])
    for shift, key in ((0.002, "True"), (0.0, "False")):
        c_skip, c_out, c_in, _ = EDM(sigma_min=shift)(t)
        for name, value in (("c_skip", c_skip), ("c_out", c_out), ("c_in", c_in)):
            torch.testing.assert_close(
                value, torch.from_numpy(data[f"scalings_distill{key}/{name}"]), rtol=2e-6, atol=0
            )


@pytest.mark.parametrize("sigma_min", [0.0, 0.002])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_boundary_is_the_identity_exactly(sigma_min, autocast):
    model = ConsistencyModel(WildNet(), EDM(sigma_min=sigma_min), ToData())
    model.autocast = autocast
    x = torch.randn(5, 3, 4, 4)
    assert (model(x, torch.full((5,), sigma_min)) == x).all()


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
