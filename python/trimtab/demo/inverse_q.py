"""Section: Inverse-Q*. Can a policy learn what a principle in its context makes of it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from trimtab.algorithms.inverse_q import ClippedSurrogate, Imitation
from trimtab.demo import section
from trimtab.demo.models import Size
from trimtab.demo.principle import (
    FILES,
    NUMBERS,
    Learner,
    PolicyPlan,
    decode,
    held_out_prompts,
    train_policy,
    training_prompts,
)
from trimtab.demo.section import Block, Context, Heading, Paragraph, Result, Section, Table
from trimtab.demo.steering import Bench, Course, Measured, Method, Policy, SteeringPlan, numbers
from trimtab.demo.steering_verdict import Outcome, against, answer, beyond, outcomes, percent

OURS = Method("Inverse-Q*", Imitation(), contrast=True)
BASELINE = Method(
    "PPO-style baseline", ClippedSurrogate(advantage="sequence", normalize=True), contrast=True
)
DISTILLATION = Method("context distillation", Imitation(), contrast=False)
CLIPPED = Method(
    "Inverse-Q*, clipped", ClippedSurrogate(advantage="reward", normalize=True), contrast=True
)
METHODS = (OURS, BASELINE, DISTILLATION, CLIPPED)

FULL = SteeringPlan(
    policy=PolicyPlan(Size("policy", 64, 2, 4), window=64, prompt=16, labelled=0.05, steps=600,
                      batch=16),
    rho=2.0,
    response=32,
    batch=32,
    # Of 3e-4, 6e-4, 1e-3, 1.5e-3, 2e-3 the best for the baseline, and within noise for the squared
    # loss with and without contrast (two other seeds; mean KL to pi* over all measurements).
    rate=1e-3,
    measured_at=(1, 2, 4, 6, 8, 10, 12, 16, 20),
    prompts=64,
    last_prompts=256,
    seeds=3,
)  # fmt: skip
QUICK = SteeringPlan(
    policy=PolicyPlan(Size("policy", 32, 1, 2), window=40, prompt=8, labelled=0.1, steps=80,
                      batch=8, warmup=10),
    rho=2.0,
    response=16,
    batch=8,
    rate=1e-3,
    measured_at=(1, 2, 4),
    prompts=16,
    last_prompts=32,
    seeds=2,
)  # fmt: skip

_PER_TOKEN = ("reward", "kl", "gap", "entropy")
_SHORT = ("reward", "KL", "KL to pi*", "entropy")
_COLOURS = ("#c2571a", "#274b7a", "#6a9a4a", "#dd9a3c")
_MARKERS = ("o", "s", "D", "^")
_VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥"})
_SHOWN = 96  # characters of a response


class Reference(NamedTuple):
    """The start policy in one context, on the held-out prompts."""

    name: str
    measured: Measured
    texts: list[str]


def run(context: Context) -> Result:
    """Trains a policy that knows two principles, and steers it by one of them in four ways."""
    plan = QUICK if context.settings == section.QUICK else FULL
    learner = _train(context, plan)
    bench = Bench(
        learner.model,
        torch.tensor(learner.pools[FILES.name].principle),
        context.corpus,
        held_out_prompts(context.corpus, plan.policy, plan.last_prompts),
        plan,
        context.seed,
    )
    with context.timed("inverse-q: steering"):
        references = _references(bench, learner)
        courses = _steer(context, bench, learner)
    start, optimum = references[0].measured, references[-1].measured
    found = outcomes(courses, start, optimum, plan.batch)
    ours, baseline, distillation, clipped = (found[method.name] for method in METHODS)
    sentences = [
        answer(
            ours,
            {"plain context distillation": distillation, "the PPO-style baseline": baseline},
            start,
            optimum,
            plan.measured_at[-1] * plan.batch,
        ),
        against(ours, baseline, "The PPO-style baseline, with as many samples,"),
        against(ours, distillation, "Plain context distillation"),
        beyond(clipped, start, optimum),
    ]
    with context.timed("inverse-q: figures"):
        blocks = [
            *_about_start(learner, plan, references),
            *_about_steering(context, plan, courses, references),
            *_about_texts(bench, courses, references),
        ]
    return Result(
        sentences,
        _summary(found, references, plan),
        blocks,
        _numbers(learner, references, courses, found, sentences),
    )


def _train(context: Context, plan: SteeringPlan) -> Learner:
    corpus = context.corpus
    with (
        context.timed("inverse-q: start policy"),
        context.bar(plan.policy.steps, "training a policy", "step") as bar,
    ):
        return train_policy(corpus, plan.policy, context.seed, lambda loss: bar.update())


def _references(bench: Bench, learner: Learner) -> list[Reference]:
    """The start policy alone, with the other principle, with this one, and pi*."""
    other = torch.tensor(learner.pools[NUMBERS.name].principle)
    policies = {
        "start policy": Policy(bench.start),
        f"with “{NUMBERS.principle.strip()}” in the context": Policy(bench.start, other),
        f"with “{FILES.principle.strip()}” in the context": Policy(bench.start, bench.principle),
        f"pi*: the same with contrast, rho {bench.plan.rho:g}": bench.optimum,
    }
    return [Reference(name, *bench.measure(policy, last=True)) for name, policy in policies.items()]


def _steer(context: Context, bench: Bench, learner: Learner) -> list[Course]:
    plan = bench.plan
    prompts = training_prompts(learner, plan.policy)
    total = len(METHODS) * plan.seeds * plan.measured_at[-1]
    with context.bar(total, "steering", "step") as bar:
        first, _ = bench.measure(Policy(bench.start))
        courses = []
        for method in METHODS:
            bar.set_postfix_str(method.name)
            for seed in range(plan.seeds):
                chosen = 1000 * context.seed + seed
                courses.append(bench.steer(method, chosen, prompts, first, bar.update))
    return courses


def _summary(found: dict[str, Outcome], references: list[Reference], plan: SteeringPlan) -> Table:
    rows = [
        [
            reference.name,
            f"{100.0 * reference.measured.score:.1f}",
            *(f"{getattr(reference.measured, name):.2f}" for name in _PER_TOKEN),
            f"{100.0 * reference.measured.distinct:.1f}",
            "–",
        ]
        for reference in (references[0], references[2], references[3])
    ]
    for name, outcome in found.items():
        counts = ["never" if n is None else str(n) for n in outcome.responses]
        rows.append(
            [
                name,
                outcome.shown("score", 1, 100.0),
                *(outcome.shown(measure, 2) for measure in _PER_TOKEN),
                outcome.shown("distinct", 1, 100.0),
                ", ".join(counts),
            ]
        )
    return Table(
        f"Responses of {plan.response} tokens to {plan.last_prompts} held-out prompts after "
        f"{plan.measured_at[-1] * plan.batch} sampled responses, mean ± standard deviation over "
        f"{plan.seeds} seeds. Score: words about files. Reward: log pi* / pi_ref, for all methods "
        "that of the contrast. KL: to the start policy. Reward, KLs and entropy in nats per token. "
        "Different words: within a response. Responses to 80 %: sampled until the score had come "
        "so far on the way from the start policy's to that of pi*, seed by seed.",
        ["", "score, %", *_SHORT, "different words, %", "responses to 80 %"],
        rows,
    )


def _about_start(learner: Learner, plan: SteeringPlan, references: list[Reference]) -> list[Block]:
    policy = plan.policy
    plain, own = (learner.pools[name].share for name in ("plain", FILES.name))
    text = (
        f"The start policy is a Llama with {policy.size.layers} layers of width "
        f"{policy.size.width}, trained here for {policy.steps} steps of {policy.batch} windows "
        f"of {policy.window} tokens. What training puts in: half of the windows stand alone. A "
        f"quarter stands behind the words “{FILES.principle.strip()}”; they are drawn from the "
        f"{percent(policy.labelled)} of the windows with the most words such as file, path, "
        f"directory, folder: {percent(own)} of their words, against {percent(plain)} in all "
        f"windows. The last quarter stands behind “{NUMBERS.principle.strip()}”, chosen likewise "
        "by words such as number, int, float, digit. So that a sentence in front means its topic "
        "has been built in; that a policy can be moved there without the sentence, and by which "
        "method how far, has not. The score counts words, it does not know a model: the rewards "
        "are never told it."
    )
    rows = [
        [
            reference.name,
            *(f"{100.0 * getattr(reference.measured, name):.1f}" for name in ("score", "distinct")),
            *(f"{getattr(reference.measured, name):.2f}" for name in ("kl", "entropy")),
        ]
        for reference in references
    ]
    table = Table(
        "The start policy on held-out prompts, by what stands in front of the prompt.",
        ["", "score, %", "different words, %", "KL to the start policy", "entropy"],
        rows,
    )
    return [Heading("A policy that knows a principle"), Paragraph(text), table]


def _about_steering(
    context: Context, plan: SteeringPlan, courses: list[Course], references: list[Reference]
) -> list[Block]:
    methods = (
        f"All methods start from the same policy and sample {plan.batch} responses a step to the "
        "openings of training windows, without the principle in the context; one update of Adam "
        f"per step, the same learning rate ({plan.rate:g}). No preferences, no reward model, no "
        "critic. Inverse-Q* takes the start policy with the principle in its context, contrasted "
        f"with the one without (rho {plan.rho:g}), for the optimal policy pi*, reads the reward of "
        "every token off it, log pi* / pi_ref, and imitates it: squared difference of the "
        "log-probabilities. Context distillation is the same with rho 0, so without contrast. The "
        "PPO-style baseline is told the sum of the same rewards, once per response, minus the KL "
        "penalty; every token's advantage is that less the mean of the other responses. With one "
        "update per batch of responses its clip never acts. “Clipped” is another reading of "
        "Inverse-Q*, the token reward as the advantage of the same update, without KL penalty."
    )
    caveat = (
        "How the paper estimates pi* and which loss it minimises could not be had, only its "
        "abstract and a part of its introduction. Contrast, squared loss and the clipped variant "
        "are our reading; so is the baseline's set-up."
    )
    caption = (
        "Thin: single seeds; thick: their mean. Dotted: pi*, decoded with the principle in the "
        "context; dash-dotted: the policy with the principle, without contrast. Bottom right: "
        "what a score costs in KL."
    )
    figure = context.save(
        draw_courses(courses, references[2].measured, references[3].measured, plan.batch),
        "inverse_q_courses",
        caption,
    )
    return [Heading("Steering it"), Paragraph(methods), Paragraph(caveat), figure]


def _about_texts(
    bench: Bench, courses: Sequence[Course], references: list[Reference]
) -> list[Block]:
    """Responses to one prompt of prose and one of code, of the first seed."""
    seed = courses[0].seed
    columns = {references[0].name: references[0].texts, "pi*": references[3].texts}
    columns |= {course.method: course.texts for course in courses if course.seed == seed}
    prompts = decode(bench.corpus, bench.prompts)
    half = len(prompts) // 2
    blocks: list[Block] = [Heading("What it writes")]
    for index in (half // 2, half + half // 2):
        rows = [[name, one_line(texts[index])] for name, texts in columns.items()]
        caption = (
            f"Responses to the held-out prompt {one_line(prompts[index])!r}, taken from the middle "
            f"of the {'prose' if index < half else 'code'}, not chosen. ↵ is a line break."
        )
        blocks.append(Table(caption, ["", "response"], rows, labels=2))
    return blocks


def one_line(text: str) -> str:
    """A text on one line, spaces run together, cut where it gets long."""
    flat = " ".join(text.translate(_VISIBLE).split())
    return flat if len(flat) <= _SHOWN else flat[: _SHOWN - 1] + "…"


def draw_courses(
    courses: Sequence[Course], prompted: Measured, optimum: Measured, batch: int
) -> Figure:
    """Score, reward and KL over sampled responses, and score over KL."""
    figure = Figure(figsize=(10.0, 7.0), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for index, method in enumerate(dict.fromkeys(course.method for course in courses)):
        runs = [course.points for course in courses if course.method == method]
        style = {"color": _COLOURS[index % 4], "marker": _MARKERS[index % 4], "markersize": 4}
        steps = [batch * point.step for point in runs[0]]
        values = {
            name: torch.tensor([[getattr(point, name) for point in points] for points in runs])
            for name in ("score", "reward", "kl")
        }
        values["kl"][:, 0] = torch.nan  # 0 at the start, for which a log scale has no place
        for axis, name in zip(panels[:3], values, strict=True):
            for single in values[name]:
                axis.plot(steps, single.numpy(), color=style["color"], linewidth=0.6, alpha=0.5)
            axis.plot(steps, values[name].mean(0).numpy(), linewidth=1.8, label=method, **style)
        path = (values["kl"].mean(0)[1:].numpy(), values["score"].mean(0)[1:].numpy())
        panels[3].plot(*path, linewidth=1.8, **style)
    for axis, name in zip(panels[:3], ("score", "reward", "kl"), strict=True):
        axis.axhline(getattr(optimum, name), color="0.3", linewidth=0.9, linestyle=":")
        axis.axhline(getattr(prompted, name), color="0.3", linewidth=0.9, linestyle="-.")
    for point, marker in ((prompted, "P"), (optimum, "*")):
        panels[3].plot(
            point.kl, point.score, marker, color="black", fillstyle="none", markersize=13, zorder=9
        )
    _label(panels)
    panels[2].set_xlim(panels[0].get_xlim())
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False)  # fmt: skip
    return figure


def _label(panels: Sequence[Axes]) -> None:
    titles = (
        "Score: share of words about files",
        "Reward, nats per token",
        "KL to the start policy, nats per token",
        "Score over KL (star: pi*, plus: principle without contrast)",
    )
    for axis, title in zip(panels, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("sampled responses", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    # A policy that runs away takes a hundred times the KL of the others.
    panels[3].set_xscale("log")
    for axis in (panels[0], panels[2], panels[3]):
        axis.set_yscale("log")
    scales = [axis.yaxis for axis in (panels[0], panels[2], panels[3])]
    for scale in (*scales, panels[3].xaxis):
        scale.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        scale.set_major_formatter("{x:g}")
    panels[3].set_xlabel("KL to the start policy, nats per token", fontsize=9)


def _numbers(
    learner: Learner,
    references: Sequence[Reference],
    courses: Sequence[Course],
    found: dict[str, Outcome],
    sentences: list[str],
) -> dict[str, Any]:
    return {
        "verdict": sentences,
        "training_loss": learner.loss,
        "words_about_files_in_training": {
            name: learner.pools[name].share for name in ("plain", FILES.name)
        },
        "references": {r.name: asdict(r.measured) for r in references},
        "methods": {
            name: {
                "responses_to_80_percent": outcome.responses,
                "runs": [numbers(course) for course in courses if course.method == name],
            }
            for name, outcome in found.items()
        },
    }


SECTION = Section(
    "inverse-q", "Inverse-Q*: a policy steered by a principle, without preferences", run
)
