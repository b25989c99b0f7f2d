"""How the work is cut, and what the products are made in.

Worked out from register counts, sizes of memories and latencies; times on a GPU are not measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Slices that the second launch adds in one go, and elements of G that a program of it has.
SLICES, LANES = 16, 256
# Values that the last launch adds in one go.
VALUES = 1024

# A module alone should be enough for a few multiprocessors, not more: there are many modules.
_PROGRAMS = 64


class Tile(NamedTuple):
    """Shape of a program: rows x columns of one matrix at a time, with ``rank`` rows of another."""

    rows: int
    rank: int
    columns: int
    num_warps: int
    num_stages: int


class Arithmetic(NamedTuple):
    """What the products of a launch are made in: dtype, ``input_precision``, terms of each S."""

    compute: Any
    precision: str
    parts: int


def overlap_tile(rank: int, made_in: Arithmetic, *, wide: bool) -> Tile:
    """Shape of the programs that make G.

    Two of three stages of 18 to 24 KiB are on their way while the third is multiplied. Three or
    four programs fit on a multiprocessor: some 100 KiB in flight, where 4.3 TB/s times 700 ns over
    132 multiprocessors are 23. The sums run over columns, so that their number hangs on the dtype
    alone: no module's bits hang on the shapes of others. 64 rows and more go to the tensor cores of
    all GPUs in the same instructions.

    Args:
        rank: most current rows of a module; beyond 64 they are cut, and P is read for each cut.
        made_in: what the products are made in.
        wide: whether several elements are loaded at once. If not, each has an address in registers
            of its own, and the tile is small.
    """
    rank, columns = 16 if rank <= 16 else 64, 32 if made_in.compute == tl.float32 else 64
    if not wide:
        return Tile(64, rank, columns, 8, 1)
    return Tile(128, rank, columns, 4 if rank == 16 else 8, 3)


def combine_tile(rank: int, made_in: Arithmetic, *, wide: bool) -> Tile:
    """Shape of the programs that multiply by S.

    A tile of 16 KiB, all of it on its way at once; four programs on a multiprocessor, in bfloat16
    seven, hide each other's latency, so that there is one stage. The sums run over rows, of which
    there are 64 at a time whatever the shapes.

    Args:
        rank: most combinations of a module; beyond 64 they are cut, 32 in float32.
        made_in: what the products are made in.
        wide: whether several elements are loaded at once.
    """
    few, full = rank <= 16, made_in.compute == tl.float32
    rank = 16 if few else 32 if full else 64
    if not wide:
        return Tile(64, rank, 64, 8, 1)
    return Tile(64, rank, 64 if full else 128, 4 if few else 8, 1)


def slice_widths(
    rows: np.ndarray,  # (M,)
    ranks: np.ndarray,  # (M,)
    widths: np.ndarray,  # (M,)
    itemsize: int,
    tile: Tile,
) -> np.ndarray:  # (M,)
    """Columns of a slice of each module's d, multiples of the tile's, by the module's own shape.

    Few slices leave multiprocessors idle; with many, the parts of G, of 4 bytes for each row and
    rank, are much next to the slice of P that they are made from: they stay under 1/16 of it.
    """
    cuts = np.maximum(-(-rows // 128) * -(-ranks // 64), 1)
    least = np.maximum(64 * np.minimum(ranks, 64) // itemsize, 2 * tile.columns)
    slices = np.minimum(-(-widths // least), -(-_PROGRAMS // cuts))
    return -(-widths // np.maximum(slices, 1) // tile.columns) * tile.columns


def overlap_arithmetic(
    previous: torch.dtype, current: torch.dtype, *, compiled: bool
) -> Arithmetic:
    """Products of P and C, summed in float32.

    Those of 16-bit numbers are exact on tensor cores. Two different dtypes meet in TF32, which
    holds every 16-bit number; float32 is three products of TF32 halves ("tf32x3"), with a relative
    error near 2^-22. The float32 units ("ieee") would take longer than the memory: 2 R r d FLOP,
    with operands out of shared memory.
    """
    if torch.float32 in (previous, current):
        return Arithmetic(tl.float32, "tf32x3", 1)
    same = previous == current and _can_multiply(previous, compiled)
    return Arithmetic(TYPES[previous] if same else tl.float32, "tf32", 1)


def combine_arithmetic(
    dtype: torch.dtype, *, signs: bool, terms: int, compiled: bool
) -> Arithmetic:
    """Products of rows and S, summed in float32.

    Signs are exact in every dtype. Other S are float32: beside bfloat16 they are sums of ``terms``
    numbers of 8 bits, three of which hold all of it. float16 hasn't the range for that, and goes
    through TF32.
    """
    if dtype == torch.bfloat16:
        compute = TYPES[dtype] if _can_multiply(dtype, compiled) else tl.float32
        return Arithmetic(compute, "tf32", 1 if signs else terms)
    if dtype == torch.float16 and signs:
        return Arithmetic(TYPES[dtype], "tf32", 1)
    return Arithmetic(tl.float32, "tf32x3", 1)


def _can_multiply(dtype: torch.dtype, compiled: bool) -> bool:
    """The interpreter can load and store bfloat16, no more."""
    return compiled or dtype != torch.bfloat16
