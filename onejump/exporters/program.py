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
from onejump.saved import SavedModel

FACTS = "onejump.json"  # the extra file inside


def export_program(saved: SavedModel, path: Path, steps: int = 1, sha256: str = "") -> Exported:
    """Writes the saved sampler in so many steps as path (.pt2), for batches of any size, on the model's device.

    sha256: as in export_onnx. Nothing is written unless the program that is read back makes our images.
    Raises UserError where it does not, and for diffusion models.
    """
    graph = GeneratorGraph(saved, steps)
    known = facts(saved, graph, sha256)
    program = traced(graph, saved)
    with draft_of(path) as draft, quiet():
        torch.export.save(program, draft, extra_files={FACTS: json.dumps(known, indent=1)})
        again = torch.export.load(draft).module()
        worst = difference(graph, saved, lambda given: again(*given), "torch.export")
    return Exported((path,), *signature(saved, steps), known, worst)
