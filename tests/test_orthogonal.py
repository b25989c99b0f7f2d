"""``orthogonal_penalty``: values and gradients in every implementation."""

from __future__ import annotations

import math

import pytest
import torch

import trimtab
from orthogonal_cases import (
    ODD,
    array,
    check_penalty,
    integers,
    leaves,
    modules,
    normal,
    oracle,
    smallest_product,
)
from trimtab.testing import assert_same_bits, max_error

# Infinities and NaN pass in silence on a GPU; numpy, which runs the interpreter, warns of them.
pytestmark = [
    pytest.mark.op("orthogonal_penalty"),
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
NORMS = ("l1", "frobenius2")
SIXTEENS = (torch.bfloat16, torch.float16)
WEIGHT = [0.5, -2.0, 1.0, 0.0, 3.0, 1.0, 0.25, 1.0, 1.0, -0.125]


def penalty(case, norm="l1", **options):
    return lambda p, c: trimtab.orthogonal_penalty(p, c, norm=norm, impl=case.impl, **options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEENS])
def test_integers_are_exact(case, norm, weight, dtype):
    """Zeros among the products are exact: their sign is 0, not whatever rounding left."""
    case.skip_unless_taken(dtype)
    previous, current = modules(make=integers, device=case.device, previous=dtype, current=dtype)
    truth = oracle(previous, current, norm, weight, 0.5)
    earlier, new = leaves(previous, current)
    value = trimtab.orthogonal_penalty(earlier, new, norm=norm, weight=weight, impl=case.impl)
    (0.5 * value).backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == truth.value
    pairs = list(zip(new, truth.current, strict=True))
    for tasks, exact in zip(earlier, truth.previous, strict=True):
        pairs += zip(tasks, exact, strict=True)
    for leaf, exact in pairs:
        assert_same_bits(leaf.grad.cpu(), torch.as_tensor(exact).to(dtype))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEENS])
def test_odd_shapes_within_the_budget(case, norm, dtype):
    case.skip_unless_taken(dtype)
    previous, current = modules(device=case.device, previous=dtype, current=dtype)
    assert smallest_product(previous, current) > 1e-6
    check_penalty(penalty(case, norm, weight=WEIGHT), previous, current, norm, WEIGHT)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("earlier", "new"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
     (torch.float16, torch.bfloat16), (torch.float32, torch.float64)],
)  # fmt: skip
def test_the_sides_may_differ_in_dtype(case, norm, earlier, new):
    case.skip_unless_taken(earlier, new)
    previous, current = modules(ODD[:5], device=case.device, previous=earlier, current=new)
    check_penalty(penalty(case, norm), previous, current, norm)


def test_lists_of_mixed_dtypes_are_widened(case):
    previous, current = modules([((4, 3), 2, 9), ((5,), 3, 6)], integers, case.device)
    mixed = [[previous[0][0].half(), previous[0][1]], [previous[1][0].half()]]
    case.skip_unless_taken(torch.float16)
    new = [current[0].half().requires_grad_(), current[1].requires_grad_()]
    value = trimtab.orthogonal_penalty(mixed, new, impl=case.impl)
    value.backward()
    truth = oracle(previous, current)
    assert value.item() == truth.value
    for leaf, exact in zip(new, truth.current, strict=True):
        assert_same_bits(leaf.grad.cpu(), torch.as_tensor(exact).to(leaf.dtype))


def test_float64_anywhere_computes_in_float64():
    previous, current = [torch.tensor([[1.0 + 2.0**-40]], dtype=torch.float64)], [torch.ones(1, 1)]
    assert trimtab.orthogonal_penalty(previous, current).item() == 1.0 + 2.0**-40


@pytest.mark.parametrize("norm", NORMS)
def test_strided_rows(case, norm):
    wide = normal(40, 90).to(case.device)
    previous = [
        wide[:, :30].mT,  # as lora_B.mT: unit stride along the rows, not the columns
        wide[3:20, 5:60:2],
        normal(1, 24).to(case.device).expand(9, 24),
        wide[::3, 1:12],
    ]
    current = [normal(40, 5).to(case.device).mT, wide[30:33, 10:38], wide[1:4, 2:50:2],
               wide[0].as_strided((3, 11), (0, 1))]  # fmt: skip
    check_penalty(penalty(case, norm), [[p] for p in previous], current, norm)


