"""The supports of contrastive_sample: against a sort in float64, and Hugging Face's warpers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import contrast_oracle as oracle
import trimtab
from contrast_cases import (
    LOW_PRECISION,
    NUCLEUS,
    ODD_SIZES,
    assert_sampled,
    check_sample,
    few,
    hf_margin,
    hf_support,
    oracle_sample,
    rows,
)

# Infinities and NaN pass in silence on a GPU; numpy, which runs the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = math.inf
FILTERS = [
    {},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"plausibility": 0.2},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "plausibility": 0.001},
]


def named(options: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items()) or "plain"


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("options", FILTERS, ids=named)
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
def test_filters(case, dtype, options, anchored, poison):
    given = rows(few(case, 9), 63, dtype, device=case.device, seed=len(named(options)))
    p, n, a = given.logits(dtype)
    kept = {"anchor": a} if anchored else {}
    check_sample(case, p, n, alpha=1.5, seed=7, position=11, **kept, **options)


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("classes", [*ODD_SIZES, 2, 1024, 4999])
@pytest.mark.parametrize("options", [FILTERS[0], FILTERS[-1]], ids=named)
def test_odd_vocabularies(case, classes, options, poison):
    if classes > 1000 and case.interpreted:
        pytest.skip("the interpreter is slow")
    p, n = rows(4, classes, device=case.device).logits(torch.float32, 2)
    check_sample(case, p, n, alpha=0.5, seed=torch.arange(4, device=case.device), **options)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("options", FILTERS, ids=named)
def test_filters_in_float64(impl, options):
    given = rows(9, 63)
    got = trimtab.contrastive_sample(*given[:2], alpha=1.5, anchor=given.anchor, seed=3, impl=impl,
                                     **options)  # fmt: skip
    truth = oracle_sample(*given[:2], alpha=1.5, anchor=given.anchor, seed=3, **options)
    assert_sampled(got, truth, torch.float64)


@pytest.mark.op("contrastive_sample")
def test_every_parameter_per_row(case):
    b = 12
    p, n, a = rows(b, 63, device=case.device).logits(torch.float32)
    generator = torch.Generator().manual_seed(1)

    def choose(values: list, dtype: torch.dtype = torch.float32) -> Tensor:
        picked = torch.randint(len(values), (b,), generator=generator)
        return torch.tensor(values, dtype=dtype)[picked].to(case.device)

    check_sample(
        case, p, n, anchor=a,
        alpha=choose([0.0, 0.5, -1.0, 3.0]),
        plausibility=choose([0.01, 0.25, 1.0]),
        temperature=choose([0.0, 0.5, 1.0, 1.5]),
        top_k=choose([0, 1, 8, 100], torch.int64),
        top_p=choose([0.25, 0.75, 1.0]),
        min_p=choose([0.0, 0.03125, 0.5]),
        seed=choose([0, -5, 2**40], torch.int64),
        position=choose([1, -(2**63), 2**33 + 1], torch.int64),
    )  # fmt: skip


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "plausibility", "alpha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_number_is_a_tensor_full_of_it(case, name, dtype):
    """The logarithms and differences behind it are made in float64 either way."""
    p, n = rows(5, 63, device=case.device).logits(torch.float32, 2)
    value = 0.30000001192092896 if dtype == torch.float32 else 0.3
    options = {"alpha": 0.5, "impl": case.impl}
    number = trimtab.contrastive_sample(p, n, **{**options, name: value})
    for shape in ((5,), ()):
        full = torch.full(shape, value, dtype=dtype, device=case.device)
        tensor = trimtab.contrastive_sample(p, n, **{**options, name: full})
        for ours, theirs in zip(tensor, number, strict=True):
            assert torch.equal(ours, theirs)


HF_OPTIONS = [
    {"temperature": t, "top_k": k, "top_p": p, "min_p": m}
    for t, k, p, m in itertools.product(
        (1.0, 0.7, 1.6), (None, 1, 3, 6, 100), (None, 0.0, 0.1, 0.5, 0.9, 1.0),
        (None, 0.05, 0.3, 1.0),
    )
]  # fmt: skip


def hf_rows(kind: str) -> list[Tensor]:
    """Rows of 10 whose least likely token still has one draw in some thousands."""
    generator = torch.Generator().manual_seed(5)
    draw = [1.3 * torch.randn(10, generator=generator) for _ in range(3)]
    if kind == "random":
        return draw
    if kind == "tied":
        return [row.round() for row in draw]
    if kind == "bfloat16":
        return [row.bfloat16().float() for row in draw]
    if kind == "constant":
        return [torch.full((10,), -2.5)]
    if kind == "one hot":
        return [torch.eye(10)[3] * 4]
    masked = [row.clone() for row in draw]
    for i, row in enumerate(masked):
        row[torch.randperm(10, generator=generator)[: 3 + 3 * i]] = -INF
    return masked


KINDS = ["random", "tied", "bfloat16", "constant", "one hot", "masked"]


def decided(row: Tensor, options: dict) -> bool:
    """Whether neither the warpers' float32 sums nor ours are near the boundary."""
    ours = oracle.sample(row.numpy(), **options)
    return hf_margin(row, **options) > 1 and ours.margin > NUCLEUS


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("kind", KINDS)
def test_support_sizes_are_hugging_faces(case, kind):
    """All combinations of the filters in one call, each with parameters of its own."""
    pytest.importorskip("transformers")
    every = [o for o in itertools.product(hf_rows(kind), HF_OPTIONS) if decided(*o)]
    total = len(hf_rows(kind)) * len(HF_OPTIONS)
    # Of equal tokens many sums are at a boundary; those that are exact have a test of their own.
    assert len(every) >= {"constant": 0.5, "one hot": 0.7, "tied": 0.8}.get(kind, 0.95) * total
    every = every[:: few(case, 1, 90)]
    logits = torch.stack([row for row, _ in every]).to(case.device)
    given = {
        name: torch.tensor([o[name] or 0 if o[name] is not None else off for _, o in every],
                           dtype=kept, device=case.device)
        for name, off, kept in [("temperature", 1.0, torch.float64), ("top_k", 0, torch.int64),
                                ("top_p", 1.0, torch.float64), ("min_p", 0.0, torch.float64)]
    }  # fmt: skip
    drawn = trimtab.contrastive_sample(
        logits, logits, alpha=0.0, position=torch.arange(len(every), device=case.device),
        impl=case.impl, **given,
    )  # fmt: skip
    for (row, options), token, kept in zip(
        every, drawn.token.tolist(), drawn.kept.tolist(), strict=True
    ):
        support = hf_support(row, **options)
        assert kept == len(support), (row, options)
        assert token in support, (row, options)


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("kind", KINDS)
def test_supports_are_hugging_faces(case, kind):
    """Drawn until every token of the support was seen: the sets themselves."""
    pytest.importorskip("transformers")
    if case.interpreted or case.harness:
        pytest.skip("too slow; the sizes above and the oracle's tokens cover it")
    every = [o for o in itertools.product(hf_rows(kind), HF_OPTIONS) if decided(*o)]
    for row, options in every[::11]:
        support = hf_support(row, **options)
        given = {name: value for name, value in options.items() if value is not None}
        assert drawn_support(case, row, **given) == support, (row, options)


