"""`onejump data show` and `data prepare`, and --skip-bad where commands take --data."""

import argparse

import pytest
from image_files import flat, write
from PIL import Image

from onejump.cli_data import add_commands
from onejump.cli_input import images_of
from onejump.data.load import load_images
from onejump.types import UserError

FILES = {"cat/a.png": flat((255, 0, 0)), "cat/b.png": flat((0, 0, 0)), "dog/c.png": flat((0, 51, 0)), "dog/d.png": b"x"}


def run(*words: object) -> None:
    top = argparse.ArgumentParser()
    commands = top.add_subparsers()

    def add(name: str, command: object, text: str, epilog: str = "") -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text)
        made.set_defaults(command=command)
        return made

    add_commands(add)
    args = top.parse_args(["data", *map(str, words)])
    args.command(args)()


def test_show_prints_what_a_set_is(tmp_path, capsys):
    path = write(tmp_path / "set", FILES)
    run("show", path, "--sheet", tmp_path / "sheet.png")
    lines = capsys.readouterr().out.splitlines()
    good = load_images(write(tmp_path / "good", {k: v for k, v in FILES.items() if v != b"x"}))
    assert lines[:6] == [
        *("images       3", "size         4x4", "channels     3"),
        *("mean         0.33333333 0.06666667 0.00000000", "std          0.47140452 0.09428090 0.00000000"),
        "captions     none",
    ]
    assert [line.split() for line in lines[6:9]] == [["classes", "2"], ["2", "cat"], ["1", "dog"]]
    assert lines[9] == f"fingerprint  {good.fingerprint}"
    assert lines[10].split() == ["bad", "1"] and "dog/d.png in " in lines[11]
    assert Image.open(tmp_path / "sheet.png").size == (3 * 32 + 4, 32)


def test_prepare_writes_and_lists(tmp_path, capsys):
    path = write(tmp_path / "set", FILES)
    run("prepare", path, tmp_path / "made" / "out.zip", "--size", 2, "--skip-bad", "--workers", 2)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("out.zip: 3 images of 2x2, 2 classes, 1 left out") and "dog/d.png in " in second
    assert load_images(tmp_path / "made" / "out.zip").labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("prepare", "x", "out.tar"), "end it with .zip"),
        (("prepare", "x", "out.zip", "--crop", "dhariwal"), "give --size"),
        (("prepare", "x", "out.zip", "--crop", "left", "--size", "4"), "--crop left"),
        (("show", "x", "--size", "0"), "--size 0"),
        (("show", "x", "--sheet", "s.jpg"), "end it with .png"),
        (("show", "nowhere"), "nowhere: no such"),
    ],
)
def test_mistakes_are_told_in_one_line(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        run(*words)


def test_data_with_bad_files_can_be_trained_on_if_asked(tmp_path, capsys):
    path = str(write(tmp_path / "set", FILES))
    with pytest.raises(UserError, match="dog/d.png"):
        images_of(argparse.Namespace(data=path, size=None, skip_bad=False))
    assert images_of(argparse.Namespace(data=path, size=None, skip_bad=True)).labels.tolist() == [0, 0, 1]
    assert "1 left out: dog/d.png in " in capsys.readouterr().err
