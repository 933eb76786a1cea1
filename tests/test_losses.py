import torch
from golden_data import f64, golden

from onejump import losses


def test_pseudo_huber_is_taken_on_the_norm_of_the_whole_image():
    d = 3 * 32 * 32
    c = 0.00054 * d**0.5
    assert abs(c - float(golden("ict")["pseudo_huber_c(32x32x3)"])) < 1e-12
    for rms in (1e-3, 1e-2, 0.3):
        x = torch.full((1, d), rms, dtype=torch.float64, requires_grad=True)
        losses.pseudo_huber(x, torch.zeros_like(x), c).sum().backward()
        norm = rms * d**0.5
        assert (
            abs(x.grad.norm() - norm / (norm**2 + c**2) ** 0.5) < 1e-12
        )  # 0.9985 at rms 0.01; per element it is 0.0057


def test_pseudo_huber_equals_the_papers_formula():
    data = golden("ict")
    import zlib

    import numpy as np

    def draw(name):
        state = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
        return torch.from_numpy(state.standard_normal((4, 3, 32, 32)).astype("float32")).double()

    x = draw("ict/x")
    y = x + 0.01 * (draw("ict/y") - x)
    value = losses.pseudo_huber(x, y, float(data["pseudo_huber_c(32x32x3)"]))
    torch.testing.assert_close(value, f64(data["pseudo_huber_PAPER_L2norm_per_sample"]), rtol=1e-6, atol=0)


def test_pseudo_huber_without_c_is_the_norm_with_a_finite_gradient_at_zero():
    x = torch.zeros(2, 5, requires_grad=True)
    losses.pseudo_huber(x, torch.zeros(2, 5), 0.0).sum().backward()
    assert (x.grad == 0).all()
    a, b = torch.randn(4, 7), torch.randn(4, 7)
    torch.testing.assert_close(losses.pseudo_huber(a, b, 0.0), losses.squared_l2(a, b).sqrt())


def test_weights_at_the_dividing_time():
    t = torch.tensor([1.0], dtype=torch.float64)
    r = torch.tensor([0.9968485], dtype=torch.float64)
    assert abs(losses.inverse_delta(t, r) - 317.3) < 0.05
    assert losses.inverse_c_out_squared(t, r) == 5
    assert abs(losses.inverse_c_out(t, r) - 5**0.5) < 1e-12
    assert abs(losses.t_over_c_out_squared_delta(t, r) - 5 * 317.314) < 1
    assert abs(losses.inverse_sqrt_delta(t, r) - 317.314**0.5) < 1e-3
    assert losses.uniform(t, r) == 1


def test_cms_distances_are_means_over_the_image():
    x = torch.zeros(2, 3, 4, 4)
    y = x.clone()
    y[0, 0, 0, 0], y[1] = 3.0, -2.0
    torch.testing.assert_close(losses.mean_l1(x, y), torch.tensor([3 / 48, 2.0]))
    torch.testing.assert_close(losses.mean_l2(x, y), torch.tensor([9 / 48, 4.0]))


# openai/consistency_models, get_weightings
CM_TIMES = (0.002, 0.01, 0.1, 0.5, 1, 5, 20, 80)
CM_WEIGHTS = {
    losses.snr: (249999.97, 10000, 99.999992, 4, 1, 0.039999999, 0.0024999999, 0.00015625),
    losses.snr_plus_one: (250000.97, 10001, 100.99999, 5, 2, 1.04, 1.0025, 1.0001563),
    losses.inverse_c_out_squared: (250003.97, 10004, 103.99999, 8, 5, 4.04, 4.0025001, 4.0001564),
    losses.truncated_snr: (249999.97, 10000, 99.999992, 4, 1, 1, 1, 1),
}


def test_weights_equal_cms_and_take_the_larger_time_of_the_pair():
    t = torch.tensor(CM_TIMES)
    for weight, expected in CM_WEIGHTS.items():
        torch.testing.assert_close(weight(t, 0.7 * t), torch.tensor(expected), rtol=1e-6, atol=0)
