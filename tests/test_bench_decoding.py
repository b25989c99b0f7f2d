"""The benchmark of Self-CD generation: contenders, judge, and the time of one token."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from trimtab.testing import BudgetError

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
try:
    cases, decoding, measure = (
        importlib.import_module(name) for name in ("cases_contrast", "decoding_contrast", "measure")
    )
finally:
    sys.path.remove(str(ROOT / "bench"))


@pytest.mark.parametrize("batch", [0, 1])
def test_everybody_generates_the_same_tokens(batch):
    case = decoding.cases("cpu", quick=True)[batch]
    inputs = decoding.make_inputs(case)
    judge = decoding.judge_tokens(case, inputs)
    by_name = {p.name: p for p in decoding.PROVIDERS}
    loop = by_name[decoding.LOOP].step(case)(inputs)
    assert judge(loop, None) == {"shortfall": 0.0}
    for name in ("trimtab reference", "Hugging Face guidance"):
        found = by_name[name].step(case)(inputs)
        judge(found, loop)
        assert found["token"].shape == (case.batch, case.new)
        count = decoding.loop_tokens(case)
        assert torch.equal(found["token"][:1, :count], loop["token"])


def test_tokens_of_another_contrast_do_not_pass():
    case = decoding.cases("cpu", quick=True)[1]
    inputs = decoding.make_inputs(case)
    judge = decoding.judge_tokens(case, inputs)
    loop = next(p for p in decoding.PROVIDERS if p.name == decoding.LOOP).step(case)
    right = loop(inputs)
    with pytest.raises(BudgetError, match="below the largest"):
        judge(loop(decoding.Inputs(inputs.negative, inputs.positive)), None)
    late = right["token"].clone()
    late[0, -1] = (late[0, -1] + 1) % 128
    with pytest.raises(BudgetError, match="below the largest"):
        judge({"token": late}, None)
    with pytest.raises(BudgetError, match="tokens are due"):
        judge({"token": right["token"][:, :-1]}, None)


def test_forwards_alone_are_one_pass_per_token_of_both_contexts():
    case = decoding.cases("cpu", quick=True)[1]
    inputs = decoding.make_inputs(case)
    model = decoding.model_of(case.size, case.dtype, case.device)
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape)) if args else None
    )
    last = decoding.forwards(case, model, inputs)
    model._forward_pre_hooks.clear()
    width = inputs.negative.shape[1]
    assert shapes == [(6, width), *[(6, 1)] * (case.new - 1)]
    assert last.shape == (6, 128)


def test_times_are_those_of_one_token():
    step = lambda inputs: {"token": torch.zeros(1)}  # noqa: E731
    inputs = cases.make_inputs(cases.Case("free", "float32", (2, 64), "cpu"))
    task = measure.Task(inputs, None, {}, lambda out: out, torch.float32, "cpu")
    entries = [measure._Entry(measure.Contender("one", step), {}),
               measure._Entry(measure.Contender("eight", step, units=8), {})]  # fmt: skip
    for entry in entries:
        entry.rounds, entry.run = 1, None
    original = measure.wall_round
    measure.wall_round = lambda *_: lambda: 2.0
    try:
        measure._time_in_turns(entries, task)
    finally:
        measure.wall_round = original
    assert [entry.seconds for entry in entries] == [[2.0], [0.25]]


def test_short_calls_go_round_copies():
    seen: list[int] = []
    run = measure.wall_round(lambda inputs: seen.append(inputs) or {}, [1, 2, 3], 4)
    run()
    run()
    assert seen == [1, 2, 3, 1, 2, 3, 1, 2]
    assert [measure.NORMAL.calls(s) for s in (1.0, 0.02, 0.001, 1e-6)] == [1, 1, 20, 200]
    assert measure.QUICK.calls(1e-6) == 1
    assert measure.last_cache_bytes() >= 2**20
    assert measure.available_bytes() > 2**20
