"""Validation of contrast arguments, and the form in which every implementation takes them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab._schemas import result_dtype
from trimtab.ops._checks import bad, check_devices, check_floating, looks_at_values

_INF = math.inf


class PerRow(NamedTuple):
    """A parameter: one number, or a contiguous tensor (B,), which wins."""

    number: float
    rows: Tensor | None = None

    # Not a property: Dynamo of torch 2.10 can't look into those of named tuples.
    def value(self) -> float | Tensor:
        """Either, as the oracle takes it."""
        return self.number if self.rows is None else self.rows


class Transform(NamedTuple):
    """One function, for a number (traceable by ``torch.compile``) and for float64 tensors."""

    number: Callable[[float], float]
    rows: Callable[[Tensor], Tensor]


_LOG = Transform(lambda x: math.log(x) if x > 0 else -_INF, torch.log)
# A top_p of 1 removes nothing.
_TAIL = Transform(
    lambda top_p: -1.0 if top_p >= 1 else 1.0 - top_p,
    lambda top_p: torch.where(top_p >= 1.0, -1.0, 1.0 - top_p),
)

OFF = PerRow(-_INF)
"""No plausibility mask, no min-p."""


class Rows(NamedTuple):
    """Rows of logits as matrices; ``shape`` is that of one number per row."""

    positive: Tensor  # (B, V)
    negative: Tensor | None  # (B, V)
    anchor: Tensor | None  # (B, V)
    shape: torch.Size


class Filters(NamedTuple):
    """What ``contrastive_sample_rows`` takes after the rows and alpha."""

    log_beta: PerRow
    temperature: PerRow
    top_k: PerRow
    tail: PerRow
    log_min_p: PerRow
    seed: PerRow
    position: PerRow

    def flat(self) -> list[Any]:
        """Numbers and tensors in the order of the operator's schema."""
        return [part for parameter in self for part in parameter]


def check_rows(positive: Tensor, negative: Tensor, anchor: Tensor | None) -> Rows:
    """Rows of one shape, device and dtype; flattens the leading dimensions."""
    check_tensors(positive, negative)
    for name, rows in (("negative", negative), ("anchor", anchor)):
        if rows is None:
            continue
        if rows.shape != positive.shape:
            raise bad(name, f"of shape {tuple(positive.shape)} as positive is", tuple(rows.shape),
                      "expand a row that is shared, with .expand_as(positive)")  # fmt: skip
        check_same_dtype(name, rows, positive)
    check_devices(positive, {"negative": negative, "anchor": anchor}, "positive")
    return matrices(positive, negative, anchor, positive.shape[:-1])


def check_tensors(positive: Tensor, negative: object) -> None:
    """Both sides of the contrast are there."""
    if not isinstance(positive, Tensor):
        raise TypeError(
            f"positive must be a torch tensor, got {type(positive).__name__}; use torch.as_tensor"
        )
    if not isinstance(negative, Tensor):
        raise TypeError(
            f"negative must be a torch tensor, got {type(negative).__name__}; without a contrast "
            "pass positive twice"
        )
    check_floating("positive", positive)
    if positive.dim() < 1:
        raise bad("positive", "of shape (..., V)", tuple(positive.shape), "one row is logits[None]")


def check_same_dtype(name: str, rows: Tensor, positive: Tensor) -> None:
    """One dtype for all rows: a mixture would need a copy."""
    if rows.dtype != positive.dtype:
        raise TypeError(
            f"{name} must be {positive.dtype} as positive is, got {rows.dtype}; cast one of them"
        )


def as_matrix(rows: Tensor) -> Tensor:
    """(B, V) with unit stride along V; the rows may lie anywhere, or on top of each other."""
    flat = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    return flat if flat.shape[1] <= 1 or flat.stride(1) == 1 else flat.contiguous()


