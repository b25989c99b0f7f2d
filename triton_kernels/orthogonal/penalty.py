"""The penalty of all modules, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..common import on
from . import launch
from .table import plan_for


def orthogonal_penalty_rows(
    previous: Sequence[Tensor],  # each (R, d), module after module
    counts: Sequence[int],  # (M,)
    current: Sequence[Tensor],  # M times (r, d)
    weight: Tensor | None,  # (M,) float32
    squared: bool,
    value: Tensor,  # () float32
    grad_current: Tensor | None,  # (sum of r d,) float32
    grad_previous: Tensor | None,  # (sum of R d,) float32
) -> None:
    """``sum_m w_m sum |P_m C_m^T|``, or of the squares, with its gradients.

    Args:
        previous: rows of earlier tasks, of one dtype: float32, float16 or bfloat16; any strides.
        counts: how many of these tensors belong to each module.
        current: rows of the new task, of one dtype, which may be another.
        weight: factor of each module; None is 1.
        squared: whether the products are squared.
        value: written.
        grad_current: written where given: the gradient of each tensor of ``current``, contiguous,
            one after the other. Of a product that is 0, or NaN, the sign is 0.
        grad_previous: the same of ``previous``.

    Cost: three launches, four with ``grad_previous``. ``previous`` is read for the value, and for
    ``grad_current`` once more, from L2 as far as it still is there.

    Raises:
        RuntimeError: the tensors are new while a CUDA graph is captured.
    """
    plan = plan_for(
        previous, counts, current, signs=not squared, to_previous=grad_previous is not None
    )
    parts, values = value.new_empty(plan.parts), value.new_empty(len(plan.reduce_items))
    factor = 2.0 if squared else 1.0
    with on(value.device):
        launch.overlap(plan, previous, current, parts)
        launch.reduce(plan, parts, squared, weight, values)
        forth = plan.to_current if grad_current is not None else plan.to_current.without_items()
        launch.combine(
            plan,
            forth,
            previous,
            plan.previous,
            parts,
            value if grad_current is None else grad_current,
            factor=factor,
            weight=weight,
            values=values,
            value=value,
        )
        if grad_previous is not None:
            launch.combine(
                plan,
                plan.to_previous,
                current,
                plan.current,
                parts,
                grad_previous,
                factor=factor,
                weight=weight,
                transposed=True,
            )
