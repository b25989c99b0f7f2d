"""The kernels: parts of G, their sum, and S^T P."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(offsets_ptr, strides_ptr, first, count, ROWS: tl.constexpr, VEC: tl.constexpr):
    """Offset of each row, and its step from column to column, which is None for 1.

    VEC elements can be loaded at once: along the row, or where there is a step, of VEC rows that
    are neighbours in memory.
    """
    row = tl.arange(0, ROWS)
    offset = tl.load(offsets_ptr + first + row, mask=row < count, other=0)
    offset = tl.multiple_of(offset, VEC)
    if strides_ptr is None:
        return offset, None
    else:
        step = tl.load(strides_ptr + first + row, mask=row < count, other=0)
        step = tl.max_constancy(tl.multiple_of(step, VEC), VEC)
        return tl.max_contiguous(offset, VEC), step


@triton.jit
def _tile(
    ptr, offset, step, count, begin, end, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS elements in the dtype of the products; 0 outside."""
    column = begin + tl.arange(0, COLUMNS)
    inside = (tl.arange(0, ROWS) < count)[:, None] & (column < end)[None, :]
    if step is None:
        place = offset[:, None] + column[None, :]
    else:
        place = offset[:, None] + step[:, None] * column[None, :]
    return tl.load(ptr + place, mask=inside, other=0.0).to(COMPUTE)


@triton.jit
def overlap_kernel(
    previous_ptr, previous_offsets_ptr, previous_strides_ptr,
    current_ptr, current_offsets_ptr, current_strides_ptr, items_ptr, parts_ptr,
    PREVIOUS_VEC: tl.constexpr, CURRENT_VEC: tl.constexpr, WIDTH_VEC: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of G over a slice of d: item ``program_id(0)`` of `plan.overlap`."""
    item_ptr = items_ptr + tl.program_id(0).to(tl.int64) * 8
    previous_first = tl.load(item_ptr)
    rows = tl.load(item_ptr + 1).to(tl.int32)
    current_first = tl.load(item_ptr + 2)
    ranks = tl.load(item_ptr + 3).to(tl.int32)
    begin = tl.multiple_of(tl.load(item_ptr + 4).to(tl.int32), COLUMNS)
    end = tl.multiple_of(tl.load(item_ptr + 5).to(tl.int32), WIDTH_VEC)
    parts_ptr += tl.load(item_ptr + 6)
    row_stride = tl.load(item_ptr + 7)
    if previous_strides_ptr is not None:
        rows = tl.multiple_of(rows, PREVIOUS_VEC)
    if current_strides_ptr is not None:
        ranks = tl.multiple_of(ranks, CURRENT_VEC)
    previous_offset, previous_step = _rows(
        previous_offsets_ptr, previous_strides_ptr, previous_first, rows, ROWS, PREVIOUS_VEC
    )
    current_offset, current_step = _rows(
        current_offsets_ptr, current_strides_ptr, current_first, ranks, RANK, CURRENT_VEC
    )
    g = tl.zeros((ROWS, RANK), tl.float32)
    for column in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        column = tl.multiple_of(column, COLUMNS)
        p = _tile(
            previous_ptr, previous_offset, previous_step, rows, column, end, COMPUTE, ROWS, COLUMNS
        )
        c = _tile(
            current_ptr, current_offset, current_step, ranks, column, end, COMPUTE, RANK, COLUMNS
        )
        g = tl.dot(p, tl.trans(c), g, input_precision=PRECISION)
    row = tl.arange(0, ROWS)[:, None]
    rank = tl.arange(0, RANK)[None, :]
    tl.store(parts_ptr + row * row_stride + rank, g, mask=(row < rows) & (rank < ranks))


@triton.jit
def reduce_kernel(
    parts_ptr, items_ptr, weight_ptr, values_ptr,
    SQUARED: tl.constexpr, VEC: tl.constexpr, SLICES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Adds the parts of LANES elements of G, puts S in place of the first, and adds their values.

    Item ``program_id(0)`` of `plan.reduce_items`; ``values_ptr`` is None where no value is wanted.
    """
    item = tl.program_id(0).to(tl.int64)
    item_ptr = items_ptr + item * 5
    parts_ptr += tl.multiple_of(tl.load(item_ptr), VEC)
    count = tl.multiple_of(tl.load(item_ptr + 1), VEC)
    slice_stride = tl.multiple_of(tl.load(item_ptr + 2), VEC)
    slices = tl.load(item_ptr + 3).to(tl.int32)
    lane = tl.arange(0, LANES)
    g = tl.zeros((LANES,), tl.float32)
    for first in range(0, slices, SLICES):
        which = first + tl.arange(0, SLICES)
        part = tl.load(
            parts_ptr + which[:, None] * slice_stride + lane[None, :],
            mask=(which < slices)[:, None] & (lane < count)[None, :],
            other=0.0,
        )
        g += tl.sum(part, 0)
    # As torch has it, the sign of NaN is 0.
    s = g if SQUARED else tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, 0.0))
    tl.store(parts_ptr + lane, s, mask=lane < count)
    if values_ptr is not None:
        value = tl.sum(g * g if SQUARED else tl.abs(g), 0)
        if weight_ptr is not None:
            value *= tl.load(weight_ptr + tl.load(item_ptr + 4))
        tl.store(values_ptr + item, value)


