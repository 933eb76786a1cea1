"""Shards -> latents -> stage 1 -> stage 2 -> samples -> evaluation, by the commands, on a tiny Stable Diffusion."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import record, said
from tiny_stable_diffusion import clip_folder, shard, tiny_folder

from onejump.cli import main
from onejump.data.open import open_training_set
from onejump.importers.stable_diffusion import open_model
from onejump.recipes.text import at_levels, tcm_sd15
from onejump.saved import load_model, save_model
from onejump.teacher import load_teacher

SMALL = ["log_every=1", "save_every=1", "sample_every=0", "evaluate_every=0", "stage1.batch=4", "stage1.micro_batch=0"]
SMALL += [
    f"{s}.{field}" for s in ("stage1", "stage2") for field in ("steps=2", "precision=fp32", "checkpointing=false")
]
SMALL += ["stage2.batch=8", "stage2.micro_batch=4"]


def go(*words):
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With everything that the commands made of it."""
    root = tmp_path_factory.mktemp("chain")
    shard(root / "00000.tar", 24)
    go("data", "prepare", root / "00000.tar", root / "latents", "--vae", tiny_folder())
    go("data", "prepare", root / "00000.tar", root / "real.zip", "--size", "16")
    clip_folder(root / "clip")
    for stage in ("stage1", "stage2"):
        go("train", "tcm-sd15", *SMALL, *given(root), "--stage", stage)
    return root


def given(root, run="run"):
    return "--data", root / "latents", "--teacher", tiny_folder(), "--out", root / run, "--device", "cpu"


def test_both_stages_train_and_stage_2_counts_on_from_stage_1(folder):
    for stage, first in (("stage1", 0), ("stage2", 2)):
        lines = [json.loads(line) for line in (folder / "run" / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [first + 1, first + 2]
        assert all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines)
        assert len(list((folder / "run" / stage / "samples").glob("step-*.png"))) == 1
    one, two = (load_model(folder / "run" / stage) for stage in ("stage1", "stage2"))
    assert one.model.t_min == 0 and two.model.t_min == pytest.approx(1, abs=0.01)
    assert any(not torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))
    start = record(folder / "run" / "stage1" / "start.json")
    assert start["initialised_from"]["path"] == str(tiny_folder()) and start["teacher_sha256"] == start["started_from"]


@torch.no_grad()
def test_the_teacher_is_guided_away_from_the_empty_prompt(folder):
    data, own = open_training_set(folder / "latents"), open_model(tiny_folder())
    recipe = at_levels(tcm_sd15(), own.network, own.model.precond)
    teacher = load_teacher(recipe, "stage1", tiny_folder(), data, torch.device("cpu")).saved.model
    x, text = data.batch(0, 2, 0)
    t, null = torch.tensor([1.0, 9.0]), data.encoder("cpu")([""]).expand(2, -1, -1)
    low, high = (own.model.denoise(x, t, cond=cond) for cond in (null, text))
    torch.testing.assert_close(teacher.denoise(x, t, cond=text), low + 6 * (high - low), rtol=1e-4, atol=1e-4)


def test_the_same_command_finds_all_done_and_a_stage_resumes_bit_exactly(folder, capsys):
    go("train", "tcm-sd15", *SMALL, *given(folder), "--stage", "stage2")
    assert "finished before, kept" in capsys.readouterr().err
    short = [word.replace("stage1.steps=2", "stage1.steps=1") for word in SMALL]
    go("train", "tcm-sd15", *short, *given(folder, "again"), "--stage", "stage1")
    (folder / "again" / "stage1" / "stage.json").unlink()
    go("train", "tcm-sd15", *SMALL, *given(folder, "again"), "--stage", "stage1")
    ours, theirs = ((folder / run / "stage1" / "model" / "model.safetensors").read_bytes() for run in ("again", "run"))
    assert ours == theirs


def test_prompts_become_images(folder):
    go("sample", folder / "run", "--prompt", "a dog", "--prompt", "robot", "--steps", "1", "--out", folder / "x.npz")
    go("sample", folder / "run", "--prompt", "robot", "--prompt", "a dog", "--steps", "2", "--out", folder / "y.npz")
    (folder / "prompts.txt").write_text("a dog\nrobot\n")
    go(
        "sample",
        folder / "run",
        "--prompts",
        folder / "prompts.txt",
        "--n",
        "4",
        "--steps",
        "1",
        "--out",
        folder / "z.npz",
    )
    x, y, z = (np.load(folder / f"{name}.npz")["images"] for name in "xyz")
    assert x.shape == (2, 16, 16, 3) and np.array_equal(x, z[:2]) and not np.array_equal(x, y)
    go("sample", folder / "run", "--prompt", "a dog", "--out", folder / "x.png")


