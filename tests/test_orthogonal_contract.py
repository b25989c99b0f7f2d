"""The orthogonal operators: arguments that do not fit, what a call runs on, torch's own tools."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import trimtab
from orthogonal_cases import check_penalty, integers, leaves, modules, oracle
from trimtab.testing import assert_same_bits

P, C = torch.zeros(4, 5), torch.zeros(2, 5)
META = torch.zeros(4, 5, device="meta")
PENALTY_ERRORS = [
    (TypeError, "current must be a sequence of 2-D tensors, got Tensor", {"current": C}),
    (TypeError, "current must be a sequence", {"current": iter([C])}),
    (TypeError, r"current\[0\] must be a tensor, got list", {"current": [[C]]}),
    (ValueError, r"current\[0\] must be of two dimensions", {"current": [C[0]]}),
    (TypeError, "current.0. must be float32", {"current": [C.long()]}),
    (TypeError, "previous must be a sequence with one entry per module", {"previous": P}),
    (ValueError, "previous must be of 1 entries, as many as current, got 2", {"previous": [P, P]}),
    (ValueError, r"previous\[0\] must be of shape \(R, 5\)", {"previous": [P.mT]}),
    (ValueError, r"previous\[0\] must be of shape \(R, 5\)", {"previous": [[P, P[:, :4]]]}),
    (ValueError, r"previous\[0\]\[1\] must be of two dimensions", {"previous": [[P, P[0]]]}),
    (ValueError, r"previous\[0\] must be of shape \(R, 5\)", {"previous": [P[0]]}),
    (TypeError, r"previous\[0\] must be a sequence of 2-D tensors, got int", {"previous": [3]}),
    (TypeError, r"previous\[0\]\[0\] must be a tensor, got NoneType", {"previous": [[None]]}),
    (TypeError, "previous.0. must be float32", {"previous": [P.bool()]}),
    (ValueError, r"previous\[0\] must be on cpu", {"previous": [META]}),
    (ValueError, "norm must be 'l1' or 'frobenius2', got 'l2'", {"norm": "l2"}),
    (ValueError, "norm must be", {"norm": None}),
    (ValueError, "weight must be of 1 numbers", {"weight": [1.0, 2.0]}),
    (ValueError, "weight must be of 1 numbers", {"weight": torch.ones(1, 1)}),
    (TypeError, "weight must be numbers or a tensor", {"weight": ["1"]}),
    (TypeError, "weight must be numbers or a tensor", {"weight": "1"}),
    (TypeError, "weight must be numbers or a tensor", {"weight": 1.0}),
    (TypeError, "weight must be numbers or a tensor", {"weight": [True]}),
    (TypeError, "weight must be floating", {"weight": torch.ones(1, dtype=torch.int64)}),
    (ValueError, "weight must be without gradient", {"weight": torch.ones(1, requires_grad=True)}),
    (ValueError, "weight must be on cpu", {"weight": torch.ones(1, device="meta")}),
    (ValueError, "weight must be finite", {"weight": [math.nan]}),
    (ValueError, "weight must be finite", {"weight": torch.tensor([math.inf])}),
    (ValueError, "weight must be finite", {"weight": [1e300]}),
    (ValueError, "weight must be finite", {"weight": [10**400]}),
    (ValueError, "norm must be", {"norm": [1]}),
    (ValueError, "impl must be one of", {"impl": "cuda"}),
    (ValueError, "impl must be one of", {"previous": [], "current": [], "impl": "cuda"}),
]
PROJECT_ERRORS = [
    (TypeError, "tensors must be a sequence of 2-D tensors, got Tensor", {"tensors": C}),
    (TypeError, "bases must be a sequence", {"bases": P}),
    (ValueError, "bases must be of 1 tensors, one for each of tensors, got 0", {"bases": []}),
    (ValueError, r"bases\[0\] must be of shape \(k, 5\)", {"bases": [P.mT]}),
    (ValueError, r"tensors\[0\] must be of two dimensions", {"tensors": [C[0]]}),
    (TypeError, r"tensors\[0\] must be float32", {"tensors": [C.int()]}),
    (ValueError, r"bases\[0\] must be on cpu", {"bases": [META]}),
]


@pytest.mark.parametrize(("error", "text", "changed"), PENALTY_ERRORS)
def test_penalty_meets_bad_arguments_first(error, text, changed):
    arguments = {"previous": [P], "current": [C], **changed}
    with pytest.raises(error, match=text):
        trimtab.orthogonal_penalty(**arguments)


@pytest.mark.parametrize(("error", "text", "changed"), PROJECT_ERRORS)
def test_projection_meets_bad_arguments_first(error, text, changed):
    with pytest.raises(error, match=text):
        trimtab.project_out(**{"tensors": [C], "bases": [P], **changed})


def test_every_error_tells_a_way_out():
    for function, first, errors in (
        (trimtab.orthogonal_penalty, {"previous": [P], "current": [C]}, PENALTY_ERRORS),
        (trimtab.project_out, {"tensors": [C], "bases": [P]}, PROJECT_ERRORS),
    ):
        for error, _, changed in errors:
            with pytest.raises(error) as caught:
                function(**{**first, **changed})
            assert ";" in str(caught.value)


def test_explain_names_what_runs():
    for dtype in (torch.float32, torch.float64):
        choice = trimtab.explain("orthogonal_penalty", [P.to(dtype)], [C.to(dtype)])
        assert choice.impl in ("native", "reference")
    choice = trimtab.explain("project_out", [C], [P], impl="reference")
    assert choice == ("reference", "asked for")
    assert trimtab.explain("orthogonal_penalty", [], []).impl in ("native", "reference")


def compiled(function, **kwargs):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **kwargs)


@pytest.mark.op("orthogonal_penalty")
@pytest.mark.parametrize("grad_to_previous", [False, True])
def test_compile_of_the_penalty(case, grad_to_previous):
    previous, current = modules([((3, 2), 2, 7), ((), 1, 4), ((5,), 3, 9)], device=case.device)

    def step(previous, current):
        rows = [c * 1.5 for c in current]
        value = trimtab.orthogonal_penalty(previous, rows, weight=[1.0, 2.0, 0.5], impl=case.impl)
        return 0.3 * value

    def run(function):
        earlier, new = leaves(previous, current)
        if not grad_to_previous:
            earlier = previous
        value = function(earlier, new)
        value.backward()
        grads = [t.grad for t in (*new, *(t for ts in earlier for t in ts)) if t.grad is not None]
        return [value.detach(), *grads]

    results, expected = run(compiled(step)), run(step)
    assert len(results) == len(expected) == (7 if grad_to_previous else 4)
    for ours, plain in zip(results, expected, strict=True):
        assert_same_bits(ours, plain)


@pytest.mark.op("project_out")
def test_compile_of_the_projection(case):
    tensors = [torch.randn(n, 6, device=case.device) for n in (3, 0, 5)]
    bases = [torch.eye(6, device=case.device)[:k] for k in (2, 1, 0)]

    def step(tensors):
        return trimtab.project_out([t.tanh() for t in tensors], bases, impl=case.impl)

    for ours, plain in zip(compiled(step)(tensors), step(tensors), strict=True):
        assert_same_bits(ours, plain)


@pytest.mark.op("project_out")
@pytest.mark.parametrize("grad", [False, True])
def test_compile_of_one_pair_and_of_repeated_tensors(case, grad):
    t, q = torch.randn(3, 6, device=case.device), torch.eye(6, device=case.device)[:2]

    def run(function):
        leaf = t.clone().requires_grad_(grad)
        outputs = function(leaf)
        if grad:
            outputs[0].backward(torch.ones_like(outputs[0]))
        return [*(out.detach() for out in outputs), *([leaf.grad] if grad else [])]

    def one(leaf):
        return trimtab.project_out([leaf], [q], impl=case.impl)

    def repeated(leaf):
        value = trimtab.orthogonal_penalty([q, q], [leaf, leaf], impl=case.impl)
        return [value, *trimtab.project_out([leaf, leaf], [q, q], impl=case.impl)]

    for function in (one, repeated):
        for ours, plain in zip(run(compiled(function)), run(function), strict=True):
            assert_same_bits(ours, plain)


@pytest.mark.slow
def test_compile_with_inductor():
    previous, current = modules([((3, 2), 2, 7), ((5,), 3, 9)])

    def step(new):
        return trimtab.orthogonal_penalty(previous, [c.sin() for c in new])

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        _, new = leaves(previous, current)
        value = function(new)
        value.backward()
        results.append([value.detach(), *(c.grad for c in new)])
    torch._dynamo.reset()
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.op("orthogonal_penalty")
def test_opcheck(case):
    if case.impl == "reference":
        pytest.skip("the reference is no operator")
    previous, current = modules([((3, 2), 2, 7), ((5,), 3, 9)], device=case.device)
    flat = [t for tasks in previous for t in tasks]
    for needs in ([True, False], [False, False], [True, True]):
        arguments = (flat, [2, 1], current, None, False, needs, case.impl)
        torch.library.opcheck(torch.ops.trimtab.orthogonal_penalty.default, arguments)
    bases = [flat[0], flat[2]]
    torch.library.opcheck(torch.ops.trimtab.project_out.default, (current, bases, case.impl))


def test_fakes_know_shapes_and_dtypes():
    with FakeTensorMode():
        previous = [torch.empty(6, 8, device="cuda", dtype=torch.bfloat16)]
        current = [torch.empty(2, 8, device="cuda", dtype=torch.bfloat16)]
        value, grad, none = torch.ops.trimtab.orthogonal_penalty(
            previous, [1], current, None, False, [True, False], "native"
        )
        assert (value.shape, value.dtype, value.device.type) == ((), torch.float32, "cuda")
        assert (grad.shape, grad.dtype, none.shape) == ((16,), torch.float32, (0,))
        out = torch.ops.trimtab.project_out(current, previous, "native")
        assert (out.shape, out.dtype) == ((16,), torch.bfloat16)


@pytest.mark.op("orthogonal_penalty")
def test_autocast_does_not_round(case):
    """Training under autocast must not turn the sum of a model's penalty into bfloat16."""
    previous, current = modules([((63, 5), 3, 252)], device=case.device)
    _, new = leaves(previous, current)
    plain = trimtab.orthogonal_penalty(previous, new, impl=case.impl)
    plain.backward()
    _, other = leaves(previous, current)
    with torch.autocast(case.device, dtype=torch.bfloat16):
        value = trimtab.orthogonal_penalty(previous, other, impl=case.impl)
        (projected,) = trimtab.project_out(new, [previous[0][1]], impl=case.impl)
    value.backward()
    assert_same_bits(value.detach(), plain.detach())
    assert_same_bits(other[0].grad, new[0].grad)
    assert projected.dtype == torch.float32


