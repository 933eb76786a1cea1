from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import f64, golden

from onejump.ema import MAX_SIGMA_REL, Profile, Snapshots, gamma_of, mix, overlaps, sigma_rel
from onejump.posthoc import Averager, mapped, save_snapshot, track_in
from onejump.types import UserError

WIDTHS = (0.05, 0.1)


def profiles(steps, widths) -> list[Profile]:
    return [Profile(int(step), float(width)) for step, width in zip(steps, widths, strict=True)]


def tracked(folder, steps, first_step=0, count=8, start=None, widths=WIDTHS):
    """(the weights after each step, the Averager) of a made-up stage that saves its snapshots."""
    generator = torch.Generator().manual_seed(steps)
    walk = torch.randn(steps + 1, 6, generator=generator, dtype=torch.float64).cumsum(0)
    weights = {"a": walk[0, :2].clone(), "b": walk[0, 2:].reshape(2, 2).clone()}
    averager = Averager(Snapshots(widths, count), weights, first_step)
    averager.begin(folder, first_step)
    for k, theta in enumerate(walk[1:], 1):
        for averages, decay in zip(averager.lists, averager.decays(first_step + k), strict=True):
            torch._foreach_lerp_(averages, [theta[:2], theta[2:].reshape(2, 2)], 1 - decay)
        if averager.due(first_step + k, first_step + steps):
            averager.save(folder, first_step + k)
    return walk, averager


def exact(walk, wanted, first_step):
    """The EMA of this profile, from all weights there were: each the integral of the profile over its step."""
    edges = np.concatenate([[0], np.arange(first_step, first_step + len(walk))])
    shares = np.diff(np.minimum(edges / wanted.step, 1) ** (gamma_of(wanted.sigma_rel) + 1))
    return torch.from_numpy(shares) @ walk


def combined(folder, wanted):
    track = track_in(folder)
    track.combine([track.mix(wanted)], [folder / "out"])
    out = mapped(folder / "out")
    return torch.cat([out["a"], out["b"].flatten()]), track.mix(wanted)


def test_inner_products_of_profiles_are_the_published_ones():
    found = overlaps([Profile(64, 0.05)], [Profile(40, 0.1)]).item()
    np.testing.assert_allclose(found, golden("posthoc")["corr/a(64,.05)_b(40,.1)"], rtol=1e-9)


def test_coefficients_are_the_published_ones():
    data = golden("posthoc")
    have = profiles(data["posthoc/in_ofs"], data["posthoc/in_std"])
    for wanted, coefficients in zip(
        profiles(data["posthoc/out_ofs"], data["posthoc/out_std"]),
        data["posthoc/coefficients[in,out]"].T,
        strict=True,
    ):
        np.testing.assert_allclose(mix(have, wanted).weights, coefficients, atol=2e-9)


