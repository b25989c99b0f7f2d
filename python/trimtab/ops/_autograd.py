"""What the autograd functions of every family share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def needs_grad(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of them autograd wants a gradient for."""
    grad = torch.is_grad_enabled()
    return tuple(grad and tensor is not None and tensor.requires_grad for tensor in tensors)


def graph_is_kept() -> bool:
    """Whether backward may run again, so that what was saved must survive it."""
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()


def wants_double_backward() -> bool:
    """Whether this backward is itself differentiated (``create_graph=True``)."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled()


def aliases(*tensors: Any) -> tuple[Any, ...]:
    """The tensors, or None, under new names, for a backward that is itself differentiated.

    Where one input was made of another, gradients of the originals would also run from the one to
    the other, a way that the engine goes by itself.
    """
    return tuple(t.view_as(t) if t is not None and t.requires_grad else t for t in tensors)


def through_reference(
    outputs: Any, inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...], upstream: Any
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, from the oracle, at eager cost.

    ``outputs`` are made of ``inputs``, which are ``aliases`` of what was given.
    """
    wanted = [
        tensor for tensor, need in zip(inputs, needs, strict=True) if need and tensor is not None
    ]
    found = iter(
        torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True)
    )
    return [next(found) if need else None for need in needs]
