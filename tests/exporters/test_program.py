"""torch.export's graphs of every network and sampler make our images; what cannot become a graph is refused."""

import json
from dataclasses import replace

import jaxtyping
import pytest
import torch
from generator_setup import MLP, SHALLOW, images_of, largest, noise_and_classes, saved_model

from onejump.exporters.generator import GeneratorGraph, difference, draft_of, traced
from onejump.exporters.program import export_program
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.precond import Euler
from onejump.samplers import ODE, Jumps, Multistep, Trajectory
from onejump.saved import model_sha256, save_model
from onejump.types import UserError

CTM = replace(MLP, second_time="random")


@pytest.fixture
def untyped(monkeypatch):
    """Checks of annotations cannot be traced."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def check(saved, steps, program):
    """Its outputs at two sizes of the batch, neither of which it was made or checked with."""
    for batch in (4, 7):
        noise, classes = noise_and_classes(saved, steps, batch)
        images, pixels = program(noise, classes)
        ours = images_of(saved, steps, noise, classes)
        assert largest(images - ours) < 1e-6
        assert largest(pixels.float() - (ours + 1) * 127.5) < 0.501


def test_the_program_read_back_makes_our_images(tmp_path, untyped):
    """Two jumps of CTM. The file knows them; dropout, on when it was written, is not in it."""
    saved, path = saved_model(CTM, Trajectory(sigma_max=20.0, gamma=0.3), Euler()), tmp_path / "x.pt2"
    made = export_program(saved, str(path), 2)
    about = {"onejump.json": ""}
    program = torch.export.load(path, extra_files=about)
    check(saved, 2, program.module())
    assert json.loads(about["onejump.json"]) == made.facts
    save_model(tmp_path / "model", saved)
    assert made.facts["sha256"] == model_sha256(tmp_path / "model")
    assert json.loads(made.facts["times"]) == saved.sampler.times(2)
    assert json.loads(made.facts["ends"]) == saved.sampler.ends(2)
    assert not any("rand" in str(node.target) or "bitwise" in str(node.target) for node in program.graph.nodes)
    assert made.files == (path,) and not list(tmp_path.glob(".*")) and made.difference < 1e-6


UNETS = [
    ADMUNetConfig(**SHALLOW, attn_resolutions=(2,), head_channels=4),
    EDM2UNetConfig(**SHALLOW | {"channel_mult": (1,)}, attn_resolutions=(4,), channels_per_head=4),
]


@pytest.mark.parametrize("network", UNETS, ids=["adm", "edm2"])
def test_other_unets_become_graphs(network, untyped):
    saved = saved_model(network)
    check(saved, 1, traced(GeneratorGraph(saved), saved).module())


@pytest.mark.parametrize(
    "network, jump, sampler, steps",
    [
        (MLP, None, Multistep(mid=(2.0, 0.5)), 1),
        (MLP, None, Multistep(mid=(2.0, 0.5)), 3),
        (CTM, Euler(), Jumps((20.0, 4.0), (2.0, 0.002)), 2),
        (CTM, Euler(), Trajectory(sigma_max=20.0), 3),
    ],
)
def test_a_graph_is_the_sampler_at_its_times(network, jump, sampler, steps):
    saved = saved_model(network, sampler, jump)
    check(saved, steps, GeneratorGraph(saved, steps).eval())


@pytest.mark.parametrize(
    "sampler, t_min, steps, message",
    [
        (ODE(), 0.0, 1, "sampler: ODE; .*diffusion model: distil it first"),
        (Multistep(), 1.0, 2, "times: 0.821 is below t' = 1,"),
        (Multistep(), 1.0, 3, "steps: 3; this model stores times for 1 to 2 steps"),
        (Multistep(), 0.0, 0, "steps: 0; this model stores times for 1 to 2 steps"),
    ],
)
def test_what_the_sampler_does_not_do_is_refused(sampler, t_min, steps, message):
    with pytest.raises(UserError, match=message):
        GeneratorGraph(saved_model(MLP, sampler, t_min=t_min), steps)


@pytest.mark.parametrize(
    "change",
    [
        lambda images, pixels: (images * 1.0002, pixels),
        lambda images, pixels: (images.where(images < images.max(), torch.nan), pixels),
        lambda images, pixels: (images, (pixels.int() + 2).clamp(0, 255).to(torch.uint8)),
    ],
    ids=["scaled", "not a number", "levels"],
)
def test_another_image_is_refused(change):
    saved = saved_model(MLP)
    graph = GeneratorGraph(saved).eval()
    assert difference(graph, saved, lambda given: graph(*given), "test") == 0
    with pytest.raises(UserError, match="not written: in test the images differ"):
        difference(graph, saved, lambda given: change(*graph(*given)), "test")


def test_nothing_is_left_of_what_was_refused(tmp_path):
    with pytest.raises(UserError), draft_of(tmp_path / "x.pt2") as draft:
        draft.write_bytes(b"1")
        raise UserError("refused")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not write"), draft_of(tmp_path / "file/x.pt2"):
        pass
