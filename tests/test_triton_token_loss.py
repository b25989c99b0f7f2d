"""The Triton row kernels of the token loss, against the float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from token_loss_cases import check_confident_rows, confident_rows
from trimtab import testing
from trimtab.reference import token_loss as reference
from trimtab.triton_kernels import token_loss as kernels

# Infinities and NaN pass in silence on a GPU; numpy, which runs the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IGNORED = -100
NOBODY = -(2**62)
EPS = torch.finfo(torch.float32).eps

# The shortest rows, rows around a power of two, and one of several tiles, the last not full.
SMALL = [1, 3, 63, 127, 252, 507]
LONG = 5000
EVERYTHING = {"logit_scale": 0.7, "softcap": 5.0, "label_smoothing": 0.2, "lse_square_scale": 0.1}
TRANSFORMS = [
    {},
    {"logit_scale": 0.0625},
    {"logit_scale": -1.5},
    {"softcap": 3.0},
    {"softcap": 3.0, "logit_scale": 2.5},
]


def poison(shape: tuple, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def make(rows: int, vocab: int, dtype: torch.dtype, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(rows, vocab) * spread).to(dtype).to(DEVICE)
    return logits, torch.randint(0, vocab, (rows,)).to(DEVICE)


def run_loss(
    logits: Tensor,
    target: Tensor,
    coef: Tensor | None = None,
    class_weight: Tensor | None = None,
    grad: Tensor | None = None,
    **options: float,
) -> tuple[Tensor, Tensor]:
    full = {"logit_scale": 1.0, "softcap": 0.0, "label_smoothing": 0.0, "lse_square_scale": 0.0}
    loss = poison(target.shape)
    grad = poison(logits.shape, logits.dtype) if grad is None else grad
    kernels.token_loss_rows(
        logits, target, coef, class_weight, IGNORED, *(full | options).values(), loss, grad
    )
    return loss, grad


def run_logp(
    logits: Tensor,
    target: Tensor,
    inv_temperature: Tensor | None = None,
    grad: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = NOBODY,
) -> tuple[Tensor, ...]:
    outs = [poison(target.shape) for _ in range(3)]
    outs.append(torch.full(target.shape, -7, device=DEVICE))
    outs.append(poison(logits.shape, logits.dtype) if grad is None else grad)
    kernels.token_logp_rows(
        logits, target, inv_temperature, ignore_index, logit_scale, softcap, *outs
    )
    return tuple(outs)


def run_backward(
    logits: Tensor,
    target: Tensor,
    upstream: tuple[Tensor | None, ...],  # of logp, entropy, lse
    inv_temperature: Tensor | None = None,
    grad: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = NOBODY,
) -> Tensor:
    grad = poison(logits.shape, logits.dtype) if grad is None else grad
    kernels.token_logp_rows_backward(
        logits, target, inv_temperature, ignore_index, logit_scale, softcap, *upstream, grad
    )
    return grad


def expected_loss(
    logits: Tensor, target: Tensor, coef: Tensor | None, class_weight: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the oracle, in the precision of ``logits``."""
    leaf = logits.clone().requires_grad_()
    if class_weight is not None:
        options["class_weight"] = class_weight.to(reference.token_loss(leaf, target).dtype)
    options["softcap"] = options.get("softcap") or None
    loss = reference.token_loss(leaf, target, ignore_index=IGNORED, **options)
    keep = target != IGNORED
    coef = torch.ones_like(loss) if coef is None else coef.to(loss.dtype)
    (grad,) = torch.autograd.grad((loss[keep] * coef[keep]).sum(), leaf)
    return loss.detach(), grad


