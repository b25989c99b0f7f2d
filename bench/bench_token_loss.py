"""Token loss: ours beside eager PyTorch and its chunked form, Liger, CCE, QuACK, and the products.

    pytest bench/bench_token_loss.py --benchmark-json=build/bench-token_loss.json [--quick | --full]
    python bench/report.py build/bench-token_loss.json

All contenders of a case are measured in one race (``measure.race``), which the first test of the
case starts. pytest-benchmark then gets each contender's rounds through a clock that replays them
(``measure.ReplayClock``), so that its tables and its JSON show the interleaved measurement.
"""

from __future__ import annotations

import pytest
import torch

from cases_token_loss import Case, cases, make_inputs, sample, truth
from measure import Effort, Outcome, ReplayClock, Task, race
from providers_token_loss import EAGER, FLOOR, PROVIDERS
from suite import Provider, parametrize, record

CLOCK = ReplayClock()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    parametrize(metafunc, cases(DEVICE, quick=quick), PROVIDERS)


def run_race(case: Case, providers: list[Provider], effort: Effort) -> dict[str, Outcome]:
    """Measure the case. The floor and eager always take part: the others are judged by them."""
    inputs, tiny = make_inputs(case), make_inputs(case._replace(rows=16, width=32, classes=64))
    task = Task(
        inputs,
        tiny,
        truth(case, inputs),
        lambda outputs: sample(case, inputs, outputs),
        case.dtype,
        case.device,
    )
    taking_part = [p for p in PROVIDERS if p in providers or p.name in (FLOOR, EAGER)]
    contenders = {p.name: p.contender(case) for p in taking_part}
    if case.sweep:
        effort = effort._replace(seconds=effort.seconds / 3)
    return race(task, contenders.pop(EAGER), list(contenders.values()), effort)


# A case's first test measures all of its contenders, which may take minutes.
@pytest.mark.timeout(1800)
@pytest.mark.benchmark(timer=CLOCK.now)
def test_token_loss(benchmark, case, provider, races, leave_out):
    record(benchmark, CLOCK, case, provider, races, leave_out, run_race, FLOOR)
