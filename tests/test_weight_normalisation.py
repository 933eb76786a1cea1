"""Training with EDM2's network: its weights are normalised once a step, those of the student alone, before the passes.

EDM2 and TCM do it inside the forward pass in train mode, and TCM keeps its second forward, at r, from doing so.
"""

import copy
import dataclasses
import os
import signal
from dataclasses import replace

import pytest
import torch
from tiny_run import SMALL, STAGES, arrays, record
from training_setup import Recorder, images, run, stage_of

from onejump.checkpoint import load_checkpoint
from onejump.cli import main
from onejump.config import Recipe
from onejump.ema import ConstantEMA
from onejump.methods.base import Nets
from onejump.methods.ct import CT
from onejump.methods.ctm import CTM
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks import EDM2UNetConfig, SongUNetConfig
from onejump.networks.magnitude import MPConv, normalize
from onejump.optim import Adam, ConstantRate
from onejump.precond import Euler
from onejump.samplers import Trajectory
from onejump.saved import load_model
from onejump.start import starts_from
from onejump.train import Every, Interrupted, mix
from onejump.types import UserError

CONFIG = EDM2UNetConfig(4, 1, 2, 8, (1, 2), 1, (2,), channels_per_head=8, dropout=0.3, dropout_resolution=2)
NEVER = Every(log=0, save=0, sample=0, evaluate=0)
ADAM = {"optimizer": Adam((0.9, 0.99)), "rate": ConstantRate(1e-2)}


def student(seed=0):
    """Weights of all sizes, and gains that are not zero."""
    torch.manual_seed(seed)
    net = CONFIG.build()
    for p in net.parameters():
        p.data = p.data * 2 * torch.rand(len(p), *[1] * (p.ndim - 1)) if p.ndim else torch.tensor(0.5)
    return ConsistencyModel(net)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def magnitudes(model):
    rows = [m.weight.detach().flatten(1) for m in model.modules() if isinstance(m, MPConv)]
    return torch.cat([row.square().mean(1).sqrt() for row in rows])


def published_loop(model, stage, steps, seed):
    """A plain loop whose first forward of a step normalises each weight where it is used, and whose second does not."""
    forced, ema, data = [True], copy.deepcopy(model), images()

    def before_forward(layer, args):
        if forced[0]:
            with torch.no_grad():
                layer.weight.copy_(normalize(layer.weight))

    for layer in model.modules():
        if isinstance(layer, MPConv):
            layer.register_forward_pre_hook(before_forward)

    def target(x, r, cond, key):
        forced[0] = False
        fr = model(x, r, cond=cond, key=key)
        forced[0] = True
        return fr

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    for step in range(steps):
        x0, cond = data.batch(step, stage.batch, seed)
        torch.manual_seed(mix(seed, step, 0))
        loss, _ = stage.method.loss(Nets(model.train(), target), x0, cond, step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for average, p in zip(ema.parameters(), model.parameters(), strict=True):
            average.data.lerp_(p.data, 0.5)
    return ema


def test_two_steps_equal_a_loop_with_normalisation_inside_the_forward(tmp_path):
    stage = stage_of(ECT(), **ADAM, steps=2, micro_batch=0, ema=ConstantEMA(0.5))
    ours, theirs = student(), student()
    result = run(stage, tmp_path, nets=stage.method.nets(ours), every=NEVER)
    ema = published_loop(theirs, stage, 2, seed=1)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-4)
    torch.testing.assert_close(weights(result.ema), weights(ema), rtol=0, atol=1e-4)
    assert (weights(ours) - weights(student())).abs().max() > 0.1
    assert (magnitudes(ours) - 1).abs().max() > 1e-3  # as the last step left them


def test_weights_keep_their_magnitude(tmp_path):
    """Without it they grow: gradients stand at right angles to them."""
    stage = stage_of(ECT(), optimizer=Adam(), rate=ConstantRate(0.1), steps=12, micro_batch=0)
    model, trail = student(), []
    run(stage, tmp_path, nets=stage.method.nets(model), progress=Recorder(lambda _: trail.append(magnitudes(model))))
    assert all(0.9 < sizes.median() < 1.1 for sizes in trail) and trail[-1].max() < 1.5


