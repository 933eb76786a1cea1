"""The loop with a target that averages the student, a teacher and a critic: whose weights change, when, and resume."""

import copy
import signal

import pytest
import torch
from torch import nn
from training_setup import Recorder, run, stage_of

from onejump.checkpoint import load_checkpoint
from onejump.data.image_set import ImageSet
from onejump.ema import ConstantEMA, PowerEMA, Snapshots, gamma_of
from onejump.methods.cd import CD
from onejump.methods.ct import CT
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.model import ConsistencyModel
from onejump.networks.critic import SmallCriticConfig
from onejump.networks.mlp import MLPConfig
from onejump.precond import CM, Euler
from onejump.train import Every, Interrupted
from onejump.types import UserError

CLOCK = {"seconds", "train_seconds", "images_per_second"}
GAN = CTMGAN(CTM(n=6, max_steps=3, mu=0.9))
METHODS = {"CT": CT(s0=2, s1=40, mu0=0.8), "CD": CD(n=6, mu=0.9), "CTM": GAN.ctm, "CTM with critic": GAN}


def data() -> ImageSet:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet("noise", pixels, torch.arange(40) % 2, ("even", "odd"))


def model(seed: int, trajectories: bool = False, dropout: float = 0.2) -> ConsistencyModel:
    torch.manual_seed(seed)
    second_time = "random" if trajectories else "off"
    net = MLPConfig((1, 8, 8), label_dim=2, width=16, depth=2, dropout=dropout, second_time=second_time).build()
    nn.init.normal_(net.last.weight, std=0.1)
    return ConsistencyModel(net, jump=Euler() if trajectories else CM(), second_time=trajectories)


def nets_of(method):
    """The same ones at every call: a run that is started again begins with them."""
    student = model(0, isinstance(method, CTM | CTMGAN))
    if isinstance(method, CT):
        return method.nets(student)
    teacher = model(1, dropout=0.0).eval().requires_grad_(False)
    if isinstance(method, CTMGAN):
        torch.manual_seed(2)
        return method.nets(student, teacher, SmallCriticConfig(img_channels=1, width=4).build())
    return method.nets(student, teacher)


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in module.named_parameters()}


def history(method, out, steps=5, **changes):
    """What each network's weights are before the first step and after every one of them."""
    nets, found = nets_of(method), []
    modules = {"student": nets.student, "average": nets.average.model}
    modules |= {"teacher": nets.teacher} if nets.teacher else {}
    modules |= {"critic": nets.critic.net} if nets.critic else {}

    def note(done=0):
        found.append({name: copy.deepcopy(module) for name, module in modules.items()})

    note()
    run(stage_of(method, steps=steps, **changes), out, nets=nets, data=data(), progress=Recorder(note))
    return nets, found


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_target_is_the_average_of_the_students_by_the_methods_decay(method, tmp_path):
    """Closed form over 5 steps: sum of (1 - mu_k) theta_k, each times the decays of the later steps."""
    nets, found = history(method, tmp_path)
    turns = [step for step in range(5) if not (nets.critic and nets.critic.turn(step))]
    expected = [p.double() for p in found[0]["average"].parameters()]
    for step in turns:
        mu = 0.8 ** (2 / (method.levels(step, 5) - 1)) if isinstance(method, CT) else 0.9
        for i, p in enumerate(found[step + 1]["student"].parameters()):
            expected[i] = mu * expected[i] + (1 - mu) * p.detach().double()
    for p, q in zip(found[5]["average"].parameters(), expected, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-7)
    assert bits(found[0]["average"]) == bits(found[0]["student"])
    assert bits(found[5]["average"]) != bits(found[5]["student"])


def test_decays_of_ct_are_those_of_its_curriculum():
    """mu(k) = exp(2 ln mu0 / (N(k) - 1)) at the step k whose loss was just taken."""
    method = METHODS["CT"]
    decay = method.nets(model(0)).average.decay
    levels = [method.levels(step, 5) for step in range(5)]
    assert levels == [2, 19, 26, 32, 37]
    assert [decay(step, 5) for step in range(5)] == pytest.approx([0.8 ** (2 / (n - 1)) for n in levels])


