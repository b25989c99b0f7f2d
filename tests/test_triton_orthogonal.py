"""The Triton kernels of the orthogonal family, launched directly."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

import orthogonal_rows as rows
from orthogonal_cases import integers, modules, normal, oracle
from orthogonal_rows import LAYOUTS, in_room, truth_of
from trimtab.testing import assert_same_bits, assert_within_budget, max_error
from trimtab.triton_kernels import orthogonal as kernels
from trimtab.triton_kernels.orthogonal import launch, plan, products, table

# Infinities and NaN pass in silence on a GPU; numpy, which runs the interpreter, warns of them.
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
NORMS = ("l1", "frobenius2")
WEIGHT = [0.5, -2.0, 1.0, 0.0, 3.0, 1.0, 0.25, 1.0, 1.0, -0.125]
SMALL = [((2, 3), 4, 16), ((1,), 2, 8)]
Nested = list[list[Tensor]]


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    table._entries.clear()


run = partial(rows.run_penalty, kernels)
check_exactly = partial(rows.check_exactly, run)
project = partial(rows.project, kernels)
pairs = partial(rows.pairs, device=DEVICE)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("earlier", "new"),
    [
        (SINGLE, SINGLE),
        (HALF, HALF),
        (BRAIN, BRAIN),
        (BRAIN, SINGLE),
        (SINGLE, HALF),
        (HALF, BRAIN),
    ],
    ids=str,
)
def test_values_and_gradients(norm: str, earlier: torch.dtype, new: torch.dtype):
    previous, current = modules(device=DEVICE, previous=earlier, current=new)
    rows.check_within_float32(run, previous, current, norm, WEIGHT)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN], ids=str)
def test_integers_are_exact(norm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Many products are 0 here, and so are their signs. In the tiles of a GPU."""
    monkeypatch.setattr(plan, "_most", lambda numbers, compiled: int(numbers.max()))
    previous, current = modules(make=integers, device=DEVICE, previous=dtype, current=dtype)
    check_exactly(previous, current, norm, weight=WEIGHT)


def test_only_what_is_wanted_is_written():
    previous, current = modules(SMALL, device=DEVICE)
    value, *grads = run(previous, current)
    for wanted in ((False, False), (True, False), (False, True)):
        again, *some = run(previous, current, grads=wanted)
        assert_same_bits(again, value)
        for want, found, all_of_them in zip(wanted, some, grads, strict=True):
            assert len(found) == (len(all_of_them) if want else 0)
            for one, other in zip(found, all_of_them, strict=False):
                assert_same_bits(one, other)


SHAPES = {
    "more ranks than a program has": [((70,), 130, 40), ((3, 200), 65, 24)],
    "more slices than are added at once": [((3,), 1, 2500), ((2, 1), 17, 1111)],
    "nothing before": [((), 3, 8), ((0, 0), 2, 5)],
    "no tensor before": [((), 3, 8)],
    "no rows": [((4,), 0, 8), ((), 0, 0)],
    "no columns": [((4, 2), 3, 0), ((), 2, 0)],
    "one of everything": [((1,), 1, 1)],
    "many": [((m % 4,) * (m % 3), 1 + m % 5, 1 + 7 * m % 23) for m in range(40)],
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, norm: str):
    previous, current = modules(SHAPES[name], integers, DEVICE)
    check_exactly(previous, current, norm)


# Elements of 2 bytes that are loaded at once, and whether a row's are neighbours.
ACCESS = {
    "plain": (8, True),
    "transposed": (8, False),
    "padded": (8, True),
    "odd stride": (1, True),
    "late start": (1, True),
    "every other column": (1, False),
    "transposed and padded": (8, False),
    "one row": (8, True),
    "one column": (1, False),
    "one element": (1, False),
}


@pytest.mark.parametrize("mixed", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, mixed: bool):
    previous, current = modules([((8, 16), 8, 48), ((24,), 16, 16)], integers, DEVICE, HALF, HALF)
    there = LAYOUTS[name]
    previous = [[there(t) for t in tasks] for tasks in previous]
    current = [current[0] if mixed else there(current[0]), there(current[1])]
    check_exactly(previous, current, "frobenius2")


@pytest.mark.parametrize("name", ACCESS)
def test_wide_loads_where_they_can_be(name: str):
    tensors = [integers(8, 48, dtype=HALF), integers(16, 24, dtype=HALF)]
    rows = [LAYOUTS.get(name, torch.clone)(t.to(DEVICE)) for t in tensors]
    found = table.plan_for(rows, [1, 1], rows, signs=True).previous
    assert (found.vec, found.steps is None) == ACCESS[name]


