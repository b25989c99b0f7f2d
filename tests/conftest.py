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
    harness: bool = False  # the CUDA kernels on CPU tensors: see tests/cuda_on_cpu

    @property
    def interpreted(self) -> bool:
        """Whether it runs in Triton's interpreter, which computes in Python."""
        return self.device == "cpu" and self.impl == "triton"

    @property
    def for_gpus(self) -> bool:
        """Whether the kernels are a GPU's: no float64, sums in an order that the layout decides."""
        return (
            self.impl == "triton"
            or self.harness
            or (self.device, self.impl)
            == (
                "cuda",
                "native",
            )
        )

    def skip_unless_taken(self, *dtypes: torch.dtype) -> None:
        """Skips the test where the kernels, or what they run in, can't do one of the dtypes."""
        if self.for_gpus and torch.float64 in dtypes:
            pytest.skip("the kernels for GPUs take no float64")
        if self.interpreted and torch.bfloat16 in dtypes:
            pytest.skip("Triton's interpreter truncates what it stores in bfloat16")


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
    if dtype in _choose._GPU_DTYPES and _choose.why_not("native", op, "cpu", dtype) is None:
        cases.append(pytest.param(Case("cpu", "native", harness=True), id="native-cuda_on_cpu"))
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
def kernels_of_the_case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ``impl="native"`` be the CUDA kernels in the cases that say so."""
    case = getattr(getattr(request.node, "callspec", None), "params", {}).get("case")
    if isinstance(case, Case) and case.harness:
        from cuda_on_cpu import library

        for family in library.ASKS:
            library.public(family, monkeypatch)


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
