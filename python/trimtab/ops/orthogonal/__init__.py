"""Orthogonality of low-rank updates: a penalty over all adapters at once, and projections.

The rows of an adapter's matrix span the subspace in which its update works. ``orthogonal_penalty``
measures how far a new task's rows overlap with those of earlier tasks, in every module of a model
in one call; ``project_out`` takes the part of a gradient away that lies in a subspace.

With ``previous`` of R rows, ``current`` of r rows and width d, a module costs 4 R r d FLOP for
value and gradient, and is bound by reading R d numbers once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab._choose import Choice, choose, requested
from trimtab.ops._autograd import needs_grad
from trimtab.ops.orthogonal import _inputs as inputs
from trimtab.ops.orthogonal._functions import OrthogonalPenalty, ProjectOut, split_like
from trimtab.reference import orthogonal as reference

__all__ = ["CHOICES", "orthogonal_penalty", "project_out"]


def orthogonal_penalty(
    previous: Sequence[Tensor | Sequence[Tensor]],  # M entries: (R_m, d_m), or several of them
    current: Sequence[Tensor],  # M times (r_m, d_m)
    *,
    norm: str = "l1",
    weight: Sequence[float] | Tensor | None = None,  # (M,)
    impl: str | None = None,
) -> Tensor:
    """How far the rows of ``current`` are from orthogonal to those of ``previous``, in all modules.

    With ``G_m = P_m C_m^T`` (R_m, r_m) for the previous rows P and the current ones C::

        norm="l1"            sum_m w_m sum_ij |G_m,ij|      dC_m = w_m sign(G_m)^T P_m
        norm="frobenius2"    sum_m w_m sum_ij G_m,ij^2      dC_m = 2 w_m G_m^T P_m

    "l1" is what the released code of O-LoRA computes; "frobenius2" is the paper's (Wang et al.,
    "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP 2023,
    equation 8). Both sums run over all tasks of a module. The gradient of "l1" does not vanish near
    orthogonality; where a product is exactly 0 it is 0.

    Value and gradient come out of one pass, for all modules together. Differentiable in ``current``
    and, where it requires grad, in ``previous``; twice through the reference. The gradients of a
    list are parts of one buffer. Under ``torch.compile`` a longer list of tasks is another graph:
    there, concatenate a module's tasks.

    Cost: one read of ``previous``, one of ``current``, and a float32 gradient of its size;
    4 R r d FLOP per module. Tensors whose dtype differs from that of others in their list are
    converted first, which copies them.

    Args:
        previous: for each module the earlier tasks' rows: a tensor (R_m, d_m), or a sequence of
            such, one per task, as stock PEFT keeps them. An entry may be empty. float32, bfloat16,
            float16 or float64; any strides, so that ``lora_B`` goes in as ``B.mT``.
        current: for each module the new task's rows, (r_m, d_m); its dtype may differ from that of
            ``previous``.
        norm: "l1" or "frobenius2".
        weight: M factors, numbers or a tensor, without gradient; None for ones.
        impl: "reference", "native", "triton", or None for the fastest available.

    Returns:
        A scalar, float32 (float64 where a tensor is); exactly 0 with nothing previous.

    Raises:
        ValueError: a shape, device or value that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: ``impl`` names an implementation that is not available here.
    """
    squared = inputs.check_norm(norm)
    modules = inputs.check_modules(previous, current)
    if not modules.current:
        requested(impl)
        return torch.zeros(())
    factors = inputs.check_weight(weight, modules)
    like = modules.current[0]
    chosen = choose("orthogonal_penalty", like.device.type, like.dtype, impl).impl
    if chosen == "reference":
        return reference.orthogonal_penalty(*modules, factors, squared)
    needs = any(needs_grad(*modules.current)), any(needs_grad(*modules.previous))
    if not any(needs):
        return torch.ops.trimtab.orthogonal_penalty.default(
            modules.previous, modules.counts, modules.current, factors, squared, needs, chosen
        )[0]
    tensors = (*modules.current, *modules.previous)
    if torch.compiler.is_compiling():
        # Tracing refuses to see one tensor twice.
        tensors = tuple(t.view_as(t) for t in tensors)
    return OrthogonalPenalty.apply(modules.counts, factors, squared, needs, chosen, *tensors)


def project_out(
    tensors: Sequence[Tensor],  # M times (n_m, d_m)
    bases: Sequence[Tensor],  # M times (k_m, d_m)
    *,
    impl: str | None = None,
) -> list[Tensor]:
    """What is left of each tensor's rows outside of a subspace: ``t - (t Q^T) Q``.

    The step of gradient projection: OGD (Farajtabar et al., AISTATS 2020), GPM (Saha et al., ICLR
    2021). Differentiable; where a basis requires grad, the reference takes the call.

    Cost: two products of n x k x d (4 n k d FLOP) per tensor; one read of the tensor and of the
    basis, one write.

    Args:
        tensors: rows to be projected; float32, bfloat16, float16 or float64, any strides.
        bases: for each tensor the orthonormal rows Q of the subspace, of any dtype and strides.
            (0, d) leaves the tensor as it is. That the rows are orthonormal is not checked.
        impl: "reference", "native", "triton", or None for the fastest available.

    Returns:
        Tensors of the shapes and dtypes of ``tensors``, parts of one new buffer: clone what is to
        be changed in place.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: a dtype that does not fit.
        RuntimeError: ``impl`` names an implementation that is not available here.
    """
    rows, spans = inputs.check_bases(tensors, bases)
    if not rows:
        requested(impl)
        return []
    pairs = [inputs.widen([t, basis]) for t, basis in zip(rows, spans, strict=True)]
    outs: dict[int, Tensor] = {}
    for dtype in {wide.dtype for wide, _ in pairs}:
        chosen = choose("project_out", rows[0].device.type, dtype, impl).impl
        places = [m for m, (wide, _) in enumerate(pairs) if wide.dtype == dtype]
        wide, spans = ([pairs[m][side] for m in places] for side in (0, 1))
        if chosen == "reference" or any(needs_grad(*spans)):
            found = reference.project_out(wide, spans)
        elif any(needs_grad(*wide)):
            if torch.compiler.is_compiling():
                spans = [span.view_as(span) for span in spans]
                wide = [t.view_as(t) for t in wide]
            found = ProjectOut.apply(len(wide), chosen, *wide, *spans)
        else:
            flat = torch.ops.trimtab.project_out.default(wide, spans, chosen)
            found = split_like(flat, wide)
        outs.update(zip(places, found, strict=True))
    return [outs[m].to(t.dtype) for m, t in enumerate(rows)]


def _choice_of_penalty(arguments: dict[str, Any]) -> Choice:
    modules = inputs.check_modules(arguments["previous"], arguments["current"])
    like = modules.current[0] if modules.current else torch.zeros(())
    return choose("orthogonal_penalty", like.device.type, like.dtype, arguments["impl"])


def _choice_of_projection(arguments: dict[str, Any]) -> Choice:
    rows, _ = inputs.check_bases(arguments["tensors"], arguments["bases"])
    like = rows[0] if rows else torch.zeros(())
    return choose("project_out", like.device.type, like.dtype, arguments["impl"])


CHOICES: dict[str, tuple[Callable[..., Any], Callable[[dict[str, Any]], Choice]]] = {
    "orthogonal_penalty": (orthogonal_penalty, _choice_of_penalty),
    "project_out": (project_out, _choice_of_projection),
}
"""Public operator -> (function, what ``explain`` answers for its arguments)."""
