"""The same numbers from one process and several, in one go and resumed; dFID of denoisers that are known."""

import dataclasses
import json

import pytest
import torch
from test_samplers import GaussianScore

from onejump import parts
from onejump.data.digits import digits
from onejump.data.image_set import ImageSet
from onejump.evaluate import How, evaluate, evaluate_images
from onejump.evaluation.features import PixelDetector
from onejump.judge import Judge, detector_for
from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.parts import Workers
from onejump.samplers import Multistep
from onejump.saved import SavedModel
from onejump.types import UserError

N = 150


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART", 64)
        yield


@pytest.fixture(scope="module")
def judge():
    return Judge(digits(), detector_for(digits()), ("fid", "kid", "is", "pr"))


@pytest.fixture(scope="module")
def saved():
    torch.manual_seed(0)
    network = MLPConfig(shape=(1, 8, 8), label_dim=10, width=16, depth=2)
    net = network.build()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return SavedModel(ConsistencyModel(net), network, Multistep(mid=(1.0,)), (1, 8, 8), digits().class_names)


def numbers(record):
    """All but the times it took."""
    steps = {
        k: {name: value for name, value in found.items() if name != "seconds"} for k, found in record["steps"].items()
    }
    return record | {"steps": steps}


@pytest.fixture(scope="module")
def plain(judge, saved):
    return numbers(evaluate(judge, saved, (1, 2), N, 11))


@pytest.mark.parametrize("batch", [1, 256])
def test_the_batch_changes_nothing(judge, saved, plain, batch):
    assert numbers(evaluate(judge, saved, (1, 2), N, 11, batch)) == plain


def test_three_processes_give_the_record_of_one(judge, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 512)  # what it is in the processes
    n = parts.PART + 30
    one = evaluate(judge, saved, (1,), n, 11)
    three = evaluate(judge, saved, (1,), n, 11, how=How(workers=Workers(tmp_path, 3)))
    assert numbers(three) == numbers(one)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_processes_from_outside_share_the_parts_and_the_first_has_the_numbers(judge, saved, plain, tmp_path):
    """As torchrun would start them; here one after the other, the first of them last, since it waits for the others."""
    for rank in (2, 1):
        how = How(workers=Workers(tmp_path, rank=rank, world=3))
        assert "frechet" not in evaluate(judge, saved, (1, 2), N, 11, how=how)["steps"]["1"]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    first = How(workers=Workers(tmp_path, rank=0, world=3))
    assert numbers(evaluate(judge, saved, (1, 2), N, 11, how=first)) == plain


class Killed(Exception):
    pass


def test_an_evaluation_that_was_killed_goes_on_to_the_same_record(judge, saved, plain, tmp_path, monkeypatch):
    how, made = How(workers=Workers(tmp_path)), []
    make = parts.Job.make

    def dies_at_the_fifth(self, part):
        made.append(part)
        if len(made) == 5:
            raise Killed
        return make(self, part)

    monkeypatch.setattr(parts.Job, "make", dies_at_the_fifth)
    with pytest.raises(Killed):
        evaluate(judge, saved, (1, 2), N, 11, how=how)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    assert numbers(evaluate(judge, saved, (1, 2), N, 11, how=how)) == plain
    assert len(made) == 7  # 2 x 3 parts, of which one was begun twice


