"""`onejump export` writes what makes the images of `onejump sample`, and refuses the rest in one line."""

import re

import jaxtyping
import numpy as np
import pytest
import torch
from tiny_run import arrays, finished_run, said

from onejump.cli import main
from onejump.cli_export import kind_of
from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.samplers import ODE, Multistep, noise_for
from onejump.saved import SavedModel, save_model
from onejump.types import UserError

CLASSES = torch.arange(6) % 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("export"))


def export(*words):
    return main(["export", *map(str, words)])


def spoken(capsys, patterns):
    """Every line of the answer, in its order."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.match(pattern, line), line


def levels_off(pixels, run, tmp_path, steps):
    """By how many of 255 levels these images of the noise of 0 ... 5 differ from those of `onejump sample`."""
    sampled, _ = arrays(run, tmp_path / "x.npz", "--n", "6", "--steps", str(steps))
    return np.abs(np.moveaxis(np.asarray(pixels), 1, -1).astype(int) - sampled).max()


GRAPH = [
    r"Checked: in \w+(\.\w+)? the images equal ours to \d\.\de.\d\d, in batches of 1 and 3",
    "Sampler: times 80, 1",
    r"Inputs:  noise float32 \[2, batch, 1, 8, 8\], standard normal",
    r"         classes int64 \[batch\], 0 to 9",
    r"Outputs: images float32 \[batch, 1, 8, 8\] in \[-1, 1\]",
    r"         pixels uint8 \[batch, 1, 8, 8\], the same",
]


def test_onnx_makes_the_digits_of_sample(run, tmp_path, capsys, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    out = tmp_path / "digits.onnx"
    assert export(run, out, "--steps", 2) == 0
    spoken(
        capsys,
        [
            "Making the graph of 2 steps",
            "Written: .*digits.onnx",
            *GRAPH,
            r"To use it \(import numpy as np, onnxruntime\)",
            *[" +"] * 3,
        ],
    )
    given = {"noise": noise_for(range(6), (1, 8, 8), 2).numpy(), "classes": CLASSES.numpy()}
    assert levels_off(runtime.InferenceSession(out).run(["pixels"], given)[0], run, tmp_path, 2) <= 1


def test_the_three_lines_that_are_printed_run(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    out = tmp_path / "new" / "digits.pt2"
    assert export(run, out) == 0
    *_, title, first, second, third = capsys.readouterr().out.splitlines()
    names = {}
    exec(
        "\n".join([title.removeprefix("To use it (").removesuffix("):"), *map(str.strip, (first, second, third))]),
        names,
    )
    assert names["images"].shape == (4, 1, 8, 8) and names["pixels"].dtype == torch.uint8
    _, pixels = names["generator"](noise_for(range(6), (1, 8, 8))[0], CLASSES)
    assert levels_off(pixels, run, tmp_path, 1) <= 1


def test_a_single_file_is_the_same_model_and_its_lines_run(run, tmp_path, capsys):
    out = tmp_path / "digits.safetensors"
    assert export(run, out) == 0
    text = capsys.readouterr().out
    *_, title, first, second, third = text.splitlines()
    assert "Checked: read back, every weight is the same bit for bit" in text
    before, _ = arrays(run, tmp_path / "a.npz", "--n", "16")
    names = {}
    exec(
        "\n".join([title.removeprefix("To use it (").removesuffix("):"), *map(str.strip, (first, second, third))]),
        names,
    )
    assert (np.moveaxis(names["images"].numpy(), 1, -1) == before).all()
    capsys.readouterr()
    assert "is there already" in refused(capsys, run, out)


def test_the_lines_for_a_single_file_run_for_a_diffusion_model(tmp_path, capsys):
    network = MLPConfig(shape=(1, 2, 2), width=8, depth=1)
    save_model(tmp_path / "m", SavedModel(ConsistencyModel(network.build()), network, ODE(), (1, 2, 2)))
    assert export(tmp_path / "m", tmp_path / "m.safetensors") == 0
    *_, title, first, second, third = capsys.readouterr().out.splitlines()
    names = {}
    exec(
        "\n".join([title.removeprefix("To use it (").removesuffix("):"), *map(str.strip, (first, second, third))]),
        names,
    )
    assert names["images"].shape == (16, 1, 2, 2) and names["images"].dtype == torch.uint8


def test_a_diffusers_folder_holds_every_weight(tmp_path, capsys):
    network = SongUNetConfig(4, 3, 0, model_channels=8, channel_mult=(1,), num_blocks=0, attn_resolutions=())
    model = ConsistencyModel(network.build())
    save_model(tmp_path / "model", SavedModel(model, network, Multistep(), (3, 4, 4)))
    assert export(tmp_path / "model", tmp_path / "folder") == 0
    out = capsys.readouterr().out
    assert "Checked: read back" in out and "onejump[diffusers], because SongUNet is not diffusers' U-Net" in out
    assert (tmp_path / "folder" / "model_index.json").exists()


def refused(capsys, *words):
    return said(capsys, ["export", *words], 2)


def test_mistakes_are_one_line_before_any_work(run, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    assert "no such file or folder" in refused(capsys, tmp_path / "nothing", tmp_path / "x.pt2")
    assert "the kind .pth is not known; end it with .onnx" in refused(capsys, run, tmp_path / "x.pth")
    assert "--to program writes a file *.pt2; name one" in refused(capsys, run, tmp_path / "x", "--to", "program")
    assert "invalid choice: 'onxx'" in refused(capsys, run, tmp_path / "x", "--to", "onxx")
    assert "this folder is not empty" in refused(capsys, run, full)
    assert "is a file; name a folder" in refused(capsys, run, full / "file")
    assert "is a file; name a folder that exists" in refused(capsys, run, full / "file" / "x.pt2")
    (full / "x.pt2").mkdir()
    assert "is a folder; name a file" in refused(capsys, run, full / "x.pt2")
    assert "--steps: goes with OUT.onnx and OUT.pt2" in refused(capsys, run, tmp_path / "x", "--steps", 2)
    assert "network: MLPConfig; diffusers" in refused(capsys, run, tmp_path / "x")
    assert "steps: 0; this model stores times" in refused(capsys, run, tmp_path / "x.pt2", "--steps", 0)
    assert "or give --times" in refused(capsys, run, tmp_path / "x.pt2", "--steps", 3)
    assert "times: 0.5 is below t' = " in refused(capsys, run, tmp_path / "x.pt2", "--times", "80,0.5")
    assert "this is a model itself" in refused(capsys, run, run / "stage2/model/model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_diffusion_model_is_no_graph(tmp_path, capsys):
    network = MLPConfig(shape=(1, 4, 4), width=8, depth=1)
    saved = SavedModel(ConsistencyModel(network.build()), network, ODE(), (1, 4, 4))
    save_model(tmp_path / "model", saved)
    assert "sampler: ODE; one graph is made of models" in refused(capsys, tmp_path / "model", tmp_path / "x.pt2")


def test_kinds_by_name(tmp_path):
    names = {
        "a.onnx": "onnx",
        "a.PT2": "program",
        "b/a.safetensors": "safetensors",
        "a": "diffusers",
        "v1.5": "diffusers",
    }
    for name, kind in names.items():
        assert kind_of(tmp_path / name, None) == kind_of(tmp_path / name, kind) == kind
    assert kind_of(tmp_path / "my.model", "diffusers") == "diffusers"
    with pytest.raises(UserError, match="--to diffusers writes a folder; name one"):
        kind_of(tmp_path / "a.onnx", "diffusers")
