"""The CUDA row kernels of the token loss, run on the CPU, against the float64 oracle."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import cuda_token_loss_cases
import trimtab
from cuda_on_cpu import library
from cuda_token_loss_cases import (
    DEVICES,
    EVERYTHING,
    IGNORED,
    LONG,
    TRANSFORMS,
    check_logp,
    check_loss,
    empty,
    kernels,
    laid_out,
    make,
    run_all,
    run_backward,
    run_logp,
    run_loss,
)
from token_loss_cases import (
    LOW_PRECISION,
    ODD_SIZES,
    check_confident_rows,
    check_linear_cross_entropy,
    confident_rows,
    problem,
)
from trimtab import _native
from trimtab.reference import token_loss as reference
from trimtab.testing import assert_same_bits, assert_within_budget, uneven, values_and_grads

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

dtypes = pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def played(request) -> Iterator[None]:
    """Where a row of a few hundred logits is cut as one of a hundred thousand is."""
    with library.device(**request.param):
        yield


@dtypes
@pytest.mark.parametrize("classes", ODD_SIZES)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_loss(played, classes, dtype, options):
    logits, target = make(5, classes, dtype)
    target[2] = IGNORED
    coef = uneven(torch.empty(5))
    class_weight = torch.rand(classes) + 0.5 if options else None
    actual = run_loss(logits, target, coef, class_weight, **options)
    check_loss(logits, target, actual, coef, class_weight, **options)


@dtypes
@pytest.mark.parametrize("classes", ODD_SIZES)
def test_logp(played, classes, dtype):
    logits, target = make(4, classes, dtype)
    upstream = tuple(uneven(torch.ones(4)) * factor for factor in (1.0, -0.7, 0.3))
    actual, back = run_logp(logits, target), run_backward(logits, target, upstream)
    check_logp(logits, target, actual, back, upstream)


OPTIONS = [
    *({key: value} for key, value in EVERYTHING.items()),
    {"logit_scale": -1.5},
    {"softcap": 3.0, "logit_scale": -2.5},
    {"label_smoothing": 1.0},
]


@dtypes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_options(options, weighted, dtype):
    logits, target = make(4, 507, dtype)
    # Off by one element from where 16 bytes start.
    class_weight = torch.rand(508)[1:] if weighted else None
    actual = run_loss(logits, target, None, class_weight, **options)
    check_loss(logits, target, actual, None, class_weight, **options)


@dtypes
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize("tempered", [False, True])
def test_logp_options(options, tempered, dtype):
    logits, target = make(4, 252, dtype)
    inverse = torch.rand(4) * 2 + 0.1 if tempered else None
    upstream = tuple(torch.randn(4) for _ in range(3))
    actual = run_logp(logits, target, inverse, **options)
    back = run_backward(logits, target, upstream, inverse, **options)
    check_logp(logits, target, actual, back, upstream, inverse, **options)


@pytest.mark.parametrize("present", range(1, 8))
def test_missing_upstream_is_zero(present):
    logits, target = make(3, 63, torch.float32)
    upstream = [torch.randn(3) for _ in range(3)]
    some = tuple(g if present >> i & 1 else None for i, g in enumerate(upstream))
    filled = tuple(g if present >> i & 1 else torch.zeros(3) for i, g in enumerate(upstream))
    back = run_backward(logits, target, some)
    assert_same_bits(back, run_backward(logits, target, filled))
    check_logp(logits, target, run_logp(logits, target), back, some)


# The first row's offset, and what lies between rows of 507 or 5,003 classes.
LAYOUTS = {"padded": (0, 5), "shifted": (1, 5), "ragged": (0, 0), "both": (3, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("result", [*LAYOUTS, "in place"])
@pytest.mark.parametrize("classes", [507, 5003])
def test_bits_are_the_same_wherever_rows_start(played, source, result, dtype, classes):
    """And nothing outside the rows is read or written."""
    values, target = make(3, classes, dtype)
    target[1] = IGNORED
    ones, weight = torch.ones(3), torch.rand(classes)

    def place(offset: int, between: int) -> tuple[int, int]:
        return offset, classes + between

    def runs(source: str, result: str) -> list[Tensor]:
        results = []
        for operator in range(3):
            given = laid_out(values, *place(*LAYOUTS[source]))
            inside = result == "in place"
            grad = given if inside else laid_out(empty(values), *place(*LAYOUTS[result]))
            if operator == 0:
                results += run_loss(given.rows, target, ones, weight, grad.rows, **EVERYTHING)
            elif operator == 1:
                results += run_logp(given.rows, target, ones, grad.rows)
            else:
                results.append(run_backward(given.rows, target, (ones,) * 3, None, grad.rows))
            assert grad.surroundings().isnan().all()
            assert inside or torch.equal(given.rows, values)
        return results

    for actual, plain in zip(runs(source, result), runs("padded", "padded"), strict=True):
        assert_same_bits(actual, plain)


def test_rows_further_apart_than_32_bits_count():
    """4 GB of addresses, of which a few pages are touched."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    rows = memory.as_strided((2, 63), (2**31, 1))
    values, target = make(2, 63, torch.bfloat16)
    rows.copy_(values)
    plain = run_loss(values, target)
    far = run_loss(rows, target, grad=rows)
    for one, other in zip(far, plain, strict=True):
        assert_same_bits(one.contiguous(), other)


