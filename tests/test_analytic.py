import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from gaussian_mixture import ExactNetwork, Mixture, exact_teacher, random_mixture, single
from torch import nn

from onejump.analytic import AnalyticPrecond, Estimator, Table, estimate, load_table, save_table
from onejump.model import ConsistencyModel
from onejump.networks import SongUNetConfig
from onejump.precond import EDM
from onejump.times import karras_grid
from onejump.types import UserError

MIXTURE = random_mixture(d=4, k=6, mean=0.2, power=1.0)


def table_of(mixture: Mixture, estimator: Estimator, **more) -> Table:
    return estimate(exact_teacher(mixture), mixture.sample(estimator.samples).float(), None, estimator, **more)


def pairs(grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of every t > s of the falling grid."""
    i, j = torch.triu_indices(len(grid), len(grid), 1)
    return i, j


def difference(table: Table, other: Table) -> tuple[float, float]:
    """Of a and of b, over every jump of the Karras grid."""
    grid = karras_grid(18).flip(0)
    t, s = (grid[k] for k in pairs(grid))
    a, b = ((x - y).abs().max().item() for x, y in zip(table.jump()(t, s), other.jump()(t, s), strict=True))
    return a, b


# What the statistics are


@pytest.mark.parametrize("estimator", [Estimator(times=40, samples=64), Estimator(40, 64, "finite_difference", "rms")])
def test_gaussian_data_has_l_and_s_in_closed_form(estimator):
    table, t = table_of(single(0.4, 0.3), estimator), np.array(estimator.t)
    exact = 0.3**2 / (0.3**2 + t**2)
    np.testing.assert_allclose(table.l_t, exact, atol=1e-6 if estimator.trace == "hutchinson" else 1e-4)
    np.testing.assert_allclose(table.s_t, -2 * exact, atol=0.02)
    np.testing.assert_allclose(table.rms, (1 - exact) * 0.4, rtol=2e-2)


def test_gaussian_data_around_zero_has_s_zero_and_an_exact_jump():
    """g is nothing but rounding, and its growth must not be measured."""
    for slope in ("jvp", "rms"):
        table = table_of(single(0.0, 0.3), Estimator(times=120, samples=4, slope=slope))
        assert set(table.s_t) == {0.0}
        grid = karras_grid(18).flip(0)
        i, j = pairs(grid)
        x = (0.3**2 + grid**2).sqrt()  # one trajectory
        a, b = table.jump()(grid[i], grid[j])
        D = 0.3**2 / (0.3**2 + grid[j] ** 2) * x[j]
        torch.testing.assert_close(a * x[i] + b * D, x[j], rtol=2e-3, atol=0)


def test_l_is_the_error_of_the_denoiser_over_the_noise():
    """l_t = E|x0 - D|^2 / (d t^2) for an exact denoiser, whatever the data: a check without derivatives."""
    table = table_of(MIXTURE, Estimator(24, 8192, "exact", "rms", batch=8192))
    x0, generator = MIXTURE.sample(40_000, seed=1), torch.Generator().manual_seed(2)
    z = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    for t, l_t in zip(table.estimator.t, table.l_t, strict=True):
        D = MIXTURE.denoise(x0 + t * z, torch.full((len(x0),), t, dtype=torch.float64))
        assert abs((D - x0).square().mean().item() / t**2 - l_t) < 1e-2


@pytest.mark.parametrize("trace", ["hutchinson", "finite_difference"])
def test_one_probe_an_image_is_enough(trace):
    """The error falls with the samples and the coordinates; here are few of both."""
    exact = table_of(MIXTURE, Estimator(30, 2048, "exact", batch=2048))
    a, b = difference(table_of(MIXTURE, Estimator(30, 2048, trace, batch=2048)), exact)
    assert 0 < a < 5e-3 and 0 < b < 3e-2


def test_finite_differences_are_the_derivative_along_the_same_probe():
    a, b = (table_of(MIXTURE, Estimator(40, 256, trace)) for trace in ("hutchinson", "finite_difference"))
    np.testing.assert_allclose(a.l_t, b.l_t, atol=2e-4)


def test_the_growth_of_g_needs_no_derivative():
    """s_t = d ln rms(g) / dlambda: q_t is carried along by the ODE of an exact denoiser."""
    jvp, rms = (table_of(MIXTURE, Estimator(120, 4096, slope=slope, batch=4096)) for slope in ("jvp", "rms"))
    assert jvp.rms == rms.rms
    a, b = difference(jvp, rms)
    assert a < 3e-4 and b < 1e-3
    np.testing.assert_allclose(jvp.s_t, rms.s_t, atol=0.03)


def test_the_last_values_of_images_do_not_depend_on_the_batch():
    a, b = (table_of(MIXTURE, Estimator(24, 100, batch=batch)) for batch in (37, 100))
    np.testing.assert_allclose(a.l_t, b.l_t, rtol=1e-6)
    np.testing.assert_allclose(a.s_t, b.s_t, rtol=1e-4, atol=1e-5)


class ByLabel(nn.Module):
    """The network of a Gaussian whose standard deviation is chosen by the label."""

    def __init__(self, *stds: float):
        super().__init__()
        self.each = nn.ModuleList(ExactNetwork(single(0.3, std)) for std in stds)

    def forward(self, x, c_noise, c_noise_s=None, cond=None, key=None):
        every = torch.stack([net(x, c_noise) for net in self.each])
        return every[cond, torch.arange(len(x))]


def test_every_image_is_denoised_with_its_own_label():
    cond, estimator = torch.arange(40) // 30, Estimator(24, 40, batch=16)
    x0 = (
        0.3 + torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * torch.where(cond == 0, 0.1, 1.0)[:, None]
    )
    table = estimate(ConsistencyModel(ByLabel(0.1, 1.0)).eval(), x0, cond, estimator)
    t2 = np.array(estimator.t) ** 2
    np.testing.assert_allclose(table.l_t, 0.75 * 0.01 / (0.01 + t2) + 0.25 / (1 + t2), atol=1e-6)


def test_networks_with_attention_have_a_forward_derivative():
    torch.manual_seed(0)
    net = SongUNetConfig(8, 1, 3, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)).build()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    x0, cond = torch.randn(8, 1, 8, 8).clamp(-1, 1), torch.arange(8) % 3
    estimators = [Estimator(4, 8, trace) for trace in ("hutchinson", "finite_difference")]
    tables = (estimate(ConsistencyModel(net).eval(), x0, cond, estimator) for estimator in estimators)
    c_skip, c_out, _, _ = (c.numpy() for c in EDM()(torch.tensor(estimators[0].t, dtype=torch.float64)))
    forward, differences = ((np.array(table.l_t) - c_skip) / c_out for table in tables)
    assert np.abs(forward).max() > 0.01
    np.testing.assert_allclose(forward, differences, rtol=0.02, atol=1e-3)
    assert all(parameter.grad is None for parameter in net.parameters())


# Running it


def test_interrupted_anywhere_it_ends_with_the_same_bits(tmp_path):
    """Ended while the trace and while the slope is summed, and once when all is done."""
    estimator, partial = Estimator(20, 32, batch=8), tmp_path / "partial.json"
    whole = table_of(MIXTURE, estimator)

    def stop_at(k):
        def progress(done, total):
            seen.append((done, total))
            if done == k:
                raise KeyboardInterrupt

        return progress

    seen: list = []
    for k in (5, 20, 33):
        with pytest.raises(KeyboardInterrupt):
            table_of(MIXTURE, estimator, partial=partial, progress=stop_at(k))
    for _ in range(2):
        table = table_of(MIXTURE, estimator, partial=partial, progress=stop_at(-1))
        assert replace(table, seconds=whole.seconds) == whole
    assert seen == [(k, 42) for k in range(1, 43)]


@pytest.mark.parametrize("changed", ["weights", "images", "labels", "estimator", "damaged"])
def test_sums_of_anything_else_are_started_anew(tmp_path, changed):
    estimator, partial, cond = Estimator(4, 8), tmp_path / "partial.json", torch.zeros(8, dtype=torch.int64)
    teacher, x0 = exact_teacher(MIXTURE), MIXTURE.sample(8).float()
    estimate(teacher, x0, cond, estimator, partial=partial)
    if changed == "weights":
        teacher.net.weight.mul_(0.99)
    if changed == "images":
        x0 = x0 * 0.99
    if changed == "labels":
        cond = cond + 1
    if changed == "estimator":
        estimator = replace(estimator, seed=1)
    if changed == "damaged":
        partial.write_text(partial.read_text().replace("0", "1", 1))
    seen: list = []
    table = estimate(
        teacher, x0, cond, estimator, partial=partial, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(k, 10) for k in range(1, 11)]
    fresh = estimate(teacher, x0, cond, estimator)
    assert (table.l_t, table.s_t) == (fresh.l_t, fresh.s_t)


class Counting(ExactNetwork):
    rows = 0

    def forward(self, x, *rest):
        self.rows += len(x)
        return super().forward(x, *rest)


@pytest.mark.parametrize("trace, slope, derivatives", [("finite_difference", "rms", 0), ("hutchinson", "jvp", 2)])
def test_network_passes_are_counted(trace, slope, derivatives):
    """Every image through the network counts, and one with its derivative counts twice."""
    teacher = ConsistencyModel(Counting(MIXTURE)).eval().requires_grad_(False)
    table = estimate(teacher, MIXTURE.sample(10).float(), None, Estimator(4, 10, trace, slope, batch=3))
    assert table.network_passes == teacher.net.rows + derivatives * 10 * 5


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_teacher_without_numbers_is_refused(tmp_path, weight):
    teacher, partial = exact_teacher(MIXTURE), tmp_path / "partial.json"
    teacher.net.weight.fill_(weight)
    with pytest.raises(UserError, match="teacher: its output at t = 80 is not finite; use a checkpoint"):
        estimate(teacher, MIXTURE.sample(8).float(), None, Estimator(4, 8), partial=partial)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_no_teacher_is_refused():
    net, x0, estimator = ExactNetwork(MIXTURE), MIXTURE.sample(8).float(), Estimator(4, 8)
    for model in (ConsistencyModel(net), ConsistencyModel(net, second_time=True).eval()):
        with pytest.raises(UserError, match="teacher: an EDM denoiser of one time, in eval mode"):
            estimate(model, x0, None, estimator)
    with pytest.raises(UserError, match="samples: 8 asked for, but 7 images given"):
        estimate(exact_teacher(MIXTURE), x0[:7], None, estimator)
    with pytest.raises(UserError, match="8 images, 6 labels"):
        estimate(exact_teacher(MIXTURE), x0, torch.zeros(6, dtype=torch.int64), estimator)


@pytest.mark.parametrize(
    "changes",
    [
        {"times": 1},
        {"samples": 0},
        {"batch": 0},
        {"seed": -1},
        {"sigma_min": 0.0},
        {"sigma_min": 81.0},
        {"sigma_max": math.nan},
    ],
)
def test_estimators_out_of_range_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        Estimator(**changes)


# The file


@pytest.fixture(scope="module")
def small() -> Table:
    names = {"teacher_sha": "ab" * 32, "data_name": "mixture", "data_fingerprint": "cd" * 32}
    return table_of(MIXTURE, Estimator(4, 8, "finite_difference", "rms", seed=3), **names)


def test_a_table_comes_back_from_its_file_to_the_bit(tmp_path, small):
    save_table(tmp_path / "new" / "table.json", small)
    again = load_table(tmp_path / "new" / "table.json")
    assert again == small and again.jump("forward").teacher == "ab" * 32
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.json"]
    assert AnalyticPrecond().estimator == Estimator()


def broken_files(good: str) -> dict[str, str]:
    content = json.loads(good)
    return {
        "cut": good[:-40],
        "empty": "",
        "a list": "[1, 2]",
        "foreign": json.dumps({"format": 1, "l_t": [0.1, 0.2]}),
        "a value changed": good.replace(repr(content["s_t"][2]), "0.5"),
        "a value gone": json.dumps({key: value for key, value in content.items() if key != "rms"}),
        "a later format": good.replace('"format": 1', '"format": 2'),
        "binary": "\x00\x01",
    }


def test_a_damaged_file_is_refused_in_one_line(tmp_path, small):
    path = tmp_path / "table.json"
    save_table(path, small)
    for what, text in broken_files(path.read_text()).items():
        path.write_text(text)
        with pytest.raises(UserError, match="no table of a teacher's statistics can be read") as refused:
            load_table(path)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value), what
    path.unlink()
    with pytest.raises(
        UserError, match="table.json: no such table; make one with `onejump precond MODEL --out .*json`"
    ):
        load_table(path)
    with pytest.raises(UserError, match="Is a directory.*; estimate it again"):
        load_table(tmp_path)


def test_a_table_that_cannot_be_written_is_an_error_of_one_line(tmp_path, small):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="table.json: could not write"):
        save_table(tmp_path / "file" / "table.json", small)


def test_a_table_of_other_lengths_is_refused(small):
    with pytest.raises(UserError, match="l_t, s_t, rms: 5 values of each"):
        replace(small, rms=small.rms[:-1])
