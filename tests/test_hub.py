"""Through huggingface_hub's mixin a model comes back bit for bit, without a network; what is uploaded is our folder."""

import ast
import importlib
import logging
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import huggingface_hub
import pytest
import torch
from saved_setup import NETWORKS, TINY, assert_same, saved_model

import onejump
from onejump.hub import Generator, model_card
from onejump.samplers import ODE, Jumps
from onejump.saved import load_model, save_model
from onejump.types import UserError


def front_matter(readme):
    return huggingface_hub.ModelCard(readme.read_text()).data.to_dict()


@pytest.mark.parametrize("kind", NETWORKS)
def test_round_trip_is_bit_exact(tmp_path, kind):
    made = Generator(saved_model(NETWORKS[kind]))
    made.save_pretrained(tmp_path / "it")
    back = Generator.from_pretrained(tmp_path / "it")
    assert_same(back.saved, made.saved)
    assert torch.equal(made.generate(5, steps=2, seed=3), back.generate(5, steps=2, seed=3))
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert_same(load_model(tmp_path / "it"), made.saved)  # it is our folder
    save_model(tmp_path / "ours.safetensors", made.saved)
    assert_same(Generator.from_pretrained(str(tmp_path / "ours.safetensors")).saved, made.saved)


def test_a_folder_without_a_config_of_its_own_is_read_in_silence(tmp_path, caplog):
    """As a stage's: the model is below it."""
    saved = saved_model(TINY, ())
    save_model(tmp_path / "stage" / "model", saved)
    logging.getLogger("huggingface_hub").addHandler(caplog.handler)
    assert_same(Generator.from_pretrained(tmp_path / "stage").saved, saved)
    assert not caplog.records


def test_the_card_of_an_imported_model_says_so():
    origin = {"kind": "EDM pickle", "imported_from": "edm.pkl", "source_sha256": "0" * 64}
    card = model_card(replace(saved_model(TINY, ()), provenance=origin))
    assert "Imported with onejump" in card and "Made with" not in card
    assert "| kind | EDM pickle |" in card and "| imported from | edm.pkl |" in card and "0" * 64 in card


def test_the_model_is_not_copied_to_describe_it():
    """The mixin would turn a dataclass that it is given into a dictionary, weights and all."""
    saved = saved_model()
    made = Generator(saved)
    assert made.model is saved.model and not made._hub_mixin_config


def test_images_are_those_of_the_command_and_depend_on_seed_number_and_label():
    made = Generator(saved_model())
    images = made.generate(6, steps=2, seed=1)
    assert images.shape == (6, 3, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(images, made.generate(6, steps=2, seed=1, labels=[0, 1] * 3))
    assert torch.equal(images[:3], made.generate(3, steps=2, seed=1))
    other = made.generate(6, steps=2, seed=1, labels=torch.ones(6, dtype=torch.int64))
    assert [torch.equal(a, b) for a, b in zip(images, other, strict=True)] == [False, True] * 3
    assert not torch.equal(images, made.generate(6, steps=2, seed=2))


def test_mistakes_are_named(tmp_path):
    made, plain = Generator(saved_model()), Generator(saved_model(TINY, ()))
    for wrong, part in (
        (lambda: made.generate(0), "n: 0"),
        (lambda: made.generate(2, labels=[0, 2]), "labels: 0 to 2; this model has 0 to 1"),
        (lambda: made.generate(2, labels=[-1, 0]), "labels: -1 to 0"),
        (lambda: made.generate(2, labels=[0]), r"labels: \(1,\) for 2 images"),
        (lambda: made.generate(2, steps=9), "steps: 9; this model stores times for 1 to 3"),
        (lambda: plain.generate(1, labels=[0]), "trained without classes"),
        (lambda: Generator.from_pretrained(tmp_path), "no model there"),
    ):
        with pytest.raises(UserError, match=part):
            wrong()
    made.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="colour: from_pretrained has no such option"):
        Generator.from_pretrained(tmp_path, colour=3)


@pytest.mark.parametrize(
    ("licence", "stated"),
    [
        ("CC BY-NC-SA 4.0", {"license": "cc-by-nc-sa-4.0"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("", {}),
        ("NVIDIA Source Code License: v1", {"license": "other", "license_name": "nvidia-source-code-license-v1"}),
    ],
)
def test_the_card_states_what_the_hub_reads(tmp_path, licence, stated):
    Generator(replace(saved_model(), licence=licence)).save_pretrained(tmp_path)
    found = front_matter(tmp_path / "README.md")
    assert {key: found.pop(key) for key in list(found) if key.startswith("license")} == stated
    tags = found.pop("tags")
    assert found == {"library_name": "onejump", "pipeline_tag": "unconditional-image-generation"}
    assert "consistency-model" in tags
    assert f"| licence of the weights | {licence or 'not stated'} |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("sampler", [None, ODE(), Jumps((80.0, 2.0), (1.0, 0.5))])
def test_the_lines_on_the_card_run(tmp_path, sampler):
    Generator(saved_model(TINY, (), sampler)).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code.splitlines()) == 3 and " at 0x" not in card
    names: dict = {}
    exec(code.replace("USER/NAME", str(tmp_path)), names)
    assert names["images"].shape == (16, 1, 2, 2)


def test_a_card_of_ones_own_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    Generator(saved_model()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_is_pushed_is_the_folder(tmp_path, monkeypatch):
    """Up to huggingface_hub's upload, which the test keeps from the network."""

    def create_repo(api, repo_id, private=None, exist_ok=False):
        assert (api.token, private, exist_ok) == ("secret", True, True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(api, *, repo_id, folder_path, commit_message, revision, **others):
        shutil.copytree(folder_path, tmp_path / "uploaded")
        return f"{repo_id} {commit_message} {revision}"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    made = Generator(saved_model())
    options = {"commit_message": "first", "branch": "v1", "private": True, "token": "secret"}
    assert made.push_to_hub("me/cats", **options) == "me/cats first v1"
    names = sorted(path.name for path in (tmp_path / "uploaded").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert_same(Generator.from_pretrained(tmp_path / "uploaded").saved, made.saved)
    assert front_matter(tmp_path / "uploaded" / "README.md")["license"] == "cc-by-nc-sa-4.0"


def in_cache(cache: Path, revision: str, commit: str, saved):
    """As huggingface_hub keeps a repository that it has downloaded."""
    repository = cache / "models--me--cats"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    save_model(repository / "snapshots" / commit, saved)


def test_a_repository_is_read_from_the_cache_at_the_revision_asked_for(tmp_path):
    first, second = saved_model(), replace(saved_model(), licence="MIT")
    in_cache(tmp_path, "v1", "1" * 40, first)
    in_cache(tmp_path, "main", "2" * 40, second)
    assert_same(Generator.from_pretrained("me/cats", cache_dir=tmp_path).saved, second)
    found = Generator.from_pretrained("me/cats", cache_dir=tmp_path, revision="v1", local_files_only=True)
    assert_same(found.saved, first)
    with pytest.raises(FileNotFoundError):
        Generator.from_pretrained("me/dogs", cache_dir=tmp_path)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "onejump.hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'onejump\[hub\]'"):
        importlib.import_module("onejump.hub")


def test_nothing_else_imports_the_package():
    root = Path(onejump.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "hub" in text else ():
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.startswith(("huggingface_hub", "onejump.hub")) for name in names):
                found.add(path.name)
    assert found == {"hub.py"}
