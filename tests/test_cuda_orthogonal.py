"""The CUDA kernels of orthogonality, carried out on the CPU: see ``cuda_on_cpu/library.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import cuda_orthogonal_cases as cases
import trimtab
from cuda_on_cpu import library
from cuda_orthogonal_cases import (
    BRAIN,
    DEVICES,
    DTYPES,
    HALF,
    SINGLE,
    assert_same,
    check_exactly,
    kernels,
    project,
    run,
)
from orthogonal_cases import (
    ODD,
    check_penalty,
    integers,
    modules,
    normal,
    oracle,
    smallest_product,
)
from orthogonal_rows import LAYOUTS, check_within_float32, pairs, truth_of
from trimtab.testing import assert_same_bits, assert_within_budget

NORMS = ("l1", "frobenius2")
WEIGHT = [0.5, -2.0, 1.0, 0.0, 3.0, 1.0, 0.25, 1.0, 1.0, -0.125]
SMALL = [((2, 3), 4, 16), ((1,), 2, 8)]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Also that of the kernels' workspace, which C++ allocates."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.device(**DEVICES[request.param]):
        yield request.param


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("earlier", "new"),
    [(SINGLE, SINGLE), (HALF, HALF), (BRAIN, BRAIN), (BRAIN, SINGLE), (SINGLE, HALF),
     (HALF, BRAIN)],
    ids=str,
)  # fmt: skip
def test_values_and_gradients(norm: str, earlier: torch.dtype, new: torch.dtype):
    previous, current = modules(previous=earlier, current=new)
    assert smallest_product(previous, current) > 1e-6
    check_within_float32(run, previous, current, norm, WEIGHT)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(norm: str, dtype: torch.dtype, device: str):
    """Many products are 0 here, and so are their signs."""
    previous, current = modules(make=integers, previous=dtype, current=dtype)
    check_exactly(previous, current, norm, weight=WEIGHT)


SHAPES = {
    "more ranks than a block has": [((70,), 130, 40), ((3, 200), 65, 24)],
    "more rows than a tile and than a part": [((700, 1), 3, 33), ((130,), 9, 300)],
    "more columns than eight blocks hold": [((20,), 2, 11300), ((5,), 9, 1200)],
    "as many as they hold": [((40, 40), 8, 4096), ((17,), 24, 4000), ((33,), 8, 11008)],
    "nothing before": [((), 3, 8), ((0, 0), 2, 5)],
    "no tensor before": [((), 3, 8)],
    "no rows": [((4,), 0, 8), ((), 0, 0)],
    "no columns": [((4, 2), 3, 0), ((), 2, 0)],
    "one of everything": [((1,), 1, 1)],
    "many": [((m % 4,) * (m % 3), 1 + m % 5, 1 + 7 * m % 23) for m in range(40)],
    "tasks of a row each": [((1,) * 150, 2, 9)],
}


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, dtype: torch.dtype, device: str):
    previous, current = modules(SHAPES[name], integers, previous=dtype, current=dtype)
    check_exactly(previous, current)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_squares_of_more_rows_than_a_part(dtype: torch.dtype):
    """The parts of the gradient of `current` go through memory, and get their factor there."""
    shapes = [((300,), 5, 70), ((150, 4), 2, 9)]
    previous, current = modules(shapes, integers, previous=dtype, current=dtype)
    check_exactly(previous, current, "frobenius2", weight=[0.5, -2.0])


@pytest.mark.parametrize("mixed", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, mixed: bool):
    there = LAYOUTS[name]
    for dtype in (SINGLE, BRAIN):
        shapes = [((8, 16), 8, 150), ((24,), 16, 16)]
        previous, current = modules(shapes, integers, previous=dtype, current=dtype)
        previous = [[there(previous[0][0]), *previous[0][1:]], [there(previous[1][0])]]
        current = [current[0] if mixed else there(current[0]), there(current[1])]
        check_exactly(previous, current, "frobenius2")


def test_layouts_of_other_dtypes_than_the_tiles():
    for there in LAYOUTS.values():
        previous, current = modules(SMALL, integers, previous=HALF, current=BRAIN)
        previous = [[there(t) for t in tasks] for tasks in previous]
        check_exactly(previous, [there(t) for t in current])


def test_only_what_is_wanted_is_written(device: str):
    for dtype in (SINGLE, BRAIN):
        previous, current = modules([*SMALL, ((200,), 3, 40)], previous=dtype, current=dtype)
        value, *grads = run(previous, current)
        for wanted in ((False, False), (True, False), (False, True)):
            again, *some = run(previous, current, grads=wanted)
            assert_same_bits(again, value)
            for want, found, all_of_them in zip(wanted, some, grads, strict=True):
                assert len(found) == (len(all_of_them) if want else 0)
                for one, other in zip(found, all_of_them, strict=False):
                    assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_rows_of_several_tasks_are_as_rows_of_one(norm: str, dtype: torch.dtype):
    tasks = [normal(n, 100, dtype=dtype) for n in (8, 1, 0, 30, 8)]
    current = [normal(5, 100, dtype=dtype)]
    value, to_current, to_previous = run([tasks], current, norm)
    joined = run([[torch.cat(tasks)]], current, norm)
    assert_same((value, to_current, [torch.cat(to_previous)]), joined)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_bits_depend_neither_on_other_modules_nor_on_clusters(norm: str, dtype: torch.dtype):
    """Beside a wide module, tiles have other sizes; beside one that is too wide, and on GPUs
    without clusters, G goes through memory.
    """
    shapes = [((150, 7), 9, 600), ((40,), 20, 129), ((6,), 2, 9000), ((3,), 1, 11300)]
    previous, current = modules(shapes, previous=dtype, current=dtype)
    together = run(previous, current, norm)
    with library.device(**DEVICES["A100"]):
        _, *grads = run(previous, current, norm)
        assert_same((together[0], *grads), together)
    for m in range(len(shapes) - 1):
        _, to_current, to_previous = run(previous[m : m + 1], current[m : m + 1], norm)
        assert_same_bits(to_current[0], together[1][m])
        first = sum(map(len, previous[:m]))
        for t, found in enumerate(to_previous):
            assert_same_bits(found, together[2][first + t])


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
def test_the_order_of_threads_changes_no_bit(dtype: torch.dtype, device: str):
    previous, current = modules([((150, 3), 9, 200), ((5,), 2, 33)], previous=dtype, current=dtype)
    tensors, bases = [previous[0][0]], [current[0]]
    found = [run(previous, current), project(tensors, bases)]
    for order, seed in (("reverse", 0), ("shuffled", 1), ("shuffled", 2)):
        with library.schedule(order, seed):
            assert_same(run(previous, current), found[0])
            assert_same_bits(project(tensors, bases)[0], found[1][0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_shows(norm: str, bad: float, dtype: torch.dtype):
    previous, current = modules(SMALL, previous=dtype, current=dtype)
    _, clean, _ = run(previous, current, norm)
    previous[0][1][2, 5] = bad
    value, to_current, _ = run(previous, current, norm)
    assert not value.isfinite()
    assert_same_bits(to_current[1], clean[1])
    previous, current = modules(SMALL, previous=dtype, current=dtype)
    current[1][0, 3] = bad
    assert not run(previous, current, norm)[0].isfinite()


def test_overflow_is_infinite_not_unknown():
    large = torch.full((2, 3), 1e30)
    assert run([[large]], [large], "frobenius2")[0] == float("inf")
    large[0, 0] = float("inf")
    assert run([[large]], [torch.ones(2, 3)])[0] == float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sign_of_nan_is_0(dtype: torch.dtype):
    previous, current = [[torch.ones(2, 4, dtype=dtype)]], torch.ones(2, 4, dtype=dtype)
    current[0, 0] = float("nan")
    value, to_current, _ = run(previous, [current])
    assert value.isnan()
    assert_same_bits(to_current[0], torch.tensor([[0.0] * 4, [2.0] * 4]))


def test_half_precision_products_beyond_its_range():
    """G is 6e6 and its square 4e13: float16 ends at 65504."""
    previous, current = [[torch.full((2, 60), 300.0).half()]], [torch.full((3, 60), 330.0).half()]
    check_exactly(previous, current, "l1")
    value, to_current, _ = run(previous, current, "frobenius2")
    truth = oracle(previous, current, "frobenius2")
    assert value.item() == pytest.approx(float(truth.value), rel=1e-6)
    assert (to_current[0] / torch.as_tensor(truth.current[0]) - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("count", [1, 7, 250])
def test_the_number_of_launches_is_fixed(count: int):
    """The table's writer, the penalty, the sums; where asked for, gradients of `previous`. A table
    of 250 modules and tensors is more than one kernel's arguments hold.
    """
    previous, current = modules([((2,), 3, 8)] * count, integers)
    tables = 1 + (count > 200)

    def launched(call: Callable[[], Any]) -> int:
        before = kernels().launches()
        call()
        return kernels().launches() - before

    assert launched(lambda: run(previous, current, grads=(True, False))) == tables + 2
    assert launched(lambda: check_exactly(previous, current)) == tables + 3
    with library.device(**DEVICES["A100"]):
        assert launched(lambda: run(previous, current, grads=(True, False))) == tables + 3
    assert launched(lambda: project([t for (t,) in previous], current)) == tables + 2


def test_rows_of_the_size_of_llama():
    previous, current = modules([((64, 48), 8, 4096)], previous=BRAIN, current=BRAIN)
    value, *_ = run(previous, current, grads=(True, False))
    truth = oracle(previous, current)
    assert value.item() == pytest.approx(float(truth.value), rel=1e-6)


def test_results_have_room_around_them():
    """The flat gradients are parts of larger memory, whose other numbers must stay."""
    previous, current = modules([((5,), 3, 7), ((2, 1), 1, 33)], integers)
    flat, size = [t for tasks in previous for t in tasks], sum(c.numel() for c in current)
    around, value = torch.full((200,), 7.0), torch.zeros(())
    kernels().orthogonal_penalty_rows(
        flat, [1, 2], current, None, False, value, around[51 : 51 + size], None
    )
    exact = [torch.as_tensor(g).flatten() for g in oracle(previous, current).current]
    assert_same_bits(around[51 : 51 + size], torch.cat(exact).float())
    assert bool((around[:51] == 7).all() and (around[51 + size :] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections(dtype: torch.dtype, device: str):
    """Of 16-bit numbers, the float32 result rounded once."""
    tensors, bases = pairs(dtype)
    for m, (out, t, q) in enumerate(zip(project(tensors, bases), tensors, bases, strict=True)):
        exact, wide = truth_of(t, q), t.float()
        plain = wide - (wide @ q.float().mT) @ q.float()
        scale = float(wide.abs().max()) if t.numel() else 0.0
        if dtype == SINGLE:
            assert_within_budget(out, plain, exact, name=str(m), scale=scale)
        else:
            ulp = torch.finfo(dtype).eps / 2 * exact.abs() + 2**-15 * scale
            assert ((out.double() - exact).abs() <= ulp).all()


def test_tensors_of_several_dtypes_are_projected():
    tensors, bases = [], []
    for dtype in (BRAIN, SINGLE, HALF, BRAIN):
        for found, more in zip((tensors, bases), pairs(dtype, [(3, 2, 40)]), strict=True):
            found += more
    for out, t, q in zip(project(tensors, bases), tensors, bases, strict=True):
        assert_same_bits(out, project([t], [q])[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_basis_leaves_the_bits(dtype: torch.dtype):
    tensors, bases = pairs(dtype, [(3, 0, 40), (2, 0, 3)])
    for out, t in zip(project(tensors, bases), tensors, strict=True):
        assert_same_bits(out, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_projections_in_all_layouts(name: str, dtype: torch.dtype):
    """With integers for the rows: nothing of the kernel needs them to be orthonormal."""
    there = LAYOUTS[name]
    tensors = [there(integers(n, d, dtype=dtype)) for n, d in ((16, 24), (8, 16))]
    bases = [there(integers(8, d, dtype=dtype)) for d in (24, 16)]
    for out, t, q in zip(project(tensors, bases), tensors, bases, strict=True):
        assert_same_bits(out, truth_of(t, q).to(dtype))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_public_penalty(norm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    library.public("orthogonal", monkeypatch)
    before = kernels().launches()
    previous, current = modules(ODD, previous=dtype, current=dtype)
    check_penalty(
        lambda p, c: trimtab.orthogonal_penalty(p, c, norm=norm, weight=WEIGHT, impl="native"),
        previous,
        current,
        norm,
        WEIGHT,
    )
    assert kernels().launches() > before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_public_projection(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    library.public("orthogonal", monkeypatch)
    tensors, bases = pairs(dtype)
    given = [t.requires_grad_() for t in tensors]
    found = trimtab.project_out(given, bases, impl="native")
    torch.autograd.backward([out.sum() for out in found])
    for out, t, q in zip(found, tensors, bases, strict=True):
        scale = float(t.detach().abs().max()) if t.numel() else 0.0
        plain = (t - (t @ q.mT) @ q).detach()
        assert_within_budget(out.detach(), plain, truth_of(t, q), scale=scale)
        ones = torch.ones_like(t)
        other = ones - (ones @ q.mT) @ q
        scale = float(q.shape[1]) ** 0.5
        assert_within_budget(t.grad, other, truth_of(ones, q), scale=scale)


P, C = torch.ones(4, 5), torch.ones(2, 5)
VALUE, GRAD = torch.zeros(()), torch.zeros(10)
HOSTILE = {
    "counts beyond the tensors": ([P], [2], [C], None, VALUE, None),
    "counts of other length": ([P], [1, 0], [C], None, VALUE, None),
    "negative counts": ([P], [-1], [C], None, VALUE, None),
    "no modules": ([], [], [], None, VALUE, None),
    "a row alone": ([P[0]], [1], [C], None, VALUE, None),
    "other columns": ([P[:, :4]], [1], [C], None, VALUE, None),
    "integers": ([P.long()], [1], [C], None, VALUE, None),
    "two dtypes before": ([P, P.half()], [2], [C], None, VALUE, None),
    "weights of other length": ([P], [1], [C], torch.ones(2), VALUE, None),
    "weights of float64": ([P], [1], [C], torch.ones(1).double(), VALUE, None),
    "a vector for the value": ([P], [1], [C], None, torch.zeros(2), None),
    "a short gradient": ([P], [1], [C], None, VALUE, torch.zeros(9)),
    "a gradient with steps": ([P], [1], [C], None, VALUE, torch.zeros(20)[::2]),
    "a gradient of float16": ([P], [1], [C], None, VALUE, GRAD.half()),
    "a gradient in an input": ([P], [1], [C], None, VALUE, C.view(-1)),
    "a value in a gradient": ([P], [1], [C], None, GRAD[3], GRAD),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_wrong_call_of_the_penalty_raises(name: str):
    previous, counts, current, weight, value, grad = HOSTILE[name]
    with pytest.raises(RuntimeError, match="must"):
        kernels().orthogonal_penalty_rows(
            previous, counts, current, weight, False, value, grad, None
        )


@pytest.mark.parametrize(
    ("tensors", "bases", "outs"),
    [([P], [], [P.clone()]), ([P], [P], []), ([P], [C[:, :3]], [P.clone()]),
     ([P], [C.half()], [P.clone()]), ([P], [C], [P.half()]), ([P], [C], [torch.zeros(5, 4).mT]),
     ([P[0]], [C], [P[0].clone()]), ([P], [C], [torch.zeros(4, 4)]), ([P], [C], [P])],
)  # fmt: skip
def test_a_wrong_call_of_the_projection_raises(tensors, bases, outs):
    with pytest.raises(RuntimeError, match="must"):
        kernels().project_out_rows(tensors, bases, outs)


def test_float64_is_for_the_reference():
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        run([[P.double()]], [C])
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        run([[P]], [C.double()])
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        project([P.double()], [C.double()])


def test_no_access_out_of_bounds():
    library.build(library.ROOT / "csrc" / "cuda" / "orthogonal.cu", sanitize=True)
    assert library.run_sanitized(str(cases.__file__)).strip() == "right"
