"""The loss of each row and its gradient, and the sum over chunks."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import exp, on
from .config import options
from .row import fill_row, read_row, write_gradient


@triton.jit(do_not_specialize=["ignore_index"])
def loss_kernel(
    logits_ptr, logits_row_stride, target_ptr, coef_ptr, class_weight_ptr,
    ignore_index, label_smoothing, lse_square_scale,
    loss_ptr, grad_ptr, grad_row_stride, V, slope, scale,
    HAS_SMOOTHING: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``: arguments as in `token_loss_rows`."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + tl.multiple_of(row * logits_row_stride, VEC)
    if grad_ptr is not None:
        grad_row_ptr = grad_ptr + tl.multiple_of(row * grad_row_stride, VEC)
    y = tl.load(target_ptr + row)
    if (y == ignore_index) | (y < 0) | (y >= V):
        value = tl.where(y == ignore_index, 0.0, float("nan"))
        tl.store(loss_ptr + row, value)
        if grad_ptr is not None:
            fill_row(grad_row_ptr, V, value, STEPS, LANES, VEC)
        return
    y = y.to(tl.int32)
    EVICT: tl.constexpr = "evict_first" if grad_ptr is None else "evict_last"
    m, s_y, rest, total, nll, log_total, _, weight_sum, logit_sum, _ = read_row(
        row_ptr, class_weight_ptr, V, y, slope, scale,
        HAS_SOFTCAP, False, HAS_SMOOTHING, False, EVICT, STEPS, LANES, VEC,
    )  # fmt: skip
    w_y = 1.0
    if class_weight_ptr is not None:
        w_y = tl.load(class_weight_ptr + y).to(tl.float32)
    lse = m + log_total
    loss = (1.0 - label_smoothing) * w_y * nll + lse_square_scale * lse * lse
    if HAS_SMOOTHING:
        loss += label_smoothing / V * (weight_sum * log_total - logit_sum)
    tl.store(loss_ptr + row, loss)
    if grad_ptr is not None:
        c = 1.0
        if coef_ptr is not None:
            c = tl.load(coef_ptr + row).to(tl.float32)
        s = c * label_smoothing / V
        main = c * (1.0 - label_smoothing) * w_y
        extra = s * weight_sum + c * 2.0 * lse_square_scale * lse
        at_target = exp(s_y) / total * extra - main * (rest / total) - s * w_y
        write_gradient(
            grad_row_ptr, row_ptr, class_weight_ptr, V, y, slope, scale,
            m, total, log_total, 0.0, main + extra, 0.0, s, at_target,
            HAS_SOFTCAP, False, HAS_SMOOTHING, STEPS, LANES, VEC,
        )  # fmt: skip


def token_loss_rows(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64
    coef: Tensor | None,  # (N,) float32
    class_weight: Tensor | None,  # (V,) float32
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    label_smoothing: float,
    lse_square_scale: float,
    loss: Tensor,  # (N,) float32
    grad: Tensor | None,  # (N, V)
) -> None:
    """Loss of each row, and the gradient of ``sum(coef * loss)`` with respect to the logits.

    ``loss = (1 - eps) w_y nll + eps / V sum_v w_v (lse - z_v) + lse_square_scale lse^2``, where
    ``eps`` is ``label_smoothing`` (Szegedy et al., "Rethinking the Inception Architecture", 2016,
    section 7) and the square is the z-loss (Chowdhery et al., "PaLM", 2022, section 5).

    Args:
        logits: rows; float32, float16 or bfloat16; unit stride along V, any row stride.
        target: class of each row. One outside [0, V) gives NaN.
        coef: weight of each row in the gradient; None is 1. It does not enter ``loss``.
        class_weight: ``w``; None is 1.
        ignore_index: rows with this target get loss 0 and gradient 0, whatever ``coef`` is.
        logit_scale: factor on the logits, before the cap.
        softcap: bound of the logits; 0 is none.
        label_smoothing: ``eps``.
        lse_square_scale: factor of ``lse^2``.
        loss: written.
        grad: written where given, rounded once to its dtype. It may be ``logits`` itself.

    Cost: one read of the logits from memory, and one write for the gradient.
    """
    if logits.numel() == 0:
        return
    with on(logits.device):
        loss_kernel[(logits.shape[0],)](
            logits,
            logits.stride(0),
            target,
            coef,
            class_weight,
            ignore_index,
            float(label_smoothing),
            float(lse_square_scale),
            loss,
            grad,
            0 if grad is None else grad.stride(0),
            HAS_SMOOTHING=label_smoothing > 0.0,
            **options(logits, grad, logit_scale, softcap),
        )


def accumulate(accumulator: Tensor | None, part: Tensor, out: Tensor) -> None:
    """``out = accumulator + part``, added in float32 and rounded once to ``out``'s dtype.

    Args:
        accumulator: the sum so far, ``out``'s shape; None is 0. It may be ``out`` itself.
        part: the summand, ``out``'s shape.
        out: written.
    """
    if accumulator is None:
        out.copy_(part)
    else:
        torch.add(accumulator, part, out=out)
