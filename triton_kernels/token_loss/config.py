"""How a program is shaped, and what every launch passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..common import capability

# L2 bytes for each multiprocessor, by major capability: A100, H100 and H200, B200.
_L2_SHARE = {8: 40 * 2**20 // 108, 9: 50 * 2**20 // 132, 10: 126 * 2**20 // 148}


class Config(NamedTuple):
    """Shape of a program: a tile has ``steps * lanes * vec`` elements, a lane for each thread."""

    steps: int
    lanes: int
    vec: int
    num_warps: int
    num_stages: int


def launch_config(
    vocab: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    rereads: bool,
    aligned: bool,
) -> Config:
    """Program shape for rows of ``vocab`` logits.

    A thread has two 16-byte loads in flight; with four, some kernels spill at 1,024 threads. A row
    that is read twice should still be in L2 at the second read, so long rows get wider programs:
    about 1,024 threads fit on a multiprocessor, and the wider a program, the fewer rows are under
    way. Worked out from register counts and cache sizes; times on a GPU are not measured.

    Args:
        vocab: length of a row.
        dtype: dtype of the logits.
        capability: compute capability, for the size of L2.
        rereads: whether the row is read a second time.
        aligned: whether every row starts on 16 bytes; if not, elements are loaded one by one.
    """
    row_bytes = vocab * dtype.itemsize
    vec = 16 // dtype.itemsize
    enough = triton.next_power_of_2(triton.cdiv(row_bytes, 32 * 2 * 16))
    num_warps = min(enough, 8)
    if rereads:
        share = _L2_SHARE.get(capability[0], _L2_SHARE[9]) * 2 // 3
        wide = triton.next_power_of_2(triton.cdiv(32 * row_bytes, share))
        num_warps = min(enough, 32, max(num_warps, wide))
    steps, vec = (2, vec) if aligned else (8, 1)
    # A second stage would go through shared memory; with every thread's loads in registers there
    # is nothing for it to hide.
    return Config(steps, 32 * num_warps, vec, num_warps, num_stages=1)


def options(
    logits: Tensor,  # (N, V)
    grad: Tensor | None,  # (N, V)
    logit_scale: float,
    softcap: float,
) -> dict[str, Any]:
    """The arguments that every kernel of this family takes by name."""
    vec = 16 // logits.itemsize
    config = launch_config(
        logits.shape[1],
        logits.dtype,
        capability(logits.device),
        rereads=grad is not None,
        aligned=all(
            rows.data_ptr() % 16 == 0 and rows.stride(0) % vec == 0
            for rows in (logits, grad)
            if rows is not None
        ),
    )
    return {
        "V": logits.shape[1],
        # z = scale * tanh(slope * raw), or scale * raw. Triton would type an int by its value.
        "slope": float(logit_scale / softcap if softcap > 0.0 else 1.0),
        "scale": float(softcap if softcap > 0.0 else logit_scale),
        "HAS_SOFTCAP": softcap > 0.0,
        "STEPS": config.steps,
        "LANES": config.lanes,
        "VEC": config.vec,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Only an `fma` that is written is fused: the bits don't hang on Triton's default.
        "enable_fp_fusion": False,
    }