def drawn_support(case, row: Tensor, draws: int = 4000, **options) -> set[int]:
    """The tokens of many positions; all that ``kept`` says there are must be among them."""
    logits = row.to(case.device).expand(draws, -1)
    drawn = trimtab.contrastive_sample(
        logits, logits, alpha=0.0, position=torch.arange(draws, device=case.device),
        impl=case.impl, **options,
    )  # fmt: skip
    tokens = set(drawn.token.tolist())
    sizes = set(drawn.kept.tolist())
    assert sizes == {len(tokens)}, f"{sizes} kept, {len(tokens)} seen: draw more"
    return tokens


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("classes", [2, 4, 8, 16, 64])
def test_nucleus_of_equals_at_the_boundary(case, classes):
    """Every sum is exact here: a sum equal to 1 - top_p goes, and of equals the lowest go first."""
    pytest.importorskip("transformers")
    logits = torch.zeros(classes, device=case.device)
    for gone in range(0, classes, max(1, classes // 8)):
        top_p = 1.0 - gone / classes
        ours = trimtab.contrastive_sample(
            logits[None], logits[None], alpha=0.0, top_p=top_p, impl=case.impl
        )
        assert ours.kept.tolist() == [classes - gone]
        assert len(hf_support(logits.cpu(), top_p=top_p)) == classes - gone
        if classes <= 8 and not case.interpreted:
            expected = set(range(gone, classes))
            assert hf_support(logits.cpu(), top_p=top_p) == expected
            assert drawn_support(case, logits, 400, top_p=top_p) == expected
    one = trimtab.contrastive_sample(
        logits[None], logits[None], alpha=0.0, top_p=0.0, impl=case.impl
    )
    assert (one.token.item(), one.kept.item(), one.logp.item()) == (classes - 1, 1, 0.0)


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("classes", [3, 7, 10, 20])
def test_nucleus_of_equals_whose_share_is_rounded(case, classes):
    """Sums are whole numbers here: their share and 1 - top_p are each rounded once to float32."""
    if classes > 3 and case.interpreted:
        pytest.skip("the interpreter is slow")
    top_p = [1.0 - gone / classes for gone in range(1, classes)]
    top_p += [gone / classes for gone in range(1, classes)] + [0.1, 0.2, 0.3, 0.7, 0.8, 0.9]
    p = torch.zeros(1, classes, device=case.device)
    for share in top_p:
        got = trimtab.contrastive_sample(p, p, alpha=0.0, top_p=share, impl=case.impl)
        (truth,) = oracle_sample(p, p, alpha=0.0, top_p=share)
        assert got.kept.item() == truth.kept, share
    shares = torch.tensor(top_p, dtype=torch.float64, device=case.device)
    p = p.expand(len(top_p), -1)
    got = trimtab.contrastive_sample(p, p, alpha=0.0, top_p=shares, impl=case.impl)
    truth = oracle_sample(p, p, alpha=0.0, top_p=shares)
    assert got.kept.tolist() == [row.kept for row in truth]


@pytest.mark.op("contrastive_sample")
def test_ties_at_the_kth_largest_stay(case):
    row = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 0.5, -INF], device=case.device)
    for top_k, kept in [(1, 1), (2, 2), (3, 5), (5, 5), (6, 6), (7, 6), (100, 6), (2**40, 6)]:
        ours = check_sample(case, row[None], row[None], top_k=top_k, seed=top_k)
        assert ours.kept.tolist() == [kept]


