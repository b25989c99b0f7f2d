"""The compiled CPU kernels of orthogonality: bits, instruction sets, strides, hostile calls."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading

import pytest
import torch

from orthogonal_cases import check_penalty, integers, leaves, modules, normal, oracle
from trimtab import _native, orthogonal_penalty
from trimtab.testing import assert_same_bits, assert_within_budget

pytestmark = pytest.mark.skipif(
    _native.REASONS["cpu"] is not None, reason=str(_native.REASONS["cpu"])
)
ROWS = torch.ops.trimtab.orthogonal_penalty_rows
PROJECT = torch.ops.trimtab.project_out_rows
# More rows than a block and a slice have, ranks above and below a tile, widths beside a panel's.
LARGE = [
    ((400,), 3, 4100),
    ((70,), 64, 4100),
    ((300,), 5, 70),
    ((8,) * 40, 8, 1030),
    ((129,), 64, 515),
    ((700, 1), 3, 33),
    ((64,), 17, 2049),
]
WEIGHT = [0.5, 1, 2, -1, 3, 0.25, 1]
ISAS = ("generic", "avx2", "avx512", "avx512bf16")


def run(shapes, dtype=torch.float32, norm="l1", make=normal):
    torch.manual_seed(3)
    previous, current = modules(shapes, make, previous=dtype, current=dtype)
    earlier, new = leaves(previous, current)
    value = orthogonal_penalty(earlier, new, norm=norm, impl="native")
    value.backward()
    return [value.detach(), *(c.grad for c in new), *(t.grad for ts in earlier for t in ts)]


@pytest.mark.parametrize("norm", ["l1", "frobenius2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_a_block(norm, dtype):
    previous, current = modules(LARGE, integers, previous=dtype, current=dtype)
    check_penalty(lambda p, c: orthogonal_penalty(p, c, norm=norm, impl="native"),
                  previous, current, norm)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_current_alone(dtype):
    """Rows of bfloat16 go another way where nobody asks for the gradients of `previous`."""
    previous, current = modules(LARGE, integers, previous=dtype, current=dtype)
    truth = oracle(previous, current, weight=WEIGHT)
    _, new = leaves(previous, current)
    value = orthogonal_penalty(previous, new, weight=WEIGHT, impl="native")
    value.backward()
    assert value.item() == truth.value
    for leaf, exact in zip(new, truth.current, strict=True):
        assert_same_bits(leaf.grad, torch.as_tensor(exact).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(dtype):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(LARGE, dtype)
        torch.set_num_threads(2)
        for together, once in zip(run(LARGE, dtype), alone, strict=True):
            assert_same_bits(together, once)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_other_modules(dtype):
    previous, current = modules(LARGE, previous=dtype, current=dtype)
    _, new = leaves(previous, current)
    orthogonal_penalty(previous, new, impl="native").backward()
    for m in range(len(LARGE)):
        (alone,) = leaves([], [current[m]])[1]
        orthogonal_penalty([previous[m]], [alone], impl="native").backward()
        assert_same_bits(new[m].grad, alone.grad)


def test_transposed_rows_have_the_bits_of_rows():
    """Reading rows that are columns in memory moves them, and computes nothing."""
    for dtype in (torch.float32, torch.float64):
        plain = run(LARGE, dtype)
        turned = run(
            LARGE, dtype, make=lambda *s, dtype: normal(*s, dtype=dtype).mT.contiguous().mT
        )
        for ours, rows in zip(turned, plain, strict=True):
            assert_same_bits(ours, rows)


def supports(isa: str) -> bool:
    """Whether this processor has an instruction set."""
    if isa == "generic":
        return True
    with open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    return {"avx2": "avx2", "avx512": "avx512bw", "avx512bf16": "avx512_bf16"}[isa] in flags


CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import torch
from test_orthogonal_native import LARGE, integers, run
from test_project_out import SHAPES, eager, oracle, pairs
from trimtab import project_out
from trimtab.testing import assert_within_budget
answer = []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for norm in ("l1", "frobenius2"):
        for result in run(LARGE, dtype, norm, integers):
            answer.append([float(result.double().sum()), float(result.double().square().sum())])
    for out, t, q in zip(project_out(*pairs(dtype), impl="native"), *pairs(dtype)):
        assert out.shape == t.shape
    torch.manual_seed(5)
    tensors, bases = pairs(dtype)
    for out, t, q in zip(project_out(tensors, bases, impl="native"), tensors, bases):
        scale = float(t.abs().max()) if t.numel() else 0.0
        assert_within_budget(out, eager(t, q), oracle(t, q), scale=scale)
print(json.dumps(answer))
"""


def answers(isa: str) -> list:
    environment = {**os.environ, "TRIMTAB_CPU_ISA": isa}
    path = [os.path.dirname(__file__), *sys.path]
    command = [sys.executable, "-c", CHILD, json.dumps(path)]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there is one instruction set")
