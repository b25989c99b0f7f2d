"""Contrasted logits and log-probabilities of every implementation against the float64 truth."""

from __future__ import annotations

import math

import pytest
import torch

import trimtab
from contrast_cases import (
    EPS,
    LOW_PRECISION,
    ODD_SIZES,
    check_logp,
    eager_logp,
    few,
    oracle_logits,
    rows,
    term_magnitude,
)
from trimtab.testing import assert_same_bits, max_error, values_and_grads

# Infinities and NaN pass in silence on a GPU; numpy, which runs the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = math.inf
TEMPERATURES = ["number", "rows"]


def per_row(kind: str, b: int, device: str, low: float = 0.5, high: float = 2.0):
    return 0.7 if kind == "number" else torch.linspace(low, high, b, device=device)


@pytest.mark.op("contrastive_logp")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("classes", ODD_SIZES)
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
def test_logp_of_odd_vocabularies(case, dtype, classes, anchored, poison):
    given = rows(few(case, 7), classes, dtype, device=case.device)
    check_logp(case, given, dtype, alpha=1.5, anchored=anchored)


@pytest.mark.op("contrastive_logp")
@pytest.mark.parametrize("count", [0, *ODD_SIZES[:4]])
def test_logp_of_odd_row_counts(case, count):
    if count > 3 and case.interpreted:
        pytest.skip("the interpreter is slow")
    check_logp(case, rows(count, 31, device=case.device), torch.float32, alpha=0.5, temperature=0.7)


@pytest.mark.op("contrastive_logp")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, -0.5, 4.0, "rows"])
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
def test_logp_options(case, dtype, temperature, alpha, anchored):
    b = few(case, 7)
    given = rows(b, dtype=dtype, device=case.device)
    alpha = torch.linspace(-1.0, 2.0, b, device=case.device) if alpha == "rows" else alpha
    options = {"alpha": alpha, "temperature": per_row(temperature, b, case.device)}
    check_logp(case, given, dtype, anchored=anchored, **options)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_logp_in_float64_is_the_truth(impl):
    given = rows(5, 127)
    options = {"alpha": torch.linspace(-1.0, 2.0, 5), "temperature": 0.7}

    def ours(p, n, a):
        return trimtab.contrastive_logp(p, n, given.target, anchor=a, impl=impl, **options)

    def truth(p, n, a):
        return eager_logp(p, n, given.target, anchor=a, **options)

    for actual, expected in zip(
        values_and_grads(ours, given[:3]), values_and_grads(truth, given[:3]), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
def test_gradcheck(impl, anchored):
    given = rows(3, 5, spread=1.0)
    tensors = tuple(tensor.requires_grad_() for tensor in given.logits(torch.float64))

    def logp(p, n, a):
        kept = {"anchor": a} if anchored else {}
        return trimtab.contrastive_logp(
            p, n, given.target, alpha=0.6, temperature=1.3, impl=impl, **kept
        )

    inputs = tensors if anchored else (*tensors[:2], None)
    assert torch.autograd.gradcheck(logp, inputs)
    assert torch.autograd.gradgradcheck(logp, inputs)


@pytest.mark.op("contrastive_logp")
def test_double_backward_is_the_truths(case):
    given = rows(4, 9, device=case.device)

    def hessian_product(function, dtype, **more):
        leaves = [tensor.requires_grad_() for tensor in given.logits(dtype)]
        logp = function(*leaves[:2], given.target, anchor=leaves[2], alpha=0.8, **more)
        grads = torch.autograd.grad(logp.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.sin().sum() for grad in grads), leaves)

    truth = hessian_product(eager_logp, torch.float64)
    ours = hessian_product(trimtab.contrastive_logp, torch.float32, impl=case.impl)
    for actual, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(
            actual.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
        )


