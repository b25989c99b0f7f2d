"""Autograd around the chunked operators.

Two shapes of the same loss. When the coefficient of every token is known in the forward pass and
the result is one number, its gradients are made there: three products. When the upstream gradient
is known only in backward (one value per token), the logits are made again: four products; or, with
the head frozen, the gradient of each row is kept unscaled and only scaled in backward: two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.ops._autograd import (
    aliases,
    graph_is_kept,
    through_reference,
    wants_double_backward,
)
from trimtab.ops.token_loss import _sharded_reference as sharded_reference
from trimtab.ops.token_loss._chunks import _cast, times
from trimtab.ops.token_loss._groups import Replicated, Shard
from trimtab.reference import token_loss as reference


class LossArguments(NamedTuple):
    """The loss's scalars, in the order in which every operator takes them."""

    ignore_index: int
    logit_scale: float
    softcap: float  # 0 for none
    label_smoothing: float
    lse_square_scale: float

    def for_reference(self, class_weight: Tensor | None) -> dict[str, Any]:
        """The same as the oracle's keyword arguments."""
        return {**self._asdict(), "softcap": self.softcap or None, "class_weight": class_weight}


class HeadArguments(NamedTuple):
    """How the products over the head run."""

    chunk_size: int | None
    accum_dtype: torch.dtype
    compute_dtype: torch.dtype
    impl: str
    shard: Shard | None = None  # the head is one rank's slice

    def run(self, op: str, *arguments: Any) -> tuple[Any, ...]:
        """An operator on the whole head, or its twin for a slice; ``arguments`` precede these."""
        chunk_size, accum_dtype, *rest, shard = self
        how = (chunk_size, *([] if op == "token_logp" else [accum_dtype]), *rest)
        if shard is None:
            return getattr(torch.ops.trimtab, f"linear_{op}").default(*arguments, *how)
        return getattr(torch.ops.trimtab, f"sharded_{op}").default(*arguments, *how, *shard)


def reference_loss(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    class_weight: Tensor | None,  # (V,)
    loss_args: LossArguments,
    dtype: torch.dtype,
    shard: Shard | None,
) -> Tensor:
    """The oracle's loss of each token, of a whole head or of a slice."""
    options = loss_args.for_reference(class_weight)
    input, weight, bias = _cast(input, dtype), _cast(weight, dtype), _cast(bias, dtype)
    if shard is None:
        return reference.linear_token_loss(input, weight, bias, target, **options)
    return sharded_reference.linear_token_loss(shard, input, weight, bias, target, dtype, **options)


def reference_logp(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    inv_temperature: Tensor | None,  # (N,)
    transform: tuple[int, float, float],
    dtype: torch.dtype,
    shard: Shard | None,
) -> tuple[Tensor, ...]:
    """The oracle's numbers of each token, of a whole head or of a slice."""
    ignore_index, logit_scale, softcap = transform
    options: dict[str, Any] = {
        "inv_temperature": inv_temperature, "ignore_index": ignore_index,
        "logit_scale": logit_scale, "softcap": softcap or None,
    }  # fmt: skip
    input, weight, bias = _cast(input, dtype), _cast(weight, dtype), _cast(bias, dtype)
    if shard is None:
        return reference.token_logp(F.linear(input, weight, bias), target, **options)
    return sharded_reference.linear_token_logp(shard, input, weight, bias, target, dtype, **options)


