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
    "token_loss": {
        "accumulate_kernel<*>": Budget(32, "load store"),
        # Two blocks of 512 threads, or three of 256, have their registers.
        "loss_kernel<*>": Budget(64, "load store copy"),
        "logp_kernel<*>": Budget(64, "load store copy"),
    },
    "contrast": {
        # Two blocks of 512 threads have their registers, or one of 1,024.
        "contrastive_logits_kernel<*>": Budget(56, "load store"),
        "contrastive_logp_kernel<*>": Budget(56, "load"),
        "contrastive_logp_backward_kernel<*>": Budget(59, "load store"),
    },
    "contrast_sample": {
        # Two blocks of 512 threads have their registers.
        "contrastive_sample_kernel<*>": Budget(64, "load"),
    },
    "orthogonal": {
        # Four blocks of 256 threads have their registers.
        "fused_kernel<TensorCore<*, 32> >": Budget(64, "load copy"),
        # Two; 44 or 48 registers are sums.
        "fused_kernel<*>": Budget(128, "load copy"),
        "combine_kernel<*>": Budget(128, "load copy"),
        "overlap_kernel<*>": Budget(108, "load copy"),
        "spread_kernel<*>": Budget(128, "load copy"),
        "finish_kernel": Budget(36),
        "store_table<*>": Budget(16, "store"),
    },
}
