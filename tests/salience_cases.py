"""Models, tokens and benchmarks with a known answer."""

from __future__ import annotations

import torch
from torch import Tensor

DOUBLE = torch.float64


def domains(
    models: int,
    tokens: int,
    kinds: int = 3,
    *,
    seed: int = 0,
    noise: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Models trained on different mixtures of ``kinds`` domains, and one benchmark for each domain.

    Returns nll (M, N) float64, accuracy (M, kinds), and the domain of each token (N,).
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=DOUBLE)

    kind = torch.randint(0, kinds, (tokens,), generator=g)
    skill = 0.3 * (normal(models, 1) + normal(models, kinds))
    hard = 0.5 + 4.0 * torch.rand(tokens, generator=g, dtype=DOUBLE)
    moves = 0.2 + 0.6 * torch.rand(tokens, generator=g, dtype=DOUBLE)
    nll = (hard - moves * skill[:, kind] + 0.15 * normal(models, tokens)).clamp(min=0.01)
    loss = torch.stack([nll[:, kind == k].mean(1) for k in range(kinds)], 1)
    accuracy = gamma + (1 - gamma) * torch.sigmoid(-6.0 * (loss - loss.mean(0)))
    return nll, (accuracy + noise * normal(models, kinds)).clamp(0, 1), kind
