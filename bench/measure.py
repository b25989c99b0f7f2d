"""How a case is measured: errors, then memory, then time, one contender beside the other.

- Nobody is timed whose results have not passed: within 2 x eager's error plus one rounding of the
  float64 truth (``trimtab.testing.error_budget``), at the very shape that is timed.
- Rounds go round-robin, each beginning with another contender, so that a machine that slows down
  does so for all. A row gives the median and the 20th and 80th percentile of the rounds.
- On a CPU a round is one call, or as many as last 20 ms, over copies of the inputs that together
  hold three times the last cache. On CUDA it is a graph of many calls, replayed between two events,
  over copies of the inputs that together hold three times the L2 cache; where a call can't be
  captured, the calls are launched between the events instead.
- Extra memory is the peak during one call beyond the inputs and the results it leaves: on CUDA the
  allocator's peak, on a CPU the kernel's peak of resident memory, libraries' workspaces included.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.testing import BudgetError, error_budget, max_error

Outputs = dict[str, Tensor]
Step = Callable[[Any], Outputs]
Judge = Callable[[Outputs, Outputs | None], Mapping[str, float]]
"""``(results, eager's results or None) -> errors``; raises ``BudgetError`` where they are large."""

# A call on a CPU that lasts longer is not repeated for its memory alone.
_LONG_CALL = 2.0
_ROUND_SECONDS = 0.05
_MOST_CALLS = 200
_MOST_COPIES = 16
_WARM_SECONDS = 0.2


class Effort(NamedTuple):
    """How long each contender is timed."""

    seconds: float
    least: int
    most: int
    repeat: float = 0.02  # what a round of short calls on a CPU lasts

    def rounds(self, call_seconds: float) -> int:
        """Rounds that fit the time, within bounds; 2 where a call fills it, 1 where twice that."""
        if call_seconds >= self.seconds:
            return 1 if call_seconds >= 2 * self.seconds else 2
        return max(self.least, min(self.most, int(self.seconds / max(call_seconds, 1e-9))))

    def calls(self, call_seconds: float) -> int:
        """Calls in a round on a CPU."""
        return max(1, min(_MOST_CALLS, math.ceil(self.repeat / max(call_seconds, 1e-9))))


QUICK = Effort(0.05, 2, 2, repeat=0.0)
NORMAL = Effort(5.0, 3, 10)
GPU = Effort(0.5, 5, 20)  # there a round is many calls
FULL = Effort(12.0, 7, 30)


class Contender(NamedTuple):
    """Somebody's way to do the case."""

    name: str
    step: Step
    checked: bool = True  # False for a floor, which has no result to check
    compiles: bool = False  # the first call also compiles
    capturable: bool = True  # does the same work inside a CUDA graph
    probe: Step | None = None  # more results, for the check alone
    units: int = 1  # tokens that a call makes, where times are those of one


class Outcome(NamedTuple):
    """What is known of one contender in one case."""

    status: str  # "timed", "wrong" or "failed"
    reason: str = ""
    seconds: tuple[float, ...] = ()
    timing: str = ""
    extra_bytes: int | None = None
    errors: Mapping[str, float] = {}


class Task(NamedTuple):
    """What is measured: inputs, and how results are judged."""

    inputs: Any
    tiny: Any  # a small version of the inputs, to load code with
    truth: Outputs
    sample: Callable[[Outputs], Outputs]
    dtype: torch.dtype
    device: str
    judge: Judge | None = None  # None: ``check`` against the truth


class _Entry:
    """A contender that has passed, on his way through the rounds."""

    def __init__(self, contender: Contender, errors: Mapping[str, float]) -> None:
        self.contender, self.errors = contender, errors
        self.extra_bytes: int | None = None
        self.call_seconds = math.inf
        self.rounds = 0
        self.calls = 1
        self.run: Callable[[], float] | None = None
        self.timing = ""
        self.seconds: list[float] = []

    def outcome(self) -> Outcome:
        return Outcome("timed", "", tuple(self.seconds), self.timing, self.extra_bytes, self.errors)


def quantile(samples: Sequence[float], share: float) -> float:
    """Linear interpolation between the ordered samples."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class ReplayClock:
    """A clock that durations measured elsewhere advance.

    pytest-benchmark times one test after the other and so can't interleave. It takes a timer as an
    option, though: with this one its rounds are the interleaved ones, measured before.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._pending: list[float] = []

    def load(self, seconds: Sequence[float]) -> None:
        """Set what the next rounds last."""
        self._now, self._pending = 0.0, list(seconds)

    def now(self) -> float:
        """The timer."""
        return self._now

    def spend(self) -> None:
        """One round."""
        if self._pending:
            self._now += self._pending.pop(0)


def race(
    task: Task, eager: Contender, others: Sequence[Contender], effort: Effort
) -> dict[str, Outcome]:
    """Check, then measure all contenders of one case together.

    Args:
        task: the case's data and its truth.
        eager: the contender whose error is the yardstick; measured like the others.
        others: the rest, in the order of the report.
        effort: how long to measure.

    Returns:
        An outcome for every contender. If eager itself can't run there is no yardstick, and nobody
        is timed.
    """
    outcomes: dict[str, Outcome] = {}
    entries: list[_Entry] = []
    # What exists already is not looked at again: collections between the calls stay short.
    gc.collect()
    gc.freeze()
    yardstick: Outputs | None = None
    for contender in [eager, *others]:
        try:
            entry, picked = _first_calls(contender, task, yardstick)
        except (BudgetError, *_FAILURES) as error:
            status = "wrong" if isinstance(error, BudgetError) else "failed"
            outcomes[contender.name] = Outcome(status, _in_words(error))
            picked, entry = None, None
        if contender is eager:
            if picked is None:
                reason = f"eager, whose error is the yardstick: {outcomes[eager.name].reason}"
                return {c.name: Outcome("failed", reason) for c in [eager, *others]}
            yardstick = picked
        if entry is not None:
            entry.rounds = effort.rounds(entry.call_seconds)
            entry.calls = effort.calls(entry.call_seconds)
            entries.append(entry)
        _release(task.device)
    _time_in_turns(entries, task)
    gc.unfreeze()
    return outcomes | {entry.contender.name: entry.outcome() for entry in entries}


_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, ImportError)


