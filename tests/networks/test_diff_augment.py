import torch

from onejump.networks.diff_augment import cut_out, diff_augment, recolour, translate


def draw(*values):
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def test_colours_are_shifted_and_scaled_around_grey_and_around_the_mean():
    x = torch.randn(3, 3, 5, 4).double()
    brightness, saturation, contrast = draw(0.3, -0.2, 0.0), draw(0.0, 1.7, 1.0), draw(1.0, 0.6, 1.5)
    out = recolour(x, brightness, saturation, contrast)
    for i in range(3):
        image = x[i] + brightness[i]
        grey, mean = image.mean(0), image.mean()
        expected = mean + contrast[i] * (grey + saturation[i] * (image - grey) - mean)
        assert torch.allclose(out[i], expected, rtol=1e-12)
    assert (out[0] - out[0].mean(0)).abs().max() < 1e-12  # no saturation: all channels alike
    assert torch.allclose(recolour(x, draw(0, 0, 0), draw(1, 1, 1), draw(1, 1, 1)), x)


def test_translation_moves_the_content_and_fills_with_grey():
    x = torch.randn(4, 2, 6, 5)
    out = translate(x, torch.tensor([0, 2, -1, 6]), torch.tensor([0, -3, 1, 0]))
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[1, :, :4, 3:], x[1, :, 2:, :2])
    assert torch.equal(out[2, :, 1:, :4], x[2, :, :5, 1:])
    assert out[1].count_nonzero() == 2 * 4 * 2 and out[2].count_nonzero() == 2 * 5 * 4
    assert torch.equal(out[3], torch.zeros(2, 6, 5))


def test_cutout_blanks_its_box_clipped_to_the_image():
    x = torch.ones(3, 2, 6, 5)
    out = cut_out(x, torch.tensor([1, -1, 5]), torch.tensor([2, -2, 4]), (2, 3))
    expected = x.clone()
    expected[0, :, 1:3, 2:5] = 0
    expected[1, :, 0:1, 0:1] = 0
    expected[2, :, 5:, 4:] = 0
    assert torch.equal(out, expected)


def masks(n):
    """For n white images of 16x16: what diff_augment left (0/1), and the level of what it left."""
    torch.manual_seed(0)
    out = diff_augment(torch.ones(n, 1, 16, 16))[:, 0]
    return (out != 0), out.flatten(1).amax(1)


def test_images_move_by_up_to_an_eighth_of_their_side_each_way():
    left, level = masks(4000)
    moved = []
    for full in (left.any(2), left.any(1)):  # rows, columns with anything left
        moved.append(full.long().argmax(1) - (16 - full.sum(1) - full.long().argmax(1)))
    for steps in moved:  # a band of `steps` blank pixels on one side
        counts = torch.stack([(steps == k).sum() for k in range(-2, 3)])
        assert counts.sum() == 4000
        assert (counts - 800).abs().max() < 5 * (800 * 0.8) ** 0.5
    assert abs((moved[0] * moved[1]).float().mean()) < 5 * 2 / 4000**0.5  # rows and columns independently
    assert level.min() >= 0.5 and level.max() <= 1.5 and abs(level.mean() - 1) < 5 * 0.29 / 4000**0.5


def test_a_box_of_a_fifth_of_the_side_is_cut_out_anywhere():
    left, _ = masks(4000)
    inside = left.any(2)[:, :, None] & left.any(1)[:, None, :]  # without the blank bands
    box = inside & ~left
    sides = torch.stack([box.any(2).sum(1), box.any(1).sum(1)])
    assert sides.max() == 3 and ((box.sum((1, 2))) == sides[0] * sides[1]).all()
    assert (sides == 3).all(0).float().mean() > 0.5
    assert box.any(0).all()


def test_every_image_and_every_call_has_its_own_draws():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 16, 16).expand(8, -1, -1, -1)
    images = [*diff_augment(x), *diff_augment(x)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(images) for b in images[:i])


def test_gradient_is_the_slope():
    def augmented(x):
        torch.manual_seed(3)
        return diff_augment(x)

    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(augmented, x)
    assert torch.autograd.grad(augmented(x).square().sum(), x)[0].abs().amax((1, 2, 3)).min() > 0
