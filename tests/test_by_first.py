"""What goes wrong on the first of several processes while the others wait ends all of them, with one line."""

import functools

import pytest
import torch
from processes import Crew
from team_setup import stage, trained
from training_setup import images, student

from onejump.by_first import by_first, led
from onejump.config import Evaluation
from onejump.distributed import Team
from onejump.judge import Judge
from onejump.metrics_log import RunLog
from onejump.types import Features, Images, UserError
from onejump.watch import Watch


@pytest.fixture(scope="module")
def crew():
    made = Crew(2)
    yield made
    made.close()


class Fails:
    """A detector that cannot see."""

    name = "fails"
    hash = "0"

    def __call__(self, images: Images) -> Features:
        raise MemoryError("no room for\nthe features")


def failure(work):
    """(the kind of error, its words) of what is done."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def failures(team, out):
    log = RunLog(out, 0, writes=team.first, share=functools.partial(by_first, team))
    found = [failure(lambda: log.metric({"step": 1}))]
    if team.first:
        log.metrics.file = open("/dev/full", "a")
    found += [failure(lambda: log.metric({"step": 2})), failure(lambda: log.evaluation({"step": 2}))]
    wanted = stage("ect")
    watch = Watch(Judge(images(), Fails()), wanted, Evaluation(n=4), out, 2, team, lambda ema, step: None)
    found += [failure(watch.ready), failure(lambda: watch.on_evaluate(student(), 1))]
    if team.first:
        (out / "samples").touch()  # where a folder is to be
    found.append(failure(lambda: watch.on_sample(student(), 1)))
    (out / "run" / ".metrics.jsonl").mkdir(parents=True, exist_ok=True)  # where training begins its log
    found.append(failure(lambda: trained(team, out / "run", wanted)))
    return [*found, by_first(team, lambda: team.rank), led(team, lambda: team.rank)]


def test_no_process_waits_for_a_first_one_that_has_failed(tmp_path, crew):
    first, other = crew.run(2, failures, tmp_path)
    assert first[0] is other[0] is first[2] is other[2] is None
    full = ("UserError", f"{tmp_path}/metrics.jsonl: could not write (No space left on device); checkpoints are ")
    for found in (first[1], other[1]):
        assert found[0] == full[0] and found[1].startswith(full[1])
    for place in (3, 4):
        assert first[place] == ("MemoryError", "no room for\nthe features")
        assert other[place] == ("UserError", "the first process failed: MemoryError: no room for the features")
    assert first[5][0] == "FileExistsError" and other[5][1].startswith("the first process failed: FileExistsError: ")
    assert first[6] == other[6] and "could not write (Is a directory)" in first[6][1]
    assert (first[7:], other[7:]) == ([0, 0], [0, 1])  # and they can still talk


def test_alone_it_is_the_work_itself():
    assert by_first(Team(), lambda: {1: torch.inf}) == {1: torch.inf}
    with pytest.raises(ZeroDivisionError):
        led(Team(), lambda: 1 / 0)
    with pytest.raises(UserError, match="only here"):  # one of the others does not wait to tell
        led(Team(rank=1, world=2), functools.partial(raises, UserError("only here")))


def raises(error):
    raise error