@pytest.mark.op("contrastive_logp")
def test_double_backward_with_rows_made_of_each_other(case):
    """What runs from one input to the other counts once."""
    given = rows(4, 9, device=case.device)

    def hessian(function, dtype, **more):
        positive = given.logits(dtype)[0].requires_grad_()
        logp = function(positive, 0.5 * positive.sin(), given.target, alpha=0.8, **more)
        (grad,) = torch.autograd.grad(logp.square().sum(), positive, create_graph=True)
        return torch.autograd.grad(grad.sin().sum(), positive)[0]

    truth = hessian(eager_logp, torch.float64)
    actual = hessian(trimtab.contrastive_logp, torch.float32, impl=case.impl).double()
    torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


UPSTREAMS = {
    "expanded": lambda out: torch.tensor(0.37, device=out.device).expand(out.shape),
    "strided": lambda out: torch.arange(1.0, 2 * len(out) + 1, device=out.device)[::2],
    "one hot": lambda out: torch.eye(len(out), device=out.device)[2],
    "first element 0": lambda out: torch.arange(float(len(out)), device=out.device),
}


@pytest.mark.op("contrastive_logp")
@pytest.mark.parametrize("name", UPSTREAMS)
def test_upstream_gradients(case, name):
    def upstream(out):
        return UPSTREAMS[name](out).to(out.dtype)

    given = rows(5, 31, device=case.device)
    check_logp(case, given, torch.float32, alpha=1.5, anchored=True, upstream=upstream)


@pytest.mark.op("contrastive_logp")
@pytest.mark.parametrize("needs", ["100", "010", "001", "101", "011"])
def test_each_gradient_alone(case, needs):
    """What needs no gradient gets none, and the others are as they were."""
    given = rows(5, 31, device=case.device)

    def gradients(wanted):
        leaves = given.logits(torch.float32)
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want == "1")
        logp = trimtab.contrastive_logp(
            *leaves[:2], given.target, anchor=leaves[2], alpha=1.5, impl=case.impl
        )
        logp.backward(torch.linspace(-1, 1, 5, device=case.device))
        return [leaf.grad for leaf in leaves]

    for want, alone, together in zip(needs, gradients(needs), gradients("111"), strict=True):
        assert (alone is not None) == (want == "1")
        if alone is not None:
            assert_same_bits(alone, together)


@pytest.mark.op("contrastive_logp")
@pytest.mark.parametrize("layout", ["rows apart", "columns", "one row", "halves of one tensor"])
def test_rows_anywhere_in_memory(case, layout):
    """Strided, transposed, expanded and overlapping rows give what contiguous ones give."""
    b = few(case, 6)
    given = rows(b, 33, device=case.device)
    p, n = given.logits(torch.float32, 2)
    if layout == "rows apart":
        p, n = (torch.cat([t, 9 * t], 1)[:, :33] for t in (p, n))
    elif layout == "columns":
        p, n = (t.t().contiguous().t() for t in (p, n))
    elif layout == "one row":
        p, n = p[:1].expand(b, 33), n[:1].expand(b, 33)
    else:
        p, n = torch.cat([p, n]).chunk(2)
    run = {"alpha": 1.5, "impl": case.impl}
    upstream = torch.linspace(-1, 1, b, device=case.device)

    def results(p, n):
        p, n = (t.detach().requires_grad_() for t in (p, n))
        logp = trimtab.contrastive_logp(p, n, given.target, **run)
        grads = torch.autograd.grad(logp, [p, n], upstream)
        sampled = trimtab.contrastive_sample(p, n, top_k=9, top_p=0.9, seed=3, **run)
        z = trimtab.contrastive_logits(p, n, plausibility=0.1, **run)
        return [z.detach(), sampled.token, sampled.kept], [logp.detach(), *grads, sampled.logp]

    exact, summed = results(p, n)
    expected, sums = results(p.contiguous(), n.contiguous())
    for ours, theirs in zip(exact, expected, strict=True):
        assert_same_bits(ours, theirs)
    scale = term_magnitude(given, False, run)
    for ours, theirs in zip(summed, sums, strict=True):
        # How many elements a GPU reads at once, hence the order of its sums, is the layout's.
        if case.for_gpus:
            assert max_error(ours, theirs) <= EPS * scale
        else:
            assert_same_bits(ours, theirs)