@pytest.mark.parametrize(("rows", "vec"), [(8, 8), (12, 4), (2, 2), (3, 1)])
def test_neighbouring_rows_are_loaded_in_whole_groups(rows: int, vec: int):
    tensors = [in_room(integers(n, 40, dtype=HALF), 1, 16) for n in (8, rows)]
    assert table.plan_for(tensors, [2], tensors[:1], signs=True).previous.vec == vec
    check_exactly([tensors], tensors[:1])


def test_rows_of_several_tasks_are_as_rows_of_one():
    tasks = [normal(n, 100).to(DEVICE) for n in (8, 1, 0, 30, 8)]
    current = [normal(5, 100).to(DEVICE)]
    for norm in NORMS:
        value, to_current, to_previous = run([tasks], current, norm)
        again, other_current, other_previous = run([[torch.cat(tasks)]], current, norm)
        assert_same_bits(value, again)
        assert_same_bits(to_current[0], other_current[0])
        assert_same_bits(torch.cat(to_previous), other_previous[0])


def plan_on_a_gpu(shapes: list) -> Any:
    previous, current = modules(shapes, torch.zeros)
    flat = [t for tasks in previous for t in tasks]
    return plan.make_plan(
        table._places(flat),
        [len(tasks) for tasks in previous],
        table._places(current),
        None,
        (SINGLE, SINGLE),
        signs=True,
        to_previous=True,
        compiled=True,
    )


def test_other_modules_do_not_change_how_a_module_is_added_up():
    """Each sum has the terms, and the cuts between them, that it has where the module is alone."""
    shapes = [((8,), 8, 4096), ((112,), 8, 4096), ((40,), 64, 2048), ((7,), 3, 129)]
    together, before = plan_on_a_gpu(shapes), 0
    for shape in shapes:
        alone = plan_on_a_gpu([shape])
        assert alone.overlap.tile.columns == together.overlap.tile.columns
        assert alone.to_current.tile.rows == together.to_current.tile.rows
        assert alone.to_previous.tile.rows == together.to_previous.tile.rows
        first = together.overlap.items[:, 2] - before
        mine = together.overlap.items[(first >= 0) & (first < shape[1])]
        assert set(map(tuple, mine[:, 4:6])) == set(map(tuple, alone.overlap.items[:, 4:6]))
        before += shape[1]
    # The third launch begins where the first one ended.
    assert together.reduce_items[0, 4] == together.to_current.items[-1, 9] == 0
    assert together.reduce_items[-1, 4] == together.to_current.items[0, 9] == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_not_finite_shows(norm: str, bad: float):
    previous, current = modules(SMALL, device=DEVICE)
    _, clean, _ = run(previous, current, norm)
    previous[0][1][2, 5] = bad
    value, to_current, _ = run(previous, current, norm)
    assert not value.isfinite()
    assert_same_bits(to_current[1], clean[1])
    previous, current = modules(SMALL, device=DEVICE)
    current[1][0, 3] = bad
    assert not run(previous, current, norm)[0].isfinite()


def test_the_sign_of_nan_is_0():
    previous = [[torch.ones(2, 4, device=DEVICE)]]
    current = torch.ones(2, 4, device=DEVICE)
    current[0, 0] = float("nan")
    value, to_current, _ = run(previous, [current])
    assert value.isnan()
    assert_same_bits(to_current[0].cpu(), torch.tensor([[0.0] * 4, [2.0] * 4]))


def test_same_inputs_same_bits():
    previous, current = modules([((17, 3), 9, 200), ((5,), 2, 33)], device=DEVICE)
    for norm in NORMS:
        value, *grads = run(previous, current, norm)
        for _ in range(3):
            table._entries.clear()
            again, *others = run(previous, current, norm)
            assert_same_bits(again, value)
            for side, other in zip(grads, others, strict=True):
                for one, two in zip(side, other, strict=True):
                    assert_same_bits(one, two)


def test_half_precision_products_beyond_its_range():
    """G is 6e6 and its square 4e13: float16 ends at 65504."""
    previous, current = [[torch.full((2, 60), 300.0).half()]], [torch.full((3, 60), 330.0).half()]
    previous, current = [[previous[0][0].to(DEVICE)]], [current[0].to(DEVICE)]
    check_exactly(previous, current, "l1")
    value, to_current, _ = run(previous, current, "frobenius2")
    truth = oracle(previous, current, "frobenius2")
    assert value.item() == pytest.approx(float(truth.value), rel=1e-6)
    assert max_error(to_current[0], torch.as_tensor(truth.current[0])) <= 1e-6 * 8e9


