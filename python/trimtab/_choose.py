"""Which implementation runs, and why.

A pure function of the device, the dtype and what this install has.
It never looks at values, so that ``torch.compile`` traces through it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch

from trimtab import _native

IMPLS = ("reference", "native", "triton")

_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU_DTYPES = (*_GPU_DTYPES, torch.float64)
_LEAST_CAPABILITY = (8, 0)  # of the GPUs that the CUDA library is compiled for
_NO_GPU = (0, 0)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_IMPL_AT_IMPORT = os.environ.get("TRIMTAB_IMPL") or None


class Choice(NamedTuple):
    """The implementation that a call takes, and the reason in words."""

    impl: str
    reason: str


def requested(impl: str | None) -> str | None:
    """The implementation asked for by the argument or, without one, by ``TRIMTAB_IMPL``.

    Traced code sees the variable as it was at import: reading the environment breaks the graph.
    """
    if impl is None:
        if torch.compiler.is_compiling():
            impl = _IMPL_AT_IMPORT
        else:
            impl = os.environ.get("TRIMTAB_IMPL") or None
    if impl is not None and impl not in IMPLS:
        raise ValueError(
            f"impl must be one of {', '.join(map(repr, IMPLS))} or None, got {impl!r}; "
            "leave it out for the fastest available"
        )
    return impl


def why_not(impl: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``impl`` can't take ``op`` on this device and dtype, or None when it can."""
    if impl == "reference":
        return None
    if impl == "native":
        if device not in ("cpu", "cuda"):
            return f"no compiled kernels for device {device!r}"
        if _native.REASONS[device] is not None:
            return _native.REASONS[device]
        if device == "cuda" and _capability() == _NO_GPU:
            return "the CUDA kernels are loaded, and there is no GPU to run them on"
        if device == "cuda" and _capability() < _LEAST_CAPABILITY:
            return (
                f"the CUDA kernels of {op} need compute capability 8.0, this GPU has "
                f"{'.'.join(map(str, _capability()))}; impl='triton' may run"
            )
        known = _GPU_DTYPES if device == "cuda" else _CPU_DTYPES
        return (
            None if dtype in known else f"dtype {dtype} is not taken by {op} in native on {device}"
        )
    if not _HAS_TRITON:
        return "Triton is not installed; `pip install triton` on Linux, or use impl='reference'"
    if device == "cpu" and not _INTERPRET:
        return "Triton runs on CUDA tensors; on a CPU set TRITON_INTERPRET=1 before the import"
    if device not in ("cpu", "cuda"):
        return f"no Triton kernels for device {device!r}"
    return (
        None
        if dtype in _GPU_DTYPES
        else f"dtype {dtype} is not taken by {op} in Triton; use impl='reference'"
    )


@functools.cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else _NO_GPU


def choose(op: str, device: str, dtype: torch.dtype, impl: str | None = None) -> Choice:
    """The implementation for ``op`` on these inputs.

    Args:
        op: name of the public operator.
        device: device type of its inputs.
        dtype: dtype that its products run in.
        impl: the implementation asked for, or None for the fastest available.

    Raises:
        ValueError: ``impl`` is no known name.
        TypeError: the implementation asked for does not support ``dtype``.
        RuntimeError: the implementation asked for is not available here.
    """
    asked = requested(impl)
    if asked is not None:
        problem = why_not(asked, op, device, dtype)
        if problem is None:
            return Choice(asked, "asked for")
        error = TypeError if "dtype" in problem else RuntimeError
        raise error(f"impl must be available for these inputs, got {asked!r}: {problem}")
    passed_over: list[str] = []
    for candidate in ("native", "triton"):
        problem = why_not(candidate, op, device, dtype)
        # The interpreter is for tests: it is right and slow, so it is never chosen unasked.
        if problem is None and candidate == "triton" and device == "cpu":
            problem = "the Triton interpreter is for tests"
        if problem is None:
            return Choice(
                candidate, "; ".join(["fastest available for these inputs", *passed_over])
            )
        passed_over.append(f"{candidate}: {problem}")
    return Choice("reference", "; ".join(passed_over))