@pytest.mark.op("contrastive_logp")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("probability", [0.9, 0.999, 1 - 1e-6])
def test_confident_rows(case, dtype, probability):
    """Relative accuracy of logp and of the target's gradient where p rounds to 1."""
    given = rows(8, 127, dtype=dtype, device=case.device)
    odds = math.log(probability / (1 - probability))
    positive, negative = given.positive.clone(), given.negative
    hit = given.target[:, None]
    z = 1.5 * positive - 0.5 * negative
    rest = torch.logsumexp(z.scatter(1, hit, -INF), 1, keepdim=True)
    positive.scatter_(1, hit, (rest + odds + 0.5 * negative.gather(1, hit)) / 1.5)
    positive = positive.to(dtype).double()

    def run(function, precision, **more):
        logp, grad, _ = values_and_grads(
            lambda p, n: function(p, n, given.target, alpha=0.5, **more),
            [positive.to(precision), negative.to(precision)],
        )
        return [logp, grad.gather(1, hit)]

    truth, eager = run(eager_logp, torch.float64), run(eager_logp, dtype)
    ours = run(trimtab.contrastive_logp, dtype, impl=case.impl)
    assert ours[0].max() <= 0
    scale = 4 + term_magnitude(given._replace(positive=positive), False, {"alpha": 0.5})
    for actual, theirs, true in zip(ours, eager, truth, strict=True):
        info = torch.finfo(actual.dtype)
        subnormal = info.smallest_normal * info.eps

        def error(result, true=true, subnormal=subnormal):
            distance = ((result.double() - true).abs() - subnormal).clamp(min=0)
            return float((distance / true.abs())[true != 0].max())

        assert error(actual) <= 2 * error(theirs) + info.eps
        # The rounding of the terms moves every odd by scale * eps, whatever the odds are.
        if case.impl != "reference":
            assert error(actual) <= scale * EPS + (info.eps if info.eps > EPS else 0)


@pytest.mark.op("contrastive_logp")
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset(case, offset):
    given = rows(device=case.device)
    logits = [t.float() for t in given[:2]]
    shifted = [(t + offset) for t in logits]

    def logp(p, n):
        return trimtab.contrastive_logp(p, n, given.target, alpha=1.5, impl=case.impl)

    expected = eager_logp(*(t.double() for t in shifted), given.target, alpha=1.5)
    ours = logp(*shifted)
    # z is rounded once at this size; a log-probability is the difference of two.
    assert max_error(ours, expected) <= 2 * EPS * abs(offset)
    assert max_error(ours, logp(*logits)) <= 8 * EPS * abs(offset)


@pytest.mark.op("contrastive_logp")
def test_ignored_targets(case):
    given = rows(6, 31, device=case.device)
    target = given.target.clone()
    target[::2] = -7

    def run(target, **more):
        return values_and_grads(
            lambda p, n: trimtab.contrastive_logp(p, n, target, alpha=1.5, impl=case.impl, **more),
            [given.positive.float(), given.negative.float()],
        )

    ours, full = run(target, ignore_index=-7), run(given.target)
    for actual, expected in zip(ours, full, strict=True):
        assert torch.equal(actual[::2], torch.zeros_like(actual[::2]))
        assert_same_bits(actual[1::2], expected[1::2])


