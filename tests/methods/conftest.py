import pytest
import torch
from golden_data import f64


@pytest.fixture
def draws(monkeypatch):
    """Makes torch draw recorded noise and times (by the uniforms that their distribution maps to them)."""

    def replay(eps, t, distribution, low=0.0, high=float("inf")):
        ts = f64(t)
        u_low, u_high = torch.zeros_like(ts), torch.ones_like(ts)
        for _ in range(80):  # bisection for u with quantile(u) = t
            u = (u_low + u_high) / 2
            below = distribution.quantile(u, low, high) < ts
            u_low, u_high = torch.where(below, u, u_low), torch.where(below, u_high, u)
        monkeypatch.setattr(torch, "rand", lambda *_, **__: u)
        monkeypatch.setattr(torch, "randn_like", lambda _: torch.as_tensor(eps))

    return replay
