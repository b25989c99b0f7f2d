"""Inputs and comparisons that the test files of the contrast operators share."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import contrast_oracle as oracle
import trimtab
from trimtab.testing import assert_within_budget, values_and_grads

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
ODD_SIZES = (1, 3, 63, 127, 252, 507)
EPS = torch.finfo(torch.float32).eps
# Implementations may be this far apart in a cumulative probability, relatively: a row whose
# nucleus ends nearer than that has two right answers, and none of those compared here does.
NUCLEUS = 1e-6


class Rows(NamedTuple):
    """Two or three rows of logits per output row, in float64, exact in the dtype under test."""

    positive: Tensor  # (B, V)
    negative: Tensor  # (B, V)
    anchor: Tensor  # (B, V)
    target: Tensor  # (B,)

    def logits(self, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
        return [tensor.to(dtype, copy=True) for tensor in self[:count]]


def rows(
    b: int = 7,
    v: int = 63,
    dtype: torch.dtype = torch.float32,
    *,
    spread: float = 3.0,
    seed: int = 0,
    device: str = "cpu",
) -> Rows:
    """Random rows; the negative and the anchor are near the positive, as two prompts are."""
    generator = torch.Generator().manual_seed(b * 1000 + v + seed)

    def draw(scale: float) -> Tensor:
        return scale * torch.randn(b, v, generator=generator, dtype=torch.float64)

    base = draw(spread)
    logits = [(base + draw(1.0)).to(dtype).double().to(device) for _ in range(3)]
    return Rows(*logits, torch.randint(v, (b,), generator=generator).to(device))


def few(case: Any, count: int, fewer: int = 2) -> int:
    """``count``, or ``fewer`` where the interpreter computes."""
    return fewer if case.interpreted else count


def column(value: Any) -> Any:
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


def eager_logp(
    positive: Tensor,
    negative: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor,
    anchor: Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """``contrastive_logp`` as a user writes it; the truth in float64."""
    real = torch.float64 if positive.dtype == torch.float64 else torch.float32
    p, n = positive.to(real), negative.to(real)
    a = p if anchor is None else anchor.to(real)
    alpha, temperature = (
        v.to(real) if isinstance(v, Tensor) else v for v in (column(alpha), column(temperature))
    )
    difference = (p - n).masked_fill((p == n) & p.isinf(), 0.0)
    z = (a + alpha * difference).masked_fill(a == -math.inf, -math.inf)
    return torch.log_softmax(z / temperature, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def check_logp(case: Any, given: Rows, dtype: torch.dtype, **options: Any) -> None:
    """Values and gradients of ``contrastive_logp`` within the error budget of eager."""
    anchored, upstream = options.pop("anchored", False), options.pop("upstream", None)
    count = 3 if anchored else 2
    target = given.target

    def run(function: Any, precision: torch.dtype, **more: Any) -> list[Tensor]:
        def logp(p: Tensor, n: Tensor, *anchor: Tensor) -> Tensor:
            kept = {"anchor": anchor[0]} if anchor else {}
            return function(p, n, target, **kept, **options, **more)

        return values_and_grads(logp, given.logits(precision, count), upstream)

    truth, eager = run(eager_logp, torch.float64), run(eager_logp, dtype)
    actual = run(trimtab.contrastive_logp, dtype, impl=case.impl)
    scale = term_magnitude(given, anchored, options)
    assert len(actual) == 1 + count
    names = ["logp", "positive.grad", "negative.grad", "anchor.grad"][: 1 + count]
    for name, ours, theirs, true in zip(names, actual, eager, truth, strict=True):
        assert ours.dtype == theirs.dtype, name
        # Rounding s moves its probability by eps * |s|, which a gradient is proportional to.
        largest = float(true.abs().amax()) if true.numel() else 0.0
        amplified = largest * (1.0 + scale * EPS / torch.finfo(ours.dtype).eps)
        budget = scale if name == "logp" else amplified
        assert_within_budget(ours, theirs, true, name=name, scale=budget)


def term_magnitude(given: Rows, anchored: bool, options: dict[str, Any]) -> float:
    """Largest sum of the magnitudes of the terms behind a log-probability."""
    a = given.anchor if anchored else given.positive
    alpha, temperature = column(options["alpha"]), column(options.get("temperature", 1.0))
    alpha = alpha.abs() if isinstance(alpha, Tensor) else abs(alpha)
    terms = a.abs() + alpha * (given.positive.abs() + given.negative.abs())
    terms = (terms / temperature).nan_to_num(0.0, 0.0, 0.0)
    return float(terms.max()) + math.log(a.shape[-1]) if terms.numel() else 0.0


def to_numpy(tensor: Tensor | None) -> np.ndarray | None:
    """Rows as the oracle takes them: 16-bit numbers widened exactly."""
    if tensor is None:
        return None
    real = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(real).cpu().numpy()


def oracle_logits(
    positive: Tensor,
    negative: Tensor,
    anchor: Tensor | None,
    alpha: float | Tensor,
    plausibility: float | None,
) -> Tensor:
    """``contrastive_logits`` by the oracle."""
    p, n, a = (to_numpy(tensor) for tensor in (positive, negative, anchor))
    alphas = alpha.tolist() if isinstance(alpha, Tensor) else [alpha] * len(p)
    z = []
    for i, weight in enumerate(alphas):
        combined = oracle.combine(p[i], n[i], None if a is None else a[i], weight)
        z.append(oracle.masked(*combined, plausibility))
    return torch.tensor(np.stack(z), device=positive.device)


def oracle_sample(positive: Tensor, negative: Tensor | None = None, **options: Any) -> list:
    """``contrastive_sample`` by the oracle; ``*_rows`` and options as the operator takes them."""
    maps = tuple(options.pop(f"{name}_rows", None) for name in ("positive", "negative", "anchor"))
    given = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in options.items()
        if name != "anchor"
    }
    return oracle.sample_rows(
        to_numpy(positive),
        to_numpy(negative),
        anchor=to_numpy(options.get("anchor")),
        rows=tuple(None if m is None else m.tolist() for m in maps),
        **given,
    )


def assert_sampled(got: Any, truth: list, real: torch.dtype = torch.float32) -> None:
    """Token and support size are the oracle's; logp is within the budget of eager."""
    near = [i for i, row in enumerate(truth) if row.margin <= NUCLEUS]
    assert not near, f"the nucleus of rows {near} ends on a rounding error: choose other rows"
    token, logp, kept = got
    assert (token.dtype, logp.dtype, kept.dtype) == (torch.int64, real, torch.int64)
    assert token.tolist() == [row.token for row in truth]
    assert kept.tolist() == [row.kept for row in truth]
    good = [i for i, row in enumerate(truth) if row.shifted is not None]
    special = [i for i in range(len(truth)) if i not in good]
    expected = torch.tensor([row.logp for row in truth], dtype=torch.float64)
    torch.testing.assert_close(
        logp.cpu().double()[special], expected[special], rtol=0, atol=0, equal_nan=True
    )
    if not good:
        return
    shifted = torch.tensor(np.stack([truth[i].shifted for i in good]))
    chosen = torch.tensor([truth[i].token for i in good])[:, None]
    eager = torch.log_softmax(shifted, -1).gather(1, chosen)[:, 0]
    largest = shifted.gather(1, chosen).abs().max() + math.log(shifted.shape[1]) + 1.0
    ours = logp.cpu()[good]
    assert ours.max() <= 0
    assert_within_budget(ours, eager, expected[good], name="logp", scale=float(largest))


