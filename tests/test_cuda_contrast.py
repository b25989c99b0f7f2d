"""The CUDA row kernels of contrast but the sampler, run on the CPU.

Against the float64 truth where a sum is behind a number; the combination and its mask to the bit.
"""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from torch import Tensor

import cuda_contrast_cases
import trimtab
from contrast_cases import LOW_PRECISION, ODD_SIZES, check_logp, eager_logp, oracle_logits, rows
from cuda_contrast_cases import (
    IGNORED,
    INF,
    kernels,
    pair,
    run_all,
    run_backward,
    run_logits,
    run_logp,
)
from cuda_on_cpu import library
from cuda_token_loss_cases import empty, laid_out
from trimtab import _native
from trimtab.testing import assert_same_bits, assert_within_budget, values_and_grads

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
dtypes = pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
anchors = pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
EXTREMES = {"lowest": torch.finfo(torch.float32).min, "-inf": -INF, "inf": INF, "nan": math.nan}


class native:
    impl, device = "native", "cpu"


@pytest.fixture
def cpu():
    """The operators of the CPU library."""
    if _native.REASONS["cpu"] is not None:
        pytest.skip(str(_native.REASONS["cpu"]))
    return torch.ops.trimtab


@pytest.fixture
def public(monkeypatch, poison):
    """The public functions run on the CUDA kernels, and what they leave unwritten is NaN."""
    return library.public("contrast", monkeypatch)


@dtypes
@anchors
# Of 256 float32 each thread has as many as the others.
@pytest.mark.parametrize("classes", [*ODD_SIZES, 256])
def test_logp(public, dtype, anchored, classes):
    before = public.launches()
    check_logp(native, rows(7, classes, dtype), dtype, alpha=1.5, anchored=anchored)
    assert public.launches() > before


@dtypes
@anchors
@pytest.mark.parametrize("alpha", [0.0, -0.5, 4.0, torch.linspace(-1, 2, 7)], ids=str)
@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.3, 2, 7)], ids=["0.7", "rows"])
def test_logp_options(public, dtype, anchored, alpha, temperature):
    given = rows(7, 252, dtype)
    options = {"alpha": alpha, "temperature": temperature, "anchored": anchored}
    check_logp(native, given, dtype, **options)

    def expanded(logp: Tensor) -> Tensor:
        return torch.tensor(1.5, dtype=logp.dtype).expand_as(logp)

    check_logp(native, given, dtype, upstream=expanded, **options)


@dtypes
@anchors
@pytest.mark.parametrize("classes", [*ODD_SIZES, 5000])
def test_logits_are_those_of_the_cpu_and_the_oracle(cpu, dtype, anchored, classes):
    p, n, a = rows(6, classes, dtype).logits(dtype)
    anchor = a if anchored else None
    for alpha in (0.0, 0.3, -2.7, torch.linspace(-1, 2, 6)):
        for beta in (None, 0.1, 1.0):
            log_beta = -INF if beta is None else math.log(beta)
            ours = run_logits(p, n, anchor, alpha, log_beta)
            assert_same_bits(ours, run_logits(p, n, anchor, alpha, log_beta, ops=cpu))
            assert_same_bits(ours, oracle_logits(p, n, anchor, alpha, beta).float())
    log_beta = torch.tensor([-INF, -0.1, -1.0, -2.0, 0.0, -INF])
    theirs = run_logits(p, n, anchor, 0.3, log_beta, ops=cpu)
    assert_same_bits(run_logits(p, n, anchor, 0.3, log_beta), theirs)
    assert_same_bits(run_logits(p, None, anchor), p.float())
    theirs = run_logits(p, None, anchor, log_beta=-0.5, ops=cpu)
    assert_same_bits(run_logits(p, None, anchor, log_beta=-0.5), theirs)


