"""Draws: their distribution, what a row's token depends on, greedy rows, rows without an answer."""

from __future__ import annotations

import math

import pytest
import torch

import trimtab
from contrast_cases import (
    LOW_PRECISION,
    assert_sampled,
    check_sample,
    few,
    oracle_sample,
    p_value,
    rows,
)
from trimtab.testing import assert_same_bits

# Infinities and NaN pass in silence on a GPU; numpy, which runs the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = math.inf, math.nan
FILTERED = {"temperature": 1.3, "top_k": 14, "top_p": 0.97, "min_p": 0.01, "plausibility": 1e-3}


def skip_simulated(case, reason="too slow; the oracle's tokens cover it"):
    if case.interpreted or case.harness:
        pytest.skip(reason)


def draw_many(case, p, n, count, **options):
    """``count`` draws from one pair of rows, expanded, in pieces: (tokens, logps, sizes)."""
    pieces, step = [], 250_000
    for first in range(0, count, step):
        size = min(step, count - first)
        position = torch.arange(first, first + size, device=case.device)
        pieces.append(
            trimtab.contrastive_sample(
                p.expand(size, -1), n.expand(size, -1), position=position, impl=case.impl, **options
            )
        )
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("options", [{}, FILTERED], ids=["plain", "filtered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_draws(case, options, dtype):
    """Chi-square against the exact filtered distribution; each logp is its token's."""
    skip_simulated(case)
    draws = 100_000 if case.impl == "reference" else 1_000_000
    given = rows(1, 24, dtype=dtype, spread=1.5, device=case.device)
    p, n = given.logits(dtype, 2)
    (truth,) = oracle_sample(p, n, alpha=0.5, **options)
    probs = torch.tensor(truth.probs)
    token, logp, kept = draw_many(case, p, n, draws, alpha=0.5, seed=2024, **options)
    counts = torch.bincount(token.cpu(), minlength=24)
    assert counts.sum() == draws
    assert p_value(counts, probs) > 1e-3
    assert set(kept.tolist()) == {truth.kept}
    torch.testing.assert_close(logp.cpu().double(), probs.log()[token.cpu()], rtol=1e-5, atol=1e-6)


@pytest.mark.op("contrastive_sample")
def test_rare_tokens_are_drawn(case):
    """A token of probability 3e-5 comes as often as it should: the noise has its large values."""
    skip_simulated(case)
    logits = torch.zeros(1, 9, device=case.device)
    logits[0, 4] = 8.0
    probs = torch.softmax(logits[0].cpu().double(), 0)
    tokens = draw_many(case, logits, logits, 200_000, alpha=0.0, seed=-3)[0].cpu()
    assert p_value(torch.bincount(tokens, minlength=9), probs) > 1e-3


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("step", ["position", "seed"])
def test_neighbouring_draws_are_independent(case, step):
    """Pairs of tokens of neighbouring positions, and of neighbouring seeds, over 8 x 8 cells."""
    skip_simulated(case)
    count = 100_000
    logits = torch.zeros(1, 8, device=case.device).expand(count, -1)
    numbers = torch.arange(count, device=case.device)
    token = trimtab.contrastive_sample(
        logits, logits, alpha=0.0, impl=case.impl, **{step: numbers}
    ).token.cpu()
    for apart in (1, 2, 3):
        pairs = torch.bincount(token[:-apart] * 8 + token[apart:], minlength=64)
        assert p_value(pairs, torch.full((64,), 1 / 64)) > 1e-3


@pytest.mark.op("contrastive_sample")
def test_seeds_and_positions_of_64_bits(case):
    extremes = [0, 1, -1, 2**31, 2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63), 77777777777]
    pairs = [(a, b) for a in extremes for b in extremes]
    pairs = pairs[:: 7 if case.interpreted else 1]
    p = rows(1, 40, spread=0.5, device=case.device).positive.float().expand(len(pairs), -1)
    seed, position = (torch.tensor(list(x), device=case.device) for x in zip(*pairs, strict=True))
    got = check_sample(case, p, p, seed=seed, position=position)
    for i in range(0, len(pairs), 9):
        alone = trimtab.contrastive_sample(
            p[:1], p[:1], alpha=0.0, seed=pairs[i][0], position=pairs[i][1], impl=case.impl
        )
        assert alone.token == got.token[i]
    words = torch.tensor([5, 5 + 2**32, 5 + 2**40], device=case.device)
    assert len(set(got.token.tolist())) > 1
    for name in ("seed", "position"):
        check_sample(case, p[:3], p[:3], **{name: words})


@pytest.mark.op("contrastive_sample")
def test_a_row_depends_on_itself_alone(case):
    """Alone, in any batch, in another order, through row maps: token, logp and kept to the bit."""
    b = 12
    p, n, a = rows(b, few(case, 127, 31), device=case.device).logits(torch.float32)
    seed = torch.arange(b, device=case.device) * 1000 - 5000
    options = {"alpha": 1.5, "top_p": 0.95, "plausibility": 1e-3, "impl": case.impl}

    def sample(index, **more):
        return trimtab.contrastive_sample(
            p[index], n[index], anchor=a[index], seed=seed[index], position=9, **options, **more
        )

    whole = sample(slice(None))
    permuted = torch.randperm(b, generator=torch.Generator().manual_seed(3)).to(case.device)
    repeated = torch.tensor([3, 3, 0, 11, 3], device=case.device)
    for index in (slice(4, 5), slice(2, 9), permuted, repeated)[: few(case, 4)]:
        for ours, theirs in zip(sample(index), whole, strict=True):
            assert_same_bits(ours, theirs[index])
    mapped = trimtab.contrastive_sample(
        torch.cat([n, p, a]), torch.cat([n, p, a]), anchor=torch.cat([n, p, a]),
        positive_rows=repeated + b, negative_rows=repeated, anchor_rows=repeated + 2 * b,
        seed=seed[repeated], position=9, **options,
    )  # fmt: skip
    for ours, theirs in zip(mapped, whole, strict=True):
        assert_same_bits(ours, theirs[repeated])


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("mapped", ["positive", "negative", "anchor"])
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_row_maps(case, mapped, index):
    """One tensor has fewer or more rows than the output; the others have one each."""
    p, n, a = rows(5, 63, device=case.device).logits(torch.float32)
    place = torch.tensor([2, 0, 2, 4, 1], device=case.device, dtype=index)
    tensors = {"positive": p, "negative": n, "anchor": a}
    tensors[mapped] = torch.cat([tensors[mapped], 5 * tensors[mapped]])[:7]
    check_sample(
        case, tensors["positive"], tensors["negative"], anchor=tensors["anchor"], alpha=1.5,
        plausibility=0.01, seed=4, **{f"{mapped}_rows": place},
    )  # fmt: skip


@pytest.mark.op("contrastive_sample")
def test_one_stacked_tensor_serves_as_both(case):
    """As one forward pass over both prompts gives it, rows interleaved."""
    p, n = rows(4, 63, device=case.device).logits(torch.float32, 2)
    stacked = torch.stack([p, n], 1).reshape(8, 63)
    even = torch.arange(0, 8, 2, device=case.device)
    options = {"alpha": 1.5, "top_k": 10, "position": even, "impl": case.impl}
    ours = trimtab.contrastive_sample(
        stacked, stacked, positive_rows=even, negative_rows=even + 1, **options
    )
    for got, expected in zip(ours, trimtab.contrastive_sample(p, n, **options), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "temperature": 0.8}], ids=str)
