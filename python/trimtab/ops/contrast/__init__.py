"""Contrast: batched contrastive logit math, for decoding and for token-level rewards.

One formula, ``z = anchor + alpha * (positive - negative)`` with ``anchor = positive`` unless given:

====================================  ========================================================
classifier-free guidance              ``alpha = guidance_scale - 1``
context-aware decoding, VCD           ``alpha = alpha``, ``alpha = cd_alpha``
Self-CD                               ``alpha = ratio - 1``; positive = without the safety prompt
DExperts, proxy tuning                ``anchor`` = base model, positive = expert
====================================  ========================================================

Costs are counted in bytes of logits read and, for the linear forms, in products of N x D x V
(2 N D V FLOP): N rows, hidden size D, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab._choose import Choice, choose
from trimtab._schemas import result_dtype
from trimtab.ops import token_loss
from trimtab.ops._autograd import needs_grad
from trimtab.ops._checks import (
    bad,
    check_devices,
    check_ignore_index,
    check_target,
    check_target_range,
    looks_at_values,
    raises_on_bad_rows,
)
from trimtab.ops.contrast import _inputs as inputs
from trimtab.ops.contrast._functions import ContrastiveLogits, ContrastiveLogp
from trimtab.ops.contrast._inputs import PerRow, Rows
from trimtab.ops.token_loss import _inputs as head_inputs
from trimtab.ops.token_loss._groups import FailingTogether, local_head
from trimtab.reference import contrast as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "CHOICES",
    "Sampled",
    "contrastive_logits",
    "contrastive_logp",
    "contrastive_sample",
    "linear_contrastive_logp",
    "linear_contrastive_sample",
]


class Sampled(NamedTuple):
    """What ``contrastive_sample`` drew, every field (B,)."""

    token: Tensor
    """The token (int64); -1 for a row with NaN or with nothing left."""
    logp: Tensor
    """Its log-probability under the filtered distribution; NaN for such a row."""
    kept: Tensor
    """How many tokens survived the filters (int64); 0 for such a row."""


def contrastive_logits(
    positive: Tensor,  # (..., V)
    negative: Tensor,  # (..., V)
    *,
    alpha: float | Tensor,  # number or (...)
    anchor: Tensor | None = None,  # (..., V)
    plausibility: float | Tensor | None = None,  # number or (...)
    impl: str | None = None,
) -> Tensor:
    """Contrasted logits: ``z = anchor + alpha * (positive - negative)``.

    Equal infinities in ``positive`` and ``negative`` cancel, and a token at -inf in the anchor
    stays there, so that masks survive the contrast. Differentiable in all rows, except at infinite
    logits, whose gradient has no meaning.

    Cost: one read of the rows, twice where there is a plausibility mask, and one write.

    Args:
        positive: logits, float32, bfloat16, float16 or float64.
        negative: logits that are pushed away, of the same shape and dtype.
        alpha: weight of the contrast, a number or one per row; without gradient.
        anchor: logits that the contrast is added to; ``positive`` unless given.
        plausibility: beta in (0, 1]: -inf where ``anchor < max(anchor) + log(beta)`` (Li et al.,
            "Contrastive decoding", ACL 2023, equation 2); None for no mask.
        impl: "reference", "native", "triton", or None for the fastest available.

    Returns:
        (..., V), float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, device or value that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: ``impl`` names an implementation that is not available here.
    """
    rows = inputs.check_rows(positive, negative, anchor)
    weight = inputs.check_alpha(alpha, rows.shape, positive)
    log_beta = inputs.check_plausibility(plausibility, rows.shape, positive)
    chosen = choose("contrastive_logits", positive.device.type, positive.dtype, impl).impl
    if chosen == "reference":
        out = reference.contrastive_logits(*rows[:3], weight.value(), log_beta.value())
    else:
        needs = needs_grad(*rows[:3])
        out = ContrastiveLogits.apply(*rows[:3], weight, log_beta, needs, chosen)
    return out.reshape(positive.shape)


def contrastive_logp(
    positive: Tensor,  # (..., V)
    negative: Tensor,  # (..., V)
    target: Tensor,  # (...)
    *,
    alpha: float | Tensor,  # number or (...)
    anchor: Tensor | None = None,  # (..., V)
    temperature: float | Tensor = 1.0,  # number or (...)
    ignore_index: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Log-probability of each row's target under ``softmax(z / temperature)``.

    With ``z = anchor + alpha * (positive - negative)`` and ``p = softmax(z / T)``::

        d logp / d z_v = (delta_vy - p_v) / T

    Differentiable in all rows (twice: the second time through the reference), except at infinite
    logits, whose gradient has no meaning. In "native" and "triton" confident rows keep their
    relative accuracy: the target stays out of the sum.

    Cost: one read of the rows forward; one read of them and one write per gradient backward. No
    combined row is kept.

    Args:
        positive: logits, float32, bfloat16, float16 or float64.
        negative: logits that are pushed away, of the same shape and dtype.
        target: int64 class indices.
        alpha: weight of the contrast, a number or one per row; without gradient.
        anchor: logits that the contrast is added to; ``positive`` unless given.
        temperature: positive, a number or one per row; without gradient.
        ignore_index: target that gives 0 and no gradient; None ignores nothing.
        impl: "reference", "native", "triton", or None for the fastest available.

    Returns:
        (...), float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, device or value that does not fit.
        TypeError: a dtype that does not fit.
        IndexError: a target outside the vocabulary. On CUDA such a row gives NaN, unless
            ``TRIMTAB_CHECK=1``.
        RuntimeError: ``impl`` names an implementation that is not available here.
    """
    rows = inputs.check_rows(positive, negative, anchor)
    check_target(target, rows.shape)
    check_devices(positive, {"target": target}, "positive")
    weight = inputs.check_alpha(alpha, rows.shape, positive)
    heat = inputs.check_temperature(temperature, rows.shape, positive)
    chosen = choose("contrastive_logp", positive.device.type, positive.dtype, impl).impl
    ignored = check_ignore_index(ignore_index)
    flat = target.reshape(-1).contiguous()
    check_target_range(flat, ignored, positive.shape[-1])
    if chosen == "reference":
        logp = reference.contrastive_logp(
            rows.positive, rows.negative, rows.anchor, flat, weight.value(), heat.value(), ignored
        )
    else:
        needs = needs_grad(*rows[:3])
        logp = ContrastiveLogp.apply(*rows[:3], flat, weight, heat, ignored, needs, chosen)
    return logp.reshape(rows.shape)


