"""Log-probability of each row's target under the combination, and the way back."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import FLOOR, LOWEST, exp, log1p, on, sum_in_lanes, tile_index
from .combine import combine, parameter, row_of
from .config import options, row_stride


@triton.jit
def _scaled(
    positive_ptr, negative_ptr, anchor_ptr, index, V, alpha, temperature, EVICT: tl.constexpr
):
    z, _ = combine(positive_ptr, negative_ptr, anchor_ptr, index, V, alpha, EVICT)
    return tl.div_rn(z, temperature)


@triton.jit
def _read_row(
    positive_ptr, negative_ptr, anchor_ptr, V, y, alpha, temperature, EVICT: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """First pass: ``m``, ``s_y - m``, and the sum of ``exp(s_v - m)`` over the other tokens."""
    lane_max = tl.full((LANES,), LOWEST, tl.float32)
    lane_rest = tl.zeros((LANES,), tl.float32)
    for tile in range(tl.cdiv(V, STEPS * LANES * VEC)):
        index = tile_index(tile, STEPS, LANES, VEC)
        s = _scaled(positive_ptr, negative_ptr, anchor_ptr, index, V, alpha, temperature, EVICT)
        new_max = tl.maximum(lane_max, tl.max(tl.max(s, 2), 0))
        e = tl.where(index == y, 0.0, exp(s - new_max[None, :, None]))
        lane_rest = lane_rest * exp(tl.maximum(lane_max - new_max, FLOOR)) + sum_in_lanes(e)
        lane_max = new_max
    s_y = _scaled(positive_ptr, negative_ptr, anchor_ptr, y, V, alpha, temperature, EVICT)
    m = tl.maximum(tl.max(lane_max, 0), s_y)
    rest = tl.sum(lane_rest * exp(tl.maximum(lane_max - m, FLOOR)), 0)
    return m, s_y - m, rest


@triton.jit(do_not_specialize=["ignore_index"])
def logp_kernel(
    positive_ptr, positive_row_stride, negative_ptr, negative_row_stride,
    anchor_ptr, anchor_row_stride, target_ptr, alpha, alpha_rows_ptr,
    temperature, temperature_rows_ptr, ignore_index, logp_ptr, V, ALIGNMENT: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``: arguments as in `contrastive_logp_rows`."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row)
    if (y == ignore_index) | (y < 0) | (y >= V):
        tl.store(logp_ptr + row, tl.where(y == ignore_index, 0.0, float("nan")))
        return
    _, s_y, rest = _read_row(
        row_of(positive_ptr, row, positive_row_stride, ALIGNMENT),
        row_of(negative_ptr, row, negative_row_stride, ALIGNMENT),
        row_of(anchor_ptr, row, anchor_row_stride, ALIGNMENT),
        V, y.to(tl.int32), parameter(alpha, alpha_rows_ptr, row),
        parameter(temperature, temperature_rows_ptr, row), "evict_first", STEPS, LANES, VEC,
    )  # fmt: skip
    e_y = exp(s_y)
    nll = tl.where(rest < e_y, log1p(rest / e_y), tl.log(rest + e_y) - s_y)
    tl.store(logp_ptr + row, -nll)


@triton.jit
def _store(ptr, index, V, value):
    tl.store(ptr + index, value.to(ptr.dtype.element_ty), mask=index < V)


@triton.jit
def _write_rows(
    positive_ptr, negative_ptr, anchor_ptr, grad_positive_ptr, grad_negative_ptr, grad_anchor_ptr,
    V, y, alpha, temperature, m, factor, at_target,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Second pass, last tile first: ``factor exp(s_v - m)``, and ``at_target`` for the target."""
    tiles = tl.cdiv(V, STEPS * LANES * VEC)
    for done in range(tiles):
        index = tile_index(tiles - 1 - done, STEPS, LANES, VEC)
        s = _scaled(
            positive_ptr, negative_ptr, anchor_ptr, index, V, alpha, temperature, "evict_first"
        )
        ds = tl.where(index == y, at_target, factor * exp(s - m))
        if grad_positive_ptr is not None:
            if anchor_ptr is None:
                _store(grad_positive_ptr, index, V, alpha * ds + ds)
            else:
                _store(grad_positive_ptr, index, V, alpha * ds)
        if grad_negative_ptr is not None:
            _store(grad_negative_ptr, index, V, -alpha * ds)
        if grad_anchor_ptr is not None:
            _store(grad_anchor_ptr, index, V, ds)


