import jaxtyping
import pytest
import torch

from onejump.networks import MLPConfig
from onejump.networks.mlp import FREQUENCIES
from onejump.types import UserError


def lively(config, dtype=torch.float64):
    """A network whose last layer is not zero."""
    torch.manual_seed(0)
    net = config.build()
    torch.nn.init.normal_(net.last.weight)
    return net.to(dtype)


def test_starts_at_zero_with_live_gradients():
    net = MLPConfig(shape=(2,)).build()
    x = torch.randn(5, 2)
    out = net(x, torch.zeros(5))
    assert torch.equal(out, torch.zeros(5, 2))
    (out - x).square().sum().backward()
    assert net.last.weight.grad.abs().max() > 0


def test_fits_the_denoiser_of_a_gaussian():
    """For x0 ~ N(m, 0.25) the best F of EDM (sigma_data = 0.5) is a known function of t; for m = 0 it is 0."""
    torch.manual_seed(0)
    net, m = MLPConfig(shape=(2,), width=64, depth=2).build(), torch.tensor([1.0, -0.5])
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)

    def exact(x, t):  # F = (D - c_skip x) / c_out with D = m + 0.25 (x - m) / (t^2 + 0.25)
        norm = t**2 + 0.25
        return (m - 0.25 * m / norm) * norm.sqrt() / (0.5 * t)

    def draw(n):
        t = (torch.randn(n) * 1.2 - 1.2).exp()
        return m + torch.randn(n, 2) * (t**2 + 0.25).sqrt()[:, None], t

    for _ in range(400):
        x, t = draw(256)
        loss = (net(x, t.log() / 4) - exact(x, t[:, None])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, t = draw(4096)
    target = exact(x, t[:, None])
    assert (net(x, t.log() / 4) - target).square().mean() < 2e-3 * target.square().mean()


def test_gradient_with_dropout_is_the_slope_of_the_loss():
    net = lively(MLPConfig(shape=(1, 4, 4), label_dim=3, width=32, dropout=0.2))
    x, c_noise, cond, key = (
        torch.randn(5, 1, 4, 4).double(),
        torch.randn(5).double(),
        torch.arange(5) % 3,
        torch.arange(5),
    )
    assert torch.autograd.gradcheck(
        lambda x, c: net(x, c, cond=cond, key=key), (x.requires_grad_(), c_noise.requires_grad_())
    )
    net(x, c_noise, cond=cond, key=key).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_two_networks_of_one_config_share_masks_also_when_rows_are_split():
    config = MLPConfig(shape=(2,), width=32, dropout=0.5)
    student, target = lively(config), config.build().double()
    target.load_state_dict(student.state_dict())
    x, c_noise, key = torch.randn(6, 2).double(), torch.randn(6).double(), torch.randint(2**63 - 1, (6,))
    whole = student(x, c_noise, key=key)
    for rows in (torch.tensor([4, 1]), torch.tensor([0, 2, 3, 5]), torch.tensor([], dtype=torch.int64)):
        assert torch.allclose(target(x[rows], c_noise[rows], key=key[rows]), whole[rows], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(student(x, c_noise, key=key + 1), whole)
    assert torch.equal(student.eval()(x, c_noise, key=key), student(x, c_noise))


def test_noise_level_and_label_change_the_answer():
    net = lively(MLPConfig(shape=(2,), label_dim=3, width=32))
    x, c_noise = torch.randn(4, 2).double(), torch.zeros(4).double()
    answers = [net(x, c_noise), net(x, c_noise + 0.5), *(net(x, c_noise, cond=torch.full((4,), k)) for k in range(3))]
    for i, a in enumerate(answers):
        assert all((a - b).abs().max() > 1e-3 for b in answers[:i])
    assert torch.equal(net(x, c_noise, cond=torch.zeros(4, 3)), answers[0])


def test_frequencies_are_quarter_octaves_from_1_to_16():
    assert FREQUENCIES[0] == 1 and FREQUENCIES[-1] == 16
    assert all(abs(b / a - 2**0.25) < 1e-12 for a, b in zip(FREQUENCIES, FREQUENCIES[1:], strict=False))


def test_compiled_network_is_one_graph_and_equals_eager(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    net, key = lively(MLPConfig(shape=(2,), width=32, dropout=0.5)), torch.arange(3)
    x, c_noise = torch.randn(3, 2).double(), torch.randn(3).double()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, c_noise, key=key), net(x, c_noise, key=key), rtol=1e-12)


def test_arguments_that_do_not_fit_are_refused():
    net = lively(MLPConfig(shape=(2,)), torch.float32)
    with pytest.raises(UserError, match="c_noise_s"):
        net(torch.zeros(3, 2), torch.zeros(3), torch.zeros(3))
    with pytest.raises(UserError, match=r"shape=\(2,\)"):
        net(torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(UserError, match="label_dim=0"):
        net(torch.zeros(3, 2), torch.zeros(3), cond=torch.zeros(3, dtype=torch.int64))