@pytest.mark.op("contrastive_sample")
def test_the_order_of_the_filters(case):
    """Each works on what the one before left, renormalised: another order keeps other tokens."""
    probabilities = torch.tensor([0.4, 0.25, 0.15, 0.12, 0.08], device=case.device)
    row = probabilities.log()[None]

    def kept(**options):
        return check_sample(case, row, row, **options).kept.item()

    assert kept(top_k=4) == 4
    assert kept(top_p=0.86) == 4
    # Of the four likeliest, 0.12 / 0.92 is below 0.14: it goes only where top-k went before.
    assert kept(top_k=4, top_p=0.86) == 3
    assert kept(top_k=2, top_p=0.6) == 1, "0.4 / 0.65 alone exceeds 0.6"
    assert kept(top_p=0.6) == 2
    # The temperature comes before the nucleus: at 0.5 the shares are squared.
    assert kept(temperature=0.5, top_p=0.6) == 1
    assert kept(temperature=2.0, min_p=0.5) == 4
    assert kept(min_p=0.5) == 2
    # The mask comes before all: without the two likeliest tokens the third is 0.15 / 0.35.
    anchor = torch.tensor([[0.0, 0.0, 5.0, 5.0, 5.0]], device=case.device)
    masked = {"anchor": anchor, "plausibility": 0.5}
    assert check_sample(case, anchor, anchor, plausibility=0.5).kept.item() == 3
    z = {"positive": row, "negative": anchor}
    got = check_sample(case, z["positive"], z["negative"], alpha=1.0, top_k=1, **masked)
    assert got.kept.item() == 1
    assert got.token.item() == 2


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
def test_the_plausibility_mask_comes_first(case, anchored):
    """The support is what the warpers leave of the masked row."""
    pytest.importorskip("transformers")
    p, n, a = rows(8, 10, device=case.device, spread=1.0).logits(torch.float32)
    mask_of = a if anchored else p
    options = {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05}
    kept = {"anchor": a} if anchored else {}
    beta = 0.15
    z = trimtab.contrastive_logits(p, n, alpha=0.5, impl="reference", **kept)
    masked = z.masked_fill(mask_of < mask_of.amax(1, keepdim=True) + math.log(beta), -INF).cpu()
    assert (masked == -INF).any()
    decided_rows = [i for i in range(8) if decided(masked[i], options)]
    assert len(decided_rows) > 5
    drawn = trimtab.contrastive_sample(
        p, n, alpha=0.5, plausibility=beta, impl=case.impl, **options, **kept
    )
    for i in decided_rows:
        support = hf_support(masked[i], **options)
        assert drawn.kept[i] == len(support)
        assert drawn.token[i].item() in support