@pytest.mark.op("contrastive_logp")
def test_leading_dimensions(case):
    given = rows(6, 31, device=case.device)
    p, n, a = (t.float().view(2, 3, 31) for t in given[:3])
    alpha = torch.linspace(-1, 1, 6, device=case.device)
    flat = trimtab.contrastive_logp(
        *given.logits(torch.float32, 2), given.target, alpha=alpha, anchor=given.anchor.float(),
        temperature=alpha + 2, impl=case.impl,
    )  # fmt: skip
    ours = trimtab.contrastive_logp(
        p, n, given.target.view(2, 3), alpha=alpha.view(2, 3), anchor=a,
        temperature=alpha.view(2, 3) + 2, impl=case.impl,
    )  # fmt: skip
    assert_same_bits(ours, flat.view(2, 3))
    z = trimtab.contrastive_logits(p, n, alpha=alpha.view(2, 3), impl=case.impl)
    assert_same_bits(
        z.view(6, 31),
        trimtab.contrastive_logits(p.view(6, 31), n.view(6, 31), alpha=alpha, impl=case.impl),
    )


@pytest.mark.op("contrastive_logp")
def test_infinite_logits_in_logp(case):
    """A token that is -inf in the anchor stays out; a row with +inf or NaN is NaN, alone."""
    p = torch.tensor([[0.5, -INF, 1.0, 2.0]] * 6, device=case.device)
    n = p.flip(1).nan_to_num(neginf=0.0)
    n[1, 1] = -INF  # equal infinities cancel
    n[2, 0] = INF  # z = -inf
    n[3, 0] = -INF  # z = +inf
    p[4, 2] = math.nan
    target = torch.tensor([3, 3, 3, 3, 3, 1], device=case.device)
    logp, grad_p, grad_n = values_and_grads(
        lambda p, n: trimtab.contrastive_logp(p, n, target, alpha=0.5, impl=case.impl), [p, n]
    )
    assert logp.isnan().tolist() == [False, False, False, True, True, False]
    assert logp[5] == -INF, "the target itself is masked"
    rest = n[0, [0, 2, 3]], p[0, [0, 2, 3]]
    expected = torch.log_softmax(rest[1] + 0.5 * (rest[1] - rest[0]), 0)[2]
    torch.testing.assert_close(logp[:2], expected.expand(2))
    assert logp[2] > logp[0]
    good = [0, 1, 2]
    for grad in (grad_p, grad_n):
        assert torch.isfinite(grad[good]).all()
        assert torch.equal(grad[good, 1], torch.zeros(3, device=case.device))
    assert torch.equal(grad_p[2, 0], torch.tensor(0.0, device=case.device))


ALPHAS = [0.0, 1.5, -0.3, "rows"]


@pytest.mark.op("contrastive_logits")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
@pytest.mark.parametrize("plausibility", [None, 0.1, 1.0])
def test_logits_to_the_bit(case, dtype, alpha, anchored, plausibility, poison):
    given = rows(5, 127, dtype=dtype, device=case.device)
    p, n, a = given.logits(dtype)
    for tensor, place in ((p, 1), (n, 2), (a, 3)):
        tensor[:, place] = -INF
        tensor[:, 4] = -INF
        tensor[1, 5] = tensor[1, 6]
    n[2, 7] = INF
    p[3, 8] = n[3, 8] = INF
    a = a if anchored else None
    alpha = torch.linspace(-1.0, 2.0, 5, device=case.device) if alpha == "rows" else alpha
    ours = trimtab.contrastive_logits(
        p, n, alpha=alpha, anchor=a, plausibility=plausibility, impl=case.impl
    )
    assert ours.dtype == torch.float32
    assert_same_bits(ours, oracle_logits(p, n, a, alpha, plausibility))


