"""The benchmark's own arithmetic: truth, gate, turns, memory, rotation, replay. No times."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
try:
    cases, measure, providers = (
        importlib.import_module(name)
        for name in ("cases_token_loss", "measure", "providers_token_loss")
    )
finally:
    sys.path.remove(str(ROOT / "bench"))

MODES = list(cases.MODES)
MIB = 2**20


def small(mode: str, dtype: str = "float32") -> Any:
    return cases.Case(mode, dtype, 40, 16, 96, "cpu")


def step_of(name: str, case: Any) -> Any:
    return next(p for p in providers.PROVIDERS if p.name == name).step(case)


def task_of(case: Any) -> Any:
    inputs = cases.make_inputs(case)
    return measure.Task(
        inputs, inputs, cases.truth(case, inputs), lambda out: cases.sample(case, inputs, out),
        case.dtype, case.device,
    )  # fmt: skip


# The truth, the work and who takes part


@pytest.mark.parametrize("mode", MODES)
def test_the_truth_is_what_eager_gives_in_float64(mode):
    case = small(mode)
    inputs = cases.make_inputs(case)
    exact = inputs._replace(
        **{
            name: tensor.detach().double().requires_grad_(tensor.requires_grad)
            for name, tensor in inputs._asdict().items()
            if tensor is not None and tensor.is_floating_point()
        }
    )
    found = cases.sample(case, inputs, step_of("eager", case)(exact))
    truth = cases.truth(case, inputs)
    assert set(found) == set(truth)
    for name, value in truth.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_floor_makes_the_products_that_are_counted(mode):
    case = small(mode)
    inputs = cases.make_inputs(case)
    with FlopCounterMode(display=False) as counter:
        step_of(providers.FLOOR, case)(inputs)
    assert counter.get_total_flops() == case.flop


def test_half_the_tokens_are_half_the_work():
    half, full = small("half"), small("weighted")
    inputs = cases.make_inputs(half)
    counted = (inputs.target != cases.IGNORED) & (inputs.token_weight != 0)
    assert int(counted.sum()) == half.active_rows == full.active_rows // 2
    assert half.flop == full.flop // 2
    assert bool((inputs.target == cases.IGNORED).any())
    assert bool((inputs.token_weight == 0).any())


def test_bytes_are_one_read_of_the_inputs_and_one_write_of_the_gradients():
    n, d, v = 40, 16, 96
    assert small("weighted").bytes == 4 * 2 * (n * d + v * d)
    assert small("frozen").bytes == 4 * (2 * n * d + v * d)
    assert small("logp", "bfloat16").bytes == 2 * (n * d + v * d)
    assert small("rows").bytes == 4 * 2 * n * v


def test_data_is_the_same_for_every_mode_and_copies_share_nothing():
    first, second = (cases.make_inputs(small(mode)) for mode in ("weighted", "none"))
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.head, second.head)
    copied = first.copy()
    assert copied.x.requires_grad
    assert torch.equal(copied.head, first.head)
    assert copied.head.data_ptr() != first.head.data_ptr()


def test_whoever_does_not_run_says_why():
    for provider in providers.PROVIDERS:
        for mode in MODES:
            reason = provider.reason(small(mode), full=False)
            assert reason is None or len(reason) > 10
    triton = next(p for p in providers.PROVIDERS if p.name == "trimtab triton")
    assert "never timed" in triton.reason(small("weighted"), full=True)


# The gate


def broken(outputs: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    if how == "missing result":
        return {"loss": outputs["loss"]}
    changed = {name: value.clone() for name, value in outputs.items()}
    if how == "wrong divisor":
        return {name: value * 40 / 39 for name, value in changed.items()}
    if how == "chunk left out":
        changed["grad_input"][-10:] = 0
    elif how == "one class twice":
        changed["grad_weight"][-1] *= 2
    elif how == "not a number":
        changed["grad_weight"][0, 0] = float("nan")
    return changed


def contest(case: Any, *others: Any) -> dict[str, Any]:
    eager = measure.Contender("eager", step_of("eager", case))
    return measure.race(task_of(case), eager, others, measure.QUICK)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "how", ["missing result", "wrong divisor", "chunk left out", "one class twice", "not a number"]
)
def test_a_wrong_contender_is_not_timed(how, dtype):
    case = small("weighted", dtype)
    right = step_of("trimtab reference", case)
    wrong = measure.Contender("wrong", lambda inputs: broken(right(inputs), how))
    outcomes = contest(case, wrong, measure.Contender("right", right))
    assert outcomes["wrong"].status == "wrong"
    assert outcomes["wrong"].seconds == ()
    assert outcomes["wrong"].reason
    assert outcomes["right"].status == "timed"
    assert set(outcomes["right"].errors) == {"loss", "grad_input", "grad_weight"}


def test_a_dropped_weight_is_not_timed():
    case = small("weighted")
    right = step_of("trimtab reference", case)

    def unweighted(inputs: Any) -> Any:
        return right(inputs._replace(token_weight=torch.ones_like(inputs.token_weight)))

    assert contest(case, measure.Contender("wrong", unweighted))["wrong"].status == "wrong"


def test_a_contender_that_raises_is_reported_and_the_others_go_on():
    def fails(inputs: Any) -> Any:
        raise RuntimeError("no kernel for this shape\nand a long trace")

    case = small("mean")
    right = measure.Contender("right", step_of("trimtab reference", case))
    outcomes = contest(case, measure.Contender("fails", fails), right)
    assert outcomes["fails"].status == "failed"
    assert outcomes["fails"].reason == "RuntimeError: no kernel for this shape"
    assert outcomes["right"].status == "timed"


def test_without_eager_there_is_no_yardstick():
    def fails(inputs: Any) -> Any:
        raise RuntimeError("out of memory")

    case = small("mean")
    right = measure.Contender("right", step_of("trimtab reference", case))
    outcomes = measure.race(
        task_of(case), measure.Contender("eager", fails), [right], measure.QUICK
    )
    assert {outcome.status for outcome in outcomes.values()} == {"failed"}
    assert "yardstick" in outcomes["right"].reason


# Turns, memory, rotation and replay


def test_contenders_take_turns_and_each_begins_once(monkeypatch):
    order: list[str] = []

    def logged(step: Any, copies: Any, calls: int) -> Any:
        return lambda: order.append(step.__name__) or 1.0

    monkeypatch.setattr(measure, "wall_round", logged)
    entries = []
    for name, rounds in (("a", 4), ("b", 4), ("slow", 2)):
        step = lambda inputs: {}  # noqa: E731
        step.__name__ = name
        entries.append(measure._Entry(measure.Contender(name, step), {}))
        entries[-1].rounds = rounds
    measure._time_in_turns(entries, task_of(small("mean")))
    assert order == ["a", "b", "slow", "b", "slow", "a", "a", "b", "a", "b"]
    assert [len(entry.seconds) for entry in entries] == [4, 4, 2]


def test_slow_contenders_take_fewer_rounds():
    effort = measure.Effort(seconds=5.0, least=3, most=15)
    assert [effort.rounds(s) for s in (1e-3, 1.0, 2.4, 5.0, 11.0)] == [15, 5, 3, 2, 1]


def test_quantiles_are_numpys():
    samples = [5.0, 1.0, 4.0, 2.5, 9.0, 7.0]
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert measure.quantile(samples, share) == pytest.approx(numpy.quantile(samples, share))


def test_a_row_has_the_median_and_its_spread():
    outcome = measure.Outcome("timed", "", (0.005, 0.001, 0.002, 0.004, 0.003, 0.006), "wall")
    row = measure.summary(outcome)
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"], row["rounds"]) == (2.0, 3.5, 5.0, 6)
    assert row["max_err"] is None


def test_the_clock_replays_what_was_measured():
    clock = measure.ReplayClock()
    clock.load([0.25, 1.5])
    lasted = []
    for _ in range(2):
        start = clock.now()
        clock.spend()
        lasted.append(clock.now() - start)
    assert lasted == pytest.approx([0.25, 1.5])


def test_extra_memory_is_the_peak_beyond_inputs_and_results():
    if not measure._reset_peak():
        pytest.skip("this system does not reset the peak of resident memory")

    def call() -> dict[str, torch.Tensor]:
        passing = torch.ones(96 * MIB // 4)
        return {"kept": torch.ones(32 * MIB // 4), "sum": passing.sum()}

    call()
    _, seconds, extra = measure.timed_peak(call, "cpu")
    assert extra / MIB == pytest.approx(96, abs=4)
    assert seconds > 0


def test_inputs_rotate_past_the_cache_and_stay_in_memory():
    inputs = cases.make_inputs(small("weighted"))
    size = sum(tensor.nbytes for tensor in inputs if tensor is not None)
    plenty = 1000 * size
    assert len(measure.rotated(inputs, size, plenty)) == 3
    assert len(measure.rotated(inputs, size // 100, plenty)) == 1
    assert len(measure.rotated(inputs, 100 * size, plenty)) == 16
    assert len(measure.rotated(inputs, 100 * size, 4 * size)) == 3
    pointers = [copy.head.data_ptr() for copy in measure.rotated(inputs, size, plenty)]
    assert len(set(pointers)) == 3


class FakeCuda:
    """Stands in for torch.cuda: a graph that records launches, events that tick 1 ms a call."""

    def __init__(self, capturable: bool) -> None:
        self.capturable, self.launched, self.captured = capturable, [], []
        self.capturing, self.clock = False, 0.0
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = None

            def record(self) -> None:
                self.at = outer.clock

            def synchronize(self) -> None:
                assert self.at is not None

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        class CUDAGraph:
            def replay(self) -> None:
                outer.launched += outer.captured
                outer.clock += len(outer.captured)

        self.Event, self.CUDAGraph = Event, CUDAGraph
        self.Stream = lambda: self
        self.current_stream = lambda: self

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any) -> Any:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False

    def step(self, inputs: Any) -> None:
        if self.capturing:
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.captured.append(inputs)
        else:
            self.launched.append(inputs)
            self.clock += 1.0


@pytest.mark.parametrize(
    ("capturable", "pool", "timing"),
    [(True, "pool", "graph"), (False, "pool", "events"), (True, None, "events")],
)
def test_a_round_on_cuda_goes_round_the_copies(capturable, pool, timing):
    cuda = FakeCuda(capturable)
    run, how = measure.cuda_round(cuda.step, ["a", "b", "c"], 7, pool, cuda)
    # What a contender makes once for each set of tensors is there before the capture.
    assert cuda.launched == (list("abc") if pool else [])
    cuda.launched.clear()
    assert run() == pytest.approx(1e-3)
    assert how == timing
    assert cuda.launched == list("abcabca")


def test_a_race_on_cuda_measures_graphs_where_it_can(monkeypatch):
    cuda = FakeCuda(capturable=True)
    allocated = iter(range(100, 10_000, 100))
    fakes = {
        "Event": cuda.Event, "CUDAGraph": cuda.CUDAGraph, "Stream": cuda.Stream,
        "current_stream": cuda.current_stream, "stream": cuda.stream, "graph": cuda.graph,
        "synchronize": cuda.synchronize,
        "graph_pool_handle": lambda: "pool", "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: MIB + next(allocated),
        "mem_get_info": lambda: (2**30, 2**30),
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=30_000),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(measure, "_WARM_SECONDS", 0.0)
    # Two rounds of 16 calls, however long one takes on a busy machine.
    monkeypatch.setattr(measure, "_ROUND_SECONDS", 1e9)
    monkeypatch.setattr(measure, "_MOST_CALLS", 16)
    case = small("weighted")
    right = step_of("trimtab reference", case)

    def ticking(inputs: Any) -> Any:
        cuda.step(inputs)
        return right(inputs)

    eager = measure.Contender("eager", ticking)
    others = [measure.Contender("looks at the data", ticking, capturable=False)]
    task = task_of(case)._replace(device="cuda")
    outcomes = measure.race(task, eager, others, measure.QUICK._replace(seconds=1e9))
    assert [outcome.timing for outcome in outcomes.values()] == ["graph", "events"]
    kept = sum(value.nbytes for value in right(task.inputs).values())
    # Of two calls the second counts: the first one loads and compiles.
    assert outcomes["eager"].extra_bytes == MIB + 200 - kept
    assert outcomes["looks at the data"].seconds == pytest.approx([1e-3, 1e-3])
    copies = {inputs.head.data_ptr() for inputs in cuda.captured}
    assert len(copies) == len(measure.rotated(task.inputs, 30_000, 2**30)) > 1
