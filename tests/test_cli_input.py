"""Mistakes and failures are told in one line, with what to do about them."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny_run import TINY, said

from onejump.cli import main
from onejump.cli_input import Parser, out_of_memory
from onejump.cli_training import within_memory
from onejump.config import Stage
from onejump.data.shards import refuse_glob
from onejump.data.source import line
from onejump.data.sources import open_source
from onejump.distributed import Team
from onejump.methods.ctm import CTM
from onejump.methods.dsm import DSM
from onejump.methods.tcm import TCM
from onejump.precond import Euler
from onejump.recipes import build_recipe
from onejump.train import check
from onejump.types import UserError


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "onejump: the following arguments are required: COMMAND; see onejump --help"),
        (["draw"], "onejump: the following arguments are required: model; see onejump draw --help"),
        (["draw", "m", "--n", "few"], "onejump: --n: invalid int value: 'few'; see onejump draw --help"),
        (["paint"], "onejump: COMMAND: invalid choice: 'paint'"),
    ],
)
def test_a_wrong_word_is_one_line_that_says_where_the_right_ones_are(words, told, capsys):
    top = Parser(prog="onejump")
    made = top.add_subparsers(metavar="COMMAND", required=True).add_parser("draw")
    made.add_argument("model")
    made.add_argument("--n", type=int)
    with pytest.raises(SystemExit) as stop:
        top.parse_args(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith(told) and err.count("\n") == 1


def test_where_memory_was_not_enough_the_way_out_is_the_commands_own():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**15)  # a CPU's allocator has no error of its own
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), refused.value):
        for command, way_out in (("run", "micro_batch"), ("train", "--max-memory"), ("evaluate", "--block")):
            told = out_of_memory(error, command)
            assert told.startswith("out of memory; give ") and way_out in told
        assert "micro_batch" not in out_of_memory(error, "sample")
        assert out_of_memory(error, "report") == "out of memory"
    assert out_of_memory(RuntimeError("shapes differ"), "run") is None and out_of_memory(OSError(), "run") is None


@pytest.mark.parametrize("path", ["*.png", "photos/*/a.png", "a.png,b.png", ",".join(["a.png"] * 100)])
def test_a_pattern_or_a_list_of_files_is_told_what_to_give_instead(path, tmp_path):
    with pytest.raises(UserError, match=r": no such folder or file; one path is needed, such as the folder"):
        open_source(tmp_path / path)


def test_a_folder_may_have_any_name(tmp_path):
    (tmp_path / "a,b[1]").mkdir()
    assert open_source(tmp_path / "a,b[1]").names == []


def test_what_the_system_says_is_told_without_its_number(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        open(tmp_path / "gone")
    assert line(error.value) == "No such file or directory"
    assert [line(e) for e in (OSError("one\ntwo"), ValueError(), KeyError("x"))] == ["one", "ValueError", "'x'"]


@pytest.mark.parametrize("path", ["/x/{a,b}/x.tar", "/x/coyo [2024]/x-{000..001}.tar", "/x/x-{a,b}.tar"])
def test_our_own_patterns_of_shards_are_no_globs(path):
    refuse_glob(Path(path))


def test_more_processes_than_fit_a_batch_are_refused_before_memory_is_predicted():
    recipe = build_recipe("digits", None)
    with pytest.raises(UserError, match="batch: 128 images do not divide among 129 processes"):
        within_memory(Namespace(max_memory=None), recipe, ["stage1"], None, Team(world=129))


@pytest.mark.parametrize(
    ("stage", "team", "told"),
    [
        (Stage(DSM(), 1, batch=127), Team(world=2), r"stage1\.batch: 127 images .* 2 processes; give 126 or 128"),
        (Stage(DSM(), 1, batch=2), Team(world=3), r"stage1\.batch: 2 images .* 3 processes; give 3$"),
        (Stage(TCM(), 1, batch=12), Team(world=2), r"stage1\.batch: 12 in 2 .*1\.method.rho=0.25; give 10 or 16"),
        (Stage(CTM(), 1, jump=Euler(), second_time="zero"), Team(world=2, shard=2), "--shard: stage1: CTM takes"),
    ],
)
def test_what_processes_cannot_train_names_the_stage_and_the_way_out(stage, team, told):
    with pytest.raises(UserError, match=told):
        check(stage, team, "stage1")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["network=SongUNetConfig(model_channels=8,num_blocks=1,attn_resolutions=(16,))"],
            "are 1x8x8; give network.img_channels=1 network.img_resolution=8 network.attn_resolutions=4",
        ),
        (["network=MLPConfig(width=16,depth=1)"], "are 1x8x8; give network.shape=1,8,8"),
    ],
)
def test_a_network_of_other_images_is_refused_before_anything_is_printed(capsys, words, told):
    assert told in said(capsys, ["run", "digits", *words, "--dry-run"], 2)
    assert main(["run", "digits", *words, *TINY[1:], *told.split("give ")[1].split(), "--dry-run"]) == 0
