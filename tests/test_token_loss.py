"""Token loss: values and gradients of every implementation against the float64 oracle."""

from __future__ import annotations

import itertools

import pytest
import torch

import trimtab
from token_loss_cases import LOW_PRECISION, ODD_SIZES, check_linear_cross_entropy, problem
from trimtab.ops.token_loss import _chunks
from trimtab.testing import assert_same_bits, assert_within_budget, values_and_grads

OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"lse_square_scale": 1e-2},
    {"label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 1.5, "lse_square_scale": 1e-3},
]


def named(options: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items()) or "plain"


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("classes", ODD_SIZES)
def test_odd_vocabularies(case, dtype, classes):
    check_linear_cross_entropy(case, problem(v=classes, dtype=dtype, device=case.device), dtype)


@pytest.mark.parametrize("tokens", ODD_SIZES)
def test_odd_token_counts(case, tokens):
    check_linear_cross_entropy(case, problem(n=tokens, v=31, device=case.device), torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("class_weighted", [False, True], ids=["", "class-weights"])
def test_options(case, reduction, options, class_weighted):
    given = problem(device=case.device)
    if class_weighted:
        options = {**options, "weight": torch.linspace(0.0, 2.0, 63, device=case.device)}
    check_linear_cross_entropy(case, given, torch.float32, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", OPTIONS[1:], ids=named)
def test_options_in_16_bits(case, dtype, reduction, options):
    given = problem(dtype=dtype, device=case.device)
    check_linear_cross_entropy(case, given, dtype, reduction=reduction, **options)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalizer", [None, 7.0, "token_weight", "tensor"])
def test_several_weight_vectors_and_normalizers(case, count, reduction, normalizer):
    if normalizer is not None and reduction != "mean":
        pytest.skip("only the mean has a divisor")
    given = problem(weight_shape=(count,), device=case.device)
    if normalizer == "tensor":
        normalizer = torch.arange(1, count + 1, device=case.device)
    options = {"reduction": reduction, "normalizer": normalizer}
    check_linear_cross_entropy(case, given, torch.float32, **options)


@pytest.mark.parametrize("chunk_size", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("accum_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_chunks(case, chunk_size, dtype, accum_dtype):
    if chunk_size == 1 and accum_dtype == torch.bfloat16:
        pytest.skip("37 roundings of the sum are what this option is for")
    options = trimtab.TokenLossOptions(chunk_size=chunk_size, accum_dtype=accum_dtype)
    given = problem(dtype=dtype, device=case.device)
    check_linear_cross_entropy(case, given, dtype, options=options)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_rows_of_logits_apart_in_memory(case, dtype, monkeypatch):
    """As on CUDA, where the rows of an odd vocabulary are aligned."""
    assert _chunks.row_stride(50257, 2, "cuda") == 50264
    monkeypatch.setattr(_chunks, "row_stride", lambda classes, itemsize, device: classes + 7)
    check_linear_cross_entropy(case, problem(dtype=dtype, device=case.device), dtype)


def test_native_float64_is_the_oracle():
    """The compiled kernels in float64 agree with autograd to its last digits."""
    for options, reduction in itertools.product(OPTIONS, ["mean", "none"]):
        given = problem(device="cpu")

        def run(impl, given=given, options=options, reduction=reduction):
            return values_and_grads(
                lambda x, w, b, t: trimtab.linear_cross_entropy(
                    x,
                    w,
                    given.target,
                    linear_bias=b,
                    token_weight=t,
                    reduction=reduction,
                    impl=impl,
                    **options,
                ),
                given.tensors(torch.float64),
            )

        for ours, truth in zip(run("native"), run("reference"), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.op("cross_entropy")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize(
    "shape", [(7, 63), (63,), (4, 17, 3), (2, 5, 3, 2), (0, 8), (3, 11, 0)], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_of_logits(case, dtype, shape, reduction):
    classes = shape[0] if len(shape) == 1 else shape[1]
    target_shape = () if len(shape) == 1 else (shape[0], *shape[2:])
    logits = torch.randn(shape, device=case.device).to(dtype).double()
    target = torch.randint(classes, target_shape, device=case.device)
    if target.numel() > 2:
        target.view(-1)[1] = -100
    token_weight = torch.randn(target_shape, device=case.device)
    weight = torch.rand(classes, device=case.device)

    def run(impl, precision):
        return values_and_grads(
            lambda z, t: trimtab.cross_entropy(
                z,
                target,
                weight=weight,
                token_weight=t,
                reduction=reduction,
                label_smoothing=0.1,
                impl=impl,
            ),
            [logits.to(precision), token_weight.to(torch.promote_types(precision, torch.float32))],
        )

    truth = run("reference", torch.float64)
    # The terms that a loss is the difference of: they, not the loss, set its rounding.
    terms = (
        logits.abs().max() + logits.logsumexp(0 if len(shape) == 1 else 1).abs().max()
        if logits.numel()
        else 0.0
    )
    scale = float(terms * token_weight.abs().max()) if logits.numel() else 0.0
    if reduction == "sum":
        scale *= max(1, target.numel())
    for ours, eager, true in zip(
        run(case.impl, dtype), run("reference", dtype), truth, strict=True
    ):
        assert_within_budget(
            ours, eager, true, scale=scale if ours is not logits and ours.dtype != dtype else 0.0
        )


@pytest.mark.op("linear_logp")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("classes", [1, 3, 127, 507])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": "tokens", "softcap": 4.0, "logit_scale": 1.5},
        {"frozen": True},
    ],
    ids=named,
)
def test_logp_entropy_and_lse(case, dtype, classes, options):
    options = dict(options)
    given = problem(v=classes, dtype=dtype, device=case.device)
    frozen = options.pop("frozen", False)
    if options.get("temperature") == "tokens":
        options["temperature"] = torch.linspace(0.5, 2.0, 37, device=case.device)

    def run(impl, precision):
        input, weight, bias, _ = given.tensors(precision)

        def outputs(x, w, b):
            w, b = (weight, bias) if frozen else (w, b)
            return trimtab.linear_logp(
                x, w, given.target, linear_bias=b, ignore_index=-100, impl=impl, **options
            )

        return (
            values_and_grads(outputs, [input] if frozen else [input, weight, bias])
            if not frozen
            else (values_and_grads(lambda x: outputs(x, None, None), [input]))
        )

    truth, eager, actual = (
        run("reference", torch.float64),
        run("reference", dtype),
        run(case.impl, dtype),
    )
    names = ["logp", "entropy", "lse", "predicted", "input.grad", "weight.grad", "bias.grad"]
    for name, ours, theirs, true in zip(names, actual, eager, truth, strict=False):
        if name == "predicted":
            assert ours.dtype == torch.int64
            continue
        # The gradients sum three upstreams that may cancel: their terms are of upstream size.
        scale = float(max(t.abs().max() for t in truth[:3])) if name in names[:3] else 1.0
        assert_within_budget(ours, theirs, true, name=name, dtype=dtype, scale=scale)


@pytest.mark.op("linear_logp")
def test_predicted_is_the_first_of_the_largest_logits(case):
    weight = torch.eye(6, device=case.device)
    rows = torch.tensor(
        [[0, 3, 1, 3, 0, 2], [5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 9.0], [-1, -2, -3, -4, -5, -6]]
    )
    target = torch.tensor([0, 1, 2, -7])
    result = trimtab.linear_logp(
        rows.to(case.device), weight, target.to(case.device), ignore_index=-7, impl=case.impl
    )
    assert result.predicted.tolist() == [1, 0, 5, -1]


@pytest.mark.op("linear_logp_ratio")
def test_logp_ratio_is_the_difference_of_two_heads(case):
    policy = problem(v=63, ignored=False, device=case.device)
    reference = problem(n=37, d=9, v=63, ignored=False, device=case.device)

    def run(impl, dtype):
        ref_input = reference.input.to(dtype).requires_grad_()
        outputs = values_and_grads(
            lambda x, w: trimtab.linear_logp_ratio(
                x,
                w,
                ref_input,
                reference.weight.to(dtype),
                policy.target,
                temperature=1.3,
                ref_temperature=0.9,
                impl=impl,
            ),
            [policy.input.to(dtype), policy.weight.to(dtype)],
        )
        assert ref_input.grad is None
        return outputs

    truth, eager = run("reference", torch.float64), run("reference", torch.float32)
    assert torch.equal(truth[0], truth[1] - truth[2])
    for ours, theirs, true in zip(run(case.impl, torch.float32), eager, truth, strict=True):
        assert_within_budget(ours, theirs, true, scale=float(truth[1].abs().max()))


def test_leading_dimensions_and_the_unbatched_form(case):
    given = problem(n=12, device=case.device)
    input, weight, bias, token_weight = given.tensors(torch.float32)
    flat = trimtab.linear_cross_entropy(
        input,
        weight,
        given.target,
        linear_bias=bias,
        token_weight=token_weight,
        reduction="none",
        impl=case.impl,
    )
    folded = trimtab.linear_cross_entropy(
        input.reshape(3, 2, 2, -1),
        weight,
        given.target.reshape(3, 2, 2),
        linear_bias=bias,
        token_weight=token_weight.reshape(3, 2, 2),
        reduction="none",
        impl=case.impl,
    )
    assert folded.shape == (3, 2, 2)
    assert_same_bits(folded.flatten(), flat)
    one = trimtab.linear_cross_entropy(
        input[1], weight, given.target[1], linear_bias=bias, impl=case.impl
    )
    assert one.shape == ()
    torch.testing.assert_close(
        one, torch.nn.functional.cross_entropy(input[1:2] @ weight.T + bias, given.target[1:2])
    )


def test_strided_inputs(case):
    given = problem(device=case.device)

    def run(spread):
        x = given.input.float().repeat_interleave(2, 1)[:, ::2] if spread else given.input.float()
        w = given.weight.float().t().contiguous().t() if spread else given.weight.float()
        t = (
            torch.stack([given.token_weight.float()] * 2, -1)[:, 0]
            if spread
            else given.token_weight.float()
        )
        y = torch.stack([given.target] * 3, -1)[:, 1] if spread else given.target
        x, w, t = (tensor.detach().requires_grad_() for tensor in (x, w, t))
        trimtab.linear_cross_entropy(x, w, y, token_weight=t, impl=case.impl).backward()
        return x.grad, w.grad, t.grad

    for spread, plain in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(spread, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_every_element_is_written(case, chunk_size):
    options = trimtab.TokenLossOptions(chunk_size=chunk_size)
    for dtype, reduction in itertools.product(LOW_PRECISION, ["mean", "none"]):
        given = problem(n=11, dtype=dtype, device=case.device)
        check_linear_cross_entropy(case, given, dtype, reduction=reduction, options=options)
