"""Training on augmented and on streamed images: stopped, killed or fed a damaged file, it ends with the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_resume import assert_equal_runs, stop_at
from tiny_run import TINY, pictures, weights
from training_setup import Recorder, run, stage_of

from onejump.checkpoint import load_checkpoint
from onejump.data.augment import AugmentPipe, Seeded
from onejump.data.decode import Decoding
from onejump.data.digits import digits
from onejump.data.image_set import epoch_order
from onejump.data.load import load_images
from onejump.data.open import open_training_set
from onejump.data.sources import open_source
from onejump.data.stream import StreamedSet, streamed
from onejump.data.training_set import TrainingSet
from onejump.methods.base import Nets
from onejump.methods.dsm import DSM
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks.layers import label_vectors
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig
from onejump.overrides import apply_overrides
from onejump.pipeline import run as run_all
from onejump.recipes import build_recipe
from onejump.run_record import open_run
from onejump.saved import load_model
from onejump.start import Given
from onejump.train import AUGMENT, Every, Interrupted, mix
from onejump.types import UserError

PIPE = AugmentPipe(p=0.5)
CLASSES = 2


def unet(label_dim: int = CLASSES) -> ConsistencyModel:
    """Reads classes and nine augmentation labels."""
    torch.manual_seed(0)
    config = SongUNetConfig(
        8, 3, label_dim, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), augment_dim=PIPE.width
    )
    return ConsistencyModel(config.build())


def mlp() -> ConsistencyModel:
    torch.manual_seed(0)
    return ConsistencyModel(MLPConfig(shape=(3, 8, 8), label_dim=CLASSES, width=16, depth=1, dropout=0.1).build())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "photos", 30, 8, CLASSES)


def stream(folder: Path, bad: dict | None = None) -> StreamedSet:
    return streamed(open_source(folder), Decoding(), bad, cache=folder.parent / f"{folder.name}-cache")


@pytest.mark.parametrize("method", [DSM(), TCM()], ids=["dsm", "tcm"])
def test_an_augmented_run_resumes_bit_exactly(tmp_path, folder, method):
    stage, data = stage_of(method, augment=PIPE, steps=8), load_images(folder)
    run(stage, tmp_path / "a", nets=method.nets(unet()), data=data)
    for done in (3, 5):
        with pytest.raises(Interrupted):
            run(stage, tmp_path / "b", nets=method.nets(unet()), data=data, progress=stop_at(done))
    run(stage, tmp_path / "b", nets=method.nets(unet()), data=data)
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


class Seen:
    """A method that notes what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def nets(self, student: ConsistencyModel) -> Nets:
        return DSM().nets(student)

    def loss(self, nets, x0, cond, step, steps):
        self.given.append((x0, cond))
        return DSM().loss(nets, x0, cond, step, steps)


@pytest.mark.parametrize("classes", [CLASSES, 0])
def test_the_network_is_told_the_class_and_how_each_image_was_augmented(tmp_path, folder, classes):
    """One-hot classes, then the pipe's labels; micro-batches take their rows of both; draws by (seed, step)."""
    data, seen = load_images(folder), Seen()
    data = data if classes else data.unlabelled()
    stage = stage_of(seen, augment=PIPE, steps=2, batch=12, micro_batch=5)
    run(stage, tmp_path, nets=seen.nets(unet(classes)), data=data, seed=4)
    for step in range(2):
        x0, cond = data.batch(step, 12, 4)
        x0, labels = PIPE(x0, Seeded.of(mix(4, step, AUGMENT)))
        passes = seen.given[3 * step : 3 * step + 3]  # of every third sample
        given = [torch.stack(parts, 1).flatten(0, 1) for parts in zip(*passes, strict=True)]
        assert torch.equal(given[0], x0)
        expected = label_vectors(cond, classes, x0)
        assert torch.equal(given[1], torch.cat([expected, labels], 1))
    assert not torch.equal(seen.given[0][1][:, classes:], seen.given[3][1][:, classes:])


def test_augmentation_is_off_unless_asked_for(tmp_path, folder):
    seen = Seen()
    run(stage_of(seen, steps=1), tmp_path, nets=seen.nets(mlp()), data=load_images(folder))
    assert all(cond.dtype == torch.int64 for _, cond in seen.given)


# ---------------------------------------------------------------------------------------------------------- streamed


def test_training_from_a_stream_has_the_bits_of_training_from_memory(tmp_path, folder):
    stage = stage_of(DSM())
    run(stage, tmp_path / "memory", nets=DSM().nets(mlp()), data=load_images(folder))
    run(stage, tmp_path / "stream", nets=DSM().nets(mlp()), data=stream(folder))
    assert_equal_runs(tmp_path / "memory", tmp_path / "stream")


