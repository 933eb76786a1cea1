"""`onejump data show` and `data prepare`, and --skip-bad where commands take --data."""

import argparse

import numpy as np
import pytest
from image_files import flat, write
from PIL import Image

from onejump.cli_data import add_commands, memory_told
from onejump.cli_input import images_of
from onejump.data.latents import open_latents
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
        (("show", "x", "--size", "60000"), "--size 60000: .* 9,459 at most"),
        (("prepare", "x", "out.zip", "--size", "100000"), "--size 100000: .* pixels"),
        (("show", "set-*.tar"), "000..002"),
        (("show", "x", "--sheet", "s.jpg"), "end it with .png"),
        (("show", "nowhere"), "nowhere: no such"),
    ],
)
def test_mistakes_are_told_in_one_line(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        run(*words)


def test_too_little_memory_is_told_with_what_helps_this_command():
    with pytest.raises(UserError, match="out of memory; give --workers 1"), memory_told("give --workers 1"):
        bytearray(2**62)


def test_data_with_bad_files_can_be_trained_on_if_asked(tmp_path, capsys):
    path = str(write(tmp_path / "set", FILES))
    with pytest.raises(UserError, match="dog/d.png"):
        images_of(argparse.Namespace(data=path, size=None, skip_bad=False))
    assert images_of(argparse.Namespace(data=path, size=None, skip_bad=True)).labels.tolist() == [0, 0, 1]
    assert "1 left out: dog/d.png in " in capsys.readouterr().err


def test_show_tells_what_latents_are_and_prepare_leaves_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    z = np.arange(5 * 2 * 3 * 3, dtype=np.float32).reshape(5, 2, 3, 3)
    z[4, 0, 0, 0] = np.nan
    np.save(tmp_path / "z.npy", z)
    np.save(tmp_path / "z_labels.npy", [0, 1, 1, 0, 1])
    run("show", tmp_path / "z.npy")
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    mean, std = (f((0, 2, 3)) for f in (z[:4].astype(float).mean, z[:4].astype(float).std))
    assert lines[:5] == [
        *(["latents", "4"], ["shape", "2x3x3"], ["stored", "as    numbers"]),
        ["mean", f"{mean[0]:.8f} {mean[1]:.8f}"],
        ["std", f"{std[0]:.8f} {std[1]:.8f}"],
    ]
    assert lines[5:8] == [["classes", "2"], ["2", "0"], ["2", "1"]]
    assert lines[8] == ["fingerprint", open_latents(tmp_path / "z.npy", skip_bad=True).fingerprint]
    assert lines[9] == ["bad", "1"] and " ".join(lines[10]).startswith("latent 4 in ")
    with pytest.raises(UserError, match="leave --size out"):
        run("show", tmp_path / "z.npy", "--size", "2")
    with pytest.raises(UserError, match="latents, not images"):
        run("prepare", tmp_path / "z.npy", tmp_path / "out.zip")