def test_equal_values_in_every_dtype_give_the_same_token(case, options):
    """Numbers of 7 binary digits, that float32, bfloat16 and float16 all hold."""
    b = few(case, 64, 4)
    generator = torch.Generator().manual_seed(8)
    p, n = (torch.randint(-64, 65, (b, 50), generator=generator) / 16 for _ in range(2))
    seed = torch.arange(b, device=case.device)
    results = [
        check_sample(case, p.to(case.device, dtype), n.to(case.device, dtype), alpha=0.5,
                     seed=seed, **options)
        for dtype in LOW_PRECISION
    ]  # fmt: skip
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_greedy(case, dtype):
    """The lowest index among the maxima, logp 0, kept 1, whatever the other filters say."""
    p, n = rows(6, 63, dtype=dtype, device=case.device).logits(dtype, 2)
    p[1] = n[1] = 2.0
    p[2, 40] = p[2, 17] = p[2, 62] = 50.0
    n[2, 40] = n[2, 17] = n[2, 62] = 0.0
    p[3, :60] = -INF
    for filters in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "plausibility": 0.5}):
        got = check_sample(case, p, n, alpha=0.5, temperature=0.0, **filters)
        assert got.token[1:3].tolist() == [0, 17]
        assert_same_bits(got.logp, torch.zeros(6, device=case.device))
        assert got.kept.tolist() == [1] * 6
    whole = check_sample(case, p, n, alpha=0.5, temperature=0)
    assert torch.equal(whole.token, got.token.where(whole.token == got.token, whole.token))
    if dtype == torch.float32:
        z = trimtab.contrastive_logits(p, n, alpha=0.5, impl="reference")
        assert torch.equal(whole.token, z.argmax(-1))


