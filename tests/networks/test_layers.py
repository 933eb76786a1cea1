import math

import jaxtyping
import pytest
import torch

from onejump.networks.layers import Dropout, keyed_dropout, label_vectors, sinusoidal
from onejump.types import UserError

KEY_SETS = {
    "neighbours": torch.arange(96),
    "negative": -torch.arange(96),
    "high bits": torch.arange(96) << 48,
    "splitmix steps": torch.arange(96) * -0x61C8864680B583EB,
    "random": torch.randint(2**63 - 1, (96,), generator=torch.Generator().manual_seed(0)),
}


def kept(key, n, layer=0, p=0.25):
    """The 0/1 mask of n elements for each key."""
    return (keyed_dropout(torch.ones(len(key), n, dtype=torch.float64), key, layer, p) > 0).double()


def assert_uncorrelated(rows, p):
    """Rows of independent 0/1 draws: all pairwise correlations together, and the largest alone, are within error."""
    z = (rows - (1 - p)) / math.sqrt(p * (1 - p))
    m, n = z.shape
    c = (z @ z.T)[tuple(torch.triu_indices(m, m, 1))] / math.sqrt(n)  # each ~ N(0, 1)
    assert abs((c**2).mean() - 1) < 5 * math.sqrt(2 / len(c))
    assert c.abs().max() < 6


@pytest.mark.parametrize("p", [0.01, 0.13, 0.5, 0.9])
@pytest.mark.parametrize("keys", KEY_SETS)
def test_drop_rate_is_p(p, keys):
    mask = kept(KEY_SETS[keys], 4096, p=p)
    assert abs(mask.mean() - (1 - p)) < 4.5 * math.sqrt(p * (1 - p) / mask.numel())


@pytest.mark.parametrize("keys", KEY_SETS)
def test_samples_are_independent(keys):
    assert_uncorrelated(kept(KEY_SETS[keys], 8192), 0.25)


def test_layers_of_one_sample_are_independent():
    key = torch.tensor([7])
    assert_uncorrelated(torch.cat([kept(key, 8192, layer) for layer in range(64)]), 0.25)


def test_elements_of_one_sample_are_independent():
    assert_uncorrelated(kept(torch.arange(8192), 96).T, 0.25)


def test_triples_of_samples_and_elements_are_independent():
    """The parity of three draws is as random as one: no linear structure survives the hash."""
    z = 1 - 2 * kept(torch.arange(300), 4096, p=0.5)
    samples = z[0::3] * z[1::3] * z[2::3]
    elements = z[:, :-2] * z[:, 1:-1] * z[:, 2:]
    for parity in (samples, elements):
        assert abs(parity.mean()) < 4.5 / math.sqrt(parity.numel())


def test_mask_is_the_hash_of_its_definition_in_unbounded_integers():
    word = 2**32 - 1
    splitmix_of_seed_0 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # its published outputs
    for layer, output in enumerate(splitmix_of_seed_0):
        k0, k1 = output & word, output >> 32
        expected = []
        for i in range(500):
            h = ((i * 0x9E3779B1 & word) ^ k0) * 0x85EBCA6B & word
            h = (h ^ h >> 16) * (k1 | 1) & word
            h = (h ^ h >> 15) * 0xC2B2AE35 & word
            signed = h - 2**32 if h >> 31 else h
            expected.append(signed >= round(0.4 * 2**32) - 2**31)
        assert (kept(torch.tensor([0]), 500, layer, 0.4)[0] > 0).tolist() == expected


def test_equal_keys_give_equal_masks_in_any_batch_and_shape():
    x, key = torch.randn(16, 4, 8, 8), torch.randint(2**63 - 1, (16,))
    whole = keyed_dropout(x, key, 3, 0.3)
    rows = torch.tensor([5, 2, 11])
    assert torch.equal(keyed_dropout(x[rows], key[rows], 3, 0.3), whole[rows])
    assert torch.equal(keyed_dropout(x.flatten(1), key, 3, 0.3).view_as(x), whole)
    assert keyed_dropout(x[:0], key[:0], 3, 0.3).shape == (0, 4, 8, 8)


