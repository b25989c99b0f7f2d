"""Where the rows are and which program does what, worked out in numpy from shapes and addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from . import config
from .config import Arithmetic, Tile


class Places(NamedTuple):
    """Where the tensors of a list are, and what they look like."""

    addresses: list[int]
    sizes: list[torch.Size]
    strides: list[tuple[int, ...]]


class Rows(NamedTuple):
    """The rows of a list of tensors, one after the other."""

    base: int  # the tensor from whose first element on elements are counted
    offsets: Any  # (rows,) int64, elements from there to each row
    steps: Any  # (rows,) int64, elements from column to column; None where it is 1 everywhere
    vec: int  # elements that can be loaded at once: along a row, or with steps across rows


class Launch(NamedTuple):
    """The programs of a launch."""

    tile: Tile
    made_in: Arithmetic
    items: Any  # (programs, fields) int64

    def without_items(self) -> Launch:
        """For a launch that only adds up values."""
        return self._replace(items=self.items[:0])


class Plan(NamedTuple):
    """What the launches of an operator need."""

    previous: Rows
    current: Rows
    outs: Rows | None
    overlap: Launch  # makes the parts of G
    reduce_items: Any  # (programs, 5) int64, to add them
    to_current: Launch  # combines previous rows, one combination for each current row
    to_previous: Launch | None  # the other way round
    parts: int  # elements of all parts of G
    width_vec: int  # a power of two that divides every d
    rank_vec: int  # one that divides every r


class _Sizes(NamedTuple):
    """Of each module."""

    rows: np.ndarray  # (M,) R
    ranks: np.ndarray  # (M,) r
    widths: np.ndarray  # (M,) d
    slice_widths: np.ndarray  # (M,)
    slices: np.ndarray  # (M,); 0 where G is empty or d is 0
    parts: np.ndarray  # (M,) first element of its parts of G


def make_plan(
    previous: Places,
    counts: Sequence[int],  # (M,)
    current: Places,
    outs: Places | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    signs: bool,
    to_previous: bool,
    compiled: bool,
) -> Plan:
    """The plan for M modules, of which ``counts[m]`` previous tensors belong to module m.

    Args:
        previous: tensors (R, d), module after module.
        counts: how many of them each module has.
        current: a tensor (r, d) for each module.
        outs: contiguous tensors like ``current``, where combinations are taken from these and the
            rest goes there; None where combinations go to one buffer, module after module.
        dtypes: of ``previous`` and ``current``.
        signs: whether S is the sign of G, and not G.
        to_previous: whether there are combinations for the previous rows, too.
        compiled: whether the kernels are, and not interpreted.
    """
    ranks, widths = np.array(current.sizes, np.int64).reshape(-1, 2).T
    owner, _ = _each(np.array(counts, np.int64))
    tasks = np.array(previous.sizes, np.int64).reshape(-1, 2)[:, 0]
    rows = np.bincount(owner, tasks, len(ranks)).astype(np.int64)
    width_vec = _alignment(16, widths)
    earlier, later = (
        _rows(places, dtype.itemsize)
        for places, dtype in zip((previous, current), dtypes, strict=True)
    )
    wide = [(p.vec if p.steps is not None else min(p.vec, width_vec)) > 1 for p in (earlier, later)]
    made_in = config.overlap_arithmetic(*dtypes, compiled=compiled)
    tile = config.overlap_tile(_most(ranks, compiled), made_in, wide=all(wide))
    slice_widths = config.slice_widths(rows, ranks, widths, dtypes[0].itemsize, tile)
    slices = np.where(rows * ranks > 0, -(-widths // np.maximum(slice_widths, 1)), 0)
    parts = slices * rows * ranks
    sizes = _Sizes(rows, ranks, widths, slice_widths, slices, _before(parts))

    def combine(side: int, combinations: np.ndarray) -> Launch:
        terms = 3 if outs is None else 2
        how = config.combine_arithmetic(dtypes[side], signs=signs, terms=terms, compiled=compiled)
        tile = config.combine_tile(_most(combinations, compiled), how, wide=wide[side])
        items = _combine_items(sizes, tile, transposed=side == 1, in_rows=outs is not None)
        return Launch(tile, how, items)

    return Plan(
        earlier,
        later,
        None if outs is None else _rows(outs, dtypes[1].itemsize),
        Launch(tile, made_in, _overlap_items(sizes, tile)),
        _reduce_items(sizes, at_least=1 if outs is None else 2),
        combine(0, ranks),
        combine(1, rows) if to_previous else None,
        int(parts.sum()),
        width_vec,
        _alignment(4, ranks),
    )


def _most(numbers: np.ndarray, compiled: bool) -> int:
    """The largest; for the interpreter as many as a tile can have.

    numpy adds the products of a matrix's last columns in another order than the others', so that a
    module's bits would hang on how wide the tile is.
    """
    return int(numbers.max()) if compiled else 64


def _each(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of ``counts[i]`` things for each i: whose each is, and its number there."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - _before(counts)[owner]


def _before(counts: np.ndarray) -> np.ndarray:
    """Sum of the counts before each."""
    return np.cumsum(counts) - counts


def _alignment(limit: int, *numbers: np.ndarray) -> int:
    """The largest power of two up to ``limit`` that divides all numbers."""
    bits = int(np.bitwise_or.reduce(np.concatenate([*numbers, np.array([limit])])))
    return bits & -bits


def _rows(places: Places, itemsize: int) -> Rows:
    rows, columns = np.array(places.sizes, np.int64).reshape(-1, 2).T
    row_steps, column_steps = np.array(places.strides, np.int64).reshape(-1, 2).T
    first = np.array(places.addresses, np.int64) // itemsize
    held = (rows > 0) & (columns > 0)
    base = int(np.argmax(held)) if len(held) else 0
    row_steps = np.where(held & (rows > 1), row_steps, 0)
    column_steps = np.where(held & (columns > 1), column_steps, 1)
    first = np.where(held, first, 0)
    owner, place = _each(rows)
    offsets = np.where(held, first - first[base : base + 1], 0)[owner] + place * row_steps[owner]
    if (column_steps == 1).all():
        return Rows(base, offsets, None, _alignment(16 // itemsize, first, row_steps))
    vec = 1
    if (row_steps[held] == 1).all():
        vec = _alignment(16 // itemsize, first, column_steps[held], rows[held])
    return Rows(base, offsets, column_steps[owner], vec)


def _overlap_items(sizes: _Sizes, tile: Tile) -> np.ndarray:
    """A block of G over a slice of d each.

    Fields: first previous row, number of rows; first current row, number of rows; first column,
    end of the slice; first element of the part, elements from row to row.
    """
    row_cuts, rank_cuts = -(-sizes.rows // tile.rows), -(-sizes.ranks // tile.rank)
    m, place = _each(sizes.slices * row_cuts * rank_cuts)
    place, rank = np.divmod(place, rank_cuts[m])
    piece, row = np.divmod(place, row_cuts[m])
    row, rank, column = row * tile.rows, rank * tile.rank, piece * sizes.slice_widths[m]
    rows, ranks = sizes.rows[m], sizes.ranks[m]
    fields = (
        _before(sizes.rows)[m] + row,
        np.minimum(tile.rows, rows - row),
        _before(sizes.ranks)[m] + rank,
        np.minimum(tile.rank, ranks - rank),
        column,
        np.minimum(column + sizes.slice_widths[m], sizes.widths[m]),
        sizes.parts[m] + (piece * rows + row) * ranks + rank,
        ranks,
    )
    return np.stack(fields, 1)


def _reduce_items(sizes: _Sizes, at_least: int) -> np.ndarray:
    """A piece of G each, of the modules with ``at_least`` so many slices.

    Fields: first element, number of elements, elements from part to part, number of parts, module.
    """
    elements = np.where(sizes.slices >= at_least, sizes.rows * sizes.ranks, 0)
    m, place = _each(-(-elements // config.LANES))
    begin = place * config.LANES
    fields = (
        sizes.parts[m] + begin,
        np.minimum(config.LANES, elements[m] - begin),
        elements[m],
        sizes.slices[m],
        m,
    )
    return np.stack(fields, 1)


def _combine_items(sizes: _Sizes, tile: Tile, *, transposed: bool, in_rows: bool) -> np.ndarray:
    """Some combinations of a module's rows over some columns each, the last module's first.

    Fields: first row, number of rows; first element of S, elements from row to row of G; number of
    combinations; first column, end of d; where the result goes: first element and elements from
    row to row, or first row (``in_rows``); module.
    """
    inner, outer = (sizes.ranks, sizes.rows) if transposed else (sizes.rows, sizes.ranks)
    cuts = -(-outer // tile.rank)
    m, place = _each(-(-sizes.widths // tile.columns) * cuts)
    m, place = m[::-1], place[::-1]
    piece, cut = np.divmod(place, cuts[m])
    first = cut * tile.rank
    widths, ranks = sizes.widths[m], sizes.ranks[m]
    begins = _before(outer)[m] if in_rows else _before(outer * sizes.widths)[m]
    fields = (
        _before(inner)[m],
        inner[m],
        sizes.parts[m] + first * (ranks if transposed else 1),
        ranks,
        np.minimum(tile.rank, outer[m] - first),
        piece * tile.columns,
        widths,
        begins + first * (1 if in_rows else widths),
        widths,
        m,
    )
    return np.stack(fields, 1)
