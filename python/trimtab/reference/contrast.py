"""Contrast in eager PyTorch: the oracle. Any floating dtype, any device, differentiable.

Per row, in float32 (float64 for float64 rows), with the positive row p, the negative row n and the
anchor a (p unless given)::

    z = a + alpha (p - n)                            every operation rounded once
    z = -inf where a < max(a) + log(beta)            plausibility
    s = z / T                                        then top-k, top-p and min-p on s
    token = argmax (s - max s) + gumbel(seed, position, v)    over what the filters kept

Equal infinities in p and n cancel; a token at -inf in the anchor stays there. Parameters are
numbers, or tensors (B,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab._schemas import result_dtype
from trimtab.reference.philox import gumbel

_INF = float("inf")


def column(value: float | int | Tensor) -> float | int | Tensor:
    """A parameter as it broadcasts against rows of logits."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


def combine(
    positive: Tensor,  # (B, V)
    negative: Tensor | None,  # (B, V)
    anchor: Tensor | None,  # (B, V)
    alpha: float | Tensor,
) -> tuple[Tensor, Tensor]:  # each (B, V)
    """The contrasted logits before any mask, and the anchor, both in the result's dtype.

    Without a negative row the contrasted logits are the positive row.
    """
    real = result_dtype(positive.dtype)
    p = positive.to(real)
    a = p if anchor is None else anchor.to(real)
    if negative is None:
        return p, a
    n = negative.to(real)
    alpha = torch.as_tensor(column(alpha), dtype=real, device=p.device)
    difference = (p - n).masked_fill((p == n) & p.isinf(), 0.0)
    z = torch.where(alpha == 0.0, a, a + alpha * difference)
    return z.masked_fill(a == -_INF, -_INF), a


def contrastive_logits(
    positive: Tensor,  # (B, V)
    negative: Tensor | None,  # (B, V)
    anchor: Tensor | None,  # (B, V)
    alpha: float | Tensor,
    log_beta: float | Tensor,
) -> Tensor:  # (B, V)
    """The contrasted logits, with -inf where the anchor finds the token implausible."""
    z, a = combine(positive, negative, anchor, alpha)
    return mask_implausible(z, a, log_beta)


def mask_implausible(z: Tensor, anchor: Tensor, log_beta: float | Tensor) -> Tensor:
    """``z`` with -inf where ``anchor < max(anchor) + log_beta``."""
    if z.shape[-1] == 0 or (not isinstance(log_beta, Tensor) and log_beta == -_INF):
        return z
    log_beta = torch.as_tensor(column(log_beta), dtype=z.dtype, device=z.device)
    top = anchor.detach().amax(-1, keepdim=True)
    masked = z.masked_fill(anchor < top + log_beta, -_INF)
    return masked.masked_fill(top.isnan() & (log_beta > -_INF), float("nan"))


def contrastive_logp(
    positive: Tensor,  # (B, V)
    negative: Tensor | None,  # (B, V)
    anchor: Tensor | None,  # (B, V)
    target: Tensor,  # (B,)
    alpha: float | Tensor,
    temperature: float | Tensor,
    ignore_index: int,
) -> Tensor:  # (B,)
    """Log-probability of each row's target under ``softmax(z / T)``; 0 where it is ignored."""
    z, _ = combine(positive, negative, anchor, alpha)
    temperature = torch.as_tensor(column(temperature), dtype=z.dtype, device=z.device)
    keep = target != ignore_index
    logp = torch.log_softmax(z / temperature, -1)
    chosen = logp.gather(-1, target.where(keep, 0).unsqueeze(-1)).squeeze(-1)
    return chosen.where(keep, torch.zeros((), dtype=z.dtype, device=z.device))