@pytest.mark.op("contrastive_logits")
@pytest.mark.parametrize("classes", [0, *ODD_SIZES, 5000])
def test_logits_of_odd_vocabularies(case, classes, poison):
    if classes == 5000 and case.interpreted:
        pytest.skip("the interpreter is slow")
    p, n, a = rows(3, max(classes, 1), device=case.device).logits(torch.float32)
    p, n, a = (t[:, :classes] for t in (p, n, a))
    ours = trimtab.contrastive_logits(p, n, alpha=2.5, anchor=a, plausibility=0.02, impl=case.impl)
    assert ours.shape == (3, classes)
    if classes:
        assert_same_bits(ours, oracle_logits(p, n, a, 2.5, 0.02))


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_logits_in_float64(impl):
    p, n, a = rows(4, 63)[:3]
    alpha = torch.linspace(-1.0, 2.0, 4, dtype=torch.float64)
    ours = trimtab.contrastive_logits(p, n, alpha=alpha, anchor=a, plausibility=0.3, impl=impl)
    assert_same_bits(ours, oracle_logits(p, n, a, alpha, 0.3))


@pytest.mark.op("contrastive_logits")
def test_nan_in_logits(case):
    """Without a mask a NaN stays where it is; with one its row has no maximum and is all NaN."""
    p, n = rows(3, 63, device=case.device).logits(torch.float32, 2)
    p[1, 5] = math.nan
    plain = trimtab.contrastive_logits(p, n, alpha=0.5, impl=case.impl)
    assert plain.isnan().nonzero().tolist() == [[1, 5]]
    masked = trimtab.contrastive_logits(p, n, alpha=0.5, plausibility=0.1, impl=case.impl)
    assert masked[1].isnan().all()
    clean = trimtab.contrastive_logits(p[::2], n[::2], alpha=0.5, plausibility=0.1, impl=case.impl)
    assert_same_bits(masked[::2], clean)


@pytest.mark.op("contrastive_logits")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
def test_gradients_of_logits(case, dtype, anchored):
    """Constant factors where the mask lets through, 0 elsewhere, rounded once."""
    given = rows(4, 31, dtype=dtype, device=case.device)
    alpha = torch.tensor([0.0, 0.5, 1.5, -2.0], device=case.device)
    leaves = given.logits(dtype, 3 if anchored else 2)
    weight = torch.linspace(-1, 1, 124, device=case.device).view(4, 31)

    def z(p, n, *a):
        return trimtab.contrastive_logits(
            p, n, alpha=alpha, anchor=a[0] if a else None, plausibility=0.05, impl=case.impl
        )

    out, *grads = values_and_grads(z, leaves, lambda out: weight)
    upstream = weight.masked_fill(out == -INF, 0.0)
    factor = alpha[:, None]
    expected = [factor if anchored else 1 + factor, -factor, torch.ones_like(factor)]
    for ours, times in zip(grads, expected, strict=False):
        true = upstream.double() * times.double()
        assert ours.dtype == dtype
        assert max_error(ours, true) <= 2 * torch.finfo(dtype).eps * float(true.abs().max())
        assert torch.equal(ours == 0, (true == 0))


@pytest.mark.op("contrastive_logp")
def test_same_bits_every_time(case):
    given = rows(few(case, 17), 252, device=case.device)

    def run():
        return values_and_grads(
            lambda p, n, a: trimtab.contrastive_logp(
                p, n, given.target, alpha=1.5, anchor=a, impl=case.impl
            ),
            given.logits(torch.float32),
        )

    first = run()
    for _ in range(9 if case.impl != "triton" else 1):
        for again, before in zip(run(), first, strict=True):
            assert_same_bits(again, before)


@pytest.mark.op("contrastive_logp")
def test_a_row_does_not_depend_on_its_batch(case):
    b = few(case, 20, 4)
    given = rows(b, 507, device=case.device)
    p, n = given.logits(torch.float32, 2)

    def logp(where):
        return trimtab.contrastive_logp(
            p[where], n[where], given.target[where], alpha=1.5, impl=case.impl
        )

    whole = logp(slice(None))
    for where in (slice(0, 1), slice(b // 3, b // 2), slice(b - 1, b)):
        assert_same_bits(logp(where), whole[where])