def test_each_turn_trains_one_side_and_leaves_the_other_bit_equal(tmp_path):
    nets, found = history(GAN, tmp_path, steps=6, ema=ConstantEMA(0.5))
    for step, (before, after) in enumerate(zip(found[:-1], found[1:], strict=True)):
        changed = {name for name in before if bits(before[name]) != bits(after[name])}
        assert changed == ({"critic"} if step % 2 else {"student", "average"})
        for old, new in zip(before["critic"].parameters(), after["critic"].parameters(), strict=True):
            assert step % 2 == 0 or old.ndim == 1 or not torch.equal(old, new)


def test_the_evaluated_average_stands_still_at_the_critics_turns(tmp_path):
    seen = samples(stage_of(GAN, steps=6, ema=ConstantEMA(0.5)), nets_of(GAN), tmp_path)
    assert seen[5] == seen[6]  # the sixth step is the critic's


def samples(stage, nets, out):
    """The EMA's weights at the 5th step and the last."""
    seen = {}
    run(stage, out, nets=nets, data=data(), on_sample=lambda ema, step: seen.update({step: bits(ema)}))
    return seen


@pytest.mark.parametrize("steps", [6, 7])  # the last is a critic's turn, or a student's
def test_power_functions_are_of_steps_also_where_half_of_them_are_the_critics(steps, tmp_path):
    """Closed form: theta_k counts by the integral of p from k - 1 to k, and at the critic's turns is that before."""
    stage = stage_of(GAN, steps=steps, ema=PowerEMA(6.94), snapshots=Snapshots((0.05, 0.1), count=1))
    nets, thetas = nets_of(GAN), []
    note = Recorder(lambda done: thetas.append([p.detach().double().clone() for p in nets.student.parameters()]))
    ema = run(stage, tmp_path, nets=nets, data=data(), progress=note).ema
    averager = load_checkpoint(tmp_path / "checkpoints").tensors
    for name, gamma in (("ema", 6.94), ("snapshots/0.05", gamma_of(0.05)), ("snapshots/0.1", gamma_of(0.1))):
        shares = [((k + 1) / steps) ** (gamma + 1) - (k / steps) ** (gamma + 1) for k in range(steps)]
        for i, (field, p) in enumerate(ema.named_parameters()):
            expected = sum(share * theta[i] for share, theta in zip(shares, thetas, strict=True))
            found = p if name == "ema" else averager[f"{name}/{field.removeprefix('net.')}"]
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert all(a.equal(b) for a, b in zip(thetas[0], thetas[1], strict=True))


@pytest.mark.parametrize("at", [3, 4])
def test_averages_of_steps_too_stay_as_they_are_in_a_bad_step(at, tmp_path):
    """Of the critic and of the student."""
    stage, seen = stage_of(Bad(GAN, {at}), steps=6, ema=PowerEMA(6.94)), []
    every = Every(log=4, save=100, sample=1, evaluate=100)
    nets = nets_of(GAN)
    run(stage, tmp_path, nets=nets, data=data(), every=every, on_sample=lambda ema, step: seen.append(bits(ema)))
    assert [a == b for a, b in zip(seen[1:-1], seen[2:], strict=True)] == [step == at for step in range(2, 6)]


def test_power_iteration_is_all_that_moves_in_the_critic_at_the_students_turns(tmp_path):
    """Its weights' norms are estimated at every pass: buffers, which a checkpoint holds and no optimiser sees."""
    _, found = history(GAN, tmp_path, steps=1)
    before, after = found[0]["critic"], found[1]["critic"]
    assert bits(before) == bits(after)
    moved = [n for n, b in before.named_buffers() if not b.equal(dict(after.named_buffers())[n])]
    assert moved and all(n.endswith(("_u", "_v")) for n in moved)
    for name in moved:
        assert dict(after.named_buffers())[name].norm() == pytest.approx(1, abs=1e-5)


def state(out):
    """All that a checkpoint holds but the clock."""
    saved = load_checkpoint(out / "checkpoints")
    meta = {name: value for name, value in saved.meta.items() if name not in CLOCK}
    meta["sums"] = {name: value for name, value in meta["sums"].items() if name not in CLOCK}
    return saved.step, {name: (t.dtype, t.numpy().tobytes()) for name, t in saved.tensors.items()}, meta


def die_at(step, error):
    def at_step(done):
        if done == step:
            raise error

    return Recorder(at_step)