def matrices(
    positive: Tensor, negative: Tensor | None, anchor: Tensor | None, shape: torch.Size
) -> Rows:
    """Rows as every implementation takes them."""
    return Rows(
        as_matrix(positive),
        None if negative is None else as_matrix(negative),
        None if anchor is None else as_matrix(anchor),
        shape,
    )


def check_row_map(name: str, rows: Tensor | None, of: Tensor, like: Tensor) -> Tensor | None:
    """Which row of a tensor belongs to each output row, as int64."""
    if rows is None:
        return None
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}; use torch.tensor")
    if rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {rows.dtype}; use {name}.long()")
    if rows.dim() != 1:
        raise bad(name, "of shape (B,)", tuple(rows.shape), "one row number per output row")
    check_devices(like, {name: rows}, "positive")
    if looks_at_values(rows) and bool(((rows < 0) | (rows >= of.shape[0])).any()):
        raise bad(
            name,
            f"in [0, {of.shape[0]})",
            f"{int(rows.min())} to {int(rows.max())}",
            "count the rows of the tensor that it belongs to",
        )
    return rows.long().contiguous()


def mapped_rows(
    positive: Tensor, sources: dict[str, Any], given: dict[str, Tensor | None]
) -> tuple[Rows, tuple[Tensor | None, ...]]:
    """The rows of ``contrastive_sample`` as matrices, and its row maps."""
    if all(rows is None for rows in given.values()):
        rows = check_rows(positive, sources["negative"], sources["anchor"])
        if len(rows.shape) != 1:
            raise bad("positive", "of shape (B, V)", tuple(positive.shape), "flatten it")
        return rows, (None, None, None)
    count: int | None = None
    maps: list[Tensor | None] = []
    check_tensors(positive, sources["negative"])
    check_devices(positive, sources, "positive")
    for name, tensor in sources.items():
        rows_of = given[name]
        if tensor is None:
            if rows_of is not None:
                raise bad(name, f"given with {name}_rows", None, f"leave {name}_rows out")
            maps.append(None)
            continue
        if tensor.dim() != 2 or tensor.shape[1] != positive.shape[-1]:
            raise bad(name, f"of shape (rows, {positive.shape[-1]})", tuple(tensor.shape),
                      "all rows have one vocabulary")  # fmt: skip
        check_same_dtype(name, tensor, positive)
        maps.append(check_row_map(f"{name}_rows", rows_of, tensor, positive))
        length = tensor.shape[0] if rows_of is None else rows_of.shape[0]
        count = length if count is None else count
        if length != count:
            what = name if rows_of is None else f"{name}_rows"
            raise bad(what, f"of length {count} as the output", length, "one per output row")
    assert count is not None, "positive is given"
    shape = torch.Size((count,))
    return matrices(positive, sources["negative"], sources["anchor"], shape), tuple(maps)


def per_row(
    name: str,
    value: object,
    shape: torch.Size,
    like: Tensor,
    expected: str,
    fits: Callable[[Any], Any],
    *,
    dtype: torch.dtype | None = None,
    transform: Transform | None = None,
) -> PerRow:
    """A number or one per row, checked.

    Args:
        name: of the argument, for messages.
        value: what was given.
        shape: shape of one number per row.
        like: rows of logits, for the device and the dtype.
        expected: the range in words.
        fits: whether a number, or each of a tensor's, is in it.
        dtype: of the tensor handed on; None for the result's dtype.
        transform: from what is given to what the operators take, before rounding.
    """
    integral = dtype == torch.int64
    if not isinstance(value, Tensor):
        # NumPy's scalars are registered with `numbers`; torch.compile knows Python's own.
        kinds = (int, numbers.Integral) if integral else (int, float, numbers.Real)
        if isinstance(value, bool) or not isinstance(value, kinds):
            wanted = "an integer" if integral else "a number"
            raise TypeError(
                f"{name} must be {wanted} or a tensor, got {type(value).__name__}; "
                "one number for all rows, or a tensor with one per row"
            )
        if not fits(value):
            raise bad(name, expected, value, "see the argument's documentation")
        value = int(value) if integral else float(value)  # type: ignore[call-overload, arg-type]
        if transform is None:
            return PerRow(value)
        return PerRow(transform.number(value))
    if value.requires_grad:
        raise bad(name, "without gradient", "requires_grad=True", f"use {name}.detach()")
    if value.dtype == torch.bool or value.dtype.is_complex:
        raise TypeError(f"{name} must be a tensor of real numbers, got {value.dtype}; cast it")
    if integral and value.dtype.is_floating_point:
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}; use {name}.long()")
    if value.dim() > 0 and value.shape != shape:
        raise bad(name, f"a number or of shape {tuple(shape)}", tuple(value.shape), "one per row")
    if value.dim() > 0:
        check_devices(like, {name: value}, "positive")
    if looks_at_values(value) and not bool(torch.as_tensor(fits(value)).all()):
        raise bad(name, expected, value.tolist(), "see the argument's documentation")
    if transform is not None:
        value = transform.rows(value.double())
    rows = value.to(device=like.device, dtype=dtype or result_dtype(like.dtype))
    return PerRow(0, rows.expand(shape).reshape(-1).contiguous())


