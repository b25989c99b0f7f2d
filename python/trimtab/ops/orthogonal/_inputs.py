"""What the orthogonal operators accept, and what they make of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab._schemas import result_dtype
from trimtab.ops._checks import FLOATING, bad, looks_at_values

NORMS = {"l1": False, "frobenius2": True}
"""Name of a norm -> whether the products are squared."""

_TENSORS = "a sequence of 2-D tensors"


class Modules(NamedTuple):
    """The tensors of all modules, flattened."""

    previous: list[Tensor]  # each (R, d), module after module
    counts: list[int]  # (M,)
    current: list[Tensor]  # M times (r, d)


def check_norm(norm: str) -> bool:
    """Whether the products are squared."""
    if not isinstance(norm, str) or norm not in NORMS:
        raise bad("norm", " or ".join(map(repr, NORMS)), repr(norm),
                  '"l1" is the released code, "frobenius2" the paper')  # fmt: skip
    return NORMS[norm]


def check_modules(
    previous: Sequence[Tensor | Sequence[Tensor]], current: Sequence[Tensor]
) -> Modules:
    """Entries that fit each other, brought to one dtype for each side and to one device."""
    rows = check_tensors("current", current)
    if isinstance(previous, Tensor) or not isinstance(previous, Sequence):
        raise TypeError(
            f"previous must be a sequence with one entry per module, got {type(previous).__name__};"
            " an entry is a tensor or a sequence of tensors, one per earlier task"
        )
    if len(previous) != len(rows):
        raise bad("previous", f"of {len(rows)} entries, as many as current", len(previous),
                  "a module without earlier tasks has an empty entry")  # fmt: skip
    flat: list[Tensor] = []
    counts = []
    for m, entry in enumerate(previous):
        tensors = [entry] if isinstance(entry, Tensor) else check_tensors(f"previous[{m}]", entry)
        width = rows[m].shape[1]
        for t in tensors:
            if t.dim() != 2 or t.shape[1] != width:
                raise bad(f"previous[{m}]", f"of shape (R, {width}) as current[{m}] has rows",
                          tuple(t.shape), "lora_B goes in as B.mT")  # fmt: skip
        flat += tensors
        counts.append(len(tensors))
    check_alike(current=rows, previous=flat)
    rows, flat = widen(rows), widen(flat)
    if any(side and side[0].dtype == torch.float64 for side in (rows, flat)):
        rows, flat = [t.double() for t in rows], [t.double() for t in flat]
    return Modules(flat, counts, rows)


def check_tensors(name: str, tensors: Any) -> list[Tensor]:
    """A sequence of matrices, as a list."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"{name} must be {_TENSORS}, got {type(tensors).__name__}; use a list")
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(
                f"{name}[{i}] must be a tensor, got {type(t).__name__}; pass the weights themselves"
            )
        if t.dim() != 2:
            raise bad(f"{name}[{i}]", "of two dimensions", tuple(t.shape),
                      "its rows span the subspace")  # fmt: skip
    return list(tensors)


def check_alike(**named: list[Tensor]) -> None:
    """A supported floating dtype for each, one device for all."""
    device = next((t.device for tensors in named.values() for t in tensors), None)
    for name, tensors in named.items():
        for i, t in enumerate(tensors):
            if t.dtype not in FLOATING:
                raise TypeError(
                    f"{name}[{i}] must be float32, bfloat16, float16 or float64, got {t.dtype}; "
                    "cast it"
                )
            if t.device != device:
                raise bad(f"{name}[{i}]", f"on {device} as the others are", t.device,
                          f"move it with .to({str(device)!r})")  # fmt: skip


def widen(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of one dtype: those of mixed ones become the narrowest that holds them all."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) <= 1:
        return tensors
    common = reduce(torch.promote_types, dtypes)
    return [t.to(common) for t in tensors]


def check_weight(weight: Sequence[float] | Tensor | None, modules: Modules) -> Tensor | None:
    """One factor per module, in the result's dtype, on the device of the tensors."""
    if weight is None:
        return None
    count, like = len(modules.current), modules.current[0]
    real = result_dtype(like.dtype)
    if not isinstance(weight, Tensor):
        if (
            isinstance(weight, str)
            or not isinstance(weight, Sequence)
            or any(isinstance(w, bool) or not isinstance(w, int | float) for w in weight)
        ):
            raise TypeError(
                f"weight must be numbers or a tensor, got {weight!r}; one for each module"
            )
        try:
            weight = torch.tensor(weight, dtype=torch.float64)
        except OverflowError:
            raise bad("weight", "finite", weight, "check where they come from") from None
        if len(weight) == count:
            return check_weight_values(weight.to(real)).to(like.device, non_blocking=True)
    if weight.shape != (count,):
        raise bad("weight", f"of {count} numbers, one for each module", tuple(weight.shape),
                  "a factor of all modules belongs outside")  # fmt: skip
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating, got {weight.dtype}; use weight.float()")
    if weight.requires_grad:
        raise bad("weight", "without gradient", "one that requires grad", "use weight.detach()")
    if weight.device != like.device:
        raise bad("weight", f"on {like.device} as the tensors are", weight.device,
                  f"use weight.to({str(like.device)!r})")  # fmt: skip
    return check_weight_values(weight.to(real)).contiguous()


def check_weight_values(weight: Tensor) -> Tensor:
    """Finite numbers, where values may be looked at."""
    if looks_at_values(weight) and not bool(weight.isfinite().all()):
        raise bad("weight", "finite", weight.tolist(), "check where they come from")
    return weight


def check_bases(
    tensors: Sequence[Tensor], bases: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs that fit each other; the dtypes of a pair may differ."""
    rows, spans = check_tensors("tensors", tensors), check_tensors("bases", bases)
    if len(rows) != len(spans):
        raise bad("bases", f"of {len(rows)} tensors, one for each of tensors", len(spans),
                  "a tensor with nothing to project out has a basis of shape (0, d)")  # fmt: skip
    for m, (t, basis) in enumerate(zip(rows, spans, strict=True)):
        if basis.shape[1] != t.shape[1]:
            raise bad(f"bases[{m}]", f"of shape (k, {t.shape[1]}) as tensors[{m}] has rows",
                      tuple(basis.shape), "its rows are the orthonormal basis")  # fmt: skip
    check_alike(tensors=rows, bases=spans)
    return rows, spans
