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
from trimtab.ops.token_loss._chunks import times
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


def _logits(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The whole matrix of logits, differentiable."""
    return F.linear(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


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
        loss, *grads, scale = torch.ops.trimtab.linear_token_loss.default(
            input,
            weight,
            bias,
            target,
            coef,
            class_weight,
            *loss_args,
            needs[:3],
            skip_zero_coef,
            *head_args,
        )
        ctx.save_for_backward(input, weight, bias, coef, target, class_weight, loss, *grads, scale)
        ctx.needs, ctx.loss_args = needs, loss_args
        ctx.compute_dtype = head_args.compute_dtype
        return torch.where(coef != 0, coef * loss, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """Scale what the forward pass made."""
        input, weight, bias, coef, target, class_weight, loss, *grads, scale = ctx.saved_tensors
        if wants_double_backward():
            input, weight, bias, coef = aliases(input, weight, bias, coef)
            logits = _logits(input, weight, bias, ctx.compute_dtype)
            tokens = reference.token_loss(
                logits, target, **ctx.loss_args.for_reference(class_weight)
            )
            inputs = (input, weight, bias, coef)
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
        loss, unit, *_ = torch.ops.trimtab.linear_token_loss.default(
            input, weight, bias, target, active, class_weight, *loss_args,
            [ctx.head_is_frozen, False, False], True, *head_args,
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
            logits = _logits(input, weight, bias, ctx.head_args.compute_dtype)
            tokens = reference.token_loss(
                logits, target, **ctx.loss_args.for_reference(class_weight)
            )
            return (
                *through_reference(tokens, (input, weight, bias), ctx.needs, upstream),
                *[None] * 6,
            )
        if ctx.head_is_frozen:
            return (_scale_rows(unit, upstream, target, ctx.loss_args.ignore_index), *[None] * 8)
        _, *grads, scale = torch.ops.trimtab.linear_token_loss.default(
            input, weight, bias, target, upstream.contiguous(), class_weight, *ctx.loss_args,
            ctx.needs, True, *ctx.head_args,
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
        chunk_size, _, compute_dtype, impl = head_args
        *outputs, predicted, unit = torch.ops.trimtab.linear_token_logp.default(
            input, weight, bias, target, inv_temperature, *transform, ctx.head_is_frozen,
            chunk_size, compute_dtype, impl,
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
            ignore_index, logit_scale, softcap = ctx.transform
            input, weight, bias = aliases(input, weight, bias)
            outputs = reference.token_logp(
                _logits(input, weight, bias, ctx.head_args.compute_dtype), target,
                inv_temperature=inv_temperature, ignore_index=ignore_index, logit_scale=logit_scale,
                softcap=softcap or None,
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
        grads = torch.ops.trimtab.linear_token_logp_backward.default(
            input,
            weight,
            bias,
            target,
            inv_temperature,
            *ctx.transform,
            *upstream,
            ctx.needs,
            *ctx.head_args,
        )
        return (
            *(grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)),
            *[None] * 5,
        )