@pytest.mark.op("orthogonal_penalty")
def test_deterministic_mode_is_honoured(case):
    previous, current = modules([((3,), 2, 5)], integers, case.device)
    torch.use_deterministic_algorithms(True)
    try:
        value = trimtab.orthogonal_penalty(previous, current, impl=case.impl)
    finally:
        torch.use_deterministic_algorithms(False)
    assert value.item() == oracle(previous, current).value


SIZES = st.integers(0, 19)
SHAPES = st.lists(
    st.tuples(st.lists(SIZES, max_size=3), SIZES, st.integers(0, 40)), min_size=1, max_size=4
)


@pytest.mark.op("orthogonal_penalty")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(shapes=SHAPES, norm=st.sampled_from(["l1", "frobenius2"]), seed=st.integers(0, 2**31),
       weighted=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float16]))  # fmt: skip
def test_any_shapes(case, shapes, norm, seed, weighted, dtype):
    torch.manual_seed(seed)
    previous, current = modules(shapes, integers, case.device, dtype, dtype)
    weight = [2.0 ** (m - 1) for m in range(len(shapes))] if weighted else None
    check_penalty(
        lambda p, c: trimtab.orthogonal_penalty(p, c, norm=norm, weight=weight, impl=case.impl),
        previous, current, norm, weight, upstream=0.5,
    )  # fmt: skip
