"""diffusers' network behind our face: its own numbers, LoRA, checkpointing, and configurations of other models."""

import copy

import jaxtyping
import pytest
import torch
from tiny_stable_diffusion import TOKENS, WIDTH, tiny_folder, unet
from torch._dynamo.testing import CompileCounterWithBackend

from onejump.engine import Engine
from onejump.importers.stable_diffusion import read_stable_diffusion
from onejump.model import ConsistencyModel
from onejump.networks.layers import empty_network
from onejump.networks.lora import merged
from onejump.networks.text_unet import TextUNetConfig, our_name, text_config, unet_arguments
from onejump.types import UserError


def inputs(n=3):
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(n, 4, 8, 8, generator=generator), torch.randn(n, TOKENS, WIDTH, generator=generator)
    return x, torch.tensor([0.0, 400.0, 999.0])[:n], text


def ours(lora_rank=0):
    theirs = unet()
    config = text_config(dict(theirs.config) | {"_class_name": "UNet2DConditionModel"}, TOKENS)
    net = TextUNetConfig(**vars(config) | {"lora_rank": lora_rank}).build().eval()
    net.load_state_dict(net.state_dict() | {our_name(name): value for name, value in theirs.state_dict().items()})
    return net, theirs


@torch.no_grad()
def test_it_computes_what_diffusers_does():
    net, theirs = ours()
    x, t, text = inputs()
    assert torch.equal(net(x, t, None, text), theirs(x, t, text).sample)


def test_stable_diffusion_has_the_published_number_of_weights():
    """1.5, and 2.1 with its wider text and more heads."""
    second = TextUNetConfig(num_heads=(5, 10, 20, 20), text_width=1024, linear_projection=True)
    for config, count in ((TextUNetConfig(), 859_520_964), (second, 865_910_724)):
        assert sum(p.numel() for p in empty_network(config).parameters()) == count


def test_the_configuration_goes_to_diffusers_and_back():
    config = TextUNetConfig(num_heads=(5, 10, 20, 20), text_width=1024, linear_projection=True, upcast_attention=True)
    written = unet_arguments(config) | {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "_diffusers_version": "0.8",
    }
    assert text_config({name: list(v) if isinstance(v, tuple) else v for name, v in written.items()}) == config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ({"in_channels": 9}, "inpainting"),
        ({"_class_name": "UNet2DModel"}, "UNet2DModel; UNet2DConditionModel is read"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types"),
        ({"norm_num_groups": 7}, "multiple of norm_groups=7"),
    ],
)
def test_other_networks_are_refused_by_name(changes, told):
    content = unet_arguments(TextUNetConfig()) | {"_class_name": "UNet2DConditionModel"} | changes
    with pytest.raises(UserError, match=told):
        text_config(content)


def test_text_that_is_missing_or_of_another_model_is_refused():
    net, _ = ours()
    x, t, text = inputs()
    for cond, told in (
        (None, "cond: nothing"),
        (text[..., :8], r"a tensor \[3, 12, 8\]"),
        (text[:2], r"\[2, 12, 16\]"),
    ):
        with pytest.raises(UserError, match=told):
            net(x, t, None, cond)
    with pytest.raises(UserError, match="do not fit"):
        net(x[..., :7], t, None, text)


def test_lora_starts_without_effect_and_trains_nothing_else_and_merges():
    net, plain = ours(lora_rank=2), ours()[0]
    net = net[0]
    x, t, text = inputs()
    assert torch.equal(net(x, t, None, text), plain(x, t, None, text))
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    blocks = [name for name, _ in net.named_modules() if name.endswith(("attn1", "attn2"))]
    assert len(blocks) == 2 * 4 and len(trained) == 2 * 4 * len(blocks)
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    with torch.no_grad():
        for name in trained:
            net.get_parameter(name).normal_()
    plain.load_state_dict(merged(net.state_dict()))
    found, changed = net(x, t, None, text), plain(x, t, None, text)
    torch.testing.assert_close(found, changed, rtol=1e-4, atol=1e-4)


def test_checkpointing_by_block_changes_no_gradient():
    plain, _ = ours()
    saving = copy.deepcopy(plain)
    Engine().prepare(ConsistencyModel(saving), checkpointing=True)
    x, t, text = inputs()
    for net in (plain, saving):
        net(x, t, None, text).square().mean().backward()
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_compiled_blocks_are_the_same_function_without_a_graph_break(monkeypatch):
    """Values and gradients, by one graph for each of the three blocks."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = TextUNetConfig(8, 4, (8,), (False,), 1, (2,), WIDTH, TOKENS, norm_groups=4).build()
    fast, counter = ConsistencyModel(copy.deepcopy(plain)), CompileCounterWithBackend("eager")
    Engine(compiled=True, channels_last=True).prepare(fast, backend=counter)
    x, t, text = inputs()
    found, expected = (net(x, t, None, text) for net in (fast.net, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for out in (found, expected):
        out.square().mean().backward()
    for p, q in zip(plain.parameters(), fast.net.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-7
    assert len(plain.blocks) == 3 and counter.frame_count == 3
    torch._dynamo.reset()


def test_the_folders_network_is_read_bit_for_bit():
    saved = read_stable_diffusion(tiny_folder())
    for name, value in unet().state_dict().items():
        assert torch.equal(saved.model.net.get_parameter(our_name(name)), value)