def contrastive_sample(
    positive: Tensor,  # (B, V), or (P, V) with positive_rows
    negative: Tensor,  # (B, V), or (N, V) with negative_rows
    *,
    alpha: float | Tensor,  # number or (B,)
    anchor: Tensor | None = None,  # (B, V), or (A, V) with anchor_rows
    plausibility: float | Tensor | None = None,  # number or (B,)
    temperature: float | Tensor = 1.0,  # number or (B,)
    top_k: int | Tensor | None = None,  # number or (B,)
    top_p: float | Tensor | None = None,  # number or (B,)
    min_p: float | Tensor | None = None,  # number or (B,)
    seed: int | Tensor = 0,  # number or (B,)
    position: int | Tensor = 0,  # number or (B,)
    positive_rows: Tensor | None = None,  # (B,)
    negative_rows: Tensor | None = None,  # (B,)
    anchor_rows: Tensor | None = None,  # (B,)
    impl: str | None = None,
) -> Sampled:
    """Contrast, filter and draw one token per row, in one pass from logits to token.

    The filters apply in this order, each on what the one before left: plausibility, temperature,
    top-k, top-p, min-p. The support is that of Hugging Face's ``TemperatureLogitsWarper``,
    ``TopKLogitsWarper``, ``TopPLogitsWarper`` and ``MinPLogitsWarper`` on the contrasted logits,
    ties included. The draw is Gumbel-max on a Philox4x32-10 stream keyed by (seed, position, v)::

        token = argmax over the kept v of z_v / T + gumbel(seed, position, v)

    so a row's token depends on its logits, seed and position alone, whatever else is in the batch,
    and is the same in every implementation. "native" and "triton" sort nothing and write no row of
    probabilities.

    Cost: the rows are read once from memory, and again from cache by filters that need a threshold.

    Args:
        positive: logits, float32, bfloat16, float16 or float64.
        negative: logits that are pushed away, of the same dtype.
        alpha: weight of the contrast.
        anchor: logits that the contrast is added to and that the plausibility mask looks at;
            ``positive`` unless given.
        plausibility: beta in (0, 1]: keep ``anchor >= max(anchor) + log(beta)``; None for no mask.
        temperature: 0 is greedy: the lowest index among the maxima, with logp 0 and kept 1.
        top_k: keep what is not below the k-th largest value; None or 0 for no such filter.
        top_p: keep the likeliest tokens that together exceed it; of equal tokens the highest
            indices stay. None or 1 for no such filter.
        min_p: keep what has at least this share of the largest probability; None for no filter.
        seed: 64 bits. Give every sequence its own: rows of equal logits, seed and position draw the
            same token.
        position: 64 bits; the number of the step.
        positive_rows: which row of ``positive`` belongs to each output row, so that one (2B, V)
            tensor can serve as positive and as negative.
        negative_rows: the same for ``negative``.
        anchor_rows: the same for ``anchor``.
        impl: "reference", "native", "triton", or None for the fastest available.

    Returns:
        ``Sampled(token, logp, kept)``. A row with NaN, or with nothing left, gives -1, NaN and 0
        and leaves the other rows alone.

    Raises:
        ValueError: a shape, device or value that does not fit; with ``TRIMTAB_CHECK=1`` also a row
            that can't be sampled.
        TypeError: a dtype that does not fit.
        RuntimeError: ``impl`` names an implementation that is not available here.
    """
    sources = {"positive": positive, "negative": negative, "anchor": anchor}
    given = {"positive": positive_rows, "negative": negative_rows, "anchor": anchor_rows}
    rows, maps = inputs.mapped_rows(positive, sources, given)
    weight = inputs.check_alpha(alpha, rows.shape, positive)
    filters = inputs.check_filters(
        {"plausibility": plausibility, "temperature": temperature, "top_k": top_k, "top_p": top_p,
         "min_p": min_p, "seed": seed, "position": position}, rows.shape, positive,
    )  # fmt: skip
    chosen = choose("contrastive_sample", positive.device.type, positive.dtype, impl).impl
    return _sample(rows, maps, weight, filters, chosen)


