"""Every implementation in float64 against an oracle that shares no code with the package.

The other files compare with ``impl="reference"``, which goes through the same weights, divisors and
checks: a mistake there would cancel out.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import token_loss_oracle as oracle
import trimtab
from token_loss_cases import problem
from trimtab.testing import values_and_grads

IMPLS = ("reference", "native")


def agree(ours, truth):
    assert len(ours) == len(truth)
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def token_weights(count):
    """Each vector has its zeros elsewhere."""
    weights = torch.randn(count, 11, dtype=torch.float64)
    weights[torch.arange(count), torch.arange(count) + 1] = 0.0
    return weights


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss(impl, count, reduction, frozen):
    given = problem(n=11, d=4, v=7)
    given.target[3] = 2
    class_weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 1.5, 0.1]).double()
    weight = token_weights(count or 1) if count else token_weights(1)[0]
    for options, ignored, c in itertools.product(
        [{}, {"logit_scale": -0.7, "label_smoothing": 0.3}, {"softcap": 1.5, "logit_scale": 2.0},
         {"lse_square_scale": 0.02, "label_smoothing": 1.0}, {"softcap": 2.0, "logit_scale": -1.0}],
        [-100, 2], [None, class_weight],
    ):  # fmt: skip
        target = given.target.where(given.target >= 0, torch.tensor(ignored))

        def ours(x, w, b, t, target=target, options=options, ignored=ignored, c=c):
            w, b = (given.weight, given.bias) if frozen else (w, b)
            return trimtab.linear_cross_entropy(
                x, w, target, linear_bias=b, token_weight=t, weight=c, reduction=reduction,
                ignore_index=ignored, impl=impl, options=trimtab.TokenLossOptions(chunk_size=4),
                **options,
            )  # fmt: skip

        def truth(x, w, b, t, target=target, options=options, ignored=ignored, c=c):
            w, b = (given.weight, given.bias) if frozen else (w, b)
            return oracle.weighted_loss(
                x,
                w,
                b,
                target,
                t,
                class_weight=c,
                reduction=reduction,
                ignore_index=ignored,
                **options,
            )

        leaves = [given.input, given.weight, given.bias, weight]
        agree(values_and_grads(ours, leaves), values_and_grads(truth, leaves))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_constant_weights_that_skip_rows(impl, count, reduction):
    """A row is skipped where every vector has a 0, not where one has."""
    given = problem(n=11, d=4, v=7)
    weight = token_weights(count) if count else token_weights(1)[0]
    weight[..., 8] = 0.0

    def ours(x, w, b):
        return trimtab.linear_cross_entropy(
            x,
            w,
            given.target,
            linear_bias=b,
            token_weight=weight,
            reduction=reduction,
            impl=impl,
        )

    def truth(x, w, b):
        return oracle.weighted_loss(x, w, b, given.target, weight, reduction=reduction)

    leaves = [given.input, given.weight, given.bias]
    agree(values_and_grads(ours, leaves), values_and_grads(truth, leaves))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [None, 3])
def test_normalizers(impl, count):
    given = problem(n=11, d=4, v=7)
    weight = token_weights(count or 1).abs() + 0.1 if count else token_weights(1)[0].abs() + 0.1
    divisor = torch.arange(2.0, 2.0 + (count or 1)).double()
    for normalizer in (5.0, "token_weight", divisor if count else divisor[0]):

        def run(loss, normalizer=normalizer):
            tensors = [given.input, given.weight, given.bias, weight]
            if isinstance(normalizer, str | float):
                return values_and_grads(lambda *leaves: loss(*leaves, normalizer), tensors)
            return values_and_grads(loss, [*tensors, normalizer])

        def ours(x, w, b, t, n):
            return trimtab.linear_cross_entropy(
                x, w, given.target, linear_bias=b, token_weight=t, normalizer=n, impl=impl
            )

        def truth(x, w, b, t, n):
            return oracle.weighted_loss(x, w, b, given.target, t, normalizer=n)

        agree(run(ours), run(truth))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "softcap": 2.0, "logit_scale": -1.3}, {"ignore_index": -100}],
)
def test_logp_and_its_second_derivative(impl, options):
    given = problem(n=11, d=4, v=7, ignored="ignore_index" in options)
    leaves = [given.input, given.weight, given.bias]

    def ours(x, w, b):
        return trimtab.linear_logp(x, w, given.target, linear_bias=b, impl=impl, **options)[:3]

    def truth(x, w, b):
        return oracle.logp_and_entropy(x, w, b, given.target, **options)

    agree(values_and_grads(ours, leaves), values_and_grads(truth, leaves))

    def gradient(function):
        def run(*tensors):
            outputs = function(*tensors)
            total = sum((k + 1) * output.square().sum() for k, output in enumerate(outputs))
            return torch.autograd.grad(total, tensors, create_graph=True)

        return run

    agree(values_and_grads(gradient(ours), leaves), values_and_grads(gradient(truth), leaves))


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_second_derivative(impl):
    given = problem(n=6, d=3, v=5)
    class_weight = torch.rand(5, dtype=torch.float64)
    leaves = [given.input, given.weight, given.bias, given.token_weight]
    for reduction in ("mean", "none"):

        def gradient(function, reduction=reduction):
            def run(*tensors):
                total = function(*tensors, reduction).square().sum()
                return torch.autograd.grad(total, tensors, create_graph=True)

            return run

        def ours(x, w, b, t, reduction):
            return trimtab.linear_cross_entropy(
                x, w, given.target, linear_bias=b, token_weight=t, weight=class_weight, softcap=2.0,
                reduction=reduction, impl=impl,
            )  # fmt: skip

        def truth(x, w, b, t, reduction):
            return oracle.weighted_loss(
                x,
                w,
                b,
                given.target,
                t,
                class_weight=class_weight,
                softcap=2.0,
                reduction=reduction,
            )

        agree(values_and_grads(gradient(ours), leaves), values_and_grads(gradient(truth), leaves))


@pytest.mark.parametrize("impl", IMPLS)
def test_ratio(impl):
    given, other = problem(n=11, d=4, v=7), problem(n=11, d=3, v=7)
    shared = {"logit_scale": 1.3, "softcap": 3.0, "ignore_index": -100}
    ratio, logp, ref_logp = trimtab.linear_logp_ratio(
        given.input, given.weight, other.input, other.weight, given.target, linear_bias=given.bias,
        ref_linear_bias=other.bias, temperature=0.8, ref_temperature=1.7, impl=impl, **shared,
    )  # fmt: skip
    expected = oracle.logp_and_entropy(
        given.input, given.weight, given.bias, given.target, temperature=0.8, **shared
    )[0]
    ref_expected = oracle.logp_and_entropy(
        other.input, other.weight, other.bias, given.target, temperature=1.7, **shared
    )[0]
    agree([ratio, logp, ref_logp], [expected - ref_expected, expected, ref_expected])


@pytest.mark.parametrize("impl", IMPLS)
def test_k_dimensional_head(impl):
    input, target = torch.randn(5, 4).double(), torch.randint(6, (5, 2, 3))
    weight, bias = torch.randn(6, 2, 3, 4).double(), torch.randn(6, 2, 3).double()
    token_weight = torch.rand(5, 2, 3).double()
    options = {"softcap": 2.0, "logit_scale": 1.4, "lse_square_scale": 0.1, "label_smoothing": 0.2}
    ours = trimtab.linear_cross_entropy(
        input, weight, target, linear_bias=bias, token_weight=token_weight, impl=impl, **options
    )
    sums = [
        oracle.weighted_loss(
            input, weight[:, i, j], bias[:, i, j], target[:, i, j], token_weight[:, i, j],
            reduction="sum", **options,
        )
        for i in range(2) for j in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(ours, sum(sums) / target.numel())


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The processor's own is what the other tests run; here the narrower ones run too."""
    code = """
import torch
from token_loss_cases import check_linear_cross_entropy, problem
from trimtab.testing import values_and_grads
import token_loss_oracle as oracle, trimtab

class case: impl, device = "native", "cpu"

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for classes in (1, 3, 63, 507):
        for options in ({}, {"softcap": 3.0, "label_smoothing": 0.1, "lse_square_scale": 0.01}):
            check_linear_cross_entropy(case, problem(v=classes, dtype=dtype), dtype, **options)
given = problem(ignored=False)
leaves = [given.input.float(), given.weight.float(), given.bias.float()]
ours = trimtab.linear_logp(*leaves[:2], given.target, linear_bias=leaves[2], temperature=0.7)
truth = oracle.logp_and_entropy(*(t.double() for t in leaves), given.target, temperature=0.7)
torch.testing.assert_close([t.double() for t in ours[:3]], list(truth), rtol=1e-5, atol=1e-5)
assert torch.equal(ours.predicted, (leaves[0] @ leaves[1].T + leaves[2]).argmax(1))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRIMTAB_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    "call",
    [
        "trimtab.linear_logp(x, x, torch.zeros(3, dtype=torch.int64), impl='native')",
        "trimtab.contrastive_sample(x, x, alpha=1.0, impl='native')",
    ],
)
def test_an_unknown_instruction_set_is_an_error(call):
    result = subprocess.run(
        [sys.executable, "-c", f"import torch, trimtab\nx = torch.ones(3, 4)\n{call}"],
        env={**os.environ, "TRIMTAB_CPU_ISA": "avx5"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 1
    assert "TRIMTAB_CPU_ISA must be generic, avx2, avx512 or avx512bf16" in result.stderr


@pytest.mark.op("cross_entropy")
def test_rows_with_a_scale_that_rounds(case):
    """The largest logit is subtracted before the product, so nll >= 0 and logp <= 0 to the bit."""
    x = torch.linspace(50, 150, 400)[:, None] * torch.tensor([[1.0, 0.0, 0.0]])
    target = torch.zeros(400, dtype=torch.long)
    nll = trimtab.cross_entropy(x, target, logit_scale=0.7, reduction="none", impl=case.impl)
    assert nll.min() >= 0
    result = trimtab.linear_logp(x, torch.eye(3), target, temperature=0.7, impl=case.impl)
    assert result.logp.max() <= 0
    assert result.entropy.min() >= 0
    negative = trimtab.cross_entropy(-x, target, logit_scale=-0.7, reduction="none", impl=case.impl)
    torch.testing.assert_close(negative, nll)


@pytest.mark.parametrize("impl", IMPLS)
def test_largest_logit_infinite_or_nan(impl):
    infinite = trimtab.linear_logp(
        torch.ones(1, 1),
        torch.tensor([[0.0], [1.0], [float("inf")], [2.0]]),
        torch.tensor([1]),
        impl=impl,
    )
    assert infinite.predicted.tolist() == [2]
    nan = trimtab.linear_logp(
        torch.ones(1, 1),
        torch.tensor([[0.0], [9.0], [float("nan")], [2.0]]),
        torch.tensor([1]),
        impl=impl,
    )
    assert nan.predicted.tolist() == [2]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weight_0_on_an_infinite_loss(impl, reduction):
    weight = torch.tensor([[0.0], [-float("inf")]])
    loss = trimtab.linear_cross_entropy(
        torch.ones(2, 1), weight, torch.tensor([1, 0]), token_weight=torch.tensor([0.0, 1.0]),
        reduction=reduction, impl=impl, options=trimtab.TokenLossOptions(skip_zero_weight=False),
    )  # fmt: skip
    assert torch.equal(loss, torch.zeros_like(loss))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["loss", "tokens", "logp", "autocast"])
def test_float16_head_gradients_stay_in_range(impl, op):
    """Many tokens share a target: their sum fits where coefficients near 1 would overflow."""
    given = torch.full((1024, 4), 100.0).half()
    weight, target = torch.zeros(50, 4), torch.full((1024,), 3)
    head = (weight if op == "autocast" else weight.half()).requires_grad_()
    bias = torch.zeros(50, dtype=head.dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16, enabled=op == "autocast"):
        if op == "logp":
            loss = -trimtab.linear_logp(
                given, head, target, linear_bias=bias, impl=impl
            ).logp.mean()
        else:
            loss = trimtab.linear_cross_entropy(
                given, head, target, linear_bias=bias, impl=impl,
                reduction="none" if op == "tokens" else "mean",
            ).mean()  # fmt: skip
    (256.0 * loss).backward()
    truth = 256.0 * (torch.full((50,), 0.02) - F.one_hot(torch.tensor(3), 50))
    torch.testing.assert_close(bias.grad.float(), truth, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(
        head.grad.float(), truth[:, None].expand(50, 4) * 100, rtol=2e-3, atol=0.1
    )
