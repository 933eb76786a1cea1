"""CTM's critic, and derivatives of real networks: the U-Net forwards and backwards in continuous time."""

import copy

import pytest
import torch
from lpips_reference import FILES, random_heads, random_weights
from torch import nn

from onejump.losses import mean_l2
from onejump.lpips import LPIPS
from onejump.methods.base import Nets, gradient_ratio
from onejump.methods.continuous import ContinuousCD, ContinuousCT, hessian_times, slope
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.methods.dsm import DSM
from onejump.model import ConsistencyModel
from onejump.networks.critic import SmallCriticConfig
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.optim import RAdam
from onejump.precond import CM, Euler
from onejump.types import UserError
from onejump.update import Updater

SHAPE = (1, 8, 8)


def x0(n=8):
    return torch.randn(n, *SHAPE).clamp(-1, 1)


def randomised(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        p.data.normal_(0, 0.2 if p.ndim < 2 else p[0].numel() ** -0.5)
    return net.train()


def unet(dropout: float = 0.1, second_time: str = "off") -> nn.Module:
    torch.manual_seed(1)
    config = SongUNetConfig(8, 1, 0, 8, (1, 2), 1, (4,), dropout, second_time)
    return randomised(config.build())


def ctm_nets(critic: nn.Module, method: CTMGAN):
    torch.manual_seed(1)
    mlp = MLPConfig(SHAPE, width=32, depth=2, dropout=0.1, second_time="random")
    student = ConsistencyModel(randomised(mlp.build()), jump=Euler(), second_time=True)
    teacher = ConsistencyModel(randomised(MLPConfig(SHAPE, width=32, depth=2).build())).eval()
    return method.nets(student, teacher, critic)


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("kind", [ContinuousCT, ContinuousCD])
def test_continuous_time_trains_a_u_net(kind, stop_gradient):
    """Attention and group norms have forward derivatives, and those have finite gradients: also in train mode."""
    method = kind(stop_gradient=stop_gradient)
    student = ConsistencyModel(unet(), jump=CM())
    nets = method.nets(student) if kind is ContinuousCT else method.nets(student, ConsistencyModel(unet()).eval())
    loss, _ = method.loss(nets, x0(), None, 0, 1)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in student.parameters())


