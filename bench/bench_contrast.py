"""Contrast: ours beside eager PyTorch, Hugging Face's processors, VCD's recipe, FlashInfer, vLLM.

    pytest bench/bench_contrast.py --benchmark-json=build/bench-contrast.json [--quick | --full]
    python bench/report.py build/bench-contrast.json

Operators on logits and hidden states, then whole generation with Self-CD. How the rows come about
is told in ``bench_token_loss``; how samplers are judged in ``truth_contrast``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases_contrast as ops
import decoding_contrast as decoding
import providers_contrast as providers
from measure import Effort, Outcome, ReplayClock, Task, race
from suite import Provider, parametrize, record
from truth_contrast import exact_draw, judge_draw, sample, truth

CLOCK = ReplayClock()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    suites = {"test_contrast": (ops, providers), "test_decoding": (decoding, decoding)}
    cases, contenders = suites[metafunc.function.__name__]
    parametrize(metafunc, cases.cases(DEVICE, quick=quick), contenders.PROVIDERS)


def task_of(case: ops.Case) -> Task:
    """Data and judgement of a case."""
    inputs = ops.make_inputs(case)
    judge = judge_draw(case, inputs, exact_draw(case, inputs)) if case.about.draws else None
    tiny = ops.make_inputs(case._replace(shape=(2, 16, 128)[-len(case.shape) :]))
    return Task(inputs, tiny, truth(case, inputs), lambda out: sample(case, inputs, out),
                case.dtype, case.device, judge)  # fmt: skip


def race_of(case: Any, task: Task, taking_part: list[Provider], eager: str, effort: Effort) -> Any:
    """The race, with eager first."""
    contenders = {p.name: p.contender(case) for p in taking_part}
    return race(task, contenders.pop(eager), list(contenders.values()), effort)


def run_race(case: ops.Case, selected: list[Provider], effort: Effort) -> dict[str, Outcome]:
    """Measure the case. The floor and eager always take part: the others are judged by them."""
    needed = (providers.floor_of(case), providers.EAGER)
    taking_part = [p for p in providers.PROVIDERS if p in selected or p.name in needed]
    if case.sweep or case.about.products or case.about.backward:
        effort = effort._replace(seconds=effort.seconds / 3)
    return race_of(case, task_of(case), taking_part, providers.EAGER, effort)


def run_decoding(
    case: decoding.Case, selected: list[Provider], effort: Effort
) -> dict[str, Outcome]:
    """The same for generation, where the released loop is what others are judged by."""
    effort = effort._replace(seconds=effort.seconds / 3)
    needed = (decoding.FLOOR, decoding.LOOP)
    taking_part = [p for p in decoding.PROVIDERS if p in selected or p.name in needed]
    return race_of(case, decoding.task_of(case), taking_part, decoding.LOOP, effort)


# A case's first test measures all of its contenders, which may take minutes.
@pytest.mark.timeout(1800)
@pytest.mark.benchmark(timer=CLOCK.now)
def test_contrast(benchmark, case, provider, races, leave_out):
    floor = providers.floor_of(case)
    record(benchmark, CLOCK, case, provider, races, leave_out, run_race, floor)


@pytest.mark.timeout(1800)
@pytest.mark.benchmark(timer=CLOCK.now)
def test_decoding(benchmark, case, provider, races, leave_out):
    record(benchmark, CLOCK, case, provider, races, leave_out, run_decoding, decoding.FLOOR)
    row = benchmark.extra_info
    row["tokens_per_s"] = round(1e3 / row["p50_ms"], 2)
