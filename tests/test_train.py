import dataclasses
import itertools
import json
import math

import pytest
import torch
from training_setup import Recorder, images, run, stage_of, student

from onejump.checkpoint import load_checkpoint
from onejump.ema import ConstantEMA, PowerEMA
from onejump.losses import squared_l2
from onejump.methods.base import Nets
from onejump.methods.dsm import DSM
from onejump.methods.tcm import TCM
from onejump.optim import ConstantRate, CosineRate
from onejump.run_state import Run
from onejump.train import Drawn, Every, accumulate, mix
from onejump.types import UserError

NEVER = Every(log=0, save=0, sample=0, evaluate=0)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """No randomness: t is a function of the image. `scale` maps a step to a factor on the loss."""

    scale: dict = dataclasses.field(default_factory=dict)
    seen: list = dataclasses.field(default_factory=list)

    def nets(self, student):
        return Nets(student, target=student)

    def loss(self, nets, x0, cond, step, steps):
        self.seen.append((step, steps, torch.initial_seed(), len(x0)))
        t = 0.5 + x0.flatten(1).mean(1).abs()
        distance = squared_l2(nets.student(x0, t, cond=cond), x0)
        return distance.mean() * self.scale.get(step, 1.0), {"t": t, "distance": distance}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def follow(nets, trail):
    return Recorder(lambda done: trail.append(weights(nets.student).double()))


def test_seeds_of_all_passes_differ():
    seeds = [mix(*numbers) for numbers in itertools.product(range(4), range(500), range(4), range(4))]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0 and max(seeds) < 2**63
    low = {s & 0xFFFFFFFF for s in seeds}  # all that the generator of the CPU takes
    assert len(low) > len(seeds) - 5
    flips = [bin(mix(0, step, 0, 0) ^ mix(0, step + 1, 0, 0)).count("1") for step in range(200)]
    assert 29 < sum(flips) / 200 < 34


def test_a_pass_is_seeded_by_seed_and_step(tmp_path):
    method = Fixed()
    run(stage_of(method, steps=2), tmp_path, seed=5, first_step=7, every=NEVER)
    assert method.seen == [(s, 9, mix(5, s, 0), 4) for s in (7, 8) for _ in range(3)]


def test_seeds_give_other_noise(tmp_path):
    results = []
    for number, seed in enumerate((1, 2, 1)):
        stage = stage_of(steps=2, micro_batch=0)
        results.append(weights(run(stage, tmp_path / str(number), seed=seed, every=NEVER).ema))
    assert results[0].equal(results[2]) and not results[0].equal(results[1])


@pytest.mark.parametrize("micro", [4, 5, 1])
def test_accumulation_averages(micro):
    """Whole batch = equal parts = parts whose last one is smaller."""
    x0, cond = images().batch(0, 12, seed=0)
    gradients, losses = [], []
    for size in (0, micro):
        stage = stage_of(Fixed(), micro_batch=size)
        nets = Nets(student(0.0), target=student(0.0))
        run_ = Run.start(stage, nets, 0, torch.device("cpu"))
        loss, stats = accumulate(stage, nets, x0, cond, 0, 1, Drawn(0), run_.updater.scale)
        gradients.append(torch.cat([p.grad.flatten() for p in nets.student.parameters()]))
        losses.append(loss)
        assert len(stats["t"]) == 12
    assert gradients[0].norm() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


def test_training_in_micro_batches_gives_the_same_weights(tmp_path):
    results = []
    for micro in (0, 4, 5):
        stage = stage_of(Fixed(), steps=4, micro_batch=micro, rate=ConstantRate(1e-3))
        nets = stage.method.nets(student(0.0))
        run(stage, tmp_path / str(micro), nets=nets, every=NEVER)
        results.append(weights(nets.student))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ema, first_step", [(ConstantEMA(0.9), 0), (PowerEMA(6.94), 0), (PowerEMA(2.0), 30)])
def test_ema_equals_its_sum_in_float64(tmp_path, ema, first_step):
    """sum_n w_n theta_n, w_n = (1 - beta_n) prod_{m > n} beta_m, with n counted from 1 over all stages."""
    stage = stage_of(DSM(), ema=ema, steps=12)
    nets = stage.method.nets(student())
    trail = [weights(nets.student).double()]
    result = run(stage, tmp_path, nets=nets, progress=follow(nets, trail), first_step=first_step, every=NEVER)
    betas = [ema.decay(first_step + n) for n in range(1, 13)]
    expected = math.prod(betas) * trail[0]
    for n in range(12):
        expected += (1 - betas[n]) * math.prod(betas[n + 1 :]) * trail[n + 1]
    torch.testing.assert_close(weights(result.ema).double(), expected, rtol=0, atol=1e-6)
    assert (trail[-1] - trail[0]).abs().max() > 1e-2


