"""How much the subspaces of tasks have in common: principal angles between row spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trimtab.algorithms.olora.layers import Slot, rows


@torch.no_grad()
def orthonormal_rows(matrix: Tensor) -> Tensor:  # (k, d)
    """An orthonormal basis of the row space, float32 at least, k the numerical rank."""
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    _, values, basis = torch.linalg.svd(wide, full_matrices=False)
    least = values[:1] * max(wide.shape) * torch.finfo(wide.dtype).eps
    return basis[values > least]


def module_name(module: Mapping[str, Slot]) -> str:
    """Name of a module with the side behind, as in PEFT's parameter names."""
    slot = next(iter(module.values()))
    return f"{slot.module}.lora_{slot.factor}"


def basis_of(slot: Slot) -> Tensor:  # (k, d)
    """Orthonormal rows of a task's factor."""
    return orthonormal_rows(rows(slot.factor, slot.tensor()))


def overlap_table(module: Mapping[str, Slot], tasks: Sequence[str]) -> Tensor:  # (T, T)
    """Mean squared cosine of the principal angles in a module; NaN where a task has no rows."""
    bases = [basis_of(module[task]) if task in module else None for task in tasks]
    ranks = torch.tensor([0 if basis is None else len(basis) for basis in bases])
    table = torch.zeros(len(tasks), len(tasks))
    places = ranks.nonzero()[:, 0]
    if len(places):
        every = torch.cat([basis for basis in bases if basis is not None])
        square = (every @ every.mT).square().cpu().float()
        owner = torch.arange(len(tasks)).repeat_interleave(ranks)
        table.index_put_((owner[:, None], owner[None, :]), square, accumulate=True)
    return table / torch.minimum(ranks[:, None], ranks[None, :])


def principal_cosines(module: Mapping[str, Slot], first: str, second: str) -> Tensor:  # (k,)
    """Cosines of the principal angles between two tasks' rows in a module, descending."""
    left, right = basis_of(module[first]), basis_of(module[second])
    return torch.linalg.svdvals(left @ right.mT).clamp(max=1.0)
