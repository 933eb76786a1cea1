"""The shipped classifier reads digits it never saw, and detectors say what they are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from onejump.data.digits import digits, digits_split
from onejump.evaluation import digits_classifier, foundation
from onejump.evaluation.detectors import detector_named
from onejump.evaluation.digits_classifier import accuracy, augment, labelled_digits, load_digits_classifier, train
from onejump.evaluation.features import Detector, DigitsDetector, PixelDetector
from onejump.evaluation.foundation import CLIPDetector, DINOv2Detector, centre, published_positions
from onejump.evaluation.statistics import frechet_distance
from onejump.types import UserError


def test_the_shipped_classifier_reads_held_out_digits():
    _, held_out = digits_split()
    assert held_out.n == 360
    assert accuracy(load_digits_classifier(), held_out.images, held_out.labels) >= 0.97


def test_the_classifier_trains_on_the_training_part_of_the_split():
    images, labels, held_out = labelled_digits()
    training, rest = digits_split()
    assert torch.equal(images[~held_out], training.images) and torch.equal(labels[~held_out], training.labels)
    assert torch.equal(images[held_out], rest.images) and torch.equal(labels[held_out], rest.labels)


def test_training_is_deterministic_learns_and_leaves_torchs_generator_alone():
    training, held_out = digits_split()
    state = torch.get_rng_state()
    one, two = (train(training.images, training.labels, epochs=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert accuracy(one, held_out.images, held_out.labels) > 0.5


def test_augmentation_shifts_by_at_most_one_pixel_and_adds_small_noise():
    x = torch.full((400, 1, 8, 8), -1.0)
    x[:, :, 3, 4] = 1
    shifted = (augment(x) > 0).nonzero()[:, 2:]
    assert len(shifted) == 400  # each bright pixel is still one, and noise makes no other
    assert {tuple(place) for place in shifted.tolist()} == {(i, j) for i in (2, 3, 4) for j in (3, 4, 5)}


def test_features_and_probabilities_do_not_depend_on_the_batch(monkeypatch):
    images, model = digits().images[:50], load_digits_classifier()
    whole = model.features(images), model.probabilities(images)
    monkeypatch.setattr(digits_classifier, "BATCH", 7)
    assert torch.allclose(model.features(images), whole[0], atol=1e-5)
    assert torch.allclose(model.probabilities(images), whole[1], atol=1e-5)
    assert torch.allclose(whole[1].sum(1), torch.ones(50))


def test_the_digits_detector_refuses_other_images():
    with pytest.raises(UserError, match="3x32x32"):
        DigitsDetector()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


def test_the_pixel_detector_averages_areas():
    images = torch.randint(0, 256, (3, 2, 16, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = images.double().view(3, 2, 8, 2, 8, 3).mean((3, 5)).flatten(1) / 127.5 - 1
    assert torch.allclose(PixelDetector()(images), expected, atol=1e-12)


def test_detectors_tell_themselves_apart():
    detectors: list[Detector] = [DigitsDetector(), PixelDetector(), PixelDetector(size=4)]
    assert len({detector.hash for detector in detectors}) == len({detector.name for detector in detectors}) == 3
    assert [detector(digits().images[:3]).shape[1] for detector in detectors] == [64, 64, 16]


@pytest.mark.parametrize("detector", [DigitsDetector(), PixelDetector()])
def test_more_noise_is_farther_from_the_digits(detector):
    real = digits().images
    reference = detector(real)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        frechet_distance(detector((real + strength * noise).round().clamp(0, 255).to(torch.uint8)), reference)
        for strength in (0, 16, 48, 96)
    ]
    assert distances == sorted(distances) and distances[0] < 1e-9 < 0.01 < distances[1]


def test_a_missing_detector_says_what_to_fetch_and_from_where(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEJUMP_DETECTORS", str(tmp_path))
    for name, parts in {
        "inception-2048": (
            "95,628,359 bytes",
            "6726825d0af5",
            "github.com/mseitzer/pytorch-fid",
            "inception-2015-12-05.pt",
        ),
        "resnet56": ("resnet56-4bfd9763.th", "3,471,733 bytes", "4bfd97631478", "akamaster/pytorch_resnet_cifar10"),
        "dinov2": ("dinov2-large", "1.22 GB", "399fba97a95f", "huggingface.co/facebook/dinov2-large"),
        "clip": ("clip-vit-base-patch32", "605 MB", "vocab.json", "huggingface.co/openai/clip-vit-base-patch32"),
    }.items():
        with pytest.raises(UserError) as error:
            detector_named(name)
        text = str(error.value)
        assert text.startswith(f"no weights for detector {name}: not in {tmp_path}; give --weights F")
        assert all(part in text for part in parts) and "\n" not in text
    ways_out = f"gone.pth does not exist; give --weights FILE, or put pt_inception-.*pth into {tmp_path}; where"
    with pytest.raises(UserError, match=f"^{tmp_path}/{ways_out} to get it: docs/detectors.md"):
        detector_named("inception-64", tmp_path / "gone.pth")


def test_detectors_are_found_by_name_in_the_folder_or_where_they_are_given(tmp_path, monkeypatch):
    generator, arrays = torch.Generator().manual_seed(0), {}
    for name, shape in (("conv", (32, 3, 3, 3)), ("conv_1", (32, 32, 3, 3)), ("conv_2", (64, 32, 3, 3))):
        arrays |= {f"{name}.weight": torch.randn(shape, generator=generator).numpy(), f"{name}.bias": np.ones(shape[0])}
    path = tmp_path / "inception-2015-12-05.npz"
    np.savez(path, **arrays)
    monkeypatch.setenv("ONEJUMP_DETECTORS", str(tmp_path))
    found = [detector_named("inception-64", place) for place in (None, tmp_path, path)]
    assert len({detector.hash for detector in found}) == 1 and {d.name for d in found} == {"inception-64"}
    assert isinstance(detector_named("digits"), DigitsDetector) and isinstance(detector_named("pixels"), PixelDetector)
    with pytest.raises(UserError, match="detector: 'fid'; choose one of inception-2048, inception-768"):
        detector_named("fid")
    with pytest.raises(UserError, match="detector pixels needs no weights"):
        detector_named("pixels", path)


def test_foundation_detectors_need_the_library_and_every_file(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(foundation, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'onejump.foundation.'"):
        detector_named("dinov2", tmp_path)
    monkeypatch.setattr(foundation, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="has no model.safetensors; give a folder clip-vit-base-patch32"):
        detector_named("clip", tmp_path)


def test_dinov2s_positions_are_sampled_where_its_own_code_samples_them():
    n, places = 37, 16
    rows, columns = torch.meshgrid(torch.arange(n).float(), torch.arange(n).float(), indexing="ij")
    grid = torch.stack([rows, columns], -1).view(1, n * n, 2)
    found = published_positions(torch.cat([torch.full((1, 1, 2), 7.0), grid], 1), places)
    assert torch.equal(found[:, 0], torch.full((1, 2), 7.0))
    at = (torch.arange(places) + 0.5) * n / (places + 0.1) - 0.5  # a ramp is read off where it is sampled
    inner = found[:, 1:].view(places, places, 2)[1:-1, 1:-1]
    expected = torch.stack(torch.meshgrid(at[1:-1], at[1:-1], indexing="ij"), -1)
    torch.testing.assert_close(inner, expected, rtol=0, atol=0.05)
    assert (inner - expected).abs().mean() < (inner - expected * 16.1 / 16).abs().mean() / 3
    assert torch.equal(published_positions(grid[:, :10], 3), grid[:, :10])  # as many places as trained: untouched


@pytest.fixture
def dinov2_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 42, "patch_size": 14}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**shape))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(tmp_path / "dinov2-large")
    return tmp_path / "dinov2-large", model.eval()


def test_dinov2_gives_the_class_token_of_images_squeezed_by_pillow(dinov2_folder, monkeypatch):
    folder, model = dinov2_folder
    images = torch.randint(0, 256, (3, 3, 20, 30), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    squeezed = [Image.fromarray(x.permute(1, 2, 0).numpy()).resize((42, 42), Image.Resampling.BICUBIC) for x in images]
    pixels = torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) / 255 for x in squeezed])
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    with torch.no_grad():
        expected = model(pixel_values=pixels).pooler_output
    found = DINOv2Detector(folder, side=42, batch=2)(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert DINOv2Detector(folder)(images).shape == (3, 16)
    monkeypatch.setenv("ONEJUMP_DETECTORS", str(folder.parent))
    assert detector_named("dinov2").hash == detector_named("dinov2", folder).hash
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="dinov2-large: transformers cannot read it"):
        detector_named("dinov2", folder)


@pytest.fixture
def clip_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh")]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 9, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 16}, projection_dim=8
    )
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return tmp_path, model.eval()


def test_clip_embeds_images_and_texts_and_scores_pairs(clip_folder):
    folder, model = clip_folder
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
    tokens = torch.tensor([[0, 10, 11, 1], [0, 12, 1, 1]])  # "a b", "c": begin, words, end, padded
    with torch.no_grad():
        output = model(input_ids=tokens, pixel_values=pixels, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    detector = CLIPDetector(folder, batch=1)
    for found, expected in (
        (detector(images), output.image_embeds),
        (detector.texts(["a b", "c"]), output.text_embeds),
    ):
        torch.testing.assert_close(torch.nn.functional.normalize(found), expected, rtol=1e-4, atol=1e-5)
    cosine = (output.image_embeds * output.text_embeds).sum(1)
    torch.testing.assert_close(detector.score(images, ["a b", "c"]), 100 * cosine.clamp(min=0), rtol=1e-4, atol=1e-3)
    assert detector.texts(["a " * 50]).shape == (1, 8)  # longer than the network knows: cut
    with pytest.raises(UserError, match="2 images and 1 texts"):
        detector.score(images, ["a"])


def test_clip_cuts_the_middle_of_a_wide_image():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    assert (centre(wide, 32) == 255).mean() > 0.9 and centre(wide, 16).shape == centre(wide[:, :20], 16).shape