def test_a_reconstructed_average_is_the_published_codes(tmp_path):
    data = golden("posthoc")
    have = profiles(data["track/snap_ofs"] // data["track/batch"], data["track/snap_std"])
    for profile, values in zip(have, data["track/snapshots"], strict=True):
        save_snapshot(tmp_path, profile, 0, {"a": f64(values)})
    track = track_in(tmp_path)
    track.combine([track.mix(Profile(40, 0.075))], [tmp_path / "out"])
    np.testing.assert_allclose(mapped(tmp_path / "out")["a"], data["track/posthoc_0.075"], rtol=1e-8)


def test_snapshots_of_a_stage_are_its_exact_averages_and_equal_the_published_codes(tmp_path):
    data = golden("posthoc")
    steps = data["track/params_per_step"]
    averager = Averager(Snapshots(WIDTHS, count=4), {"a": f64(np.full(8, 7.0))})
    for n, theta in enumerate(steps, 1):
        for averages, decay in zip(averager.lists, averager.decays(n), strict=True):
            torch._foreach_lerp_(averages, [f64(theta)], 1 - decay)
        if averager.due(n, len(steps)):
            averager.save(tmp_path, n)
    track = track_in(tmp_path)
    assert [s.profile for s in track.snapshots] == profiles(
        data["track/snap_ofs"] // data["track/batch"], data["track/snap_std"]
    )
    for snapshot, values in zip(track.snapshots, data["track/snapshots"], strict=True):
        np.testing.assert_allclose(mapped(snapshot.path)["a"], values, rtol=1e-6)


@pytest.mark.parametrize("width", [0.03, 0.075, 0.2])
@pytest.mark.parametrize("first_step", [0, 300])
def test_the_error_stated_bounds_that_of_the_average(tmp_path, width, first_step):
    """By Cauchy and Schwarz: |sum of (p - q) theta| <= |p - q| |theta|, here about the last weights; both sum to 1."""
    walk, _ = tracked(tmp_path, 400, first_step, count=10)
    wanted = Profile(first_step + 400, width)
    found, made = combined(tmp_path, wanted)
    norm = overlaps([wanted], [wanted], first_step).item() ** 0.5
    seen = walk - walk[-1]
    spread = ((seen[1:] ** 2).sum(0) + first_step * seen[0] ** 2) ** 0.5
    assert (
        made.error < 0.1
        and ((found - exact(walk, wanted, first_step)).abs() <= made.error * norm * spread + 1e-6).all()
    )


def test_profiles_before_the_first_step_count_by_their_sum_alone(tmp_path):
    """Of a stage that counts on, wide averages need its first weights, which are saved once."""
    walk, _ = tracked(tmp_path, 200, first_step=400, count=8)
    track = track_in(tmp_path)
    assert [s.profile.step for s in track.snapshots[:3]] == [400, 425, 425] and len(track.snapshots) == 17
    first, *others = [s.profile for s in track.snapshots]
    wanted = Profile(600, 0.25)
    assert mix([first, *others], wanted, 400).error < 0.02 < 0.1 < mix(others, wanted, 400).error
    found, made = combined(tmp_path, wanted)
    torch.testing.assert_close(found, exact(walk, wanted, 400), rtol=0, atol=0.02)
    total = sum(w * s.profile.share(400) for w, s in zip(made.weights, track.snapshots, strict=True))
    assert abs(total - wanted.share(400)) < 0.01 and abs(wanted.share(400) - (2 / 3) ** (gamma_of(0.25) + 1)) < 1e-12


def test_overlaps_after_a_first_step_are_those_of_the_profiles_with_their_beginning_levelled():
    a, b, first = Profile(60, 0.05), Profile(80, 0.2), 30
    edges = np.concatenate([[0], np.linspace(first, 80, 200_001)])
    levels = [np.diff(np.minimum(edges / p.step, 1) ** (gamma_of(p.sigma_rel) + 1)) / np.diff(edges) for p in (a, b)]
    direct = (levels[0] * levels[1] * np.diff(edges)).sum()
    np.testing.assert_allclose(overlaps([a], [b], first).item(), direct, rtol=1e-6)


def test_a_saved_average_comes_back_bit_for_bit(tmp_path):
    _, averager = tracked(tmp_path, 60, first_step=20)
    found, made = combined(tmp_path, Profile(80, 0.1))
    assert made.error == 0 and torch.equal(found, torch.cat([averager.lists[1][0], averager.lists[1][1].flatten()]))
    at_start, made = combined(tmp_path, Profile(20, 0.2))  # where all averages are the weights that it began with
    assert made.error < 1e-7 and torch.equal(at_start, tracked(tmp_path / "other", 60, 20)[0][0])


def test_snapshots_are_spread_evenly_and_the_last_step_is_one():
    for first, steps, count in ((0, 100, 7), (250, 40, 20), (5, 3, 10)):
        due = [n for n in range(first, first + steps + 1) if Snapshots(count=count).due(n, first, first + steps)]
        assert len(due) == min(count, steps) and due[-1] == first + steps and first not in due
        assert max(np.diff([first, *due])) - min(np.diff([first, *due])) <= 1


def test_averages_go_on_from_a_checkpoint_bit_for_bit():
    theta, snapshots = {"w": torch.randn(5)}, Snapshots((0.02, 0.1, 0.2))
    one, other = Averager(snapshots, theta), Averager(snapshots, {"w": torch.zeros(5)})
    kept = {name: tensor.clone() for name, tensor in one.tensors().items()}
    other.load(kept)
    assert all(torch.equal(other.tensors()[name], tensor) for name, tensor in kept.items()) and len(kept) == 3
    for wrong in ({}, {**kept, "0.3/w": kept["0.1/w"]}, {**kept, "0.1/w": torch.zeros(4)}):
        with pytest.raises(UserError, match="snapshots: the checkpoint's 0.*/w is not what this stage averages"):
            other.load(wrong)


def test_going_on_from_a_step_forgets_what_was_saved_after_it(tmp_path):
    _, averager = tracked(tmp_path, 40, first_step=10, count=4)
    averager.begin(tmp_path, 33)
    assert track_in(tmp_path).steps == [10, 20, 30]
    averager.begin(tmp_path, 10)
    assert track_in(tmp_path).steps == [10]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_snapshot_is_named_and_nothing_is_made_of_it(tmp_path):
    walk, _ = tracked(tmp_path, 80)
    worst = tmp_path / "step-00000070-0.1.safetensors"
    flip(worst, -3)
    with pytest.raises(UserError, match="step-00000070-0.1.*damaged.*checksum.*delete it"):
        combined(tmp_path, Profile(80, 0.075))
    worst.write_bytes(worst.read_bytes()[:-9])
    with pytest.raises(UserError, match="step-00000070-0.1.*damaged.*delete it"):
        track_in(tmp_path)
    worst.unlink()
    found, made = combined(tmp_path, Profile(80, 0.075))
    assert made.error < 0.1
    save_snapshot(tmp_path, Profile(85, 0.1), 5, {"a": torch.zeros(2)})
    with pytest.raises(UserError, match="step-00000085-0.1.*another training"):
        track_in(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sigma_rels": ()}, "sigma_rels"),
        ({"sigma_rels": (0.1, 0.1)}, "sigma_rels"),
        ({"sigma_rels": (0.05, 0.3)}, "sigma_rels: 0.3; a share of training is needed, 0.001 to 0.289"),
        ({"sigma_rels": (float("nan"),)}, "sigma_rels"),
        ({"count": 0}, "count: 0"),
    ],
)
def test_snapshots_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        Snapshots(**wrong)


def test_every_width_that_is_allowed_has_a_rising_power_function():
    for width in (0.001, 0.05, MAX_SIGMA_REL):
        gamma = gamma_of(width)
        assert gamma > -1e-9 and abs(sigma_rel(gamma) / width - 1) < 1e-9


def test_averages_in_pieces_are_saved_whole(tmp_path):
    """One process here; what it holds of each tensor must be put together all the same."""
    from torch.distributed import destroy_process_group, init_device_mesh, init_process_group
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        mesh, weights = init_device_mesh("cpu", (1,)), torch.randn(4, 3)
        averager = Averager(Snapshots(), {"w": distribute_tensor(weights, mesh, [Shard(0)])}, first_step=5)
        averager.begin(tmp_path / "silent", 5, writes=False)
        averager.save(tmp_path / "silent", 6, writes=False)
        averager.begin(tmp_path / "ema", 5)
        averager.save(tmp_path / "ema", 6)
    finally:
        destroy_process_group()
    files = [snapshot.path for snapshot in track_in(tmp_path / "ema").snapshots]
    assert len(files) == 3 and all(torch.equal(mapped(file)["w"], weights) for file in files)
    assert not (tmp_path / "silent").exists()
