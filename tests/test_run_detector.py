"""One detector judges a run: on the way, at the end, and when it goes on."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from tiny_run import TINY, command, finished_run, record, said

from onejump.cli import main
from onejump.cli_judge import judge_of
from onejump.data.digits import digits
from onejump.data.latents import open_latents
from onejump.distributed import Team
from onejump.evaluation.features import PixelDetector
from onejump.judge import Judge
from onejump.run_folder import read_lines
from onejump.run_record import about_detector
from onejump.saved import write_json
from onejump.types import UserError

STAGE = ["train", "digits", *TINY, "stage1.until=Plateau(patience=9)", "--stage", "stage1"]
PIXELS = ["--detector", "pixels"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run by pixels up to its stage 1, from a model that is there."""
    out = tmp_path_factory.mktemp("judged")
    teacher = finished_run(out) / "teacher"
    assert main([*STAGE, *PIXELS, "--init", str(teacher), "--out", str(out / "pixels")]) == 0
    return out / "pixels"


def judged_by(out, wanted):
    """Its run.json, as if it had been judged so."""
    write_json(out / "run.json", record(out / "run.json") | {"detector": wanted})


def test_models_are_judged_by_it_on_the_way_and_at_the_end(out, tmp_path):
    about = {"name": "pixels-8x8", "sha256": PixelDetector().hash, "asked": "pixels", "weights": None}
    run, best = record(out / "run.json"), record(out / "stage1" / "stage.json")["hand_over"]
    assert run["detector"] == about and "--detector pixels" in run["command"]
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert page.count("pixels-8x8") == 2 and about["sha256"] in page  # of the hand-over, and among the facts
    assert main(["evaluate", str(out), *PIXELS, "--n", "40", "--steps", "1", "--out", str(tmp_path / "e.json")]) == 0
    again = record(tmp_path / "e.json")["steps"]["1"]["frechet"]
    assert again == pytest.approx(best["best"], rel=1e-4)
    assert best["best"] == min(line["frechet"]["1"] for line in read_lines(out / "stage1" / "evaluations.jsonl"))


def test_a_run_goes_on_by_the_detector_it_has_begun_with(tmp_path, capsys):
    out = finished_run(tmp_path)
    before = record(out / "evaluation.json")
    assert before["detector"] == "digits-64" and record(out / "run.json")["detector"]["asked"] is None
    line = said(capsys, command(out, *PIXELS), 2)
    assert f"the evaluations in {out} are by digits-64, not pixels-8x8, and would mix; leave it out, or" in line
    assert main(command(out, "--detector", "digits")) == 0  # the same one, by its name
    judged_by(out, about_detector(Judge(digits(), PixelDetector()), "pixels"))
    (out / "evaluation.json").unlink()
    assert main(command(out)) == 0
    after = record(out / "evaluation.json")
    assert after["detector"] == "pixels-8x8" and after["reference"]["detector_sha256"] == PixelDetector().hash
    old, new = (found["stages"]["stage2"]["steps"]["1"]["frechet"] for found in (before, after))
    assert new != pytest.approx(old, rel=0.01)
    judged_by(out, None)  # a run of before there was a choice
    capsys.readouterr()
    assert "are by digits-64, not pixels-8x8" in said(capsys, command(out, *PIXELS), 2)
    assert main(command(out)) == 0


def inception(path, seed):
    """Weights of its first layers."""
    generator, arrays = torch.Generator().manual_seed(seed), {}
    for name, shape in (("conv", (32, 3, 3, 3)), ("conv_1", (32, 32, 3, 3)), ("conv_2", (64, 32, 3, 3))):
        arrays |= {f"{name}.weight": torch.randn(shape, generator=generator).numpy(), f"{name}.bias": np.ones(shape[0])}
    np.savez(path, **arrays)
    return path


def test_weights_that_are_missing_or_others_are_told_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ONEJUMP_DETECTORS", str(tmp_path / "none"))
    absent = ["--data", str(tmp_path / "no-images"), "--dry-run"]  # the images are not even looked for
    line = said(capsys, ["run", "digits", *absent, "--detector", "inception-64"], 2)
    assert line.startswith("onejump: no weights for detector inception-64: not in") and "pt_inception" in line
    assert "--weights w: of which detector?" in said(capsys, ["run", "digits", *absent, "--weights", "w"], 2)
    assert "detector: 'fid'; choose one of" in said(capsys, ["train", "digits", *absent, "--detector", "fid"], 2)
    out, weights = finished_run(tmp_path), inception(tmp_path / "a.npz", seed=0)
    judged_by(out, {"name": "inception-64", "sha256": "0", "asked": "inception-64", "weights": str(weights)})
    line = said(capsys, command(out), 2)
    assert f"the evaluations in {out} are by other weights of inception-64, and would mix" in line
    weights.unlink()
    line = said(capsys, command(out), 2)
    assert f"{out} is judged by --detector inception-64: no weights for detector inception-64: not in" in line


def test_what_the_detector_cannot_see_is_refused(tmp_path, capsys):
    np.save(tmp_path / "set.npy", np.random.default_rng(0).normal(size=(3, 4, 4, 4)).astype(np.float32))
    latents, args = open_latents(tmp_path / "set.npy"), Namespace(detector="pixels")
    with pytest.raises(UserError, match="--detector pixels: latents are not judged while training; leave it out, and"):
        judge_of(args, latents, PixelDetector(), Team())
    assert about_detector(judge_of(args, latents, None, Team())) is None
    np.savez(tmp_path / "grey.npz", np.zeros((20, 16, 16), np.uint8))
    images = ["--data", tmp_path / "grey.npz", "--detector", "digits", "network=MLPConfig(shape=(1,16,16))"]
    assert "8x8" in said(capsys, ["run", "digits", *images, "--out", tmp_path / "new"], 2)
