"""What our tests and benchmarks, and those of packages built on ours, check results with.

The budget is never a number picked by hand: a kernel may be as far from the float64 truth as eager
PyTorch in the same dtype is, twice over, plus one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class BudgetError(AssertionError):
    """A result is further from the truth than its budget allows."""


def max_error(actual: Tensor, truth: Tensor) -> float:
    """Largest element-wise distance; equal infinities count as 0, a NaN on one side as infinity."""
    actual, truth = actual.detach().double(), truth.detach().double()
    if actual.shape != truth.shape:
        raise BudgetError(f"shape {tuple(actual.shape)} where the truth has {tuple(truth.shape)}")
    if actual.numel() == 0:
        return 0.0
    agree = (actual == truth) | (actual.isnan() & truth.isnan())
    distance = (actual - truth).abs().masked_fill(agree, 0.0)
    return float(distance.nan_to_num(nan=float("inf")).max())


def error_budget(eager: Tensor, truth: Tensor, dtype: torch.dtype, scale: float = 0.0) -> float:
    """``2 * error(eager) + eps(dtype) * magnitude``.

    Args:
        eager: eager PyTorch's result in the dtype under test.
        truth: the same in float64.
        dtype: the dtype whose rounding is granted once.
        scale: magnitude of the terms that were summed, where their sum may cancel; the truth's own
            magnitude is used if larger.
    """
    finite = truth.detach().double()
    finite = finite[finite.isfinite()].abs()
    magnitude = max(scale, float(finite.max()) if finite.numel() else 0.0)
    return 2.0 * max_error(eager, truth) + torch.finfo(dtype).eps * magnitude


def assert_within_budget(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    name: str = "result",
    dtype: torch.dtype | None = None,
    scale: float = 0.0,
) -> None:
    """Raise ``BudgetError``, naming the worst element, if ``actual`` is over its budget."""
    error = max_error(actual, truth)
    budget = error_budget(eager, truth, dtype or actual.dtype, scale)
    if error <= budget:
        return
    distance = (
        (actual.detach().double() - truth.detach().double()).abs().nan_to_num(nan=float("inf"))
    )
    index = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
    raise BudgetError(
        f"{name}: error {error:.3e} is over the budget {budget:.3e}; worst at {index}: "
        f"{actual[index].item()!r}, eager {eager[index].item()!r}, truth {truth[index].item()!r}"
    )


def assert_same_bits(actual: Tensor, expected: Tensor, *, name: str = "result") -> None:
    """Raise if two tensors differ in a bit, aside from a zero's sign and NaNs in one place."""
    if not torch.equal(actual.isnan(), expected.isnan()) or not torch.equal(
        actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    ):
        raise AssertionError(f"{name}: bits differ, by {max_error(actual, expected):.3e} at most")


def values_and_grads(
    function: Callable[..., Tensor | Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    upstream: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Outputs of ``function(*tensors)`` and the gradients of its floating outputs for all tensors.

    Args:
        function: what is under test.
        tensors: its differentiable inputs; fresh leaves are made of them, None is passed on.
        upstream: makes the upstream gradient of an output; by default ``uneven``, since a kernel
            that reads it as a scalar passes anything else.
    """
    leaves = [
        None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors
    ]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    make = upstream or uneven
    torch.autograd.backward([out for out in outputs if out.requires_grad],
                            [make(out) for out in outputs if out.requires_grad])  # fmt: skip
    grads = [leaf.grad for leaf in leaves if leaf is not None]
    return [*(out.detach() for out in outputs), *(grad for grad in grads if grad is not None)]


def uneven(output: Tensor) -> Tensor:
    """An upstream gradient that begins with 0, changes sign and has no two equal values.

    A scalar gets 0.37: the code that a gradient of 1 skips has to run.
    """
    if output.numel() == 1:
        return torch.full_like(output, 0.37)
    steps = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
    return (steps * torch.cos(steps) / output.numel()).reshape(output.shape).to(output.dtype)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New uninitialised floating tensors hold NaN within it, so that what nobody writes shows."""
    originals: dict[tuple[Any, str], Any] = {
        (torch, "empty"): torch.empty,
        (torch, "empty_like"): torch.empty_like,
        (Tensor, "new_empty"): Tensor.new_empty,
    }

    def poison(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor = original(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return filled

    for (owner, name), original in originals.items():
        setattr(owner, name, poison(original))
    try:
        yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