@pytest.mark.op("contrastive_sample")
def test_the_most_plausible_alone(case):
    """With beta 1 the maxima of the anchor stay, all of them, also where z is lower there."""
    p = torch.tensor([[2.0, 2.0, 1.9999999, 0.0]], device=case.device)
    n = torch.tensor([[90.0, 80.0, 0.0, 0.0]], device=case.device)
    ours = check_sample(case, p, n, alpha=1.0, plausibility=1.0)
    assert (ours.token.item(), ours.kept.item()) == (1, 2)


@pytest.mark.op("contrastive_sample")
def test_a_division_that_makes_ties(case):
    """Neighbours that one temperature merges count as equals in every filter."""
    steps = 1.75 + torch.arange(7) * 2.0**-23
    merged = steps / 1.5
    assert len(set(steps.tolist())) == 7
    assert (merged == merged.max()).sum() == 2
    for row in (steps, steps.flip(0)):
        p = row[None].to(case.device)
        for options in ({"top_k": 1}, {"top_k": 2}, {"min_p": 1.0}):
            assert check_sample(case, p, p, temperature=1.5, **options).kept.item() == 2
        check_sample(case, p, p, temperature=1.5, top_p=0.49)


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0, 40.0])
def test_nucleus_over_long_rows(case, spread):
    """Flat and steep rows: from nearly all tokens to a few."""
    classes = 300 if case.interpreted else 20_000
    p, n = rows(3, classes, spread=spread, device=case.device).logits(torch.float32, 2)
    for top_p in (0.05, 0.5, 0.999):
        check_sample(case, p, n, alpha=0.1, top_p=top_p)


@pytest.mark.op("contrastive_sample")
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30])
def test_a_common_offset(case, offset):
    p, n = rows(6, 63, device=case.device).logits(torch.float32, 2)
    check_sample(case, p + offset, n + offset, alpha=0.5, top_p=0.9, min_p=0.01, seed=2)


@pytest.mark.op("contrastive_sample")
def test_a_temperature_that_overflows_or_flattens(case):
    p = torch.tensor([[1e30, 2e30, -3e30, 0.0]], device=case.device)
    check_sample(case, p, p, temperature=1e-20)
    check_sample(case, p, p, temperature=1e35, top_p=0.7)
    check_sample(case, p * 1e-60, p * 1e-60, temperature=1e-30, top_k=2)


@pytest.mark.op("contrastive_sample", dtype=torch.float32)
def test_bounds_at_the_ends_of_the_number_line_are_found(case):
    """A bin of keys that ends past the largest key once made the search run for ever."""
    logits = torch.zeros(1, 768, device=case.device)
    logits[0, :256], logits[0, 512:], logits[0, 300:302] = -1.59e38, -3e38, 3e38
    most = torch.finfo(torch.float32).max
    both_ends = torch.tensor([[most, -most]], device=case.device)
    for given, top_k, kept in ((logits, 2, 2), (both_ends, 1, 1), (both_ends, 2, 2)):
        drawn = trimtab.contrastive_sample(given, given, alpha=0.0, top_k=top_k, impl=case.impl)
        assert drawn.kept.tolist() == [kept]


def test_kept_counts_what_is_too_far_below_to_have_mass():
    rows = torch.tensor([[-3.3e38, 0.0, 3e38]])
    for impl in ("reference", "native"):
        assert trimtab.contrastive_sample(rows, rows, alpha=0.0, impl=impl).kept.tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_equal_tokens_at_an_exact_boundary(impl, dtype):
    rows = torch.zeros(1, 700, dtype=dtype)
    assert trimtab.contrastive_sample(rows, rows, alpha=0.0, top_p=0.5, impl=impl).kept == 350
