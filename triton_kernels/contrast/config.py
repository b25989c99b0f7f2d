"""How a program is shaped, and what every launch passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# Elements of a tile in each thread: two loads of 16 bytes from each float32 row, one of 16 bits.
_EACH = 8
# 512 threads of up to 128 registers fill a multiprocessor's register file.
_MAX_WARPS = 16
# A program sorts out this many candidates without going back to the row; two words of scratch each.
_CANDIDATES = 2048


class Config(NamedTuple):
    """Shape of a program: a tile has ``steps * lanes * vec`` elements, a lane for each thread."""

    steps: int
    lanes: int
    vec: int
    num_warps: int
    num_stages: int
    candidates: int


def launch_config(vocab: int, dtype: torch.dtype, *, aligned: bool) -> Config:
    """Program shape for rows of ``vocab`` logits.

    Worked out from register counts; times on a GPU are not measured.

    Args:
        vocab: length of a row.
        dtype: dtype of the logits.
        aligned: whether every row starts on 16 bytes; if not, elements are loaded one by one, and
            a thread still has two neighbours, which share their random bits.
    """
    vec = 16 // dtype.itemsize if aligned else 2
    wide = triton.next_power_of_2(triton.cdiv(max(vocab, 1), 32 * _EACH))
    num_warps = min(wide, _MAX_WARPS)
    candidates = min(_CANDIDATES, triton.next_power_of_2(max(vocab, 1)))
    # With every thread's loads in registers a second stage has nothing to hide.
    return Config(_EACH // vec, 32 * num_warps, vec, num_warps, 1, candidates)


def options(
    positive: Tensor,  # (B, V)
    others: Sequence[Tensor | None],  # each (., V)
    widest: torch.dtype | None = None,
) -> tuple[Config, dict[str, Any]]:
    """The program's shape, and the arguments that every kernel of this family takes by name.

    Args:
        positive: rows.
        others: every other matrix that the kernel reads or writes.
        widest: dtype of the widest of them; None for that of ``positive``.
    """
    vec = 16 // positive.itemsize
    aligned = all(
        rows.data_ptr() % 16 == 0 and rows.stride(0) % vec == 0
        for rows in (positive, *others)
        if rows is not None
    )
    config = launch_config(positive.shape[1], widest or positive.dtype, aligned=aligned)
    return config, {
        "V": positive.shape[1],
        "ALIGNMENT": config.vec if aligned else 1,
        "STEPS": config.steps,
        "LANES": config.lanes,
        "VEC": config.vec,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # The bits are those of operations rounded one by one.
        "enable_fp_fusion": False,
    }


def row_stride(rows: Tensor | None) -> int:
    """Elements from one row to the next; 0 where there are none."""
    return 0 if rows is None else rows.stride(0)
