"""Sentences made from numbers: what the comparison says, whichever way it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

_SURE = 0.95


@dataclass(frozen=True)
class Duel:
    """Salience against one other law, on one task under one split."""

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


def verdict(against: str, duels: Sequence[Duel]) -> str:
    """One sentence on salience against another law, and one with the counts behind it.

    Args:
        against: the other law in words, as "the mean loss".
        duels: every task under every split.
    """
    better, worse, unclear = (
        sum(duel.result == kind for duel in duels) for kind in ("better", "worse", "unclear")
    )
    if better > worse and 2 * better >= len(duels):
        claim = f"Token salience predicts held-out models better than {against}."
    elif better > worse:
        claim = (
            f"Token salience is ahead of {against} on held-out models, "
            "but most comparisons are too close to call."
        )
    elif worse > better and 2 * worse >= len(duels):
        claim = f"Token salience predicts held-out models worse than {against}."
    elif worse > better:
        claim = (
            f"Token salience is behind {against} on held-out models, "
            "though most comparisons are too close to call."
        )
    else:
        claim = f"This run shows no winner between token salience and {against}."
    counts = (
        f"Of {len(duels)} comparisons (a task under a way of holding out) it is clearly better in "
        f"{better}, clearly worse in {worse}, and neither in {unclear}; {_in_the_middle(duels)}."
    )
    return f"{claim} {counts}"


def by_split(against: str, duels: Sequence[Duel]) -> list[str]:
    """For every way of holding out, which tasks went which way."""
    sentences = []
    for split in dict.fromkeys(duel.split for duel in duels):
        parts = []
        for kind in ("better", "worse", "unclear"):
            tasks = [duel.task for duel in duels if duel.split == split and duel.result == kind]
            if tasks:
                word = {"unclear": "no clear difference"}.get(kind, kind)
                parts.append(f"{word} on {_listed(tasks)}")
        sentences.append(f"On {split}, against {against}: {'; '.join(parts)}.")
    return sentences


def overall(mean: Sequence[Duel], domain: Sequence[Duel], shares: Sequence[float]) -> str:
    """What to make of the two comparisons together.

    Args:
        mean: salience against the mean loss.
        domain: salience against the loss of the task's own half of the validation text.
        shares: of every task's weight, what lies on that half; uniform weights have a half there.
    """
    if _lead(mean) <= 0:
        return "So the result does not favour the salience vector: it does not beat the mean loss."
    if _lead(domain) > 0:
        return (
            "So weighing tokens is worth more here than the mean loss, and more than knowing which "
            "half of the validation text a task is about."
        )
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    range_of_shares = low if low == high else f"{low} to {high}"
    return (
        "So whoever knows which half of the validation text a task is about needs no salience "
        "vector here: the loss of that half does as well or better. The vector is not told; it "
        f"has {range_of_shares} % of its weight there, where uniform weights have 50 %."
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