def test_power_ema_is_the_power_function(tmp_path):
    """Training from the start, theta_n has weight ~ n^gamma (Karras et al. 2024, eq. 121)."""
    stage, trail = stage_of(DSM(), ema=PowerEMA(6.94), steps=60, batch=4, micro_batch=0), []
    nets = stage.method.nets(student())
    ema = run(stage, tmp_path, nets=nets, progress=follow(nets, trail), every=NEVER).ema
    n = torch.arange(1, 61, dtype=torch.float64)
    profile = (n / 60) ** 7.94 - ((n - 1) / 60) ** 7.94
    torch.testing.assert_close(weights(ema).double(), profile @ torch.stack(trail), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, factor):
    bad = {3: factor, 4: factor, 9: factor}
    stage = stage_of(Fixed(bad), ema=ConstantEMA(0.5))
    nets, trail = stage.method.nets(student()), []
    averages = {}
    result = run(
        stage,
        tmp_path,
        nets=nets,
        progress=follow(nets, trail),
        every=Every(log=5, save=1, sample=1, evaluate=0),
        on_sample=lambda ema, step: averages.update({step: weights(ema)}),
    )
    moved = [not a.equal(b) for a, b in zip(trail[:-1], trail[1:], strict=True)]  # moved[i]: by step number i + 1
    assert [i + 1 for i, m in enumerate(moved) if not m] == [3, 4, 9]
    assert averages[3].equal(averages[4]) and averages[4].equal(averages[5]) and not averages[5].equal(averages[6])
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["skipped"] for line in metrics] == [2, 3, 3, 3] and result.skipped == 3
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in metrics)


def test_ten_skips_in_a_row_stop_with_the_way_out(tmp_path):
    stage = stage_of(Fixed({step: math.nan for step in range(7, 20)}))
    progress = Recorder()
    with pytest.raises(UserError, match="step 17: .*10 steps in a row.*step-00000015.*lower rate.*clip") as error:
        run(stage, tmp_path, progress=progress)
    assert "\n" not in str(error.value) and progress.closed
    assert all(t.isfinite().all() for t in load_checkpoint(tmp_path / "checkpoints").tensors.values())


def test_nine_skips_in_a_row_do_not_stop(tmp_path):
    bad = {step: math.nan for step in (*range(9), *range(10, 19))}
    assert run(stage_of(Fixed(bad)), tmp_path).skipped == 18


def test_numbers_that_are_not_finite_are_never_saved(tmp_path):
    run(stage_of(Fixed(), steps=3), tmp_path)
    stage = stage_of(Fixed({3: 1e5}), steps=6, rate=ConstantRate(1e38))  # step 3 sends the weights beyond float32
    with pytest.raises(UserError, match="step 6: student/net.* no longer finite .* lower rate"):
        run(stage, tmp_path)
    assert load_checkpoint(tmp_path / "checkpoints").step == 3


def test_the_gradient_is_clipped_to_its_norm(tmp_path):
    """RAdam's first step, rectification off, is the rate times the gradient."""
    stage = stage_of(Fixed(), steps=1, clip=0.25, rate=ConstantRate(1.0))
    nets = stage.method.nets(student(0.0))
    before = weights(nets.student)
    run(stage, tmp_path, nets=nets)
    torch.testing.assert_close((weights(nets.student) - before).norm(), torch.tensor(0.25), rtol=1e-4, atol=0)
    assert lines(tmp_path / "metrics.jsonl")[0]["grad_norm"] > 1  # logged before clipping


def test_fp16_sees_the_gradients_of_fp32(tmp_path):
    """Scaled by 16 and scaled back; a loss scale that leaked would show 16 times as much."""
    norms, losses, end = [], [], []
    for precision in ("fp32", "fp16", "bf16"):
        stage = stage_of(Fixed(), steps=8, precision=precision, rate=CosineRate(1e-3))
        nets = stage.method.nets(student(0.0))
        run(stage, tmp_path / precision, nets=nets, every=dataclasses.replace(NEVER, log=8))
        (line,) = lines(tmp_path / precision / "metrics.jsonl")
        norms.append(line["grad_norm"]), losses.append(line["loss"]), end.append(weights(nets.student))
        assert all(p.dtype == torch.float32 for p in nets.student.parameters())
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=0.02) and norms[1] != norms[0]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.02)
    torch.testing.assert_close(end[1], end[0], rtol=0, atol=2e-4)