@pytest.mark.op("contrastive_sample")
def test_greedy_rows_among_sampled_ones(case):
    p, n = rows(8, 63, device=case.device).logits(torch.float32, 2)
    temperature = torch.tensor([0.0, 1.0] * 4, device=case.device)
    options = {"alpha": 0.5, "top_p": 0.9, "seed": 5}
    mixed = check_sample(case, p, n, temperature=temperature, **options)
    for where, heat in ((slice(0, None, 2), 0.0), (slice(1, None, 2), 1.0)):
        alone = check_sample(case, p[where], n[where], temperature=heat, **options)
        for ours, theirs in zip(mixed, alone, strict=True):
            assert_same_bits(ours[where], theirs)


BAD = {
    "nan in positive": (0, NAN),
    "nan in negative": (1, NAN),
    "nan in anchor": (2, NAN),
    "inf in positive": (0, INF),
    "inf in anchor": (2, INF),
    "-inf in negative": (1, -INF),
    "no token in positive": (0, slice(None)),
    "no token in anchor": (2, slice(None)),
}


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", [0, 31, 62])
@pytest.mark.parametrize("why", BAD)
def test_a_bad_row_leaves_the_others_alone(case, why, place, temperature):
    which, value = BAD[why]
    if case.interpreted and place == 31:
        pytest.skip("the interpreter is slow")
    given = rows(5, 63, device=case.device).logits(torch.float32)
    options = {"alpha": 0.5, "temperature": temperature, "top_p": 0.9, "min_p": 0.01, "seed": 6}

    def sample(p, n, a):
        return check_sample(case, p, n, anchor=a, **options)

    clean = sample(*given)
    if isinstance(value, slice):
        given[which][2] = -INF
    else:
        given[which][2, place] = value
    got = sample(*given)
    assert got.token[2] == -1
    assert got.logp[2].isnan()
    assert got.kept[2] == 0
    others = torch.tensor([0, 1, 3, 4], device=case.device)
    for ours, theirs in zip(got, clean, strict=True):
        assert_same_bits(ours[others], theirs[others])


@pytest.mark.op("contrastive_sample")
def test_rows_that_only_look_bad(case):
    """Infinities that cancel, that the contrast turns away, or that the mask removes."""
    p, n, a = rows(4, 31, device=case.device).logits(torch.float32)
    p[0, 3] = n[0, 3] = INF  # cancel: z is the anchor's
    p[1, 4] = -INF
    n[2, 5] = INF
    a[3, 6] = p[3, 6] = n[3, 6] = -INF
    got = check_sample(case, p, n, anchor=a, alpha=0.5, top_p=0.99)
    assert (got.token >= 0).all()
    p[0, 7], a[0, 7] = INF, -50.0
    assert check_sample(case, p, n, anchor=a, alpha=0.5).token[0] == -1
    got = check_sample(case, p, n, anchor=a, alpha=0.5, plausibility=0.01)
    assert (got.token >= 0).all()


@pytest.mark.op("contrastive_sample")
def test_nan_that_the_mask_would_hide(case):
    """A row with NaN is bad even where the token is implausible."""
    p, n, a = rows(2, 31, device=case.device).logits(torch.float32)
    a[0, 3] = -50.0
    n[0, 3] = NAN
    got = check_sample(case, p, n, anchor=a, alpha=0.5, plausibility=0.5)
    assert got.token[0] == -1
    # Nor does alpha 0 read what it does not need.
    free = check_sample(case, p, n, anchor=a, alpha=0.0, plausibility=0.5)
    assert (free.token >= 0).all()


