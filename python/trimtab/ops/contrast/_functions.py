"""The operators that every implementation of contrast sits behind, and autograd around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab._schemas import result_dtype
from trimtab.ops._autograd import aliases, through_reference, wants_double_backward
from trimtab.ops.contrast._inputs import PerRow
from trimtab.reference import contrast as reference


def row_kernels(impl: str) -> Any:
    """The namespace that holds the row operators of an implementation."""
    if impl == "native":
        return torch.ops.trimtab
    from trimtab.triton_kernels import contrast

    return contrast


@torch.library.impl("trimtab::contrastive_logits", "CompositeExplicitAutograd")
def _contrastive_logits(positive: Tensor, *arguments: Any) -> Tensor:
    *arguments, impl = arguments  # type: ignore[assignment]
    out = positive.new_empty(positive.shape, dtype=result_dtype(positive.dtype))
    row_kernels(impl).contrastive_logits_rows(positive, *arguments, out)
    return out


@torch.library.impl("trimtab::contrastive_logp", "CompositeExplicitAutograd")
def _contrastive_logp(positive: Tensor, *arguments: Any) -> Tensor:
    *arguments, impl = arguments  # type: ignore[assignment]
    logp = positive.new_empty(positive.shape[:1], dtype=result_dtype(positive.dtype))
    row_kernels(impl).contrastive_logp_rows(positive, *arguments, logp)
    return logp


@torch.library.impl("trimtab::contrastive_logp_backward", "CompositeExplicitAutograd")
def _contrastive_logp_backward(positive: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *arguments, needs, impl = arguments  # type: ignore[assignment]
    grads = [positive.new_empty(positive.shape) if need else None for need in needs]
    row_kernels(impl).contrastive_logp_rows_backward(positive, *arguments, *grads)
    return tuple(positive.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.impl("trimtab::contrastive_sample", "CompositeExplicitAutograd")
def _contrastive_sample(positive: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, rows, impl = arguments  # type: ignore[assignment]
    token = positive.new_empty(rows, dtype=torch.int64)
    logp = positive.new_empty(rows, dtype=result_dtype(positive.dtype))
    kept = torch.empty_like(token)
    row_kernels(impl).contrastive_sample_rows(positive, *arguments, token, logp, kept)
    return token, logp, kept


class ContrastiveLogits(torch.autograd.Function):
    """The contrasted rows; linear in the inputs wherever they are not -inf."""

    @staticmethod
    def forward(
        ctx: Any,
        positive: Tensor,  # (B, V)
        negative: Tensor,  # (B, V)
        anchor: Tensor | None,  # (B, V)
        alpha: PerRow,
        log_beta: PerRow,
        needs: tuple[bool, ...],
        impl: str,
    ) -> Tensor:
        """One read of the rows and one write."""
        out = torch.ops.trimtab.contrastive_logits.default(
            positive, negative, anchor, *alpha, *log_beta, impl
        )
        # The mask, not the rows: those a caller may change in place.
        ctx.save_for_backward(out == -torch.inf if any(needs) else None, alpha.rows)
        ctx.alpha, ctx.has_anchor = alpha.number, anchor is not None
        ctx.needs, ctx.dtype = needs, positive.dtype
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """Elementwise; a token at -inf has no gradient."""
        masked, rows = ctx.saved_tensors
        alpha = ctx.alpha if rows is None else rows.unsqueeze(-1)
        grad = upstream.masked_fill(masked, 0.0)
        factors = (alpha if ctx.has_anchor else 1.0 + alpha, -alpha, 1.0)
        grads = [
            (grad * factor).to(ctx.dtype) if need else None
            for factor, need in zip(factors, ctx.needs, strict=True)
        ]
        return (*grads, None, None, None, None)


class ContrastiveLogp(torch.autograd.Function):
    """Log-probability of each row's target."""

    @staticmethod
    def forward(
        ctx: Any,
        positive: Tensor,  # (B, V)
        negative: Tensor,  # (B, V)
        anchor: Tensor | None,  # (B, V)
        target: Tensor,  # (B,)
        alpha: PerRow,
        temperature: PerRow,
        ignore_index: int,
        needs: tuple[bool, ...],
        impl: str,
    ) -> Tensor:
        """One read of the rows."""
        logp = torch.ops.trimtab.contrastive_logp.default(
            positive, negative, anchor, target, *alpha, *temperature, ignore_index, impl
        )
        ctx.save_for_backward(positive, negative, anchor, target, alpha.rows, temperature.rows)
        ctx.numbers = alpha.number, temperature.number, ignore_index
        ctx.needs, ctx.impl = needs, impl
        return logp

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """One read of the rows, one write for each gradient."""
        positive, negative, anchor, target, *rows = ctx.saved_tensors
        *numbers, ignore_index = ctx.numbers
        alpha, temperature = (PerRow(n, r) for n, r in zip(numbers, rows, strict=True))
        if wants_double_backward():
            positive, negative, anchor = aliases(positive, negative, anchor)
            logp = reference.contrastive_logp(
                positive, negative, anchor, target, alpha.value(), temperature.value(), ignore_index
            )
            inputs = (positive, negative, anchor)
            return (*through_reference(logp, inputs, ctx.needs, upstream), *[None] * 6)
        grads = torch.ops.trimtab.contrastive_logp_backward.default(
            positive, negative, anchor, target, *alpha, *temperature, ignore_index,
            upstream.contiguous(), ctx.needs, ctx.impl,
        )  # fmt: skip
        wanted = [grad if need else None for grad, need in zip(grads, ctx.needs, strict=True)]
        return (*wanted, *[None] * 6)
