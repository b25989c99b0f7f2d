"""Section: Self-Contrastive Decoding. Does it take the overkill out of a safety prompt?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure as MatplotlibFigure

from trimtab.demo import section
from trimtab.demo.chat_model import ChatPlan, train_chat_model, train_tokenizer
from trimtab.demo.overkill import (
    PAPER_RATIO,
    Sweep,
    answer_all,
    verdict,
)
from trimtab.demo.questions import (
    ALARM,
    FRAMES,
    FRAMES_HELD_OUT,
    HARMFUL,
    KINDS,
    PEOPLE,
    PLAIN,
    SAFETY_PROMPT,
    SOUNDING,
    THINGS,
    held_out_questions,
    pairs,
    refusal_probability,
    teacher_margin,
    training_chats,
)
from trimtab.demo.section import Block, Context, Heading, Paragraph, Result, Section, Table

_OURS, _PROMPTED, _DROPPED, _TEACHER = "#c2571a", "#274b7a", "#4f8fbf", "0.5"
_LAST = 20  # steps that the final loss is a mean of
_SHOWN = {PLAIN: 1, SOUNDING: 3, HARMFUL: 2}  # questions whose answers are in the report


@dataclass(frozen=True)
class Settings:
    """Everything that sets the size of this section: fixed numbers, never the clock."""

    plan: ChatPlan
    models: int
    ratios: tuple[float, ...]
    every: int  # of the held-out questions, one in so many is asked


@dataclass(frozen=True)
class Training:
    """What came of the training."""

    parameters: int
    words: list[int]  # token ids of each model's tokenizer
    losses: list[float]  # of each model, mean of its last steps, nats per token of an answer


FULL = Settings(
    plan=ChatPlan(width=64, layers=2, heads=4, steps=450, batch=32, rate=5e-3, warmup=45),
    models=3,
    ratios=(0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0),
    every=1,
)
QUICK = Settings(
    plan=ChatPlan(width=64, layers=2, heads=4, steps=350, batch=16, rate=5e-3, warmup=35),
    models=1,
    ratios=(0.0, 1.0, 2.5),
    every=5,
)


def run(context: Context) -> Result:
    """Trains chat models that overdo it when told to be safe, and asks them under every ratio."""
    settings = QUICK if context.settings == section.QUICK else FULL
    sweep, training = measure(context, settings)
    with context.timed("Self-CD: figure"):
        blocks = [
            *_about_rates(context, sweep),
            *_about_training(settings, training),
            Heading("What the first model says"),
            transcripts(sweep, context.seed),
        ]
    sentences = verdict(sweep)
    return Result(
        sentences, summary_table(sweep), blocks, _numbers(settings, training, sweep, sentences)
    )


def measure(context: Context, settings: Settings) -> tuple[Sweep, Training]:
    """Trains the models, each on chats of its own, and puts the held-out questions to them."""
    plan = settings.plan
    models, tokenizers, losses = [], [], []
    with (
        context.timed("Self-CD: training"),
        context.bar(settings.models * plan.steps, "training to chat", "step") as bar,
    ):
        for index in range(settings.models):
            seed = context.seed * settings.models + index
            chats = training_chats(plan.steps * plan.batch, seed)
            found: list[float] = []

            def on_step(loss: float, found: list[float] = found) -> None:
                found.append(loss)
                bar.update()

            tokenizers.append(train_tokenizer(chats))
            models.append(train_chat_model(tokenizers[-1], chats, plan, seed, on_step))
            losses.append(float(np.mean(found[-_LAST:])))
    total = settings.models * (2 + len(settings.ratios))
    with context.timed("Self-CD: answers"), context.bar(total, "answering", "way") as bar:
        questions = held_out_questions()[:: settings.every]
        sweep = answer_all(models, tokenizers, questions, settings.ratios, bar.update)
    parameters = sum(p.numel() for p in models[0].parameters())
    return sweep, Training(parameters, [len(t) for t in tokenizers], losses)


def summary_table(sweep: Sweep) -> Table:
    """Refusals of every kind of question under every way to decode."""
    spread = len(sweep.without.answers) > 1
    harmless = sweep.of(PLAIN, SOUNDING)
    rows = [
        [
            outcome.name,
            *(_cell(outcome.rates(sweep.of(kind)), spread) for kind in KINDS),
            f"{100.0 * outcome.to_the_point[:, harmless].mean():.0f}",
        ]
        for outcome in sweep.outcomes
    ]
    counts = ", ".join(f"{sweep.of(kind).sum()} {kind}" for kind in KINDS)
    return Table(
        f"Refused, in % of the held-out questions ({counts}): mean of {len(sweep.without.answers)} "
        "models" + (" (lowest to highest). " if spread else ". ") + "Plain and harmful-sounding "
        "questions are harmless. Answered: % of the harmless questions that get the answer that "
        "belongs to them, neither a refusal nor a muddle.",
        ["decoding", *KINDS, "answered"],
        rows,
    )


def draw_sweep(sweep: Sweep) -> MatplotlibFigure:
    """Refusal rate over the ratio, one panel per kind of question."""
    figure = MatplotlibFigure(figsize=(9.6, 3.5), layout="constrained")
    axes = figure.subplots(1, len(KINDS), sharey=True)
    ratios = list(sweep.contrast)
    fine = np.linspace(ratios[0], ratios[-1], 161)
    for axis, kind in zip(axes, KINDS, strict=True):
        chosen = sweep.of(kind)
        rates = 100.0 * np.array([o.rates(chosen) for o in sweep.contrast.values()])  # (R, M)
        axis.plot(fine, 100.0 * teacher_rates(sweep, kind, fine), color=_TEACHER, linewidth=1.0,
                  linestyle=":", label="exact copy of the teacher")  # fmt: skip
        for outcome, colour, style in (
            (sweep.prompted, _PROMPTED, "--"),
            (sweep.without, _DROPPED, "-."),
        ):
            axis.axhline(100.0 * outcome.rate(chosen), color=colour, linestyle=style,
                         linewidth=1.3, label=outcome.name)  # fmt: skip
        if rates.shape[1] > 1:
            axis.fill_between(ratios, rates.min(1), rates.max(1), color=_OURS, alpha=0.18,
                              linewidth=0, label="lowest to highest model")  # fmt: skip
        axis.plot(ratios, rates.mean(1), color=_OURS, marker="o", markersize=4, label="Self-CD")
        axis.axvline(PAPER_RATIO, color="0.85", linewidth=0.8, zorder=0)
        axis.set(xlabel="ratio of Self-CD", ylim=(-4.0, 104.0))
        axis.set_title(f"{kind} ({chosen.sum()} questions)", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("refused, %")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def teacher_rates(sweep: Sweep, kind: str, ratios: np.ndarray) -> np.ndarray:  # (R,) -> (R,)
    """Share that greedy Self-CD would refuse if the model were exactly the teacher."""
    verbs = [question.verb for question in sweep.questions if question.kind == kind]
    return np.array(
        [np.mean([teacher_margin(kind, verb, r) > 0 for verb in verbs]) for r in ratios.tolist()]
    )


def transcripts(sweep: Sweep, seed: int) -> Table:
    """What the first model says to a few questions drawn by chance."""
    generator = np.random.default_rng(seed)
    ways = (sweep.without, sweep.prompted, sweep.contrast[PAPER_RATIO])
    rows = []
    for kind, count in _SHOWN.items():
        places = np.flatnonzero(sweep.of(kind))
        for place in sorted(generator.choice(places, size=count, replace=False).tolist()):
            text = sweep.questions[place].text
            for first, way in enumerate(ways):
                labels = ["", ""] if first else [kind, text]
                rows.append([*labels, way.name, way.answers[0][place]])
    return Table(
        "Drawn by chance among the held-out questions, not picked.",
        ["kind", "question", "decoding", "answer"],
        rows,
        labels=4,
    )


def by_verb(sweep: Sweep) -> Table:
    """Refusals verb by verb, the one that sounds most like harm first."""
    ways = (sweep.without, sweep.prompted, sweep.contrast[PAPER_RATIO])
    header = [
        f"{kind}, {way}"
        for kind in ("sounding", "harmful")
        for way in ("without", "with", "Self-CD")
    ]
    rows = []
    for verb, alarm in ALARM.items():
        cells = []
        for kind in (SOUNDING, HARMFUL):
            chosen = sweep.of(kind) & np.array([q.verb == verb for q in sweep.questions])
            cells += [f"{100.0 * w.rate(chosen):.0f}" if chosen.any() else "–" for w in ways]
        rows.append([verb, f"{alarm:.2f}", *cells])
    return Table(
        f"Refused, in %, by the question's verb; Self-CD at ratio {PAPER_RATIO:g}. Alarm: how much "
        "like harm the verb sounds to the teacher.",
        ["verb", "alarm", *header],
        rows,
    )


def _about_rates(context: Context, sweep: Sweep) -> list[Block]:
    caption = (
        "Refusals over the ratio of Self-CD. At ratio 0 it is plain decoding with the safety "
        "prompt, at 1 without it, and above 1 it moves on in the same direction; the paper "
        f"recommends {PAPER_RATIO:g} (grey line). Good is low in the first two panels and high in "
        "the third. Dotted: what was built into the data, see below."
    )
    return [context.save(draw_sweep(sweep), "self_contrastive", caption), by_verb(sweep)]


def _about_training(settings: Settings, training: Training) -> list[Block]:
    plan = settings.plan
    models = "one model" if settings.models == 1 else f"{settings.models} models"
    losses = ", ".join(f"{loss:.3f}" for loss in training.losses)
    held_out = [thing for domain in (*THINGS, PEOPLE) for thing in domain.held_out]
    return [
        Heading("What was built in, and what was not"),
        Paragraph(
            "A small grammar makes questions of three kinds: plain ones; harmless ones with a verb "
            "that sounds like harm (to kill a background process), as in the paper's OKTest; and "
            "harmful ones, the same verbs turned on people. A teacher answers or refuses them by "
            "chance, with the probabilities in the table. So the overkill is in the data on "
            f"purpose. The safety prompt is: “{SAFETY_PROMPT}” Without it there is no system "
            "message."
        ),
        _built_in(),
        Paragraph(
            f"Trained were {models}, Llamas of {training.parameters:,} parameters in "
            f"{plan.layers} layers, {plan.steps} steps of {plan.batch} chats each, each on chats "
            f"of its own; final loss {losses} nats per token. Asked are only wordings that none "
            f"was trained on ({len(FRAMES_HELD_OUT)} of "
            f"{len(FRAMES) + len(FRAMES_HELD_OUT)}), of pairs of verb and object that none was "
            f"trained on: the {len(held_out)} objects in question ({', '.join(held_out)}) stand in "
            "training with calm verbs only. What a background process is, and that killing one "
            "is like killing an idle thread, a model has to make out by itself."
        ),
        Paragraph(
            "No model ever saw Self-CD. What greedy Self-CD would do to an exact copy of the "
            "teacher follows from two probabilities of a refusal, p with the prompt and q without: "
            "it refuses while (1 - ratio) logit p + ratio logit q > 0. So a harmful question stays "
            "refused at a large ratio only if the model refuses it about as firmly without the "
            "prompt. In these data that is so for verbs that sound much like harm, and not for "
            "mild ones. Refusals are judged by keywords. Differences are called clear if they "
            "show in 95 of 100 resamplings of the models and of the pairs of verb and object."
        ),
    ]


def _built_in() -> Table:
    rows = []
    for kind in KINDS:
        verbs = {verb for verb, _, _ in pairs(kind, held_out=True)}
        both = (
            [refusal_probability(kind, verb, with_prompt) for verb in verbs]
            for with_prompt in (False, True)
        )
        rows.append([kind, *(_range(found) for found in both)])
    return Table(
        "How often the teacher of the training data refuses, in %; by the verb where two numbers "
        "stand.",
        ["question", "without the prompt", "with the prompt"],
        rows,
    )


def _range(shares: list[float]) -> str:
    low, high = (f"{100.0 * share:.0f}" for share in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def _cell(rates: list[float], spread: bool) -> str:
    text = f"{100.0 * np.mean(rates):.0f}"
    return f"{text} ({100.0 * min(rates):.0f}–{100.0 * max(rates):.0f})" if spread else text


def _numbers(
    settings: Settings, training: Training, sweep: Sweep, sentences: list[str]
) -> dict[str, Any]:
    harmless = sweep.of(PLAIN, SOUNDING)
    return {
        "verdict": sentences,
        "settings": vars(settings) | {"plan": vars(settings.plan)},
        "training": vars(training),
        "questions": {kind: int(sweep.of(kind).sum()) for kind in KINDS},
        "refused": {
            outcome.name: {kind: outcome.rates(sweep.of(kind)) for kind in KINDS}
            for outcome in sweep.outcomes
        },
        "answered": {
            outcome.name: outcome.to_the_point[:, harmless].mean(1).tolist()
            for outcome in sweep.outcomes
        },
        "exact_copy_refuses": {
            f"{ratio:g}": {
                kind: float(teacher_rates(sweep, kind, np.array([ratio]))[0]) for kind in KINDS
            }
            for ratio in sweep.contrast
        },
        "refuses_less": {
            f"{outcome.name} against {other.name}": {
                kind: sweep.confidence(outcome, other, kind) for kind in KINDS
            }
            for outcome in sweep.contrast.values()
            for other in (sweep.without, sweep.prompted)
        },
        "same_as_plain_decoding": {
            "ratio 0 with the prompt": sweep.same_prompted,
            "ratio 1 without it": sweep.same_without,
            "answers": sweep.prompted.refused.size,
        },
    }


SECTION = Section("self_contrastive", "Self-CD: a safety prompt without its overkill", run)
