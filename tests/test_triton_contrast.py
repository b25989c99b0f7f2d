"""The Triton sampling kernel, launched directly, against the numpy oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from contrast_cases import assert_sampled, oracle_sample
from trimtab.triton_kernels import contrast as kernels
from trimtab.triton_kernels.contrast import config

# Infinities and NaN pass in silence on a GPU; numpy, which runs the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
INF = math.inf


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 and lists of 32, so that short rows have several tiles and overflow lists."""

    def shape(vocab: int, dtype: torch.dtype, *, aligned: bool) -> config.Config:
        vec = 16 // dtype.itemsize if aligned else 2
        return config.Config(8 // vec, 8, vec, 1, 1, 32)

    monkeypatch.setattr(config, "launch_config", shape)


def make(b: int, v: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> list[Tensor]:
    """Three rows of logits for each output row, near each other as two prompts are."""
    base = torch.randn(b, v) * spread
    return [(base + torch.randn(b, v)).to(dtype).to(DEVICE) for _ in range(3)]


def both(value: Any, transform: Any, dtype: torch.dtype) -> tuple[Any, Tensor | None]:
    """A parameter as (number, tensor); a list is one number per row."""
    if isinstance(value, list):
        rows = [transform(x) for x in value]
        return 0, torch.tensor(rows, dtype=torch.float64).to(dtype).to(DEVICE)
    return transform(value), None


def whole(value: Any) -> tuple[int, Tensor | None]:
    if isinstance(value, list):
        return 0, torch.tensor(value, dtype=torch.int64, device=DEVICE)
    return value, None


def log(x: float | None) -> float:
    return math.log(x) if x else -INF


def tail(top_p: float | None) -> float:
    return -1.0 if top_p is None or top_p >= 1.0 else 1.0 - top_p


def launch(
    positive: Tensor, negative: Tensor | None, anchor: Tensor | None, maps: tuple, **given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows = next((len(m) for m in maps if m is not None), positive.shape[0])
    out = (
        torch.full((rows,), -7, device=DEVICE),
        torch.full((rows,), -7.0, device=DEVICE),
        torch.full((rows,), -7, device=DEVICE),
    )
    real = torch.float32
    kernels.contrastive_sample_rows(
        positive, negative, anchor, *maps,
        *both(given.get("alpha", 0.0), float, real),
        *both(given.get("plausibility"), log, real),
        *both(given.get("temperature", 1.0), float, real),
        *whole(given.get("top_k", 0)),
        *both(given.get("top_p"), tail, real),
        *both(given.get("min_p"), log, real),
        *whole(given.get("seed", 0)), *whole(given.get("position", 0)), *out,
    )  # fmt: skip
    return out


def check(
    positive: Tensor,
    negative: Tensor | None = None,
    anchor: Tensor | None = None,
    maps: tuple = (None, None, None),
    **given: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches, compares with the oracle, and returns what the kernel gave."""
    got = launch(positive, negative, anchor, maps, **given)
    names = ("positive_rows", "negative_rows", "anchor_rows")
    truth = oracle_sample(
        positive, negative, anchor=anchor, **dict(zip(names, maps, strict=True)), **given
    )
    assert_sampled(got, truth)
    return got


FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "mask": {"plausibility": 0.1},
    "top-k": {"top_k": 7},
    "top-k 1": {"top_k": 1},
    "top-k of nearly all": {"top_k": 180},
    "top-p": {"top_p": 0.8},
    "top-p, wide": {"top_p": 0.98, "temperature": 3.0},
    "top-p 0": {"top_p": 0.0},
    "min-p": {"min_p": 0.05},
    "min-p, wide": {"min_p": 1e-4, "temperature": 2.0},
    "all": {"plausibility": 1e-3, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "all, wide": {"temperature": 4.0, "top_k": 150, "top_p": 0.95, "min_p": 1e-3},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FILTERS)
def test_filters(small_tiles: None, name: str, dtype: torch.dtype):
    p, n, a = make(2, 201, dtype)
    check(p, n, a, alpha=0.6, seed=5, position=11, **FILTERS[name])


@pytest.mark.parametrize("name", ["mask", "all, wide"])
@pytest.mark.parametrize("given", ["no anchor", "one row", "one row, anchor", "alpha 0"])
def test_rows_given(small_tiles: None, given: str, name: str):
    p, n, a = make(2, 201, torch.float16)
    check(
        p,
        None if given.startswith("one row") else n,
        a if given.endswith("anchor") and given != "no anchor" else None,
        alpha=0.0 if given == "alpha 0" else 2.5,
        **FILTERS[name],
    )


def test_each_row_has_its_own_parameters(small_tiles: None):
    """Rows that need a list, a bracket or nothing, side by side; rows of one tensor used twice."""
    p, n, a = make(4, 131)
    check(
        p, n, a,
        maps=tuple(torch.tensor(m, device=DEVICE) for m in (
            [0, 1, 2, 3, 3, 2, 1], [3, 3, 0, 1, 2, 2, 0], [1, 1, 0, 0, 2, 3, 2]
        )),
        alpha=[0.0, 0.5, -0.5, 1.0, 2.0, 0.1, 4.0],
        plausibility=[None, 0.1, None, 1.0, 1e-6, None, 0.5],
        temperature=[1.0, 0.0, 0.3, 2.0, 5.0, 1.0, 1.5],
        top_k=[0, 3, 5, 0, 100, 131, 1],
        top_p=[None, 0.5, 0.9, 0.99, 0.97, None, 0.0],
        min_p=[None, None, 0.01, None, 1e-5, 0.1, None],
        seed=[0, 1, -1, 2**62 + 1, -(2**63), 5, 5],
        position=[0, 2**40, 3, -1, 2**31, 6, 7],
    )  # fmt: skip


TIED: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 3},
    "top-k past the list": {"top_k": 60},
    "top-p": {"top_p": 0.52},
    "top-p past the list": {"top_p": 0.93},
    "top-p, one left": {"top_p": 1e-9},
    "both": {"top_k": 40, "top_p": 0.61, "temperature": 1.5},
}


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("name", TIED)
def test_equal_scores(small_tiles: None, name: str, levels: int):
    """Of equals at the end of top-p the lowest indices leave; top-k keeps them all."""
    p = torch.randint(levels, (2, 151)).float().to(DEVICE)
    check(p, seed=3, **TIED[name])


@pytest.mark.parametrize(("ties", "vocab"), [(8, 30), (140, 201)])
def test_which_of_the_equals_leave(small_tiles: None, ties: int, vocab: int):
    """Draws show it: 12 of them, from a list, and from a row of which two tiles lose some."""
    p = torch.full((12, vocab), -3.0, device=DEVICE)
    p[:, torch.randperm(vocab)[:ties]] = 1.0
    token, _, kept = check(p, top_p=0.41, seed=list(range(12)))
    equals = torch.nonzero(p[0] == 1.0)[:, 0]
    assert (kept < 0.6 * ties).all()
    assert token.unique().numel() > 2
    assert torch.isin(token, equals[-int(kept[0]) :]).all()


def test_many_draws(small_tiles: None):
    """Enough of them that keys of several tiles come near each other."""
    p = torch.randn(1, 201).to(DEVICE).expand(60, 201)
    token, _, _ = check(p, seed=list(range(60)), position=list(range(100, 40, -1)))
    assert token.unique().numel() > 20


def test_the_temperature_divides(small_tiles: None):
    """Neighbours that merge, or stay apart, in a division and not in a product with 1 / T."""
    top = torch.linspace(2.0, 4.0, 4001).numpy()
    below = np.nextafter(top, np.float32(0))
    temperature = np.float32(1.7)
    inverse = np.float32(1) / temperature
    merges = top / temperature == below / temperature
    differ = np.flatnonzero(merges != (top * inverse == below * inverse))[:12]
    assert merges[differ].any()
    assert not merges[differ].all()
    p = torch.tensor(np.stack([below[differ], top[differ]], 1), device=DEVICE)
    _, _, kept = check(p, top_k=1, temperature=float(temperature))
    assert kept.tolist() == (1 + merges[differ]).tolist()


def test_equals_at_the_top_in_one_place_of_the_tiles(small_tiles: None):
    """The bound of top-k is then below its threshold, which is the maximum."""
    p = torch.randn(1, 201).clamp(max=2.0).to(DEVICE)
    p[0, [20, 20 + 64]] = 3.0
    for seed in range(3):
        _, _, kept = check(p, top_k=2, top_p=0.7, seed=seed)
        assert kept.item() == 2
    assert check(p, top_k=2, top_p=0.3)[2].item() == 1


def test_both_zeros_are_one_score(small_tiles: None):
    p = torch.full((1, 130), -1.0, device=DEVICE)
    p[0, ::3], p[0, 1::3] = 0.0, -0.0
    for name in ("top-k", "top-p", "top-p past the list"):
        check(p, **TIED[name])
    assert check(p, temperature=0.0)[0].item() == 0
    assert check(p, top_k=1)[2].item() == 87


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e37])
def test_scores_of_any_size(small_tiles: None, scale: float):
    """Pivots at even distances are of no use here; the middle of the keys still is."""
    p = torch.randn(2, 201).to(DEVICE) * scale
    check(p, top_k=70, top_p=0.893)
    check(p, top_k=3)
    check(p, temperature=scale, top_p=0.95)


def test_more_asked_for_than_there_is(small_tiles: None):
    p = torch.randn(2, 201).to(DEVICE)
    p[:, 10:] = -INF
    p[1, 3:] = -INF
    for top_k in (2, 5, 40, 150):
        check(p, top_k=top_k)
        check(p, top_k=top_k, top_p=0.9)
    check(p, top_k=2**40)


@pytest.mark.parametrize("name", ["none", "greedy", "top-p", "top-k of nearly all"])
def test_bad_rows(small_tiles: None, name: str):
    """They are reported, and leave the other rows as they were."""
    p, n, a = make(9, 131)
    options = {"plausibility": 0.01, "alpha": 0.5, **FILTERS[name]}
    before = check(p, n, a, **options)
    p[1, 130], n[2, 0], a[3, 64] = (math.nan,) * 3
    worst = int(a[4].argmin())
    p[4, worst] = math.nan  # under the mask
    a[5, 7] = p[5, 7] = INF
    a[6] = -INF
    n[7, int(a[7].argmax())] = -INF
    after = check(p, n, a, **options)
    assert after[0].tolist()[1:8] == [-1] * 7
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[[0, 8]], new[[0, 8]])
    one_row = check(p, None, a, **options)
    assert one_row[0].tolist()[1:8:2] == [-1, -1, -1, one_row[0][7].item()]


def test_bad_parameters(small_tiles: None):
    p, n, _ = make(3, 40)
    assert check(p, n, temperature=[-1.0, 1.0, math.nan])[0].tolist()[::2] == [-1, -1]
    maps = torch.tensor([0, 3, -1, 2], device=DEVICE)
    token, logp, kept = launch(p, n, None, (maps, None, None), temperature=1.0)
    # The negative row of the fourth is outside, the positive rows of two others are.
    assert token.tolist()[1:] == [-1, -1, -1]
    assert token[0] >= 0
    assert logp.isnan().tolist() == [False, True, True, True]
    assert kept.tolist() == [40, 0, 0, 0]


@pytest.mark.parametrize("layout", ["odd stride", "late start", "one row", "overlapping"])
def test_rows_anywhere_in_memory(layout: str):
    room = (torch.randn(3, 309) * 3).half().to(DEVICE)
    room[:, 300:] = math.nan
    if layout == "odd stride":
        p = room[:, :300]
    elif layout == "late start":
        p = torch.cat([room[:, :1], room], 1).contiguous()[:, 1:301]
    elif layout == "one row":
        p = room[:1, :300].expand(3, 300)
    else:
        p = room[0].as_strided((3, 290), (5, 1))
    n = p.flip(0).contiguous()
    options = {"alpha": 0.3, "top_k": 20, "top_p": 0.9, "plausibility": 1e-3}
    plain, strided = (check(t, n, seed=[1, 2, 3], **options) for t in (p.contiguous(), p))
    for one, other in zip(plain, strided, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("vocab", [1, 3, 63, 127, 252, 507, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vocabularies(vocab: int, dtype: torch.dtype):
    """In the shapes of a launch on a GPU; the longest has two tiles."""
    p, n, _ = make(1, vocab, dtype)
    check(p, n, alpha=0.5, seed=vocab)
    check(p, n, alpha=0.5, top_k=50, top_p=0.95, seed=vocab)


def test_a_list_of_2048_overflows():
    p = torch.randn(1, 5000).to(DEVICE)
    check(p, top_p=0.97)
    check(p, top_k=4000, top_p=0.9)
    check(p.mul(4.0).round().div(4.0), top_k=900)


def test_nothing_to_sample():
    empty = torch.empty(2, 0, device=DEVICE)
    token, logp, kept = launch(empty, empty, None, (None,) * 3)
    assert token.tolist() == [-1, -1]
    assert logp.isnan().all()
    assert kept.tolist() == [0, 0]
    assert launch(empty[:0], empty[:0], None, (None,) * 3)[0].shape == (0,)
