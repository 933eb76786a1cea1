"""`onejump precond` and `onejump alignment`: files, pages, mistakes, and going on after Ctrl-C."""

import html
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import pictures, said

from onejump.alignment import alignment, record
from onejump.alignment_page import changes, summary
from onejump.analytic import estimate
from onejump.analytic_page import BACKWARD, EULER, FORWARD, cost, difference
from onejump.analytic_table import Estimator, load_table
from onejump.cli import main
from onejump.data.digits import digits
from onejump.data.load import load_images
from onejump.model import ConsistencyModel
from onejump.networks import MLPConfig
from onejump.precond import Euler
from onejump.samplers import ODE, Multistep, Trajectory, noise_for
from onejump.saved import SavedModel, load_model, model_sha256, save_model
from onejump.times import karras_grid

SMALL = ["--times", "8", "--samples", "16"]
NETWORK = MLPConfig(shape=(1, 8, 8), label_dim=10, width=16, depth=1)


def model(folder, seed=0, network=NETWORK, sampler=None, jump=None, method="DSM"):
    """A network of random weights, also in its last layer, saved as a model."""
    torch.manual_seed(seed)
    net = network.build()
    with torch.no_grad():
        net.last_weight.normal_(std=0.3)
    made = ConsistencyModel(net, jump=jump, second_time=network.second_time != "off")
    names = tuple("0123456789"[: network.label_dim])
    provenance = {"method": {"type": method}}
    save_model(folder, SavedModel(made, network, sampler or ODE(), network.shape, names, provenance))
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return model(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    network = replace(NETWORK, second_time="random")
    return model(tmp_path_factory.mktemp("models") / "student", 1, network, Trajectory(), Euler(), "CTM")


@pytest.fixture(scope="module")
def table(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "deep" / "table.json"
    assert main(["precond", str(teacher), *SMALL, "--out", str(path)]) == 0
    return path


def stands_alone(page):
    """The text of a page; nothing in it is fetched when it is opened."""
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|iframe)|(src|href)=|url\(", text)
    return text


def test_precond_writes_the_table_of_this_teacher_and_a_page(teacher, table):
    found = load_table(table)
    estimator = Estimator(8, 16)
    assert (found.estimator, found.teacher, found.data) == (estimator, model_sha256(teacher), "digits")
    x0, labels = digits().batch(0, 16, seed=0)
    same = estimate(load_model(teacher).model, x0, labels, estimator)
    assert (same.l_t, same.s_t) == (found.l_t, found.s_t)
    assert [path.name for path in sorted(table.parent.iterdir())] == ["table.html", "table.json"]
    text = stands_alone(table.with_suffix(".html"))
    assert model_sha256(teacher) in text and "CTM = BCM (Euler)" in text and text.count("<svg") == 10
    assert re.sub("<[^>]+>", "", difference(found)) in re.sub("<[^>]+>", "", text)


def test_the_page_names_the_largest_difference_from_ctm(table):
    found = load_table(table)
    grid = karras_grid(18)
    pairs = [(t, s) for t in grid.tolist() for s in grid.tolist() if s < t]
    t, s = torch.tensor(pairs, dtype=torch.float64).T
    off = (found.jump()(t, s)[1] - Euler()(t, s)[1]).abs()
    told = [float(number) for number in re.findall(r"<strong>([^<]+)</strong>", difference(found))]
    assert told == pytest.approx([off.max().item(), off[s == 0.002].max().item()], rel=0.01)


def test_cost_is_told_beside_that_of_a_training_of_the_paper(table, teacher, capsys):
    """E[k] = sum k^2 / sum k over 1..17 Heun steps of two calls; 5 calls of the student, 3 with gradients."""
    steps = range(1, 18)
    whole = 200_000 * 256 * (2 * sum(k * k for k in steps) / sum(steps) + 2 + 3 * 3)
    found = replace(load_table(table), network_passes=round(whole / 200))
    assert " 0.5 % of a training" in cost(found) and f"{whole / 1e9:.2f} billion" in cost(found)
    again = table.with_name("again.json")
    assert main(["precond", str(teacher), *SMALL, "--out", str(again)]) == 0
    assert cost(load_table(table)) in capsys.readouterr().out
    again.unlink()
    again.with_suffix(".html").unlink()


def test_precond_goes_on_after_ctrl_c_to_the_same_bits(teacher, tmp_path, capsys):
    argv = ["precond", str(teacher), "--times", "60", "--samples", "256", "--out"]
    killed, partial = tmp_path / "killed.json", tmp_path / "killed.partial.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "onejump", *argv, str(killed)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    for _ in range(6000):
        if partial.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from there" in words and "Traceback" not in words
    assert partial.exists() and not killed.exists()
    assert main([*argv, str(killed)]) == 0 and main([*argv, str(tmp_path / "whole.json")]) == 0
    ours, whole = load_table(killed), load_table(tmp_path / "whole.json")
    assert (ours.l_t, ours.s_t, ours.rms) == (whole.l_t, whole.s_t, whole.rms)
    assert not partial.exists()


def test_a_small_set_is_repeated_in_its_order(tmp_path):
    network = MLPConfig(shape=(3, 8, 8), width=16, depth=1)
    data = pictures(tmp_path / "photos", 5, 8)
    path = model(tmp_path / "teacher", network=network)
    argv = ["precond", str(path), "--data", str(data), *SMALL, "--seed", "3", "--out", str(tmp_path / "t.json")]
    assert main(argv) == 0
    x0, _ = load_images(data, None).batch(0, 16, seed=3)
    same = estimate(load_model(path).model, x0, None, Estimator(8, 16, seed=3))
    assert same.l_t == load_table(tmp_path / "t.json").l_t


def test_alignment_writes_its_numbers_and_a_page(teacher, student, table, tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    argv = ["alignment", str(teacher), "--student", str(student), "--table", str(table), "--out", str(out)]
    assert main([*argv, "--n", "6", "--nodes", "5", "--substeps", "4", "--seed", "2"]) == 0
    found = load_table(table)
    jumps = {EULER: Euler(), BACKWARD: found.jump(), FORWARD: found.jump("forward")}
    x0, labels = digits().batch(0, 6, seed=2)
    xT = x0 + 80 * noise_for(range(6), (1, 8, 8), seed=2)[0]
    models = [load_model(path).model for path in (teacher, student)]
    direct = alignment(models[0], jumps, xT, labels, karras_grid(5), 4, models[1])
    written = json.loads(out.with_suffix(".json").read_text())
    assert written.pop("about")["Teacher"].endswith(model_sha256(teacher))
    assert written == record(direct)
    text, printed = stands_alone(out), capsys.readouterr().out
    for line in summary(direct):
        assert line in html.unescape(re.sub("</?strong>", "", text))
        assert line.replace("\N{NO-BREAK SPACE}", " ") in printed
    assert text.count("<svg") == 3 + 3 + 4 + 1 and "10 jumps" in text


def test_without_a_table_ctm_alone_is_measured(teacher, tmp_path):
    out = tmp_path / "page.html"
    assert main(["alignment", str(teacher), "--n", "3", "--nodes", "3", "--substeps", "2", "--out", str(out)]) == 0
    assert list(json.loads(out.with_suffix(".json").read_text())["gaps"]) == [EULER]
    assert "mean consistency gap to D(x_s, s) is" in stands_alone(out)


def test_without_a_table_that_of_the_student_counts(teacher, table, tmp_path):
    network = replace(NETWORK, second_time="random")
    own = model(tmp_path / "own", 1, network, Trajectory(), load_table(table).jump(), "CTM")
    few = ["--n", "3", "--nodes", "3", "--substeps", "2"]
    for name, options in (("a", []), ("b", ["--table", str(table)])):
        argv = [
            "alignment",
            str(teacher),
            "--student",
            str(own),
            *few,
            *options,
            "--out",
            str(tmp_path / f"{name}.html"),
        ]
        assert main(argv) == 0
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert a["gaps"] == b["gaps"] and list(a["gaps"]) == [EULER, BACKWARD, FORWARD]


def test_the_summary_tells_the_change_of_the_mean_gap(teacher, table):
    found = load_table(table)
    xT = 80 * noise_for(range(4), (1, 8, 8))[0]
    jumps = {EULER: Euler(), BACKWARD: found.jump()}
    direct = alignment(load_model(teacher).model, jumps, xT, torch.arange(4), karras_grid(5), 4)
    euler, ours = (direct.gaps[name].to_end.nanmean().item() for name in (EULER, BACKWARD))
    change = changes(direct, BACKWARD)["all"]
    assert change == pytest.approx(ours / euler - 1)
    words = "larger" if change > 0 else "smaller"
    assert f"{abs(change):.1%} {words} than CTM's" in summary(direct)[0].replace("\N{NO-BREAK SPACE}", "")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--out", "table.txt"], "--out table.txt: end it with .json"),
        (["--times", "1"], "times: 1; 2 or more"),
        (["--samples", "0"], "samples: 0; 1 or more"),
        (["--seed", "-1"], "-1"),
        (["--trace", "guess"], "invalid choice: 'guess'"),
        (["--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_precond_refuses_what_it_cannot_do(teacher, options, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in said(capsys, ["precond", teacher, *options], 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--out", "page.txt"], "--out page.txt: end it with .html"),
        (["--nodes", "1"], "nodes: 1; 2 or more"),
        (["--substeps", "3"], "--substeps 3: an even number"),
        (["--n", "0"], "n: 0; 1 or more"),
        (["--table", "nowhere.json"], "nowhere.json"),
        (["--table", "page.json", "--out", "page.html"], "which is the table"),
        (["--student", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_alignment_refuses_what_it_cannot_do(teacher, options, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in said(capsys, ["alignment", teacher, *options], 2)
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_fit_each_other_are_named(teacher, student, table, tmp_path, capsys):
    photos, classes = pictures(tmp_path / "photos", 4, 8), pictures(tmp_path / "classes", 4, 8, classes=2)
    other, colour = model(tmp_path / "other", 5), model(tmp_path / "colour", network=MLPConfig(shape=(3, 8, 8)))
    few = model(tmp_path / "few", network=MLPConfig(shape=(3, 8, 8), label_dim=3))
    one = model(tmp_path / "one", network=MLPConfig(shape=(3, 8, 8)), sampler=Multistep(), method="ECT")
    for command in ("precond", "alignment"):
        assert "not a diffusion model" in said(capsys, [command, student], 2)
        assert "1x8x8" in said(capsys, [command, teacher, "--data", photos], 2)
        assert "3 classes" in said(capsys, [command, few, "--data", classes], 2)
    align = ["alignment", teacher, "--out", tmp_path / "page.html"]
    assert "of another teacher" in said(capsys, ["alignment", other, "--table", table], 2)
    assert "a diffusion model; leave it out" in said(capsys, [*align, "--student", other], 2)
    assert "3x8x8" in said(capsys, [*align, "--student", one], 2)
    assert "3x8x8" in said(capsys, ["alignment", colour], 2)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_place_that_cannot_be_written_is_one_line(teacher, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "page.html"
    few = ["--n", "2", "--nodes", "3", "--substeps", "2"]
    assert str(tmp_path / "file") in said(capsys, ["alignment", teacher, *few, "--out", out], 1)
    assert str(tmp_path / "file") in said(capsys, ["precond", teacher, *SMALL, "--out", out.with_suffix(".json")], 1)