def test_all_instruction_sets_agree():
    """On integers, whose products and sums are exact whatever their order."""
    found = {isa: answers(isa) for isa in ISAS if supports(isa)}
    assert all(answer == found["generic"] for answer in found.values())


def test_an_instruction_set_that_is_not_there_is_an_error():
    environment = {**os.environ, "TRIMTAB_CPU_ISA": "avx1024"}
    program = (
        "import torch, trimtab; trimtab.orthogonal_penalty([torch.ones(1, 1)], [torch.ones(1, 1)])"
    )
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert child.returncode != 0
    assert "TRIMTAB_CPU_ISA must be" in child.stderr


def test_many_threads_at_once():
    expected, results = run(LARGE[:3]), []

    def work():
        previous, current = inputs
        results.append(orthogonal_penalty(previous, current, impl="native"))

    torch.manual_seed(3)
    inputs = modules(LARGE[:3])
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in results:
        assert_same_bits(value, expected[0])
    assert len(results) == 8


def test_products_without_a_write_beside_the_buffers():
    """The flat gradients are parts of larger memory, whose other numbers must stay."""
    previous, current = modules([((5,), 3, 7), ((2, 1), 1, 33)], integers)
    flat = [t for tasks in previous for t in tasks]
    around = torch.full((200,), 7.0)
    size = sum(c.numel() for c in current)
    value = torch.zeros(())
    ROWS(flat, [1, 2], current, None, False, value, around[50 : 50 + size], None)
    truth = oracle(previous, current)
    exact = torch.cat([torch.as_tensor(g).flatten() for g in truth.current]).float()
    assert_same_bits(around[50 : 50 + size], exact)
    assert bool((around[:50] == 7).all())
    assert bool((around[50 + size :] == 7).all())


P, C = torch.ones(4, 5), torch.ones(2, 5)
VALUE, GRAD = torch.zeros(()), torch.zeros(10)
HOSTILE = [
    ([P], [2], [C], None, VALUE, None),
    ([P], [1, 0], [C], None, VALUE, None),
    ([P], [-1], [C], None, VALUE, None),
    ([], [0], [], None, VALUE, None),
    ([P[0]], [1], [C], None, VALUE, None),
    ([P[:, :4]], [1], [C], None, VALUE, None),
    ([P], [1], [C[0]], None, VALUE, None),
    ([P.double()], [1], [C], None, VALUE, None),
    ([P], [1], [C.double()], None, VALUE, None),
    ([P.long()], [1], [C], None, VALUE, None),
    ([P, P.half()], [2], [C], None, VALUE, None),
    ([P], [1], [C], torch.ones(2), VALUE, None),
    ([P], [1], [C], torch.ones(1).double(), VALUE, None),
    ([P], [1], [C], None, torch.zeros(2), None),
    ([P], [1], [C], None, VALUE.double(), None),
    ([P], [1], [C], None, VALUE, torch.zeros(9)),
    ([P], [1], [C], None, VALUE, torch.zeros(2, 5)),
    ([P], [1], [C], None, VALUE, torch.zeros(20)[::2]),
    ([P], [1], [C], None, VALUE, GRAD.half()),
]


@pytest.mark.parametrize("arguments", HOSTILE, ids=range(len(HOSTILE)))
def test_a_wrong_call_of_the_penalty_raises(arguments):
    previous, counts, current, weight, value, grad = arguments
    with pytest.raises(RuntimeError, match="must"):
        ROWS(previous, counts, current, weight, False, value, grad, None)


@pytest.mark.parametrize(
    ("tensors", "bases", "outs"),
    [([P], [], [P.clone()]), ([P], [P], []), ([P], [C[:, :3]], [P.clone()]),
     ([P], [C.half()], [P.clone()]), ([P], [C], [P.half()]), ([P], [C], [torch.zeros(5, 4).mT]),
     ([P[0]], [C], [P[0].clone()]), ([P], [C], [torch.zeros(4, 4)])],
)  # fmt: skip
def test_a_wrong_call_of_the_projection_raises(tensors, bases, outs):
    with pytest.raises(RuntimeError, match="must"):
        PROJECT(tensors, bases, outs)


def test_bfloat16_rows_beside_columns():
    """Each side decides for itself how it is read."""
    previous, current = modules([((9, 4), 5, 67)], integers, "cpu", torch.bfloat16, torch.bfloat16)
    turned = [current[0].mT.contiguous().mT]
    for p, c in ((previous, turned), ([[t.mT.contiguous().mT for t in previous[0]]], current)):
        leaf = c[0].detach().requires_grad_()
        value = orthogonal_penalty(p, [leaf], impl="native")
        value.backward()
        truth = oracle(p, c)
        assert value.item() == truth.value
        assert_same_bits(leaf.grad, torch.as_tensor(truth.current[0]).bfloat16())


def test_counts_that_wrap_around_raise():
    with pytest.raises(RuntimeError, match="counts must be of the tensors of previous"):
        ROWS([P], [2**62, 2**62, 2**62, 2**62 + 1], [C] * 4, None, False, VALUE, None, None)