@dtypes
@anchors
def test_gradients_of_logits(public, dtype, anchored):
    given = rows(4, 127, dtype)
    count = 3 if anchored else 2

    def logits(impl):
        def function(p: Tensor, n: Tensor, *a: Tensor) -> Tensor:
            anchor = a[0] if a else None
            return trimtab.contrastive_logits(
                p, n, anchor=anchor, alpha=0.7, plausibility=0.1, impl=impl
            )

        return values_and_grads(function, given.logits(dtype, count))

    for ours, theirs in zip(logits("native"), logits("reference"), strict=True):
        torch.testing.assert_close(ours, theirs)


@dtypes
@anchors
def test_hostile_rows_are_those_of_the_cpu(cpu, dtype, anchored):
    """Each extreme in each row, alone, everywhere, everywhere but there, and at the target."""
    p, n, a = rows(48, 300, dtype).logits(dtype)
    target = torch.arange(48) % 5 + 100
    for i in range(48):
        value = list(EXTREMES.values())[i % 4]
        row = (p, n, a)[i // 4 % 3][i]
        place = [slice(250, 251), slice(None), slice(101, None), slice(int(target[i]), None, 300)]
        row[place[i // 12]] = value
    anchor = a if anchored else None
    for alpha in (0.5, 0.0, -1.0):
        ours = run_all(p, n, target, anchor, alpha)
        theirs = run_all(p, n, target, anchor, alpha, ops=cpu)
        for k in range(2):
            assert_same_bits(ours[k], theirs[k])
        for k, (one, other) in enumerate(zip(ours[2:], theirs[2:], strict=True)):
            assert torch.equal(one.isnan(), other.isnan()), k
            assert torch.equal(one.isinf(), other.isinf()), k
            torch.testing.assert_close(one, other, equal_nan=True)


def test_rows_of_one_kind(cpu):
    """Constant rows, -inf but for one token or none, NaN beside a masked target."""
    p = torch.full((8, 700), -INF)
    p[0], p[1], p[2] = 1.0, EXTREMES["lowest"], 3e38
    p[3, 600] = 1.0
    p[4, 5], p[5, 600] = EXTREMES["lowest"], -1.0
    p[7, 100:200] = torch.arange(100.0)
    p[7, 333] = math.nan
    n = p.clone()
    n[3], n[5] = 2.0, -INF
    target = torch.tensor([0, 699, 300, 600, 5, 0, 3, 7])
    for alpha in (0.0, 0.5):
        ours, theirs = (run_all(p, n, target, None, alpha, 1.0, ops=o) for o in (None, cpu))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30])
def test_common_offset(cpu, offset):
    """Logits on a grid that the offset of 1e4 keeps exact: every difference is the same."""
    p, n, _ = ((t * 256).round() / 256 for t in rows(4, 5000).logits(torch.float32))
    target = torch.arange(4) * 1000
    moved = run_all(p + offset, n + offset, target)
    if abs(offset) < 1e6:
        # alpha 0.5 halves a difference, which is exact too.
        plain = run_all(p, n, target)
        for one, other in zip(moved[2:], plain[2:], strict=True):
            assert_same_bits(one, other)
        return
    theirs = run_all(p + offset, n + offset, target, ops=cpu)
    for one, other in zip(moved, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-30, 1e30, 0.0, -1.0, math.nan])
