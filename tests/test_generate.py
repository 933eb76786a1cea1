"""Image k depends on its own seed and label, to the bit, and on nothing that it is made together with."""

import pytest
import torch

from onejump.data.image_set import from_uint8, to_uint8
from onejump.generate import balanced_labels, check_rounding, denoise_images, generate, to_bytes
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
def test_an_image_is_the_same_to_the_bit_in_any_company(model, sampler, steps):
    """In batches of any size, alone, in another order, asked for twice: row k mod block of a call with block rows."""
    labels = balanced_labels(13, 10)
    one = generate(model, sampler, steps, range(13), SHAPE, labels, seed=3, batch=13)
    for batch in (1, 4, 256):
        assert torch.equal(one, generate(model, sampler, steps, range(13), SHAPE, labels, seed=3, batch=batch))
    some = [7, 2, 12, 2]
    assert torch.equal(one[some], generate(model, sampler, steps, some, SHAPE, labels[some], seed=3))
    assert len(one.unique(dim=0)) == 13


def test_an_image_is_the_same_to_the_bit_with_any_number_of_threads(model):
    labels, before = balanced_labels(40, 10), torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(generate(model, Multistep(mid=(1.0,)), 2, range(40), SHAPE, labels))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_one_number_under_two_labels_is_two_images(model):
    both = generate(model, Multistep(), 1, [3, 3], SHAPE, torch.tensor([1, 2]))
    for label in (1, 2):
        alone = generate(model, Multistep(), 1, [3], SHAPE, torch.tensor([label]))
        assert torch.equal(alone[0], both[label - 1])


def test_bytes_are_rounded_or_cut_off():
    x = torch.tensor([-1.2, -1, 0.5 / 127.5 - 1, 0.9 / 127.5 - 1, 1.4 / 127.5 - 1, 0, 254.6 / 127.5 - 1, 1, 1.2])
    assert to_bytes(x[None, None, None]).flatten().tolist() == [0, 0, 0, 1, 1, 128, 255, 255, 255]
    assert to_bytes(x[None, None, None], "truncate").flatten().tolist() == [0, 0, 0, 0, 1, 127, 254, 255, 255]
    with pytest.raises(UserError, match="rounding: 'floor'"):
        check_rounding("floor")


def test_cutting_off_lowers_bytes_by_one_at_most(model):
    labels = balanced_labels(8, 10)
    made = [generate(model, Multistep(), 1, range(8), SHAPE, labels, rounding=r) for r in ("round", "truncate")]
    lowered = made[0].int() - made[1].int()
    assert set(lowered.unique().tolist()) == {0, 1} and 0.3 < lowered.float().mean() < 0.7


def test_denoising_jumps_from_the_noised_image(model):
    images = torch.randint(0, 256, (5, *SHAPE), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    labels = balanced_labels(5, 10)
    found = denoise_images(model, images, 2.0, range(5), labels, seed=9)
    xt = from_uint8(images) + 2.0 * noise_for(range(5), SHAPE, 1, 9)[0]
    with torch.no_grad():
        expected = to_uint8(model.eval()(xt, torch.full((5,), 2.0), cond=labels))
    assert (found.int() - expected.int()).abs().max() <= 1  # other rows in the batch
    picked = denoise_images(model, images[[4, 1]], 2.0, [4, 1], labels[[4, 1]], seed=9, batch=1)
    assert torch.equal(picked, found[[4, 1]])
    with pytest.raises(UserError, match="below t' = 1"):
        denoise_images(model, images, 0.9, range(5), labels)


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
    assert (images.int() - to_uint8(expected).int()).abs().max() <= 1  # other rows in the batch


def test_labels_are_balanced():
    assert balanced_labels(7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.bincount(balanced_labels(2000, 10)).tolist() == [200] * 10
    assert balanced_labels(7, 0) is None