def check_sample(
    case: Any, positive: Tensor, negative: Tensor | None = None, **options: Any
) -> Any:
    """``contrastive_sample`` of ``case`` agrees with the oracle; returns what it gave."""
    options.setdefault("alpha", 0.0)
    got = trimtab.contrastive_sample(positive, negative, **options, impl=case.impl)
    real = torch.float64 if positive.dtype == torch.float64 else torch.float32
    assert_sampled(got, oracle_sample(positive, negative, **options), real)
    return got


def hf_support(
    scores: Tensor,  # (V,) float32
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> set[int]:
    """What Hugging Face's warpers leave of a row, with a sort that keeps the order of equals."""
    from transformers.generation import logits_process as hf

    warpers = [
        hf.TemperatureLogitsWarper(float(temperature)),
        *([hf.TopKLogitsWarper(top_k)] if top_k else []),
        *([hf.TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else []),
        *([hf.MinPLogitsWarper(min_p)] if min_p else []),
    ]
    scores = scores[None]
    with mock.patch.object(torch, "sort", functools.partial(torch.sort, stable=True)):
        for warper in warpers:
            scores = warper(None, scores)
    return set(torch.nonzero(scores[0] > -math.inf)[:, 0].tolist())


def hf_margin(
    scores: Tensor,  # (V,) float32
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> float:
    """How far, in units of float32's rounding, a row is from where the warpers' own sums decide.

    Below 1 the warper's answer depends on how its float32 softmax and cumulative sum round.
    """
    s = (scores / temperature).double()
    if top_k:
        s = s.masked_fill(s < s.topk(min(top_k, len(s))).values[-1], -math.inf)
    ordered, order = torch.sort(s, stable=True)
    below = torch.softmax(ordered, 0).cumsum(0)
    distance = math.inf
    if top_p is not None and top_p < 1:
        inside = (ordered > -math.inf) & (torch.arange(len(s)) < len(s) - 1)
        # Each probability is off by 4 roundings, and each addition of the sum rounds once more.
        edge = (below - (1.0 - top_p)).abs()[inside] / (EPS * (len(s) + 4))
        distance = min([distance, *edge.tolist()])
        removed = (below <= 1.0 - top_p) & (torch.arange(len(s)) < len(s) - 1)
        s = s.masked_fill(torch.zeros_like(removed).scatter(0, order, removed), -math.inf)
    if min_p:
        log_ratio = (s - s.max())[(s < s.max()) & (s > -math.inf)]
        edge = (log_ratio - math.log(min_p)).abs() / (EPS * (8 + 2 * s[s > -math.inf].abs().max()))
        distance = min([distance, *edge.tolist()])
    return distance


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Of Pearson's chi-square; classes that are expected less than 5 times are put together."""
    counts, probs = counts.double(), probs.double()
    expected = probs * counts.sum()
    assert counts[probs == 0].sum() == 0, "a token was drawn that has no probability"
    counts, expected = counts[probs > 0], expected[probs > 0]
    small = expected < 5
    if small.any():
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2).double()
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(counts) > 1 else 1.0
