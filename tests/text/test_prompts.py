"""Prompts: files of them, what is too long, and what their images depend on."""

import json

import pytest
import torch
from tiny_stable_diffusion import TOKENS, tiny_folder

from onejump.data.text_parts import autoencoder, text_encoder
from onejump.distributed import Team
from onejump.generate import by_share
from onejump.importers.stable_diffusion import open_model
from onejump.parts import Generated
from onejump.prompts import prompts_for, read_prompts
from onejump.types import UserError

CPU = torch.device("cpu")


def test_files_of_prompts_are_read(tmp_path):
    captions = [(7, 3, "b"), (2, 9, "c"), (7, 1, " a "), (2, 11, "d")]
    coco = {"annotations": [{"image_id": i, "id": k, "caption": text} for i, k, text in captions]}
    for name, content, expected in (
        ("a.txt", "a dog\n\n  robot, 4k \n", ("a dog", "robot, 4k")),
        ("a.json", json.dumps(["x", "y"]), ("x", "y")),
        ("captions.json", json.dumps(coco), ("c", "a")),
    ):
        (tmp_path / name).write_text(content)
        assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", b"", "no prompts in it; give one a line"),
        ("blank.txt", b" \n\n", "no prompts in it"),
        ("none.json", b"[]", "no prompts in it"),
        ("numbers.json", b"[1, 2]", "no file of prompts"),
        ("other.json", b'{"a": 1}', "no file of prompts"),
        ("bytes.txt", b"\xff\xfe\x00", "no file of prompts"),
    ],
)
def test_files_without_prompts_are_refused(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_prompts(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "gone.txt")


def test_a_prompt_that_is_too_long_is_cut_with_one_warning(capsys):
    folder = tiny_folder()
    text_encoder.cache_clear()
    capsys.readouterr()
    encoder = text_encoder(folder, CPU)
    fits, long = "b" * (TOKENS - 2), "b" * (TOKENS - 2) + "cdefg"
    assert encoder([fits]).shape == (1, TOKENS, 16) and capsys.readouterr().err == ""
    cut, again = encoder([long, "a"])[0], encoder([long])[0]
    assert torch.equal(cut, again)
    found = encoder.tokenizer([long], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(encoder.network(found.input_ids).last_hidden_state[0], again)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"has {TOKENS + 5} tokens; the encoder reads {TOKENS}" in err


def test_an_image_depends_on_its_own_prompt_and_number_alone():
    saved = open_model(tiny_folder())
    prompts = prompts_for(saved, ["a", "dog", "c"])
    sampler = saved.sampler
    images = Generated(saved, sampler, 2, None, 7, prompts=prompts)([0, 1, 2])
    assert images.shape == (3, 3, 16, 16) == (3, *prompts.image_shape(saved))
    alone = Generated(saved, sampler, 2, None, 7, batch=1, prompts=prompts)([1])
    assert torch.equal(alone[0], images[1])
    other = Generated(saved, sampler, 2, None, 7, prompts=prompts_for(saved, ["a", "cat", "c"]))([0, 1, 2])
    assert torch.equal(other[0], images[0]) and not torch.equal(other[1], images[1])


def test_the_share_of_a_process_holds_the_very_images_of_one_process_alone():
    """By blocks of 8: of 20 images and two processes the first has 0 to 7 and 16 to 19."""
    saved = open_model(tiny_folder())
    made = Generated(saved, saved.sampler, 2, None, 7, prompts=prompts_for(saved, [f"dog {k}" for k in range(20)]))
    texts, whole = made.prompts.embeddings(range(20)), made(range(20))
    for mine in ([*range(8), *range(16, 20)], range(8, 16), [19], [3, 11, 3]):
        assert torch.equal(made.prompts.embeddings(mine), texts[list(mine)])
        assert torch.equal(made(mine), whole[list(mine)])
    alone = by_share(Team(), 20, made.prompts.image_shape(saved), 8, made)
    assert torch.equal(alone, whole) and not torch.equal(whole[0], whole[8])


@torch.no_grad()
def test_images_are_the_autoencoders_of_the_sampled_latents():
    from onejump.samplers import noise_for

    saved = open_model(tiny_folder())
    prompts = prompts_for(saved, ["a", "dog"])
    images = Generated(saved, saved.sampler, 3, None, 0, prompts=prompts)([0, 1])
    noise = noise_for([0, 1], saved.shape, 1, 0)
    latents = saved.sampler(saved.model, noise, 3, text_encoder(tiny_folder(), CPU)(["a", "dog"]))
    pixels = autoencoder(tiny_folder(), CPU).decode(latents) * 127.5 + 127.5
    assert (images.float() - pixels.clamp(0, 255)).abs().max() <= 0.51


def test_models_that_read_no_text_refuse_prompts():
    from onejump.networks.mlp import MLPConfig
    from onejump.samplers import Multistep
    from onejump.saved import ConsistencyModel, SavedModel

    network = MLPConfig((1, 4, 4))
    saved = SavedModel(ConsistencyModel(network.build()), network, Multistep(), (1, 4, 4))
    with pytest.raises(UserError, match="reads no text"):
        prompts_for(saved, ["a"])