def test_an_entry_is_a_tensor_or_several(case):
    previous, current = modules(ODD[:5], device=case.device)
    joined = [torch.cat(tasks) for tasks in previous]
    apart = penalty(case)(previous, current)
    together = penalty(case)(tuple(joined), tuple(current))
    truth = oracle(previous, current).value
    for value in (apart, together):
        assert abs(value.item() - truth) <= 1e-6 * truth


def test_nothing_previous_is_exactly_zero(case):
    current = [normal(3, 5).to(case.device).requires_grad_() for _ in range(2)]
    value = penalty(case)([[], torch.zeros(0, 5, device=case.device)], current)
    value.backward()
    assert value.item() == 0.0
    assert all(not c.grad.any() for c in current)


def test_no_modules_at_all():
    assert trimtab.orthogonal_penalty([], []).item() == 0.0


def test_zero_rows_have_zero_gradient(case):
    """lora_B starts at 0: so does every product with it."""
    current = torch.zeros(4, 6, device=case.device, requires_grad=True)
    value = penalty(case)([normal(9, 6).to(case.device)], [current])
    value.backward()
    assert value.item() == 0.0
    assert not current.grad.any()


def test_second_derivatives_of_tensors_made_of_each_other(case):
    previous, first = normal(4, 5).to(case.device), normal(2, 5).to(case.device).requires_grad_()

    def second(function):
        value = function([previous, previous], [first, 2.0 * first])
        (grad,) = torch.autograd.grad(value, first, create_graph=True)
        return grad, torch.autograd.grad(grad.square().sum(), first)[0]

    def plain(p, c):
        return sum((a @ b.mT).square().sum() for a, b in zip(p, c, strict=True))

    ours, expected = second(penalty(case, "frobenius2")), second(plain)
    for found, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, exact)


def test_overflow_is_infinite_not_unknown(case):
    large = torch.full((2, 3), 1e30, device=case.device)
    assert penalty(case, "frobenius2")([large], [large]).item() == math.inf
    large[0, 0] = math.inf
    assert penalty(case)([large], [torch.ones(2, 3, device=case.device)]).item() == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(case, bad):
    previous, current = modules(ODD[2:5], device=case.device)
    current[1][0, 0] = bad
    _, new = leaves(previous, current)
    value = penalty(case, "frobenius2")(previous, new)
    value.backward()
    assert not value.isfinite()
    assert [bool(c.grad.isfinite().all()) for c in new] == [True, False, True]


def test_half_precision_sums_beyond_its_range(case):
    case.skip_unless_taken(torch.float16)
    ones = torch.full((64, 512), 30.0, dtype=torch.float16, device=case.device)
    value = penalty(case)([ones], [ones[:8]])
    assert value.item() == 64 * 8 * 512 * 900.0


def test_only_what_requires_grad_gets_one(case):
    previous, current = modules(ODD[:4], device=case.device)
    current[1].requires_grad_()
    previous[2][1].requires_grad_()
    value = penalty(case)(previous, current)
    value.backward()
    truth = oracle(previous, current)
    assert max_error(current[1].grad.cpu(), torch.as_tensor(truth.current[1])) <= 1e-5
    found = previous[2][1].grad.cpu()
    assert max_error(found, torch.as_tensor(truth.previous[2][1])) <= 1e-4
    others = [t for tasks in previous for t in tasks] + current
    assert [t.grad is not None for t in others].count(True) == 2


def test_without_gradients_nothing_is_saved(case):
    previous, current = modules(ODD[:4], device=case.device)
    _, new = leaves(previous, current)
    with torch.no_grad():
        value = penalty(case)(previous, new)
    assert not value.requires_grad
    assert_same_bits(value, penalty(case)(previous, new).detach())


def test_backward_twice_through_a_kept_graph(case):
    previous, current = modules(ODD[:4], device=case.device)
    _, new = leaves(previous, current)
    value = penalty(case)(previous, new)
    value.backward(retain_graph=True)
    first = [c.grad.clone() for c in new]
    value.backward()
    for once, c in zip(first, new, strict=True):
        assert_same_bits(c.grad, 2 * once)


