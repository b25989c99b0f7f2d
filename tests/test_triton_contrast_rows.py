"""The Triton kernels of contrasted logits, log-probabilities and noise, launched directly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

import contrast_oracle as oracle
from contrast_cases import EPS, eager_logp, to_numpy
from test_triton_contrast import DEVICE, DTYPES, INF, both, log, make, small_tiles  # noqa: F401
from trimtab.testing import assert_same_bits, assert_within_budget, uneven
from trimtab.triton_kernels import contrast as kernels
from trimtab.triton_kernels.contrast import config, philox

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

IGNORED = -100


@triton.jit
def words_kernel(counter_ptr, key_ptr, out_ptr):
    """Philox of 4 + 2 words."""
    one = tl.arange(0, 1)
    c0 = tl.load(counter_ptr + one).to(tl.uint32, bitcast=True)
    c1 = tl.load(counter_ptr + 1 + one).to(tl.uint32, bitcast=True)
    c2 = tl.load(counter_ptr + 2 + one).to(tl.uint32, bitcast=True)
    c3 = tl.load(counter_ptr + 3 + one).to(tl.uint32, bitcast=True)
    k0 = tl.load(key_ptr).to(tl.uint32, bitcast=True)
    k1 = tl.load(key_ptr + 1).to(tl.uint32, bitcast=True)
    r0, r1, r2, r3 = philox.philox4x32(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + one, r0.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 1 + one, r1.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 2 + one, r2.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 3 + one, r3.to(tl.int32, bitcast=True))


def as_words(numbers: Any) -> Tensor:
    return torch.from_numpy(np.array(numbers, dtype=np.uint32).view(np.int32)).to(DEVICE)


# Counter, key and output of the Random123 distribution's kat_vectors.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("number", range(3))
def test_known_words(number: int):
    counter, key, expected = (as_words(words) for words in KNOWN[number])
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    words_kernel[(1,)](counter, key, out, enable_fp_fusion=False)
    assert torch.equal(out, expected)


@triton.jit
def gumbel_kernel(high_ptr, low_ptr, out_ptr, bound_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    high = tl.load(high_ptr + place).to(tl.uint32, bitcast=True)
    low = tl.load(low_ptr + place).to(tl.uint32, bitcast=True)
    tl.store(out_ptr + place, philox.gumbel(high, low))
    tl.store(bound_ptr + place, philox.gumbel_bound(high))


def test_noise_to_the_bit():
    """Random words and the ends of every range; the bound is above, and near where it is large."""
    ends = [0, 1, 2, 0x4AFB0CCC, 0x4AFB0CCD, 0x7FFFFFFF, 0x80000000, 0xFFFFFF00, 0xFFFFFFFF]
    ends += [2**k + d for k in range(8, 32) for d in (-1, 0, 1)]
    random = np.random.default_rng(0).integers(0, 2**32, (2, 4096), dtype=np.uint64)
    random[0, : len(ends)] = ends
    random[:, -len(ends) :] = np.array([ends, ends])[:, ::-1]
    random[1, :6] = [0, 1, 0xFFFFFFFF, 0, 0xFFFFFFFF, 0]
    out, bound = torch.zeros(2, 4096, device=DEVICE)
    gumbel_kernel[(1,)](*map(as_words, random), out, bound, 4096, enable_fp_fusion=False)
    x, y = oracle.uniform_pair(*random)
    t, e = oracle.split(y)
    near = random[0] < 0x4AFB0CCD
    exponential = -oracle.log_from(np.where(near, -x, t), np.where(near, np.float32(0), e))
    exact = -oracle.log_from(*oracle.split(np.maximum(exponential, np.float32(2.0**-66))))
    assert np.array_equal(out.cpu().numpy().view(np.int32), exact.view(np.int32))
    assert np.isfinite(exact).all()
    assert exact.max() > 45.0
    gap = bound.cpu().numpy() - exact
    assert gap.min() >= 0.005
    large = (exact > 3.0) & (random[0] > 255)
    assert gap[large].max() <= 0.12


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plausibility", [None, 0.1, [None, 0.5, 1.0]])
@pytest.mark.parametrize("given", ["two rows", "anchor", "one row, anchor"])
def test_logits_to_the_bit(dtype: torch.dtype, plausibility: Any, given: str):
    p, n, a = make(3, 201, dtype)
    for rows, place in ((p, 1), (n, 2), (a, 3)):
        rows[:, place] = -INF
        rows[:, 4] = -INF
    n[2, 7] = INF
    p[1, 8] = n[1, 8] = INF
    p[2, 9] = math.nan
    n = None if given.startswith("one row") else n
    a = a if given.endswith("anchor") else None
    if plausibility is None and a is not None:
        a[0, 11] = math.nan
    alpha = [0.0, 1.5, -0.3]
    out = torch.full((3, 203), 7.0, device=DEVICE)
    kernels.contrastive_logits_rows(
        p, n, a, *both(alpha, float, torch.float32), *both(plausibility, log, torch.float32),
        out[:, :201],
    )  # fmt: skip
    betas = plausibility if isinstance(plausibility, list) else [plausibility] * 3
    truth = np.stack([
        oracle.masked(
            *oracle.combine(
                *(None if t is None else to_numpy(t[i]) for t in (p, n, a)), alpha[i]
            ), betas[i],
        ) for i in range(3)
    ])  # fmt: skip
    assert_same_bits(out[:, :201].cpu(), torch.from_numpy(truth))
    assert (out[:, 201:] == 7.0).all()


def gradients(
    rows: list[Tensor], target: Tensor, alpha: Any, temperature: Any, upstream: Tensor
) -> list[Tensor]:
    """``contrastive_logp`` by autograd, in the precision of the rows: value and gradients."""
    leaves = [t.clone().requires_grad_() for t in rows]
    real = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    if isinstance(alpha, list):
        alpha = torch.tensor(alpha, device=DEVICE).to(real)
        temperature = torch.tensor(temperature, device=DEVICE).to(real)
    anchor = leaves[2] if len(leaves) == 3 else None
    logp = eager_logp(
        leaves[0], leaves[1], target, alpha=alpha, anchor=anchor, temperature=temperature
    )
    return [logp.detach(), *torch.autograd.grad(logp, leaves, upstream.to(logp.dtype))]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
@pytest.mark.parametrize("per_row", [False, True], ids=["", "rows"])
@pytest.mark.parametrize("vocab", [1, 63, 201])
def test_logp_and_gradients(vocab: int, per_row: bool, anchored: bool, dtype: torch.dtype):
    rows = make(4, vocab, dtype)[: 3 if anchored else 2]
    target = torch.randint(vocab, (4,)).to(DEVICE)
    alpha, temperature = ([0.0, 1.5, -0.3, 2.0], [0.5, 1.0, 2.0, 0.7]) if per_row else (1.5, 0.7)
    upstream = uneven(torch.empty(4, device=DEVICE)) + 0.3
    parameters = (*both(alpha, float, torch.float32), *both(temperature, float, torch.float32))
    p, n, a = rows if anchored else (*rows, None)
    logp = torch.full((4,), 7.0, device=DEVICE)
    grads = [torch.full_like(t, 7.0) for t in rows]
    kernels.contrastive_logp_rows(p, n, a, target, *parameters, IGNORED, logp)
    kernels.contrastive_logp_rows_backward(
        p, n, a, target, *parameters, IGNORED, upstream, *grads, *([] if anchored else [None])
    )
    eager = gradients(rows, target, alpha, temperature, upstream)
    truth = gradients([t.double() for t in rows], target, alpha, temperature, upstream)
    assert logp.max() <= 0
    # s is a sum of rounded terms this large, and its rounding moves a gradient in proportion.
    size = 6.0 * float(rows[0].abs().max()) / min(temperature if per_row else [temperature])
    for ours, theirs, true in zip([logp, *grads], eager, truth, strict=True):
        magnitude = size if true.dim() == 1 else size * float(true.abs().max())
        roundings = 1.0 if true.dim() == 1 else EPS / torch.finfo(ours.dtype).eps
        assert_within_budget(ours, theirs, true, scale=magnitude * roundings)


@pytest.mark.usefixtures("small_tiles")
def test_targets_that_are_no_class():
    p, n, a = make(4, 201)
    p[0, 5] = math.nan
    target = torch.tensor([IGNORED, 3, 201, -1], device=DEVICE)
    upstream = torch.tensor([math.nan, 1.0, 1.0, 1.0], device=DEVICE)
    parameters = (0.5, None, 1.0, None, IGNORED)
    logp = torch.full((4,), 7.0, device=DEVICE)
    kernels.contrastive_logp_rows(p, n, a, target, *parameters, logp)
    assert logp[0] == 0
    assert logp.isnan().tolist() == [False, False, True, True]
    only = torch.full_like(p, 7.0)
    kernels.contrastive_logp_rows_backward(p, n, a, target, *parameters, upstream, None, only, None)
    assert (only[0] == 0).all()
    assert only[1].isfinite().all()
    assert only[2:].isnan().all()
    three = [torch.full_like(p, 7.0) for _ in range(3)]
    kernels.contrastive_logp_rows_backward(p, n, a, target, *parameters, upstream, *three)
    assert_same_bits(three[1], only)
    for grad in three:
        assert (grad[0] == 0).all()
        assert grad[2:].isnan().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("probability", [0.999, 1 - 1e-6])
def test_confident_rows(probability: float):
    """Relative accuracy where the probability rounds to 1."""
    p = torch.randn(4, 201, dtype=torch.float64)
    target = torch.tensor([0, 63, 64, 200])
    rest = torch.logsumexp(p.scatter(1, target[:, None], -INF), 1, keepdim=True)
    odds = math.log(probability / (1 - probability))
    p = p.scatter(1, target[:, None], rest + odds).float().to(DEVICE)
    target = target.to(DEVICE)
    zero = torch.zeros_like(p)
    logp, grad = torch.full((4,), 7.0, device=DEVICE), torch.full_like(p, 7.0)
    parameters = (p, zero, None, target, 0.0, None, 1.0, None, IGNORED)
    kernels.contrastive_logp_rows(*parameters, logp)
    kernels.contrastive_logp_rows_backward(
        *parameters, torch.ones(4, device=DEVICE), grad, None, None
    )
    others = p.double().scatter(1, target[:, None], -INF)
    odds_against = torch.logsumexp(others, 1) - p.double().gather(1, target[:, None])[:, 0]
    miss = torch.sigmoid(odds_against)
    bound = EPS * (8 + float(p.abs().max()))
    at = grad.gather(1, target[:, None])[:, 0]
    for ours, true in ((logp, -torch.log1p(odds_against.exp())), (at, miss)):
        assert ((ours.double() - true) / true).abs().max() <= bound


def test_launch_config():
    for dtype in DTYPES:
        for vocab in (0, 1, 63, 1000, 32000, 50257, 128256, 10**6):
            wide, odd = (config.launch_config(vocab, dtype, aligned=a) for a in (True, False))
            assert wide.vec * dtype.itemsize == 16
            assert odd.vec == 2
            for shape in (wide, odd):
                assert shape.lanes == 32 * shape.num_warps <= 512
                assert shape.steps * shape.vec == 8
                assert shape.candidates.bit_count() == shape.num_warps.bit_count() == 1
                assert shape.num_warps == 1 or shape.lanes * 4 < vocab


def test_wide_loads_only_where_all_rows_are_aligned():
    room = torch.empty(4, 256, dtype=torch.float16)
    even, odd, late = room[:, :200], room.flatten()[: 4 * 255].view(4, 255)[:, :200], room[:, 1:201]
    assert config.options(even, (even, None))[1]["ALIGNMENT"] == 8
    assert config.options(even, (), torch.float32)[1]["ALIGNMENT"] == 4
    for rows in (odd, late):
        assert config.options(rows, ())[1]["ALIGNMENT"] == 1
        assert config.options(even, (None, rows))[1]["ALIGNMENT"] == 1
