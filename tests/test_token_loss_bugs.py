"""Bugs that were found in fused losses elsewhere, each with a test here.

The numbers are those of the list that the project started from; a bug that another file tests as a
whole is named there: 2 and 3 (upstream gradients that are not ones, results never compared with
themselves) are how ``trimtab.testing.values_and_grads`` works, 12 and 15 stand in
``test_token_loss_torch.py``.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import trimtab
from token_loss_cases import problem
from trimtab.testing import assert_within_budget, max_error, values_and_grads


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "upstream", ["uneven", "first element 0", "expanded", "strided", "one hot"]
)
def test_01_per_token_upstream_read_as_a_scalar(case, upstream, frozen):
    given = problem(ignored=False, device=case.device)
    n = given.target.numel()
    gradient = {
        "uneven": torch.linspace(-2.0, 3.0, n),
        "first element 0": torch.arange(float(n)),
        "expanded": torch.tensor(0.37).expand(n),
        "strided": torch.randn(n, 2)[:, 0],
        "one hot": torch.eye(n)[5],
    }[upstream].to(case.device)

    def run(impl, dtype):
        input, weight, *_ = given.tensors(dtype)
        weight.requires_grad_(not frozen)
        input.requires_grad_()
        loss = trimtab.linear_cross_entropy(
            input, weight, given.target, reduction="none", impl=impl
        )
        loss.backward(gradient.to(loss.dtype))
        return [loss.detach(), input.grad, *([] if frozen else [weight.grad])]

    truth, eager = run("reference", torch.float64), run("reference", torch.float32)
    for ours, theirs, true in zip(run(case.impl, torch.float32), eager, truth, strict=True):
        assert_within_budget(ours, theirs, true)


@pytest.mark.op("cross_entropy")
@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999, 1 - 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_04_gradient_of_a_confident_target_cancels(case, probability, dtype):
    """Where p rounds to 1, p - 1 has no digits left: error within eager's, relatively."""
    logits = torch.randn(8, 127, device=case.device)
    target = torch.randint(127, (8,), device=case.device)
    rest = torch.logsumexp(logits.scatter(1, target[:, None], float("-inf")), 1)
    odds = torch.log(torch.tensor(probability / (1 - probability)))
    logits = logits.scatter(1, target[:, None], (rest + odds)[:, None]).to(dtype)

    def relative_errors(impl, precision):
        def run(impl, precision):
            loss, grad = values_and_grads(
                lambda z: trimtab.cross_entropy(z, target, reduction="sum", impl=impl),
                [logits.to(precision)],
            )
            return loss, grad.gather(1, target[:, None])

        truth = run("reference", torch.float64)
        info = torch.finfo(precision)
        subnormal = info.smallest_normal * info.eps
        return [
            float((((ours.double() - true).abs() - subnormal).clamp(min=0) / true.abs()).max())
            for ours, true in zip(run(impl, precision), truth, strict=True)
        ]

    for ours, eager, result in zip(
        relative_errors(case.impl, dtype),
        relative_errors("reference", dtype),
        (torch.float32, dtype),
        strict=True,
    ):
        assert ours <= eager + torch.finfo(result).eps
        # The target is kept out of the sum, so that a confident row has the accuracy of any other.
        # What is left is the rounding of the exponent, the log-odds.
        if case.impl != "reference":
            assert ours <= (4 + float(odds)) * torch.finfo(result).eps


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_05_loss_lost_under_a_common_offset(case, offset):
    given = problem(device=case.device)

    def run(bias, impl, dtype):
        return trimtab.linear_cross_entropy(
            given.input.to(dtype),
            given.weight.to(dtype),
            given.target,
            linear_bias=bias.to(dtype),
            reduction="none",
            impl=impl,
        )

    shifted = run(torch.full((63,), offset, device=case.device), case.impl, torch.float32)
    plain = run(torch.zeros(63, device=case.device), "reference", torch.float64)
    # The offset rounds the logits to eps * 1e4; two of them meet in a loss.
    assert max_error(shifted, plain) <= 2 * torch.finfo(torch.float32).eps * abs(offset)


@pytest.mark.op("cross_entropy")
def test_05_all_logits_negative(case):
    logits = torch.randn(5, 300, device=case.device) - 500.0
    target = torch.arange(5, device=case.device)
    ours = trimtab.cross_entropy(logits, target, reduction="none", impl=case.impl)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target, reduction="none"))


@pytest.mark.parametrize("classes", [1000 + 7, 4096 + 1, 9999])
def test_06_vocabulary_that_is_no_multiple_of_a_tile(case, classes):
    given = problem(n=5, v=classes, d=3, device=case.device)
    input, weight, *_ = given.tensors(torch.float32)
    ours = trimtab.linear_cross_entropy(
        input, weight, given.target, reduction="none", impl=case.impl
    )
    torch.testing.assert_close(
        ours, F.cross_entropy(input @ weight.T, given.target, reduction="none")
    )