@triton.jit
def _add_values(values_ptr, value_ptr, n_values, LANES: tl.constexpr):
    lane = tl.zeros((LANES,), tl.float32)
    for first in range(0, n_values, LANES):
        place = first + tl.arange(0, LANES)
        lane += tl.load(values_ptr + place, mask=place < n_values, other=0.0)
    tl.store(value_ptr, tl.sum(lane, 0))


@triton.jit
def bfloat16_part(x):
    """The leading 8 bits of each float32, which bfloat16 holds."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _accumulate(y, p, s, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr):
    """``y + p^T s``, with s as a sum of PARTS numbers that bfloat16 holds, largest first."""
    for part in tl.static_range(PARTS):
        head = s
        if part < PARTS - 1:
            head = bfloat16_part(s)
        y = tl.dot(tl.trans(p), head.to(COMPUTE), y, input_precision=PRECISION)
        s -= head
    return y


@triton.jit(do_not_specialize=["n_values"])
def combine_kernel(
    rows_ptr, offsets_ptr, strides_ptr, items_ptr, s_ptr, factor, weight_ptr,
    minuend_ptr, minuend_offsets_ptr, minuend_strides_ptr, out_ptr, out_offsets_ptr,
    values_ptr, value_ptr, n_values,
    TRANSPOSED: tl.constexpr, VEC: tl.constexpr, MINUEND_VEC: tl.constexpr,
    S_VEC: tl.constexpr, OUT_VEC: tl.constexpr, WIDTH_VEC: tl.constexpr,
    ROWS_VEC: tl.constexpr, RANKS_VEC: tl.constexpr, VALUES: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """RANK combinations of a module's rows over COLUMNS columns, with S for coefficients.

    Item ``program_id(0)`` of a launch of the plan. Where there is a value to add up, the first
    program does that, and the items begin at the second. With a minuend, a row for each
    combination, these are subtracted from it.
    """
    item = tl.program_id(0).to(tl.int64)
    if value_ptr is not None:
        if item == 0:
            _add_values(values_ptr, value_ptr, n_values, VALUES)
            return
        item -= 1
    item_ptr = items_ptr + item * 10
    first = tl.load(item_ptr)
    rows = tl.load(item_ptr + 1).to(tl.int32)
    s_ptr += tl.multiple_of(tl.load(item_ptr + 2), S_VEC)
    s_stride = tl.multiple_of(tl.load(item_ptr + 3), S_VEC)
    ranks = tl.load(item_ptr + 4).to(tl.int32)
    begin = tl.multiple_of(tl.load(item_ptr + 5).to(tl.int32), COLUMNS)
    end = tl.multiple_of(tl.load(item_ptr + 6).to(tl.int32), WIDTH_VEC)
    rows = tl.multiple_of(rows, ROWS_VEC)
    ranks = tl.multiple_of(ranks, RANKS_VEC)
    rank = tl.arange(0, RANK)
    y = tl.zeros((COLUMNS, RANK), tl.float32)
    row = tl.arange(0, ROWS)
    for start in range(0, rows, ROWS):
        left = rows - tl.multiple_of(start, ROWS)
        offset, step = _rows(offsets_ptr, strides_ptr, first + start, left, ROWS, VEC)
        p = _tile(rows_ptr, offset, step, left, begin, end, COMPUTE, ROWS, COLUMNS)
        if TRANSPOSED:
            place = (start + row)[:, None] + rank[None, :] * s_stride
        else:
            place = (start + row)[:, None] * s_stride + rank[None, :]
        given = (row < left)[:, None] & (rank < ranks)[None, :]
        s = tl.load(s_ptr + place, mask=given, other=0.0)
        y = _accumulate(y, p, s, COMPUTE, PRECISION, PARTS)
    y = tl.trans(y)
    column = begin + tl.arange(0, COLUMNS)
    inside = (rank < ranks)[:, None] & (column < end)[None, :]
    out = tl.load(item_ptr + 7)
    if minuend_ptr is None:
        if weight_ptr is not None:
            factor *= tl.load(weight_ptr + tl.load(item_ptr + 9))
        y *= factor
        out_stride = tl.multiple_of(tl.load(item_ptr + 8), OUT_VEC)
        place = tl.multiple_of(out, OUT_VEC) + rank[:, None] * out_stride + column[None, :]
    else:
        offset, step = _rows(
            minuend_offsets_ptr, minuend_strides_ptr, out, ranks, RANK, MINUEND_VEC
        )
        y = _tile(minuend_ptr, offset, step, ranks, begin, end, tl.float32, RANK, COLUMNS) - y
        out_offset, _ = _rows(out_offsets_ptr, None, out, ranks, RANK, OUT_VEC)
        place = out_offset[:, None] + column[None, :]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)
