"""Captioned shards to captioned latents, and what training gets of them."""

import json
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import pictures, said
from tiny_stable_diffusion import changed_folder, shard, tiny_folder, vae

from onejump.cli import main
from onejump.data.captions import read_caption, write_captions
from onejump.data.decode import Decoding
from onejump.data.load import as_source, decoded
from onejump.data.open import open_training_set
from onejump.data.prepare_text import prepare_text
from onejump.data.text_parts import autoencoder, text_encoder
from onejump.data.text_set import TextSet
from onejump.types import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    shard(folder / "00000.tar", 20)
    shard(folder / "00001.tar", 10, first=20)
    return folder


@pytest.fixture(scope="module")
def latents(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "latents"
    prepare_text(shards, out, tiny_folder(), Decoding())
    return out


@torch.no_grad()
def test_latents_are_those_of_diffusers_autoencoder_and_captions_stay_with_them(shards, latents):
    data = open_training_set(latents)
    assert isinstance(data, TextSet) and (data.n, data.shape, data.classes) == (30, (4, 8, 8), 0)
    images = [pixels for _, pixels in decoded(as_source(shards), Decoding(False, 16), None)]
    x = torch.from_numpy(np.stack(images)).float() / 127.5 - 1
    found = vae().encode(x).latent_dist
    stored = data.pick(torch.arange(30)).float()
    torch.testing.assert_close(stored, torch.cat([found.mean, found.std], 1), rtol=2e-3, atol=2e-3)
    assert data.captions(torch.tensor([0, 19, 20, 29])) == ["number 0", "number 19", "number 20", "number 29"]


def test_a_step_is_scaled_latents_drawn_anew_and_the_embeddings_of_their_captions(latents):
    data = open_training_set(latents)
    x0, text = data.batch(3, 10, seed=1)
    order = np.concatenate([data.feeder.take(_step(data, step))[1] for step in range(3)])
    assert sorted(order.tolist()) == list(range(30))
    stored, index = data.feeder.take(_step(data, 3))
    assert torch.equal(text, text_encoder(tiny_folder(), CPU)(data.captions(index)))
    mean, std = stored.float().chunk(2, 1)
    eps = (x0 / 0.18215 - mean) / std
    assert abs(eps.mean()) < 0.1 and eps.std() == pytest.approx(1, abs=0.05)
    again = data.batch(3, 10, seed=1)
    assert torch.equal(again[0], x0) and torch.equal(again[1], text)
    assert not torch.equal(data.batch(6, 10, seed=1)[0], x0)


def test_two_processes_see_the_samples_of_one(latents):
    data = open_training_set(latents)
    whole, halves = data.batch(1, 8, 5), [data.batch(1, 4, 5, rank, 2) for rank in range(2)]
    for kind in range(2):
        for rank in range(2):
            torch.testing.assert_close(halves[rank][kind], whole[kind][rank::2], rtol=1e-5, atol=1e-5)


def _step(data, step):
    from onejump.data.image_set import Step

    return Step(data.n, step, 10, 1)


@torch.no_grad()
def test_decoding_gives_images_of_diffusers_autoencoder(latents):
    data = open_training_set(latents)
    z = data.pick(torch.arange(9)).float()[:, :4]
    images = autoencoder(tiny_folder(), CPU).decode(z * 0.18215)
    torch.testing.assert_close(images, vae().decode(z).sample, rtol=1e-4, atol=1e-5)


def test_preparing_resumes_and_a_finished_part_is_not_made_again(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("onejump.data.prepare_text.PART", 8)
    whole, out = tmp_path / "whole", tmp_path / "out"
    prepare_text(shards, whole, tiny_folder(), Decoding())

    def stop(done, total):
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_text(shards, out, tiny_folder(), Decoding(), progress=stop)
    assert not (out / "text.json").exists() and len(list(out.glob("part-*.npy"))) == 2
    assert prepare_text(shards, out, tiny_folder(), Decoding()).kept_parts == 2
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="holds something else"):
        prepare_text(shards, out, tiny_folder(), Decoding(None, 32))


def test_captions_that_are_missing_are_refused_or_left_out(tmp_path, capsys):
    shard(tmp_path / "a.tar", 6, without=(2, 4))
    line = said(capsys, ["data", "prepare", tmp_path / "a.tar", tmp_path / "out", "--vae", tiny_folder()], 1)
    assert "the caption of a/000000002.jpg in" in line and "is missing" in line and "--skip-bad" in line
    command = ["data", "prepare", tmp_path / "a.tar", tmp_path / "out", "--vae", tiny_folder(), "--skip-bad"]
    assert main([str(word) for word in command]) == 0
    out, _ = capsys.readouterr()
    assert "4 latents of 4x8x8 with captions, 2 left out" in out and "000000004.jpg" in out
    data = open_training_set(tmp_path / "out")
    assert data.captions(torch.arange(4)) == ["number 0", "number 1", "number 3", "number 5"]
    pictures(tmp_path / "none", 3)
    line = said(capsys, ["data", "prepare", tmp_path / "none", tmp_path / "no", "--vae", tiny_folder()], 1)
    assert "no captions; give each a .txt" in line


def test_what_cannot_be_prepared_is_one_line(shards, tmp_path, capsys):
    for words, told in (
        ((shards, tmp_path / "out", "--vae", tmp_path), "model_index.json: cannot be read"),
        ((shards, tmp_path / "out.zip", "--vae", tiny_folder()), "are a folder; name one, without .zip"),
    ):
        assert told in said(capsys, ["data", "prepare", *words], 2)
    line = said(capsys, ["data", "prepare", shards, tmp_path / "out", "--vae", tiny_folder(), "--size", "17"], 1)
    assert "--size 17: a multiple of 2" in line


def test_a_damaged_or_moved_set_says_so(latents, tmp_path):
    copy = shutil.copytree(latents, tmp_path / "copy")
    (copy / "part-000000.npy").write_bytes((latents / "part-000000.npy").read_bytes()[:-900])
    with pytest.raises(UserError, match=r"part-000000.npy is damaged"):
        open_training_set(copy).pick(torch.tensor([29]))
    about = json.loads((latents / "text.json").read_text())
    (copy / "text.json").write_text(json.dumps(about | {"stable_diffusion": str(tmp_path / "gone")}))
    with pytest.raises(
        UserError, match="its Stable Diffusion, .*gone, is gone; bring it back, or name the folder anew"
    ):
        open_training_set(copy).encoder("cpu")
    other = changed_folder(tmp_path, "text_encoder/config.json", layer_norm_eps=0.1)
    (copy / "text.json").write_text(json.dumps(about | {"stable_diffusion": str(other)}))
    with pytest.raises(UserError, match="another than it was made with"):
        open_training_set(copy).encoder("cpu")
    (copy / "text.json").write_text("{}")
    with pytest.raises(UserError, match=r"text.json: damaged"):
        open_training_set(copy)


TEXTS = ["a dog", "", "zwei\nZeilen: \u00fc", "\u72ac \U0001f415", "x" * 70_000]


def test_any_caption_is_read_alone_and_a_damaged_file_is_one_line(tmp_path):
    file = tmp_path / "part-000000.captions"
    with open(file, "wb") as stream:
        write_captions(stream, TEXTS)
    assert [read_caption(file, len(TEXTS), k) for k in (4, 2, 0, 3, 1)] == [TEXTS[k] for k in (4, 2, 0, 3, 1)]
    whole = file.read_bytes()
    for damage in (whole[:-1], whole[:50], b"", b"\xff" * len(whole), whole.replace(b"dog", b"cat")):
        file.write_bytes(damage)
        told = []
        for k in range(5):
            try:
                assert read_caption(file, 5, k) == TEXTS[k]
            except UserError as error:
                told.append(str(error))
        assert told and all(f"{file} is damaged" in line and "\n" not in line for line in told)
    file.unlink()
    with pytest.raises(UserError, match="part-000000.captions cannot be read .No such file.* prepare the latents"):
        read_caption(file, 5, 0)


def test_captions_of_a_large_set_are_never_in_memory_together(shards, tmp_path, monkeypatch):
    """Neither while they are prepared, part by part, nor in training."""
    monkeypatch.setattr("onejump.data.prepare_text.PART", 2)
    long = {f"{k:09d}": f"{k} " + "wort " * 20_000 for k in range(30)}  # 3 MB in all
    source = as_source(shards)
    monkeypatch.setattr(
        "onejump.data.prepare_text.as_source",
        lambda path, bad: replace(source, caption=lambda name: long[name.rsplit("/")[-1][:9]]),
    )
    prepare_text(shards, tmp_path / "once", tiny_folder(), Decoding())  # what is imported and kept for good
    tracemalloc.start()
    prepare_text(shards, tmp_path / "out", tiny_folder(), Decoding())
    data = open_training_set(tmp_path / "out")
    for k in torch.randperm(30).tolist():
        assert data.captions(torch.tensor([k])) == [long[f"{k:09d}"].strip()]
    assert tracemalloc.get_traced_memory()[1] < 1_500_000
    tracemalloc.stop()
    a, b = (json.loads((tmp_path / name / "text.json").read_text())["fingerprint"] for name in ("once", "out"))
    long["000000029"] = "another"
    prepare_text(shards, tmp_path / "other", tiny_folder(), Decoding())
    assert a == b != json.loads((tmp_path / "other" / "text.json").read_text())["fingerprint"]
