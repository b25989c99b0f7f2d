"""Checks of arguments that every family makes: bad input is met before any kernel runs."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# An ignore_index that no int64 target of a caller equals: stands for "nothing is ignored".
NOTHING_IGNORED = -(2**63)


def bad(argument: str, expected: str, got: object, remedy: str) -> ValueError:
    """The package's form of ValueError; made only to be raised: formatting breaks graphs."""
    return ValueError(f"{argument} must be {expected}, got {got}; {remedy}")


def check_target(target: Tensor, shape: torch.Size) -> None:
    """Target dtype and shape."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}; use torch.tensor")
    if target.dtype != torch.int64:
        raise TypeError(
            f"target must be int64 class indices, got {target.dtype}; use target.long()"
        )
    if target.shape != shape:
        raise bad("target", f"of shape {tuple(shape)}, one index per row", tuple(target.shape),
                  "flatten or shift both alike")  # fmt: skip


def check_devices(
    first: Tensor, others: Mapping[str, object], name_of_first: str = "input"
) -> None:
    """Every tensor on the device of the first argument."""
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and tensor.device != first.device:
            raise bad(name, f"on {first.device} as {name_of_first} is", tensor.device,
                      f"use {name}.to({str(first.device)!r})")  # fmt: skip


def check_floating(name: str, tensor: Tensor) -> None:
    """A floating dtype that the family supports."""
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}; cast it"
        )


def check_ignore_index(ignore_index: int | None) -> int:
    """The target that is ignored, or one that no caller has."""
    if ignore_index is None:
        return NOTHING_IGNORED
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(
            f"ignore_index must be an integer or None, got {type(ignore_index).__name__}; None "
            "ignores nothing"
        )
    return ignore_index


def looks_at_values(tensor: Tensor) -> bool:
    """Whether checks may read the tensor: on a CPU, elsewhere only with ``TRIMTAB_CHECK=1``."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("TRIMTAB_CHECK") == "1"


def raises_on_bad_rows() -> bool:
    """Whether ``TRIMTAB_CHECK=1`` asks for an error where a row's result is NaN."""
    return not torch.compiler.is_compiling() and os.environ.get("TRIMTAB_CHECK") == "1"


def check_target_range(target: Tensor, ignore_index: int, classes: int) -> None:
    """IndexError for a target outside the vocabulary; unchecked, a kernel answers with NaN."""
    if not looks_at_values(target):
        return
    out_of_range = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(out_of_range.any()):
        row = int(out_of_range.nonzero()[0])
        raise IndexError(
            f"target must be in [0, {classes}) or equal to ignore_index, got {int(target[row])} at "
            f"flat position {row}; check the tokenizer's size against the head's"
        )
