"""A second oracle, written from the formulas alone: it shares no line with the package."""

from __future__ import annotations

import torch
from torch import Tensor


def z_of(input, weight, bias, logit_scale=1.0, softcap=None):
    logits = input @ weight.T + (0.0 if bias is None else bias)
    logits = logits * logit_scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def weighted_loss(
    input, weight, bias, target, token_weight=None, *, class_weight=None, reduction="mean",
    normalizer=None, ignore_index=-100, label_smoothing=0.0, lse_square_scale=0.0, **transform,
) -> Tensor:  # fmt: skip
    """``linear_cross_entropy`` on float64 tensors, one token after the other."""
    z = z_of(input, weight, bias, **transform)
    c = torch.ones(z.shape[1], dtype=z.dtype) if class_weight is None else class_weight.to(z.dtype)
    tokens, counted = [], z.new_zeros(())
    for row, y in zip(z, target.tolist(), strict=True):
        if y == ignore_index:
            tokens.append(z.new_zeros(()))
            continue
        logp = row - row.logsumexp(0)
        smooth = label_smoothing / len(row)
        loss = -(1 - label_smoothing) * c[y] * logp[y] - smooth * (c * logp).sum()
        tokens.append(loss + lse_square_scale * row.logsumexp(0) ** 2)
        counted = counted + c[y]
    losses = torch.stack(tokens)
    kept = target != ignore_index
    weights = torch.ones(len(losses), dtype=z.dtype) if token_weight is None else token_weight
    weights = torch.where(kept, weights, torch.zeros_like(weights))
    if reduction == "none":
        return weights * losses
    total = (weights * losses).sum(-1)
    if reduction == "sum":
        return total
    if isinstance(normalizer, str):
        return total / weights.sum(-1)
    return total / (counted if normalizer is None else normalizer)


def logp_and_entropy(input, weight, bias, target, temperature=1.0, ignore_index=None, **transform):
    """``linear_logp`` on float64 tensors: logp, entropy, lse."""
    z = z_of(input, weight, bias, **transform)
    z = z / (temperature if isinstance(temperature, float) else temperature[:, None])
    lse = z.logsumexp(1)
    logp = z - lse[:, None]
    entropy = -(logp.exp() * logp).sum(1)
    kept = torch.ones_like(target) if ignore_index is None else (target != ignore_index).long()
    chosen = logp[torch.arange(len(target)), target * kept]
    return chosen * kept, entropy * kept, lse * kept
