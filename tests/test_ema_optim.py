import numpy as np
import pytest
import torch
from golden_data import f64, golden

from onejump.ema import ConstantEMA, PowerEMA, gamma_of, sigma_rel
from onejump.optim import ConstantRate, CosineRate, InverseSqrtRate
from onejump.update import lerp


def test_power_function_decay():
    data = golden("tcm")
    betas = [PowerEMA(16.97).decay(int(n)) for n in data["ema_power/iter"]]
    np.testing.assert_allclose(betas, data["ema_power/beta_gamma16.97"], rtol=1e-9)


def test_gamma_and_relative_width_are_inverse():
    data = golden("edm2")
    np.testing.assert_allclose([gamma_of(s) for s in data["stds"]], data["std_to_exp"], rtol=1e-9)
    np.testing.assert_allclose([sigma_rel(6.94), sigma_rel(16.97)], data["exp_to_std(6.94,16.97)"], rtol=1e-9)


@pytest.mark.parametrize(("key", "std"), [("track/ema_std0.05_final", 0.05), ("track/ema_std0.10_final", 0.10)])
def test_power_ema_of_a_training_run_equals_the_published_codes(key, std):
    data = golden("edm2")
    model, ema = torch.nn.Linear(8, 1, bias=False).double(), torch.nn.Linear(8, 1, bias=False).double()
    for n, theta in enumerate(data["track/params_per_step"], start=1):
        model.weight.data = f64(theta)[None]
        lerp([ema.weight.data], [model.weight.data], 1 - PowerEMA(gamma_of(std)).decay(n), torch.zeros(()))
    np.testing.assert_allclose(ema.weight[0].detach().numpy(), data[key], rtol=1e-6)


def test_constant_ema_is_the_geometric_average():
    model, ema = torch.nn.Linear(3, 1, bias=False).double(), torch.nn.Linear(3, 1, bias=False).double()
    start = ema.weight.detach().clone()
    thetas = torch.randn(20, 1, 3, dtype=torch.float64)
    for theta in thetas:
        model.weight.data = theta
        lerp([ema.weight.data], [model.weight.data], 1 - ConstantEMA(0.9).decay(1), torch.zeros(()))
    direct = 0.9**20 * start + sum(0.1 * 0.9 ** (19 - i) * theta for i, theta in enumerate(thetas))
    torch.testing.assert_close(ema.weight.detach(), direct, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("key", "law", "batch"),
    [
        ("lr/img64_stage1(b2048,1e-3,decay2000)", InverseSqrtRate(1e-3, 2000), 2048),
        ("lr/img64_stage2(b1024,5e-4,decay8000)", InverseSqrtRate(5e-4, 8000), 1024),
        ("lr/rampup(b512,1e-4,0,1000)", ConstantRate(1e-4, rampup=1000), 512),
    ],
)
def test_learning_rates_of_tcm(key, law, batch):
    data = golden("tcm")
    rates = [law.rate(int(images / batch), 0.0) for images in data["lr/nimg"]]
    np.testing.assert_allclose(rates, data[key], rtol=1e-6)


def test_learning_rates_of_edm2():
    data = golden("edm2")
    law = InverseSqrtRate(1e-2, 70_000, rampup=round(10e6 / 2048))
    rates = [law.rate(round(images / 2048), 0.0) for images in data["lr/nimg"]]
    np.testing.assert_allclose(rates, data["lr/batch2048_ref1e-2_70k_rampup10"], rtol=4e-3)  # whole steps


def test_imagenet_rates_of_both_stages_are_one_curve():
    for n in (8_000, 80_000, 800_000):
        assert abs(InverseSqrtRate(1e-3, 2000).rate(n, 0) / InverseSqrtRate(5e-4, 8000).rate(n, 0) - 1) < 1e-12


def test_cosine_rate_falls_to_zero():
    assert CosineRate(2e-3).rate(7, 0.0) == 2e-3
    assert abs(CosineRate(2e-3).rate(7, 0.5) - 1e-3) < 1e-15
    assert abs(CosineRate(2e-3).rate(7, 1.0)) < 1e-15