def test_slope_of_a_u_net_is_its_central_difference():
    """With dropout on: both ends of the difference have the masks of the middle."""
    student = ConsistencyModel(unet(dropout=0.3), jump=CM()).double()
    x, t = x0(4).double(), torch.tensor([0.01, 0.3, 2.0, 30.0], dtype=torch.float64)
    dx, h = torch.randn_like(x), 1e-6 * t
    torch.manual_seed(5)
    f, df = slope(student, x + t.view(-1, 1, 1, 1) * dx, t, dx, None)
    torch.manual_seed(5)
    key = torch.randint(2**62, (4,))
    up, down = (student(x + (t + d).view(-1, 1, 1, 1) * dx, t + d, key=key) for d in (h, -h))
    torch.testing.assert_close(df, (up - down) / (2 * h).view(-1, 1, 1, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(f, student(x + t.view(-1, 1, 1, 1) * dx, t, key=key), rtol=1e-9, atol=1e-9)


def test_hessian_of_mean_l2_is_2_over_the_number_of_pixels():
    f, v = x0(), torch.randn(8, *SHAPE)
    torch.testing.assert_close(hessian_times(mean_l2, f, v), v * 2 / 64)


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_continuous_time_works_with_lpips_from_its_first_call(tmp_path, stop_gradient):
    """Which loads the network: nothing that may not be done inside of a transformation."""
    torch.save(random_weights("squeeze"), tmp_path / f"{FILES['squeeze']}.pth")
    torch.save(random_heads("squeeze"), tmp_path / "v0.1-squeeze.pth")
    distance = LPIPS("squeeze", str(tmp_path), resize=48)
    method = ContinuousCT(distance=distance, stop_gradient=stop_gradient)
    student = ConsistencyModel(unet(), jump=CM())
    loss, _ = method.loss(method.nets(student), x0(4), None, 0, 1)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in student.parameters())


def test_hessian_times_is_linear_symmetric_and_that_of_the_distance():
    """For sum of w (sin x - sin y)^2 it is 2 w cos^2."""
    f, v = x0().double(), torch.randn(8, *SHAPE, dtype=torch.float64, requires_grad=True)
    w = torch.rand(64, dtype=torch.float64)
    H = 2 * w.view(SHAPE) * f.cos() ** 2
    found = hessian_times(lambda x, y: (w * (x.sin() - y.sin()).flatten(1).square()).sum(1), f, v)
    torch.testing.assert_close(found, H * v)
    torch.testing.assert_close(torch.autograd.grad((v * found).sum(), v)[0], 2 * H * v)


class Linear(nn.Module):
    """A critic whose score is scale * <w, x> + 1/2, one number an image."""

    def __init__(self, scale: float):
        super().__init__()
        torch.manual_seed(2)
        self.scale, self.w = scale, nn.Parameter(torch.randn(SHAPE))

    def forward(self, x):
        return self.scale * (self.w * x).flatten(1).sum(1, keepdim=True) + 0.5


def norm(loss, nets):
    return torch.autograd.grad(loss, nets.student.net.last_weight, retain_graph=True)[0].norm()


@pytest.mark.parametrize(("scale", "expected"), [(1e-8, 10.0), (1e6, 0.01), (None, None)])
def test_the_students_turn_adds_the_adversarial_loss_at_its_adaptive_weight(scale, expected):
    method, data = CTMGAN(CTM(max_steps=3)), x0()
    nets = ctm_nets(Linear(0.003 if scale is None else scale), method)
    torch.manual_seed(4)
    x, target, _ = method.ctm.at_the_data(nets, data, None, 2)
    ctm, (dsm, _) = mean_l2(x, target).mean(), method.ctm.dsm.loss(nets, data, None, 2, 10)
    gan = -nets.critic.net(x).mean()
    of_dsm, of_gan = (norm(ctm, nets) / (norm(loss, nets) + 1e-4) for loss in (dsm, gan))
    assert 0.01 < of_gan < 10 if expected is None else of_gan.clamp(0.01, 10) == pytest.approx(expected)
    torch.manual_seed(4)
    loss, stats = method.loss(nets, data, None, 2, 10)
    torch.testing.assert_close(loss, ctm + of_dsm * dsm + of_gan.clamp(0.01, 10) * gan)
    torch.testing.assert_close(stats["distance"], mean_l2(x, target))


def test_the_critics_turn_is_the_hinge_loss_and_reaches_the_critic_alone():
    method, data = CTMGAN(CTM(max_steps=3)), x0()
    nets = ctm_nets(Linear(0.3), method)
    torch.manual_seed(4)
    x, _, _ = method.ctm.at_the_data(nets, data, None, 3)
    real, made = (nets.critic.net(images) for images in (data, x.detach()))
    torch.manual_seed(4)
    loss, stats = method.loss(nets, data, None, 3, 10)
    expected = (1 - real).clamp_min(0).mean() + (1 + made).clamp_min(0).mean()
    torch.testing.assert_close(loss, expected)
    assert (real > 1).any() and (real < 1).any()  # on both sides of the hinge
    loss.backward()
    assert nets.critic.net.w.grad.abs().sum() > 0
    assert all(p.grad is None for model in (nets.student, nets.target, nets.teacher) for p in model.parameters())
    assert not stats["distance"].requires_grad


def test_the_critic_learns_to_tell_real_from_made():
    torch.manual_seed(0)
    method = CTMGAN(CTM(max_steps=1), critic_lr=1e-2)
    nets, data = ctm_nets(SmallCriticConfig(img_channels=1, width=8).build(), method), 0.5 * torch.ones(16, *SHAPE)
    losses, updater = [], Updater(nets.critic.optimizer, list(nets.critic.net.parameters()))
    for _ in range(100):
        loss, _ = method.loss(nets, data, None, 1, 100)
        loss.backward()
        updater.step(loss.detach(), nets.critic.rate, (), 1e6)
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_turns_and_the_critics_optimiser_are_ctms():
    method = CTMGAN()
    nets = ctm_nets(SmallCriticConfig(img_channels=1, width=8).build(), method)
    assert [nets.critic.turn(step) for step in range(4)] == [False, True, False, True]
    assert (nets.critic.optimizer, nets.critic.rate) == (RAdam(betas=(0.5, 0.9)), 2e-3)


def test_ctm_trains_a_u_net_with_a_second_time():
    method = CTM(max_steps=2)
    student = ConsistencyModel(unet(second_time="random"), jump=Euler(), second_time=True)
    before = copy.deepcopy(student.state_dict())
    nets = method.nets(student, ConsistencyModel(unet()).eval())
    torch.manual_seed(0)
    loss, _ = method.loss(nets, x0(), None, 3, 10)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(v.equal(before[name]) for name, v in nets.target.state_dict().items())


@pytest.mark.parametrize("field", [{"low": 2.0, "high": 1.0}, {"critic_lr": 0.0}, {"low": 0.0}])
def test_settings_of_the_gan_out_of_range_are_refused(field):
    with pytest.raises(UserError, match=f"{'high' if len(field) > 1 else next(iter(field))}: "):
        CTMGAN(**field)


def test_gradient_ratio_in_half_precision_is_that_of_float32():
    """The denoising loss is a sum over pixels: its gradient at a layer that all pixels share can leave fp16's range."""
    torch.manual_seed(0)
    unet = SongUNetConfig(32, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=()).build()
    student = ConsistencyModel(unet, jump=Euler())
    bright = torch.linspace(0.2, 0.9, 4).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    ratios = []
    for precision in (None, torch.float16):
        student.autocast = precision
        torch.manual_seed(1)
        dsm, _ = DSM().loss(Nets(student, student), bright, None, 0, 1)
        small = 1e-3 * mean_l2(student(bright, torch.full((4,), 5.0)), bright).mean()
        ratios.append(gradient_ratio(small, dsm, student))
    assert ratios[0] > 0
    torch.testing.assert_close(ratios[1], ratios[0], rtol=0.02, atol=0)
