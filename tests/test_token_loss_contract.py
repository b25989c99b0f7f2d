"""Token loss: what it costs, when gradients are made, and how it lives with the rest of torch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

import token_loss_oracle as oracle
import trimtab
from token_loss_cases import problem
from trimtab.ops.token_loss import _chunks
from trimtab.testing import assert_same_bits

FAST = ("native", "triton")


@pytest.fixture
def products(monkeypatch):
    """Counts the products, in units of one N x D x V product of the problem under test."""
    flops = []

    def counted(multiply, left, right):
        def run(*args, **kwargs):
            a, b = args[left], args[right]
            flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return multiply(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "mm", counted(torch.mm, 0, 1))
    monkeypatch.setattr(torch, "addmm", counted(torch.addmm, 1, 2))

    def count(given):
        total = sum(flops)
        flops.clear()
        return total / (2 * given.input.shape[0] * given.weight.shape[0] * given.input.shape[1])

    return count


def skip_reference(case):
    if case.impl not in FAST:
        pytest.skip("the oracle makes no promise of cost")


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize(
    ("reduction", "count", "frozen", "expected"),
    [
        ("mean", None, "", 3),
        ("sum", None, "", 3),
        ("mean", 1, "", 3),
        ("none", None, "", 4),
        ("mean", 3, "", 4),
        ("none", 2, "", 4),
        ("mean", None, "head", 2),
        ("none", None, "head", 2),
        ("mean", 3, "head", 2),
        ("none", 3, "head", 2),
        ("mean", None, "input", 2),
        ("none", None, "input", 3),
        ("mean", None, "both", 1),
        ("none", 3, "both", 1),
    ],
)
def test_cost_in_products(case, products, chunk_size, reduction, count, frozen, expected):
    skip_reference(case)
    given = problem(ignored=False, weight_shape=(count,) if count else (), device=case.device)
    given.token_weight[..., 1] = 1.0
    input, weight, _, token_weight = given.tensors(torch.float32)
    input.requires_grad_(frozen not in ("input", "both"))
    weight.requires_grad_(frozen not in ("head", "both"))
    loss = trimtab.linear_cross_entropy(
        input,
        weight,
        given.target,
        token_weight=token_weight,
        reduction=reduction,
        impl=case.impl,
        options=trimtab.TokenLossOptions(chunk_size=chunk_size),
    )
    if loss.requires_grad:
        loss.backward(torch.rand_like(loss))
    assert products(given) == pytest.approx(expected)
    assert (input.grad is None) == (not input.requires_grad)
    assert (weight.grad is None) == (not weight.requires_grad)


@pytest.mark.op("linear_logp")
@pytest.mark.parametrize(
    ("frozen", "field", "expected"),
    [
        ("", "logp", 4),
        ("", "entropy", 4),
        ("head", "logp", 2),
        ("head", "entropy", 4),
        ("both", "logp", 1),
    ],
)
def test_cost_of_logp_in_products(case, products, frozen, field, expected):
    skip_reference(case)
    given = problem(ignored=False, device=case.device)
    input, weight, _, _ = given.tensors(torch.float32)
    input.requires_grad_(frozen != "both")
    weight.requires_grad_(frozen == "")
    result = trimtab.linear_logp(input, weight, given.target, impl=case.impl)
    if input.requires_grad:
        getattr(result, field).sum().backward()
    assert products(given) == pytest.approx(expected)


@pytest.mark.op("linear_logp_ratio")
def test_the_reference_side_of_a_ratio_costs_one_product(case, products):
    skip_reference(case)
    given = problem(ignored=False, device=case.device)
    input, weight, _, _ = given.tensors(torch.float32)
    input.requires_grad_()
    weight.requires_grad_()
    result = trimtab.linear_logp_ratio(input, weight, input, weight, given.target, impl=case.impl)
    result.log_ratio.sum().backward()
    assert products(given) == pytest.approx(5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_cannot_contribute_cost_nothing(case, products, reduction):
    skip_reference(case)
    given = problem(n=40, ignored=False, device=case.device)
    given.target[:10] = -100
    given.token_weight[:] = 1.0
    given.token_weight[20:30] = 0.0
    input, weight, _, token_weight = given.tensors(torch.float32)
    input.requires_grad_()
    weight.requires_grad_()
    full = 3 if reduction == "mean" else 4

    def cost(**kwargs):
        loss = trimtab.linear_cross_entropy(
            input, weight, given.target, reduction=reduction, impl=case.impl, **kwargs
        )
        loss.backward(torch.ones_like(loss))
        return products(given)

    assert cost(token_weight=token_weight) == pytest.approx(full / 2)
    assert cost() == pytest.approx(full * 3 / 4)
    off = trimtab.TokenLossOptions(skip_zero_weight=False)
    # Backward leaves out the rows whose upstream is 0 in any case.
    assert cost(token_weight=token_weight, options=off) == pytest.approx(
        full * 3 / 4 if reduction == "mean" else 3 / 4 + 3 / 2
    )
    # With a gradient for the weights, the loss of a token with weight 0 is needed.
    learned = token_weight.requires_grad_()
    assert cost(token_weight=learned) == pytest.approx(
        full * 3 / 4 if reduction == "mean" else 3 / 4 + 3 / 2
    )


def test_one_chunk_of_logits_at_a_time(case, monkeypatch):
    skip_reference(case)
    given = problem(n=50, device=case.device)
    sizes = []
    original = _chunks.chunks

    def spy(*args):
        for chunk in original(*args):
            sizes.append((chunk.logits.shape[0], chunk.logits.untyped_storage().data_ptr()))
            yield chunk

    monkeypatch.setattr(_chunks, "chunks", spy)
    input, weight, *_ = given.tensors(torch.float32)
    options = trimtab.TokenLossOptions(chunk_size=8)
    trimtab.linear_cross_entropy(input, weight, given.target, impl=case.impl, options=options)
    assert len(sizes) == 5
    assert max(rows for rows, _ in sizes) <= 8
    assert len({address for _, address in sizes}) == 1


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_through_a_retained_graph(case, reduction, frozen):
    given = problem(device=case.device)
    input, weight, _, token_weight = (t.requires_grad_() for t in given.tensors(torch.float32))
    weight.requires_grad_(not frozen)
    leaves = [tensor for tensor in (input, weight, token_weight) if tensor.requires_grad]
    loss = trimtab.linear_cross_entropy(
        input, weight, given.target, token_weight=token_weight, reduction=reduction, impl=case.impl
    )
    upstream = torch.rand_like(loss)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(-3.0)
    second = torch.autograd.grad(loss, leaves, 2.0 * upstream, retain_graph=True)
    third = torch.autograd.grad(loss, leaves, upstream)
    for a, b, c in zip(kept, second, third, strict=True):
        torch.testing.assert_close(2.0 * a, b)
        assert_same_bits(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves, upstream)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_the_oracles(case, reduction):
    given = problem(n=6, d=4, v=7, device=case.device)

    def hessian_product(impl):
        leaves = [tensor.requires_grad_() for tensor in given.tensors(torch.float32)]
        loss = (
            trimtab.linear_cross_entropy(
                leaves[0],
                leaves[1],
                given.target,
                linear_bias=leaves[2],
                token_weight=leaves[3],
                reduction=reduction,
                softcap=4.0,
                impl=impl,
            )
            .square()
            .sum()
        )
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.sin().sum() for grad in grads), leaves)

    for ours, expected in zip(
        hessian_product(case.impl), hessian_product("reference"), strict=True
    ):
        torch.testing.assert_close(
            ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )


@pytest.mark.parametrize("op", ["loss", "logp"])
def test_double_backward_with_inputs_made_of_each_other(case, op):
    """What runs from one input to the other counts once."""
    target = torch.tensor([1, 0, 4], device=case.device)

    def hessian(dtype, function, **more):
        weight = torch.linspace(-1.0, 1.5, 20, dtype=dtype, device=case.device).sin().view(5, 4)
        weight.requires_grad_()
        found = function(2 * weight[:3], weight, target, **more)
        out = found if isinstance(found, torch.Tensor) else found[0] + found[1]
        (grad,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
        return torch.autograd.grad(grad.sin().sum(), weight)[0]

    def oracle_loss(input, weight, target):
        return oracle.weighted_loss(input, weight, None, target)

    def oracle_logp(input, weight, target):
        return oracle.logp_and_entropy(input, weight, None, target)

    ours, theirs = {
        "loss": (trimtab.linear_cross_entropy, oracle_loss),
        "logp": (trimtab.linear_logp, oracle_logp),
    }[op]
    truth = hessian(torch.float64, theirs)
    actual = hessian(torch.float32, ours, impl=case.impl).double()
    torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


@pytest.mark.parametrize("op", ["loss", "tokens", "logp", "rows"])
def test_gradcheck_of_the_compiled_kernels(op):
    given = problem(n=5, d=3, v=6)
    input, weight, bias, token_weight = given.tensors(torch.float64)
    for tensor in (input, weight, bias, token_weight):
        tensor.requires_grad_()
    common = {"softcap": 3.0, "logit_scale": 1.2, "impl": "native"}
    if op == "logp":

        def function(x, w, b):
            return trimtab.linear_logp(
                x, w, given.target, linear_bias=b, ignore_index=-100, temperature=0.8, **common
            )[:3]

        assert torch.autograd.gradcheck(function, (input, weight, bias))
    elif op == "rows":
        logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda z: trimtab.cross_entropy(z, given.target, label_smoothing=0.1, **common),
            (logits,),
        )
    else:
        reduction = "mean" if op == "loss" else "none"
        assert torch.autograd.gradcheck(
            lambda x, w, b, t: trimtab.linear_cross_entropy(
                x,
                w,
                given.target,
                linear_bias=b,
                token_weight=t,
                reduction=reduction,
                label_smoothing=0.1,
                lse_square_scale=0.01,
                **common,
            ),
            (input, weight, bias, token_weight),
        )


def test_same_bits_every_time(case):
    given = problem(n=129, v=252, device=case.device)

    def run():
        leaves = [tensor.requires_grad_() for tensor in given.tensors(torch.float32)]
        loss = trimtab.linear_cross_entropy(
            leaves[0],
            leaves[1],
            given.target,
            linear_bias=leaves[2],
            token_weight=leaves[3],
            impl=case.impl,
        )
        loss.backward()
        return [loss, *(leaf.grad for leaf in leaves)]

    first = run()
    for _ in range(9 if case.impl != "triton" else 1):
        for again, before in zip(run(), first, strict=True):
            assert_same_bits(again, before)


@pytest.mark.op("cross_entropy")
def test_a_row_does_not_depend_on_its_batch(case):
    logits = 3 * torch.randn(20, 507, device=case.device)
    target = torch.randint(507, (20,), device=case.device)
    whole = trimtab.cross_entropy(logits, target, reduction="none", impl=case.impl)
    for rows in (slice(0, 1), slice(7, 11), slice(19, 20)):
        part = trimtab.cross_entropy(logits[rows], target[rows], reduction="none", impl=case.impl)
        assert_same_bits(part, whole[rows])


def test_inputs_are_left_alone(case):
    given = problem(device=case.device)
    leaves = [tensor.requires_grad_() for tensor in given.tensors(torch.float32)]
    before = [leaf.detach().clone() for leaf in leaves]
    logits = torch.randn(37, 63, device=case.device, requires_grad=True)
    kept = logits.detach().clone()
    trimtab.linear_cross_entropy(
        leaves[0],
        leaves[1],
        given.target,
        linear_bias=leaves[2],
        token_weight=leaves[3],
        impl=case.impl,
    ).backward()
    trimtab.cross_entropy(logits, given.target, impl=case.impl).backward()
    for leaf, value in zip([*leaves, logits], [*before, kept], strict=True):
        assert_same_bits(leaf.detach(), value)


def test_memory_returns_when_the_loss_goes(case):
    given = problem(device=case.device)
    input, weight, *_ = given.tensors(torch.float32)
    hidden = input.requires_grad_() * 1.0
    alive = weakref.ref(hidden)
    loss = trimtab.linear_cross_entropy(
        hidden, weight.requires_grad_(), given.target, impl=case.impl
    )
    loss.backward()
    gc.disable()
    try:
        del hidden, loss
        assert alive() is None, "a reference cycle keeps the hidden states"
    finally:
        gc.enable()


@pytest.mark.parametrize("chunk_size", [None, 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_to_another_dtype_than_the_heads(case, head_dtype, dtype, chunk_size):
    case.skip_unless_taken(torch.bfloat16)
    given = problem(dtype=torch.bfloat16, device=case.device)
    options = trimtab.TokenLossOptions(chunk_size=chunk_size)

    def gradients(impl):
        leaves = [tensor.requires_grad_() for tensor in given.tensors(head_dtype)[:3]]
        with torch.autocast(case.device, dtype=dtype):
            loss = trimtab.linear_cross_entropy(
                *leaves[:2], given.target, linear_bias=leaves[2], impl=impl, options=options
            )
        loss.backward()
        return [leaf.grad for leaf in leaves]

    for ours, eager in zip(gradients(case.impl), gradients("reference"), strict=True):
        assert ours.dtype == head_dtype
        torch.testing.assert_close(ours, eager, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_is_as_for_a_linear_layer(case, input_dtype, weight_dtype, reduction):
    case.skip_unless_taken(torch.bfloat16)
    given = problem(dtype=torch.bfloat16, device=case.device)

    def run(function):
        input = given.input.to(input_dtype).requires_grad_()
        weight = given.weight.to(weight_dtype).requires_grad_()
        with torch.autocast(case.device, dtype=torch.bfloat16):
            loss = function(input, weight)
        loss.backward(
            torch.linspace(0.1, 1.0, loss.numel(), device=case.device)
            .reshape(loss.shape)
            .to(loss.dtype)
        )
        return [loss.float(), input.grad, weight.grad]

    def eager(input, weight):
        return F.cross_entropy(F.linear(input, weight).float(), given.target, reduction=reduction)

    def ours(input, weight):
        return trimtab.linear_cross_entropy(
            input, weight, given.target, reduction=reduction, impl=case.impl
        )

    for actual, expected in zip(run(ours), run(eager), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=2e-3)


def test_functional_call(case):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(16, 63)

        def forward(self, hidden, target):
            return trimtab.linear_cross_entropy(
                hidden, self.head.weight, target, linear_bias=self.head.bias, impl=case.impl
            )

    model, given = Model(), problem()
    replaced = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    loss = torch.func.functional_call(model, replaced, (given.input.float(), given.target))
    torch.testing.assert_close(loss, torch.tensor(63.0).log())
