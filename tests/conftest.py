"""Fixtures that the test files share: the device x implementation axis, seeds, poisoned memory."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

# Triton reads it once, when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from trimtab import _choose, ops
from trimtab.testing import poisoned_memory

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


class Case(NamedTuple):
    """One point of the device x implementation axis."""

    device: str
    impl: str


def impl_cases(op: str, dtype: torch.dtype) -> list:
    """Every case there is on this machine; what can't run carries its reason as a skip."""
    cases = []
    for device in DEVICES:
        for impl in _choose.IMPLS:
            problem = _choose.why_not(impl, op, device, dtype)
            marks = [pytest.mark.gpu] if device == "cuda" else []
            if problem is not None:
                marks.append(pytest.mark.skip(reason=f"{impl} on {device}: {problem}"))
            cases.append(pytest.param(Case(device, impl), id=f"{impl}-{device}", marks=marks))
    return cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes ``case`` once per implementation.

    ``@pytest.mark.op("linear_logp", dtype=torch.bfloat16)`` says for which operator and dtype an
    implementation must be available (without it the first public operator and float32).
    """
    if "case" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("op")
        op = marker.args[0] if marker else next(iter(ops._FAMILIES[0].CHOICES))
        dtype = marker.kwargs.get("dtype", torch.float32) if marker else torch.float32
        metafunc.parametrize("case", impl_cases(op, dtype))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test draws the same numbers, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def poison() -> Iterator[None]:
    """New memory starts as NaN, so that what a kernel leaves unwritten is seen in the result."""
    with poisoned_memory():
        yield
