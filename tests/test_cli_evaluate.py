"""`onejump evaluate`: its record, its table, its options and its refusals."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_run import finished_run, record, said

from onejump.cli import main
from onejump.cli_results import print_results
from onejump.data.digits import digits
from onejump.page import number


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("cli_evaluate"))


def test_evaluate_tells_what_a_number_rests_on_and_repeats_it(out, tmp_path, capsys):
    path = tmp_path / "numbers.json"
    argv = ["evaluate", str(out), "--n", "30", "--seed", "7", "--json", "--out", str(path)]
    assert main(argv) == 0
    first = json.loads(capsys.readouterr().out)
    assert first == json.loads(path.read_text())
    assert main(argv) == 0
    second = json.loads(capsys.readouterr().out)
    reference = first["reference"]
    assert len(reference["fingerprint"]) == len(reference["detector_sha256"]) == 64
    assert reference["detector"] == "digits-64" and reference["n"] == 1797
    assert [(k, found["n"], found["seed"], found["times"]) for k, found in first["steps"].items()] == [
        ("1", 30, 7, [80.0]),
        ("2", 30, 7, [80.0, 1.0]),
    ]
    assert first["model_sha256"] == record(out / "stage2" / "stage.json")["model_sha256"]
    assert first["provenance"]["stage"] == "stage2" and first["provenance"]["step"] == 10
    assert first["minutes"] > 0 and "thread" in first["device"] and first["versions"]["torch"]
    for one in (first, second):
        del one["minutes"]
        for found in one["steps"].values():
            del found["seconds"]
    assert first == second and not list(tmp_path.glob("*.parts"))


def test_evaluate_gives_the_numbers_of_the_run(out, capsys):
    assert main(["evaluate", str(out), "--n", "40", "--steps", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["steps"]["1"]
    stored = json.loads((out / "evaluation.json").read_text())["stages"]["stage2"]["steps"]["1"]
    assert found | {"seconds": 0} == stored | {"seconds": 0}


def test_a_model_is_judged_by_images_without_its_labels(out, tmp_path, capsys):
    for k, image in enumerate(digits().images[:30, 0]):
        Image.fromarray(image.numpy()).save(tmp_path / f"{k:02}.png")
    assert main(["evaluate", str(out), "--n", "20", "--json", "--data", str(tmp_path)]) == 0
    reference = json.loads(capsys.readouterr().out)["reference"]
    assert reference["n"] == 30 and reference["detector"] == "pixels-8x8"


def test_evaluate_prints_a_table(out, tmp_path, capsys):
    assert main(["evaluate", str(out), "--n", "40", "--out", str(tmp_path / "numbers.json")]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    for k, found in record(tmp_path / "numbers.json")["steps"].items():
        sure = found["confidence"]
        shares = [f"{share:.1%}" for share in (sure["mean"], sure["as_asked"], found["balance_distance"])]
        low, high = found["frechet_interval"]
        places = 3 if found["frechet"] < 10 else 2 if found["frechet"] < 100 else 1
        cells = [
            f"{found['frechet']:.{places}f}",
            f"{low:.{places}f}..{high:.{places}f}",
            number(found["kid"]),
            *shares,
        ]
        assert ["stage2", k, k, *cells] in rows
    assert ["stage", "steps", "calls", "Frechet", "95", "%", "KID", "sure", "asked", "balance"] in rows
    assert all(len(line) <= 80 for line in text.splitlines() if "tmp" not in line)


FOUND = {"nfe": 2, "frechet": 1.5, "n": 10}
REFERENCE = {"n": 9, "detector": "pixels-8x8", "real_half_frechet": 0.25}


def test_the_table_has_no_columns_of_which_the_record_holds_nothing(capsys):
    print_results(
        REFERENCE, {"a": {"steps": {"2": {**FOUND, "frechet": 137.516, "frechet_interval": [137.4, 138.26]}}}}
    )
    assert ["a", "2", "2", "137.5", "137.4..138.3"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    print_results(REFERENCE, {"a": {"steps": {"2": FOUND}}})
    title, *lines = capsys.readouterr().out.splitlines()[1:]
    assert title == "Frechet distance (pixels-8x8, 10 samples against 9 real images)"
    assert [line.split() for line in lines] == [
        ["stage", "steps", "calls", "Frechet"],
        ["a", "2", "2", "1.500"],
        ["real", "half", "-", "-", "0.250"],
    ]


def test_a_finished_record_is_replaced_by_the_same_evaluation_alone(out, tmp_path, capsys):
    path = tmp_path / "k.json"
    argv = ["evaluate", str(out), "--n", "20", "--out", str(path)]
    path.touch()  # an empty file holds nothing to lose
    assert main([*argv, "--steps", "1"]) == 0
    capsys.readouterr()
    kept = path.read_bytes()
    for other, part in (
        ([*argv, "--steps", "2"], "k.json: holds something else than a record of this evaluation (steps: [1] there"),
        ([*argv, "--steps", "1", "--seed", "7"], "(seed: 1234 there, now 7); name a new file, or remove it"),
        ([*argv, "--steps", "1", "--metrics", "fid"], "metrics"),
    ):
        assert part in said(capsys, other, 2) and path.read_bytes() == kept
    assert main([*argv, "--steps", "1", "--processes", "1"]) == 0
    capsys.readouterr()
    path.write_text("[1]")
    assert "holds something else" in said(capsys, [*argv, "--steps", "1"], 2)


def evaluated(capsys, *argv):
    assert main(["evaluate", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_metrics_asked_for_are_in_the_record_and_the_table(out, tmp_path, capsys):
    path = tmp_path / "a.json"
    argv = ["evaluate", str(out), "--n", "60", "--steps", "1", "--out", str(path)]
    assert main([*argv, "--metrics", "fid,is,pr,dc,dfid,per-class,kid-subsets", "--denoise", "1,2.5"]) == 0
    text, found = capsys.readouterr().out, record(path)
    step = found["steps"]["1"]
    for name in ("precision", "recall", "density", "coverage", "inception_score", "per_class", "kid_subsets"):
        assert name in step
    assert list(found["denoising"]["frechet"]) == ["1", "2.5"] and "kid" not in step
    assert f"precision {step['precision']:.3f}, recall {step['recall']:.3f}" in text
    assert f"inception score {step['inception_score']['mean']:.3f}" in text
    assert f"{found['denoising']['frechet']['2.5']:.3f} at t = 2.5" in text
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith("stage2: "))


def test_given_images_are_evaluated_as_the_models_own(out, tmp_path, capsys):
    model = evaluated(capsys, out, "--n", "30", "--steps", "1", "--seed", "5")["steps"]["1"]
    assert main(["sample", str(out), "--n", "30", "--seed", "5", "--out", str(tmp_path / "folder")]) == 0
    capsys.readouterr()
    given = evaluated(capsys, "--images", tmp_path / "folder")
    assert given["steps"]["-"]["frechet"] == model["frechet"] and len(given["fingerprint"]) == 64


def test_published_statistics_replace_the_images(out, tmp_path, capsys):
    from onejump.evaluation.features import DigitsDetector
    from onejump.evaluation.statistics import GaussianStatistics

    own = GaussianStatistics.of(DigitsDetector()(digits().images))
    np.savez(tmp_path / "ref.npz", mu=own.mean.numpy(), sigma=own.covariance.numpy())
    whole = evaluated(capsys, out, "--n", "30", "--steps", "1")["steps"]["1"]
    asked = ("--n", "30", "--steps", "1", "--reference", tmp_path / "ref.npz", "--detector", "digits")
    found = evaluated(capsys, out, *asked)
    assert found["steps"]["1"]["frechet"] == pytest.approx(whole["frechet"], rel=1e-9)
    assert found["reference"]["n"] is None and "kid" not in found["steps"]["1"]
    assert main(["evaluate", str(out), *map(str, asked)]) == 0
    assert "published statistics" in capsys.readouterr().out


def test_times_of_ones_own_and_the_way_of_rounding_are_recorded(out, capsys):
    found = evaluated(capsys, out, "--n", "20", "--times", "80,2.5", "--rounding", "truncate", "--block", "4")
    assert found["steps"]["2"]["times"] == [80.0, 2.5] and found["sampler"]["mid"] == [2.5]
    assert (found["rounding"], found["block"]) == ("truncate", 4)


def test_the_search_is_told_with_the_command_that_uses_it(out, tmp_path, capsys):
    assert main(["evaluate", str(out), "--n", "20", "--search-times", "2", "--out", str(tmp_path / "a.json")]) == 0
    text, found = capsys.readouterr().out, record(tmp_path / "a.json")["search"]["2"]
    first, second = found["times"]
    use = text.splitlines()[-1].partition(f"onejump sample {out} ")[2].split()
    kept = found["kept_own"]
    assert first == 80 and second >= 1.0 and use == (["--steps", "2"] if kept else ["--times", f"80,{second:g}"])
    assert main(["sample", str(out), "--n", "2", *use, "--out", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--metrics", "fid,fdi"], "metrics: no 'fdi'; there are fid, kid"),
        (["--metrics", "sfid"], "sfid: the detector digits-64 has no spatial features"),
        (["--detector", "inception"], "inception-2048"),
        (["--detector", "pixels", "--metrics", "is"], "is: the detector pixels-8x8 tells no classes"),
        (["--reference", "gone.npz"], "--reference gone.npz: no such file"),
        (["--times", "80,0.5"], "0.5 is below t' = 1"),
        (["--metrics", "dfid", "--denoise", "0.5,2"], "--denoise: 0.5 is below t' = 1"),
        (["--search-times", "7"], "--search-times 7: 2, 3 or 4 steps"),
        (["--processes", "0"], "--processes 0: 1 or more"),
        (["--images", "folder"], "and --images: not both"),
        (["--weights", "nope.file"], "--weights nope.file: of which detector? Give --detector too"),
        (["--search-times", "2", "--times", "80,1"], "--search-times and --times: give one of them"),
        (["--denoise", "1,2"], "--denoise: the noise levels of dfid; add it to --metrics"),
        (["--rounding", "up"], "rounding: 'up'; choose one of round, truncate"),
        (["--reference", "r.npz", "--size", "8"], "--size 8: for the images of --data, and there are none"),
        (["--n", "1"], "--n 1: a distance needs at least 2"),
    ],
)
def test_mistakes_are_found_before_any_work(out, capsys, options, part):
    assert part in said(capsys, ["evaluate", out, *options], 2)


def test_a_teacher_has_no_times_to_search(out, capsys):
    assert "only consistency models" in said(capsys, ["evaluate", out / "teacher", "--search-times", "2"], 2)


def test_real_images_against_themselves(tmp_path, capsys):
    np.savez(
        tmp_path / "digits.npz", images=digits().images.permute(0, 2, 3, 1).numpy(), labels=digits().labels.numpy()
    )
    found = evaluated(capsys, "--images", tmp_path / "digits.npz", "--metrics", "fid,pr")["steps"]["-"]
    assert found["frechet"] == pytest.approx(0, abs=1e-6) and found["precision"] == found["recall"] == 1.0
    assert found["n"] == 1797
    np.savez(tmp_path / "few.npz", images=digits().images[:40].permute(0, 2, 3, 1).numpy())
    few, some = (evaluated(capsys, "--images", tmp_path / name, "--n", 40) for name in ("few.npz", "digits.npz"))
    assert few["steps"]["-"]["frechet"] == some["steps"]["-"]["frechet"] and some["steps"]["-"]["n"] == 40


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--steps", "2"], "--images: --steps is for a model"),
        (["--search-times", "2"], "--images: --search-times is for a model"),
        (["--seed", "3"], "--images: --seed is for a model"),
        (["--denoise", "1"], "--images: --denoise is for a model"),
        (["--n", "10"], "--images set.npy: 9 of them; 10 are needed"),
        (["--images", "large.npy"], "the digits, 1x8x8; those of --images are 3x16x16: give --data"),
        (["--metrics", "dfid"], "--images: dfid is for a model"),
        (["--metrics", "per-class"], "per-class compares within the classes of the real images; the samples have none"),
        (["--out", "."], "--out .: this is a folder; name a file in it, such as record.json"),
        (["--data", "z.npy"], "--data z.npy: latents, which no detector can see"),
    ],
)
def test_mistakes_with_given_images_are_found_before_any_work(tmp_path, monkeypatch, capsys, options, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    np.save("z.npy", np.random.default_rng(0).normal(size=(4, 1, 8, 8)))
    np.save("set.npy", digits().images.numpy()[:9])
    np.save("large.npy", np.zeros((4, 3, 16, 16), np.uint8))
    assert part in said(capsys, ["evaluate", "--images", "set.npy", *options], 2)
