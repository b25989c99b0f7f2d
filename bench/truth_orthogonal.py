"""How results of the orthogonal family are judged: values, gradients and projections in float64.

The flattened loop's error is the yardstick, with two exceptions. A value that comes in float32 is
held to what a float32 loop would make of the same rows: in 16 bits the loop's running sum stands
still once the terms are small beside it. And a gradient is granted one float32 rounding of the
terms that it sums, which cancel: who adds all rows at once is further off than who adds task by
task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cases_orthogonal import Case, Inputs, Outputs
from measure import Judge
from trimtab.testing import BudgetError, error_budget, max_error

# Modules whose earlier rows have their gradients compared; all else is compared everywhere.
SAMPLED = 8


class Exact(NamedTuple):
    """The truth of a case."""

    results: Outputs  # what ``sample`` should hold
    scales: Mapping[str, float]  # largest sum of the absolute terms of a gradient's element
    value: Tensor | None  # as a loop in float32 gets it


def sample(case: Case, inputs: Inputs, outputs: Outputs) -> Outputs:
    """The part of a contender's outputs that is compared: all modules' tensors as one."""
    picked = {name: value for name, value in outputs.items() if "." not in name}
    for kind, tensors in inputs.due().items():
        found = []
        for i in _compared(kind, len(tensors)):
            result = outputs.get(f"{kind}.{i}")
            if result is None or result.shape != tensors[i].shape:
                shape = None if result is None else tuple(result.shape)
                raise BudgetError(f"{kind} {i}: {shape}, due is {tuple(tensors[i].shape)}")
            found.append(result.flatten())
        picked[kind] = torch.cat(found)
    return picked


def _compared(kind: str, count: int) -> list[int]:
    most = SAMPLED if kind == "grad_previous" else count
    return torch.linspace(0, count - 1, min(most, count)).round().long().tolist()


@torch.no_grad()
def truth(case: Case, inputs: Inputs) -> Exact:
    """Values, gradients and projected tensors, module by module."""
    if case.projects:
        out = [c.double() - (c.double() @ q.double().T) @ q.double() for q, c in inputs.pairs()]
        return Exact({"out": torch.cat([t.flatten() for t in out])}, {}, None)
    found: dict[str, list[Tensor]] = {kind: [] for kind in inputs.due()}
    scales = dict.fromkeys(found, 0.0)
    value = torch.zeros((), dtype=torch.float64, device=case.device)
    plain = value.float()
    columns = case.about.layout == "columns"
    for entry, current in zip(inputs.previous, inputs.current(), strict=True):
        c = current.double()
        grad, terms = torch.zeros_like(c), torch.zeros_like(c)
        for stored in [entry] if isinstance(entry, Tensor) else entry:
            p = stored.double()
            size, slope = size_and_slope(case, p @ c.T)
            value += size.sum()
            plain += size_and_slope(case, stored.float() @ current.float().T)[0].sum()
            grad += slope.T @ p
            terms += slope.abs().T @ p.abs()
            if "grad_previous" in found:
                found["grad_previous"].append((slope @ c).flatten())
                largest = float((slope.abs() @ c.abs()).max())
                scales["grad_previous"] = max(scales["grad_previous"], largest)
        if "grad_current" in found:
            found["grad_current"].append((grad.mT if columns else grad).flatten())
            scales["grad_current"] = max(scales["grad_current"], float(terms.max()))
    results = {
        kind: torch.cat([parts[i] for i in _compared(kind, len(parts))])
        for kind, parts in found.items()
    }
    return Exact({"value": value, **results}, scales, plain)


def size_and_slope(case: Case, products: Tensor) -> tuple[Tensor, Tensor]:  # each (R, r)
    """The norm's terms, and their derivatives."""
    if case.about.norm == "l1":
        return products.abs(), products.sign()
    return products.square(), 2 * products


def judge_of(case: Case, exact: Exact) -> Judge:
    """``(results, the loop's) -> errors``, which raises ``BudgetError`` if they are too large."""

    def judge(results: Outputs, loop: Outputs | None) -> dict[str, float]:
        if set(results) != set(exact.results):
            raise BudgetError(f"results {sorted(results)} where {sorted(exact.results)} are due")
        errors = {}
        for name, due in exact.results.items():
            yardstick, dtype = (results if loop is None else loop)[name], case.dtype
            if name == "value" and exact.value is not None and results[name].dtype != dtype:
                yardstick, dtype = exact.value, torch.float32
            budget = error_budget(yardstick, due, dtype)
            budget += torch.finfo(torch.float32).eps * exact.scales.get(name, 0.0)
            error = max_error(results[name], due)
            if not error <= budget:
                raise BudgetError(f"{name}: error {error:.2e} is over the budget {budget:.2e}")
            errors[name] = error / max(float(due.abs().max()), torch.finfo(torch.float64).tiny)
        return errors

    return judge