@triton.jit
def three_terms(x_ptr, out_ptr, N: tl.constexpr):
    rest = tl.load(x_ptr + tl.arange(0, N))
    for term in tl.static_range(3):
        head = products.bfloat16_part(rest)
        tl.store(out_ptr + term * N + tl.arange(0, N), head)
        rest -= head


def test_three_numbers_of_bfloat16_hold_a_float32():
    x = torch.cat([torch.randn(125), torch.tensor([0.0, 3.4e38, -1e-30])]).to(DEVICE)
    terms = torch.empty(3, 128, device=DEVICE)
    three_terms[(1,)](x, terms, 128)
    assert_same_bits(terms, terms.bfloat16().float())
    assert_same_bits(terms.double().sum(0), x.double())


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN], ids=str)
def test_projections(dtype: torch.dtype):
    """Rounded once, though the interpreter truncates bfloat16 where a GPU rounds."""
    tensors, bases = pairs(dtype)
    for m, (out, t, q) in enumerate(zip(project(tensors, bases), tensors, bases, strict=True)):
        exact, wide = truth_of(t, q), t.float()
        plain = wide - (wide @ q.float().mT) @ q.float()
        scale = float(wide.abs().max()) if t.numel() else 0.0
        if dtype == SINGLE:
            assert_within_budget(out.cpu(), plain.cpu(), exact, name=str(m), scale=scale)
        else:
            ulp = torch.finfo(dtype).eps * exact.abs() + 1e-5 * scale
            assert ((out.double().cpu() - exact).abs() <= ulp).all()


def test_projection_of_float16_is_the_rounded_float32_one():
    tensors, bases = pairs(HALF, [(9, 5, 64), (17, 3, 33)])
    wide = project([t.float() for t in tensors], [q.float() for q in bases])
    for out, other in zip(project(tensors, bases), wide, strict=True):
        assert_same_bits(out, other.half())


def test_an_empty_basis_leaves_the_bits():
    tensors, bases = pairs(HALF, [(3, 0, 40), (2, 0, 3)])
    for out, t in zip(project(tensors, bases), tensors, strict=True):
        assert_same_bits(out, t)


@pytest.mark.parametrize("name", LAYOUTS)
def test_projections_in_all_layouts(name: str):
    """With integers for the rows: nothing of the kernel needs them to be orthonormal."""
    there = LAYOUTS[name]
    tensors = [there(integers(n, d, dtype=HALF).to(DEVICE)) for n, d in ((16, 24), (8, 16))]
    rows = [there(integers(8, d, dtype=HALF).to(DEVICE)) for d in (24, 16)]
    for out, t, q in zip(project(tensors, rows), tensors, rows, strict=True):
        assert_same_bits(out.cpu(), truth_of(t, q).half())


def test_results_may_lie_apart():
    tensors, bases = pairs(SINGLE, [(3, 2, 8), (4, 1, 9), (0, 1, 5)])
    outs = [torch.empty(t.numel() + 3, device=DEVICE)[3:].view(t.shape) for t in tensors]
    kernels.project_out_rows(tensors, bases, outs)
    for out, other in zip(outs, project(tensors, bases), strict=True):
        assert_same_bits(out, other)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched."""
    names: list[str] = []

    class Counted:
        def __init__(self, kernel: Any, name: str):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: Any) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    for name in ("overlap_kernel", "reduce_kernel", "combine_kernel"):
        monkeypatch.setattr(launch, name, Counted(getattr(launch, name), name.split("_")[0]))
    return names


@pytest.mark.parametrize("many", [1, 7])
def test_the_number_of_launches_is_fixed(launches: list[str], many: int):
    previous, current = modules([((2,) * many, 3, 8)] * many, integers, DEVICE)
    run(previous, current, grads=(False, False))
    assert launches == ["overlap", "reduce", "combine"]
    launches.clear()
    run(previous, current, grads=(True, False))
    assert launches == ["overlap", "reduce", "combine"]
    launches.clear()
    run(previous, current)
    assert launches == ["overlap", "reduce", "combine", "combine"]
    launches.clear()
    project(*pairs(SINGLE, [(2, 1, 9)] * many))
    assert launches == ["overlap", "combine"]
    launches.clear()
    project(*pairs(SINGLE, [(2, 1, 600)] * many))
    assert launches == ["overlap", "reduce", "combine"]
