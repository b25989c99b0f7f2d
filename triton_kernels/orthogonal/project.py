"""What is left of rows outside of a subspace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import on
from . import launch
from .table import plan_for


def project_out_rows(
    tensors: Sequence[Tensor],  # M times (n, d)
    bases: Sequence[Tensor],  # M times (k, d)
    outs: Sequence[Tensor],  # M times (n, d)
) -> None:
    """``t - (t Q^T) Q`` for each tensor and the orthonormal rows Q of its basis.

    Args:
        tensors: rows, of one dtype: float32, float16 or bfloat16; any strides.
        bases: orthonormal rows, of the same dtype; any strides.
        outs: written, rounded once; contiguous. ``t Q^T`` is float32 throughout, beside bfloat16 it
            enters the second product with 16 bits of its own.

    Cost: three launches, two where no d is cut into slices. ``tensors`` and ``bases`` are read
    twice; 4 bytes for each of the n k numbers of ``t Q^T`` are written and read.

    Raises:
        RuntimeError: the tensors are new while a CUDA graph is captured. Of ``outs`` only the
            distances count, so that parts of one new buffer will do.
    """
    plan = plan_for(bases, [1] * len(tensors), tensors, outs, signs=False)
    device = outs[0].device
    parts = torch.empty(plan.parts, dtype=torch.float32, device=device)
    with on(device):
        launch.overlap(plan, bases, tensors, parts)
        launch.reduce(plan, parts, True)
        launch.combine(
            plan,
            plan.to_current,
            bases,
            plan.previous,
            parts,
            outs[plan.outs.base],
            minuend=tensors[plan.current.base],
        )
