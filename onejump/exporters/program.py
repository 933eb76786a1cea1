"""torch.export: a generator as one graph that needs PyTorch, and no line of onejump."""

import json
from pathlib import Path

import torch

from onejump.exporters.generator import (
    Exported,
    GeneratorGraph,
    difference,
    draft_of,
    facts,
    quiet,
    signature,
    traced,
)
from onejump.networks.diffusers_config import OURS
from onejump.saved import SavedModel


def export_program(saved: SavedModel, path: str | Path, steps: int = 1) -> Exported:
    """Writes the saved sampler in so many steps as path (.pt2), for batches of any size, on the model's device.

    Nothing is written unless the program that is read back makes our images.
    Raises UserError where it does not, and for diffusion models.
    """
    path, graph = Path(path), GeneratorGraph(saved, steps)
    known = facts(saved, graph)
    program = traced(graph, saved)
    with draft_of(path) as draft, quiet():
        torch.export.save(program, draft, extra_files={OURS: json.dumps(known, indent=1)})
        again = torch.export.load(draft).module()
        worst = difference(graph, saved, lambda given: again(*given), "torch.export")
    return Exported((path,), *signature(saved, steps), known, worst)