def test_fp16_overflow_halves_the_loss_scale_and_skips(tmp_path):
    stage = stage_of(Fixed({2: 1e5, 5: 1e5}), steps=8, precision="fp16")
    result = run(stage, tmp_path, every=NEVER)
    assert (result.skipped, load_checkpoint(tmp_path / "checkpoints").tensors["optimizer/scale"]) == (2, 16 / 4)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_student_and_target_run_in_the_stages_precision_and_the_ema_in_float32(tmp_path, precision, dtype):
    stage = stage_of(TCM(), steps=1, precision=precision)
    nets, seen = stage.method.nets(student()), {}
    for name, model in (("student", nets.student), ("boundary", nets.target.boundary)):
        model.net.first.register_forward_hook(lambda m, x, out, name=name: seen.update({name: out.dtype}))

    def sample(ema, step):
        trained = seen["student"]
        ema(torch.zeros(1, 1, 4, 4), torch.ones(1))  # a copy of the student, with the student's hook
        seen.update(ema=seen["student"], student=trained)
        assert ema.autocast is None and not ema.training and not any(p.requires_grad for p in ema.parameters())

    run(stage, tmp_path, nets=nets, on_sample=sample)
    assert seen == {"student": dtype, "boundary": dtype, "ema": torch.float32}


def test_no_gradient_reaches_target_weights_and_their_dropout_is_on(tmp_path):
    stage = stage_of(TCM())
    nets = stage.method.nets(student())
    boundary = nets.target.boundary.eval()
    before = weights(boundary)
    run(stage, tmp_path, nets=nets)
    assert weights(boundary).equal(before) and all(p.grad is None for p in boundary.parameters())
    assert boundary.training and not weights(nets.student).equal(before)


def test_metrics_are_the_means_over_their_interval(tmp_path):
    method, seen = Fixed(), []
    stage = stage_of(method, steps=6, rate=CosineRate(1e-2))

    class Spy:
        def nets(self, student):
            return method.nets(student)

        def loss(self, nets, x0, cond, step, steps):
            loss, stats = method.loss(nets, x0, cond, step, steps)
            seen.append((step, loss.item() * len(x0) / 12, stats["t"].clone(), stats["distance"].detach()))
            return loss, stats

    object.__setattr__(stage, "method", Spy())
    run(stage, tmp_path, first_step=8, every=dataclasses.replace(NEVER, log=5))
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [10, 14]  # 10 = a multiple of 5; 14 = the end
    for line, steps in zip(metrics, ((8, 9), (10, 11, 12, 13)), strict=True):
        part = [s for s in seen if s[0] in steps]
        assert line["loss"] == pytest.approx(sum(s[1] for s in part) / len(steps), rel=1e-6)
        t, distance = torch.cat([s[2] for s in part]), torch.cat([s[3] for s in part])
        edges = [0.002 * (80 / 0.002) ** (i / 16) for i in range(17)]
        for low, high, mean in zip(edges[:-1], edges[1:], line["loss_by_t"], strict=True):
            inside = (t >= low) & (t < high)
            assert mean == (pytest.approx(distance[inside].mean().item(), rel=1e-5) if inside.any() else None)
        progress = (steps[-1] - 8) / 6
        assert line["rate"] == pytest.approx(1e-2 * (1 + math.cos(math.pi * progress)) / 2)
        assert line["images_per_second"] > 0 and line["seconds"] >= line["train_seconds"] > 0


def test_callbacks_come_at_their_steps_and_at_the_end(tmp_path):
    samples, progress = [], Recorder()
    result = run(stage_of(steps=19), tmp_path, on_sample=lambda ema, step: samples.append(step), progress=progress)
    assert samples == [5, 10, 15, 19]
    evaluations = lines(tmp_path / "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [6, 12, 18, 19]
    assert evaluations[1]["frechet"] == {"1": 1 / 12} and evaluations[0].keys() >= {"seconds", "train_seconds"}
    assert (result.first_step, result.last_step, result.images) == (0, 19, 19 * 12)
    assert result.path == tmp_path / "checkpoints" / "step-00000019" and result.path.is_dir()
    assert progress.started == (19, 0) and progress.closed and [m["step"] for m in progress.lines] == [4, 8, 12, 16, 19]


def test_a_short_stage_that_never_trained_is_not_finished(tmp_path):
    with pytest.raises(UserError, match="step 3: .*3 steps in a row"):
        run(stage_of(Fixed(dict.fromkeys(range(3), math.nan)), steps=3), tmp_path)
