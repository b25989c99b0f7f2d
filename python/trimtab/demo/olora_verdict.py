"""Sentences on continual learning, made from the numbers, whichever way they went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from trimtab.demo.continual import LabelTask
from trimtab.demo.continual_training import INCREMENTAL, JOINT, ORTHOGONAL, SEQUENTIAL, Course
from trimtab.demo.steering_verdict import compare, spread


@dataclass(frozen=True)
class Outcome:
    """One method with one lamda_1, over all seeds; shares are in percent, as shown."""

    method: str
    lamda: float
    courses: list[Course]

    @property
    def name(self) -> str:
        """As in tables."""
        return f"{self.method}, lamda_1 {self.lamda:g}" if self.lamda > 0.0 else self.method

    @property
    def average(self) -> list[float]:
        """Accuracy after the last task, mean over the tasks, by seed."""
        return [100.0 * course.average for course in self.courses]

    @property
    def forgetting(self) -> list[float]:
        """Points lost on a task since its best, mean over all tasks but the last, by seed."""
        return [100.0 * course.forgetting for course in self.courses]

    @property
    def learnt(self) -> list[float]:
        """Accuracy on a task right after training on it, mean over the tasks, by seed."""
        return [100.0 * course.learnt.mean().item() for course in self.courses]

    @property
    def choice(self) -> list[float]:
        """Accuracy at the end on the windows kept apart for choices, by seed."""
        return [100.0 * course.choice for course in self.courses]

    @property
    def overlap(self) -> list[float]:
        """Mean overlap of two tasks' subspaces, by seed; empty where all share one adapter."""
        return [course.shared for course in self.courses if course.overlap is not None]

    def final(self, task: int) -> list[float]:
        """Accuracy on one task after the last one, by seed."""
        return [100.0 * course.final[task].item() for course in self.courses]


def outcomes(courses: Sequence[Course]) -> list[Outcome]:
    """The courses by method and lamda_1, in their order."""
    found: dict[tuple[str, float], Outcome] = {}
    for course in courses:
        key = course.method, course.lamda
        found.setdefault(key, Outcome(*key, [])).courses.append(course)
    return list(found.values())


def chosen(found: Sequence[Outcome]) -> Outcome:
    """The O-LoRA whose lamda_1 is best on the windows kept apart; of equals the smallest."""
    return max((o for o in found if o.method == ORTHOGONAL), key=lambda o: fmean(o.choice))


def verdict(
    ours: Outcome, found: Sequence[Outcome], tasks: Sequence[LabelTask], chance: float
) -> list[str]:
    """All sentences; no comparison where the tasks are not learnt.

    Args:
        ours: O-LoRA with the chosen lamda_1.
        found: all outcomes.
        tasks: in their order.
        chance: overlap of random subspaces.
    """
    one = {outcome.method: outcome for outcome in found}
    plain, other, joint = one[INCREMENTAL], one[SEQUENTIAL], one[JOINT]
    guessing = 100.0 * fmean(task.chance for task in tasks)
    last = scale(ours, found, chance)
    if compare(joint.average, [guessing]) != "higher" or fmean(joint.average) < 1.2 * guessing:
        return [
            "This run says nothing about O-LoRA, for the tasks are not learnt: training on all of "
            f"them at once reaches {spread(joint.average, 1)} %, guessing among a task's answers "
            f"{guessing:.1f} %.",
            last,
        ]
    return [
        answer(ours, plain, guessing),
        forgetting(ours, plain),
        by_task(ours, plain, tasks),
        sequential(ours, other),
        ceiling(ours, plain, joint),
        last,
    ]


def answer(ours: Outcome, plain: Outcome, guessing: float) -> str:
    """Whether the penalty helps, in one sentence.

    Args:
        ours: O-LoRA.
        plain: incremental LoRA, the same without the penalty.
        guessing: accuracy in percent of guessing among a task's answers.
    """
    figures = (
        f"after the last task, accuracy averages {spread(ours.average, 1)} % with the penalty and "
        f"{spread(plain.average, 1)} % without it; guessing among a task's answers gives "
        f"{guessing:.1f} %"
    )
    result = _paired(ours.average, plain.average)
    gained = spread(_differences(ours.average, plain.average), 1)
    if result == "higher":
        return f"O-LoRA helps here, by {gained} points over incremental LoRA: {figures}."
    if result == "lower":
        lost = spread(_differences(plain.average, ours.average), 1)
        return f"O-LoRA does worse than incremental LoRA here, by {lost} points: {figures}."
    return (
        "This run shows no clear difference between O-LoRA and incremental LoRA "
        f"({gained} points): {figures}."
    )


