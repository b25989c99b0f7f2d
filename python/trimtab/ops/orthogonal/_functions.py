"""The operators that every implementation sits behind, and autograd around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab._schemas import result_dtype
from trimtab.ops._autograd import (
    aliases,
    graph_is_kept,
    through_reference,
    wants_double_backward,
)
from trimtab.ops._checks import bad
from trimtab.reference import orthogonal as reference


def row_kernels(impl: str) -> Any:
    """The namespace that holds the row operators of an implementation."""
    if impl == "native":
        return torch.ops.trimtab
    if impl != "triton":
        raise bad("impl", "'native' or 'triton' for an operator", repr(impl), "call the function")
    from trimtab.triton_kernels import orthogonal

    return orthogonal


def split_like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous blocks of the tensors' shapes, one after the other."""
    shapes = {t.shape for t in tensors}
    if len(shapes) == 1:  # one operator in place of two for each tensor
        return list(flat.view(len(tensors), *shapes.pop()).unbind())
    parts = torch.split(flat, [t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


@torch.library.impl("trimtab::orthogonal_penalty", "CompositeExplicitAutograd")
def _orthogonal_penalty(
    previous: list[Tensor],
    counts: list[int],
    current: list[Tensor],
    weight: Tensor | None,
    squared: bool,
    needs_grad: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    like, dtype = current[0], result_dtype(current[0].dtype)
    value = like.new_empty((), dtype=dtype)
    grads = [
        like.new_empty(sum(t.numel() for t in tensors), dtype=dtype) if need else None
        for tensors, need in zip((current, previous), needs_grad, strict=True)
    ]
    row_kernels(impl).orthogonal_penalty_rows(
        previous, counts, current, weight, squared, value, *grads
    )
    return (value, *(like.new_empty(0, dtype=dtype) if g is None else g for g in grads))  # type: ignore[return-value]


@torch.library.impl("trimtab::project_out", "CompositeExplicitAutograd")
def _project_out(tensors: list[Tensor], bases: list[Tensor], impl: str) -> Tensor:
    # One buffer: CUDA graphs find outputs at the same distances when they are captured.
    flat = tensors[0].new_empty(sum(t.numel() for t in tensors))
    row_kernels(impl).project_out_rows(tensors, bases, split_like(flat, tensors))
    return flat


class OrthogonalPenalty(torch.autograd.Function):
    """The penalty; its gradients come out of the same pass as its value."""

    @staticmethod
    def forward(
        ctx: Any,
        counts: list[int],
        weight: Tensor | None,
        squared: bool,
        needs: tuple[bool, bool],
        impl: str,
        *tensors: Tensor,  # current, then previous
    ) -> Tensor:
        """One read of ``previous``."""
        current, previous = tensors[: len(counts)], tensors[len(counts) :]
        value, grad_current, grad_previous = torch.ops.trimtab.orthogonal_penalty.default(
            previous, counts, current, weight, squared, needs, impl
        )
        ctx.save_for_backward(grad_current, grad_previous, weight, *tensors)
        ctx.counts, ctx.squared = counts, squared
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """One product with ``upstream`` for each side, rounded once to the side's dtype."""
        grad_current, grad_previous, weight, *tensors = ctx.saved_tensors
        current, previous = tensors[: len(ctx.counts)], tensors[len(ctx.counts) :]
        needs = ctx.needs_input_grad[5:]
        if wants_double_backward():
            tensors = aliases(*tensors)
            current, previous = tensors[: len(ctx.counts)], tensors[len(ctx.counts) :]
            value = reference.orthogonal_penalty(previous, ctx.counts, current, weight, ctx.squared)
            return (*[None] * 5, *through_reference(value, tuple(tensors), needs, upstream))
        blocks = (*_blocks(grad_current, current, upstream),
                  *_blocks(grad_previous, previous, upstream))  # fmt: skip
        return (*[None] * 5, *(b if need else None for b, need in zip(blocks, needs, strict=True)))


def _blocks(flat: Tensor, tensors: list[Tensor], upstream: Tensor) -> Iterator[Tensor | None]:
    """``upstream * flat``, cut into the gradients of the tensors; None where it was not made."""
    if not tensors or flat.numel() == 0:
        yield from (None if t.numel() else torch.zeros_like(t) for t in tensors)
        return
    yield from split_like(_scaled(flat, upstream, tensors[0].dtype), tensors)


def _scaled(flat: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """``upstream * flat``, rounded once; in place where nothing needs ``flat`` again."""
    if graph_is_kept() or (flat.dtype != dtype and flat.device.type != "cpu"):
        return torch.mul(flat, upstream, out=flat.new_empty(flat.shape, dtype=dtype))
    # Fresh memory would cost a CPU more than the product.
    return flat.mul_(upstream).to(dtype)


class ProjectOut(torch.autograd.Function):
    """The projection of tensors by bases without gradient, which is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, count: int, impl: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Two products for each tensor."""
        rows, bases = list(tensors[:count]), list(tensors[count:])
        ctx.save_for_backward(*tensors)
        ctx.count, ctx.impl = count, impl
        return tuple(split_like(torch.ops.trimtab.project_out.default(rows, bases, impl), rows))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        """Two products for each tensor."""
        rows, bases = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        if wants_double_backward():
            found = reference.project_out(upstream, bases)
        else:
            grads = [g.to(t.dtype) for g, t in zip(upstream, rows, strict=True)]
            flat = torch.ops.trimtab.project_out.default(grads, bases, ctx.impl)
            found = split_like(flat, rows)
        return (None, None, *found, *[None] * len(bases))
