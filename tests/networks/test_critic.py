import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from onejump.networks import ProjectedCriticConfig, SmallCriticConfig, TimmFeatures
from onejump.networks.critic import ProjectedCritic, Projection, mini_critic
from onejump.types import UserError


class Pyramid(nn.Module):
    """A small random feature network: four maps of 1/2 to 1/16 of the image. Keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, c_out, 3, 2, 1) for c, c_out in ((3, 8), (8, 12), (12, 16), (16, 20)))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        self.shown, maps = x, []
        for conv in self.convs:
            x = relu(conv(x))
            x = x if maps else self.norm(x)
            maps.append(x)
        return maps


def projected(n=1, augment=False):
    torch.manual_seed(0)
    return ProjectedCritic([Pyramid() for _ in range(n)], width=4, augment=augment, side=64)


def weights(module):
    return [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]


def trained_part(critic):
    return [p for branch in critic.branches for p in branch.critics.parameters()]


def frozen_part(critic):
    return [p for b in critic.branches for m in (b.network, b.projection) for p in m.parameters()]


@pytest.mark.parametrize("critic", [SmallCriticConfig(width=8).build(), projected()], ids=["small", "projected"])
def test_trained_layers_have_spectral_norm_1_and_keep_it(critic):
    trained = critic.branches[0].critics if isinstance(critic, ProjectedCritic) else critic
    assert len(weights(trained)) >= 4
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        critic(torch.randn(4, 3, 16, 16)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(30):  # the power iteration catches up with the last step
            critic(torch.randn(4, 3, 16, 16))
    for w in weights(trained):
        assert abs(torch.linalg.matrix_norm(w.detach().flatten(1), 2) - 1) < 1e-2


@pytest.mark.parametrize("size, logits", [((8, 8), 4), ((9, 13), 6), ((32, 32), 64)])
def test_small_critic_judges_images_of_any_size(size, logits):
    critic = SmallCriticConfig(img_channels=1, width=8).build()
    assert critic(torch.randn(3, 1, *size)).shape == (3, logits)


def test_small_critic_judges_patches_of_20_by_20_pixels():
    critic, x = SmallCriticConfig(width=8, augment=False).build(), torch.randn(1, 3, 64, 64, requires_grad=True)
    critic(x).view(16, 16)[8, 5].backward()
    rows, columns = x.grad[0].abs().sum(0).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8 * 4 - 8, 8 * 4 + 11, 5 * 4 - 8, 5 * 4 + 11)


@pytest.mark.parametrize("projected_critic", [False, True], ids=["small", "projected"])
def test_a_critic_learns_to_tell_two_kinds_of_images_apart(projected_critic):
    torch.manual_seed(0)
    critic = projected(augment=True) if projected_critic else SmallCriticConfig(width=8).build()
    optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], lr=2e-3, betas=(0.5, 0.9))

    def batch(n):
        smooth = nn.functional.interpolate(torch.rand(n, 3, 4, 4), scale_factor=4) * 2 - 1
        return smooth, torch.rand(n, 3, 16, 16) * 2 - 1

    for _ in range(60):
        real, fake = batch(16)
        loss = relu(1 - critic(real)).mean() + relu(1 + critic(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = (critic(x).mean(1) for x in batch(64))
    assert (real > 0).float().mean() > 0.9 and (fake < 0).float().mean() > 0.9


def test_frozen_parts_get_no_gradient_and_the_images_do():
    critic, x = projected(2, augment=True), torch.randn(4, 3, 20, 20, requires_grad=True)
    for thaw in (False, True):
        if thaw:
            critic.requires_grad_(False).requires_grad_(True)
        critic(x).square().sum().backward()
        assert all(p.grad is None and not p.requires_grad for p in frozen_part(critic))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained_part(critic))
        assert sum(p.grad.abs().max() > 0 for p in trained_part(critic)) > len(trained_part(critic)) / 2
    assert x.grad.abs().amax((1, 2, 3)).min() > 0
    assert len(frozen_part(critic)) + len(trained_part(critic)) == len(list(critic.parameters()))
    critic.requires_grad_(False)
    assert not any(p.requires_grad for p in critic.parameters())


def test_feature_networks_stay_in_eval_mode():
    critic = projected().train()
    network, mini = critic.branches[0].network, critic.branches[0].critics[0]
    before = network.norm.running_mean.clone()
    critic(torch.randn(4, 3, 20, 20) + 3)
    assert critic.training and mini.training and not any(m.training for m in network.modules())
    assert torch.equal(network.norm.running_mean, before)
    assert not critic.eval().training and not mini.training


def test_state_dict_holds_the_frozen_parts_too():
    critic, other = projected(), ProjectedCritic([Pyramid()], width=4, augment=False, side=64)
    x = torch.randn(2, 3, 20, 20)
    assert not torch.allclose(critic.eval()(x), other.eval()(x))
    other.load_state_dict(critic.state_dict())
    assert torch.equal(critic(x), other(x))


def test_logits_of_a_scale_depend_on_its_map_and_all_smaller_ones():
    branch = projected().branches[0].eval()
    maps = [m.detach().requires_grad_() for m in branch.network(torch.randn(2, 3, 64, 64))]
    for i, (critic, mixture) in enumerate(zip(branch.critics, branch.projection(maps), strict=True)):
        grads = torch.autograd.grad(critic(mixture).square().sum(), maps, retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.abs().max() > 0) for g in grads] == [j >= i for j in range(4)]


def test_mixtures_have_projected_gans_channels_and_twice_the_side_of_their_maps():
    """Bilinear upsampling with aligned corners keeps the corner pixels: there, mixing is a product of matrices."""
    torch.manual_seed(0)
    channels = (3, 5, 7, 9)
    projection, maps = Projection(channels, 64), [torch.randn(1, c, 16 >> i, 16 >> i) for i, c in enumerate(channels)]
    out = projection(maps)
    assert [m.shape[1:] for m in out] == [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4)]
    mixture = 0
    for i in (3, 2, 1, 0):
        w, v = projection.across_channels[i], projection.across_scales[i]
        mixture = mixture + w.weight[:, :, 0, 0] @ maps[i][0, :, 0, 0] + w.bias
        mixture = v.weight[:, :, 0, 0] @ mixture + v.bias
        assert torch.allclose(out[i][0, :, 0, 0], mixture, atol=1e-5)


@pytest.mark.parametrize(
    "channels, side, widths", [(64, 112, (64, 128, 256, 512)), (64, 56, (128, 256, 512)), (256, 14, (512,))]
)
def test_mini_critics_are_stylegan_xls(channels, side, widths):
    """At 224 pixels: halved until 7x7, then 4x4 logits from 4x4 kernels."""
    critic = mini_critic(channels, side, 64)
    assert [w.shape[0] for w in weights(critic)] == [*widths, 1]
    assert all(w.shape[2:] == (4, 4) for w in weights(critic))
    assert critic(torch.randn(2, channels, side, side)).shape == (2, 1, 4, 4)
    slopes = [m.negative_slope for m in critic if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.2] * len(widths) == [0.2] * sum(isinstance(m, nn.BatchNorm2d) for m in critic)


def test_feature_networks_see_images_in_0_1_at_their_size_each_in_its_own_augmentation():
    critic = projected(2)
    critic(torch.stack([torch.ones(3, 10, 10), -torch.ones(3, 10, 10)]))
    for branch in critic.branches:
        assert torch.equal(branch.network.shown[0], torch.ones(3, 64, 64))
        assert torch.equal(branch.network.shown[1], torch.zeros(3, 64, 64))
    critic.augment = True
    critic(torch.ones(2, 3, 10, 10))
    first, second = (branch.network.shown for branch in critic.branches)
    assert not torch.allclose(first, second)


def test_without_augmentation_equal_images_get_equal_logits():
    x = torch.randn(2, 3, 20, 20)
    for plain in (projected().eval(), SmallCriticConfig(width=8, augment=False).build().eval()):
        assert torch.equal(plain(x), plain(x))
    for augmenting in (projected(augment=True).eval(), SmallCriticConfig(width=8).build().eval()):
        assert not torch.allclose(augmenting(x), augmenting(x))


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="^images of shape .*img_channels=3.*8x8[^\n]*$"):
        SmallCriticConfig().build()(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match="8x8"):
        SmallCriticConfig().build()(torch.zeros(1, 3, 8, 7))
    with pytest.raises(UserError, match="^images of 1 channels[^\n]*$"):
        projected()(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match="^features: "):
        ProjectedCriticConfig(()).build()
    with pytest.raises(UserError, match="^weights: no file missing.safetensors"):
        ProjectedCriticConfig((TimmFeatures("tf_efficientnet_lite0", "missing.safetensors"),)).build()
