"""bench/cifar10.py on digits, its commands run in this process."""

import contextlib
import json
import sys
import time
from pathlib import Path

import pytest

from onejump.cli import main as onejump
from onejump.config import Recipe
from onejump.config_json import to_json
from onejump.fit import network_of
from onejump.overrides import apply_overrides
from onejump.recipes import build_recipe
from onejump.start import starts_from

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def script(monkeypatch):
    """bench/cifar10.py, and the modules that it is made of."""
    monkeypatch.syspath_prepend(str(BENCH))
    import cifar10

    return cifar10


@pytest.fixture
def lab(script):
    import cifar10_lab

    return cifar10_lab


@pytest.fixture
def parts(script):
    import cifar10_parts

    return cifar10_parts


def here(argv: list[str], seconds: float, log: Path) -> int:
    """Runs a command in this process."""
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if argv[1] == "-m":
            return onejump(argv[3:])
        import cifar10_probe

        cifar10_probe.main(argv[2:])
        return 0


class Counted:
    """Runs so many commands, and is then asked to stop. log: their names."""

    def __init__(self, most: int = 1000):
        self.most, self.names = most, []

    def __call__(self, argv: list[str], seconds: float, log: Path) -> int | None:
        self.names.append(log.stem)
        return here(argv, seconds, log) if len(self.names) <= self.most else None


def call(script, out: Path, run, *words: str) -> dict:
    """What results.json holds after a call that ends well."""
    usual = [
        "--tiny",
        "--minutes",
        "0.004",
        "--samples",
        "30",
        "--out",
        str(out),
        "--device",
        "cpu",
        "--stop-after",
        "9",
    ]
    assert script.main([*usual, *words], run) == 0
    return json.loads((out / "results.json").read_text())


def test_the_chain_stops_in_the_middle_and_goes_on_with_the_same_steps(script, tmp_path, capsys):
    first, second = Counted(3), Counted()
    stopped = call(script, tmp_path, first, "--parts", "tcm")
    assert (
        first.names == ["rate-teacher", "teacher", "rate-ect", "ect"] and stopped["parts"]["tcm"]["state"] == "stopped"
    )
    found = call(script, tmp_path, second, "--parts", "tcm")
    assert found["parts"]["tcm"]["state"] == "done"
    assert second.names[:3] == ["ect", "rate-tcm", "tcm"]  # nothing is done twice
    assert found["models"]["teacher"] == stopped["models"]["teacher"]
    assert found["models"]["ect"]["plan"] == stopped["models"]["ect"]["plan"]
    models = found["models"]
    assert all(m["last_step"] - m["first_step"] == m["plan"]["steps"] for m in models.values()) and len(models) == 3
    distances = [found["frechet"][name][k]["digits"] for name in ("ect", "tcm") for k in "12"]
    assert [d["n"] for d in distances] == [30] * 4 and len({d["frechet"] for d in distances}) == 4
    assert not list((tmp_path / "samples").iterdir())
    third = Counted()
    assert call(script, tmp_path, third, "--parts", "tcm")["parts"] == found["parts"] and not third.names
    assert "tcm, 2 step(s): digits" in capsys.readouterr().out


def test_both_students_of_ctm_make_the_same_steps_and_are_judged_on_the_way(script, tmp_path):
    found = call(script, tmp_path, here, "--parts", "ctm", "--samples", "10")
    one, two = (found["curves"][name] for name in ("ctm", "ctm-analytic"))
    assert [point["step"] for point in one] == [point["step"] for point in two]
    assert len(one) == min(found["models"]["ctm"]["plan"]["steps"], 6)
    assert one[0]["frechet"].keys() == {"1", "2", "4"} and one[0]["frechet"] != two[0]["frechet"]
    assert found["frechet"]["ctm-analytic"]["2"]["digits"]["n"] == 10
    assert "jump=AnalyticPrecond" in found["models"]["ctm-analytic"]["command"]


def test_what_fails_is_recorded_and_the_next_part_runs_and_another_call_tries_again(script, tmp_path, capsys):
    def broken(argv: list[str], seconds: float, log: Path) -> int | None:
        if "bench" in log.stem:
            log.write_text("warming up\nonejump: out of memory\n")
            return 1
        Path(argv[2]).write_text(json.dumps({"date": "today"}))
        return 0

    words = ["--tiny", "--out", str(tmp_path), "--parts", "env,bench", "--commit", "abc"]
    assert script.main(words, broken) == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["parts"]["bench"]["problem"] == "bench-digits-4: onejump: out of memory"
    assert found["env"] == {"date": "today", "commit": "abc"} and found["parts"]["env"]["state"] == "done"
    tried = Counted(0)
    assert script.main([*words, "--stop-after", "1"], tried) == 0 and tried.names == ["bench-digits-4"]
    assert "env: done before" in capsys.readouterr().out


