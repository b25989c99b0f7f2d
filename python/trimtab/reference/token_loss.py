"""Token loss in eager PyTorch: the oracle. Any floating dtype, any device, twice differentiable.

For every token t with target ``y``, class weights ``c`` (ones without) and smoothing ``s``::

    z   = softcap * tanh(logit_scale * (x W^T + b) / softcap)
    z   = logit_scale * (x W^T + b)                               without a softcap
    lse = log sum_v exp(z_v)
    l_t = (1 - s) c_y (lse - z_y) + s / V * sum_v c_v (lse - z_v) + lse_square_scale * lse**2

Everything here works on flat inputs: ``input`` (N, D) or ``logits`` (N, V), ``target`` (N,).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab._schemas import result_dtype


def transform_logits(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Scale and softcap, in float32 (float64 for float64 logits)."""
    logits = logits.to(result_dtype(logits.dtype))
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def token_loss(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    *,
    class_weight: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
) -> Tensor:  # (N,)
    """Loss of each token, unweighted and unreduced; 0 where the target is ignored."""
    logits = transform_logits(logits, logit_scale, softcap)
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits,
        target,
        weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    if lse_square_scale != 0.0:
        square = lse_square_scale * torch.logsumexp(logits, -1).square()
        loss = loss + square.masked_fill(target == ignore_index, 0.0)
    return loss


def linear_token_loss(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    **options: object,
) -> Tensor:  # (N,)
    """The token loss of ``input @ weight.T + bias``."""
    return token_loss(F.linear(input, weight, bias), target, **options)  # type: ignore[arg-type]


def token_logp(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    *,
    inv_temperature: Tensor | None = None,  # (N,)
    ignore_index: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each (N,)
    """``logp``, ``entropy``, ``lse`` and the argmax; 0, 0, 0 and -1 where ignored."""
    logits = transform_logits(logits, logit_scale, softcap)
    if inv_temperature is not None:
        logits = logits * inv_temperature.unsqueeze(-1)
    keep = (
        torch.ones_like(target, dtype=torch.bool)
        if ignore_index is None
        else target != ignore_index
    )
    lse = torch.logsumexp(logits, -1)
    logp = torch.log_softmax(logits, -1)
    chosen = logp.gather(-1, target.where(keep, 0).unsqueeze(-1)).squeeze(-1)
    p = logp.exp()
    # p log p -> 0 as p -> 0, also for its gradient: a masked class (-inf) must not make it NaN.
    entropy = -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
    predicted = logits.argmax(-1).where(keep, -1)
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    return chosen.where(keep, zero), entropy.where(keep, zero), lse.where(keep, zero), predicted
