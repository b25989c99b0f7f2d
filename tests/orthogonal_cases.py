"""What the tests of the orthogonal operators share: modules of all shapes, and an oracle.

The oracle is numpy in float64 and shares no line with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.testing import assert_within_budget

# (rows of each earlier task, r, d) of one module.
ODD = [
    ((3, 1), 2, 7), ((1,), 1, 1), ((63, 127), 3, 252), ((17,), 16, 507), ((8, 8, 8), 9, 128),
    ((), 4, 33), ((0, 5), 3, 3), ((112,), 8, 64), ((2,), 0, 5), ((5, 2), 33, 127),
]  # fmt: skip


class Answer(NamedTuple):
    """The penalty and its gradients, and the magnitudes of the terms that these are sums of."""

    value: np.ndarray  # ()
    current: list[np.ndarray]
    previous: list[list[np.ndarray]]
    current_terms: list[float]
    previous_terms: list[list[float]]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of -2 to 2: products and their sums are exact in every dtype that sums in float32."""
    return torch.randint(-2, 3, shape).to(dtype)


def modules(shapes=ODD, make=normal, device="cpu", previous=torch.float32, current=torch.float32):
    """(previous, current) as the operator takes them."""
    earlier = [[make(R, d, dtype=previous).to(device) for R in tasks] for tasks, _, d in shapes]
    return earlier, [make(r, d, dtype=current).to(device) for _, r, d in shapes]


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def oracle(
    previous: Sequence[Sequence[Tensor]],
    current: Sequence[Tensor],
    norm: str = "l1",
    weight: Sequence[float] | None = None,
    upstream: float = 1.0,
) -> Answer:
    value, to_current, to_previous = 0.0, [], []
    terms: tuple[list, list] = [], []
    for m, (tasks, new) in enumerate(zip(previous, current, strict=True)):
        c, factor = array(new), 1.0 if weight is None else float(weight[m])
        grad, others, size, sizes = np.zeros_like(c), [], np.zeros_like(c), []
        for task in tasks:
            p = array(task)
            g = np.einsum("id,jd->ij", p, c)
            slope = factor * (np.sign(g) if norm == "l1" else 2.0 * g)
            value += factor * float((np.abs(g) if norm == "l1" else g * g).sum())
            grad = grad + upstream * np.einsum("ij,id->jd", slope, p)
            others.append(upstream * np.einsum("ij,jd->id", slope, c))
            near = 2.0 * np.abs(p) @ np.abs(c).T if norm != "l1" else np.abs(np.sign(g))
            near = abs(upstream * factor) * near
            size = size + near.T @ np.abs(p)
            sizes.append(float((near @ np.abs(c)).max(initial=0.0)))
        to_current.append(grad)
        to_previous.append(others)
        terms[0].append(float(size.max(initial=0.0)))
        terms[1].append(sizes)
    return Answer(np.array(value), to_current, to_previous, *terms)


def smallest_product(previous: Sequence[Sequence[Tensor]], current: Sequence[Tensor]) -> float:
    """The smallest |G| over that of its terms: the sign of what is near 0 hangs on the rounding."""
    smallest = np.inf
    for tasks, new in zip(previous, current, strict=True):
        for task in tasks:
            p, c = array(task), array(new)
            if p.size and c.size:
                smallest = min(smallest, (np.abs(p @ c.T) / (np.abs(p) @ np.abs(c).T)).min())
    return float(smallest)


def eager(previous, current, norm="l1", weight=None) -> Tensor:
    """What a user writes, in the dtype of the tensors."""
    total = torch.zeros((), device=current[0].device)
    for m, (tasks, new) in enumerate(zip(previous, current, strict=True)):
        for task in tasks:
            common = torch.promote_types(task.dtype, new.dtype)
            g = task.to(common) @ new.to(common).mT
            size = g.abs().sum() if norm == "l1" else g.square().sum()
            total = total + (size if weight is None else weight[m] * size)
    return total


def leaves(previous, current):
    """Fresh leaves of the same values."""
    earlier = [[t.detach().clone().requires_grad_() for t in tasks] for tasks in previous]
    return earlier, [t.detach().clone().requires_grad_() for t in current]


def check_penalty(function, previous, current, norm="l1", weight=None, upstream=0.37) -> None:
    """Value and all gradients of ``function(previous, current)`` within the budget."""
    truth = oracle(previous, current, norm, weight, upstream)
    plain_previous, plain_current = leaves(previous, current)
    plain = eager(plain_previous, plain_current, norm, weight)
    if plain.requires_grad:
        plain.backward(torch.full_like(plain, upstream))
    ours_previous, ours_current = leaves(previous, current)
    ours = function(ours_previous, ours_current)
    assert ours.shape == ()
    ours.backward(torch.full_like(ours, upstream))
    total = torch.as_tensor(truth.value)
    assert_within_budget(ours.detach().cpu(), plain.detach().cpu(), total, name="value")
    flat = [
        (f"current[{m}]", *four)
        for m, four in enumerate(
            zip(ours_current, plain_current, truth.current, truth.current_terms, strict=True)
        )
    ]
    for m in range(len(previous)):
        sides = (ours_previous[m], plain_previous[m], truth.previous[m], truth.previous_terms[m])
        flat += [(f"previous[{m}][{t}]", *s) for t, s in enumerate(zip(*sides, strict=True))]
    for name, leaf, other, exact, scale in flat:
        assert leaf.grad.dtype == leaf.dtype
        found = torch.zeros_like(leaf) if other.grad is None else other.grad
        assert_within_budget(
            leaf.grad.cpu(), found.cpu(), torch.as_tensor(exact), name=name, scale=scale
        )
