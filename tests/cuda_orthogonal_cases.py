"""The CUDA kernels of orthogonality, the GPUs that are played for them, and calls of them.

Run as a script, this file does what the sanitised build has to survive.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

import orthogonal_rows
from cuda_on_cpu import library
from orthogonal_cases import ODD, integers, modules
from orthogonal_rows import Results, pairs, run_penalty
from trimtab.testing import assert_same_bits

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
DTYPES = (SINGLE, HALF, BRAIN)
# On the second no blocks share memory; the third, a small Blackwell, has less of it.
DEVICES: dict[str, dict[str, int]] = {
    "H200": {},
    "A100": {"major": 8, "multiprocessors": 108, "shared_per_block": 163 << 10,
             "shared_per_multiprocessor": 164 << 10},
    "RTX": {"major": 12, "shared_per_block": 99 << 10, "shared_per_multiprocessor": 100 << 10},
}  # fmt: skip


def kernels(sanitize: bool = False) -> Any:
    return library.load("orthogonal", sanitize)


def run(*given: Any, **more: Any) -> Results:
    return run_penalty(kernels(), *given, **more)


def check_exactly(*given: Any, **more: Any) -> None:
    orthogonal_rows.check_exactly(run, *given, **more)


def project(tensors: list[Tensor], bases: list[Tensor]) -> list[Tensor]:
    return orthogonal_rows.project(kernels(), tensors, bases)


def assert_same(ones: Any, others: Any) -> None:
    """Values and lists of gradients, bit for bit."""
    assert_same_bits(ones[0], others[0])
    for side, other in zip(ones[1:], others[1:], strict=True):
        for one, two in zip(side, other, strict=True):
            assert_same_bits(one, two)


def under_the_sanitiser() -> None:
    """Everything once, from tensors with nothing behind their last element."""
    sanitised = kernels(sanitize=True)
    exactly = partial(orthogonal_rows.check_exactly, partial(run_penalty, sanitised))
    shapes = [*ODD[:6], ((130,), 10, 70), ((20,), 2, 1700)]
    for facts in (DEVICES["H200"], DEVICES["A100"]):
        for dtype in DTYPES:
            with library.device(**facts):
                previous, current = modules(shapes, integers, previous=dtype, current=dtype)
                previous = [[t.mT.contiguous().mT for t in tasks] for tasks in previous[:1]] + (
                    previous[1:]
                )
                exactly(previous, current, "frobenius2")
                given = pairs(dtype, [(63, 3, 127), (5, 33, 252), (3, 2, 7)])
                orthogonal_rows.project(sanitised, *given)


if __name__ == "__main__":
    under_the_sanitiser()
    sys.stdout.write("right\n")