@pytest.mark.op("contrastive_sample")
def test_the_check_names_bad_rows(case, monkeypatch):
    p, n = rows(6, 31, device=case.device).logits(torch.float32, 2)
    p[1, 3], p[4] = NAN, -INF
    run = {"alpha": 0.5, "impl": case.impl}
    assert trimtab.contrastive_sample(p, n, **run).token.tolist().count(-1) == 2
    monkeypatch.setenv("TRIMTAB_CHECK", "1")
    with pytest.raises(ValueError, match=r"^positive must be .*, got .*\[1, 4\]; "):
        trimtab.contrastive_sample(p, n, **run)
    clean = torch.tensor([0, 2, 3, 5], device=case.device)
    trimtab.contrastive_sample(p[clean], n[clean], **run)
    with pytest.raises(ValueError, match=r"^positive must be .*, got .*\[1, 4\]; "):
        trimtab.linear_contrastive_sample(p, p, torch.eye(31, device=case.device), **run)


@pytest.mark.op("contrastive_sample")
def test_empty_batches_and_vocabularies(case):
    none = torch.empty(0, 31, device=case.device)
    got = trimtab.contrastive_sample(none, none, alpha=0.5, top_p=0.9, top_k=3, impl=case.impl)
    assert [field.shape for field in got] == [(0,)] * 3
    nothing = torch.empty(3, 0, device=case.device)
    got = trimtab.contrastive_sample(nothing, nothing, alpha=0.5, top_k=3, impl=case.impl)
    assert got.token.tolist() == [-1] * 3
    assert got.logp.isnan().all()
    assert got.kept.tolist() == [0] * 3


@pytest.mark.op("contrastive_sample")
def test_one_token(case):
    """With nothing to choose from the token is certain."""
    p = torch.randn(5, 1, device=case.device)
    for options in ({}, {"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"plausibility": 1.0}):
        got = trimtab.contrastive_sample(p, -p, alpha=0.5, impl=case.impl, **options)
        assert got.token.tolist() == [0] * 5
        assert got.kept.tolist() == [1] * 5
        assert_same_bits(got.logp, torch.zeros(5, device=case.device))


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("classes", [32_003, 128_256, 256_000])
@pytest.mark.parametrize("options", [{}, {"top_k": 50, "top_p": 0.9, "min_p": 0.02}], ids=str)
def test_large_vocabularies(case, classes, options):
    skip_simulated(case, "the interpreter is slow")
    p, n = rows(2, classes, dtype=torch.bfloat16, device=case.device).logits(torch.bfloat16, 2)
    check_sample(case, p, n, alpha=1.5, seed=1, position=2, **options)


@pytest.mark.op("contrastive_sample")
def test_more_rows_than_a_cuda_grid_has(case):
    skip_simulated(case)
    b = 70_000
    p = rows(7, 5, device=case.device).positive.float()
    index = torch.arange(b, device=case.device) % 7
    seed = torch.arange(b, device=case.device)
    got = trimtab.contrastive_sample(
        p, p, alpha=0.0, positive_rows=index, negative_rows=index, seed=seed, top_k=3,
        impl=case.impl,
    )  # fmt: skip
    assert (got.kept == 3).all()
    some = torch.tensor([0, 1, 65_535, 65_536, b - 1])
    truth = oracle_sample(
        p,
        p,
        alpha=0.0,
        positive_rows=index[some],
        negative_rows=index[some],
        seed=seed[some],
        top_k=3,
    )
    assert_sampled([field[some] for field in got], truth)


@pytest.mark.op("contrastive_sample")
def test_same_bits_every_time(case):
    p, n, a = rows(few(case, 9), 252, device=case.device).logits(torch.float32)
    options = {"alpha": 1.5, "anchor": a, "plausibility": 1e-3, "top_p": 0.95, "seed": 1}
    first = trimtab.contrastive_sample(p, n, impl=case.impl, **options)
    for _ in range(9 if case.impl != "triton" else 1):
        for again, before in zip(
            trimtab.contrastive_sample(p, n, impl=case.impl, **options), first, strict=True
        ):
            assert_same_bits(again, before)