class WeightedLoss(torch.autograd.Function):
    """``sum_t coef_t * l_t`` as one number, with its gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        coef: Tensor,  # (N,)
        target: Tensor,  # (N,)
        class_weight: Tensor | None,  # (V,)
        needs: tuple[bool, ...],
        skip_zero_coef: bool,
        loss_args: LossArguments,
        head_args: HeadArguments,
    ) -> Tensor:
        """One product for the loss and one for each gradient that is needed."""
        loss, *grads, scale = head_args.run(
            "token_loss", input, weight, bias, target, coef, class_weight, *loss_args, needs[:3],
            skip_zero_coef,
        )  # fmt: skip
        ctx.save_for_backward(input, weight, bias, coef, target, class_weight, loss, *grads, scale)
        ctx.needs, ctx.loss_args, ctx.shard = needs, loss_args, head_args.shard
        ctx.compute_dtype = head_args.compute_dtype
        total = torch.where(coef != 0, coef * loss, 0.0).sum()
        shard = head_args.shard
        if shard is None or not shard.sequence_parallel:
            return total
        return torch.ops.trimtab.group_sum.default(total, shard.group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """Scale what the forward pass made."""
        input, weight, bias, coef, target, class_weight, loss, *grads, scale = ctx.saved_tensors
        if wants_double_backward():
            if ctx.shard is not None and ctx.shard.sequence_parallel:
                upstream = Replicated.apply(upstream, ctx.shard.group)
            inputs = input, weight, bias, coef = aliases(input, weight, bias, coef)
            tokens = reference_loss(
                input, weight, bias, target, class_weight, ctx.loss_args, ctx.compute_dtype,
                ctx.shard,
            )  # fmt: skip
            return (
                *through_reference((coef * tokens).sum(), inputs, ctx.needs, upstream),
                *[None] * 6,
            )
        factor = upstream * scale if ctx.compute_dtype == torch.float16 else upstream
        outputs = [
            _scaled(grad, factor) if need else None
            for grad, need in zip(grads, ctx.needs[:3], strict=True)
        ]
        return (*outputs, upstream * loss if ctx.needs[3] else None, *[None] * 6)


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """``grad * factor``, in place when nothing needs ``grad`` again; a 1 on a CPU costs nothing."""
    if grad.dtype == torch.float16 or graph_is_kept():
        return times(grad, factor)
    if grad.device.type == "cpu" and float(factor) == 1.0:
        return grad
    return grad.mul_(factor)


class TokenLoss(torch.autograd.Function):
    """``l_t`` per token, for upstream gradients that only backward knows."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        target: Tensor,  # (N,)
        active: Tensor | None,  # (N,)
        class_weight: Tensor | None,  # (V,)
        needs: tuple[bool, ...],
        loss_args: LossArguments,
        head_args: HeadArguments,
    ) -> Tensor:
        """One product; with the head frozen two, and no more in backward."""
        ctx.head_is_frozen = needs[0] and not (needs[1] or needs[2])
        loss, unit, *_ = head_args.run(
            "token_loss", input, weight, bias, target, active, class_weight, *loss_args,
            [ctx.head_is_frozen, False, False], True,
        )  # fmt: skip
        ctx.save_for_backward(input, weight, bias, target, class_weight, unit)
        ctx.needs, ctx.loss_args, ctx.head_args = needs, loss_args, head_args
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """The logits again and one product per gradient; a scaling of rows with the head frozen."""
        input, weight, bias, target, class_weight, unit = ctx.saved_tensors
        if wants_double_backward():
            input, weight, bias = aliases(input, weight, bias)
            tokens = reference_loss(
                input, weight, bias, target, class_weight, ctx.loss_args,
                ctx.head_args.compute_dtype, ctx.head_args.shard,
            )  # fmt: skip
            return (
                *through_reference(tokens, (input, weight, bias), ctx.needs, upstream),
                *[None] * 6,
            )
        if ctx.head_is_frozen:
            return (_scale_rows(unit, upstream, target, ctx.loss_args.ignore_index), *[None] * 8)
        _, *grads, scale = ctx.head_args.run(
            "token_loss", input, weight, bias, target, upstream.contiguous(), class_weight,
            *ctx.loss_args, ctx.needs, True,
        )  # fmt: skip
        if ctx.head_args.compute_dtype == torch.float16:
            grads = [times(grad, scale) for grad in grads]
        return (
            *(grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)),
            *[None] * 6,
        )


