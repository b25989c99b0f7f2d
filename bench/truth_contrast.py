"""How results of the contrast family are judged: values and distributions in float64.

A sampler's token is random, so what is compared is the distribution behind it:

- a peer's filtered probabilities, which its probe hands over, in total variation per row;
- ours by the token itself, which must be the reference's bit for bit, by its log-probability and by
  the number of tokens kept;
- everybody's token by how far it is below the support, where the rounding of the rows' dtype is
  granted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trimtab
from cases_contrast import ALPHA, SAMPLED, SEED, Case, Filters, Inputs
from measure import Judge, Outputs
from trimtab.testing import BudgetError, error_budget, max_error

_REFERENCE_ROWS = 16
_BLOCK_BYTES = 256 * 2**20
# A sum over the vocabulary in float32 may be off by this much: who is in the nucleus is unclear
# where the cumulated probability is that close to its limit.
_UNCLEAR = 1e-5


class Scores(NamedTuple):
    """Contrasted logits before the filters."""

    z: Tensor  # (B, V)
    anchor: Tensor  # (B, V)
    terms: Tensor  # (B, V), the magnitudes that were added


class Draw(NamedTuple):
    """The exact distribution of a case's tokens."""

    scores: Scores
    s: Tensor  # (B, V) float64, after the temperature
    threshold: Tensor | None  # (B, 1), of the plausibility mask
    kept: Tensor  # (B, V) bool
    unclear: Tensor  # (B, V) bool: at the edge of the nucleus
    logp: Tensor  # (B, V) float64, -inf outside

    @property
    def unclear_mass(self) -> float:
        """Probability of a row's unclear tokens, relative to that of the kept ones."""
        if not bool(self.unclear.any()):
            return 0.0
        total = torch.logsumexp(self.s.masked_fill(~self.kept, -math.inf), -1, keepdim=True)
        mass = (self.s - total).exp().masked_fill(~self.unclear, 0.0).sum(-1)
        return float(mass.max())


def scores(case: Case, inputs: Inputs) -> Scores:
    """The contrast, every operation rounded once in the dtype of the results.

    With a head it is made in float64 throughout: there every contender has roundings of its own.
    """
    if inputs.head is not None:
        head = inputs.head.detach().double()
        p, n = (h.detach().double() @ head.T for h in (inputs.positive, inputs.negative))
        a = p
    else:
        real = torch.float64 if case.dtype == torch.float64 else torch.float32
        p, n = inputs.positive.detach().to(real), inputs.negative.detach().to(real)
        a = p if inputs.anchor is None else inputs.anchor.to(real)
    # Multiplied and added apart: `torch.add(..., alpha=)` may round once for both.
    z = a + ALPHA * (p - n)
    return Scores(z, a, a.abs() + ALPHA * (p.abs() + n.abs()))


def threshold(anchor: Tensor, plausibility: float) -> Tensor:  # (B, 1)
    """Where the plausibility mask begins."""
    log_beta = torch.tensor(math.log(plausibility), dtype=anchor.dtype, device=anchor.device)
    return anchor.amax(-1, keepdim=True) + log_beta


def exact_draw(case: Case, inputs: Inputs) -> Draw:
    """Support and probabilities, by sorting whole rows."""
    filters, made = case.about.filters, scores(case, inputs)
    z, cut = made.z, None
    if filters.plausibility is not None:
        cut = threshold(made.anchor, filters.plausibility)
        z = z.masked_fill(made.anchor < cut, -math.inf)
    if filters.temperature == 0.0:
        s = z.double()
        kept = torch.zeros_like(s, dtype=torch.bool).scatter_(1, s.argmax(-1, keepdim=True), True)
        unclear = torch.zeros_like(kept)
    else:
        tempered = z / torch.tensor(filters.temperature, dtype=z.dtype, device=z.device)
        kept, unclear = support(tempered, filters)
        s = tempered.double()
    logp = s.masked_fill(~kept, -math.inf).log_softmax(-1)
    return Draw(made, s, cut, kept, unclear, logp)


