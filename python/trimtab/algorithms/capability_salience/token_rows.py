"""Rows of the NLL matrix: one language model, one fixed text, one number per token."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trimtab.algorithms.causal_lm import (
    align,
    check_text,
    compare_with_model,
    evaluation_mode,
    find_head,
)
from trimtab.ops.token_loss import TokenLossOptions, linear_logp


def token_nll(
    model: Any,
    input_ids: Tensor,  # (S, T)
    attention_mask: Tensor | None = None,  # (S, T)
    *,
    linear_weight: Tensor | None = None,  # (V, D)
    linear_bias: Tensor | None = None,  # (V,)
    logit_scale: float | None = None,
    softcap: float | None = None,
    batch_size: int = 8,
    progress: bool = False,
    impl: str | None = None,
    options: TokenLossOptions | None = None,
) -> Tensor:  # (N,)
    """NLL of every token of a text under one model: a row of the matrix, made without logits.

    ``nll = -log softmax(z)_target`` with ``z = softcap * tanh(logit_scale * head(h) / softcap)``.
    The row holds, sequence after sequence and left to right, every real token but each sequence's
    first, which nothing predicts: ``N = sum_s max(length_s - 1, 0)``. ``row_token_ids`` gives their
    ids in the same order. Left and right padding give the same row: sequences are aligned to the
    left before the model sees them, so that positions start at 0 whatever the architecture.

    Cost: the model's forward pass, the head included; in memory one batch of hidden states and one
        chunk of logits. Before the first batch the head is compared with the model's own logits on
        a few tokens, so that an architecture with something else between the two is an error and
        not a number.

    Args:
        model: Hugging Face causal LM; final softcapping (Gemma 2), ``logit_scale`` (Cohere) and
            ``logits_scaling`` (Granite) are read from its config. Or, with ``linear_weight``, any
            callable ``(input_ids, attention_mask) -> hidden states (B, T, D)``, of which nothing is
            compared; ``attention_mask`` is None for a batch without padding.
        input_ids: token ids, on any device; batches move to the model's (not to a callable's).
        attention_mask: 1 for real tokens, one run of them per sequence; None when nothing is
            padded.
        linear_weight: head of a callable ``model``; None takes the model's own.
        linear_bias: bias of that head.
        logit_scale: factor of the logits; None takes the config's, or 1.
        softcap: bound of the logits; None takes the config's, or none.
        batch_size: sequences per forward pass.
        progress: show a progress bar, if tqdm is installed.
        impl: implementation of ``linear_logp``; None for the fastest available.
        options: chunk size and the like, see ``TokenLossOptions``.

    Returns:
        float32 on the CPU, without gradient. The model's training mode is as before.

    Raises:
        ValueError: shapes do not fit, a mask has gaps, or the model's logits are not its head's.
        TypeError: ``input_ids`` are not integers.
    """
    lengths, starts = check_text(input_ids, attention_mask)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}; use 1 for one sequence")
    rows = []
    with torch.no_grad(), evaluation_mode(model):
        head = find_head(model, linear_weight, linear_bias, logit_scale, softcap)
        if linear_weight is None and int(lengths.max()) > 0:
            compare_with_model(model, head, input_ids, lengths, starts)
        for low in _batches(len(input_ids), batch_size, progress):
            part = slice(low, low + batch_size)
            ids, real = align(input_ids[part], starts[part], lengths[part])
            if ids.shape[1] < 2 or not bool(real[:, 1:].any()):
                continue
            hidden = head.hidden(ids, None if bool(real.all()) else real)
            counted = real[:, 1:].to(hidden.device)
            target = ids[:, 1:].to(hidden.device)[counted]
            hidden = hidden[:, :-1][counted].to(head.weight)
            logp = linear_logp(
                hidden,
                head.weight,
                target.to(head.weight.device),
                linear_bias=head.bias,
                logit_scale=head.scale,
                softcap=head.softcap,
                impl=impl,
                options=options,
            ).logp
            rows.append(-logp.float().cpu())
    return torch.cat(rows) if rows else torch.empty(0)


def row_token_ids(
    input_ids: Tensor,  # (S, T)
    attention_mask: Tensor | None = None,  # (S, T)
) -> Tensor:  # (N,)
    """Ids of the tokens that a row of ``token_nll`` holds, in its order.

    Raises:
        ValueError: shapes do not fit, or a mask has gaps.
        TypeError: ``input_ids`` are not integers.
    """
    lengths, starts = check_text(input_ids, attention_mask)
    ids, real = align(input_ids, starts, lengths)
    return ids[:, 1:][real[:, 1:]].cpu()


def _batches(count: int, batch_size: int, progress: bool) -> Iterable[int]:
    lows = range(0, count, batch_size)
    if not progress:
        return lows
    try:
        from tqdm.auto import tqdm
    except ImportError:
        warnings.warn("progress=True needs tqdm; going on without a bar", stacklevel=3)
        return lows
    return tqdm(lows, desc="token_nll", unit="batch")
