"""Log-probability, entropy, log-sum-exp and argmax of each row, and the way back."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import FLOOR, LOWEST, exp, on
from .config import options
from .row import fill_row, first_maximum, read_row, write_gradient


@triton.jit(do_not_specialize=["ignore_index"])
def logp_kernel(
    logits_ptr, logits_row_stride, target_ptr, inv_temperature_ptr, ignore_index,
    logp_ptr, entropy_ptr, lse_ptr, predicted_ptr, grad_ptr, grad_row_stride, V, slope, scale,
    HAS_SOFTCAP: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``: arguments as in `token_logp_rows`."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + tl.multiple_of(row * logits_row_stride, VEC)
    if grad_ptr is not None:
        grad_row_ptr = grad_ptr + tl.multiple_of(row * grad_row_stride, VEC)
    y = tl.load(target_ptr + row)
    if (y == ignore_index) | (y < 0) | (y >= V):
        value = tl.where(y == ignore_index, 0.0, float("nan"))
        tl.store(logp_ptr + row, value)
        tl.store(entropy_ptr + row, value)
        tl.store(lse_ptr + row, value)
        tl.store(predicted_ptr + row, -1)
        if grad_ptr is not None:
            fill_row(grad_row_ptr, V, value, STEPS, LANES, VEC)
        return
    y = y.to(tl.int32)
    if inv_temperature_ptr is not None:
        scale *= tl.load(inv_temperature_ptr + row).to(tl.float32)
    EVICT: tl.constexpr = "evict_first" if grad_ptr is None else "evict_last"
    m, _, rest, total, nll, log_total, entropy, _, _, best_tile = read_row(
        row_ptr, None, V, y, slope, scale,
        HAS_SOFTCAP, True, False, True, EVICT, STEPS, LANES, VEC,
    )  # fmt: skip
    tl.store(logp_ptr + row, -nll)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, m + log_total)
    # The lanes don't look for NaN, and -inf is below where they start.
    whole = (total != total) | (m <= LOWEST)
    predicted = first_maximum(
        row_ptr, V, tl.where(whole, 0, best_tile),
        tl.where(whole, tl.cdiv(V, STEPS * LANES * VEC) - 1, best_tile), slope, scale,
        HAS_SOFTCAP, EVICT, STEPS, LANES, VEC,
    )  # fmt: skip
    tl.store(predicted_ptr + row, predicted.to(tl.int64))
    if grad_ptr is not None:
        write_gradient(
            grad_row_ptr, row_ptr, None, V, y, slope, scale,
            m, total, log_total, 0.0, -1.0, 0.0, 0.0, rest / total,
            HAS_SOFTCAP, False, False, STEPS, LANES, VEC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def logp_backward_kernel(
    logits_ptr, logits_row_stride, target_ptr, inv_temperature_ptr, ignore_index,
    grad_logp_ptr, grad_entropy_ptr, grad_lse_ptr, grad_ptr, grad_row_stride, V, slope, scale,
    HAS_SOFTCAP: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``: arguments as in `token_logp_rows_backward`."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + tl.multiple_of(row * logits_row_stride, VEC)
    grad_ptr += tl.multiple_of(row * grad_row_stride, VEC)
    y = tl.load(target_ptr + row)
    if (y == ignore_index) | (y < 0) | (y >= V):
        fill_row(grad_ptr, V, tl.where(y == ignore_index, 0.0, float("nan")), STEPS, LANES, VEC)
        return
    y = y.to(tl.int32)
    if inv_temperature_ptr is not None:
        scale *= tl.load(inv_temperature_ptr + row).to(tl.float32)
    HAS_ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    m, s_y, rest, total, _, log_total, entropy, _, _, _ = read_row(
        row_ptr, None, V, y, slope, scale,
        HAS_SOFTCAP, HAS_ENTROPY, False, False, "evict_last", STEPS, LANES, VEC,
    )  # fmt: skip
    g_logp = 0.0
    g_entropy = 0.0
    g_lse = 0.0
    if grad_logp_ptr is not None:
        g_logp = tl.load(grad_logp_ptr + row).to(tl.float32)
    if HAS_ENTROPY:
        g_entropy = tl.load(grad_entropy_ptr + row).to(tl.float32)
    if grad_lse_ptr is not None:
        g_lse = tl.load(grad_lse_ptr + row).to(tl.float32)
    # Of a target at -inf, p_y is 0 and log p_y must stay finite.
    log_p_y = tl.maximum(s_y, FLOOR) - log_total
    at_target = exp(s_y) / total * (g_lse - g_entropy * (log_p_y + entropy))
    at_target += g_logp * (rest / total)
    write_gradient(
        grad_ptr, row_ptr, None, V, y, slope, scale,
        m, total, log_total, entropy, g_lse - g_logp, g_entropy, 0.0, at_target,
        HAS_SOFTCAP, HAS_ENTROPY, False, STEPS, LANES, VEC,
    )  # fmt: skip


def token_logp_rows(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64
    inv_temperature: Tensor | None,  # (N,) float32
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    logp: Tensor,  # (N,) float32
    entropy: Tensor,  # (N,) float32
    lse: Tensor,  # (N,) float32
    predicted: Tensor,  # (N,) int64
    grad: Tensor | None,  # (N, V)
) -> None:
    """Log-probability of the target, entropy (nats), log-sum-exp and argmax of each row.

    Args:
        logits: rows; float32, float16 or bfloat16; unit stride along V, any row stride.
        target: class of each row. One outside [0, V) gives NaN, and -1 in ``predicted``.
        inv_temperature: factor on each row's capped logits; None is 1.
        ignore_index: rows with this target get 0, 0, 0 and -1, and gradient 0. Where none is
            to be ignored, pass a number that does not occur.
        logit_scale: factor on the logits, before the cap.
        softcap: bound of the logits; 0 is none.
        logp: written.
        entropy: written.
        lse: written.
        predicted: written: the lowest index among the maxima, or the first NaN.
        grad: written where given: the gradient of ``sum(logp)`` with respect to the logits,
            rounded once to its dtype. It may be ``logits`` itself.

    Cost: one read of the logits from memory, and one write for the gradient.
    """
    if logits.numel() == 0:
        return
    with on(logits.device):
        logp_kernel[(logits.shape[0],)](
            logits,
            logits.stride(0),
            target,
            inv_temperature,
            ignore_index,
            logp,
            entropy,
            lse,
            predicted,
            grad,
            0 if grad is None else grad.stride(0),
            **options(logits, grad, logit_scale, softcap),
        )


def token_logp_rows_backward(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64
    inv_temperature: Tensor | None,  # (N,) float32
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    grad_logp: Tensor | None,  # (N,) float32
    grad_entropy: Tensor | None,  # (N,) float32
    grad_lse: Tensor | None,  # (N,) float32
    grad: Tensor,  # (N, V)
) -> None:
    """Gradient with respect to the logits, given those of ``logp``, ``entropy`` and ``lse``.

    ``dz_v = g_logp (delta_vy - p_v) + g_lse p_v - g_entropy p_v (log p_v + H)``, times ``f_v``.
    A logit of -inf gets 0.

    Args:
        logits: rows; float32, float16 or bfloat16; unit stride along V, any row stride.
        target: class of each row. One outside [0, V) gives NaN.
        inv_temperature: factor on each row's capped logits; None is 1.
        ignore_index: rows with this target get gradient 0.
        logit_scale: factor on the logits, before the cap.
        softcap: bound of the logits; 0 is none.
        grad_logp: upstream gradient; None is 0.
        grad_entropy: upstream gradient; None is 0.
        grad_lse: upstream gradient; None is 0.
        grad: written, rounded once to its dtype. It may be ``logits`` itself.

    Cost: one read of the logits from memory and one write.
    """
    if logits.numel() == 0:
        return
    with on(logits.device):
        logp_backward_kernel[(logits.shape[0],)](
            logits,
            logits.stride(0),
            target,
            inv_temperature,
            ignore_index,
            grad_logp,
            grad_entropy,
            grad_lse,
            grad,
            grad.stride(0),
            **options(logits, grad, logit_scale, softcap),
        )
