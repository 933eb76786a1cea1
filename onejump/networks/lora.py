"""Low-rank adaptation: attention projections W x + B A x, of which A and B alone are trained (Hu et al. 2022)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


class LoRALinear(nn.Linear):
    """A linear layer with its weights, under their names, and beside them A (at random) and B (zero: no effect)."""

    def __init__(self, linear: nn.Linear, rank: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        within = nn.functional.linear(x, self.lora_A)
        return super().forward(x) + nn.functional.linear(within, self.lora_B)


def add_lora(net: nn.Module, rank: int) -> None:
    """Freezes all weights of a network of diffusers' attention layers and puts LoRA beside their projections."""
    net.requires_grad_(False)
    for module in list(net.modules()):
        layers: Any = module
        for name in PROJECTIONS:
            child = module._modules.get(name)
            if isinstance(child, nn.Linear):
                setattr(layers, name, LoRALinear(child, rank))
            elif isinstance(child, nn.ModuleList) and isinstance(child[0], nn.Linear):
                child[0] = LoRALinear(child[0], rank)


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the network without LoRA that computes the same: W + B A."""
    out = {name: tensor for name, tensor in weights.items() if not name.endswith((".lora_A", ".lora_B"))}
    for name in weights:
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            out[f"{layer}.weight"] = weights[f"{layer}.weight"] + weights[f"{layer}.lora_B"] @ weights[name]
    return out
