"""The command `recipes`."""

import argparse

import pytest
import torch

from onejump import cli_recipes
from onejump.data.digits import digits
from onejump.data.image_set import ImageSet
from onejump.recipes import NAMES, build_recipe
from onejump.recipes.table import fid_text, records, results_table, thousands
from onejump.types import UserError


def shown(capsys, *argv):
    """What the command prints."""
    top = argparse.ArgumentParser()
    commands = top.add_subparsers()

    def add(name, command, text):
        made = commands.add_parser(name, help=text)
        made.set_defaults(command=command)
        return made

    cli_recipes.add_commands(add)
    args = top.parse_args(["recipes", *argv])
    args.command(args)()
    return capsys.readouterr().out


def test_the_list_tells_length_cost_and_figures_of_each(capsys):
    text = shown(capsys)
    lines = [line.split() for line in text.splitlines()]
    assert [words[0] for words in lines if words and words[0] in NAMES] == NAMES
    row = text[text.index("  tcm-cifar10 ") :].splitlines()[1].strip()
    assert row == "stage1 250k x 512, stage2 200k x 1024; 78 GPU-hours; FID 2.46 / 2.05; ours not yet"
    assert "ours 0.714 / 0.536 (digits classifier; 2,000 against 1,797" in text


def test_one_recipe_is_told_whole(capsys, monkeypatch):
    """Notes, commands, every setting as an override, and what the scales make of it."""
    monkeypatch.setattr("onejump.recipes.scale.gflop_of", lambda network: 201.6)
    text = shown(capsys, "tcm-imagenet64-s")
    record = records()["tcm-imagenet64-s"]
    assert record.note in text and record.cost in text and "280,209,253 parameters; published 280.2 M" in text
    lines = text[text.index("Commands") : text.index("Configuration")].splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  ")] == [
        "import",
        "data",
        "train",
        "run",
        "evaluate",
    ]
    assert all(f"  {line}" in lines for line in record.command.splitlines())
    assert "stage2.method.w_b                 0.1\n" in text
    assert "--scale tiny         stage1 2 x 4, stage2 2 x 4" in text and "--scale small" in text


def test_text_to_image_is_told_without_its_library(capsys):
    text = shown(capsys, "tcm-sd15")
    assert "published 859.5 M parameters" in text and "--scale" not in text


def test_figures_name_the_steps_that_are_not_one_and_two():
    texts = {fid_text(fids) for fids in ({1: 2.46, 2: 2.05}, {18: 1.97}, {1: 6.2, 2: 4.7, 3: 4.32}, {2: 2.73}, {})}
    assert texts == {"2.46 / 2.05", "1.97 in 18", "6.20 / 4.70, 4.32 in 3", "2.73 in 2", "-"}
    assert [thousands(n) for n in (8000, 200_000, 390_625)] == ["8000", "200k", "390.6k"]


def test_the_markdown_is_the_table_of_the_results(capsys):
    assert shown(capsys, "--markdown") == results_table() + "\n"


def test_mistakes_are_refused(capsys):
    with pytest.raises(UserError, match="did you mean tcm-cifar10?"):
        shown(capsys, "tcm-cifar")
    with pytest.raises(UserError, match="--markdown: is of all recipes"):
        shown(capsys, "tcm-cifar10", "--markdown")


def test_images_that_do_not_fit_get_a_way_out_that_works():
    with pytest.raises(UserError, match="; give --data IMAGES .`onejump recipes tcm-cifar10` shows how"):
        build_recipe("tcm-cifar10", digits())
    for channels, way_out in ((3, "give --size 32, or other --data"), (1, "give other --data")):
        photos = ImageSet("photos", torch.zeros(2, channels, 16, 16, dtype=torch.uint8))
        with pytest.raises(UserError, match=f"this recipe is for 3x32x32; {way_out}$"):
            build_recipe("tcm-cifar10", photos)
