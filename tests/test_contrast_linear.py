"""The linear forms: hidden states and a head, one product, the same numbers as rows of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import trimtab
from contrast_cases import EPS, LOW_PRECISION, ODD_SIZES, column, eager_logp, few
from trimtab.testing import assert_same_bits, assert_within_budget, values_and_grads

# Infinities and NaN pass in silence on a GPU; numpy, which runs the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAMES = ("logp", "positive.grad", "negative.grad", "weight.grad", "bias.grad")


class Head(NamedTuple):
    """Two hidden states per row, a head and targets, in float64, exact in the dtype under test."""

    positive: Tensor  # (B, D)
    negative: Tensor  # (B, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)
    target: Tensor  # (B,)

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        return [tensor.to(dtype, copy=True) for tensor in self[:4]]


def head(
    b: int = 7, v: int = 63, d: int = 16, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Head:
    generator = torch.Generator().manual_seed(b * 1000 + v)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).double().to(device)

    target = torch.randint(v, (b,), generator=generator).to(device)
    return Head(draw(b, d), draw(b, d), draw(v, d), draw(v), target)


def small_numbers(b: int = 9, v: int = 50, device: str = "cpu") -> Head:
    """Numbers whose products and sums no dtype rounds, for any order of adding them."""
    generator = torch.Generator().manual_seed(b + v)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).double().to(device)

    target = torch.randint(v, (b,), generator=generator).to(device)
    return Head(draw(b, 8), draw(b, 8), draw(v, 8), draw(v), target)


def eager(
    p: Tensor, n: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *,
    alpha: Any, temperature: Any = 1.0, logit_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """The states contrasted in float32 and rounded once, one product; the truth in float64."""
    real = torch.promote_types(p.dtype, torch.float32)
    alpha = column(alpha).to(real) if isinstance(alpha, Tensor) else alpha
    hidden = (p.to(real) + alpha * (p.to(real) - n.to(real))).to(p.dtype)
    z = F.linear(hidden, weight, bias).to(real) * logit_scale
    temperature = column(temperature).to(real) if isinstance(temperature, Tensor) else temperature
    return torch.log_softmax(z / temperature, -1).gather(1, target[:, None])[:, 0]


def check(case: Any, given: Head, dtype: torch.dtype, bias: bool = True, **options: Any) -> None:
    """Values and gradients for both states, head and bias within the budget of eager."""

    def run(function: Callable[..., Tensor], precision: torch.dtype) -> list[Tensor]:
        p, n, weight, b = given.tensors(precision)
        return values_and_grads(function, [p, n, weight, b if bias else None])

    def ours(p: Tensor, n: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        return trimtab.linear_contrastive_logp(
            p, n, weight, given.target, linear_bias=b, impl=case.impl, **options
        )

    def theirs(p: Tensor, n: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        return eager(p, n, weight, b, given.target, **options)

    truth, expected, actual = run(theirs, torch.float64), run(theirs, dtype), run(ours, dtype)
    scales = magnitudes(given, bias, options)
    assert len(actual) == (5 if bias else 4)
    for name, got, near, true in zip(NAMES, actual, expected, truth, strict=False):
        assert got.dtype == (torch.float32 if name == "logp" else dtype)
        amplified = 1.0 + scales["logp"] if dtype == torch.float32 and name != "logp" else 1.0
        assert_within_budget(got, near, true, name=name, scale=scales[name] * amplified)


def magnitudes(given: Head, bias: bool, options: dict[str, Any]) -> dict[str, float]:
    """Sums of the magnitudes of the float64 terms behind each result, where they may cancel."""
    p, n, weight, b = given.tensors(torch.float64)
    alpha, temperature = column(options["alpha"]), column(options.get("temperature", 1.0))
    factor = options.get("logit_scale", 1.0) / temperature
    logits = (F.linear(p + alpha * (p - n), weight, b if bias else None) * factor).requires_grad_()
    logp = torch.log_softmax(logits, -1).gather(1, given.target[:, None])[:, 0]
    steps = torch.arange(len(logp), dtype=torch.float64, device=p.device)
    logp.backward(steps * torch.cos(steps) / max(1, len(logp)))
    grad = (logits.grad * factor).abs()
    size = torch.as_tensor(alpha).double().abs().to(p.device)
    states = p.abs() + size * (p.abs() + n.abs())
    hidden = grad @ weight.abs()
    terms = (states @ weight.abs().T + b.abs()) * torch.as_tensor(factor).abs()
    return {
        "logp": float(terms.amax()) + math.log(weight.shape[0]),
        "positive.grad": float((hidden * (1 + size)).amax()),
        "negative.grad": float((hidden * size).amax()),
        "weight.grad": float((grad.T @ states).amax()),
        "bias.grad": float(grad.sum(0).amax()),
    }


@pytest.mark.op("linear_contrastive_logp")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("classes", ODD_SIZES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_odd_vocabularies(case, dtype, classes, bias, poison):
    given = head(few(case, 7), classes, dtype=dtype, device=case.device)
    check(case, given, dtype, bias, alpha=1.5)


@pytest.mark.op("linear_contrastive_logp")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("alpha", [0.0, -0.5, "rows"])
@pytest.mark.parametrize("options", [{}, {"temperature": "rows"}, {"logit_scale": 0.5}], ids=str)
def test_options(case, dtype, alpha, options):
    def per_row(value):
        return torch.linspace(0.5, 2.0, 7, device=case.device) if value == "rows" else value

    options = {name: per_row(value) for name, value in options.items()}
    check(case, head(dtype=dtype, device=case.device), dtype, alpha=per_row(alpha), **options)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_float64_is_the_truth(impl):
    """Against two rows of logits: the head commutes with the contrast, the bias counts once."""
    given = head()
    options = {"alpha": torch.linspace(-1.0, 2.0, 7).double(), "temperature": 0.8}

    def ours(p, n, weight, bias):
        return trimtab.linear_contrastive_logp(
            p, n, weight, given.target, linear_bias=bias, impl=impl, **options
        )

    def truth(p, n, weight, bias):
        logits = [F.linear(hidden, weight, bias) for hidden in (p, n)]
        return eager_logp(*logits, given.target, **options)

    for actual, expected in zip(
        values_and_grads(ours, given[:4]), values_and_grads(truth, given[:4]), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_gradcheck(impl):
    given = head(3, 5, 4)
    leaves = tuple(tensor.requires_grad_() for tensor in given.tensors(torch.float64))

    def logp(p, n, weight, bias):
        return trimtab.linear_contrastive_logp(
            p, n, weight, given.target, alpha=0.6, linear_bias=bias, temperature=1.3, impl=impl
        )

    assert torch.autograd.gradcheck(logp, leaves)
    assert torch.autograd.gradgradcheck(logp, leaves)


@pytest.mark.op("linear_contrastive_logp")
def test_leading_dimensions_and_ignored_targets(case):
    given = head(6, 31, device=case.device)
    p, n, weight, bias = given.tensors(torch.float32)
    target = given.target.clone()
    target[1::3] = -100
    alpha = torch.linspace(-1.0, 1.0, 6, device=case.device)
    run = {"linear_bias": bias, "impl": case.impl}
    plain = trimtab.linear_contrastive_logp(p, n, weight, given.target, alpha=alpha, **run)
    ours = trimtab.linear_contrastive_logp(
        p.view(2, 3, 16), n.view(2, 3, 16), weight, target.view(2, 3), alpha=alpha.view(2, 3),
        ignore_index=-100, **run,
    )  # fmt: skip
    assert ours.shape == (2, 3)
    expected = plain.masked_fill(target == -100, 0.0).view(2, 3)
    torch.testing.assert_close(ours, expected, rtol=4 * EPS, atol=32 * EPS)
    assert torch.equal(ours == 0, target.view(2, 3) == -100)


@pytest.mark.op("linear_contrastive_sample")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("beta", [None, 0.2, "rows"])
def test_samples_are_those_of_two_rows_of_logits(case, dtype, bias, scale, beta):
    count = few(case, 9)
    given = small_numbers(count, few(case, 50, 24), case.device)
    p, n, weight, b = given.tensors(dtype)
    b = b if bias else None
    rows = torch.arange(count, device=case.device)
    beta = torch.linspace(0.1, 1.0, count, device=case.device) if beta == "rows" else beta
    options = {
        "alpha": 0.5, "plausibility": beta, "temperature": 0.75, "top_k": 20, "top_p": 0.9,
        "min_p": 0.01, "seed": rows, "position": 3, "impl": case.impl,
    }  # fmt: skip
    ours = trimtab.linear_contrastive_sample(
        p, n, weight, linear_bias=b, logit_scale=scale, **options
    )
    logits = [F.linear(hidden, weight, b) * scale for hidden in (p, n)]
    for got, expected in zip(ours, trimtab.contrastive_sample(*logits, **options), strict=True):
        assert_same_bits(got, expected)
    assert len(set(ours.token.tolist())) > few(case, 3, 0)


@pytest.mark.op("linear_contrastive_sample")
def test_greedy_and_alpha_per_row(case):
    given = small_numbers(device=case.device)
    p, n, weight, b = given.tensors(torch.float32)
    alpha = torch.linspace(-1.0, 1.0, 9, device=case.device)
    ours = trimtab.linear_contrastive_sample(
        p, n, weight, linear_bias=b, alpha=alpha, temperature=0.0, impl=case.impl
    )
    logits = [F.linear(hidden, weight, b) for hidden in (p, n)]
    z = logits[0] + alpha[:, None] * (logits[0] - logits[1])
    assert torch.equal(ours.token, z.argmax(1))


def products(function: Callable[[], Any]) -> list[tuple[int, int, int]]:
    """(rows, D, V) of every matrix product that ran, wherever it was called from."""
    with torch.profiler.profile(record_shapes=True) as profile:
        function()
    found = []
    for event in profile.events():
        assert event.name not in ("aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv")
        if event.name in ("aten::mm", "aten::addmm"):
            left, right = event.input_shapes[event.name == "aten::addmm" :][:2]
            found.append((left[0], left[1], right[1]))
    return found


@pytest.mark.op("linear_contrastive_sample")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_sample_costs_one_product(case, bias):
    """Of the contrasted states; with a mask, of both stacked, so that the head is read once."""
    given = small_numbers(device=case.device)
    p, n, weight, b = given.tensors(torch.float32)
    run = {"alpha": 0.5, "linear_bias": b if bias else None, "temperature": 0.0}
    run["impl"] = case.impl

    def sample(**more):
        return products(lambda: trimtab.linear_contrastive_sample(p, n, weight, **run, **more))

    assert sample(top_p=0.9) == [(9, 8, 50)]
    assert sample(plausibility=0.1) == [(18, 8, 50)]
    assert sample(plausibility=torch.full((9,), 0.1, device=case.device)) == [(18, 8, 50)]


@pytest.mark.op("linear_contrastive_logp")
@pytest.mark.parametrize(("trained", "expected"), [("", 1), ("states", 2), ("all", 4)])
def test_a_logp_costs_one_product_forward(case, trained, expected):
    given = head(device=case.device)
    p, n, weight, b = given.tensors(torch.float32)
    for tensor in (p, n):
        tensor.requires_grad_(trained != "")
    for tensor in (weight, b):
        tensor.requires_grad_(trained == "all")

    def step(**more):
        logp = trimtab.linear_contrastive_logp(
            p, n, weight, given.target, alpha=1.5, linear_bias=b, impl=case.impl
        )
        if logp.requires_grad:
            logp.backward(torch.ones_like(logp))

    size = 7 * 16 * 63
    total = sum(rows * inner * columns for rows, inner, columns in products(step)) / size
    # Eager backward keeps the logits, so that it makes them once.
    assert total == (min(expected, 3) if case.impl == "reference" else expected)
    with torch.no_grad():
        assert products(step) == [(7, 16, 63)]


@pytest.mark.op("linear_contrastive_logp")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(case, dtype, state_dtype):
    """As for a linear layer: the product in autocast's dtype, gradients in the leaves'."""
    if case.interpreted:
        pytest.skip("Triton's interpreter truncates what it stores in bfloat16")
    given = head(dtype=torch.bfloat16, device=case.device)

    def run(function):
        leaves = [
            tensor.to(kept).requires_grad_()
            for tensor, kept in zip(given[:4], [state_dtype] * 2 + [torch.float32] * 2, strict=True)
        ]
        with torch.autocast(case.device, dtype=dtype):
            logp = function(*leaves)
        logp.backward(torch.linspace(0.1, 1.0, 7, device=case.device))
        return [logp, *(leaf.grad for leaf in leaves)]

    def ours(p, n, weight, bias):
        return trimtab.linear_contrastive_logp(
            p, n, weight, given.target, alpha=0.5, linear_bias=bias, impl=case.impl
        )

    def theirs(p, n, weight, bias):
        return eager(p, n, weight, bias, given.target, alpha=0.5)

    for actual, expected in zip(run(ours), run(theirs), strict=True):
        assert actual.dtype == expected.dtype
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(
            actual, expected, rtol=4 * torch.finfo(torch.bfloat16).eps,
            atol=2 * torch.finfo(torch.bfloat16).eps * scale,
        )  # fmt: skip


@pytest.mark.op("linear_contrastive_sample")
@pytest.mark.parametrize("beta", [None, 0.2])
def test_autocast_of_a_sample(case, beta):
    given = small_numbers(device=case.device)
    p, n, weight, b = given.tensors(torch.float32)
    options = {"alpha": 0.5, "linear_bias": b, "plausibility": beta, "seed": 4, "impl": case.impl}
    plain = trimtab.linear_contrastive_sample(p, n, weight, **options)
    with torch.autocast(case.device, dtype=torch.bfloat16):
        cast = trimtab.linear_contrastive_sample(p, n, weight, **options)
        mixed = trimtab.linear_contrastive_sample(p.bfloat16(), n.bfloat16(), weight, **options)
    for other in (cast, mixed):
        for ours, theirs in zip(other, plain, strict=True):
            assert_same_bits(ours, theirs)


def test_a_sample_has_no_gradient():
    given = small_numbers()
    tensors = [tensor.requires_grad_() for tensor in given.tensors(torch.float32)]
    p, n, weight, b = tensors
    logp = trimtab.linear_contrastive_sample(
        p, n, weight, alpha=0.5, linear_bias=b, impl="reference"
    ).logp
    assert not logp.requires_grad
    logits = [F.linear(hidden, weight, b) for hidden in (p, n)]
    assert not trimtab.contrastive_sample(*logits, alpha=0.5, impl="reference").logp.requires_grad