@dtypes
def test_a_row_of_a_hundred_thousand_classes(dtype):
    """As on an H200: in 16 bits clusters of four blocks, in float32 of eight."""
    logits, target = make(2, 128256, dtype)
    coef = torch.tensor([0.5, -2.0])
    loss, grad = run_loss(logits, target, coef, grad=None)
    truth = reference.token_loss(logits.double(), target)
    assert_within_budget(loss, reference.token_loss(logits, target), truth)
    p = logits.double().softmax(1)
    p[torch.arange(2), target] -= 1
    eager = (logits.float().softmax(1) * coef[:, None]).to(dtype)
    eager[torch.arange(2), target] = ((1 - truth.neg().exp()) * -coef).to(dtype)
    assert_within_budget(grad, eager, p * coef[:, None])
    logp, entropy, _, predicted, _ = run_logp(logits, target)
    assert_within_budget(-logp, reference.token_loss(logits, target), truth)
    eager, exact = (
        torch.special.entr(z.softmax(1)).sum(1) for z in (logits.float(), logits.double())
    )
    assert_within_budget(entropy, eager, exact)
    assert torch.equal(predicted, logits.argmax(1))


@pytest.mark.parametrize(
    ("classes", "dtype", "facts", "cluster", "threads", "held"),
    [
        (1000, torch.bfloat16, {}, 1, 32, 2000),
        (32000, torch.bfloat16, {}, 1, 256, 64000),
        (128256, torch.bfloat16, {}, 4, 256, 64128),
        (128256, torch.float32, {}, 8, 256, 64128),
        (256000, torch.float32, {}, 8, 512, 128000),
        (500001, torch.float32, {}, 8, 512, (227 << 10) - 432),
        (128256, torch.bfloat16, {"major": 8, "compiled_for": 80}, 1, 512, (227 << 10) - 432),
        (128256, torch.bfloat16, {"compiled_for": 80}, 1, 512, (227 << 10) - 432),
        (0, torch.float32, {}, 1, 32, 0),
    ],
)
def test_how_rows_are_cut(classes, dtype, facts, cluster, threads, held):
    logits, target = torch.randn(1, classes).to(dtype), torch.tensor([classes // 2])
    with library.device(**facts):
        loss = torch.empty(1)
        kernels().token_loss_rows(
            logits, target, None, None, IGNORED, 1.0, 0.0, 0.0, 0.0, loss, None
        )
    launch = kernels().last_launch()
    assert (launch["cluster"], launch["threads"]) == (cluster, threads)
    assert launch["blocks"] == cluster
    assert 0 <= launch["shared_bytes"] - held - 432 < 16
    if classes:
        torch.testing.assert_close(loss, reference.token_loss(logits, target))
    else:
        assert loss.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [2, 507, LONG])
def test_confident_rows_keep_their_relative_precision(played, classes, dtype):
    """``1 - p`` from a difference has relative error 2^-24 / (1 - p), all of it at 0.9999999."""
    logits, target = confident_rows(classes, dtype)
    found = run_logp(logits, target)
    back = run_backward(logits, target, (torch.ones_like(found[0]), None, None))
    check_confident_rows(logits, run_loss(logits, target), found, back, target)


def test_common_offset_changes_no_bit(played):
    """Logits on a grid that 1e4 keeps exact, so that every difference is the same."""
    logits, target = make(4, LONG, torch.float32)
    logits = (logits * 256).round() / 256
    for offset in (1.0e4, -1.0e4):
        torch.manual_seed(1)
        plain = run_all(logits, target)
        torch.manual_seed(1)
        moved = run_all(logits + offset, target)
        loss = {"label_smoothing": 0.1}
        plain[0], moved[0] = (run_loss(z, target, **loss)[0] for z in (logits, logits + offset))
        plain[1], moved[1] = (run_loss(z, target, **loss)[1] for z in (logits, logits + offset))
        for index, (one, other) in enumerate(zip(plain, moved, strict=True)):
            if index != 4:  # lse moves with the offset
                assert_same_bits(other, one)


@dtypes
@pytest.mark.parametrize("transform", [{}, {"softcap": 2.0}, {"logit_scale": -1.0}], ids=str)
def test_special_rows_are_those_of_the_cpu(played, dtype, transform):
    """Infinities, NaN, ties, masks, saturated caps, targets outside: the same kind of number."""
    if _native.REASONS["cpu"] is not None:
        pytest.skip(str(_native.REASONS["cpu"]))
    logits, target = make(14, 700, dtype)
    lowest, inf = torch.finfo(dtype).min, math.inf
    logits[0] = -inf
    logits[1] = lowest
    logits[2, [650, 77]] = math.nan
    logits[3, [650, 77]] = inf
    logits[4, [650, 77]] = -inf
    logits[5, target[5]] = math.nan
    logits[6, target[6]] = -inf
    logits[7, target[7]] = inf
    logits[8, [17, 18, 640]] = 30.0
    logits[9, [699, 640]] = -30.0
    logits[10] = 1.0
    logits[11:13, torch.rand(700) < 0.5] = lowest
    target[12:] = torch.tensor([-1, 2**40])
    torch.manual_seed(1)
    ours = run_all(logits, target, **transform)
    torch.manual_seed(1)
    theirs = run_all(logits, target, torch.ops.trimtab, **transform)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a.isnan(), b.isnan()), index
        a, b = a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)
        assert torch.equal(a[a.isinf()], b[b.isinf()])
        torch.testing.assert_close(a, b, msg=lambda text, index=index: f"{index}: {text}")