def _in_words(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return (
        first[:200] if isinstance(error, BudgetError) else f"{type(error).__name__}: {first[:200]}"
    )


def _first_calls(
    contender: Contender, task: Task, yardstick: Outputs | None
) -> tuple[_Entry, Outputs]:
    """Check one call, and take memory and a first idea of the time from it or from a second."""

    def call() -> Outputs:
        return contender.step(task.inputs)

    if task.device == "cpu" and not contender.compiles:
        # Code that is loaded or imported by the first call is not what the call needs.
        contender.step(task.tiny)
    outputs, seconds, extra = timed_peak(call, task.device)
    picked: Outputs = {}
    errors: Mapping[str, float] = {}
    if contender.checked:
        picked = {name: value.detach().clone() for name, value in task.sample(outputs).items()}
        if contender.probe is not None:
            picked |= contender.probe(task.inputs)
        if task.judge is not None:
            errors = task.judge(picked, yardstick)
        else:
            eager = picked if yardstick is None else yardstick
            errors = check(picked, eager, task.truth, task.dtype)
    del outputs
    if seconds < _LONG_CALL or contender.compiles or task.device == "cuda":
        _, seconds, extra = timed_peak(call, task.device)
    entry = _Entry(contender, errors)
    entry.call_seconds = seconds
    entry.extra_bytes = extra if contender.checked else None
    return entry, picked


def check(actual: Outputs, eager: Outputs, truth: Outputs, dtype: torch.dtype) -> dict[str, float]:
    """Largest error of every result, relative to the truth's largest value.

    Raises:
        BudgetError: a result is missing, has another shape, or is outside the budget.
    """
    if set(actual) != set(truth):
        raise BudgetError(f"results {sorted(actual)} where {sorted(truth)} are due")
    errors = {}
    for name, exact in truth.items():
        error = max_error(actual[name], exact)
        budget = error_budget(eager[name], exact, dtype)
        if not error <= budget:
            raise BudgetError(f"{name}: error {error:.2e} is over the budget {budget:.2e}")
        errors[name] = error / max(float(exact.abs().max()), torch.finfo(torch.float64).tiny)
    return errors


def _time_in_turns(entries: Sequence[_Entry], task: Task) -> None:
    copies = [task.inputs]
    pool = None
    if task.device == "cuda":
        copies = rotated(task.inputs, torch.cuda.get_device_properties(0).L2_cache_size)
        pool = torch.cuda.graph_pool_handle()
    elif any(entry.calls > 1 for entry in entries):
        copies = rotated(task.inputs, last_cache_bytes(), available_bytes())
    for entry in entries:
        step = entry.contender.step
        if task.device == "cuda":
            calls = max(1, min(_MOST_CALLS, math.ceil(_ROUND_SECONDS / entry.call_seconds)))
            entry.run, entry.timing = cuda_round(
                step, copies, calls, pool if entry.contender.capturable else None
            )
        else:
            entry.run, entry.timing = wall_round(step, copies, entry.calls), "wall"
    if task.device == "cuda":
        _warm(entries)
    for turn in range(max((entry.rounds for entry in entries), default=0)):
        first = turn % len(entries)
        for entry in [*entries[first:], *entries[:first]]:
            if turn < entry.rounds and entry.run is not None:
                entry.seconds.append(entry.run() / entry.contender.units)
    for entry in entries:
        entry.run = None
    _release(task.device)


def _warm(entries: Sequence[_Entry]) -> None:
    start = time.perf_counter()
    while time.perf_counter() - start < _WARM_SECONDS:
        for entry in entries:
            if entry.run is not None:
                entry.run()


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def wall_round(step: Step, copies: Sequence[Any], calls: int) -> Callable[[], float]:
    """Seconds of one call on a CPU; the last results are dropped after the clock has stopped."""
    turns = itertools.cycle(copies)

    def run() -> float:
        collecting = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter()
            for _ in range(calls):
                outputs = step(next(turns))
            seconds = time.perf_counter() - start
        finally:
            if collecting:
                gc.enable()
        del outputs
        return seconds / calls

    return run


def last_cache_bytes() -> int:
    """Size of the largest cache of the first core; 32 MiB where the system does not tell."""
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = path.read_text().strip()
        found.append(int(size.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(size[-1], 1))
    return max(found, default=32 * 2**20)


def available_bytes() -> int:
    """Memory that can be had without swapping; 1 GiB where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**30
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else 2**30


def rotated(inputs: Any, cache_bytes: int, free_bytes: int | None = None) -> list[Any]:
    """The inputs and copies of them, to hold three times the cache, in half the free memory."""
    size = sum(t.nbytes for t in inputs if t is not None)
    if free_bytes is None:
        free_bytes = torch.cuda.mem_get_info()[0]
    wanted = min(_MOST_COPIES, math.ceil(3 * cache_bytes / max(size, 1)))
    fitting = 1 + free_bytes // 2 // max(size, 1)
    return [inputs, *(inputs.copy() for _ in range(max(1, min(wanted, fitting)) - 1))]


def cuda_round(
    step: Step, copies: Sequence[Any], calls: int, pool: Any, cuda: Any = torch.cuda
) -> tuple[Callable[[], float], str]:
    """A function that runs ``calls`` calls and returns the seconds of one, and how it times them.

    Args:
        step: one call.
        copies: inputs to go round.
        calls: calls between two events.
        pool: memory pool that the graphs of a case share, or None for no graph.
        cuda: ``torch.cuda``, or what stands in for it in a test.
    """

    def launch() -> None:
        for call in range(calls):
            step(copies[call % len(copies)])

    work, timing = launch, "events"
    if pool is not None:
        graph = _captured(step, copies, launch, pool, cuda)
        if graph is not None:
            work, timing = graph.replay, "graph"

    def run() -> float:
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return run, timing


def _captured(
    step: Step, copies: Sequence[Any], launch: Callable[[], None], pool: Any, cuda: Any
) -> Any:
    """The launches as a graph, or None where something in them waits for the device."""
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        # Each of them: tables of addresses, made for new tensors, can't be made while capturing.
        for inputs in copies:
            step(inputs)
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    try:
        with cuda.graph(graph, pool=pool):
            launch()
    except RuntimeError:
        cuda.synchronize()
        return None
    return graph


def timed_peak(call: Callable[[], Outputs], device: str) -> tuple[Outputs, float, int | None]:
    """Results and seconds of one call, and its peak memory beyond what was there and stays."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        _trim_heap()
        before = resident_bytes("VmRSS")
        counting = _reset_peak()
    start = time.perf_counter()
    outputs = call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    elif counting:
        peak = resident_bytes("VmHWM")
    else:
        return outputs, seconds, None
    left = sum(value.nbytes for value in outputs.values())
    return outputs, seconds, max(0, peak - before - left)


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")]
    return found[0] if found else 0


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _trim_heap() -> None:
    """Hand back what glibc keeps after ``free``: reused, it would not count as new."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def summary(outcome: Outcome) -> dict[str, Any]:
    """The measured fields of a result row."""
    ms = [1e3 * seconds for seconds in outcome.seconds]
    return {
        "p50_ms": _digits(statistics.median(ms), 6), "p20_ms": _digits(quantile(ms, 0.2), 6),
        "p80_ms": _digits(quantile(ms, 0.8), 6), "rounds": len(ms), "timing": outcome.timing,
        "extra_mib": None if outcome.extra_bytes is None else round(outcome.extra_bytes / 2**20, 1),
        "errors": {name: _digits(error, 3) for name, error in outcome.errors.items()},
        "max_err": _digits(max(outcome.errors.values()), 3) if outcome.errors else None,
    }  # fmt: skip


def _digits(value: float, count: int) -> float:
    return float(f"{value:.{count}g}")


def against_floor(
    row: dict[str, Any], floor_ms: float | None, flop: int, moved: int
) -> dict[str, Any]:
    """What follows from a row's time: rates, and the share of the floor."""
    seconds = row["p50_ms"] / 1e3
    rates = {
        "flop": flop,
        "bytes": moved,
        "gflops": round(flop / seconds / 1e9, 1),
        "gbps": round(moved / seconds / 1e9, 2),
        "floor_ms": floor_ms,
        "over_floor": None,
        "floor_percent": None,
    }
    if floor_ms is not None:
        rates["over_floor"] = round(row["p50_ms"] / floor_ms, 3)
        rates["floor_percent"] = round(100 * floor_ms / row["p50_ms"], 1)
    return rates