def expected_logp(
    logits: Tensor,
    target: Tensor,
    upstream: tuple[Tensor | None, ...],
    inv_temperature: Tensor | None = None,
    **options: Any,
) -> tuple[list[Tensor], Tensor]:
    """Values and gradient by the oracle, in the precision of ``logits``."""
    leaf = logits.clone().requires_grad_()
    if inv_temperature is not None and leaf.dtype == torch.float64:
        inv_temperature = inv_temperature.double()
    options["softcap"] = options.get("softcap") or None
    values = reference.token_logp(leaf, target, inv_temperature=inv_temperature, **options)
    terms = [
        (g.to(v.dtype) * v).sum()
        for g, v in zip(upstream, values[:3], strict=True)
        if g is not None
    ]
    (grad,) = torch.autograd.grad(sum(terms), leaf)
    return [value.detach() for value in values], grad


def check_loss(logits: Tensor, target: Tensor, actual: tuple[Tensor, Tensor], *weights, **options):
    eager = expected_loss(logits, target, *weights, **options)
    truth = expected_loss(logits.double(), target, *weights, **options)
    for name, *three in zip(("loss", "grad"), actual, eager, truth, strict=True):
        testing.assert_within_budget(*three, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [*SMALL, LONG])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_loss(vocab: int, dtype: torch.dtype, options: dict):
    logits, target = make(5, vocab, dtype)
    target[2] = IGNORED
    coef = testing.uneven(torch.empty(5)).to(DEVICE)
    class_weight = torch.rand(vocab).to(DEVICE) + 0.5 if options else None
    actual = run_loss(logits, target, coef, class_weight, **options)
    check_loss(logits, target, actual, coef, class_weight, **options)


