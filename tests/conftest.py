"""Shapes and types of every annotated function of the package are checked while the tests run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook("onejump", "typecheck.typechecker")

import torch

torch.set_num_threads(1)