def check_alpha(alpha: object, shape: torch.Size, like: Tensor) -> PerRow:
    """The weight of the contrast: any finite number."""
    most = torch.finfo(result_dtype(like.dtype)).max
    return per_row(
        "alpha", alpha, shape, like, f"finite in {result_dtype(like.dtype)}",
        lambda x: (x >= -most) & (x <= most),
    )  # fmt: skip


def check_plausibility(beta: object, shape: torch.Size, like: Tensor) -> PerRow:
    """``log(beta)``; off for None."""
    if beta is None:
        return OFF
    return per_row("plausibility", beta, shape, like, "in (0, 1] or None",
                   lambda x: (x > 0) & (x <= 1), transform=_LOG)  # fmt: skip


def check_temperature(temperature: object, shape: torch.Size, like: Tensor) -> PerRow:
    """Positive: log-probabilities have no limit at 0."""
    least, most = normal_range(like)
    expected = f"positive and finite in {result_dtype(like.dtype)}"
    return per_row("temperature", temperature, shape, like, expected,
                   lambda x: (x >= least) & (x <= most))  # fmt: skip


def normal_range(like: Tensor) -> tuple[float, float]:
    """The smallest and the largest temperature that the result's dtype holds as a normal number."""
    info = torch.finfo(result_dtype(like.dtype))
    return info.tiny, info.max


def check_filters(arguments: Mapping[str, Any], shape: torch.Size, like: Tensor) -> Filters:
    """The filters of ``contrastive_sample``, by name; what is None is off."""

    def check(name: str, off: float, expected: str, fits: Any, **how: Any) -> PerRow:
        value = arguments[name]
        if value is None:
            return PerRow(off)
        return per_row(name, value, shape, like, expected, fits, **how)

    whole: dict[str, Any] = {"dtype": torch.int64}
    least, most = normal_range(like)
    heat = f"0 for greedy, or positive and finite in {result_dtype(like.dtype)}"
    seed, position = (
        per_row(name, arguments[name], shape, like, "of 64 bits",
                lambda x: (x >= -(2**63)) & (x <= 2**63 - 1), **whole)
        for name in ("seed", "position")
    )  # fmt: skip
    return Filters(
        check_plausibility(arguments["plausibility"], shape, like),
        per_row("temperature", arguments["temperature"], shape, like, heat,
                lambda x: (x == 0) | (x >= least) & (x <= most)),
        check("top_k", 0, "positive, or 0 for none", lambda x: (x >= 0) & (x <= 2**63 - 1),
              **whole),
        check("top_p", -1.0, "in [0, 1]", lambda x: (x >= 0) & (x <= 1), transform=_TAIL),
        check("min_p", -_INF, "in [0, 1]", lambda x: (x >= 0) & (x <= 1), transform=_LOG),
        seed,
        position,
    )  # fmt: skip