def test_an_expanded_upstream(case):
    previous, current = modules(ODD[:2], integers, case.device)
    _, new = leaves(previous, current)
    penalty(case)(previous, new).expand(3, 2).sum().backward()
    for c, exact in zip(new, oracle(previous, current).current, strict=True):
        assert_same_bits(c.grad.cpu(), 6 * torch.as_tensor(exact).float())


@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives(case, norm):
    """The gradient of the squared norm is linear in ``current``; that of l1 is constant."""
    previous, current = modules([((4, 2), 3, 5)], device=case.device)
    earlier, new = leaves(previous, current)
    value = penalty(case, norm)(earlier, new)
    (grad,) = torch.autograd.grad(value, new, create_graph=True)
    grad.square().sum().backward()
    p, c = torch.cat(earlier[0]).detach(), current[0].clone().requires_grad_()
    plain = (p @ c.mT).abs().sum() if norm == "l1" else (p @ c.mT).square().sum()
    (expected,) = torch.autograd.grad(plain, c, create_graph=True)
    second = torch.autograd.grad(expected.square().sum(), c, allow_unused=True)[0]
    found = new[0].grad if new[0].grad is not None else torch.zeros_like(c)
    torch.testing.assert_close(found, torch.zeros_like(c) if second is None else second)


def test_gradcheck_of_the_reference():
    previous, current = modules(
        [((3, 2), 2, 4), ((), 1, 3)], previous=torch.float64, current=torch.float64
    )
    earlier, new = leaves(previous, current)
    for norm in NORMS:

        def value(*tensors, norm=norm):
            return trimtab.orthogonal_penalty(
                [tensors[2:], []], tensors[:2], norm=norm, weight=[0.5, 2.0], impl="reference"
            )

        inputs = (*new, *earlier[0])
        assert torch.autograd.gradcheck(value, inputs)
        assert torch.autograd.gradgradcheck(value, inputs)


def test_weights_may_be_a_tensor(case):
    previous, current = modules(device=case.device)
    numbers = penalty(case, weight=WEIGHT)(previous, current)
    tensor = penalty(case, weight=torch.tensor(WEIGHT, device=case.device))(previous, current)
    assert_same_bits(tensor, numbers)


def test_same_inputs_same_bits(case):
    previous, current = modules(device=case.device)

    def run():
        earlier, new = leaves(previous, current)
        value = penalty(case)(earlier, new)
        value.backward()
        return [value.detach(), *(t.grad for t in new), *(t.grad for ts in earlier for t in ts)]

    first = run()
    for _ in range(2 if case.impl == "triton" and case.device == "cpu" else 10):
        for again, once in zip(run(), first, strict=True):
            assert_same_bits(again, once)


def test_a_module_does_not_depend_on_the_others(case):
    previous, current = modules(device=case.device)
    _, new = leaves(previous, current)
    penalty(case)(previous, new).backward()
    for m in (0, 3, 9):
        (alone,) = leaves([], [current[m]])[1]
        penalty(case)([previous[m]], [alone]).backward()
        assert_same_bits(new[m].grad, alone.grad)


def test_inputs_are_left_alone(case):
    previous, current = modules(device=case.device)
    before = [t.clone() for t in (*current, *(t for ts in previous for t in ts))]
    _, new = leaves(previous, current)
    penalty(case)(previous, new).backward()
    for t, kept in zip((*new, *(t for ts in previous for t in ts)), before, strict=True):
        assert_same_bits(t.detach(), kept)


def test_storage_that_moves_is_followed(case):
    """Kernels may keep tables of addresses; the values behind them may change and move."""
    previous, current = modules(ODD[:4], integers, case.device)
    for step in range(3):
        value = penalty(case)(previous, current).item()
        assert value == oracle(previous, current).value
        if step == 0:
            previous[0][0].mul_(-3)
        for t in (*current, *(t for ts in previous for t in ts)):
            t.data = t.data.clone() if step else t.data.flip(0).mul(2)


def test_numpy_and_torch_agree_on_what_is_tested():
    previous, current = modules(ODD[2:3])
    value = sum((p @ current[0].mT).abs().sum() for p in previous[0])
    assert abs(value.item() - oracle(previous, current).value) <= 1e-5 * value.item()
    assert array(current[0]).dtype == "float64"
