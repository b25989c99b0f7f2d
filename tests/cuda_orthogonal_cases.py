"""Calls of the CUDA kernels of orthogonality, rows of all layouts, and the checks of results.

Run as a script, this file does what the sanitised build has to survive.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cuda_on_cpu import library
from orthogonal_cases import ODD, array, integers, modules, normal, oracle
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
Nested = list[list[Tensor]]


def rows(sanitize: bool = False) -> Any:
    return library.load("orthogonal", sanitize)


def run(
    previous: Sequence[Sequence[Tensor]],
    current: Sequence[Tensor],
    norm: str = "l1",
    weight: Sequence[float] | None = None,
    grads: tuple[bool, bool] = (True, True),
    kernels: Any = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Value, and the gradients cut into the shapes of ``current`` and of ``previous``."""
    flat = [t for tasks in previous for t in tasks]
    value = torch.empty(())
    buffers = [
        torch.empty(sum(t.numel() for t in tensors)) if wanted else None
        for tensors, wanted in zip((current, flat), grads, strict=True)
    ]
    (kernels or rows()).orthogonal_penalty_rows(
        flat,
        [len(tasks) for tasks in previous],
        current,
        None if weight is None else torch.tensor(weight),
        norm == "frobenius2",
        value,
        *buffers,
    )
    return value, cut(buffers[0], current), cut(buffers[1], flat)


def cut(buffer: Tensor | None, tensors: Sequence[Tensor]) -> list[Tensor]:
    if buffer is None:
        return []
    parts = buffer.split([t.numel() for t in tensors]) if tensors else []
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def assert_same(ones: Any, others: Any) -> None:
    """Values and lists of gradients, bit for bit."""
    assert_same_bits(ones[0], others[0])
    for side, other in zip(ones[1:], others[1:], strict=True):
        for one, two in zip(side, other, strict=True):
            assert_same_bits(one, two)


def check_exactly(previous: Nested, current: list[Tensor], norm: str = "l1", **given: Any) -> None:
    """For small integers, whose products and sums are exact in every order."""
    value, to_current, to_previous = run(previous, current, norm, **given)
    truth = oracle(previous, current, norm, given.get("weight"))
    assert value == torch.tensor(truth.value).float()
    expected = [*truth.current, *(g for tasks in truth.previous for g in tasks)]
    for found, exact in zip([*to_current, *to_previous], expected, strict=True):
        assert_same_bits(found, torch.as_tensor(exact).float())


def project(tensors: list[Tensor], bases: list[Tensor], kernels: Any = None) -> list[Tensor]:
    outs = [torch.empty(t.shape, dtype=t.dtype) for t in tensors]
    (kernels or rows()).project_out_rows(tensors, bases, outs)
    return outs


def in_room(tensor: Tensor, rows: int, columns: int, begin: int = 0) -> Tensor:
    """The values, in rows of a larger NaN-filled buffer with the given steps."""
    n, d = tensor.shape
    room = torch.full((begin + n * rows + d * columns + 1,), float("nan"))
    view = room.to(tensor.dtype).as_strided((n, d), (rows, columns), begin)
    return view.copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "padded": lambda t: in_room(t, t.shape[1] + 8, 1),
    "odd stride": lambda t: in_room(t, t.shape[1] + 1, 1),
    "late start": lambda t: in_room(t, t.shape[1], 1, begin=1),
    "every other column": lambda t: in_room(t, 2 * t.shape[1], 2),
    "transposed and padded": lambda t: in_room(t, 1, t.shape[0] + 8),
    "one row": lambda t: t[:1].expand(t.shape),
    "one column": lambda t: t[:, :1].expand(t.shape),
    "one element": lambda t: t[:1, :1].expand(t.shape),
}


PROJECTIONS = [(1, 1, 1), (3, 2, 7), (63, 3, 127), (5, 33, 252), (8, 16, 507), (0, 2, 4),
               (4, 0, 6), (2, 3, 0), (130, 70, 96), (2, 5, 1500)]  # fmt: skip


def basis(k: int, d: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q.mT.contiguous().to(dtype)


def pairs(dtype: torch.dtype, shapes: list = PROJECTIONS) -> tuple[list[Tensor], list[Tensor]]:
    """Bases have no more rows than columns."""
    shapes = [(n, min(k, d), d) for n, k, d in shapes]
    return ([normal(n, d, dtype=dtype) for n, _, d in shapes],
            [basis(k, d, dtype) for _, k, d in shapes])  # fmt: skip


def truth_of(t: Tensor, q: Tensor) -> Tensor:
    return torch.as_tensor(array(t) - array(t) @ array(q).T @ array(q))


def under_the_sanitiser() -> None:
    """Everything once, from tensors with nothing behind their last element."""
    kernels = rows(sanitize=True)
    shapes = [*ODD[:6], ((130,), 10, 70), ((20,), 2, 1700)]
    for facts in (DEVICES["H200"], DEVICES["A100"]):
        for dtype in DTYPES:
            with library.device(**facts):
                previous, current = modules(shapes, integers, previous=dtype, current=dtype)
                previous = [[t.mT.contiguous().mT for t in tasks] for tasks in previous[:1]] + (
                    previous[1:]
                )
                check_exactly(previous, current, "frobenius2", kernels=kernels)
                project(*pairs(dtype, [(63, 3, 127), (5, 33, 252), (3, 2, 7)]), kernels=kernels)


if __name__ == "__main__":
    under_the_sanitiser()
    sys.stdout.write("right\n")