def contrastive_sample(
    positive: Tensor,  # (P, V)
    negative: Tensor | None,  # (N, V)
    anchor: Tensor | None,  # (A, V)
    positive_rows: Tensor | None,  # (B,)
    negative_rows: Tensor | None,  # (B,)
    anchor_rows: Tensor | None,  # (B,)
    alpha: float | Tensor,
    log_beta: float | Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    tail: float | Tensor,
    log_min_p: float | Tensor,
    seed: int | Tensor,
    position: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # each (B,)
    """Token, its log-probability and the size of the support.

    ``tail`` is ``1 - top_p`` and negative for none; ``top_k`` 0 and ``log_min_p`` -inf are none.
    """
    p = positive if positive_rows is None else positive[positive_rows]
    n = negative if negative is None or negative_rows is None else negative[negative_rows]
    a = anchor if anchor is None or anchor_rows is None else anchor[anchor_rows]
    z, a = combine(p, n, a, alpha)
    rows, classes = z.shape
    real, device = z.dtype, z.device
    if classes == 0:
        token = torch.full((rows,), -1, device=device)
        return token, torch.full((rows,), float("nan"), dtype=real, device=device), token + 1
    invalid = z.isnan().any(-1) | a.isnan().any(-1)
    z = mask_implausible(z, a, log_beta)
    temperature = _per_row(temperature, rows, real, device)
    greedy = temperature == 0.0
    invalid |= z.amax(-1).isinf() | ~(temperature >= 0.0)
    s = z / temperature.masked_fill(greedy, 1.0).unsqueeze(-1)
    invalid |= ~s.amax(-1).isfinite()
    # What is not a number would not sort; these rows are overwritten at the end.
    s = s.masked_fill(invalid.unsqueeze(-1), 0.0)
    first = s.argmax(-1)

    s = keep_top_k(s, _per_row(top_k, rows, torch.int64, device))
    s = keep_top_p(s, _per_row(tail, rows, real, device))
    shifted = s - s.amax(-1, keepdim=True)
    minimum = _per_row(log_min_p, rows, real, device).unsqueeze(-1)
    left = (s > -_INF) & ~(shifted < minimum)
    shifted = shifted.masked_fill(~left, -_INF)

    noise = gumbel(
        _per_row(seed, rows, torch.int64, device),
        _per_row(position, rows, torch.int64, device),
        classes,
    )
    token = (shifted + noise).argmax(-1)
    logp = torch.log_softmax(shifted, -1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    kept = left.sum(-1)
    token = torch.where(greedy, first, token).masked_fill(invalid, -1)
    logp = logp.masked_fill(greedy, 0.0).masked_fill(invalid, float("nan"))
    return token, logp, kept.masked_fill(greedy, 1).masked_fill(invalid, 0)


def keep_top_k(
    s: Tensor,  # (B, V)
    top_k: Tensor,  # (B,) int64
) -> Tensor:
    """-inf below the k-th largest value, which all its equals survive; 0 keeps everything."""
    classes = s.shape[-1]
    k = top_k.masked_fill(top_k == 0, classes).clamp(max=classes)
    largest = int(k.max()) if not torch.compiler.is_compiling() and k.numel() else classes
    threshold = s.topk(largest, dim=-1).values.gather(-1, (k - 1).unsqueeze(-1))
    return s.masked_fill(s < threshold, -_INF)


def keep_top_p(
    s: Tensor,  # (B, V)
    tail: Tensor,  # (B,)
) -> Tensor:
    """-inf for the least likely tokens, as long as together they have at most ``tail``.

    Of equal tokens the lowest indices go first, and the very last token always stays, as in Hugging
    Face's ``TopPLogitsWarper``.
    """
    ordered, order = torch.sort(s, dim=-1, stable=True)
    mass = (ordered - ordered[..., -1:]).double().exp().cumsum(-1)
    removed = (mass / mass[..., -1:]).to(s.dtype) <= tail.unsqueeze(-1)
    removed[..., -1] = False
    return s.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -_INF)


def _per_row(
    value: float | int | Tensor, rows: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.as_tensor(value, dtype=dtype, device=device).expand(rows)
