"""Small finished runs, their weights drawn at random and their records made up, and the command on them."""

import argparse
import json
from dataclasses import replace

import torch

from onejump import cli_compare
from onejump.config import Recipe, Stage
from onejump.config_json import to_json
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM
from onejump.model import ConsistencyModel
from onejump.networks.mlp import MLPConfig
from onejump.report import contact_sheet
from onejump.samplers import ODE, Multistep
from onejump.saved import SavedModel, model_sha256, save_model

NETWORK = MLPConfig((1, 8, 8), label_dim=2, width=8, depth=1)
STAGES = {
    "teacher": Stage(DSM(), 100, batch=10, sampler=ODE()),
    "stage1": Stage(ECT(), 200, batch=10),
    "stage2": Stage(TCM(), 50, batch=20, count_on=True, sampler=Multistep(mid=(2.0,))),
}
PASSES = {"teacher": 3, "stage1": 4, "stage2": 4}
REFERENCE = {"n": 1437, "fingerprint": "f00d", "detector": "some", "detector_sha256": "beef", "real_half_frechet": 1.5}
DEVICE = {"device": "cpu", "threads": 1}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def save(path, seed, sampler, provenance, shape=(1, 8, 8), names=("a", "b")):
    torch.manual_seed(seed)
    network = replace(NETWORK, shape=shape, label_dim=len(names))
    net = network.build()
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(std=0.3)
    save_model(path, SavedModel(ConsistencyModel(net), network, sampler, shape, names, provenance))


def numbers_of(frechet, steps, nfe):
    return {"frechet": frechet, "kid": frechet / 100, "n": 2000, "nfe": nfe, "seconds": steps / 4}


def write_run(out, seed=0, frechet=1.0, stages=STAGES, **changes):
    """A finished and evaluated run, its weights drawn at random."""
    recipe = Recipe("r", NETWORK, stages, seed=seed, **changes)
    write(out / "recipe.json", to_json(recipe))
    write(out / "run.json", {**DEVICE, "command": "onejump run r"})
    before, found = None, {}
    for i, (name, stage) in enumerate(stages.items()):
        origin = {"data": "<dots>", "data_fingerprint": "f00d", "seed": seed, "method": to_json(stage.method)}
        save(out / name / "model", 10 * seed + i, stage.sampler, origin)
        first, images = recipe.first_step(name), stage.steps * stage.batch
        summary = {"first_step": first, "last_step": first + stage.steps, "images": images, "seconds": 60.0 * (i + 1)}
        write(out / name / "stage.json", summary | {"started_from": before})
        before = model_sha256(out / name)
        diffusion = isinstance(stage.sampler, ODE)
        distances = (
            {"18": numbers_of(frechet, 18, 35)}
            if diffusion
            else {str(k): numbers_of(frechet / (i + k), k, k) for k in (1, 2)}
        )
        line = {"step": first + stage.steps, "frechet": {} if diffusion else {"1": frechet}}
        (out / name / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
        found[name] = {"sampler": to_json(stage.sampler), "steps": distances, "model_sha256": before}
    write(out / "evaluation.json", {"reference": REFERENCE, "stages": found})
    contact_sheet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), 2, out / "report" / "real.png")
    return out


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def command(*argv):
    """`onejump compare` with these words; returns what there is to do."""
    commands = argparse.ArgumentParser().add_subparsers()

    def add(name, function, text, epilog=""):
        made = commands.add_parser(name, epilog=epilog)
        made.set_defaults(command=function)
        return made

    cli_compare.add_commands(add)
    args = commands.choices["compare"].parse_args([str(word) for word in argv])
    return args.command(args)