def support(s: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:  # each (B, V) bool
    """What top-k, top-p and min-p leave, and what is at the edge of the nucleus."""
    kept = s > -math.inf
    unclear = torch.zeros_like(kept)
    if filters.top_k is not None:
        kept &= s >= s.topk(min(filters.top_k, s.shape[-1])).values[:, -1:]
    if filters.top_p is not None:
        left = s.double().masked_fill(~kept, -math.inf)
        ordered, order = left.sort(dim=-1, stable=True)
        cumulated = ordered.softmax(-1).cumsum(-1)
        distance = cumulated - (1.0 - filters.top_p)
        gone = distance <= 0.0
        near = (distance.abs() <= _UNCLEAR) & (ordered > -math.inf)
        # Whoever ties with the edge may go instead: not everybody's sort is stable.
        edge = ordered.masked_fill(gone, math.inf).amin(-1, keepdim=True)
        near |= (ordered == edge) & gone.logical_and(ordered == edge).any(-1, keepdim=True)
        kept &= ~torch.zeros_like(kept).scatter_(1, order, gone)
        unclear.scatter_(1, order, near)
    if filters.min_p is not None:
        top = s.amax(-1, keepdim=True)
        kept &= s - top >= torch.tensor(math.log(filters.min_p), dtype=s.dtype, device=s.device)
    return kept, unclear


def judge_draw(case: Case, inputs: Inputs, draw: Draw) -> Judge:
    """``(results, eager's) -> errors``, which raises ``BudgetError`` if they are too large."""
    draws_ours = case.op == "contrastive_sample"
    expected = _reference_tokens(case, inputs) if draws_ours else None

    def judge(results: Outputs, eager: Outputs | None) -> dict[str, float]:
        token = results["token"].long()
        if token.shape != draw.s.shape[:1] or not bool(
            ((token >= 0) & (token < case.classes)).all()
        ):
            raise BudgetError(f"token: shape {tuple(token.shape)}, or outside of the vocabulary")
        short = _shortfall(case, draw, token)
        if case.about.filters.temperature == 0.0:
            if "kept" in results and not torch.equal(token, draw.s.argmax(-1)):
                raise BudgetError("token: not the first of the largest contrasted logits")
            return {"shortfall": short}
        if "probability" in results:
            probability = results["probability"].double()
            error = float((probability - draw.logp.exp()).abs().sum(-1).max()) / 2
            yardstick = error if eager is None else _variation(eager, draw)
            budget = 2 * yardstick + _rounding(case) + draw.unclear_mass
            if not error <= budget:
                raise BudgetError(f"distribution: off by {error:.2e}, budget {budget:.2e}")
            return {"probability": error}
        if "logp" not in results:
            return {}
        if expected is not None:
            _check_ours(results, draw, expected)
        true = draw.logp.gather(1, token[:, None]).squeeze(1)
        error = max_error(results["logp"].exp(), true.exp())
        budget = (0.0 if eager is None else 2 * _variation(eager, draw)) + _rounding(case)
        if not error <= budget + draw.unclear_mass:
            raise BudgetError(f"logp: probability off by {error:.2e}, budget {budget:.2e}")
        return {"probability": error}

    return judge


def _variation(results: Outputs, draw: Draw) -> float:
    return float((results["probability"].double() - draw.logp.exp()).abs().sum(-1).max()) / 2


def _rounding(case: Case) -> float:
    """One rounding of a log-probability, which may be as large as that of a uniform draw."""
    return torch.finfo(case.dtype).eps * math.log(case.classes)


def _shortfall(case: Case, draw: Draw, token: Tensor) -> float:
    """How far the tokens are below the support, in logits.

    Two roundings of what was added are granted, by whoever works in the rows' dtype, and with them
    log-normalisers of the size of log V, by whoever contrasts log-probabilities.
    """
    index = token[:, None]
    low = draw.s.masked_fill(~(draw.kept | draw.unclear), math.inf).amin(-1, keepdim=True)
    temperature = case.about.filters.temperature or 1.0
    short = low - draw.scores.z.gather(1, index).double() / temperature
    if draw.threshold is not None:
        missing = draw.threshold - draw.scores.anchor.gather(1, index)
        short = torch.maximum(short, missing.double())
    terms = draw.scores.terms.gather(1, index).double() + (1 + 2 * ALPHA) * math.log(case.classes)
    granted = 2 * torch.finfo(case.dtype).eps * terms / min(temperature, 1.0)
    if not bool((short <= granted).all()):
        worst = float((short - granted).max())
        raise BudgetError(f"token: {worst:.2e} further below the support than rounding explains")
    return float(short.clamp_min(0.0).max())


def _check_ours(results: Outputs, draw: Draw, expected: tuple[Tensor, Tensor]) -> None:
    """Token, support and log-probability of an implementation of ours."""
    token, (rows, due) = results["token"], expected
    if not torch.equal(token[rows], due):
        wrong = rows[token[rows] != due].tolist()
        raise BudgetError(f"token: not the reference's in rows {wrong[:8]}")
    difference = (results["kept"] - draw.kept.sum(-1)).abs()
    if not bool((difference <= draw.unclear.sum(-1)).all()):
        raise BudgetError(f"kept: off by {int(difference.max())}")
    index = token[:, None]
    true = draw.logp.gather(1, index).squeeze(1)
    eager = draw.s.float().masked_fill(~draw.kept, -math.inf).log_softmax(-1)
    scale = float(draw.logp.amax()) - float(draw.logp.masked_fill(~draw.kept, 0.0).amin())
    budget = error_budget(eager.gather(1, index).squeeze(1), true, torch.float32, scale)
    error = max_error(results["logp"], true)
    if not error <= budget + draw.unclear_mass:
        raise BudgetError(f"logp: error {error:.2e} is over the budget {budget:.2e}")


def _reference_tokens(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:  # each (some rows,)
    """Rows, and what the reference draws for them; it is slow, and rows don't see each other."""
    rows = _spread(case.rows, case.device, _REFERENCE_ROWS)
    p, n, a = (None if t is None else t[rows] for t in inputs[:3])
    drawn = trimtab.contrastive_sample(
        p, n, anchor=a, alpha=ALPHA, **sampling_arguments(case.about.filters), impl="reference"
    )
    return rows, drawn.token


def sampling_arguments(filters: Filters) -> dict[str, Any]:
    """The filters as keyword arguments of trimtab's samplers."""
    return {**filters._asdict(), "seed": SEED, "position": 1}


# Values and gradients


def sample(case: Case, inputs: Inputs, outputs: Outputs) -> Outputs:
    """The part of a contender's outputs that is compared."""
    if case.about.draws:
        return outputs
    picked = dict(outputs)
    for name in ("grad_positive", "grad_negative"):
        if name in picked:
            picked[name] = picked[name][_spread(case.rows, case.device)]
    if "grad_head" in picked:
        picked["grad_head"] = picked["grad_head"][_spread(case.classes, case.device)]
    return picked


def truth(case: Case, inputs: Inputs) -> Outputs:
    """What ``sample`` should hold, in float64; nothing for samplers."""
    if case.about.draws:
        return {}
    if case.op == "contrastive_logits":
        made = scores(case, inputs)
        cut = threshold(made.anchor, case.about.filters.plausibility or 1.0)
        exact = inputs.positive.double() + ALPHA * (
            inputs.positive.double() - inputs.negative.double()
        )
        return {"logits": exact.masked_fill(made.anchor < cut, -math.inf)}
    p, n = inputs.positive.detach(), inputs.negative.detach()
    parts: list[tuple[Tensor, Tensor]] = []
    for z, target in zip(
        _exact_blocks(inputs, p, n), _blocks(inputs.target, case.classes), strict=True
    ):
        parts.append((z.logsumexp(-1), z.gather(1, target[:, None]).squeeze(1)))
    lse, chosen = (torch.cat(part) for part in zip(*parts, strict=True))
    results = {"logp": chosen - lse}
    if not case.about.backward:
        return results
    rows = _spread(case.rows, case.device)
    z = next(_exact_blocks(inputs, p[rows], n[rows], whole=True))
    grad = -(z - lse[rows, None]).exp()
    grad.scatter_add_(1, inputs.target[rows, None], grad.new_ones(len(rows), 1))
    grad *= inputs.upstream[rows, None].double()
    if inputs.head is not None:
        head = inputs.head.detach().double()
        classes = _spread(case.classes, case.device)
        hidden = p.double() + ALPHA * (p.double() - n.double())
        share = -(hidden @ head[classes].T - lse[:, None]).exp()
        share += (inputs.target[:, None] == classes).double()
        results["grad_head"] = (share * inputs.upstream[:, None].double()).T @ hidden
        grad = grad @ head
    return results | {"grad_positive": (1 + ALPHA) * grad, "grad_negative": -ALPHA * grad}


def _exact_blocks(
    inputs: Inputs, positive: Tensor, negative: Tensor, whole: bool = False
) -> Iterator[Tensor]:
    """Contrasted logits in float64, a few rows at a time."""
    classes = positive.shape[1] if inputs.head is None else inputs.head.shape[0]
    head = None if inputs.head is None else inputs.head.detach().double()
    pairs = [(positive, negative)]
    if not whole:
        pairs = list(zip(_blocks(positive, classes), _blocks(negative, classes), strict=True))
    for p, n in pairs:
        combined = p.double() + ALPHA * (p.double() - n.double())
        yield combined if head is None else combined @ head.T


def _blocks(tensor: Tensor, classes: int) -> tuple[Tensor, ...]:
    return tensor.split(max(1, _BLOCK_BYTES // (8 * classes)))


def _spread(count: int, device: str, most: int = SAMPLED) -> Tensor:
    """At most so many indices from the first to the last: every chunk has some."""
    return torch.linspace(0, count - 1, min(most, count), device=device).round().long()