def test_a_detector_that_is_missing_keeps_no_other_from_judging_the_same_samples(lab, tmp_path):
    def run(argv: list[str], seconds: float, log: Path) -> int:
        out = Path(argv[argv.index("--out") + 1])
        if "sample" in log.stem:
            out.mkdir()
        elif log.stem.endswith("absent"):
            log.write_text("onejump: no weights for detector absent\n")
            return 1
        else:
            out.parent.mkdir(exist_ok=True)
            numbers = {"frechet": 1.5, "frechet_interval": [1, 2], "n": 9}
            reference = {"n": 64, "detector_sha256": "f"}
            out.write_text(json.dumps({"reference": reference, "steps": {"-": numbers}}))
        return 0

    book = lab.Book(tmp_path / "results.json")
    made = lab.Lab(tmp_path, book, [], [], ("absent", "there"), 9, 0, part_deadline=time.monotonic() + 60, run=run)
    with pytest.raises(lab.Failed, match="no weights for detector absent"):
        made.judged("tcm", tmp_path / "model", 1)
    found = book.of("frechet", "tcm", "1")
    assert found["there"]["frechet"] == 1.5 and "no weights" in found["absent"]["error"]
    assert len(list((tmp_path / "samples").iterdir())) == 1  # for another try


def test_a_part_that_has_begun_keeps_its_settings(script, tmp_path):
    asked = {"data": [], "minutes": 20.0, "samples": 30, "seed": 0}
    (tmp_path / "results.json").write_text(json.dumps({"parts": {"tcm": {"state": "stopped", "asked": asked}}}))
    with pytest.raises(SystemExit, match="tcm began with samples 30; give it, or another --out"):
        script.main(["--tiny", "--out", str(tmp_path), "--parts", "tcm", "--samples", "31"], here)


def test_a_command_ends_when_its_time_is_over(lab, tmp_path):
    (tmp_path / "logs").mkdir()
    log, began = tmp_path / "logs" / "long.log", time.monotonic()
    asleep = "import time; print('begun', flush=True); time.sleep(60)"
    assert lab.spawn([sys.executable, "-c", asleep], 1.0, log) is None and time.monotonic() - began < 30
    assert lab.spawn([sys.executable, "-c", "import sys; sys.exit('over')"], 60.0, log) == 1
    assert lab.last_line(log) == "over"


def test_minutes_are_of_the_parts_that_train_or_of_one(script):
    found = script.minutes_of("7,bench=5")
    assert found == script.USUAL | {"tcm": 7.0, "ict": 7.0, "ctm": 7.0, "bench": 5.0}
    with pytest.raises(Exception, match="no part 'x'"):
        script.minutes_of("x=3")


def test_what_an_arm_changes_fits_its_recipe_and_a_student_starts_from_the_teacher(parts):
    def recipe_of(arm) -> Recipe:
        return apply_overrides(build_recipe(arm.recipe, None), arm.changes)

    chosen = parts.CIFAR10
    teacher, ect, tcm, ict, ctm = map(recipe_of, (chosen.teacher, chosen.ect, chosen.tcm, chosen.ict, chosen.ctm))
    assert ect == tcm and starts_from(ect.network, teacher.network)
    assert starts_from(network_of(ctm, ctm.stages["ctm"]), teacher.network)
    for recipe, arm in ((teacher, chosen.teacher), (ect, chosen.ect), (tcm, chosen.tcm), (ict, chosen.ict)):
        stage = recipe.stages[arm.stage]
        assert (stage.batch, stage.precision, recipe.network.dropout) == (512, "bf16", 0.1)
    assert teacher.stages["teacher"].augment is None
    ratios = [stage.method.delta.ratio(step) for stage in ect.stages.values() for step in (0, 5000)]
    assert ratios == [1 - 1 / 256] * 4  # stage 2 goes on with the curriculum of stage 1
    assert to_json(ctm.stages["ctm"].method)["distance"] == {"function": "mean_l2"}
