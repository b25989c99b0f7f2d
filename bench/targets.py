"""What must be reached, as one table, and how it is read off the result rows.

A target compares rows of one run only: machines and loads differ from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]

BASE = (2048, 1024, 32000)
LLAMA = (8192, 4096, 128256)
ROWS = (16, 128256)
LLAMA_QV = (64, 112, 8, 4096)
LLAMA_ALL_LINEAR = (224, 112, 8, 11008)


class Target(NamedTuple):
    """One limit for ours in one case."""

    machine: str  # begins the machine's name, or the device type
    op: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    quantity: str
    limit: float
    provider: str | None = None  # None: the fastest of ours
    family: str = "token_loss"


class Verdict(NamedTuple):
    """A target and what was measured; None where a row that it needs is missing."""

    target: Target
    provider: str | None
    value: float | None

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value <= self.target.limit


TIME_OVER_PRODUCTS = "time over the products alone"
TIME_OVER_EAGER = "time over eager's"
TIME_OVER_READ = "time over one read of the rows"
TIME_OVER_CHAIN = "time over the Hugging Face chain's"
TIME_OVER_LOOP = "time over the flattened loop's"
TIME_OVER_ALL_TOKENS = "time over that with every token"
MEMORY_OVER_EAGER = "extra memory beyond a float32 accumulator, over eager's"
ERROR_OVER_EAGER = "error over eager's, the worst of loss and gradients"
MILLISECONDS = "ms"
EXTRA_GIB = "GiB beyond inputs and gradients"

_LCE = "linear_cross_entropy"
_SAMPLE = "contrastive_sample"
_PENALTY = "orthogonal_penalty"
_BF16_ACCUMULATION = "trimtab triton, bf16 accumulation"

TARGETS = (
    Target("cpu", _LCE, "weighted", "bfloat16", BASE, TIME_OVER_PRODUCTS, 1.10),
    Target("cpu", _LCE, "weighted", "bfloat16", BASE, TIME_OVER_EAGER, 1.0),
    Target("cpu", _LCE, "weighted", "bfloat16", BASE, MEMORY_OVER_EAGER, 0.25),
    Target("cpu", _LCE, "weighted", "bfloat16", BASE, ERROR_OVER_EAGER, 1.0),
    Target("cpu", _LCE, "weighted", "float32", BASE, TIME_OVER_PRODUCTS, 1.10),
    Target("cpu", _LCE, "none", "bfloat16", BASE, TIME_OVER_PRODUCTS, 1.10),
    Target("cpu", _LCE, "none", "float32", BASE, TIME_OVER_PRODUCTS, 1.10),
    Target("cpu", _LCE, "half", "bfloat16", BASE, TIME_OVER_ALL_TOKENS, 0.6),
    Target("cpu", _LCE, "half", "float32", BASE, TIME_OVER_ALL_TOKENS, 0.6),
    Target("cpu", _LCE, "frozen", "bfloat16", BASE, TIME_OVER_PRODUCTS, 1.15),
    Target("cpu", _LCE, "frozen", "float32", BASE, TIME_OVER_PRODUCTS, 1.15),
    Target("h200", _LCE, "weighted", "bfloat16", LLAMA, MILLISECONDS, 36.5),
    Target("h200", _LCE, "weighted", "bfloat16", LLAMA, EXTRA_GIB, 2.6),
    Target("h200", _LCE, "weighted", "bfloat16", LLAMA, EXTRA_GIB, 0.6, _BF16_ACCUMULATION),
    Target("h200", _LCE, "weighted", "bfloat16", (8192, 2304, 256000), MILLISECONDS, 42.5),
    Target("h200", _LCE, "frozen", "bfloat16", LLAMA, MILLISECONDS, 25.0),
    Target("h200", "linear_logp", "logp", "bfloat16", LLAMA, MILLISECONDS, 13.0),
    *(
        Target("cpu", _SAMPLE, mode, dtype, ROWS, quantity, limit, family="contrast")
        for mode, quantity, limit in (
            ("topk_topp", TIME_OVER_CHAIN, 1 / 30),
            ("greedy", TIME_OVER_READ, 4.0),
        )
        for dtype in ("float32", "bfloat16")
    ),
    Target(
        "h200", _SAMPLE, "all", "bfloat16", (256, 128256), MILLISECONDS, 0.120, family="contrast"
    ),
    Target(
        "h200", _SAMPLE, "all", "bfloat16", (256, 128256), MILLISECONDS, 0.075, family="contrast"
    ),
    *(
        Target(machine, _PENALTY, mode, dtype, shape, quantity, limit, family="orthogonal")
        for machine, mode, dtype, shape, quantity, limit in (
            ("cpu", "l1", "float32", LLAMA_QV, TIME_OVER_READ, 2.5),
            ("cpu", "l1", "bfloat16", LLAMA_QV, TIME_OVER_READ, 2.5),
            ("cpu", "l1", "float32", LLAMA_QV, TIME_OVER_LOOP, 1 / 3),
            ("cpu", "l1", "bfloat16", LLAMA_QV, TIME_OVER_LOOP, 1 / 2),
            ("h200", "l1", "bfloat16", LLAMA_QV, MILLISECONDS, 0.060),
            ("h200", "l1", "bfloat16", LLAMA_QV, MILLISECONDS, 0.035),
            ("h200", "all_linear", "bfloat16", LLAMA_ALL_LINEAR, MILLISECONDS, 0.150),
        )
    ),
)


def verdicts(rows: Sequence[Row], machine: str) -> list[Verdict]:
    """Every target for this machine and the families of these rows, with what the rows say."""
    device = {row["device"] for row in rows}
    families = {row["family"] for row in rows}
    return [
        Verdict(target, *_read(target, rows))
        for target in TARGETS
        if target.family in families
        and (machine.startswith(target.machine) or target.machine in device)
    ]


def is_ours(row: Row) -> bool:
    """Whether the row is a fast implementation of ours, with its defaults."""
    return row["impl"] not in (None, "reference") and "," not in row["provider"]


def _read(target: Target, rows: Sequence[Row]) -> tuple[str | None, float | None]:
    case = [row for row in rows if _is_case(row, target, target.mode)]
    ours = [row for row in case if _is_wanted(row, target)]
    if not ours:
        return None, None
    best = min(ours, key=lambda row: row["p50_ms"])
    same_run = [row for row in rows if row["run"] == best["run"]]
    return best["provider"], _QUANTITIES[target.quantity](best, same_run, target)


def _is_case(row: Row, target: Target, mode: str) -> bool:
    wanted = (target.family, target.op, mode, target.dtype, list(target.shape))
    return (row["family"], row["op"], row["mode"], row["dtype"], row["shape"]) == wanted


def _is_wanted(row: Row, target: Target) -> bool:
    return is_ours(row) if target.provider is None else row["provider"] == target.provider


def _other(
    rows: Sequence[Row], target: Target, provider: str, mode: str | None = None
) -> Row | None:
    found = [
        row
        for row in rows
        if _is_case(row, target, mode or target.mode) and row["provider"] == provider
    ]
    return found[0] if found else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _time_over(provider: str) -> Callable[[Row, Sequence[Row], Target], float | None]:
    def ratio(row: Row, rows: Sequence[Row], target: Target) -> float | None:
        other = _other(rows, target, provider)
        return None if other is None else _ratio(row["p50_ms"], other["p50_ms"])

    return ratio


def _error_over_eager(row: Row, rows: Sequence[Row], target: Target) -> float | None:
    eager = _other(rows, target, "eager")
    if eager is None:
        return None
    ratios = [_ratio(error, eager["errors"][name]) for name, error in row["errors"].items()]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _memory_over_eager(row: Row, rows: Sequence[Row], target: Target) -> float | None:
    eager = _other(rows, target, "eager")
    if eager is None or row["extra_mib"] is None:
        return None
    _, width, classes = target.shape
    accumulator = 4 * width * classes / 2**20
    return _ratio(max(0.0, row["extra_mib"] - accumulator), eager["extra_mib"])


def _over_all_tokens(row: Row, rows: Sequence[Row], target: Target) -> float | None:
    full = _other(rows, target, row["provider"], "weighted")
    return None if full is None else _ratio(row["p50_ms"], full["p50_ms"])


def _gib(row: Row, rows: Sequence[Row], target: Target) -> float | None:
    return None if row["extra_mib"] is None else row["extra_mib"] / 1024


_QUANTITIES: dict[str, Callable[[Row, Sequence[Row], Target], float | None]] = {
    TIME_OVER_PRODUCTS: lambda row, rows, target: row["over_floor"],
    TIME_OVER_READ: lambda row, rows, target: row["over_floor"],
    TIME_OVER_CHAIN: _time_over("Hugging Face chain"),
    TIME_OVER_EAGER: _time_over("eager"),
    TIME_OVER_LOOP: _time_over("flattened loop"),
    TIME_OVER_ALL_TOKENS: _over_all_tokens,
    MEMORY_OVER_EAGER: _memory_over_eager,
    ERROR_OVER_EAGER: _error_over_eager,
    MILLISECONDS: lambda row, rows, target: row["p50_ms"],
    EXTRA_GIB: _gib,
}