@triton.jit
def _fill_row(ptr, V, value, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    if ptr is not None:
        for tile in range(tl.cdiv(V, STEPS * LANES * VEC)):
            filler = tl.zeros((STEPS, LANES, VEC), tl.float32) + value
            _store(ptr, tile_index(tile, STEPS, LANES, VEC), V, filler)


@triton.jit(do_not_specialize=["ignore_index"])
def logp_backward_kernel(
    positive_ptr, positive_row_stride, negative_ptr, negative_row_stride,
    anchor_ptr, anchor_row_stride, target_ptr, alpha, alpha_rows_ptr,
    temperature, temperature_rows_ptr, ignore_index, grad_logp_ptr,
    grad_positive_ptr, grad_positive_row_stride, grad_negative_ptr, grad_negative_row_stride,
    grad_anchor_ptr, grad_anchor_row_stride, V, ALIGNMENT: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``: arguments as in `contrastive_logp_rows_backward`."""
    row = tl.program_id(0).to(tl.int64)
    grad_positive_ptr = row_of(grad_positive_ptr, row, grad_positive_row_stride, ALIGNMENT)
    grad_negative_ptr = row_of(grad_negative_ptr, row, grad_negative_row_stride, ALIGNMENT)
    grad_anchor_ptr = row_of(grad_anchor_ptr, row, grad_anchor_row_stride, ALIGNMENT)
    y = tl.load(target_ptr + row)
    if (y == ignore_index) | (y < 0) | (y >= V):
        value = tl.where(y == ignore_index, 0.0, float("nan"))
        _fill_row(grad_positive_ptr, V, value, STEPS, LANES, VEC)
        _fill_row(grad_negative_ptr, V, value, STEPS, LANES, VEC)
        _fill_row(grad_anchor_ptr, V, value, STEPS, LANES, VEC)
        return
    y = y.to(tl.int32)
    positive_ptr = row_of(positive_ptr, row, positive_row_stride, ALIGNMENT)
    negative_ptr = row_of(negative_ptr, row, negative_row_stride, ALIGNMENT)
    anchor_ptr = row_of(anchor_ptr, row, anchor_row_stride, ALIGNMENT)
    alpha = parameter(alpha, alpha_rows_ptr, row)
    temperature = parameter(temperature, temperature_rows_ptr, row)
    m, s_y, rest = _read_row(
        positive_ptr, negative_ptr, anchor_ptr, V, y, alpha, temperature, "evict_last",
        STEPS, LANES, VEC,
    )  # fmt: skip
    total = rest + exp(s_y)
    g = tl.load(grad_logp_ptr + row) / temperature
    _write_rows(
        positive_ptr, negative_ptr, anchor_ptr,
        grad_positive_ptr, grad_negative_ptr, grad_anchor_ptr,
        V, y, alpha, temperature, m, -g / total, g * (rest / total), STEPS, LANES, VEC,
    )  # fmt: skip


def contrastive_logp_rows(
    positive: Tensor,  # (B, V)
    negative: Tensor,  # (B, V)
    anchor: Tensor | None,  # (B, V)
    target: Tensor,  # (B,) int64
    alpha: float,
    alpha_rows: Tensor | None,  # (B,) float32
    temperature: float,
    temperature_rows: Tensor | None,  # (B,) float32
    ignore_index: int,
    logp: Tensor,  # (B,) float32
) -> None:
    """``log softmax(z / T)`` of each row's target.

    Args:
        positive: rows; float32, float16 or bfloat16; unit stride along V, any row stride.
        negative: rows of the same dtype.
        anchor: rows of the same dtype; None for the positive ones.
        target: class of each row. One outside [0, V) gives NaN.
        alpha: weight of the contrast.
        alpha_rows: weight of each row; wins over ``alpha``.
        temperature: ``T``, positive.
        temperature_rows: of each row; wins over ``temperature``.
        ignore_index: rows with this target get 0.
        logp: written.

    Cost: one read of the rows.
    """
    if target.numel() == 0:
        return
    _, shared = options(positive, (negative, anchor))
    with on(positive.device):
        logp_kernel[(target.shape[0],)](
            positive,
            row_stride(positive),
            negative,
            row_stride(negative),
            anchor,
            row_stride(anchor),
            target,
            float(alpha),
            alpha_rows,
            float(temperature),
            temperature_rows,
            ignore_index,
            logp,
            **shared,
        )


def contrastive_logp_rows_backward(
    positive: Tensor,  # (B, V)
    negative: Tensor,  # (B, V)
    anchor: Tensor | None,  # (B, V)
    target: Tensor,  # (B,) int64
    alpha: float,
    alpha_rows: Tensor | None,  # (B,) float32
    temperature: float,
    temperature_rows: Tensor | None,  # (B,) float32
    ignore_index: int,
    grad_logp: Tensor,  # (B,) float32
    grad_positive: Tensor | None,  # (B, V)
    grad_negative: Tensor | None,  # (B, V)
    grad_anchor: Tensor | None,  # (B, V)
) -> None:
    """Gradients with respect to the rows, each rounded once to its dtype.

    With ``ds_v = g (delta_vy - p_v) / T``: ``ds`` for the anchor, ``alpha ds`` for the positive
    row (and ``ds`` more where it is the anchor), ``-alpha ds`` for the negative one.

    Args:
        positive: rows; float32, float16 or bfloat16; unit stride along V, any row stride.
        negative: rows of the same dtype.
        anchor: rows of the same dtype; None for the positive ones.
        target: class of each row. One outside [0, V) gives NaN.
        alpha: weight of the contrast.
        alpha_rows: weight of each row; wins over ``alpha``.
        temperature: ``T``, positive.
        temperature_rows: of each row; wins over ``temperature``.
        ignore_index: rows with this target get gradient 0.
        grad_logp: upstream gradient.
        grad_positive: written where given.
        grad_negative: written where given.
        grad_anchor: written where given; only with an anchor.

    Cost: one read of the rows from memory, a second one that finds them in L2 if there is room,
    and one write for each gradient.
    """
    if target.numel() == 0:
        return
    _, shared = options(positive, (negative, anchor, grad_positive, grad_negative, grad_anchor))
    with on(positive.device):
        logp_backward_kernel[(target.shape[0],)](
            positive,
            row_stride(positive),
            negative,
            row_stride(negative),
            anchor,
            row_stride(anchor),
            target,
            float(alpha),
            alpha_rows,
            float(temperature),
            temperature_rows,
            ignore_index,
            grad_logp,
            grad_positive,
            row_stride(grad_positive),
            grad_negative,
            row_stride(grad_negative),
            grad_anchor,
            row_stride(grad_anchor),
            **shared,
        )