def test_extreme_temperatures(cpu, temperature):
    p, n, _ = rows(3, 300).logits(torch.float32)
    p[1], n[1] = 0.0, 0.0
    p[2], n[2] = -p[2].abs(), -p[2].abs()
    p[2, 17] = n[2, 17] = 0.0
    target = torch.tensor([0, 17, 17])
    ours, theirs = (
        run_all(p, n, target, temperature=temperature, ops=ops)[2:] for ops in (None, cpu)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


CONFIDENT = [0.5, 0.9, 0.999, 0.99999, 0.9999999, 1 - 1e-12]


@pytest.mark.parametrize("classes", [2, 507, 5000])
def test_confident_rows_keep_their_relative_precision(classes):
    """``1 - p`` from a difference has relative error 2^-24 / (1 - p), all of it at 0.9999999."""
    each = torch.tensor([(1 - p) / p / (classes - 1) for p in CONFIDENT], dtype=torch.float64)
    p = each.log()[:, None].repeat(1, classes).float()
    target = torch.randint(classes, (len(CONFIDENT),))
    p.scatter_(1, target[:, None], 0.0)
    n, ones = torch.zeros_like(p), torch.ones(len(p))
    z = p.double() + 0.5 * p.double()
    rest = z.exp().scatter(1, target[:, None], 0.0).sum(1)
    logp = run_logp(p, n, target, temperature=1.0)
    grads = run_backward(p, n, target, temperature=1.0, upstream=ones)
    at = [grad.gather(1, target[:, None])[:, 0] for grad in grads[:2]]
    bound = 2.0**-23 * (8 + z.abs().amax(1))
    miss = rest / (1 + rest)
    for ours, true in ((logp, -rest.log1p()), (at[0], 1.5 * miss), (at[1], -0.5 * miss)):
        assert (((ours - true) / true).abs() <= bound).all()
    assert logp.max() <= 0


def test_ignored_rows_and_targets_outside():
    p, n, a = rows(6, 507).logits(torch.float32)
    target = torch.tensor([3, IGNORED, -1, 507, 2**40, 506])
    p[1], n[1], a[1] = math.nan, INF, -INF
    for dtype in (torch.float32, torch.bfloat16):
        given = p.to(dtype), n.to(dtype), target, a.to(dtype)
        upstream = torch.ones(6)
        upstream[1] = math.nan
        results = [run_logp(*given), *run_backward(*given, upstream=upstream)]
        for result in results:
            assert (result[1] == 0).all()
            assert result[2:5].isnan().all()
            assert result[[0, 5]].isfinite().all()
            assert (result[[0, 5]] != 0).any()
        # Inside the vocabulary it is ignored as well.
        assert run_logp(*given, ignore_index=506)[5] == 0
        for grad in run_backward(*given, upstream=upstream, ignore_index=506):
            assert (grad[5] == 0).all()


def test_gradient_of_a_masked_target():
    """A token at -inf in the anchor has no gradient, not even as the target."""
    p, n, a = rows(3, 300).logits(torch.float32)
    p[:, 7] = a[:, 7] = -INF
    target = torch.tensor([7, 8, 7])
    for anchor in (None, a):
        assert (run_logp(p, n, target, anchor) == -INF).tolist() == [True, False, True]
        for grad in run_backward(p, n, target, anchor):
            assert grad is None or (grad[:, 7] == 0).all()


# Where the first row starts, in elements off 16 bytes, and how far apart rows are.
PLACES = {"closed": (0, 507), "padded": (0, 512), "shifted": (1, 512), "both": (3, 509)}


@dtypes
@pytest.mark.parametrize("positive", PLACES)
@pytest.mark.parametrize("negative", PLACES)
def test_bits_are_the_same_wherever_rows_start(dtype, positive, negative):
    """And nothing outside the rows is written. Sums depend on which thread has which token."""
    values = rows(3, 507, dtype)
    target = torch.tensor([0, 506, IGNORED])
    p, n, a = values.logits(dtype)
    placed_p, placed_n = laid_out(p, *PLACES[positive]), laid_out(n, *PLACES[negative])
    placed_a = laid_out(a, *PLACES[positive])
    given = placed_p.rows, placed_n.rows
    plain = run_all(p, n, target, a)
    for log_beta, expected in zip((-INF, -1.0), plain[:2], strict=True):
        out = laid_out(torch.full((3, 507), math.nan), *PLACES[negative])
        run_logits(*given, placed_a.rows, log_beta=log_beta, out=out.rows)
        assert_same_bits(out.rows, expected)
        assert out.surroundings().isnan().all()
    torch.testing.assert_close(run_logp(*given, target, placed_a.rows), plain[2])
    grads = [laid_out(empty(t), *PLACES[where]) for t, where in zip(
        (p, n, a), (negative, positive, "shifted"), strict=True)]  # fmt: skip
    run_backward(*given, target, placed_a.rows, grads=[grad.rows for grad in grads])
    for grad, expected in zip(grads, plain[3:], strict=True):
        torch.testing.assert_close(grad.rows, expected)
        assert grad.surroundings().isnan().all()
    for placed, before in zip((placed_p, placed_n, placed_a), (p, n, a), strict=True):
        assert torch.equal(placed.rows, before)


def test_rows_that_share_memory():
    """Stride 0, and a view whose rows overlap."""
    p, n, _ = rows(4, 300).logits(torch.float32)
    windows = p.view(-1).as_strided((4, 300), (3, 1))
    target = torch.arange(4)
    for positive, negative in ((p[:1].expand(4, -1), n), (p, n[2:3].expand(4, -1)), (windows, n)):
        shared = run_all(positive, negative, target)
        own = run_all(*(t.clone(memory_format=torch.contiguous_format)
                        for t in (positive, negative)), target)  # fmt: skip
        for one, other in zip(shared, own, strict=True):
            torch.testing.assert_close(one, other)
        assert_same_bits(shared[0], own[0])
        assert_same_bits(shared[1], own[1])


@dtypes
@anchors
def test_gradients_may_be_written_over_the_rows(dtype, anchored):
    p, n, a = rows(3, 507, dtype).logits(dtype)
    target = torch.tensor([0, 300, 506])
    anchor = a if anchored else None
    apart = run_backward(p, n, target, anchor)
    over = run_backward(p, n, target, anchor, grads=[p, n, anchor])
    for one, other in zip(over, apart, strict=True):
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("wanted", range(8))
def test_only_the_wanted_gradients(wanted):
    p, n, a = rows(3, 127).logits(torch.float32)
    every = run_backward(p, n, target := torch.arange(3), a)
    asked = [empty(p) if wanted >> k & 1 else None for k in range(3)]
    run_backward(p, n, target, a, grads=asked)
    for one, other in zip(asked, every, strict=True):
        if one is not None:
            assert_same_bits(one, other)


@dtypes
def test_a_row_of_a_hundred_thousand_classes(dtype, cpu):
    given = rows(1, 128256, dtype)
    p, n, _ = given.logits(dtype)
    for log_beta in (-INF, math.log(0.1)):
        theirs = run_logits(p, n, log_beta=log_beta, ops=cpu)
        assert_same_bits(run_logits(p, n, log_beta=log_beta), theirs)
    eager, truth = (
        eager_logp(given.positive.to(d), given.negative.to(d), given.target, alpha=0.5)
        for d in (dtype, torch.float64)
    )
    ours = run_logp(p, n, given.target, temperature=1.0)
    assert_within_budget(ours, eager, truth, scale=40.0)
    for one, other in zip(*(run_backward(p, n, given.target, ops=o)[:2] for o in (None, cpu)),
                          strict=True):  # fmt: skip
        # Beside one rounding to the dtype, that of z: eps |z|.
        eps = max(torch.finfo(dtype).eps, 60 * 2.0**-23)
        torch.testing.assert_close(one, other, rtol=eps, atol=1e-8)


@pytest.mark.parametrize(
    ("b", "classes", "masked", "facts", "blocks", "cluster", "threads"),
    [
        (1, 128256, False, {}, 32, 1, 512),
        (1, 128256, True, {}, 8, 8, 512),
        (1, 128256, True, {"major": 8, "compiled_for": 80}, 1, 1, 512),
        (3, 3000, False, {"multiprocessors": 2}, 6, 1, 96),
        (3, 3000, True, {"multiprocessors": 2}, 6, 2, 96),
        (3, 3000, False, {"multiprocessors": 1}, 3, 1, 96),
        (3, 40, True, {}, 3, 1, 32),
    ],
)
def test_how_rows_are_cut(cpu, b, classes, masked, facts, blocks, cluster, threads):
    p, n, a = rows(b, classes, torch.bfloat16).logits(torch.bfloat16)
    # The largest anchor where only one part can see it.
    a[0, classes // 3], a[-1, -1] = 40.0, 50.0
    log_beta = -1.0 if masked else -INF
    with library.device(**facts):
        ours = run_logits(p, n, a, log_beta=log_beta)
    launch = kernels().last_launch()
    assert (launch["blocks"], launch["cluster"], launch["threads"]) == (blocks, cluster, threads)
    assert_same_bits(ours, run_logits(p, n, a, log_beta=log_beta, ops=cpu))


def test_a_row_does_not_depend_on_its_batch():
    p, n, a = rows(5, 3000, torch.float16).logits(torch.float16)
    target = torch.arange(5) * 700
    with library.device(multiprocessors=1):
        together = run_all(p, n, target, a)
    upstream = torch.linspace(-1.5, 2.0, 5)
    for i in range(5):
        one = p[i : i + 1], n[i : i + 1], target[i : i + 1], a[i : i + 1]
        results = [
            run_logits(*one[:2], one[3]),
            run_logits(*one[:2], one[3], log_beta=-1.0),
            run_logp(*one),
            *run_backward(*one, upstream=upstream[i : i + 1]),
        ]
        for alone, all_rows in zip(results, together, strict=True):
            assert_same_bits(alone[0], all_rows[i])


@pytest.mark.parametrize("facts", [{}, {"multiprocessors": 2}], ids=str)
def test_the_order_of_threads_changes_no_bit(facts):
    p, n, a = rows(3, 3000, torch.bfloat16).logits(torch.bfloat16)
    target = torch.tensor([5, 2999, IGNORED])
    results = []
    for order in library.ORDERS:
        with library.schedule(order, seed=3), library.device(**facts):
            results.append(run_all(p, n, target, a, log_beta=torch.tensor([-1.0, -INF, -2.0])))
    for one in results[1:]:
        for a, b in zip(one, results[0], strict=True):
            assert_same_bits(a, b)


def test_nothing_to_do():
    for b, v in ((0, 40), (0, 0), (3, 0)):
        none = torch.zeros(b, v)
        target = torch.zeros(b, dtype=torch.int64)
        run_logits(none, none, log_beta=-1.0)
        assert run_logp(none, none, target).isnan().all()
        run_backward(none, none, target)


def test_what_the_operators_refuse():
    p, n, _ = rows(3, 10).logits(torch.float32)
    target = torch.zeros(3, dtype=torch.int64)
    for negative in (n.double(), n[:2], n[:, :9], n.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="negative"):
            run_logits(p, negative)
    with pytest.raises(RuntimeError, match="positive must be float32, float64, bfloat16"):
        run_logits(p.long(), n)
    for run in (run_logits, lambda *two: run_logp(*two, target),
                lambda *two: run_backward(*two, target)):  # fmt: skip
        with pytest.raises(RuntimeError, match="on CUDA, got Double; use impl='reference'"):
            run(p.double(), n.double())
    for out in (torch.zeros(1, 10).expand(3, 10), p.double(), torch.zeros(3, 9)):
        with pytest.raises(RuntimeError, match="out"):
            run_logits(p, n, out=out)
    with pytest.raises(RuntimeError, match="alpha_rows"):
        run_logits(p, n, alpha=torch.zeros(2))
    with pytest.raises(RuntimeError, match="target"):
        run_logp(p, n, target.int())
    logp = torch.zeros(3)
    for grads in ([p.double(), None, None], [None, torch.zeros(1, 10).expand(3, 10), None],
                  [None, None, p]):  # fmt: skip
        with pytest.raises(RuntimeError, match="grad_"):
            run_backward(p, n, target, grads=grads)
    with pytest.raises(RuntimeError, match="grad_logp"):
        run_backward(p, n, target, upstream=logp[:2])
    too_long = torch.zeros(1, dtype=torch.bfloat16).expand(1, 2**30)
    with pytest.raises(RuntimeError, match=r"less than 2\*\*30 classes on CUDA"):
        kernels().contrastive_logits_rows(too_long, None, None, *pair(0.5), *pair(-INF), too_long)


def test_sanitised():
    library.build(library.ROOT / "csrc" / "cuda" / "contrast.cu", sanitize=True)
    library.run_sanitized(cuda_contrast_cases.__file__)
