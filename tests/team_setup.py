"""A run that one process or many can train."""

import json

import torch
from torch import nn
from training_setup import OFTEN, Recorder, images, stage_of, student

from onejump.methods.continuous import ContinuousCT
from onejump.methods.ctm import CTM
from onejump.methods.ctm_gan import CTMGAN
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.precond import CM, Euler
from onejump.train import train


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def stage(name, **changes):
    """With clipping at work, and rows of every kind: some without a target, in TCM some at t'."""
    ctm = CTM(n=6, max_steps=3, mu=0.9)
    methods = {"ect": ECT(), "tcm": TCM(), "continuous": ContinuousCT(), "ctm": ctm, "gan": CTMGAN(ctm)}
    method = methods[name]
    return stage_of(method, **{"batch": 16, "micro_batch": 0, "clip": 0.5, **changes})


def nets_of(method):
    """Before the first step."""
    if not isinstance(method, CTM | CTMGAN):
        model = student()
        model.jump = CM() if isinstance(method, ContinuousCT) else model.jump
        return method.nets(model)
    torch.manual_seed(0)
    net = MLPConfig((1, 4, 4), label_dim=2, width=16, depth=2, dropout=0.2, second_time="random").build()
    nn.init.normal_(net.last.weight, std=0.1)
    critic = (nn.Sequential(nn.Flatten(), nn.Linear(16, 1)),) if isinstance(method, CTMGAN) else ()
    teacher = student(dropout=0.0, seed=1).eval().requires_grad_(False)
    return method.nets(ConsistencyModel(net, jump=Euler(), second_time=True), teacher, *critic)


def trained(team, out, wanted, progress=None):
    """(the EMA's weights, the lines of metrics.jsonl and evaluations.jsonl)."""
    result = train(
        wanted,
        nets_of(wanted.method),
        images(),
        out,
        seed=1,
        first_step=0,
        every=OFTEN,
        device="cpu",
        progress=progress or Recorder(),
        on_sample=lambda ema, step: None,
        on_evaluate=lambda ema, step: {"frechet": {"1": weights(ema).norm().item()}},
        team=team,
    )
    team.barrier()
    lines = [json.loads(line) for name in ("metrics", "evaluations") for line in open(out / f"{name}.jsonl")]
    return weights(result.ema).tolist(), lines