def test_mask_does_not_depend_on_the_dtype():
    x, key = torch.ones(8, 1000), torch.arange(8)
    mask = keyed_dropout(x, key, 0, 0.3) > 0
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(keyed_dropout(x.to(dtype), key, 0, 0.3) > 0, mask)


def test_mean_is_preserved_and_the_gradient_is_the_mask():
    x = torch.randn(64, 4096, dtype=torch.float64).add_(2).requires_grad_()
    y = keyed_dropout(x, torch.arange(64), 0, 0.13)
    y.sum().backward()
    assert torch.equal(x.grad * x.detach(), y.detach())
    assert torch.all((x.grad == 0) | (x.grad == 1 / 0.87))
    error = (y - x).detach()
    assert abs(error.mean()) < 4.5 * error.std() / math.sqrt(error.numel())


def test_eval_mode_and_p_zero_are_the_identity():
    x, key = torch.randn(4, 10), torch.arange(4)
    assert Dropout(0.5, 0).eval()(x, key) is x
    assert Dropout(0.0, 0)(x, key) is x
    assert torch.equal(keyed_dropout(x, key, 0, 0.0), x)


def test_without_a_key_the_masks_are_fresh_and_follow_the_seed():
    x, dropout = torch.ones(4, 1000), Dropout(0.5, 0)
    torch.manual_seed(1)
    a, b = dropout(x, None), dropout(x, None)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, None), a) and not torch.equal(a, b)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_impossible_probability_is_refused(p):
    with pytest.raises(UserError, match="dropout"):
        Dropout(p, 0)


def test_compiled_dropout_is_one_graph_and_equals_eager(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x, key, dropout = torch.randn(6, 5, 4, 4), torch.arange(6) << 40, Dropout(0.3, 2)
    compiled = torch.compile(dropout, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, key), dropout(x, key))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_masks_equal_cpu_masks(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x, key = torch.randn(32, 64, 16, 16), torch.randint(2**63 - 1, (32,))
    dropout = Dropout(0.3, 5)
    compiled = torch.compile(dropout, fullgraph=True)
    for on_gpu in (dropout(x.cuda(), key.cuda()), compiled(x.cuda(), key.cuda())):
        assert torch.equal(on_gpu.cpu() != 0, dropout(x, key) != 0)


def test_sinusoidal_is_sines_then_cosines():
    out = sinusoidal(torch.tensor([0.0, math.pi / 2]), torch.tensor([1.0, 2.0]))
    assert torch.allclose(out, torch.tensor([[0.0, 0, 1, 1], [1, 0, 0, -1]]), atol=1e-6)


def test_classes_become_one_hot_vectors():
    x = torch.zeros(4, 2, dtype=torch.float64)
    out = label_vectors(torch.tensor([2, 0, 3, -1]), 3, x)
    assert torch.equal(out, torch.tensor([[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.float64))
    assert torch.equal(label_vectors(None, 3, x), torch.zeros(4, 3, dtype=torch.float64))
    vectors = torch.rand(4, 3)
    assert torch.equal(label_vectors(vectors, 3, x), vectors.double())


@pytest.mark.parametrize(
    "cond, label_dim, message",
    [
        (torch.zeros(4, dtype=torch.int64), 0, "label_dim=0"),
        (torch.zeros(5, dtype=torch.int64), 3, r"int64 \[4\]"),
        (torch.zeros(4), 3, r"int64 \[4\]"),
        (torch.zeros(4, 2), 3, r"float \[4, 3\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(cond, label_dim, message):
    with pytest.raises(UserError, match=message):
        label_vectors(cond, label_dim, torch.zeros(4, 2))
