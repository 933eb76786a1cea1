"""The page of a comparison and its picture: the numbers on file, samples from one noise, nothing from outside."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from compare_setup import NETWORK, STAGES, change, command, save, write_run
from PIL import Image

from onejump import cli
from onejump.compare import compare
from onejump.compare_page import MARGIN, TITLE, chart, fitting, quality
from onejump.compare_verdict import verdict
from onejump.config import Evaluation
from onejump.cost import cost_of
from onejump.page import number
from onejump.samplers import Multistep
from onejump.svg import Style


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return write_run(out / "a"), write_run(out / "b", seed=1, frechet=0.5)


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "new" / "a.html"
    command(*runs, f"{runs[0]}/teacher", "--n", 8, "--out", out)()
    return out


class Tables(HTMLParser):
    """The rows of all tables of a page; fails if tags do not nest."""

    def __init__(self, path):
        super().__init__()
        self.source, self.open, self.rows = path.read_text().replace("\u00a0", " "), [], []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.rows[-1][-1] += data


def test_tables_hold_what_the_records_say(runs, page, capsys):
    rows = Tables(page).rows
    gflop = cost_of(NETWORK, 1).flops / 1e9
    for name, frechet in (("a", 1.0), ("b", 0.5)):
        for k in (1, 2):
            values = (frechet / (2 + k), frechet / (2 + k) / 100, k * gflop, 1000 * k / 4 / 2000)
            assert [f"{name}/stage2", str(k), str(k), *map(number, values)] in rows
    assert ["a/teacher", "18", "35", "1.00", "0.0100", number(35 * gflop), "2.25"] in rows
    images = {name: stage.steps * stage.batch for name, stage in STAGES.items()}
    parameters = f"{cost_of(NETWORK, 1).parameters:,}"
    row = next(row for row in rows if row[:2] == ["b/stage2", "TCM"])
    assert row[2:6] == ["<dots>", parameters, f"{sum(images.values()):,}", "6 min 0 s"]
    assert next(row for row in rows if row[:2] == ["a/teacher", "DSM"])[4:6] == ["1,000", "1 min 0 s"]


def test_samples_are_those_of_the_sample_command(runs, page, tmp_path):
    found = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="samples of (.*?)"', page.read_text())
    picture = np.asarray(Image.open(page.with_suffix(".png")))
    shown = [(runs[0], 1), (runs[1], 1), (runs[0], 2), (runs[1], 2)]
    for place, ((run, k), (data, title)) in enumerate(zip(shown, found[:4], strict=True), 1):
        assert title == f"{run.name}/stage2, {k} step{'s' if k > 1 else ''}"
        out = tmp_path / "s.png"
        assert cli.main(["sample", str(run), "--n", "8", "--steps", str(k), "--out", str(out)]) == 0
        assert base64.b64decode(data) == out.read_bytes()
        sheet = np.asarray(Image.open(out).convert("RGB"))
        h, w, _ = sheet.shape
        x = MARGIN + place * (w + MARGIN)
        assert (picture[MARGIN + TITLE :, x:][:h, :w] == sheet).all()


def test_page_holds_everything_in_itself(page):
    source = page.read_text()
    text = re.sub(r'base64,[^"]*', "", source.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    assert not re.search(r"https?:|//\w|url\(|@import|<script|<link", text)
    pictures = re.findall(r'<img src="(.{22})', source)
    assert pictures == ["data:image/png;base64,"] * 6  # real images, two models with two steps, the teacher
    assert "<dots>" not in source and "&lt;dots&gt;" in source
    assert re.findall("<h2>(.*?)</h2>", source) == [
        "Results",
        "Quality",
        "Samples",
        "Models and their training",
        "Configuration",
        "Terms",
        "Origin",
    ]
    assert len(re.findall("<svg", source)) == 5


def test_page_and_picture_are_the_same_when_made_twice(runs, page):
    first = page.read_bytes(), page.with_suffix(".png").read_bytes()
    command(*runs, f"{runs[0]}/teacher", "--n", 8, "--out", page)()
    assert (page.read_bytes(), page.with_suffix(".png").read_bytes()) == first


def test_verdict_names_the_lowest_for_each_number_of_steps(page):
    verdict = re.sub("<.*?>", "", re.search('class="verdict">(.*?)</p>', page.read_text())[1].replace("<br>", "\n"))
    assert verdict.splitlines() == [
        "With 1 step, b/stage2 is at the lowest Fréchet distance, 0.167, before a/stage2 at 0.333.",
        "With 2 steps, b/stage2 is at the lowest Fréchet distance, 0.125, before a/stage2 at 0.250.",
    ]


def test_distances_while_training_are_drawn_only_in_one_measure(runs, tmp_path):
    other = write_run(tmp_path / "c", evaluation=Evaluation(n=100))
    assert "While training" in quality(compare(list(map(str, runs))))
    drawn = quality(compare([str(runs[0]), str(other)]))
    assert "While training</text>" not in drawn and "judge different numbers of samples" in drawn


def one_step(run, **numbers):
    change(run / "evaluation.json", lambda found: found["stages"]["stage2"]["steps"]["1"].update(numbers))


def told(runs):
    return re.sub("<.*?>", "", verdict(compare(list(map(str, runs)))).replace("<br>", "\n")).splitlines()


def test_verdict_says_where_intervals_overlap(tmp_path):
    runs = [write_run(tmp_path / name, frechet=frechet) for name, frechet in (("a", 1.0), ("b", 0.9), ("c", 3))]
    for run, interval in zip(runs, ([0.28, 0.35], [0.26, 0.29], [0.9, 1.1]), strict=True):
        one_step(run, frechet_interval=interval)
    tie = "b/stage2 at 0.300 and a/stage2 at 0.333 are level at the lowest Fréchet distances"
    first, second = told(runs)
    assert first == f"With 1 step, {tie}: their 95 % intervals overlap."
    assert second.endswith("before a/stage2 at 0.250.")


def test_verdict_calls_a_tie_a_tie(tmp_path):
    runs = [write_run(tmp_path / name) for name in "ab"]
    lowest = "are level at the lowest Fréchet distance, 0.333."
    assert told(runs)[0] == f"With 1 step, a/stage2 and b/stage2 {lowest}"
    one_step(runs[0], frechet=1.0001 / 3)
    assert told(runs)[0].endswith("b/stage2 is at the lowest Fréchet distance, 0.333, before a/stage2 at 0.333367.")


def test_lines_over_each_other_all_stay_to_be_seen():
    points = [(1, 4.0), (2, 2.0)]
    styles = {name: Style(k, markers=True) for k, name in enumerate("abc")}
    drawn = chart({"a": points, "b": [*points, (4, 1.0)], "c": [(1, 3.0), (2, 2.0)]}, styles, "t", "x", "y")
    dashed = re.findall(r'stroke-linejoin="round" [^>]*dasharray[^>]*series-(\d)', drawn)
    assert dashed == ["1"] and drawn.count('r="3.5"') == 4  # markers of a and of c
    drawn = chart({"a": points[:1], "b": points[:1]}, styles, "t", "x", "y")
    assert ">b (over a)</text>" in drawn


def test_models_without_an_evaluation_still_show_samples(tmp_path):
    for k in range(2):
        save(tmp_path / f"m{k}", k, Multistep(), {})
    out = tmp_path / "x.html"
    command(tmp_path / "m0", tmp_path / "m1", "--n", 2, "--out", out)()
    source = out.read_text()
    assert source.count("<img") == 4 and "<svg" not in source
    assert "None of these models was evaluated." in source and "No real images" in source
    assert "[1] not evaluated" in source


def test_titles_in_the_picture_are_cut_at_their_start():
    def fits(text):
        return len(text) <= 8

    texts = [fitting(text, fits) for text in ("Fréchet", "12345678", "runs/stage2, 1")]
    assert texts == ["Frechet", "12345678", "...e2, 1"]
