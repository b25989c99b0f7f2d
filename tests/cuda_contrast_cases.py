"""Calls of the CUDA row operators of contrast, and rows for them.

Run as a script, this file does what the sanitised build has to survive.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from contrast_cases import rows
from cuda_on_cpu import library
from cuda_token_loss_cases import empty

IGNORED = -100
INF = math.inf
PerRow = float | Tensor


@functools.cache
def kernels() -> SimpleNamespace:
    return library.load("contrast", sanitize=__name__ == "__main__")


def pair(value: PerRow) -> tuple[float, Tensor | None]:
    """A number, and the numbers of the rows, which win over it."""
    return (math.nan, value) if isinstance(value, Tensor) else (value, None)


def run_logits(
    positive: Tensor,
    negative: Tensor | None,
    anchor: Tensor | None = None,
    alpha: PerRow = 0.5,
    log_beta: PerRow = -INF,
    out: Tensor | None = None,
    ops: Any = None,
) -> Tensor:
    out = empty(positive.float()) if out is None else out
    (ops or kernels()).contrastive_logits_rows(
        positive, negative, anchor, *pair(alpha), *pair(log_beta), out
    )
    return out


def run_logp(
    positive: Tensor,
    negative: Tensor,
    target: Tensor,
    anchor: Tensor | None = None,
    alpha: PerRow = 0.5,
    temperature: PerRow = 0.7,
    ignore_index: int = IGNORED,
    ops: Any = None,
) -> Tensor:
    logp = torch.full(target.shape, math.nan)
    (ops or kernels()).contrastive_logp_rows(
        positive, negative, anchor, target, *pair(alpha), *pair(temperature), ignore_index, logp
    )
    return logp


def run_backward(
    positive: Tensor,
    negative: Tensor,
    target: Tensor,
    anchor: Tensor | None = None,
    alpha: PerRow = 0.5,
    temperature: PerRow = 0.7,
    grads: list[Tensor | None] | None = None,  # of positive, negative, anchor
    upstream: Tensor | None = None,  # (B,)
    ignore_index: int = IGNORED,
    ops: Any = None,
) -> list[Tensor | None]:
    if grads is None:
        grads = [t if t is None else empty(t) for t in (positive, negative, anchor)]
    upstream = torch.linspace(-1.5, 2.0, len(target)) if upstream is None else upstream
    (ops or kernels()).contrastive_logp_rows_backward(
        positive, negative, anchor, target, *pair(alpha), *pair(temperature), ignore_index,
        upstream,
        *grads,
    )  # fmt: skip
    return grads


def run_all(
    positive: Tensor,
    negative: Tensor,
    target: Tensor,
    anchor: Tensor | None = None,
    alpha: PerRow = 0.5,
    temperature: PerRow = 0.7,
    log_beta: PerRow = -1.0,
    ops: Any = None,
) -> list[Tensor]:
    """Results of all three operators: logits without and with a mask, logp, gradients."""
    given = positive, negative
    of_target = *given, target, anchor, alpha, temperature
    grads = run_backward(*of_target, ops=ops)
    return [
        run_logits(*given, anchor, alpha, ops=ops),
        run_logits(*given, anchor, alpha, log_beta, ops=ops),
        run_logp(*of_target, ops=ops),
        *(grad for grad in grads if grad is not None),
    ]


def visit_every_edge() -> None:
    """Rows that end where their memory does, in every layout."""
    for dtype in (torch.float32, torch.bfloat16):
        for classes in (0, 1, 7, 8, 127, 256, 507):
            given = rows(3, max(classes, 1), dtype)
            for places in ((0, 0, 0), (1, 1, 1), (0, 1, 2)):
                logits = []
                for values, offset in zip(given.logits(dtype), places, strict=True):
                    stride = classes + offset
                    memory = torch.zeros(offset + 2 * stride + classes, dtype=dtype)
                    logits.append(memory.as_strided((3, classes), (stride, 1), offset))
                    logits[-1].copy_(values[:, :classes])
                positive, negative, anchor = logits
                run_all(positive, negative, given.target, anchor)
                run_all(positive, negative, given.target)
                run_backward(positive, negative, given.target, anchor, grads=logits)


if __name__ == "__main__":
    visit_every_edge()
