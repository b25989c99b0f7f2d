"""The fixtures themselves: a guard that guards nothing would pass everything."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import trimtab
from conftest import Case, impl_cases
from trimtab import _choose, _native

ORIGINALS = (torch.empty, torch.empty_like, torch.Tensor.new_empty)


def allocations() -> list[torch.Tensor]:
    """Memory that torch promises nothing of."""
    like = torch.zeros(4096)
    return [torch.empty(4096), torch.empty_like(like), like.new_empty(4096)]


@pytest.mark.usefixtures("poison")
def test_poison_fills_new_memory():
    assert all(tensor.isnan().all() for tensor in allocations())


def test_poison_is_gone_afterwards():
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == ORIGINALS


def test_the_seed_is_the_same_for_every_test(seed):
    first = torch.rand(3)
    torch.manual_seed(seed)
    assert torch.equal(first, torch.rand(3))


def test_cases_name_each_implementation_once():
    cases = [case.values[0] for case in impl_cases("linear_logp", torch.float32)]
    assert len(set(cases)) == len(cases)
    assert {Case("cpu", "reference"), Case("cpu", "native", harness=True)} <= set(cases)


def test_a_case_that_can_not_run_says_why():
    marks = {case.id: case.marks for case in impl_cases("linear_logp", torch.complex64)}
    reason = marks["native-cpu"][0].kwargs["reason"]
    assert "native on cpu" in reason
    assert not marks["reference-cpu"]


def test_nothing_is_skipped_that_this_machine_could_run():
    """A library that fails to load must not turn into a green run of skips."""
    info = json.loads(Path(trimtab.__file__).with_name("_build_info.json").read_text())
    built = info["libraries"]["cpu"]["built"]
    problems = {
        impl: _choose.why_not(impl, "linear_logp", "cpu", torch.float32)
        for impl in ("native", "triton")
    }
    assert built == (problems["native"] is None)
    if not built:
        assert shutil.which("g++") is None or info["mode"] == "python"
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert problems["triton"] is None


@pytest.mark.parametrize(
    ("capability", "dtype", "impl", "reason"),
    [
        ((9, 0), torch.bfloat16, "native", "fastest available"),
        (
            (7, 5),
            torch.float16,
            "triton",
            "linear_logp need compute capability 8.0, this GPU has 7.5",
        ),
        ((9, 0), torch.float64, "reference", "torch.float64 is not taken by linear_logp in native"),
    ],
)
def test_the_choice_on_a_gpu(monkeypatch, capability, dtype, impl, reason):
    monkeypatch.setitem(_native.REASONS, "cuda", None)
    monkeypatch.setattr(_choose, "_capability", lambda: capability)
    found = _choose.choose("linear_logp", "cuda", dtype)
    assert found.impl == impl
    assert reason in found.reason


def test_the_cuda_library_without_a_gpu_gives_a_reason(monkeypatch):
    """A CUDA torch on a machine without one, where fake tensors ask."""
    monkeypatch.setitem(_native.REASONS, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _choose._capability.cache_clear()
    try:
        found = _choose.choose("linear_logp", "cuda", torch.float32)
    finally:
        _choose._capability.cache_clear()
    assert found.impl != "native"
    assert "no GPU to run them on" in found.reason
