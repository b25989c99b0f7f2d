"""Sentences on the steering of a policy, made from the numbers, whichever way they went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from trimtab.demo.steering import Course, Measured, steps_to

_WAY = 0.8  # of the way from the start policy's score to that of pi*, to be called there
# Student's t, two sides, 95 %, by degrees of freedom.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
_DEGENERATE = 0.7  # share of the start policy's different words; with fewer a text repeats itself


@dataclass(frozen=True)
class Outcome:
    """One method over all seeds."""

    name: str
    finals: list[Measured]
    responses: list[int | None]  # sampled until the score was `_WAY` there; None: never

    @property
    def score(self) -> float:
        """Mean final score."""
        return fmean(final.score for final in self.finals)

    @property
    def median_responses(self) -> float:
        """Median over the seeds, infinite where most never came there."""
        return median(math.inf if n is None else n for n in self.responses)

    def shown(self, name: str, digits: int, factor: float = 1.0) -> str:
        """Mean of a measure and its standard deviation over the seeds."""
        return spread([factor * getattr(final, name) for final in self.finals], digits)


def outcomes(
    courses: Sequence[Course], start: Measured, optimum: Measured, batch: int
) -> dict[str, Outcome]:
    """The courses by method, in their order."""
    target = start.score + _WAY * (optimum.score - start.score)
    found: dict[str, Outcome] = {}
    for course in courses:
        step = steps_to(course.points, target) if optimum.score > start.score else None
        outcome = found.setdefault(course.method, Outcome(course.method, [], []))
        outcome.finals.append(course.points[-1])
        outcome.responses.append(None if step is None else step * batch)
    return found


def answer(
    ours: Outcome,
    others: Mapping[str, Outcome],
    start: Measured,
    optimum: Measured,
    responses: int,
) -> str:
    """What the method on trial reaches, the others beside it.

    Args:
        ours: its outcome.
        others: outcomes of other methods, their names in words.
        start: the start policy on the same prompts.
        optimum: pi* on the same prompts.
        responses: sampled in training.
    """
    figures = (
        f"{percent(start.score)} of the words were about files in the answers of the start policy "
        f"to held-out prompts, {ours.shown('score', 1, 100.0)} % are after {responses} sampled "
        f"responses, at a KL of {ours.shown('kl', 2)} nats per token to the start policy; pi* "
        f"itself has {percent(optimum.score)}."
    )
    if optimum.score <= start.score:
        return f"This run has nothing to steer to, for pi* does not follow the principle: {figures}"
    gain = compare([final.score for final in ours.finals], [start.score])
    if gain == "lower":
        return f"Inverse-Q* steers the policy away from the principle: {figures}"
    if gain == "unclear":
        return f"This run does not show that Inverse-Q* steers the policy: {figures}"
    beside = " and ".join(_beside(ours, other, name) for name, other in others.items())
    return f"Inverse-Q* steers the policy without preference data, {beside}: {figures}"


def _beside(ours: Outcome, other: Outcome, name: str) -> str:
    result = _score(ours, other)
    if result == "higher":
        return f"further than {name}"
    if result == "lower":
        return f"less far than {name}"
    early, late = ([math.inf if n is None else n for n in o.responses] for o in (ours, other))
    if max(early) < min(late):
        return f"about as far as {name} but in fewer samples"
    if min(early) > max(late):
        return f"about as far as {name} but in more samples"
    return f"about as far as {name}"


def against(ours: Outcome, other: Outcome, words: str) -> str:
    """One sentence on where another method ends, one on how fast both came there.

    Args:
        ours: the method on trial.
        other: the other.
        words: the other one, as "The PPO-style baseline".
    """
    claim = {
        "higher": "Inverse-Q* ends higher",
        "lower": "Inverse-Q* ends lower",
        "unclear": "Inverse-Q* ends with no clear difference in score",
    }[_score(ours, other)]
    kl = compare(*([final.kl for final in outcome.finals] for outcome in (ours, other)))
    cost = {"higher": ", and at a higher KL", "lower": ", and at a lower KL", "unclear": ""}[kl]
    ends = (
        f"{words} ends at {other.shown('score', 1, 100.0)} % and a KL of {other.shown('kl', 2)}: "
        f"{claim}{cost}"
    )
    own, others = ours.median_responses, other.median_responses
    way = f"{_WAY:.0%} of the way from the start to pi*".replace("%", " %")
    if math.isinf(own) and math.isinf(others):
        return f"{ends}; neither gets {way}."
    if math.isinf(others):
        return f"{ends}; it never gets {way}, for which Inverse-Q* takes {own:.0f} responses."
    if math.isinf(own):
        return f"{ends}; it gets {way} in {others:.0f} responses, Inverse-Q* never does."
    if own == others:
        return f"{ends}; both get {way} in {own:.0f} responses (median)."
    return f"{ends}; it gets {way} in {others:.0f} responses (median), Inverse-Q* in {own:.0f}."


def beyond(clipped: Outcome, start: Measured, optimum: Measured) -> str:
    """What becomes of the policy when token rewards are taken as advantages of a policy gradient.

    Args:
        clipped: the outcome of that reading.
        start: the start policy.
        optimum: pi*.
    """
    kl = fmean(final.kl for final in clipped.finals)
    distinct = fmean(final.distinct for final in clipped.finals)
    figures = (
        f"{clipped.shown('score', 1, 100.0)} % at a KL of {clipped.shown('kl', 2)}, with "
        f"{percent(distinct)} different words in a response (start: {percent(start.distinct)})"
    )
    name = "The other reading, token rewards as advantages of a clipped update,"
    if kl > 2.0 * optimum.kl and distinct < _DEGENERATE * start.distinct:
        return f"{name} runs past pi* into repetition: {figures}."
    if kl > 2.0 * optimum.kl:
        return f"{name} runs past pi*: {figures}."
    return f"{name} has not run past pi* by the end: {figures}."


def _score(ours: Outcome, other: Outcome) -> str:
    return compare(*([final.score for final in outcome.finals] for outcome in (ours, other)))


def compare(ours: Sequence[float], other: Sequence[float]) -> str:
    """One of higher, lower, unclear: Student's test at 95 %; `other` may be one exact number."""
    difference = fmean(ours) - fmean(other)
    degrees = len(ours) + len(other) - 2 if len(other) > 1 else len(ours) - 1
    if len(ours) < 2:
        return "unclear"
    squares = sum(stdev(part) ** 2 * (len(part) - 1) for part in (ours, other) if len(part) > 1)
    inverse = 1.0 / len(ours) + (1.0 / len(other) if len(other) > 1 else 0.0)
    error = math.sqrt(squares / degrees * inverse)
    if abs(difference) <= _STUDENT[min(degrees, len(_STUDENT)) - 1] * error:
        return "unclear"
    return "higher" if difference > 0 else "lower"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def percent(share: float) -> str:
    """A share with one decimal."""
    return f"{100.0 * share:.1f} %"