OPTIONS = [
    *({key: value} for key, value in EVERYTHING.items()),
    {"logit_scale": -1.5},
    {"softcap": 3.0, "logit_scale": 2.5},
    {"label_smoothing": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_options(options: dict, weighted: bool):
    logits, target = make(4, 507, torch.float32)
    class_weight = torch.rand(507).to(DEVICE) if weighted else None
    actual = run_loss(logits, target, None, class_weight, **options)
    check_loss(logits, target, actual, None, class_weight, **options)


@pytest.mark.parametrize("vocab", [252, LONG])
def test_loss_without_gradient(vocab: int):
    logits, target = make(4, vocab, torch.float16)
    class_weight = torch.rand(vocab).to(DEVICE)
    loss = poison((4,))
    kernels.token_loss_rows(
        logits, target, None, class_weight, IGNORED, *EVERYTHING.values(), loss, None
    )
    arguments = (target, None, class_weight)
    eager, _ = expected_loss(logits, *arguments, **EVERYTHING)
    truth, _ = expected_loss(logits.double(), *arguments, **EVERYTHING)
    testing.assert_within_budget(loss, eager, truth)


def check_logp(logits: Tensor, target: Tensor, inv_temperature: Tensor | None, **options: float):
    ones = torch.ones(target.shape, device=DEVICE)
    upstream = tuple(testing.uneven(ones) * factor for factor in (1.0, -0.7, 0.3))
    *actual, predicted, unit = run_logp(logits, target, inv_temperature, **options)
    back = run_backward(logits, target, upstream, inv_temperature, **options)
    only = (ones, None, None)

    def oracle(rows: Tensor) -> list[Tensor]:
        values, unit = expected_logp(rows, target, only, inv_temperature, **options)
        grad = expected_logp(rows, target, upstream, inv_temperature, **options)[1]
        return [*values[:3], unit, grad, values[3]]

    eager, truth = oracle(logits), oracle(logits.double())
    names = ("logp", "entropy", "lse", "unit grad", "grad")
    for name, *three in zip(names, [*actual, unit, back], eager, truth, strict=False):
        testing.assert_within_budget(*three, name=name)
    assert torch.equal(predicted, eager[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [*SMALL, LONG])
def test_logp(vocab: int, dtype: torch.dtype):
    logits, target = make(4, vocab, dtype)
    check_logp(logits, target, None)


@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize("tempered", [False, True])
def test_logp_options(options: dict, tempered: bool):
    logits, target = make(4, 507, torch.float32)
    check_logp(logits, target, torch.rand(4).to(DEVICE) * 2 + 0.1 if tempered else None, **options)


@pytest.mark.parametrize("present", range(1, 8))
def test_missing_upstream_is_zero(present: int):
    logits, target = make(3, 63, torch.float32)
    upstream = [torch.randn(3).to(DEVICE) for _ in range(3)]
    some = tuple(g if present >> i & 1 else None for i, g in enumerate(upstream))
    filled = tuple(g if present >> i & 1 else torch.zeros_like(g) for i, g in enumerate(upstream))
    three = [run_backward(logits, target, upstream) for upstream in (some, filled)]
    three.append(expected_logp(logits.double(), target, some)[1])
    testing.assert_within_budget(*three)


@pytest.mark.parametrize("vocab", [507, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_place_gradient_has_the_same_bits(vocab: int, dtype: torch.dtype):
    logits, target = make(3, vocab, dtype)
    target[1] = IGNORED
    ones = torch.ones(3, device=DEVICE)

    def runs(apart: bool) -> list[Tensor]:
        copies = [logits.clone() for _ in range(3)]
        grads = [None if apart else copy for copy in copies]
        return [
            *run_loss(copies[0], target, ones, None, grads[0], **EVERYTHING),
            *run_logp(copies[1], target, ones, grads[1], ignore_index=IGNORED),
            run_backward(
                copies[2], target, (ones, ones, ones), None, grads[2], ignore_index=IGNORED
            ),
        ]

    for apart, inside in zip(runs(True), runs(False), strict=True):
        testing.assert_same_bits(inside, apart)


@pytest.mark.parametrize("pad", [1, 16])
def test_strided_rows(pad: int):
    """An odd row stride takes the path without wide loads; nothing outside the rows is written."""
    vocab = LONG
    wide, target = make(3, vocab + pad, torch.float16)
    logits, target = wide[:, :vocab], target.clamp(max=vocab - 1)
    guard = poison((3, vocab + 3), torch.float16)
    coef = testing.uneven(torch.empty(3)).to(DEVICE)
    class_weight = torch.rand(vocab).to(DEVICE)
    wide[:, vocab:] = math.nan
    actual = run_loss(logits, target, coef, class_weight, guard[:, :vocab], **EVERYTHING)
    check_loss(logits, target, actual, coef, class_weight, **EVERYTHING)
    assert guard[:, vocab:].isnan().all()
    check_logp(logits, target, None)


@pytest.mark.parametrize("vocab", [2, 507, LONG])
def test_confident_rows_keep_their_relative_precision(vocab: int):
    """``1 - p`` from a difference has relative error 2^-24 / (1 - p), all of it at 0.9999999."""
    logits, target = (t.to(DEVICE) for t in confident_rows(vocab, torch.float32))
    found = run_logp(logits, target)
    back = run_backward(logits, target, (torch.ones_like(found[0]), None, None))
    check_confident_rows(logits, run_loss(logits, target), found, back, target)


def test_common_offset_changes_no_bit():
    """Logits on a grid that 1e4 keeps exact, so that every difference is the same."""
    logits, target = make(4, LONG, torch.float32)
    logits = (logits * 256).round() / 256
    ones = torch.ones(4, device=DEVICE)
    for offset in (1.0e4, -1.0e4):
        moved = logits + offset
        assert torch.equal(moved - offset, logits)
        for smoothing in (0.0, 0.1):
            plain = run_loss(logits, target, label_smoothing=smoothing)
            shifted = run_loss(moved, target, label_smoothing=smoothing)
            testing.assert_same_bits(shifted[0], plain[0])
            testing.assert_same_bits(shifted[1], plain[1])
        plain, shifted = run_logp(logits, target), run_logp(moved, target)
        for index in (0, 1, 3, 4):
            testing.assert_same_bits(shifted[index], plain[index])
        both = [run_backward(rows, target, (ones, ones, ones)) for rows in (logits, moved)]
        testing.assert_same_bits(*both)


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_masked_logits(low: float):
    logits, target = make(4, LONG, torch.float32)
    masked = torch.rand(4, LONG).to(DEVICE) < 0.5
    masked[1] = True
    masked.scatter_(1, target[:, None], False)
    masked[2, target[2]] = True
    logits.masked_fill_(masked, low)
    rest = torch.tensor([0, 1, 3], device=DEVICE)
    check_loss(
        logits[rest], target[rest], run_loss(logits[rest].contiguous(), target[rest]), None, None
    )
    check_logp(logits[rest].contiguous(), target[rest], None)
    loss, grad = run_loss(logits, target)
    ones = torch.ones(4, device=DEVICE)
    logp, entropy, lse, _, unit = run_logp(logits, target)
    back = run_backward(logits, target, (ones, ones, ones))
    assert loss[2] == -logp[2] > 1e8
    for tensor in (grad, unit, back, entropy, lse):
        assert tensor.isfinite().all()
    for tensor in (grad, unit, back):
        others = masked.scatter(1, target[:, None], False)
        assert (tensor[others] == 0).all()


def test_row_without_any_finite_logit_is_nan_alone():
    logits, target = make(3, 63, torch.float32)
    logits[1] = -math.inf
    logp, entropy, lse, predicted, unit = run_logp(logits, target)
    assert logp[1].isnan()
    assert entropy[1].isnan()
    assert lse[1] == -math.inf
    assert predicted[1] == 0
    assert unit[1].isnan().all()
    assert unit[[0, 2]].isfinite().all()


def test_row_of_lowest_floats_is_uniform():
    logits = torch.full((1, 100), torch.finfo(torch.float32).min, device=DEVICE)
    target = torch.tensor([7], device=DEVICE)
    logp, entropy, lse, predicted, unit = run_logp(logits, target)
    truth = math.log(100)
    assert abs(logp.item() + truth) <= 2 * EPS * truth
    assert abs(entropy.item() - truth) <= 2 * EPS * truth
    assert lse.isfinite().all()
    assert predicted.item() == 0
    assert unit.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_row_leaves_the_others_alone(value: float, dtype: torch.dtype):
    logits, target = make(4, LONG, dtype)
    ones = torch.ones(4, device=DEVICE)
    bad = logits.clone()
    bad[1, [4321, 77]] = value
    bad[2, target[2]] = value

    def runs(rows: Tensor) -> list[Tensor]:
        back = run_backward(rows, target, (ones, ones, ones))
        return [*run_loss(rows, target), *run_logp(rows, target), back]

    for before, after in zip(runs(logits), runs(bad), strict=True):
        testing.assert_same_bits(after[[0, 3]], before[[0, 3]])
        if after.dim() == 1 and after.is_floating_point():
            assert not after[1:3].isfinite().any()
    assert run_logp(bad, target)[3][1] == 77
    assert run_logp(bad, target)[3][2] == target[2]


@pytest.mark.parametrize("first", [math.inf, -math.inf])
@pytest.mark.parametrize("second", [math.nan, torch.finfo(torch.float32).min])
def test_predicted_among_numbers_that_are_none(first: float, second: float):
    logits = torch.full((1, LONG), -math.inf, device=DEVICE)
    logits[0, 40], logits[0, 4500] = first, second
    predicted = run_logp(logits, torch.tensor([9], device=DEVICE))[3]
    assert torch.equal(predicted, logits.argmax(1))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_predicted_is_the_lowest_of_equals(softcap: float):
    logits, target = make(4, LONG, torch.bfloat16, spread=0.1)
    logits[0, [17, 17 + 4096]] = 6.0  # in one lane, whatever the tiles' size
    logits[1, [2047, 2048, 4999]] = 6.0
    logits[2, [4999]] = 6.0
    logits[3] = 1.0
    target.copy_(torch.tensor([4113, 4999, 4999, 2500]))
    predicted = run_logp(logits, target, softcap=softcap)[3]
    assert predicted.tolist() == [17, 2047, 4999, 0]


def test_ignored_rows():
    logits, target = make(3, 507, torch.float32)
    logits[1] = math.nan
    target[1] = IGNORED
    coef = torch.tensor([1.0, math.nan, 1.0], device=DEVICE)
    loss, grad = run_loss(logits, target, coef, **EVERYTHING)
    *values, predicted, unit = run_logp(logits, target, coef, ignore_index=IGNORED)
    back = run_backward(logits, target, (coef, coef, coef), coef, ignore_index=IGNORED)
    for tensor in (loss, grad, *values, unit, back):
        assert (tensor[1] == 0).all()
        assert (tensor[[0, 2]] != 0).any()
        assert tensor.isfinite().all()
    assert predicted[1] == -1


@pytest.mark.parametrize("bad", [-1, 507, 2**40, -(2**63)])
def test_target_outside_gives_nan_in_its_row(bad: int):
    logits, target = make(3, 507, torch.float32)
    ones = torch.ones(3, device=DEVICE)
    wrong = target.clone()
    wrong[1] = bad

    def runs(target: Tensor) -> list[Tensor]:
        back = run_backward(logits, target, (ones, ones, ones))
        return [*run_loss(logits, target), *run_logp(logits, target), back]

    for before, after in zip(runs(target), runs(wrong), strict=True):
        testing.assert_same_bits(after[[0, 2]], before[[0, 2]])
        if after.is_floating_point():
            assert after[1].isnan().all()
        else:
            assert after[1] == -1


@pytest.mark.parametrize("vocab", [252, LONG])
def test_a_row_does_not_depend_on_its_batch(vocab: int):
    logits, target = make(5, vocab, torch.float32)
    together = [*run_loss(logits, target, **EVERYTHING), *run_logp(logits, target)]
    alone = [
        [*run_loss(rows, which, **EVERYTHING), *run_logp(rows, which)]
        for rows, which in zip(logits.split(1), target.split(1), strict=True)
    ]
    for all_rows, *one in zip(together, *alone, strict=True):
        testing.assert_same_bits(torch.cat(one), all_rows)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="4.6 GB of logits, for a GPU")
def test_more_rows_and_elements_than_small_integers_hold():
    logits = torch.zeros(70_000, 32_768, dtype=torch.float16, device=DEVICE)
    target = torch.arange(70_000, device=DEVICE) % 32_768
    logits[-1] = torch.randn(32_768)
    alone = run_loss(logits[-1:].clone(), target[-1:])
    loss, grad = run_loss(logits, target, grad=logits)
    testing.assert_same_bits(loss[-1:], alone[0])
    testing.assert_same_bits(grad[-1:], alone[1])


def test_no_rows():
    logits, target = make(0, 63, torch.float32)
    assert all(t.numel() == 0 for t in (*run_loss(logits, target), *run_logp(logits, target)))
    assert run_backward(logits, target, (None, None, None)).shape == (0, 63)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part_dtype", DTYPES, ids=str)
def test_accumulate(out_dtype: torch.dtype, part_dtype: torch.dtype):
    total = torch.randn(7, 9).to(out_dtype).to(DEVICE)
    part = torch.randn(7, 9).to(part_dtype).to(DEVICE)
    out = poison((7, 9), out_dtype)
    kernels.accumulate(None, part, out)
    testing.assert_same_bits(out, part.to(out_dtype))
    kernels.accumulate(total, part, out)
    exact = (total.float() + part.float()).to(out_dtype)
    testing.assert_same_bits(out, exact)
    kernels.accumulate(total, part, total)
    testing.assert_same_bits(total, exact)