@pytest.mark.parametrize(("method", "precision"), [*((method, "fp32") for method in METHODS.values()), (GAN, "fp16")])
def test_resume_is_bit_exact(method, precision, tmp_path):
    """Stopped after a student's and after a critic's turn, and killed between two checkpoints."""
    stage = stage_of(method, steps=12, precision=precision)
    run(stage, tmp_path / "straight", nets=nets_of(method), data=data())
    for done in (4, 7):
        stop = Recorder(lambda n, done=done: signal.raise_signal(signal.SIGINT) if n == done else None)
        with pytest.raises(Interrupted):
            run(stage, tmp_path / "b", nets=nets_of(method), data=data(), progress=stop)
    with pytest.raises(RuntimeError):
        run(stage, tmp_path / "b", nets=nets_of(method), data=data(), progress=die_at(11, RuntimeError("gone")))
    run(stage, tmp_path / "b", nets=nets_of(method), data=data())
    a, b = state(tmp_path / "straight"), state(tmp_path / "b")
    assert a[0] == b[0] == 12 and a[2] == b[2] and a[1].keys() == b[1].keys()
    assert [name for name in a[1] if a[1][name] != b[1][name]] == []
    prefixes = {name.split("/")[0] for name in a[1]}
    assert {"student", "ema", "average", "optimizer"} <= prefixes
    assert ({"critic", "critic_optimizer"} <= prefixes) == isinstance(method, CTMGAN)


def test_both_optimisers_count_their_own_turns(tmp_path):
    run(stage_of(GAN, steps=7), tmp_path, nets=nets_of(GAN), data=data())
    counts = {}
    for name, tensor in load_checkpoint(tmp_path / "checkpoints").tensors.items():
        if name.endswith("step"):
            counts.setdefault(name.split("/")[0], set()).add(float(tensor))
    assert counts == {"optimizer": {4.0}, "critic_optimizer": {3.0}}


class Bad:
    """A method whose gradient is not finite at some steps."""

    def __init__(self, method, at):
        self.method, self.at = method, at

    def loss(self, nets, x0, cond, step, steps):
        loss, stats = self.method.loss(nets, x0, cond, step, steps)
        return (loss * float("nan") if step in self.at else loss), stats


@pytest.mark.parametrize("at", [2, 3])
def test_a_step_whose_gradient_is_not_finite_leaves_everything_as_it_was(at, tmp_path):
    """At a student's turn and at a critic's: also both optimisers, and the next turns go on."""
    nets, found = nets_of(GAN), []
    modules = (nets.student, nets.average.model, nets.critic.net)
    stage = stage_of(Bad(GAN, {at}), steps=6, ema=ConstantEMA(0.5))
    note = Recorder(lambda done: found.append([bits(module) for module in modules]))
    result = run(stage, tmp_path, nets=nets, data=data(), progress=note)
    assert found[at] == found[at - 1] and result.skipped == 1
    assert all(a != b for a, b in zip(found[at], found[at + 2], strict=True))
    steps = {
        name.split("/")[0]: float(tensor)
        for name, tensor in load_checkpoint(tmp_path / "checkpoints").tensors.items()
        if name.endswith("step")
    }
    assert steps == {"optimizer": 3 - (at == 2), "critic_optimizer": 3 - (at == 3)}


def test_the_evaluated_average_skips_what_was_skipped(tmp_path):
    seen = samples(stage_of(Bad(METHODS["CD"], {5}), steps=6), nets_of(METHODS["CD"]), tmp_path)
    assert seen[5] == seen[6]


def test_a_checkpoint_of_another_teacher_is_refused(tmp_path):
    method = METHODS["CD"]
    run(stage_of(method, steps=3), tmp_path, nets=nets_of(method), data=data())
    other = method.nets(model(0), model(7, dropout=0.0).eval().requires_grad_(False))
    with pytest.raises(UserError, match="frozen network is not the one"):
        run(stage_of(method, steps=3), tmp_path, nets=other, data=data())


def test_the_teacher_stays_in_eval_mode_and_the_average_in_train_mode(tmp_path):
    """Its dropout shares the student's masks."""
    nets, _ = history(GAN, tmp_path, steps=2)
    assert not nets.teacher.training and nets.average.model.training and nets.critic.net.training
    assert not any(p.requires_grad for p in nets.average.model.parameters())