@dtypes
@pytest.mark.parametrize("classes", [697, 700, 704])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_row_of_lowest_numbers_is_uniform(played, scale, classes, dtype):
    """What fills its last vector up is larger than all of it, in bfloat16 by 2**128 and more."""
    logits = torch.full((1, classes), torch.finfo(dtype).min, dtype=dtype)
    target = torch.tensor([classes // 2])
    logp, entropy, _, predicted, unit = run_logp(logits, target, logit_scale=scale)
    torch.testing.assert_close(logp, torch.tensor([-math.log(classes)]))
    torch.testing.assert_close(entropy, -logp)
    assert predicted == 0
    ones = torch.ones(1)
    back = run_backward(logits, target, (ones, ones, None), logit_scale=scale)
    assert_same_bits(back, unit)  # the entropy is at its maximum
    assert unit.isfinite().all()


@dtypes
def test_a_class_weight_of_0_takes_a_masked_class_out(played, dtype):
    """Also of the smoothed loss, where lowest numbers stand for masks."""
    logits, target = make(2, 507, dtype)
    logits[:, 100:130] = torch.finfo(dtype).min
    target[:] = torch.tensor([5, 499])
    class_weight = torch.rand(507) + 0.5
    class_weight[100:130] = 0
    actual = run_loss(logits, target, None, class_weight, label_smoothing=0.2)
    assert actual[0].isfinite().all()
    logits[:, 100:130] = -200.0
    plain = run_loss(logits, target, None, class_weight, label_smoothing=0.2)
    for one, other in zip(actual, plain, strict=True):
        torch.testing.assert_close(one, other)


@dtypes
def test_results_are_those_of_the_cpu(played, dtype):
    if _native.REASONS["cpu"] is not None:
        pytest.skip(str(_native.REASONS["cpu"]))
    logits, target = make(6, LONG, dtype)
    target[4] = IGNORED
    for transform in TRANSFORMS:
        torch.manual_seed(1)
        ours = run_all(logits, target, **transform)
        torch.manual_seed(1)
        theirs = run_all(logits, target, torch.ops.trimtab, **transform)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_ignored_rows_are_not_read(played):
    logits, target = make(3, 507, torch.float32)
    logits[1], target[1] = math.nan, IGNORED
    coef = torch.tensor([1.0, math.nan, 1.0])
    loss, grad = run_loss(logits, target, coef, **EVERYTHING)
    *values, predicted, unit = run_logp(logits, target, coef)
    back = run_backward(logits, target, (coef, coef, coef), coef)
    for tensor in (loss, grad, *values, unit, back):
        assert (tensor[1] == 0).all()
        assert (tensor[[0, 2]] != 0).any()
        assert tensor.isfinite().all()
    assert predicted[1] == -1
    target[:] = IGNORED
    assert (run_loss(logits, target)[1] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("outside", [False, True])
def test_bad_row_leaves_the_others_alone(played, value, outside):
    logits, target = make(4, LONG, torch.bfloat16)
    bad, wrong = logits.clone(), target.clone()
    bad[1, [4321, 77]] = value
    if outside:
        wrong[2] = LONG
    torch.manual_seed(1)
    before = run_all(logits, target)
    torch.manual_seed(1)
    after = run_all(bad, wrong)
    for one, other in zip(before, after, strict=True):
        same = [0, 3] if outside else [0, 2, 3]
        assert_same_bits(other[same], one[same])
    assert after[5][1] == 77
    assert after[5][2] == (-1 if outside else before[5][2])


def test_a_row_does_not_depend_on_its_batch(played):
    logits, target = make(5, 507, torch.float16)
    torch.manual_seed(1)
    together = run_all(logits, target)
    alone = []
    for row, which in zip(logits.split(1), target.split(1), strict=True):
        torch.manual_seed(1)
        alone.append(run_all(row.clone(), which))
    for all_rows, *one in zip(together, *alone, strict=True):
        assert_same_bits(torch.cat(one), all_rows)


@pytest.mark.parametrize("layout", [(0, 512), (1, 509)])
def test_the_order_of_threads_changes_no_bit(played, layout):
    values, target = make(3, 507, torch.bfloat16)
    results = []
    for order in library.ORDERS:
        torch.manual_seed(1)
        with library.schedule(order, seed=3):
            given = laid_out(values, *layout)
            results.append(run_all(given.rows, target))
            run_loss(given.rows, target, grad=given.rows)
            results[-1].append(given.rows.clone())
    for one in results[1:]:
        for a, b in zip(one, results[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("out_dtype", LOW_PRECISION, ids=str)
@dtypes
@pytest.mark.parametrize("count", [0, 1, 7, 1000, 70001])
@pytest.mark.parametrize("shifted", ["nothing", "total", "part", "out"])
def test_accumulate(dtype, out_dtype, count, shifted):
    def start(name: str, values: Tensor) -> Tensor:
        """The values, or the same one element off where 16 bytes start."""
        return torch.cat([values[:1], values])[1:] if name == shifted and count else values

    total = start("total", torch.randn(count).to(out_dtype))
    part = start("part", torch.randn(count).to(dtype))
    out = start("out", torch.full((count,), math.nan, dtype=out_dtype))
    if out_dtype not in (dtype, torch.float32):
        with pytest.raises(RuntimeError, match="out must be float32 or of the dtype of part"):
            kernels().accumulate(None, part, out)
        return
    kernels().accumulate(None, part, out)
    assert_same_bits(out, part.to(out_dtype))
    exact = (total.float() + part.float()).to(out_dtype)
    kernels().accumulate(total, part, out)
    assert_same_bits(out, exact)
    kernels().accumulate(total, part, total)
    assert_same_bits(total, exact)


def test_wrong_calls_are_errors():
    logits, target = make(3, 5, torch.float32)
    loss = torch.empty(3)
    good = (logits, target, None, None, IGNORED, 1.0, 0.0, 0.0, 0.0, loss, None)
    kernels().token_loss_rows(*good)
    for place, value in [
        (0, logits.T),
        (0, logits.long()),
        (0, logits.double()),
        (1, target[:2]),
        (1, target.int()),
        (2, torch.ones(2)),
        (3, torch.ones(4)),
        (9, loss.double()),
        (10, torch.empty(2, 5)),
        (10, torch.empty(5).expand(3, 5)),
    ]:
        bad = list(good)
        bad[place] = value
        with pytest.raises(RuntimeError, match="must"):
            kernels().token_loss_rows(*bad)
    with pytest.raises(RuntimeError, match="on CUDA, got Double; use impl='reference'"):
        run_logp(logits.double(), target)


class native:
    impl, device = "native", "cpu"


@dtypes
def test_public_functions(dtype, poison, monkeypatch):
    library.public("token_loss", monkeypatch)
    given = problem(n=37, v=507, dtype=dtype)
    options = trimtab.TokenLossOptions(chunk_size=16)
    check_linear_cross_entropy(native, given, dtype, options=options)
    check_linear_cross_entropy(native, given, dtype, reduction="none", softcap=9.0)
    x, head = given.input.to(dtype), given.weight.to(dtype)

    def of_logits(impl: str, precision: torch.dtype) -> list[Tensor]:
        """Rows of 507 classes, of which most do not start on 16 bytes."""
        logits = (x @ head.T).to(precision)
        return values_and_grads(
            lambda z: trimtab.cross_entropy(z, given.target, label_smoothing=0.1, impl=impl),
            [logits],
        )

    three = of_logits("native", dtype), of_logits("reference", dtype)
    for each in zip(*three, of_logits("reference", torch.float64), strict=True):
        assert_within_budget(*each)
    results = [
        trimtab.linear_logp(x, head, given.target.clamp(min=0), temperature=0.7, impl=impl)
        for impl in ("native", "reference")
    ]
    for ours, theirs in zip(*results, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_sanitised():
    library.build(library.ROOT / "csrc" / "cuda" / "token_loss.cu", sanitize=True)
    library.run_sanitized(cuda_token_loss_cases.__file__)
