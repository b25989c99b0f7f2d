"""Sentences made from numbers: what the comparison says, whichever way it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

BY_SPLIT = ["held out", "law", "against", "better", "worse", "no clear difference"]
_SURE = 0.95


@dataclass(frozen=True)
class Duel:
    """One law against another, on one task under one split."""

    split: str
    task: str
    ours: float  # mean squared error on held-out models
    other: float
    confidence: float  # share of resamplings in which ours is lower

    @property
    def result(self) -> str:
        """One of better, worse, unclear."""
        if self.confidence >= _SURE:
            return "better"
        return "worse" if self.confidence <= 1.0 - _SURE else "unclear"


def verdict(ours: str, against: str, duels: Sequence[Duel]) -> str:
    """One sentence on one law against another, and one with the counts behind it.

    Args:
        ours: the law that is on trial, in words, as "Token salience".
        against: the other law in words, as "the mean loss".
        duels: every task under every split.
    """
    better, worse, unclear = (
        sum(duel.result == kind for duel in duels) for kind in ("better", "worse", "unclear")
    )
    if better > worse and 2 * better >= len(duels):
        claim = f"{ours} predicts held-out models better than {against}."
    elif better > worse:
        claim = (
            f"{ours} is ahead of {against} on held-out models, "
            "but most comparisons are too close to call."
        )
    elif worse > better and 2 * worse >= len(duels):
        claim = f"{ours} predicts held-out models worse than {against}."
    elif worse > better:
        claim = (
            f"{ours} is behind {against} on held-out models, "
            "though most comparisons are too close to call."
        )
    else:
        claim = f"This run shows no winner between {ours} and {against}."
    counts = (
        f"Of {len(duels)} comparisons (a task under a way of holding out) it is clearly better in "
        f"{better}, clearly worse in {worse}, and neither in {unclear}; {_in_the_middle(duels)}."
    )
    return f"{claim} {counts}"


def by_split(ours: str, against: str, duels: Sequence[Duel]) -> list[list[str]]:
    """Which tasks went which way: a row per way of holding out, under `BY_SPLIT`."""
    rows = []
    for split in dict.fromkeys(duel.split for duel in duels):
        cells = [split, ours, against]
        for kind in ("better", "worse", "unclear"):
            found = [duel.task for duel in duels if duel.split == split and duel.result == kind]
            cells.append(_listed(found) if found else "–")
        rows.append(cells)
    return rows


def overall(
    mean: Mapping[str, Sequence[Duel]],
    domain: Mapping[str, Sequence[Duel]],
    shares: Sequence[float],
) -> str:
    """What to make of all comparisons together.

    Args:
        mean: the variants of salience in words, each against the mean loss.
        domain: the same against the loss of the task's own half of the validation text.
        shares: of every task's weight, what lies on that half; uniform weights have a half there.
    """
    gaining = [name for name, duels in mean.items() if _lead(duels) > 0]
    if not gaining:
        return "So the result does not favour the salience vector: it does not beat the mean loss."
    ahead = [name for name in gaining if _lead(domain[name]) > 0]
    if ahead:
        return (
            f"So weighing tokens is worth more here than the mean loss ({_listed(ahead)}), and "
            "more than knowing which half of the validation text a task is about."
        )
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    range_of_shares = low if low == high else f"{low} to {high}"
    return (
        "So whoever knows which half of the validation text a task is about needs no salience "
        "vector here: all in all, its loss does as well or better. The free weights are not "
        f"told; {range_of_shares} % of them lie there, where uniform weights have 50 %."
    )


def _lead(duels: Sequence[Duel]) -> int:
    results = [duel.result for duel in duels]
    return results.count("better") - results.count("worse")


def _in_the_middle(duels: Sequence[Duel]) -> str:
    factor = median(duel.other / duel.ours if duel.ours > 0 else float("inf") for duel in duels)
    if factor >= 1.0:
        return f"its mean squared error is {factor:.2f} times lower in the median"
    return f"its mean squared error is {1.0 / factor:.2f} times higher in the median"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
