"""Rows of the NLL matrix: one language model, one fixed text, one number per token."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.ops.token_loss import TokenLossOptions, linear_logp

_CHECKED_TOKENS = 8  # positions on which the head is compared with the model's own logits


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
    lengths, starts = _check_text(input_ids, attention_mask)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}; use 1 for one sequence")
    rows = []
    with torch.no_grad(), _evaluation_mode(model):
        head = _find_head(model, linear_weight, linear_bias, logit_scale, softcap)
        if linear_weight is None and int(lengths.max()) > 0:
            _compare_with_model(model, head, input_ids, lengths, starts)
        for low in _batches(len(input_ids), batch_size, progress):
            part = slice(low, low + batch_size)
            ids, real = _align(input_ids[part], starts[part], lengths[part])
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
    lengths, starts = _check_text(input_ids, attention_mask)
    ids, real = _align(input_ids, starts, lengths)
    return ids[:, 1:][real[:, 1:]].cpu()


class _Head(NamedTuple):
    hidden: Any  # (input_ids, attention_mask) -> hidden states (B, T, D)
    device: torch.device  # of the inputs that a model wants
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


def _find_head(
    model: Any,
    linear_weight: Tensor | None,
    linear_bias: Tensor | None,
    logit_scale: float | None,
    softcap: float | None,
) -> _Head:
    """The way from tokens to logits, with what is given taken over what the model says."""
    if linear_weight is not None:
        scale = 1.0 if logit_scale is None else logit_scale
        return _Head(model, linear_weight.device, linear_weight, linear_bias, scale, softcap)
    if linear_bias is not None:
        raise ValueError(
            "linear_bias must come with linear_weight, got it alone; pass both or neither"
        )
    # An adapter (PEFT) leaves its layers in the model it wraps; that one has the head.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    decoder = getattr(inner, "base_model", inner)
    if output is None or decoder is inner:
        raise ValueError(
            f"model must be a Hugging Face causal LM with a head, got {type(model).__name__}; "
            "or pass a callable for the hidden states with linear_weight"
        )
    config = inner.config.get_text_config()
    if logit_scale is None:
        # Granite divides by its attribute, Cohere multiplies by its own.
        logit_scale = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )
    if softcap is None:
        softcap = getattr(config, "final_logit_softcapping", None)
    device = inner.get_input_embeddings().weight.device

    def hidden(ids: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.to(device, torch.int64)
        return decoder(input_ids=ids.to(device), attention_mask=mask, use_cache=False)[0]

    bias = getattr(output, "bias", None)
    return _Head(hidden, device, output.weight, bias, logit_scale, softcap)


def _compare_with_model(
    model: Any, head: _Head, input_ids: Tensor, lengths: Tensor, starts: Tensor
) -> None:
    """Raises unless the head on the hidden states gives the model's logits up to rounding."""
    longest = int(lengths.argmax())
    part = slice(longest, longest + 1)
    ids, _ = _align(input_ids[part], starts[part], lengths[part].clamp(max=_CHECKED_TOKENS))
    wanted = model(input_ids=ids.to(head.device), use_cache=False).logits[0]
    hidden = head.hidden(ids, None)[0].to(head.weight)
    got = torch.nn.functional.linear(hidden, head.weight, head.bias)
    got = got.to(torch.promote_types(got.dtype, torch.float32)) * head.scale
    if head.softcap is not None:
        got = head.softcap * torch.tanh(got / head.softcap)
    # Rounding of the products and of what follows them, relative to the largest logit.
    eps = max(torch.finfo(dtype).eps for dtype in (head.weight.dtype, wanted.dtype))
    wanted = wanted.to(got)
    allowed = 16 * eps * float(wanted.abs().max())
    error = float((got - wanted).abs().max()) if got.shape == wanted.shape else float("inf")
    if not error <= allowed:
        raise ValueError(
            "model must make its logits as softcap * tanh(logit_scale * head(hidden) / softcap), "
            f"got logits of {type(model).__name__} that differ by {error:.3g}; pass logit_scale or "
            "softcap, or a callable for the hidden states with linear_weight"
        )


def _check_text(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Length and first real position of each sequence, both (S,)."""
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(
            f"input_ids must be integers, got {input_ids.dtype}; pass the tokenizer's ids"
        )
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be (sequences, positions), got shape {tuple(input_ids.shape)}; "
            "use input_ids[None] for one sequence"
        )
    count, width = input_ids.shape
    if attention_mask is None:
        zeros = torch.zeros(count, dtype=torch.int64, device=input_ids.device)
        return zeros + width, zeros
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}; pass the one that came with them"
        )
    real = attention_mask.to(input_ids.device) != 0
    lengths, starts = real.sum(1), real.int().argmax(1)
    runs = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
    if bool((runs > 1).any()):
        raise ValueError(
            f"attention_mask must be one run of ones per sequence, got gaps in sequence "
            f"{int((runs > 1).int().argmax())}; give the parts as sequences of their own"
        )
    return lengths, starts


def _align(ids: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences moved to start at position 0, cut to the longest; ids and where they are real."""
    at = torch.arange(max(int(lengths.max()), 1), device=ids.device)
    real = at < lengths[:, None]  # (B, T')
    return ids.long().gather(1, (starts[:, None] + at).clamp(max=ids.shape[1] - 1)), real


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


@contextlib.contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Dropout off; afterwards each module is in the mode it was in."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
