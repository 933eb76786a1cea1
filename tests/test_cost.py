"""What a network costs, against published tables, hand counts and the allocations of real passes."""

import math

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from onejump.cost import Live, bytes_of, cost_of, counting_kept, flops_of, gflop, in_words
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig

SONG = SongUNetConfig(16, 3, 5, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
ADM = ADMUNetConfig(16, 3, 0, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))


@pytest.mark.parametrize(
    ("network", "parameters", "gmac"),
    [
        (SongUNetConfig(), 55_732_739, 21.19),
        (ADMUNetConfig(label_dim=1000), 295_899_267, 109.66),
        (EDM2UNetConfig(), 280_209_253, 100.80),
    ],
)
def test_flops_and_parameters_are_those_of_the_published_networks(network, parameters, gmac):
    with torch.device("meta"):
        net = network.build()
        assert sum(p.numel() for p in net.parameters()) == parameters and bytes_of(net) == 4 * parameters
        assert flops_of(net, network) / 2e9 == pytest.approx(gmac, abs=0.005)


def hand_count(net, network, attending, tokens):
    """2 FLOPs for each weight of each output pixel; attention's two products are 4 n^2 c."""
    found = []

    def count(module, inputs, out):
        pixels = out[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        found.append(2 * module.weight.numel() * pixels)

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    net(torch.zeros(1, 3, 16, 16), torch.ones(1))
    return sum(found) + sum(4 * tokens**2 * channels for channels in attending)


@pytest.mark.parametrize(("network", "attending"), [(SONG, [32, 32, 32]), (ADM, [64] * 4)])
def test_flops_are_those_counted_by_hand(network, attending):
    assert cost_of(network, 3).flops == hand_count(network.build(), network, attending, 64)


def test_flops_of_an_mlp_are_its_weights_twice():
    network = MLPConfig((1, 4, 4), width=8, depth=2)
    weights = 34 * 8 + 16 * 8 + 2 * (3 * 8 * 8) + 8 * 16  # embedding, first, blocks, last
    assert cost_of(network, 7).flops == 2 * weights


def allocated(run):
    """What `run` has allocated and not freed, and the most that it held at once, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        alive = run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    del alive
    return sum(sizes), max(sum(sizes[: k + 1]) for k in range(len(sizes)))


@pytest.mark.parametrize("network", [SONG, ADM])
def test_memory_is_what_a_real_pass_allocates(network):
    net, batch = network.build(), 16
    x, t = torch.randn(batch, 3, 16, 16), torch.ones(batch)
    cost = cost_of(network, batch)
    grown, _ = allocated(lambda: net.train()(x, t))
    assert abs(cost.kept - grown) < 1024  # kept: x, which was there before; grown: the output, of the same size
    with torch.no_grad():
        _, peak = allocated(lambda: net.eval()(x, t))
    assert 0.85 * peak < cost.maps - x.nbytes <= peak  # the rest is the workspace of kernels


def test_memory_of_passes_is_proportional_to_the_batch():
    one, many = cost_of(SONG, 1), cost_of(SONG, 12)
    assert (12 * one.kept, 12 * one.maps) == pytest.approx((many.kept, many.maps), rel=1e-3)
    assert many.training == 5 * many.weights + many.kept and many.sampling == many.weights + many.maps


def test_weights_and_views_are_not_counted_as_kept_twice():
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(16, 8)
    kept: dict[int, int] = {}
    with counting_kept(kept, layer):
        h = torch.tanh(layer(x))  # keeps x for the weight, its result for tanh
        (h[:8].exp() * h[8:]).sum()  # keeps the result of exp, and h again
    assert sum(kept.values()) == x.nbytes + h.nbytes + h[:8].nbytes


def test_live_bytes_follow_what_is_made_and_dropped():
    with Live() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100).add(1)
        b.mul_(2)
        del a
        assert (live.now, live.peak) == (4000, 8000)
        c = torch.cat([b, b])
        del b, c
    assert (live.now, live.peak) == (0, 12000)


def test_numbers_are_written_with_their_unit():
    assert (in_words(3 * 2**20), in_words(5.5 * 2**30)) == ("3.0 MiB", "5.50 GiB")
    assert [gflop(f) for f in (42_380_427_264, 803_919_814_656, 8128, 0)] == ["42.38", "803.9", "0.000008", "0"]
    assert math.isclose(float(gflop(1_234_567_890)), 1.235)
