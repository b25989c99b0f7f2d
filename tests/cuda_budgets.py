"""What the kernels of ``csrc/cuda`` may use of a GPU; ``test_cuda_budget.py`` holds them to it.

A row is for all kernels whose name it fits (``*`` fits anything, the first row that fits counts),
without namespaces and as C++ writes it: ``loss_kernel<BFloat16, true>``. The file run as a script,
``python tests/test_cuda_budget.py``, prints what was measured.
"""

from __future__ import annotations

from typing import NamedTuple


class Budget(NamedTuple):
    """Limits of one kernel, over all architectures and types."""

    registers: int
    """The most that was measured. 64 fill a multiprocessor with 1,024 threads, 128 with 512."""
    wide: str = ""
    """Accesses of 16 bytes that its code must have: of "load", "store", "copy"."""
    stack: int = 0
    """Bytes of local memory, that is of spilled registers and of arrays indexed at run time."""
    static_shared: int = 0
    """Bytes. Shared memory is dynamic, so that the CPU can check it."""


MEASURED_WITH = "13.0"
HEADROOM = 8

BUDGETS: dict[str, dict[str, Budget]] = {
    "token_loss": {},
    "contrast": {},
    "orthogonal": {},
}
