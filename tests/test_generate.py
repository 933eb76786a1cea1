"""The noise of image k depends on its own seed, exactly; its pixels do not depend on the batch, up to rounding."""

import pytest
import torch

from onejump.data.image_set import to_uint8
from onejump.generate import balanced_labels, generate
from onejump.model import ConsistencyModel
from onejump.networks.song_unet import SongUNetConfig
from onejump.samplers import ODE, Multistep, noise_for
from onejump.types import UserError

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = SongUNetConfig(8, 1, 10, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
    net = network.build()
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return ConsistencyModel(net, t_min=1.0).train()  # generate() is to switch its dropout off


@pytest.mark.parametrize(("sampler", "steps"), [(Multistep(mid=(1.0,)), 1), (Multistep(mid=(1.0,)), 2), (ODE(), 4)])
def test_an_image_does_not_depend_on_its_batch(model, sampler, steps):
    """Batches of another size may round another way: one byte level at most. Equal batches: equal bits."""
    labels = balanced_labels(13, 10)
    one = generate(model, sampler, steps, range(13), SHAPE, labels, seed=3, batch=13)
    for batch in (1, 4, 256):
        other = generate(model, sampler, steps, range(13), SHAPE, labels, seed=3, batch=batch)
        assert (one.int() - other.int()).abs().max() <= 1
    part = generate(model, sampler, steps, [7, 2], SHAPE, labels[[7, 2]], seed=3)
    assert (part.int() - one[[7, 2]].int()).abs().max() <= 1
    assert torch.equal(one, generate(model, sampler, steps, range(13), SHAPE, labels, seed=3, batch=13))
    assert len(one.unique(dim=0)) == 13


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_in_the_mode_it_was_in_also_by_a_failure(model, training):
    """Its images do not depend on the mode: dropout is off while they are made."""
    model.train(training)
    modes = [module.training for module in model.modules()]
    images = generate(model, Multistep(), 1, range(3), SHAPE, balanced_labels(3, 10))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(UserError, match="below t'"):
        generate(model, Multistep(mid=(0.5,)), 2, range(3), SHAPE, balanced_labels(3, 10))
    assert [module.training for module in model.modules()] == modes
    again = generate(model.train(not training), Multistep(), 1, range(3), SHAPE, balanced_labels(3, 10))
    model.train()
    assert torch.equal(images, again)


def test_seed_and_label_change_every_image(model):
    sampler, labels = Multistep(), balanced_labels(5, 10)
    images = generate(model, sampler, 1, range(5), SHAPE, labels, seed=3)
    for other in (
        generate(model, sampler, 1, range(5), SHAPE, labels, seed=4),
        generate(model, sampler, 1, range(5), SHAPE, labels + 1, seed=3),
    ):
        assert (images != other).flatten(1).any(1).all()


def test_one_step_is_one_jump_from_t_max(model):
    """f(T eps, T), with the noise that two steps and the ODE start from too."""
    images = generate(model, Multistep(80.0), 1, range(4), SHAPE, balanced_labels(4, 10), seed=9)
    eps = noise_for(range(4), SHAPE, 1, 9)[0]
    assert torch.equal(eps, noise_for(range(4), SHAPE, 2, 9)[0])
    with torch.no_grad():
        expected = model.eval()(80 * eps, torch.full((4,), 80.0), cond=torch.arange(4))
    assert torch.equal(images, to_uint8(expected))


def test_labels_are_balanced():
    assert balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.bincount(balanced_labels(2000, 10)).tolist() == [200] * 10
    assert balanced_labels(7, 0) is None
