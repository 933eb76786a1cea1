"""Checkpoints of weights in pieces: as whole, as safe and as readable as the others."""

import json
import os
from pathlib import Path

import pytest
import torch
from processes import Crew
from team_setup import weights
from training_setup import student

from onejump.checkpoint import load_checkpoint, save_checkpoint
from onejump.distributed import hollow, local, whole
from onejump.saver import Saver
from onejump.types import UserError


@pytest.fixture(scope="module")
def crew():
    made = Crew(3)
    yield made
    made.close()


def pieces(team, filled=None):
    """A student in pieces, its tensors by name, and what puts it together."""
    model = student()
    frame = hollow(model)
    team.wrap(model, trained=True)
    if filled is not None:
        for p in model.parameters():
            local(p).data.fill_(filled)
    counter = torch.tensor(7 if filled is None else 0)
    return dict(model.state_dict()) | {"counter": counter}, lambda: weights(whole(model, frame, "cpu")).tolist()


def saved(team, folder, step):
    """What is saved are the numbers at the time of the call, whatever happens to them while they are written."""
    saver, (tensors, _) = Saver(folder, team), pieces(team)
    saver.save(step, tensors, {"a": 1})
    for tensor in tensors.values():
        local(tensor).data.zero_()
    saver.wait()


def restored(team, folder):
    tensors, together = pieces(team, filled=3.0)
    found = Saver(folder, team).load(tensors)
    assert found is not None and found.meta == {"a": 1}
    return found.step, found.warnings, tensors["counter"].item(), together()


def test_pieces_of_three_processes_are_read_by_two_and_by_one(tmp_path, crew):
    crew.run(3, saved, tmp_path, 5, shard=3)
    files = sorted(path.name for path in (tmp_path / "step-00000005").iterdir())
    assert files == [*(f"pieces-0000{i}.safetensors" for i in range(3)), "state.json"]
    expected = (5, (), 7, weights(student()).tolist())
    assert crew.run(2, restored, tmp_path, shard=2) == [expected] * 2
    alone = load_checkpoint(tmp_path)
    model = student()
    model.load_state_dict({name: tensor for name, tensor in alone.tensors.items() if name != "counter"})
    assert weights(model).tolist() == expected[3] and alone.tensors["counter"] == 7 and alone.meta == {"a": 1}


def test_a_checkpoint_in_one_file_is_read_in_pieces(tmp_path, crew):
    save_checkpoint(tmp_path, 4, {**student().state_dict(), "counter": torch.tensor(7)}, {"a": 1})
    assert crew.run(2, restored, tmp_path, shard=2) == [(4, (), 7, weights(student()).tolist())] * 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_piece_costs_its_checkpoint_only(tmp_path, crew, damage):
    """One process sees it, all use the one before."""
    for step in (5, 6):
        crew.run(2, saved, tmp_path, step, shard=2)
    file = tmp_path / "step-00000006" / "pieces-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content[:-9] if damage == "cut" else content)
    if damage == "gone":
        file.unlink()
    for step, warnings, *_ in crew.run(2, restored, tmp_path, shard=2):
        assert step == 5 and len(warnings) == 1 and "step-00000006 is damaged (" in warnings[0]
    assert load_checkpoint(tmp_path).step == 5


def fails(team, folder):
    """The disk of the second process is full."""
    from onejump import sharded

    written, saver, (tensors, _) = sharded.write_tensors, Saver(folder, team), pieces(team)

    def full(path, tensors):
        if team.rank == 1:
            raise OSError(28, "No space left on device")
        return written(path, tensors)

    sharded.write_tensors = full
    try:
        saver.save(7, tensors, {"a": 1})
        with pytest.raises(UserError) as error:
            saver.wait()
    finally:
        sharded.write_tensors = written
    return str(error.value)


def test_a_full_disk_is_one_line_on_all_processes_and_costs_no_checkpoint(tmp_path, crew):
    crew.run(2, saved, tmp_path, 5, shard=2)
    for text in crew.run(2, fails, tmp_path, shard=2):
        assert "step-00000007 (No space left on device); the last good one is step 5; free space" in text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    crew.run(2, saved, tmp_path, 8, shard=2)
    assert load_checkpoint(tmp_path).step == 8


def other_network(team, folder):
    tensors, _ = pieces(team)
    tensors["more"] = torch.zeros(2)
    with pytest.raises(UserError, match="its weights do not fit this network"):
        Saver(folder, team).load(tensors)


def test_pieces_of_another_network_are_refused(tmp_path, crew):
    crew.run(2, saved, tmp_path, 5, shard=2)
    crew.run(2, other_network, tmp_path, shard=2)


def test_nothing_in_the_files_is_a_pickle(tmp_path, crew):
    crew.run(2, saved, tmp_path, 5, shard=2)
    for path in (tmp_path / "step-00000005").iterdir():
        content = path.read_bytes()
        assert json.loads(content) if path.suffix == ".json" else content[8:10] == b'{"'


def unsharded(team, folder):
    """The first process alone cannot write; all of them hear of it."""
    with pytest.raises(UserError, match="could not write"):
        Saver(folder, team).save(5, {"x": torch.ones(2)}, {})


@pytest.mark.skipif(os.name == "nt", reason="a file as a folder")
def test_what_the_first_process_cannot_write_all_are_told(tmp_path, crew):
    (Path(tmp_path) / "checkpoints").write_text("in the way")
    crew.run(2, unsharded, tmp_path / "checkpoints")
