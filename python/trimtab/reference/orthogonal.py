"""Orthogonality in eager PyTorch: the oracle. Any floating dtype, any device, twice differentiable.

For every module with the earlier tasks' rows P (R, d) and the new task's rows C (r, d)::

    G       = P C^T
    penalty = sum over modules of w sum |G|       norm "l1": the released O-LoRA code
    penalty = sum over modules of w sum G**2      norm "frobenius2": the paper's equation 8

in float32 (float64 for float64 tensors), whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab._schemas import result_dtype


def orthogonal_penalty(
    previous: Sequence[Tensor],  # each (R, d), module after module
    counts: Sequence[int],  # (M,), how many of `previous` belong to each module
    current: Sequence[Tensor],  # M times (r, d)
    weight: Tensor | None,  # (M,)
    squared: bool,
) -> Tensor:  # ()
    """The penalty of all modules; exactly 0 where nothing is previous."""
    real, device = result_dtype(current[0].dtype), current[0].device
    total = torch.zeros((), dtype=real, device=device)
    rest = iter(previous)
    with torch.autocast(device.type, enabled=False):
        for m, (count, c) in enumerate(zip(counts, current, strict=True)):
            # Widened once: the tasks' gradients meet in float32 and are rounded together.
            wide = c.to(real)
            # A sum over nothing: a module without earlier tasks has gradient 0, not none.
            total = total + wide[:0].sum()
            for p in (next(rest) for _ in range(count)):
                gram = p.to(real) @ wide.mT
                size = (gram.square() if squared else gram.abs()).sum()
                total = total + (size if weight is None else weight[m] * size)
    return total


def project_out(
    tensors: Sequence[Tensor],  # each (n, d)
    bases: Sequence[Tensor],  # each (k, d)
) -> list[Tensor]:
    """``t - (t Q^T) Q`` for each tensor and its orthonormal rows, rounded once to its dtype."""
    found = []
    for t, basis in zip(tensors, bases, strict=True):
        with torch.autocast(t.device.type, enabled=False):
            real = result_dtype(t.dtype)
            wide, q = t.to(real), basis.to(real)
            found.append((wide - (wide @ q.mT) @ q).to(t.dtype))
    return found