def test_evaluation_gives_frechet_distance_and_clip_score(folder, capsys):
    (folder / "coco.txt").write_text("".join(f"number {k}\n" for k in range(20)))
    common = ["evaluate", folder / "run", "--prompts", folder / "coco.txt", "--data", folder / "real.zip"]
    go(*common, "--clip", folder / "clip", "--out", folder / "found.json")
    found = record(folder / "found.json")
    assert set(found["steps"]) == {"1", "2"}
    for numbers in found["steps"].values():
        assert numbers["n"] == 20 and numbers["frechet"] > 0 and 0 <= numbers["clip_score"] <= 100
    told = capsys.readouterr()
    assert f"--prompts {folder / 'coco.txt'} holds 20, so 20 of 2000 images\n" in told.err
    assert "20 samples against 24 real images)" in told.out
    go(*common, "--steps", "1", "--n", "12", "--processes", "2", "--out", folder / "two.json")
    go(*common, "--steps", "1", "--n", "12", "--out", folder / "one.json")
    one, two = (record(folder / name)["steps"]["1"]["frechet"] for name in ("one.json", "two.json"))
    assert one == two


def test_the_report_shows_samples_and_how_to_judge_them(folder):
    go("report", folder / "run")
    page = (folder / "run" / "report.html").read_text()
    assert page.count("<figure><img") == 2 and "stage1, step 2" in page and "stage2, step 4" in page
    assert f"judged by <code>onejump evaluate {folder / 'run'} --prompts FILE --data IMAGES</code>" in page
    assert "The run goes on" not in page and "valuated yet" not in page


def test_models_of_text_are_compared_by_the_same_prompts(folder, capsys):
    """Samples of known prompts, CLIP scores, and no comparison of figures that are of other prompts."""
    for first in (0, 1):
        prompts, out = folder / f"{first}.txt", folder / f"{first}.json"
        prompts.write_text("".join(f"number {k + first}\n" for k in range(8)))
        words = ["--n", "8", "--steps", "1", "--data", folder / "real.zip", "--clip", folder / "clip"]
        go("evaluate", folder / "run", *words, "--prompts", prompts, "--out", out)
    capsys.readouterr()
    records = [f"{folder / 'run'}={folder / name}" for name in ("0.json", "1.json")]
    go("compare", *records, folder / "run" / "stage1", tiny_folder(), "--n", "2", "--out", folder / "compare.html")
    out = capsys.readouterr().out
    assert "samples are of the prompts 'A photo of an astronaut" in out and "CLIP score" in out
    assert out.count("measured on other prompts (8, sha256") == 1
    assert (folder / "compare.png").exists()


def test_distillation_with_lora_in_half_precision(folder):
    changes = ["network.lora_rank=2", "cd.steps=3", "cd.batch=4", "cd.micro_batch=2", "cd.rate.lr=0.01", "log_every=1"]
    go("train", "cd-sd15", *changes, *given(folder, "cd"))
    saved, teacher = load_model(folder / "cd"), load_model(folder / "run" / "stage1")
    assert saved.network.lora_rank == 2 and saved.model.t_min == 0
    weights = saved.model.net.state_dict()
    assert any(value.abs().max() > 0 for name, value in weights.items() if name.endswith("lora_B"))
    assert {name for name in weights if "lora_" not in name} == set(teacher.model.net.state_dict())
    go("sample", folder / "cd", "--prompt", "a dog", "--steps", "2", "--out", folder / "cd.png")


def test_a_moved_stable_diffusion_is_named_anew(folder, tmp_path, capsys):
    saved = load_model(folder / "run")
    parts = saved.provenance["text_to_image"] | {"stable_diffusion": str(tmp_path / "moved")}
    save_model(tmp_path / "m", replace(saved, provenance=saved.provenance | {"text_to_image": parts}))
    line = said(capsys, ["sample", tmp_path / "m", "--prompt", "a dog"], 2)
    assert f"{tmp_path / 'm'}: its Stable Diffusion, {tmp_path / 'moved'}, is gone" in line
    assert "--stable-diffusion FOLDER" in line and "prepare" not in line


def test_a_model_is_one_file_that_samples_the_same(folder):
    go("export", folder / "run", folder / "model.safetensors")
    for model, out in ((folder / "run", "a.npz"), (folder / "model.safetensors", "b.npz")):
        go("sample", model, "--prompt", "a dog", "--out", folder / out)
    assert np.array_equal(*(np.load(folder / name)["images"] for name in ("a.npz", "b.npz")))


def test_mistakes_are_one_line(folder, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    run = folder / "run"
    for words, told in (
        (["sample", run], "say what it shall make, with --prompt"),
        (["sample", run, "--prompt", "a", "--class", "dog"], "reads text and knows no classes"),
        (["sample", run, "--prompt", "a", "--times", "14,0.5"], "never trained"),
        (["sample", run, "--prompts", tmp_path / "empty.txt"], "no prompts in it"),
        (["sample", run, "--prompt", "a", "--prompts", tmp_path / "empty.txt"], "give one of them"),
        (["sample", run, "--prompt", "a", "--stable-diffusion", tmp_path], "another than it was made with"),
        (["evaluate", run, "--data", folder / "real.zip"], "say what it shall make, with --prompts FILE"),
        (["export", run, folder / "x.onnx"], "a text-to-image model is exported as one file"),
        (["import", tiny_folder(), folder / "y"], "Stable Diffusion needs no import"),
        (["train", "tcm-sd15", "--stage", "stage1", "--teacher", tiny_folder()], "reads text, digits is another kind"),
        (
            ["train", "digits", "--stage", "teacher", "--data", folder / "latents"],
            "reads no text, and latents holds latents with captions; they are for tcm-sd15 and cd-sd15",
        ),
    ):
        assert told in said(capsys, words, 2), words
