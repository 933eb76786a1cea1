"""The report stands alone and tells what the folder of a run holds."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from onejump.config import Recipe, Stage
from onejump.config_json import to_json
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.networks.mlp import MLPConfig
from onejump.overrides import describe
from onejump.page import DASH, duration, number, percent
from onejump.report import contact_sheet, neighbour_sheet, write_report
from onejump.report_charts import bin_centres, thin
from onejump.run_folder import read_lines, read_run
from onejump.samplers import ODE, Multistep
from onejump.svg import INSET, LEFT, RIGHT, WIDTH, fit
from onejump.types import UserError

RECIPE = Recipe(
    "<b>5 & 6</b>",
    MLPConfig(shape=(1, 8, 8)),
    {
        "teacher": Stage(DSM(), 100, sampler=ODE()),
        "stage1": Stage(ECT(), 100),
        "stage2": Stage(TCM(), 100, count_on=True, sampler=Multistep(mid=(2.0,))),
    },
)
FRECHET = {"teacher": {18: 2.134}, "stage1": {1: 7.31, 2: 5.29}, "stage2": {1: 3.456, 2: 2.875}}
SECTIONS = ("Samples", "Results", "Quality", "Loss", "Nearest training images", "Time", "Configuration", "Origin")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_start(out):
    write(out / "recipe.json", to_json(RECIPE))
    data = {"name": "digits", "n": 1437, "shape": [1, 8, 8], "classes": 10, "fingerprint": "f00d" * 16}
    run = {"data": data, "versions": {"torch": "2.11.0"}, "device": "cpu", "seed": 0, "command": "onejump train a<b"}
    write(out / "run.json", run)


def write_training(out, name, first):
    shared = {"loss": 0.5, "images_per_second": 10.0, "skipped": 0, "loss_by_t": [1.0] * 16}
    steps = range(10, 101, 10)
    lines = [{"step": first + k, "seconds": 1.5 * k, "train_seconds": 1.0 * k, **shared} for k in steps]
    write(out / name / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    line = {"step": first + 100, "seconds": 1.0, "frechet": {str(k): f for k, f in FRECHET[name].items()}}
    write(out / name / "evaluations.jsonl", json.dumps(line) + "\n")
    summary = {"first_step": first, "last_step": first + 100, "seconds": 200.0, "seconds_on_the_clock": 250.0}
    write(out / name / "stage.json", {**summary, "images": 6400, "skipped": 3, "parameters": 54321})


def write_evaluation(out, labelled=True):
    read = {"confidence": {"mean": 0.9512, "as_asked": 0.873}, "balance_distance": 0.0432} if labelled else {}
    shared = {"kid": 0.00123, "n": 2000, "nearest_rms": 0.3141, "seconds": 0.5, **read}
    stages = {
        name: {"steps": {str(k): {"frechet": f, "nfe": 2 * k - 1 if k > 2 else k, **shared} for k, f in found.items()}}
        for name, found in FRECHET.items()
    }
    reference = {"n": 1437, "detector": "some detector", "real_half_frechet": 1.118, "nearest_rms_of_real": 0.2718}
    write(out / "evaluation.json", {"reference": reference, "stages": stages})
    images = torch.arange(4 * 64).reshape(4, 1, 8, 8).to(torch.uint8)
    contact_sheet(images, 2, out / "report" / "real.png")
    for name, found in FRECHET.items():
        for k in found:
            contact_sheet(images, 2, out / "report" / f"{name}-{k}step.png")
    neighbour_sheet(images, images, 2, out / "report" / "neighbours-stage2.png")


@pytest.fixture
def whole_run(tmp_path):
    write_start(tmp_path)
    for name in RECIPE.stages:
        write_training(tmp_path, name, RECIPE.first_step(name))
    write_evaluation(tmp_path)
    return tmp_path


def spots(svg):
    """Pixels of the drawn lines, without frame, grid and legend."""
    return [
        [tuple(map(float, p.split())) for p in path.split("L")]
        for path in re.findall(r'<path d="M([^"]*)" stroke-linejoin', svg)
    ]


class Page(HTMLParser):
    """Text, tags and table rows of a page; fails if tags do not nest."""

    VOID = ("meta", "img", "br")

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8").replace("\u00a0", " ")
        self.open, self.tags, self.rows, self.text = [], [], [], ""
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += data
        if self.open and self.open[-1] == "td":
            self.rows[-1][-1] += data

    def headings(self):
        return re.findall("<h2>(.*?)</h2>", self.source)


def test_page_has_every_section_in_order_and_fetches_nothing(whole_run):
    path = write_report(whole_run)
    page = Page(path)
    assert path == whole_run / "report.html"
    assert tuple(page.headings()) == SECTIONS
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 1 + 5 + 1
    assert all(attrs["src"].startswith("data:image/png;base64,") and attrs["alt"] for attrs in images)
    without_namespace = page.source.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//\w|url\(|@import|<script|<link", re.sub(r'base64,[^"]*', "", without_namespace))
    assert 'class="missing"' not in page.source
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 + 3 + 1


def test_numbers_of_the_run_are_on_the_page(whole_run):
    page = Page(write_report(whole_run))
    rows = {(row[0], row[1]): row for row in page.rows}
    assert rows["stage2", "1"][2:] == ["1", "3.46", "0.00123", "95.1 %", "87.3 %", "4.3 %", "0.314", "0.250"]
    assert rows["teacher", "18"][2:4] == ["35", "2.13"]
    assert rows["real images", DASH][3] == "1.12"
    assert rows["real images", DASH][8] == "0.272"
    assert rows["stage1", "ECT"][2:] == ["100", "6,400", "3 min 20 s", "4 min 10 s", "32.0", "3", "54,321"]
    assert rows["all stages", ""][3:6] == ["19,200", "10 min 0 s", "12 min 30 s"]
    verdict = re.search('<p class="verdict">(.*?)</p>', page.source)[1]
    assert re.sub("<.*?>", "", verdict) == (
        "With 1 network call an image, stage2 is at a Fréchet distance of 3.46 from the real images, a classifier "
        "reads its samples with 95.1 % confidence, after 10 min 0 s of training on cpu."
    )
    assert describe(RECIPE) in page.text
    assert "f00d" * 16 in page.text
    assert "torch 2.11.0" in page.text


def test_charts_over_training_count_steps_over_all_stages(whole_run):
    first_steps = [RECIPE.first_step(name) for name in RECIPE.stages]
    charts = re.findall("<svg.*?</svg>", write_report(whole_run).read_text())
    assert first_steps == [0, 0, 100]
    assert re.findall(r"<title>(stage\d), 1 step: .{1,9} at (\d+)</title>", charts[0]) == [
        ("stage1", "200"),
        ("stage2", "300"),
    ]
    assert [len(line) for line in spots(charts[-1])] == [10, 10, 10]
    ends = [line[-1][0] for line in spots(charts[-1])]
    x = fit([10, 300], LEFT + INSET, WIDTH - RIGHT - INSET, log=False)
    assert ends == pytest.approx([x.at(100), x.at(200), x.at(300)], abs=0.1)


def test_text_of_the_run_is_escaped(whole_run):
    page = Page(write_report(whole_run))
    assert "<b>5 & 6</b>" in page.text
    assert "onejump train a<b" in page.text


def test_report_is_the_same_when_made_twice(whole_run):
    first = write_report(whole_run).read_bytes()
    assert write_report(whole_run).read_bytes() == first


def test_unlabelled_run_has_no_columns_for_what_a_classifier_would_say(whole_run):
    write_evaluation(whole_run, labelled=False)
    page = Page(write_report(whole_run))
    row = next(row for row in page.rows if row[:2] == ["stage2", "1"])
    assert row[2:] == ["1", "3.46", "0.00123", "0.314", "0.250"]
    assert not any(name in page.text for name in ("Confidence", "As asked", "Imbalance"))
    assert "classifier reads" not in re.search('<p class="verdict">(.*?)</p>', page.source)[1]


def test_run_with_a_teacher_alone_says_what_is_missing_and_which_command_makes_it(tmp_path):
    write_start(tmp_path)
    write_training(tmp_path, "teacher", 0)
    page = Page(write_report(tmp_path))
    assert tuple(page.headings()) == SECTIONS
    assert page.text.count("The run goes on with onejump train a<b") == page.source.count('class="missing"') == 5
    assert "No samples yet of teacher, stage1, stage2." in page.text
    assert "Not finished: stage1, stage2." in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3


def test_run_that_has_only_begun_still_has_a_page(tmp_path):
    write(tmp_path / "recipe.json", to_json(RECIPE))
    page = Page(write_report(tmp_path))
    assert tuple(page.headings()) == SECTIONS
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no recipe.json"):
        write_report(tmp_path)
    write(tmp_path / "recipe.json", "{")
    with pytest.raises(UserError, match="recipe.json: not readable"):
        write_report(tmp_path)
    write(tmp_path / "recipe.json", to_json(ECT()))
    with pytest.raises(UserError, match="holds a ECT"):
        write_report(tmp_path)


def test_stages_keep_their_own_pictures_when_names_share_a_start(whole_run):
    write(
        whole_run / "recipe.json",
        to_json(Recipe("r", MLPConfig(), {"stage1": Stage(ECT(), 1), "stage1-1": Stage(ECT(), 1)})),
    )
    contact_sheet(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 1, whole_run / "report" / "stage1-1-4step.png")
    sheets = {stage.name: list(stage.sheets) for stage in read_run(whole_run).stages}
    assert sheets == {"stage1": [1, 2], "stage1-1": [4]}


def test_lines_come_in_order_with_the_later_of_a_step_and_without_a_torn_one(tmp_path):
    (tmp_path / "m").write_text(
        '{"step": 2, "loss": 1}\n{"step": 1, "loss": 5}\n{"step": 2, "loss": 3}\n{"step": 3, "lo'
    )
    assert read_lines(tmp_path / "m") == [{"step": 1, "loss": 5}, {"step": 2, "loss": 3}]


def test_bins_are_even_in_ln_t_between_their_ends():
    centres = np.log(bin_centres())
    assert np.allclose(np.diff(centres), np.log(80 / 0.002) / 16)
    assert np.allclose(centres[[0, -1]] - np.log([0.002, 80]), np.array([0.5, -0.5]) * np.log(80 / 0.002) / 16)


def test_thinned_curve_keeps_the_mean_and_the_last_step():
    points = [(k, float(k % 7)) for k in range(1, 1001)] + [(1001, None), (1002, float("inf"))]
    blocks = thin(points, 200)
    assert len(blocks) == 200
    assert blocks[-1][0] == 1000
    assert np.mean([y for _, y in blocks]) == pytest.approx(np.mean([y for _, y in points[:1000]]))
    assert thin(points[:150], 200) == points[:150]


def test_numbers_have_three_digits_and_units():
    values = (0.0, 0.12345, 3.0, 12.345, 123.456, 1234.5, 7, 120_000, 0.000012345, None, float("nan"))
    texts = ("0", "0.123", "3.00", "12.3", "123", "1,234", "7", "120,000", "1.23e-5", DASH, DASH)
    assert tuple(number(v) for v in values) == texts
    seconds = (0.25, 45.0, 750.0, 11_100.0, None)
    assert [duration(s).replace("\u00a0", " ") for s in seconds] == [
        "0.250 s",
        "45.0 s",
        "12 min 30 s",
        "3 h 5 min",
        DASH,
    ]
    assert percent(0.98765) == "98.8\u00a0%"


@pytest.mark.parametrize("channels", [1, 3])
def test_contact_sheet_holds_each_image_enlarged_in_reading_order(channels, tmp_path):
    images = torch.randint(0, 256, (5, channels, 8, 8), dtype=torch.uint8)
    contact_sheet(images, 3, tmp_path / "new" / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    assert sheet.shape[:2] == (2 * 34 - 2, 3 * 34 - 2)
    for k, image in enumerate(images):
        y, x = k // 3 * 34, k % 3 * 34
        cell = sheet[y : y + 32, x : x + 32].reshape(8, 4, 8, 4, channels)
        assert (cell == image.permute(1, 2, 0).numpy()[:, None, :, None]).all()
    assert (sheet[32:34] == 128).all() and (sheet[34:, 68:] == 128).all()


def test_contact_sheet_scales_as_told_and_refuses_other_channels(tmp_path):
    contact_sheet(torch.zeros(2, 1, 40, 8, dtype=torch.uint8), 8, tmp_path / "a.png", scale=2)
    assert Image.open(tmp_path / "a.png").size == (2 * 16 + 2, 80)
    with pytest.raises(UserError, match="2 channels"):
        contact_sheet(torch.zeros(2, 2, 8, 8, dtype=torch.uint8), 8, tmp_path / "b.png")


def test_neighbour_sheet_puts_the_training_image_below_its_sample(tmp_path):
    samples, nearest = (torch.full((2, 1, 8, 8), v, dtype=torch.uint8) for v in (200, 50))
    neighbour_sheet(samples, nearest, 2, tmp_path / "n.png")
    column = np.asarray(Image.open(tmp_path / "n.png"))[:, 0]
    changes = [int(v) for i, v in enumerate(column) if i == 0 or v != column[i - 1]]
    assert changes == [128, 200, 128, 50, 128]
