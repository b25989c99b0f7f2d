"""The tables behind the Triton kernels of the orthogonal family: found again, or built anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from orthogonal_cases import integers, modules, oracle
from trimtab.testing import assert_same_bits
from trimtab.triton_kernels import orthogonal as kernels
from trimtab.triton_kernels.orthogonal import table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [((2, 3), 4, 16), ((1,), 2, 8)]


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The cache starts empty; the plans that were built."""
    monkeypatch.setattr(table, "_entries", [])
    monkeypatch.setattr(table, "_captured", [])
    plans: list[Any] = []
    make_plan = table.make_plan

    def counted(*args: Any, **kwargs: Any) -> Any:
        plans.append(make_plan(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(table, "make_plan", counted)
    return plans


def check(previous: list[list[Tensor]], current: list[Tensor], squared: bool = False) -> None:
    flat = [t for tasks in previous for t in tasks]
    value = torch.empty((), device=DEVICE)
    grad = torch.full((sum(t.numel() for t in current),), float("nan"), device=DEVICE)
    counts = [len(tasks) for tasks in previous]
    kernels.orthogonal_penalty_rows(flat, counts, current, None, squared, value, grad, None)
    truth = oracle(previous, current, "frobenius2" if squared else "l1")
    assert value.item() == truth.value
    exact = torch.cat([torch.as_tensor(g).flatten() for g in truth.current])
    assert_same_bits(grad.cpu(), exact.float())


def test_the_same_tensors_have_one_plan(built: list[Any]):
    previous, current = modules(SHAPES, integers, DEVICE)
    for _ in range(3):
        check(previous, current)
    assert len(built) == 1
    # The values are not part of it, nor are the objects.
    previous[0][0].mul_(2.0)
    check([[t.view_as(t) for t in tasks] for tasks in previous], [c.detach() for c in current])
    assert len(built) == 1


def test_storage_that_moves_is_followed(built: list[Any]):
    previous, current = modules(SHAPES, integers, DEVICE)
    check(previous, current)
    for place, tensor in enumerate((previous[0][1], current[1])):
        tensor.data = integers(*tensor.shape).to(DEVICE)
        check(previous, current)
        assert len(built) == 2 + place


def test_one_storage_in_other_shapes_and_strides(built: list[Any]):
    room = integers(64).to(DEVICE)
    current = [integers(3, 8).to(DEVICE)]
    views = [
        ((4, 8), (8, 1)),
        ((2, 8), (8, 1)),
        ((4, 8), (1, 4)),
        ((4, 8), (2, 1)),
        ((4, 8), (0, 1)),
    ]
    for size, stride in views:
        check([[room.as_strided(size, stride)]], current)
    assert len(built) == len(views)
    room.data = room.as_strided((4, 8), (8, 1))
    check([[room]], current)
    assert len(built) == len(views)


def test_tensors_in_other_modules(built: list[Any]):
    previous, current = modules([((2, 3), 4, 8), ((1,), 2, 8)], integers, DEVICE)
    check(previous, current)
    check([previous[0][:1], [previous[0][1], *previous[1]]], current)
    check([[], [*previous[0], *previous[1]]], current)
    assert len(built) == 3


def test_the_norm_and_the_dtype_have_plans_of_their_own(built: list[Any]):
    room = torch.zeros(4, 16, dtype=torch.float16, device=DEVICE)
    for dtype in (torch.float16, torch.bfloat16):
        for squared in (False, True):
            check([[room.view(dtype)]], [room.view(dtype)], squared)
    assert len(built) == 4


def test_only_the_last_sets_are_kept(built: list[Any]):
    sets = [modules(SHAPES, integers, DEVICE) for _ in range(table._LIMIT + 2)]
    for previous, current in sets:
        check(previous, current)
    assert len(table._entries) == table._LIMIT
    check(*sets[2])
    assert len(built) == len(sets)
    check(*sets[0])
    assert len(built) == len(sets) + 1
    # The one that was used last but one is still there, where it was the oldest before.
    check(*sets[2])
    assert len(built) == len(sets) + 1


def test_an_address_that_is_used_again():
    """Tensors come and go; the allocator gives their places to others of another shape."""
    seen = set()
    for step in range(30):
        d = (8, 16, 4)[step % 3]
        current = [integers(128 // d, d).to(DEVICE)]
        previous = [[integers(128 // d, d).to(DEVICE)]]
        seen.add(current[0].data_ptr())
        check(previous, current)
        del previous, current
    assert len(seen) < 30


def test_of_results_the_distances_count(built: list[Any]):
    tensors = [integers(2, 8).to(DEVICE), integers(3, 4).to(DEVICE), integers(0, 3).to(DEVICE)]
    rows = [torch.zeros(1, t.shape[1], device=DEVICE) for t in tensors]

    def project(begin: int) -> None:
        room = torch.empty(40, device=DEVICE)
        parts = room[begin : begin + 28].split([16, 12, 0])
        outs = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
        kernels.project_out_rows(tensors, rows, outs)
        for out, t in zip(outs, tensors, strict=True):
            assert_same_bits(out, t)

    keep = [torch.empty(40, device=DEVICE) for _ in range(2)]
    project(0)
    keep.pop()
    project(0)
    project(4)
    assert len(built) == 1
    project(1)
    assert len(built) == 2
    assert built[0].outs.vec == 4
    assert built[1].outs.vec == 1


def test_nothing_is_built_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call = table._Call(torch.device("cuda", 0), (torch.float32,) * 2, [1], True, False)
    none = table.Places([], [], [])
    with pytest.raises(RuntimeError, match="make one call with them before the capture"):
        table._build(call, none, none, None)


def test_interpreted_kernels_do_not_follow_addresses_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(table, "_is_interpreted", lambda: True)
    call = table._Call(torch.device("cuda", 0), (torch.float32,) * 2, [1], True, False)
    none = table.Places([], [], [])
    with pytest.raises(RuntimeError, match=r"must be on the CPU .* got cuda:0"):
        table._build(call, none, none, None)


def test_streams_and_captures(monkeypatch: pytest.MonkeyPatch):
    """A table is copied on one stream, read on others, and kept for the graphs that read it."""
    waited, recorded = [], []
    here, there = (SimpleNamespace(name=name, wait_event=waited.append) for name in "ab")
    now, capturing = [here], [False]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    buffer = SimpleNamespace(device="cuda:0", record_stream=recorded.append)
    entry = table._Entry(None, None, None, None, None, buffer, here, "copied")
    table._join(entry)
    assert (waited, recorded, table._captured) == ([], [], [])
    now[0] = there
    table._join(entry)
    assert (waited, recorded) == (["copied"], [there])
    capturing[0] = True
    for _ in range(2):
        table._join(entry)
    assert (waited, recorded) == (["copied"], [there])
    assert len(table._captured) == 1
    assert table._captured[0] is entry