def by_task(ours: Outcome, plain: Outcome, tasks: Sequence[LabelTask]) -> str:
    """On which tasks the penalty helps at the end, and on which it does not."""
    groups: dict[str, list[str]] = {"higher": [], "lower": [], "unclear": []}
    for index, task in enumerate(tasks):
        pair = ours.final(index), plain.final(index)
        shown = f"{task.name} ({fmean(pair[0]):.0f} against {fmean(pair[1]):.0f} %)"
        groups[_paired(*pair)].append(shown)
    words = {
        "higher": "ends clearly higher on",
        "lower": "clearly lower on",
        "unclear": "with no clear difference on",
    }
    parts = [f"{words[key]} {listed(groups[key])}" for key in words]
    return f"Task by task, O-LoRA {', '.join(parts[:2])}, and {parts[2]}."


def forgetting(ours: Outcome, plain: Outcome) -> str:
    """What is lost of earlier tasks, and what the penalty costs in learning new ones."""
    less = {
        "lower": "O-LoRA forgets clearly less",
        "higher": "O-LoRA forgets clearly more",
        "unclear": "no clear difference",
    }[_paired(ours.forgetting, plain.forgetting)]
    cost = {
        "lower": "so the penalty costs something in learning",
        "higher": "so with the penalty it also learns more",
        "unclear": "so the penalty shows no clear cost in learning",
    }[_paired(ours.learnt, plain.learnt)]
    return (
        f"An earlier task has lost {spread(ours.forgetting, 1)} points by the end with O-LoRA, "
        f"{spread(plain.forgetting, 1)} with incremental LoRA: {less}. Right after training a "
        f"task stands at {spread(ours.learnt, 1)} and {spread(plain.learnt, 1)} %, {cost}."
    )


def sequential(ours: Outcome, other: Outcome) -> str:
    """O-LoRA beside one adapter that is trained on through all tasks."""
    words = {
        "higher": "clearly below O-LoRA",
        "lower": "clearly above O-LoRA",
        "unclear": "no clear difference to O-LoRA",
    }[_paired(ours.average, other.average)]
    return (
        f"One adapter trained on through all tasks (SeqLoRA) ends at {spread(other.average, 1)} %, "
        f"{words}, and has lost {spread(other.forgetting, 1)} points of an earlier task."
    )


def ceiling(ours: Outcome, plain: Outcome, joint: Outcome) -> str:
    """How far it stays from training on all tasks at once."""
    top, own, without = (fmean(outcome.average) for outcome in (joint, ours, plain))
    reached = f"Training on all tasks at once reaches {spread(joint.average, 1)} %"
    if _paired(ours.average, joint.average) != "lower":
        return f"{reached}; O-LoRA is not clearly below that."
    left = f"{reached}, {top - own:.1f} points more than O-LoRA"
    if without < own:
        share = (own - without) / (top - without)
        return (
            f"{left}: of what incremental LoRA lacks to that, the penalty makes up for "
            f"{100.0 * share:.0f} %."
        )
    return f"{left}: the penalty makes up for nothing of what incremental LoRA lacks to that."


def scale(ours: Outcome, found: Sequence[Outcome], chance: float) -> str:
    """What the sweep over lamda_1 shows.

    Args:
        ours: the chosen one.
        found: all outcomes.
        chance: overlap of random subspaces.
    """
    swept = [outcome for outcome in found if outcome.method == ORTHOGONAL]
    plain = next(outcome for outcome in found if outcome.overlap)
    best = max(swept, key=lambda outcome: fmean(outcome.average))
    without, shared = fmean(plain.overlap), [fmean(outcome.overlap) for outcome in swept]
    accuracy = [fmean(outcome.average) for outcome in swept]
    steps = listed([f"{value:.3f} at {o.lamda:g}" for value, o in zip(shared, swept, strict=True)])
    text = (
        f"lamda_1 {ours.lamda:g} was chosen out of {listed([f'{o.lamda:g}' for o in swept])} on "
        "windows apart from training and test. The overlap of two tasks' subspaces is "
        f"{without:.3f} without the penalty (random ones have {chance:.3f}) and {steps}; accuracy "
        f"lies between {min(accuracy):.1f} and {max(accuracy):.1f} %"
    )
    if best is ours:
        return f"{text}, on the test windows too the highest at {ours.lamda:g}."
    return f"{text}; on the test windows lamda_1 {best.lamda:g} would have been the best."


def listed(names: Sequence[str]) -> str:
    """Names as in a sentence."""
    if not names:
        return "none"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _paired(ours: Sequence[float], other: Sequence[float]) -> str:
    """One of higher, lower, unclear: Student's test at 95 % on the differences seed by seed."""
    return compare(_differences(ours, other), [0.0])


def _differences(ours: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, other, strict=True)]