@pytest.mark.op("linear_logp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_07_log_probability_above_0(case, dtype):
    scales = torch.logspace(-4, 2, 40, device=case.device)[:, None]
    input = (scales * torch.randn(40, 8, device=case.device)).to(dtype)
    weight = torch.randn(130, 8, device=case.device).to(dtype)
    best = (input.float() @ weight.float().T).argmax(-1)
    assert trimtab.linear_logp(input, weight, best, impl=case.impl).logp.max() <= 0
    assert (
        trimtab.linear_cross_entropy(input, weight, best, reduction="none", impl=case.impl).min()
        >= 0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_08_head_gradient_error_grows_with_the_number_of_chunks(case, dtype):
    n = 256 if case.impl != "triton" else 64
    given = problem(n=n, d=8, v=16, dtype=dtype, ignored=False, device=case.device)

    def error(chunks):
        input, weight, *_ = given.tensors(dtype)
        weight.requires_grad_()
        options = trimtab.TokenLossOptions(chunk_size=n // chunks)
        trimtab.linear_cross_entropy(
            input, weight, given.target, reduction="sum", impl=case.impl, options=options
        ).backward()
        exact = given.weight.clone().requires_grad_()
        trimtab.linear_cross_entropy(
            given.input, exact, given.target, reduction="sum", impl="reference"
        ).backward()
        return float((weight.grad - exact.grad).norm() / exact.grad.norm())

    assert error(n // 4) <= 2 * error(1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_09_second_backward_corrupts_or_fails(case, reduction):
    """Two backwards with different upstreams, and each parameter accumulates both."""
    given = problem(device=case.device)
    input, weight, *_ = given.tensors(torch.float32)
    weight.requires_grad_()
    loss = trimtab.linear_cross_entropy(
        input, weight, given.target, reduction=reduction, impl=case.impl
    )
    ones = torch.ones_like(loss)
    loss.backward(ones, retain_graph=True)
    first = weight.grad.clone()
    loss.backward(3 * ones)
    torch.testing.assert_close(weight.grad, 4 * first)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("nothing", ["all ignored", "all weights 0", "no tokens"])
@pytest.mark.parametrize("count", [None, 2])
def test_11_nothing_to_learn_from(case, reduction, nothing, count):
    given = problem(n=0 if nothing == "no tokens" else 6, device=case.device)
    n = given.target.numel()
    input, weight, bias, _ = (
        None if t is None else t.requires_grad_() for t in given.tensors(torch.float32)
    )
    shape = (n,) if count is None else (count, n)
    token_weight = torch.zeros(shape) if nothing == "all weights 0" else torch.rand(shape)
    target = (
        torch.full_like(given.target, -100)
        if nothing == "all ignored"
        else given.target.clamp(min=0)
    )
    loss = trimtab.linear_cross_entropy(
        input,
        weight,
        target,
        linear_bias=bias,
        token_weight=token_weight.to(case.device),
        reduction=reduction,
        impl=case.impl,
    )
    expected = 0.0 if reduction != "mean" or nothing == "all weights 0" else float("nan")
    torch.testing.assert_close(loss, torch.full_like(loss, expected), equal_nan=True)
    loss.sum().backward()
    for leaf in (input, weight, bias):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_11_weight_of_an_ignored_token(case, value, reduction, frozen):
    given = problem(device=case.device)
    input, weight, *_ = given.tensors(torch.float32)
    weight.requires_grad_(not frozen)
    input.requires_grad_()
    token_weight = given.token_weight.float()
    token_weight[given.target == -100] = value
    token_weight.requires_grad_()
    loss = trimtab.linear_cross_entropy(
        input, weight, given.target, token_weight=token_weight, reduction=reduction, impl=case.impl
    )
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    ignored = given.target == -100
    assert torch.equal(input.grad[ignored], torch.zeros_like(input.grad[ignored]))
    assert torch.equal(token_weight.grad[ignored], torch.zeros_like(token_weight.grad[ignored]))
    assert torch.isfinite(input.grad).all()


@pytest.mark.op("cross_entropy")
def test_12_a_masked_class_gives_no_nan(case):
    logits = torch.randn(4, 70, device=case.device)
    logits[:, 10:40] = float("-inf")
    target = torch.tensor([0, 5, 45, 69], device=case.device)
    loss, grad = values_and_grads(
        lambda z: trimtab.cross_entropy(z, target, impl=case.impl), [logits]
    )
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    assert torch.equal(grad[:, 10:40], torch.zeros(4, 30, device=case.device))
    if case.impl != "reference":
        weight = torch.eye(70, device=case.device)
        finite = logits.nan_to_num(neginf=-1e30)
        result = trimtab.linear_logp(finite, weight, target, impl=case.impl)
        assert torch.isfinite(result.entropy).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_13_a_frozen_head_allocates_its_gradient(case, reduction, monkeypatch):
    if case.impl == "reference":
        pytest.skip("the oracle makes no promise of memory")
    given = problem(d=48, v=50, device=case.device)
    sizes = []
    for name in ("new_empty", "new_zeros"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, original=original, **kwargs):
            result = original(self, *args, **kwargs)
            sizes.append(tuple(result.shape))
            return result

        monkeypatch.setattr(torch.Tensor, name, spy)
    original_like = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **kw: sizes.append(tuple(t.shape)) or original_like(t, **kw)
    )
    input, weight, *_ = given.tensors(torch.bfloat16)
    loss = trimtab.linear_cross_entropy(
        input.requires_grad_(), weight, given.target, reduction=reduction, impl=case.impl
    )
    loss.sum().backward()
    assert (50, 48) not in sizes
    weight.requires_grad_()
    trimtab.linear_cross_entropy(
        input, weight, given.target, reduction=reduction, impl=case.impl
    ).sum().backward()
    assert (50, 48) in sizes


def test_14_a_sharded_head_that_is_not_gathered():
    with pytest.raises(ValueError, match="gathered first"):
        trimtab.linear_cross_entropy(
            torch.zeros(2, 4), torch.zeros(0, 4), torch.zeros(2, dtype=torch.int64)
        )


@pytest.mark.op("cross_entropy")
def test_16_the_fused_path_is_silently_not_used(monkeypatch):
    """Also when an option is given: none of them sends a call to the oracle in secret."""
    from trimtab.ops import token_loss

    def forbidden(*args, **kwargs):
        raise AssertionError("the oracle was called")

    monkeypatch.setattr(token_loss.reference, "token_loss", forbidden)
    monkeypatch.setattr(token_loss.reference, "linear_token_loss", forbidden)
    given = problem()
    for options in (
        {"label_smoothing": 0.1},
        {"softcap": 2.0},
        {"lse_square_scale": 0.1},
        {"reduction": "none"},
    ):
        trimtab.linear_cross_entropy(
            given.input.float(), given.weight.float(), given.target, **options
        )
        trimtab.cross_entropy(given.input.float(), given.target.clamp(max=15), **options)


def test_17_more_rows_than_a_cuda_grid_has():
    n = 70_000
    input, target = torch.randn(n, 2), torch.randint(3, (n,))
    weight = torch.randn(3, 2)
    ours = trimtab.linear_cross_entropy(input, weight, target, reduction="none", impl="native")
    torch.testing.assert_close(ours, F.cross_entropy(input @ weight.T, target, reduction="none"))


@pytest.mark.slow
def test_18_offsets_beyond_32_bits():
    """Rows 2**31 elements apart: 32-bit products would wrap around into the first row."""
    code = """
import torch, trimtab
rows, classes = 16384, 152064 // 2
stride = 2**31 // (rows - 1) + 1
memory = torch.zeros(rows * stride, dtype=torch.bfloat16)
logits = memory.as_strided((rows, 64), (stride, 1))
assert logits.stride(0) * (rows - 1) > 2**31
logits[-1] = torch.arange(64.0).bfloat16()
target = torch.full((rows,), 3)
loss = trimtab.cross_entropy(logits, target, reduction="none", impl="native")
expected = torch.nn.functional.cross_entropy(logits[[0, -1]].float(), target[:2], reduction="none")
torch.testing.assert_close(loss[[0, -1]], expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_19_autocast_keeps_the_float32_head_gradient(case, dtype):
    """With a float32 head under autocast the gradient is the float32 sum itself."""
    given = problem(n=64, dtype=dtype, ignored=False, device=case.device)
    weight = given.weight.float().requires_grad_()
    with torch.autocast(case.device, dtype=dtype):
        loss = trimtab.linear_cross_entropy(
            given.input.to(dtype),
            weight,
            given.target,
            impl=case.impl,
            options=trimtab.TokenLossOptions(chunk_size=16),
        )
    loss.backward()
    assert weight.grad.dtype == torch.float32
    if case.impl != "reference":
        rounded = weight.grad.to(dtype).float()
        assert not torch.equal(weight.grad, rounded)


def test_20_float16_gradients_of_a_small_mean_underflow(case):
    """Made in forward, before the loss scale is known: p / N is below float16's range."""
    n, scale = 4096 if case.impl != "triton" else 256, 2.0**16
    input = torch.randn(n, 8, device=case.device).half()
    weight = (0.1 * torch.randn(40, 8, device=case.device)).half()
    target = torch.randint(40, (n,), device=case.device)

    def run(impl, dtype):
        x, w = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (input, weight))
        token_weight = torch.full((n,), 1e-3, device=case.device)
        loss = trimtab.linear_cross_entropy(x, w, target, token_weight=token_weight, impl=impl)
        (scale * loss).backward()
        return [x.grad, w.grad]

    truth, eager = run("reference", torch.float64), run("reference", torch.float16)
    for ours, theirs, true in zip(run(case.impl, torch.float16), eager, truth, strict=True):
        assert_within_budget(ours, theirs, true)
        assert max_error(ours, true) <= 2e-3 * float(true.abs().max())
