"""The launches, with what the kernels take of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .config import LANES, SLICES, VALUES
from .plan import Launch, Plan, Rows
from .products import combine_kernel, overlap_kernel, reduce_kernel


def overlap(
    plan: Plan,
    previous: Sequence[Tensor],  # each (R, d), module after module
    current: Sequence[Tensor],  # M times (r, d)
    parts: Tensor,  # (plan.parts,) float32
) -> None:
    """Writes the parts of ``G = P C^T``, one for each slice of d."""
    tile, made_in, items = plan.overlap
    if len(items) == 0:
        return
    earlier, later = previous[plan.previous.base], current[plan.current.base]
    overlap_kernel[(len(items),)](
        earlier,
        plan.previous.offsets,
        plan.previous.steps,
        later,
        plan.current.offsets,
        plan.current.steps,
        items,
        parts,
        PREVIOUS_VEC=plan.previous.vec,
        CURRENT_VEC=plan.current.vec,
        WIDTH_VEC=plan.width_vec,
        COMPUTE=made_in.compute,
        PRECISION=made_in.precision,
        ROWS=tile.rows,
        RANK=tile.rank,
        COLUMNS=tile.columns,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )


def reduce(
    plan: Plan,
    parts: Tensor,  # (plan.parts,) float32
    squared: bool,
    weight: Tensor | None = None,  # (M,) float32
    values: Tensor | None = None,  # (len(plan.reduce_items),) float32
) -> None:
    """Adds the parts into the first, as G or its signs, and makes the values of its pieces."""
    if len(plan.reduce_items) == 0:
        return
    reduce_kernel[(len(plan.reduce_items),)](
        parts,
        plan.reduce_items,
        weight,
        values,
        SQUARED=squared,
        VEC=plan.rank_vec,
        SLICES=SLICES,
        LANES=LANES,
        num_warps=4,
        enable_fp_fusion=False,
    )


def combine(
    plan: Plan,
    launch: Launch,
    tensors: Sequence[Tensor],
    rows: Rows,
    parts: Tensor,  # (plan.parts,) float32
    out: Tensor,
    *,
    factor: float = 1.0,
    weight: Tensor | None = None,  # (M,) float32
    transposed: bool = False,
    minuend: Tensor | None = None,
    values: Tensor | None = None,  # (.,) float32
    value: Tensor | None = None,  # () float32
) -> None:
    """Writes ``factor * weight * S^T P``, or with a minuend ``C - S^T P``; adds up the values.

    Args:
        plan: of the call.
        launch: its programs.
        tensors: the rows that are combined, ``rows`` in the plan.
        rows: where they are.
        parts: S, in the first part of each module.
        out: a buffer for all modules; with a minuend, the tensor that ``plan.outs`` counts from.
        factor: of all combinations, without a minuend.
        weight: of each module, without a minuend.
        transposed: whether S is taken as ``S C`` has it.
        minuend: the tensor that ``plan.current`` counts from.
        values: added up into ``value``, where that is given.
        value: written.
    """
    tile, made_in, items = launch
    programs = len(items) + (value is not None)
    if programs == 0:
        return
    source = tensors[rows.base] if tensors else parts
    outs, others = plan.outs, plan.current if minuend is not None else None
    s_along_rows, s_along_ranks = (plan.rank_vec, 1) if transposed else (1, plan.rank_vec)
    combine_kernel[(programs,)](
        source,
        rows.offsets,
        rows.steps,
        items,
        parts,
        factor,
        weight,
        minuend,
        others and others.offsets,
        others and others.steps,
        out,
        outs and outs.offsets,
        values,
        value,
        0 if values is None else len(values),
        TRANSPOSED=transposed,
        VEC=rows.vec,
        MINUEND_VEC=others.vec if others else 1,
        S_VEC=plan.rank_vec,
        OUT_VEC=outs.vec if outs else plan.width_vec,
        WIDTH_VEC=plan.width_vec,
        ROWS_VEC=max(s_along_rows, _neighbours(rows)),
        RANKS_VEC=max(s_along_ranks, _neighbours(others)),
        VALUES=VALUES,
        COMPUTE=made_in.compute,
        PRECISION=made_in.precision,
        PARTS=made_in.parts,
        ROWS=tile.rows,
        RANK=tile.rank,
        COLUMNS=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )


def _neighbours(rows: Rows | None) -> int:
    """How many rows at a time are neighbours in memory."""
    return rows.vec if rows is not None and rows.steps is not None else 1
