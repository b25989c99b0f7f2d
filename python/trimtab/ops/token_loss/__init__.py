"""Token loss: per-token (and K-fold) loss weighting fused with the LM head.

Costs are counted in products of N x D x V (2 N D V FLOP): N tokens, hidden size D, vocabulary V.

Sharded heads. With ``group=`` each of P ranks holds a slice of the vocabulary, also an empty one,
and every rank gets the results and the input's gradient of the whole. A rank makes 1/P of the
products and of the head's gradient. Per token that counts the ranks gather 8 bytes of numbers from
each (4 more for class weights and for smoothing each; 20 in ``linear_logp``) and sum 4 D bytes of
the input's gradient, both while the next product runs, with two chunks of logits in memory. Label
smoothing reads the logits once more. Ranks have to make the same call: sizes, options and a
checksum of the targets are compared first, and all raise if they differ. See docs/scaling.md.

A DTensor head with Shard(0) on a mesh of one dimension says all that by itself, and its gradient is
a DTensor again. Such a head is also what FSDP2 shows outside a module's forward; there the ranks
have other tokens, so the call raises unless ``TokenLossOptions(sequence_parallel=True)`` says so
(the gradient is then the sum over the ranks' tokens, not FSDP's mean). ZeRO-3 heads are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trimtab._choose import Choice, choose
from trimtab.ops._autograd import needs_grad
from trimtab.ops._checks import (
    NOTHING_IGNORED,
    bad,
    check_devices,
    check_floating,
    check_target,
    check_target_range,
)
from trimtab.ops.token_loss import _chunks, _sharded  # noqa: F401  (they register operators)
from trimtab.ops.token_loss import _inputs as inputs
from trimtab.ops.token_loss._functions import (
    HeadArguments,
    LinearLogp,
    LossArguments,
    RowLoss,
    TokenLoss,
    WeightedLoss,
    reference_logp,
    reference_loss,
)
from trimtab.ops.token_loss._groups import (
    FailingTogether,
    check_normalizer_group,
    local_head,
)
from trimtab.ops.token_loss._inputs import TokenLossOptions
from trimtab.ops.token_loss._weights import Coefficients, Ranks, reduce_tokens, token_coefficients
from trimtab.reference import token_loss as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "CHOICES",
    "LogpRatio",
    "TokenLogp",
    "TokenLossOptions",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_logp",
    "linear_logp_ratio",
]


class TokenLogp(NamedTuple):
    """What ``linear_logp`` knows of each token, every field of the target's shape."""

    logp: Tensor
    """Log-probability of the target, differentiable."""
    entropy: Tensor
    """Entropy of the distribution in nats, differentiable."""
    lse: Tensor
    """Log-sum-exp of the logits, differentiable."""
    predicted: Tensor
    """Index of the largest logit (int64), the lowest among equals."""


class LogpRatio(NamedTuple):
    """What ``linear_logp_ratio`` knows of each token, every field of the target's shape."""

    log_ratio: Tensor
    """``logp - ref_logp``, differentiable in the policy's side."""
    logp: Tensor
    """Log-probability under the policy, differentiable."""
    ref_logp: Tensor
    """Log-probability under the reference, detached."""