def test_only_the_student_is_normalised(tmp_path):
    """TCM's frozen network stays bit-identical; an average is one of weights as the steps left them."""
    tcm = stage_of(TCM(), steps=3)
    nets = tcm.method.nets(student())
    before = weights(nets.frozen[0])
    run(tcm, tmp_path / "tcm", nets=nets, every=NEVER)
    assert torch.equal(weights(nets.frozen[0]), before) and not torch.equal(weights(nets.student), before)

    ct = stage_of(CT(), steps=1)
    nets = ct.method.nets(student())
    decay = nets.average.decay(0, 1)
    expected = [
        torch.lerp(p.detach().clone(), q, 1 - decay)
        for p, q in zip(nets.average.model.parameters(), parameters_after(ct, tmp_path / "a"), strict=True)
    ]
    run(ct, tmp_path / "b", nets=nets, every=NEVER)
    assert all(map(torch.equal, nets.average.model.parameters(), expected))


def parameters_after(stage, out):
    nets = stage.method.nets(student())
    run(stage, out, nets=nets, every=NEVER)
    return [p.detach() for p in nets.student.parameters()]


@pytest.mark.parametrize("method, precision", [(ECT(), "fp32"), (TCM(), "fp16")])
def test_resume_is_bit_exact(tmp_path, method, precision):
    """The checkpoint holds the weights as the step left them; the next one normalises them."""
    stage, ends = stage_of(method, **ADAM, steps=4, precision=precision), []
    for out, stops in ((tmp_path / "straight", ()), (tmp_path / "stopped", (1, 3))):
        for stop in stops:
            kill = Recorder(lambda done, stop=stop: os.kill(os.getpid(), signal.SIGINT) if done == stop else None)
            with pytest.raises(Interrupted):
                run(stage, out, nets=method.nets(student()), progress=kill, every=NEVER)
        run(stage, out, nets=method.nets(student()), every=NEVER)
        ends.append(load_checkpoint(out / "checkpoints").tensors)
    assert ends[0].keys() == ends[1].keys()
    differing = [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name]) and "seconds" not in name]
    assert not differing


def test_a_second_time_is_refused_before_training():
    stage = dataclasses.replace(stage_of(), method=CTM(), jump=Euler(), second_time="zero", sampler=Trajectory())
    with pytest.raises(UserError, match="^student.second_time: zero; EDM2UNetConfig reads one time only"):
        Recipe("ctm", CONFIG, {"student": stage})
    assert Recipe("ctm", SongUNetConfig(), {"student": stage})


def test_a_stage_starts_from_a_model_with_other_dropout_but_of_the_same_network():
    assert starts_from(CONFIG, replace(CONFIG, dropout=0.0, dropout_resolution=0))
    assert not starts_from(CONFIG, replace(CONFIG, channels_per_head=4))
    assert not starts_from(CONFIG, SongUNetConfig(4, 1, 2, 8, (1, 2), 1, (2,)))


NETWORK = "network=EDM2UNetConfig(img_resolution=8,img_channels=1,label_dim=10,model_channels=8,channel_mult=(1,2),"
NETWORK += "num_blocks=1,attn_resolutions=(4,),channels_per_head=8,dropout=0.2,dropout_resolution=4)"


SHORT = [*SMALL, *(f"{stage}.steps=2" for stage in STAGES)]


def test_a_diffusion_model_ect_and_tcm_from_the_command_line(tmp_path, capsys):
    """Dry run, the three stages, saved models; and ECT from this diffusion model with dropout in more layers."""
    assert main(["run", "digits", NETWORK, *SHORT, "--dry-run"]) == 0
    assert "EDM2UNetConfig" in capsys.readouterr().out
    out, other = tmp_path / "run", tmp_path / "other"
    for stage in STAGES:
        assert main(["train", "digits", NETWORK, *SHORT, "--stage", stage, "--out", str(out)]) == 0
        model, saved = load_model(out / stage).model, load_checkpoint(out / stage / "checkpoints").tensors
        assert isinstance(model.net.config, EDM2UNetConfig) and model.net.out_gain != 0
        assert all(torch.equal(value, saved[f"ema/net.{name}"]) for name, value in model.net.state_dict().items())
        assert record(out / stage / "stage.json")["skipped"] == 0
    assert arrays(out, tmp_path / "made.npz", "--n", "3")[0].shape == (3, 8, 8, 1)
    everywhere = NETWORK.replace("dropout_resolution=4", "dropout_resolution=0")
    init = ["--stage", "stage1", "--init", str(out / "teacher"), "--out", str(other)]
    assert main(["train", "digits", everywhere, *SHORT, *init]) == 0
    assert record(other / "stage1" / "stage.json")["initialised_from"]["path"] == str(out / "teacher")
