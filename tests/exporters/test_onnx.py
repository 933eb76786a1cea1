"""The file, run by onnxruntime, makes the images that the sampler makes."""

import importlib.util
import json

import jaxtyping
import pytest
import torch
from generator_setup import MLP, SHALLOW, images_of, largest, noise_and_classes, saved_model

from onejump.exporters.onnx import export_onnx
from onejump.networks.song_unet import SongUNetConfig
from onejump.types import UserError


def test_a_unet_in_onnxruntime_makes_our_images(tmp_path, monkeypatch):
    """NCSN++: its filters, Fourier features, attention and group norms; one step; any batch; nothing of dropout."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    saved, path = saved_model(SongUNetConfig(**SHALLOW, attn_resolutions=(), variant="ncsnpp")), tmp_path / "new/x.onnx"
    made = export_onnx(saved, str(path))
    session = runtime.InferenceSession(path)
    for batch in (2, 5):
        noise, classes = noise_and_classes(saved, 1, batch)
        images, pixels = session.run(["images", "pixels"], {"noise": noise.numpy(), "classes": classes.numpy()})
        ours = images_of(saved, 1, noise, classes)
        assert largest(torch.from_numpy(images) - ours) < 2e-6
        assert largest(torch.from_numpy(pixels).float() - (ours + 1) * 127.5) < 0.501
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("noise", ["batch", 3, 4, 4]), ("classes", ["batch"])]
    facts = session.get_modelmeta().custom_metadata_map
    assert (facts["sampler"], json.loads(facts["times"]), facts["network"]) == ("Multistep", [80.0], "SongUNet")
    assert (facts["licence"], json.loads(facts["class_names"])) == ("CC0-1.0", ["a", "b", "c"])
    assert made.files == (path,) and list(path.parent.iterdir()) == [path] and made.difference < 2e-6


def test_without_the_packages_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnxruntime not installed; pip install 'onejump\[onnx\]'"):
        export_onnx(saved_model(MLP), tmp_path / "x.onnx")