def linear_cross_entropy(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: Tensor | None = None,  # (V,)
    token_weight: Tensor | None = None,  # (...) or (K, ...)
    reduction: str = "mean",
    normalizer: float | Tensor | str | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    impl: str | None = None,
    options: TokenLossOptions | None = None,
    group: ProcessGroup | None = None,
    normalizer_group: ProcessGroup | None = None,
) -> Tensor:
    """Cross entropy of a linear head, weighted per token, with one chunk of logits in memory.

    With ``z = softcap * tanh(logit_scale * (x W^T + b) / softcap)`` (``logit_scale * (x W^T + b)``
    without a softcap), class weights ``c``, smoothing ``s``, ``lse = log sum_v exp(z_v)``::

        l_t  = (1 - s) c_y (lse - z_y) + s / V * sum_v c_v (lse - z_v) + lse_square_scale * lse**2
        loss = sum_t token_weight_t * l_t / normalizer

    With ``token_weight``, ``softcap``, ``lse_square_scale`` and ``logit_scale`` left alone it
    equals ``torch.nn.functional.linear_cross_entropy`` for index targets, as float32 (float64 for
    float64 inputs).

    Cost: 3 products for a scalar loss (forward and backward; the weights enter the forward pass, so
    nothing is made twice), 2 with the head frozen and any upstream gradient, 4 with a trained head
    for ``reduction="none"`` or K > 1 losses, 1 without gradients. Rows whose target is ignored or
    whose every token weight is 0 cost nothing, unless ``token_weight`` requires grad. Memory beyond
    inputs and gradients: one chunk of logits, and a (V, D) buffer in ``options.accum_dtype`` when a
    16-bit head takes three or more chunks (on CUDA: always).

    Args:
        input: hidden states, float32, bfloat16, float16 or float64.
        linear_weight: the head, same dtype as ``input`` unless under autocast. Also torch's
            K-dimensional ``(V, d1, ..., D)`` with ``target`` ``(N, d1, ...)``; then the logits are
            made at once.
        target: int64 class indices.
        linear_bias: bias of the head.
        weight: class weights, constants.
        token_weight: any sign, kept in float32, differentiable: the gradient of loss k for weight
            (k, t) is ``l_t / normalizer_k``. K vectors give K losses: shape ``(K,)`` for mean and
            sum, ``(K, ...)`` for none.
        reduction: "mean", "sum" or "none".
        normalizer: divisor of the mean in place of torch's (the number of tokens not ignored; with
            class weights the sum of theirs): a number, a tensor, or "token_weight" for the sum of
            the token weights.
        ignore_index: target that gives 0 loss and 0 gradient, whatever its token weight; None is
            -100.
        label_smoothing: in [0, 1].
        softcap: bound of the logits (Gemma), or None.
        logit_scale: factor of the logits (Cohere, Granite).
        lse_square_scale: weight of the squared log-sum-exp (z-loss).
        impl: "reference", "native", "triton", or None for the fastest available.
        options: chunk size, accumulation dtype and the like; see ``TokenLossOptions``.
        group: the ranks that hold the vocabulary together: ``linear_weight``, ``linear_bias`` and
            ``weight`` are this rank's slice, in rank order and of any size; everything else is the
            same on all ranks (or see ``sequence_parallel``), targets are global, and so are the
            results. See "Sharded heads" in ``trimtab.ops.token_loss``.
        normalizer_group: data-parallel ranks over which a counted divisor is summed. The losses of
            the ranks then add up to that of the whole batch: where a wrapper averages gradients,
            multiply by the number of its ranks.

    Raises:
        ValueError: a shape, device or value that does not fit.
        TypeError: a dtype that does not fit.
        IndexError: a target outside the vocabulary. On CUDA such a row gives NaN, unless
            ``TRIMTAB_CHECK=1``.
        RuntimeError: ``impl`` names an implementation that is not available here.
    """
    ignored = -100 if ignore_index is None else ignore_index
    if linear_weight.dim() > 2:
        inputs.check_no_group(group, normalizer_group)
        return cross_entropy(
            inputs.multi_dimensional_logits(input, linear_weight, linear_bias, options), target,
            weight=weight, token_weight=token_weight, reduction=reduction, normalizer=normalizer,
            ignore_index=ignored, label_smoothing=label_smoothing, softcap=softcap,
            logit_scale=logit_scale, lse_square_scale=lse_square_scale, impl=impl,
        )  # fmt: skip
    softcap_or_0 = inputs.check_scalars(
        label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale,
        lse_square_scale=lse_square_scale,
    )  # fmt: skip
    options = inputs.check_options(options)
    linear_weight, linear_bias, weight, shard = local_head(
        input, linear_weight, linear_bias, weight, group, options.sequence_parallel
    )
    with FailingTogether(shard, linear_weight):
        count = inputs.check_token_weight(token_weight, target)
        inputs.check_reduction(reduction, normalizer, token_weight, count, normalizer_group)
        head = inputs.check_head(
            input, linear_weight, linear_bias, target, may_be_empty=shard is not None
        )
        class_weight = inputs.check_class_weight(weight, linear_weight.shape[0], input)
        chosen = choose("linear_cross_entropy", input.device.type, head.compute_dtype, impl).impl
        ranks = Ranks(shard, check_normalizer_group(normalizer_group, shard))
    coefficients = token_coefficients(
        head.target, token_weight, class_weight, count, reduction, normalizer, ignored,
        head.compute_dtype, ranks,
    )  # fmt: skip
    loss_args = LossArguments(ignored, logit_scale, softcap_or_0, label_smoothing, lse_square_scale)
    head_args = HeadArguments(
        options.chunk_size, options.accum_dtype, head.compute_dtype, chosen, shard
    )
    if chosen != "reference" and reduction != "none" and (count is None or count == 1):
        loss = _weighted_loss(head, class_weight, coefficients, options, loss_args, head_args)
        return coefficients.with_nan_of_nothing(loss, count)
    tokens = _token_loss(head, class_weight, coefficients, options, loss_args, head_args)
    return reduce_tokens(tokens, coefficients, reduction, count, head.shape, ranks.token_group())