KILLED = """
import os, signal, sys
from pathlib import Path
from onejump.methods.dsm import DSM
from test_augmented_training import mlp, stream
from training_setup import Recorder, run, stage_of
die = Recorder(lambda done: os.kill(os.getpid(), signal.SIGKILL) if done == 11 else None)
run(stage_of(DSM()), Path(sys.argv[1]), nets=DSM().nets(mlp()), data=stream(Path(sys.argv[2])), progress=die)
"""


def test_a_streamed_run_that_is_killed_resumes_bit_exactly(tmp_path, folder):
    """In the middle of an epoch: a batch is 12 of 30 images, and the last checkpoint is at step 9 of 11."""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    run(stage_of(DSM()), tmp_path / "a", nets=DSM().nets(mlp()), data=stream(folder))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "b"), str(folder)]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "b" / "checkpoints").step == 9
    run(stage_of(DSM()), tmp_path / "b", nets=DSM().nets(mlp()), data=stream(folder))
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def broken_at(folder: Path, step: int, seed: int = 1) -> Path:
    """A file that is first needed at this step (batch 12, first epoch)."""
    place = 12 * step + 6
    return folder / open_source(folder).names[epoch_order(30, seed, 0)[0][place]]


def test_a_file_damaged_while_training_ends_it_with_a_checkpoint_and_its_name(tmp_path):
    folder = pictures(tmp_path / "photos", 30, 8, CLASSES)
    data, stage = stream(folder), stage_of(DSM())
    run(stage, tmp_path / "a", nets=DSM().nets(mlp()), data=load_images(folder))
    file = broken_at(folder, 1)
    content, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(b"broken")
    every = Every(log=4, save=0, sample=5, evaluate=6)
    with pytest.raises(UserError, match=f"{file.name} in .*stopped after step 1, which is saved") as error:
        run(stage, tmp_path / "b", nets=DSM().nets(mlp()), data=data, every=every)
    assert "\n" not in str(error.value) and load_checkpoint(tmp_path / "b" / "checkpoints").step == 1
    file.write_bytes(content)
    os.utime(file, ns=times)
    run(stage, tmp_path / "b", nets=DSM().nets(mlp()), data=stream(folder))
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def test_a_file_that_is_bad_at_the_first_step_leaves_nothing_behind(tmp_path):
    folder = pictures(tmp_path / "photos", 30, 8, CLASSES)
    data = stream(folder)
    broken_at(folder, 0).write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        run(stage_of(DSM()), tmp_path / "a", nets=DSM().nets(mlp()), data=data)
    assert load_checkpoint(tmp_path / "a" / "checkpoints") is None


def test_with_skip_bad_a_damaged_file_does_not_end_training_and_resuming_stays_exact(tmp_path, capsys):
    folder = pictures(tmp_path / "photos", 30, 8, CLASSES)
    sets = [stream(folder, {}) for _ in range(3)]
    broken_at(folder, 1).write_bytes(b"broken")
    stage = stage_of(DSM())
    run(stage, tmp_path / "a", nets=DSM().nets(mlp()), data=sets[0])
    with pytest.raises(Interrupted):
        run(stage, tmp_path / "b", nets=DSM().nets(mlp()), data=sets[1], progress=stop_at(7))
    run(stage, tmp_path / "b", nets=DSM().nets(mlp()), data=sets[2], progress=Recorder())
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    assert capsys.readouterr().err.count("takes its place") == 3
    assert [len(each.feeder.bad) for each in sets] == [1, 1, 1]


# ------------------------------------------------------------------------------------------------------- whole chains


def chain(data: TrainingSet, out: Path) -> dict[str, bytes]:
    """The three stages, evaluation and report; the bytes of every stage's model."""
    shape = ",".join(map(str, data.shape))
    network = f"network=MLPConfig(shape=({shape}),label_dim={data.classes},width=16,depth=1)"
    recipe = apply_overrides(build_recipe("digits", digits()), [network, *TINY[1:]])
    open_run(recipe, data, out, torch.device("cpu"), "a command")
    assert run_all(recipe, data, out, torch.device("cpu"), Given(None, None)).exists()
    return weights(out)


def test_a_whole_run_from_a_stream_is_the_one_from_memory(tmp_path, folder):
    ours, theirs = chain(stream(folder), tmp_path / "stream"), chain(load_images(folder), tmp_path / "memory")
    assert ours == theirs
    for path in ("report/real.png", "report/neighbours-stage1.png"):
        assert (tmp_path / "stream" / path).read_bytes() == (tmp_path / "memory" / path).read_bytes()


def test_latents_train_and_their_model_keeps_the_scaling(tmp_path):
    np.save(tmp_path / "set.npy", np.random.default_rng(0).normal(3, 2, (20, 4, 3, 3)).astype(np.float32))
    data = open_training_set(tmp_path / "set.npy", cache=tmp_path / "cache")
    chain(data, tmp_path / "run")
    origin = load_model(tmp_path / "run" / "stage1").provenance
    assert origin["latents"] == {"mean": list(data.scaling.mean), "std": list(data.scaling.std)}
    assert not (tmp_path / "run" / "evaluation.json").exists()
