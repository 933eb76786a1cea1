"""A run that one process or many can train."""

import json

import torch
from training_setup import OFTEN, Recorder, images, stage_of, student

from onejump.methods.continuous import ContinuousCT
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.precond import CM
from onejump.train import train


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def stage(name, **changes):
    """With clipping at work, and rows of every kind: some without a target, in TCM some at t'."""
    method = {"ect": ECT(), "tcm": TCM(), "continuous": ContinuousCT()}[name]
    return stage_of(method, **{"batch": 16, "micro_batch": 0, "clip": 0.5, **changes})


def trained(team, out, wanted, progress=None):
    """(the EMA's weights, the lines of metrics.jsonl and evaluations.jsonl)."""
    model = student()
    if isinstance(wanted.method, ContinuousCT):
        model.jump = CM()
    result = train(
        wanted,
        wanted.method.nets(model),
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