def test_a_damaged_part_is_made_again(judge, saved, plain, tmp_path, capsys):
    how = How(workers=Workers(tmp_path))
    evaluate(judge, saved, (1, 2), N, 11, how=how)
    path = sorted(tmp_path.rglob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    assert numbers(evaluate(judge, saved, (1, 2), N, 11, how=how)) == plain
    assert "damaged" in capsys.readouterr().err


def test_parts_of_another_question_are_not_taken(judge, saved, tmp_path):
    """Another model, seed, rounding or block has parts of its own; more images take those that are there."""
    workers = Workers(tmp_path)
    evaluate(judge, saved, (1,), N, 11, how=How(workers=workers, identity="a"))
    there = len(list(tmp_path.rglob("*.safetensors")))
    assert there == 3
    evaluate(judge, saved, (1,), N + 64, 11, how=How(workers=workers, identity="a"))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 + 2  # the last one had 22 images
    others = (How(workers=workers, identity="b"), How(workers=workers, identity="a", rounding="truncate"))
    for how in (*others, How(workers=workers, identity="a", block=4)):
        evaluate(judge, saved, (1,), N, 11, how=how)
    evaluate(judge, saved, (1,), N, 12, how=How(workers=workers, identity="a"))
    assert len(list(tmp_path.iterdir())) == 5


def test_the_record_says_how_bytes_were_made(judge, saved, plain):
    cut = evaluate(judge, saved, (1,), N, 11, how=How(rounding="truncate", block=4))
    assert (cut["rounding"], cut["block"]) == ("truncate", 4) and (plain["rounding"], plain["block"]) == ("round", 8)
    assert cut["steps"]["1"]["frechet"] != plain["steps"]["1"]["frechet"]
    json.dumps(plain)


def test_given_images_get_the_numbers_of_the_model_that_made_them(judge, saved, plain):
    from onejump.generate import balanced_labels, generate

    labels = balanced_labels(N, 10)
    images = generate(saved.model, saved.sampler, 1, range(N), saved.shape, labels, 11)
    found = evaluate_images(judge, images, labels, Workers())
    assert all(found[name] == value for name, value in plain["steps"]["1"].items() if name in found)


def test_every_metric_of_real_images_is_at_its_best():
    judge = Judge(digits(), detector_for(digits()), ("fid", "kid", "is", "pr", "dc", "per-class"))
    found = judge.numbers(digits().images, digits().labels)
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["inception_score"]["mean"] > 8 and found["inception_score"]["splits"] == 10
    assert found["per_class"]["mean"] == pytest.approx(0, abs=1e-6) and len(found["per_class"]["classes"]) == 10
    low, high = found["frechet_interval"]
    assert low <= found["frechet"] <= high
    wrong = judge.numbers(digits().images, (digits().labels + 1) % 10)
    assert wrong["per_class"]["mean"] > 1 and wrong["frechet"] == found["frechet"]


@pytest.mark.parametrize("exact", [True, False])
def test_denoising_distance_of_known_models(exact):
    """0 for the exact consistency function; for the exact denoiser that of its blur, whose spread is s^2 / norm."""
    s, n = 0.25, 3000
    x = s * torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    data = ImageSet("gaussian", (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))
    net = GaussianScore(0.0, s)
    net.anchor = torch.nn.Parameter(torch.zeros(1))

    class Known(ConsistencyModel):
        def forward(self, x, t, s_=None, cond=None, key=None):
            norm = (s**2 + t[0] ** 2).sqrt()
            return x * (s / norm) if exact else self.denoise(x, t)

    saved = SavedModel(Known(net, t_min=0.3), MLPConfig((1, 4, 4)), Multistep(mid=()), (1, 4, 4))
    judge = Judge(data, PixelDetector(4), ("dfid",))
    found = evaluate(judge, saved, (1,), n, 3, how=How(denoise=(0.1, 0.5, 1.0)))["denoising"]
    assert found["n"] == n and list(found["frechet"]) == ["0.5", "1"]  # 0.1 is below t'
    for t in (0.5, 1.0):
        expected = 0 if exact else 16 * (s - s**2 / (s**2 + t**2) ** 0.5) ** 2
        assert found["frechet"][f"{t:g}"] == pytest.approx(expected, rel=0.1, abs=0.01)


def test_denoising_wants_the_classes_that_the_model_knows(saved):
    judge = Judge(digits().unlabelled(), PixelDetector(), ("dfid",))
    with pytest.raises(UserError, match="other classes"):
        evaluate(judge, saved, (1,), 10, 3)
    fits = dataclasses.replace(judge, data=digits())
    assert set(evaluate(fits, saved, (1,), 10, 3)["denoising"]["frechet"]) == {"1", "2", "3", "4"}


def test_no_process_is_started_for_less_than_two_parts(judge, saved, plain, tmp_path, monkeypatch):
    how = How(workers=Workers(tmp_path, 50))
    evaluate(judge, saved, (1, 2), N, 11, how=How(workers=Workers(tmp_path)))
    sorted(tmp_path.rglob("*.safetensors"))[0].unlink()
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda kind: pytest.fail("processes"))
    assert numbers(evaluate(judge, saved, (1, 2), N, 11, how=how)) == plain


def test_metrics_by_class_want_the_classes_of_the_real_images(saved):
    judge = Judge(digits(), detector_for(digits()), ("fid", "per-class"))
    other = dataclasses.replace(saved, class_names=tuple("abcdefghij"))
    with pytest.raises(UserError, match="per-class compares within .* have other classes"):
        evaluate(judge, other, (1,), 10, 3)
    named = dataclasses.replace(judge, data=dataclasses.replace(digits(), class_names=tuple("abcdefghij")))
    found = evaluate(named, saved, (1,), 40, 3)["steps"]["1"]["per_class"]["classes"]  # known by number alone
    assert found == evaluate(judge, saved, (1,), 40, 3)["steps"]["1"]["per_class"]["classes"] and None not in found