def _scale_rows(rows: Tensor, factor: Any, target: Tensor, ignore_index: int) -> Tensor:
    """``rows[t] * factor[t]``, rounded once; 0 for an ignored token, whose factor may be NaN."""
    factor = factor.masked_fill(target == ignore_index, 0.0)
    return torch.mul(rows, factor.unsqueeze(-1)).to(rows.dtype)


class RowLoss(torch.autograd.Function):
    """``l_t`` per row of logits that exist already."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # (N, V)
        target: Tensor,  # (N,)
        class_weight: Tensor | None,  # (V,)
        loss_args: LossArguments,
        impl: str,
    ) -> Tensor:
        """One read of the logits."""
        loss, _ = torch.ops.trimtab.token_loss.default(
            logits, target, None, class_weight, *loss_args, False, impl
        )
        ctx.save_for_backward(logits, target, class_weight)
        ctx.loss_args, ctx.impl = loss_args, impl
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """One read of the logits and one write of their gradient."""
        logits, target, class_weight = ctx.saved_tensors
        if wants_double_backward():
            tokens = reference.token_loss(
                logits, target, **ctx.loss_args.for_reference(class_weight)
            )
            return (*through_reference(tokens, (logits,), (True,), upstream), *[None] * 4)
        _, grad = torch.ops.trimtab.token_loss.default(
            logits, target, upstream.contiguous(), class_weight, *ctx.loss_args, True, ctx.impl
        )
        return grad, None, None, None, None


class LinearLogp(torch.autograd.Function):
    """Log-probability, entropy, lse and argmax of each token."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        target: Tensor,  # (N,)
        inv_temperature: Tensor | None,  # (N,)
        needs: tuple[bool, ...],
        transform: tuple[int, float, float],
        head_args: HeadArguments,
    ) -> tuple[Tensor, ...]:
        """One product; with the head frozen two."""
        ctx.set_materialize_grads(False)
        ctx.head_is_frozen = needs[0] and not (needs[1] or needs[2])
        *outputs, predicted, unit = head_args.run(
            "token_logp", input, weight, bias, target, inv_temperature, *transform,
            ctx.head_is_frozen,
        )  # fmt: skip
        ctx.mark_non_differentiable(predicted)
        ctx.save_for_backward(input, weight, bias, target, inv_temperature, unit)
        ctx.needs, ctx.transform, ctx.head_args = needs, transform, head_args
        return (*outputs, predicted)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any,
        grad_logp: Tensor | None,  # (N,)
        grad_entropy: Tensor | None,  # (N,)
        grad_lse: Tensor | None,  # (N,)
        _: Any,
    ) -> Any:
        """The logits again and one product per gradient; none for a frozen head's ``logp``."""
        input, weight, bias, target, inv_temperature, unit = ctx.saved_tensors
        upstream = [
            None if grad is None else grad.contiguous()
            for grad in (grad_logp, grad_entropy, grad_lse)
        ]
        if wants_double_backward():
            input, weight, bias = aliases(input, weight, bias)
            outputs = reference_logp(
                input, weight, bias, target, inv_temperature, ctx.transform,
                ctx.head_args.compute_dtype, ctx.head_args.shard,
            )[:3]  # fmt: skip
            used = [
                (out, grad) for out, grad in zip(outputs, upstream, strict=True) if grad is not None
            ]
            grads = through_reference(
                [out for out, _ in used],
                (input, weight, bias),
                ctx.needs,
                [grad for _, grad in used],
            )
            return (*grads, *[None] * 5)
        if all(grad is None for grad in upstream):
            return (None,) * 8
        if ctx.head_is_frozen and grad_entropy is None and grad_lse is None:
            grad = _scale_rows(unit, upstream[0], target, ctx.transform[0])
            return (grad.to(input.dtype), *[None] * 7)
        grads = ctx.head_args.run(
            "token_logp_backward", input, weight, bias, target, inv_temperature, *ctx.transform,
            *upstream, ctx.needs,
        )  # fmt: skip
        return (
            *(grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)),
            *[None] * 5,
        )
