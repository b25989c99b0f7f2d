"""The row operators of orthogonality, called as they are, and the checks of what they write.

``kernels`` is whatever has them: the Triton launchers, or the CUDA code that runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from orthogonal_cases import array, eager, leaves, normal, oracle
from trimtab.testing import assert_same_bits, assert_within_budget

Nested = list[list[Tensor]]
Results = tuple[Tensor, list[Tensor], list[Tensor]]


def run_penalty(
    kernels: Any,
    previous: Sequence[Sequence[Tensor]],
    current: Sequence[Tensor],
    norm: str = "l1",
    weight: Sequence[float] | None = None,
    grads: tuple[bool, bool] = (True, True),
) -> Results:
    """Value, and the gradients cut into the shapes of ``current`` and of ``previous``."""
    flat, device = [t for tasks in previous for t in tasks], current[0].device
    value = torch.empty((), device=device)
    buffers = [
        torch.empty(sum(t.numel() for t in tensors), device=device) if wanted else None
        for tensors, wanted in zip((current, flat), grads, strict=True)
    ]
    kernels.orthogonal_penalty_rows(
        flat,
        [len(tasks) for tasks in previous],
        current,
        None if weight is None else torch.tensor(weight, device=device),
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


def check_exactly(
    run: Callable[..., Results],
    previous: Nested,
    current: list[Tensor],
    norm: str = "l1",
    **given: Any,
) -> None:
    """For small integers, whose products and sums are exact in every order."""
    value, to_current, to_previous = run(previous, current, norm, **given)
    truth = oracle(previous, current, norm, given.get("weight"))
    assert value.item() == torch.tensor(truth.value).float().item()
    expected = [*truth.current, *(g for tasks in truth.previous for g in tasks)]
    for found, exact in zip([*to_current, *to_previous], expected, strict=True):
        assert_same_bits(found.cpu(), torch.as_tensor(exact).float())


def check_within_float32(
    run: Callable[..., Results],
    previous: Nested,
    current: list[Tensor],
    norm: str,
    weight: Sequence[float],
) -> None:
    """Within the budget of float32, whatever the dtypes: their products are exact there."""
    truth = oracle(previous, current, norm, weight)
    plain_previous, plain_current = leaves(
        [[t.float() for t in tasks] for tasks in previous], [t.float() for t in current]
    )
    plain = eager(plain_previous, plain_current, norm, weight)
    plain.backward()
    value, to_current, to_previous = run(previous, current, norm, weight)
    assert_within_budget(value.cpu(), plain.detach().cpu(), torch.as_tensor(truth.value))
    sides = [*zip(to_current, plain_current, truth.current, truth.current_terms, strict=True)]
    flat = iter(to_previous)
    for m, tasks in enumerate(plain_previous):
        sides += [
            (next(flat), *three)
            for three in zip(tasks, truth.previous[m], truth.previous_terms[m], strict=True)
        ]
    for place, (found, leaf, exact, scale) in enumerate(sides):
        other = torch.zeros_like(found) if leaf.grad is None else leaf.grad
        exact = torch.as_tensor(exact)
        assert_within_budget(found.cpu(), other.cpu(), exact, name=str(place), scale=scale)
        assert float((found.cpu() - exact).norm()) <= 1e-5 * float(exact.norm())


def project(kernels: Any, tensors: list[Tensor], bases: list[Tensor]) -> list[Tensor]:
    outs = [t.new_empty(t.shape) for t in tensors]
    kernels.project_out_rows(tensors, bases, outs)
    return outs


PROJECTIONS = [(1, 1, 1), (3, 2, 7), (63, 3, 127), (5, 33, 252), (8, 16, 507), (0, 2, 4),
               (4, 0, 6), (2, 3, 0), (130, 70, 96), (2, 5, 1500)]  # fmt: skip


def pairs(
    dtype: torch.dtype, shapes: list = PROJECTIONS, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors, and orthonormal rows for each: no more of them than columns."""
    shapes = [(n, min(k, d), d) for n, k, d in shapes]
    tensors = [normal(n, d, dtype=dtype).to(device) for n, _, d in shapes]
    return tensors, [_basis(k, d).to(device, dtype) for _, k, d in shapes]


def _basis(k: int, d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q.mT.contiguous()


def truth_of(t: Tensor, q: Tensor) -> Tensor:
    return torch.as_tensor(array(t) - array(t) @ array(q).T @ array(q))


def in_room(tensor: Tensor, rows: int, columns: int, begin: int = 0) -> Tensor:
    """The values, in rows of a larger NaN-filled buffer with the given steps."""
    n, d = tensor.shape
    room = torch.full((begin + n * rows + d * columns + 1,), float("nan"), device=tensor.device)
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