def _weighted_loss(
    head: inputs.Head,
    class_weight: Tensor | None,
    coefficients: Coefficients,
    options: TokenLossOptions,
    loss_args: LossArguments,
    head_args: HeadArguments,
) -> Tensor:
    """One number, with its gradients made in the forward pass."""
    assert coefficients.values is not None, "a reduction has a coefficient for every token"
    coef = coefficients.values.reshape(-1)
    skip = options.skip_zero_weight and not coef.requires_grad
    needs = needs_grad(head.input, head.weight, head.bias)
    return WeightedLoss.apply(
        head.input, head.weight, head.bias, coef, head.target, class_weight,
        (*needs, coef.requires_grad), skip, loss_args, head_args,
    )  # fmt: skip


def _token_loss(
    head: inputs.Head,
    class_weight: Tensor | None,
    coefficients: Coefficients,
    options: TokenLossOptions,
    loss_args: LossArguments,
    head_args: HeadArguments,
) -> Tensor:
    """One number per token, (N,)."""
    if head_args.impl == "reference":
        if head_args.shard is None:
            check_target_range(head.target, loss_args.ignore_index, head.weight.shape[0])
        return reference_loss(
            head.input, head.weight, head.bias, head.target, class_weight, loss_args,
            head.compute_dtype, head_args.shard,
        )  # fmt: skip
    active = coefficients.active() if options.skip_zero_weight else None
    return TokenLoss.apply(
        head.input, head.weight, head.bias, head.target, active, class_weight,
        needs_grad(head.input, head.weight, head.bias), loss_args, head_args,
    )  # fmt: skip