def test_freed_memory_raises():
    freed = torch.ones(4, 5)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="must have memory"):
        ROWS([freed], [1], [C], None, False, VALUE, None, None)


POOL = torch.zeros(60)


@pytest.mark.parametrize(
    ("value", "current", "previous", "grad_current", "grad_previous"),
    [(VALUE, C, P, POOL[:10], POOL[9:29]), (POOL[3], C, P, POOL[:10], None),
     (POOL[3], C, P, None, POOL[:20]), (VALUE, C, P, None, P.view(-1)),
     (VALUE, POOL[8:18].view(2, 5), P, POOL[:10], None), (C[1, 4], C, P, None, None),
     (VALUE, C, POOL[5:25].view(4, 5), POOL[:10], None)],
)  # fmt: skip
def test_outputs_of_the_penalty_that_share_memory_raise(
    value, current, previous, grad_current, grad_previous
):
    before = [t.clone() for t in (POOL, VALUE, C, P)]
    with pytest.raises(RuntimeError, match="must not share memory with"):
        ROWS([previous], [1], [current], None, False, value, grad_current, grad_previous)
    for ours, kept in zip((POOL, VALUE, C, P), before, strict=True):
        assert_same_bits(ours, kept)


@pytest.mark.parametrize(
    ("tensors", "bases", "outs"),
    [([P], [C], [P]), ([P, P], [C, C], [POOL[:20].view(4, 5), POOL[19:39].view(4, 5)]),
     ([POOL[10:30].view(4, 5)], [C], [POOL[:20].view(4, 5)]),
     ([P], [POOL[19:29].view(2, 5)], [POOL[:20].view(4, 5)]),
     ([P, POOL[:20].view(4, 5)], [C, C], [POOL[:20].view(4, 5), P.clone()])],
)  # fmt: skip
def test_outputs_of_the_projection_that_share_memory_raise(tensors, bases, outs):
    before = POOL.clone()
    with pytest.raises(RuntimeError, match="outs must not share memory with"):
        PROJECT(tensors, bases, outs)
    assert_same_bits(POOL, before)


@pytest.mark.parametrize(
    ("rows", "rank", "width"),
    [(700, 8, 252), (5000, 8, 64), (100000, 8, 16), (448, 64, 512), (1000, 32, 300)],
)
def test_gradients_of_many_rows_stay_within_the_budget(rows, rank, width):
    """Sums of a module's rows stay short: eager's are as well."""
    for seed in range(2):
        torch.manual_seed(seed)
        p, c = torch.randn(rows, width), torch.randn(rank, width)
        leaves = [t.clone().requires_grad_() for t in (c, c)]
        exact = 2 * (p.double() @ c.double().mT).mT @ p.double()
        orthogonal_penalty([p], [leaves[0]], norm="frobenius2", impl="native").backward()
        (p @ leaves[1].mT).square().sum().backward()
        assert_within_budget(leaves[0].grad, leaves[1].grad, exact)


@pytest.mark.parametrize("place", ["previous", "current", "product"])
def test_subnormal_numbers_count(place):
    """The products of bfloat16 pairs take them for 0; rows that could have one go another way."""
    p, c = torch.full((33, 70), 2.0**100), torch.full((9, 70), 2.0**100)
    if place == "product":
        p[:], c[:] = 2.0**-70, 2.0**-70
    else:
        {"previous": p, "current": c}[place][:] = 2.0**-130
    leaf = c.bfloat16().requires_grad_()
    value = orthogonal_penalty([p.bfloat16()], [leaf], impl="native")
    value.backward()
    assert value.item() == 33 * 9 * 70 * float(p[0, 0]) * float(c[0, 0])
    assert_same_bits(leaf.grad, (33 * p[:9]).bfloat16())


def test_an_infinite_last_row_stays_infinite():
    """Where the rows are odd, none is paired with it."""
    for rows in (1, 3, 9, 33):
        p, c = torch.ones(rows, 21).bfloat16(), torch.ones(5, 21).bfloat16().requires_grad_()
        p[-1] = float("inf")
        value = orthogonal_penalty([p], [c], impl="native")
        value.backward()
        assert value.item() == float("inf")
        assert bool((c.grad == float("inf")).all())


def test_projected_rows_do_not_depend_on_threads_or_on_each_other():
    torch.manual_seed(0)
    tensor, basis = torch.randn(70, 300), torch.linalg.qr(torch.randn(300, 40))[0].mT
    before, found = torch.get_num_threads(), []
    try:
        for threads, rows in ((1, 70), (2, 70), (2, 1), (2, 9)):
            torch.set_num_threads(threads)
            tensors = tensor.split(rows)
            outs = [torch.empty_like(t) for t in tensors]
            for t, out in zip(tensors, outs, strict=True):
                PROJECT([t], [basis], [out])
            found.append(torch.cat(outs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])
