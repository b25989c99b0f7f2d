"""Orthogonality: ours beside the released loop, batched and grouped products, and one read.

    pytest bench/bench_orthogonal.py --benchmark-json=build/bench-orthogonal.json [--quick | --full]
    python bench/report.py build/bench-orthogonal.json

How the rows come about is told in ``bench_token_loss``; how results are judged in
``truth_orthogonal``.
"""

from __future__ import annotations

import pytest
import torch

from cases_orthogonal import Case, cases, make_inputs
from measure import Effort, Outcome, ReplayClock, Task, race
from providers_orthogonal import LOOP, PROVIDERS, READ
from suite import Provider, parametrize, record
from truth_orthogonal import judge_of, sample, truth

CLOCK = ReplayClock()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    parametrize(metafunc, cases(DEVICE, quick=quick), PROVIDERS)


def task_of(case: Case) -> Task:
    """Data and truth of a case."""
    inputs = make_inputs(case)
    exact = truth(case, inputs)
    return Task(
        inputs,
        make_inputs(case.tiny),
        exact.results,
        lambda outputs: sample(case, inputs, outputs),
        case.dtype,
        case.device,
        judge_of(case, exact),
    )


def run_race(case: Case, selected: list[Provider], effort: Effort) -> dict[str, Outcome]:
    """Measure the case. The floor and the loop always take part: the others are judged by them."""
    taking_part = [p for p in PROVIDERS if p in selected or p.name in (READ, LOOP)]
    contenders = {p.name: p.contender(case) for p in taking_part}
    if case.sweep:
        effort = effort._replace(seconds=effort.seconds / 3)
    return race(task_of(case), contenders.pop(LOOP), list(contenders.values()), effort)


# A case's first test measures all of its contenders, which may take minutes.
@pytest.mark.timeout(1800)
@pytest.mark.benchmark(timer=CLOCK.now)
def test_orthogonal(benchmark, case, provider, races, leave_out):
    record(benchmark, CLOCK, case, provider, races, leave_out, run_race, READ)