def cross_entropy(
    input: Tensor,  # (N, C), (C,) or (N, C, d1, ...)
    target: Tensor,  # (N,), () or (N, d1, ...)
    *,
    weight: Tensor | None = None,  # (C,)
    token_weight: Tensor | None = None,  # target's shape, or (K,) + target's shape
    reduction: str = "mean",
    normalizer: float | Tensor | str | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Cross entropy of logits that exist already, weighted per token.

    Formula, weights, reductions and errors are those of ``linear_cross_entropy``; shapes are those
    of ``torch.nn.functional.cross_entropy`` for index targets (classes in dimension 1).

    Cost: one read of the logits forward; one read and one write backward. No copy of the logits is
    made unless their classes are not the last, contiguous dimension.

    Args:
        input: logits, float32, bfloat16, float16 or float64.
        target: int64 class indices.
        weight: class weights, constants.
        token_weight: one weight per token or K vectors of them, differentiable.
        reduction: "mean", "sum" or "none".
        normalizer: divisor of the mean: a number, a tensor or "token_weight"; None is torch's.
        ignore_index: target that gives 0 loss and 0 gradient.
        label_smoothing: in [0, 1].
        softcap: bound of the logits, or None.
        logit_scale: factor of the logits.
        lse_square_scale: weight of the squared log-sum-exp.
        impl: "reference", "native", "triton", or None for the fastest available.

    Raises:
        ValueError: a shape, device or value that does not fit.
        TypeError: a dtype that does not fit.
        IndexError: a target outside the vocabulary. On CUDA such a row gives NaN, unless
            ``TRIMTAB_CHECK=1``.
        RuntimeError: ``impl`` names an implementation that is not available here.
    """
    check_floating("input", input)
    if input.dim() == 0:
        raise bad("input", "of shape (C,), (N, C) or (N, C, d1, ...)", (), "pass rows of logits")
    classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    if classes == 0:
        raise bad("input", "of at least one class", tuple(input.shape), "check the logits' shape")
    check_target(target, input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:])
    check_devices(input, {"target": target})
    softcap_or_0 = inputs.check_scalars(
        label_smoothing=label_smoothing, softcap=softcap, logit_scale=logit_scale,
        lse_square_scale=lse_square_scale,
    )  # fmt: skip
    count = inputs.check_token_weight(token_weight, target)
    inputs.check_reduction(reduction, normalizer, token_weight, count)
    class_weight = inputs.check_class_weight(weight, classes, input)
    chosen = choose("cross_entropy", input.device.type, input.dtype, impl).impl
    rows, flat = inputs.class_last(input), target.reshape(-1)
    coefficients = token_coefficients(
        flat, token_weight, class_weight, count, reduction, normalizer, ignore_index, input.dtype
    )
    loss_args = LossArguments(
        ignore_index, logit_scale, softcap_or_0, label_smoothing, lse_square_scale
    )
    if chosen == "reference":
        check_target_range(flat, ignore_index, classes)
        tokens = reference.token_loss(rows, flat, **loss_args.for_reference(class_weight))
    else:
        tokens = RowLoss.apply(rows, flat, class_weight, loss_args, chosen)
    return reduce_tokens(tokens, coefficients, reduction, count, target.shape)


def linear_logp(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # number or (...)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    impl: str | None = None,
    options: TokenLossOptions | None = None,
    group: ProcessGroup | None = None,
) -> TokenLogp:
    """Log-probability and entropy of each token under a linear head, without the logits in memory.

    With ``z`` as in ``linear_cross_entropy``, divided by the temperature::

        lse_t     = log sum_v exp(z_v)
        logp_t    = z_y - lse_t
        entropy_t = lse_t - sum_v softmax(z)_v z_v

    Cost in products: 1 without gradients, 4 with (the upstreams are known only in backward; 3 if
    ``input`` needs none), and 2 with the head frozen and an upstream for ``logp`` alone. Ignored
    tokens cost nothing, nor in backward those without an upstream.

    Args:
        input: hidden states, float32, bfloat16, float16 or float64.
        linear_weight: the head, same dtype as ``input`` unless under autocast.
        target: int64 class indices.
        linear_bias: bias of the head.
        temperature: positive; a number, or one per token; without gradient.
        logit_scale: factor of the logits.
        softcap: bound of the logits before the temperature, or None.
        ignore_index: target whose token gives 0 for ``logp``, ``entropy`` and ``lse`` and -1 for
            ``predicted``; None ignores nothing.
        impl: "reference", "native", "triton", or None for the fastest available.
        options: chunk size and accumulation dtype; ``skip_zero_weight`` has no meaning here.
        group: as in ``linear_cross_entropy``.

    Returns:
        ``TokenLogp(logp, entropy, lse, predicted)``, float32 (float64 for float64 inputs) and
        int64.

    Raises:
        ValueError: a shape, device or value that does not fit.
        TypeError: a dtype that does not fit.
        IndexError: a target outside the vocabulary. On CUDA such a row gives NaN, unless
            ``TRIMTAB_CHECK=1``.
        RuntimeError: ``impl`` names an implementation that is not available here.
    """
    softcap_or_0 = inputs.check_scalars(softcap=softcap, logit_scale=logit_scale)
    options = inputs.check_options(options)
    linear_weight, linear_bias, _, shard = local_head(
        input, linear_weight, linear_bias, None, group, options.sequence_parallel
    )
    with FailingTogether(shard, linear_weight):
        head = inputs.check_head(
            input, linear_weight, linear_bias, target, may_be_empty=shard is not None
        )
        inv_temperature = inputs.inverse_temperature(temperature, head)
        chosen = choose("linear_logp", input.device.type, head.compute_dtype, impl).impl
    ignored = NOTHING_IGNORED if ignore_index is None else ignore_index
    transform = (ignored, logit_scale, softcap_or_0)
    outputs: tuple[Tensor, ...]
    if chosen == "reference":
        if shard is None:
            check_target_range(head.target, ignored, linear_weight.shape[0])
        outputs = reference_logp(
            head.input, head.weight, head.bias, head.target, inv_temperature, transform,
            head.compute_dtype, shard,
        )  # fmt: skip
    else:
        outputs = LinearLogp.apply(
            head.input, head.weight, head.bias, head.target, inv_temperature,
            needs_grad(head.input, head.weight, head.bias), transform,
            HeadArguments(
                options.chunk_size, options.accum_dtype, head.compute_dtype, chosen, shard
            ),
        )  # fmt: skip
    return TokenLogp(*(output.reshape(head.shape) for output in outputs))


def linear_logp_ratio(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (V, D)
    ref_input: Tensor,  # (..., E)
    ref_linear_weight: Tensor,  # (V, E)
    target: Tensor,  # (...)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    ref_linear_bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # number or (...)
    ref_temperature: float | Tensor | None = None,  # number or (...)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    impl: str | None = None,
    options: TokenLossOptions | None = None,
    group: ProcessGroup | None = None,
) -> LogpRatio:
    """Log-probability ratio of two linear heads per token: ``log p(y) - log p_ref(y)``.

    The reference side is detached: it costs one product and keeps nothing for backward. The policy
    side costs what ``linear_logp`` costs.

    Args:
        input: hidden states of the policy.
        linear_weight: head of the policy.
        ref_input: hidden states of the reference, of any width.
        ref_linear_weight: head of the reference.
        target: int64 class indices.
        linear_bias: bias of the policy's head.
        ref_linear_bias: bias of the reference's head.
        temperature: positive; a number, or one per token.
        ref_temperature: the reference's; None for the policy's.
        logit_scale: factor of the logits on both sides.
        softcap: bound of the logits on both sides, or None.
        ignore_index: target whose token gives 0 everywhere; None ignores nothing.
        impl: "reference", "native", "triton", or None for the fastest available.
        options: as for ``linear_logp``.
        group: as in ``linear_cross_entropy``, for both heads.

    Returns:
        ``LogpRatio(log_ratio, logp, ref_logp)``.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as ``linear_logp``, for either side.
    """
    shared: dict[str, Any] = {
        "logit_scale": logit_scale, "softcap": softcap, "ignore_index": ignore_index, "impl": impl,
        "options": options, "group": group,
    }  # fmt: skip
    with torch.no_grad():
        ref_logp = linear_logp(
            ref_input, ref_linear_weight, target, linear_bias=ref_linear_bias,
            temperature=temperature if ref_temperature is None else ref_temperature, **shared,
        ).logp  # fmt: skip
    logp = linear_logp(
        input, linear_weight, target, linear_bias=linear_bias, temperature=temperature, **shared
    ).logp
    return LogpRatio(logp - ref_logp, logp, ref_logp)


def _choice_of_cross_entropy(arguments: dict[str, Any]) -> Choice:
    logits = arguments["input"]
    return choose("cross_entropy", logits.device.type, logits.dtype, arguments["impl"])


def _choice_for_head(op: str) -> Callable[[dict[str, Any]], Choice]:
    return lambda arguments: inputs.choice_for_head(op, arguments)


CHOICES: dict[str, tuple[Callable[..., Any], Callable[[dict[str, Any]], Choice]]] = {
    "cross_entropy": (cross_entropy, _choice_of_cross_entropy),
    "linear_cross_entropy": (linear_cross_entropy, _choice_for_head("linear_cross_entropy")),
    "linear_logp": (linear_logp, _choice_for_head("linear_logp")),
    "linear_logp_ratio": (linear_logp_ratio, _choice_for_head("linear_logp_ratio")),
}
"""Public operator -> (function, what ``explain`` answers for its arguments)."""
