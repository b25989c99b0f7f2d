"""The combination of a row, shared by the kernels, and the kernel that writes it."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import on, tile_index
from .config import options, row_stride


@triton.jit
def row_of(ptr, row, row_stride, ALIGNMENT: tl.constexpr):
    """Address of a row; None for a tensor that is not given."""
    if ptr is None:
        return None
    else:
        return ptr + tl.multiple_of(row * row_stride, ALIGNMENT)


@triton.jit
def parameter(value, rows_ptr, row):
    """A row's value of a parameter: the tensor wins over the number."""
    if rows_ptr is None:
        return value
    else:
        return tl.load(rows_ptr + row)


@triton.jit
def read(ptr, index, V, EVICT: tl.constexpr):
    """Logits in float32; -inf outside of the row."""
    x = tl.load(ptr + index, mask=index < V, other=float("-inf"), eviction_policy=EVICT)
    return x.to(tl.float32)


@triton.jit
def combine(positive_ptr, negative_ptr, anchor_ptr, index, V, alpha, EVICT: tl.constexpr):
    """``z`` before the mask, and ``a``; both -inf outside of the row."""
    p = read(positive_ptr, index, V, EVICT)
    a = p
    if anchor_ptr is not None:
        a = read(anchor_ptr, index, V, EVICT)
    z = p
    if negative_ptr is not None:
        n = read(negative_ptr, index, V, EVICT)
        d = tl.where(p == n, 0.0, p - n)
        z = tl.where(alpha == 0.0, a, a + alpha * d)
        z = tl.where(a == float("-inf"), a, z)
    return z, a


@triton.jit
def threshold_of(
    anchor_ptr, V, log_beta, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr
):
    """``max_v a_v + log_beta``; NaN where an anchor is NaN."""
    lane_max = tl.full((STEPS, LANES, VEC), float("-inf"), tl.float32)
    for tile in range(tl.cdiv(V, STEPS * LANES * VEC)):
        a = read(anchor_ptr, tile_index(tile, STEPS, LANES, VEC), V, "evict_last")
        lane_max = tl.maximum(lane_max, a, propagate_nan=tl.PropagateNan.ALL)
    unknown = tl.sum((lane_max != lane_max).to(tl.int32)) > 0
    return tl.where(unknown, float("nan"), tl.max(lane_max) + log_beta)


@triton.jit
def logits_kernel(
    positive_ptr, positive_row_stride, negative_ptr, negative_row_stride,
    anchor_ptr, anchor_row_stride, alpha, alpha_rows_ptr, log_beta, log_beta_rows_ptr,
    out_ptr, out_row_stride, V, HAS_MASK: tl.constexpr, ALIGNMENT: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``, every ``num_programs(1)``-th tile of it."""
    row = tl.program_id(0).to(tl.int64)
    positive_ptr = row_of(positive_ptr, row, positive_row_stride, ALIGNMENT)
    negative_ptr = row_of(negative_ptr, row, negative_row_stride, ALIGNMENT)
    anchor_ptr = row_of(anchor_ptr, row, anchor_row_stride, ALIGNMENT)
    out_ptr = row_of(out_ptr, row, out_row_stride, ALIGNMENT)
    alpha = parameter(alpha, alpha_rows_ptr, row)
    log_beta = parameter(log_beta, log_beta_rows_ptr, row)
    threshold = float("-inf")
    if HAS_MASK:
        threshold = threshold_of(
            positive_ptr if anchor_ptr is None else anchor_ptr, V, log_beta, STEPS, LANES, VEC
        )
        threshold = tl.where(log_beta > float("-inf"), threshold, float("-inf"))
    for tile in range(
        tl.program_id(1), tl.cdiv(V, STEPS * LANES * VEC), tl.num_programs(1)
    ):  # fmt: skip
        index = tile_index(tile, STEPS, LANES, VEC)
        z, a = combine(positive_ptr, negative_ptr, anchor_ptr, index, V, alpha, "evict_first")
        if HAS_MASK:
            z = tl.where(a < threshold, float("-inf"), z)
            z = tl.where(threshold == threshold, z, threshold)
        tl.store(out_ptr + index, z, mask=index < V)


def contrastive_logits_rows(
    positive: Tensor,  # (B, V)
    negative: Tensor | None,  # (B, V)
    anchor: Tensor | None,  # (B, V)
    alpha: float,
    alpha_rows: Tensor | None,  # (B,) float32
    log_beta: float,
    log_beta_rows: Tensor | None,  # (B,) float32
    out: Tensor,  # (B, V) float32
) -> None:
    """The combination after the plausibility mask, ``-inf`` where the mask is.

    Args:
        positive: rows; float32, float16 or bfloat16; unit stride along V, any row stride.
        negative: rows of the same dtype; None for ``z = p``.
        anchor: rows of the same dtype; None for the positive ones.
        alpha: weight of the contrast.
        alpha_rows: weight of each row; wins over ``alpha``.
        log_beta: logarithm of the plausibility; -inf for no mask.
        log_beta_rows: of each row; wins over ``log_beta``.
        out: written. A NaN stays where it is; with a mask, one in the anchor fills its row.

    Cost: one read of the rows and one write; with a mask the anchor is read twice.
    """
    if positive.numel() == 0:
        return
    masked = log_beta_rows is not None or log_beta > float("-inf")
    # As many elements to a thread as it writes in 16 bytes: the tile never changes its layout.
    config, shared = options(positive, (negative, anchor, out), torch.float32)
    tiles = triton.cdiv(positive.shape[1], config.steps * config.lanes * config.vec)
    with on(positive.device):
        logits_kernel[(positive.shape[0], 1 if masked else min(tiles, 65535))](
            positive,
            row_stride(positive),
            negative,
            row_stride(negative),
            anchor,
            row_stride(anchor),
            float(alpha),
            alpha_rows,
            float(log_beta),
            log_beta_rows,
            out,
            row_stride(out),
            HAS_MASK=masked,
            **shared,
        )