def linear_contrastive_logp(
    positive: Tensor,  # (..., D)
    negative: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    alpha: float | Tensor,  # number or (...)
    linear_bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # number or (...)
    logit_scale: float = 1.0,
    ignore_index: int | None = None,
    impl: str | None = None,
    options: token_loss.TokenLossOptions | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """``contrastive_logp`` of hidden states, with one product and no logits in memory.

    A linear head commutes with the contrast::

        (1 + alpha) (W h_p + b) - alpha (W h_n + b) = W ((1 + alpha) h_p - alpha h_n) + b

    The combination is made in float32 and rounded once to the head's dtype; two products would
    round both rows of logits and magnify that by ``1 + 2 alpha``. Differentiable in the hidden
    states, the head and its bias. A head with a softcap does not commute: make both rows of logits
    and call ``contrastive_logp``.

    Cost in products: 1 without gradients, 2 with the head frozen, 4 with a trained head.

    Args:
        positive: hidden states, float32, bfloat16, float16 or float64.
        negative: hidden states that are pushed away, of the same shape and dtype.
        linear_weight: the head, same dtype as ``positive`` unless under autocast.
        target: int64 class indices.
        alpha: weight of the contrast, a number or one per row; without gradient.
        linear_bias: bias of the head.
        temperature: positive, a number or one per row; without gradient.
        logit_scale: factor of the logits (Cohere, Granite).
        ignore_index: target that gives 0 and no gradient; None ignores nothing.
        impl: "reference", "native", "triton", or None for the fastest available.
        options: chunk size and accumulation dtype, as for ``linear_logp``.
        group: the ranks that hold the vocabulary together, as in ``linear_cross_entropy``.

    Returns:
        (...), float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, device or value that does not fit.
        TypeError: a dtype that does not fit.
        IndexError: a target outside the vocabulary. On CUDA such a row gives NaN, unless
            ``TRIMTAB_CHECK=1``.
        RuntimeError: ``impl`` names an implementation that is not available here.
    """
    local = local_head(positive, linear_weight, linear_bias, group=group)
    with FailingTogether(local.shard, local.weight):
        hidden = _contrasted_hidden(positive, negative, alpha)
        head = head_inputs.check_head(
            hidden, local.weight, local.bias, target, "positive",
            may_be_empty=local.shard is not None,
        )  # fmt: skip
        choose("linear_contrastive_logp", positive.device.type, head.compute_dtype, impl)
    return token_loss.linear_logp(
        hidden, linear_weight, target, linear_bias=linear_bias, temperature=temperature,
        logit_scale=logit_scale, ignore_index=ignore_index, impl=impl, options=options, group=group,
    ).logp  # fmt: skip


@torch.no_grad()
def linear_contrastive_sample(
    positive: Tensor,  # (B, D)
    negative: Tensor,  # (B, D)
    linear_weight: Tensor,  # (V, D)
    *,
    alpha: float | Tensor,  # number or (B,)
    linear_bias: Tensor | None = None,  # (V,)
    plausibility: float | Tensor | None = None,  # number or (B,)
    temperature: float | Tensor = 1.0,  # number or (B,)
    top_k: int | Tensor | None = None,  # number or (B,)
    top_p: float | Tensor | None = None,  # number or (B,)
    min_p: float | Tensor | None = None,  # number or (B,)
    seed: int | Tensor = 0,  # number or (B,)
    position: int | Tensor = 0,  # number or (B,)
    logit_scale: float = 1.0,
    impl: str | None = None,
    group: ProcessGroup | None = None,
) -> Sampled:
    """``contrastive_sample`` of hidden states, with one product: half of what two rows would cost.

    The combination is made in float32 before the head, as in ``linear_contrastive_logp``. A
    plausibility mask needs the positive row of logits too: then one product has both rows, and the
    head is still read once. A head with a softcap does not commute with the contrast: make both
    rows of logits and call ``contrastive_sample``.

    Cost: 1 product (2 with a plausibility mask, as one), one write and one read of its logits. With
    ``group`` a rank makes its slice's part of the product and receives the rest of the logits: B V
    numbers of the products' dtype, 2 B V with the mask. Every rank then draws the same tokens.

    Args:
        positive: hidden states, float32, bfloat16, float16 or float64.
        negative: hidden states that are pushed away, of the same shape and dtype.
        linear_weight: the head, same dtype as ``positive`` unless under autocast.
        alpha: weight of the contrast.
        linear_bias: bias of the head.
        plausibility: as in ``contrastive_sample``, of the positive row.
        temperature: as in ``contrastive_sample``.
        top_k: as in ``contrastive_sample``.
        top_p: as in ``contrastive_sample``.
        min_p: as in ``contrastive_sample``.
        seed: as in ``contrastive_sample``.
        position: as in ``contrastive_sample``.
        logit_scale: positive factor of the logits (Cohere, Granite).
        impl: "reference", "native", "triton", or None for the fastest available.
        group: the ranks that hold the vocabulary together, as in ``linear_cross_entropy``.

    Returns:
        ``Sampled(token, logp, kept)``, without gradient.

    Raises:
        ValueError, TypeError, RuntimeError: as ``contrastive_sample``.
    """
    local = local_head(positive, linear_weight, linear_bias, group=group)
    with FailingTogether(local.shard, local.weight):
        hidden = _contrasted_hidden(positive, negative, alpha)
        if hidden.dim() != 2:
            raise bad("positive", "of shape (B, D)", tuple(positive.shape), "flatten it")
        head_inputs.check_scalars(logit_scale=logit_scale)
        if not logit_scale > 0.0:
            raise bad("logit_scale", "positive", logit_scale, "fold its sign into the head")
        row = torch.zeros((), dtype=torch.int64, device=hidden.device).expand(hidden.shape[:1])
        head = head_inputs.check_head(
            hidden, local.weight, local.bias, row, "positive", may_be_empty=local.shard is not None
        )
        filters = inputs.check_filters(
            {"plausibility": plausibility, "temperature": temperature, "top_k": top_k,
             "top_p": top_p, "min_p": min_p, "seed": seed, "position": position},
            head.shape, head.input.new_empty(0, dtype=head.compute_dtype),
        )  # fmt: skip
        device, dtype = hidden.device.type, head.compute_dtype
        chosen = choose("linear_contrastive_sample", device, dtype, impl).impl
    masked = filters.log_beta != inputs.OFF
    stacked = torch.cat((hidden, positive)) if masked else hidden
    bias = local.bias
    if logit_scale != 1.0:
        stacked = stacked * logit_scale
        bias = None if bias is None else bias * logit_scale
    logits = F.linear(stacked, local.weight, bias)
    if local.shard is not None:
        logits = torch.ops.trimtab.gather_logits.default(logits, local.shard.group)
    count = hidden.shape[0]
    rows = Rows(logits[:count], None, logits[count:] if masked else None, head.shape)
    return _sample(rows, (None, None, None), PerRow(0.0), filters, chosen)


def _contrasted_hidden(positive: Tensor, negative: Tensor, alpha: float | Tensor) -> Tensor:
    """``positive + alpha * (positive - negative)`` in float32, rounded once."""
    rows = inputs.check_rows(positive, negative, None)
    weight = inputs.check_alpha(alpha, rows.shape, positive)
    factor = weight.number if weight.rows is None else weight.rows.reshape(*rows.shape, 1)
    p = positive.to(result_dtype(positive.dtype))
    return (p + factor * (p - negative)).to(positive.dtype)


def _sample(
    rows: Rows,
    maps: tuple[Tensor | None, ...],
    alpha: PerRow,
    filters: inputs.Filters,
    impl: str,
) -> Sampled:
    tensors = [None if row is None else row.detach() for row in rows[:3]]
    if impl == "reference":
        values = [parameter.value() for parameter in filters]
        drawn = reference.contrastive_sample(*tensors, *maps, alpha.value(), *values)  # type: ignore[call-arg, arg-type]
    else:
        drawn = torch.ops.trimtab.contrastive_sample.default(
            *tensors, *maps, *alpha, *filters.flat(), rows.shape[0], impl
        )
    sampled = Sampled(*drawn)
    if raises_on_bad_rows() and looks_at_values(sampled.token):
        missing = (sampled.token < 0).nonzero().flatten().tolist()
        if missing:
            raise bad("positive", "rows without NaN in which the filters leave a token",
                      f"neither in rows {missing[:8]}",
                      "look for NaN or for rows that are -inf throughout")  # fmt: skip
    return sampled


def _choice_for_rows(op: str) -> Callable[[dict[str, Any]], Choice]:
    def choice(arguments: dict[str, Any]) -> Choice:
        positive = arguments["positive"]
        return choose(op, positive.device.type, positive.dtype, arguments["impl"])

    return choice


def _choice_for_head(op: str) -> Callable[[dict[str, Any]], Choice]:
    def choice(arguments: dict[str, Any]) -> Choice:
        return head_inputs.choice_for_head(op, {**arguments, "input": arguments["positive"]})

    return choice


CHOICES: dict[str, tuple[Callable[..., Any], Callable[[dict[str, Any]], Choice]]] = {
    **{
        function.__name__: (function, _choice_for_rows(function.__name__))
        for function in (contrastive_logits, contrastive_logp, contrastive_sample)
    },
    **{
        function.__name__: (function, _choice_for_head(function.__name__))
        for function in (linear_contrastive_logp, linear_contrastive_sample)
    },
}
"""Public operator -> (function, what ``explain`` answers for its arguments)."""
