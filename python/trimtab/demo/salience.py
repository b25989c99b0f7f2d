"""Section: Capability Salience Vector. Which tokens' losses tell what a model can do?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import trimtab
from trimtab.algorithms.capability_salience import CapabilitySalience, row_token_ids
from trimtab.algorithms.capability_salience.plots import plot_predictions, plot_tokens, tokens_html
from trimtab.demo.corpus import DOMAINS, windows
from trimtab.demo.figures import draw_curves, draw_held_out, draw_token_kinds
from trimtab.demo.laws import (
    COMPUTE,
    DOMAIN,
    HEAD,
    LAWS,
    MEAN,
    SALIENCES,
    TABLE,
    Measurements,
    Outcome,
    compare,
    fit_mean_law,
    fit_salience,
    splits,
)
from trimtab.demo.section import (
    Block,
    Context,
    Heading,
    Paragraph,
    Result,
    Section,
    Snippet,
    Table,
)
from trimtab.demo.tasks import measure
from trimtab.demo.verdict import BY_SPLIT, Duel, by_split, overall, verdict

_LEAST_COUNT = 10  # times that a token id stands in the validation text, to be listed
_LISTED = 10
_FEATURES = 16  # principal components of the reader's states
_WORDS = {
    MEAN: "the mean loss",
    DOMAIN: "the loss of the task's own domain",
    TABLE: "token salience (table)",
    HEAD: "token salience (head)",
}
Duels = dict[str, dict[str, list[Duel]]]  # other law, then variant of salience in words


def run(context: Context) -> Result:
    """Measures the family, fits the laws, predicts what was held out, shows the salient tokens."""
    text = validation_text(context)
    data = measure_family(context, text)
    grid = context.settings.regularizations
    ways = splits(data.checkpoints, context.settings.plan)
    n_folds = sum(len(way.held) for way in ways)
    with (
        context.timed("salience: fits"),
        context.bar(n_folds + 1, "fitting", "fold") as bar,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        outcomes = [compare(data, way, grid, bar.update) for way in ways]
        everyone = torch.ones(len(data.checkpoints), dtype=torch.bool)
        final = fit_salience(TABLE, data, everyone, ways[0].folds, grid)
        bar.update()
    unfinished = sum("converged" in str(w.message) for w in caught)
    duels = {
        other: {
            _WORDS[ours]: _duels(outcomes, ours, other, data, context.seed) for ours in SALIENCES
        }
        for other in (MEAN, DOMAIN)
    }
    sentences = [
        verdict(ours.capitalize(), _WORDS[other], found)
        for other, pairs in duels.items()
        for ours, found in pairs.items()
    ]
    sentences.append(overall(duels[MEAN], duels[DOMAIN], own_shares(final, data)))
    with context.timed("salience: figures"):
        blocks = [
            *_about_models(context, data),
            *_about_predictions(context, data, outcomes, duels, unfinished),
            *_about_tokens(context, data, text, final),
        ]
    return Result(
        sentences,
        _summary_table(outcomes, data),
        blocks,
        _numbers(data, outcomes, duels, final, sentences) | {"unfinished_fits": unfinished},
    )


def validation_text(context: Context) -> Tensor:  # (S, T)
    """The fixed held-out text: as many windows of prose as of code, prose first."""
    settings = context.settings
    splits_of_text = context.corpus.splits["validation"]
    parts = [windows(splits_of_text[domain].ids, settings.plan.context) for domain in DOMAINS]
    n = min(settings.validation_windows, *map(len, parts))
    return torch.cat([torch.from_numpy(part[:n].copy()) for part in parts])


def measure_family(context: Context, text: Tensor) -> Measurements:
    """Loss of every validation token and accuracy on every task, for every checkpoint."""
    family, tasks = context.family, context.tasks
    nll, accuracy = [], []
    with (
        context.timed("salience: evaluation"),
        context.bar(len(family.checkpoints), "evaluating", "model") as bar,
    ):
        for checkpoint in family.checkpoints:
            model = family.model(checkpoint)
            nll.append(trimtab.token_nll(model, text, batch_size=32))
            accuracy.append(measure(model, tasks))
            bar.update()
    half = nll[0].numel() // 2
    own = {"prose": slice(0, half), "code": slice(half, None)}
    return Measurements(
        family.checkpoints,
        torch.stack(nll),
        torch.tensor(accuracy, dtype=torch.float64),
        [task.name for task in tasks],
        [task.chance for task in tasks],
        [own[task.domain] for task in tasks],
        token_features(context.reader, text),
    )


@torch.inference_mode()
def token_features(model: Any, text: Tensor) -> Tensor:  # (S, T) -> (N, F)
    """What the head knows of a token: leading principal components of the state it leaves."""
    parts = [model.model(input_ids=rows).last_hidden_state[:, 1:] for rows in text.split(32)]
    states = torch.cat(parts).flatten(0, 1).double()
    states -= states.mean(0)
    values, axes = torch.linalg.eigh(states.T @ states / len(states))
    kept = min(_FEATURES, len(values))
    return (states @ axes[:, -kept:] / values[-kept:].sqrt()).float()


def own_shares(fitted: CapabilitySalience, data: Measurements) -> list[float]:
    """Share of each task's weight that lies on the tokens of its own domain."""
    pairs = zip(fitted.salience, data.columns, strict=True)
    return [weight[columns].double().sum().item() for weight, columns in pairs]


def _duels(
    outcomes: list[Outcome], ours: str, other: str, data: Measurements, seed: int
) -> list[Duel]:
    found = []
    for outcome in outcomes:
        confidence = outcome.confidence(ours, other, data, seed).tolist()
        errors = (outcome.mse(law, data).tolist() for law in (ours, other))
        rows = zip(data.tasks, *errors, confidence, strict=True)
        found += [Duel(outcome.split, *row) for row in rows]
    return found


def _summary_table(outcomes: list[Outcome], data: Measurements) -> Table:
    laws = (MEAN, DOMAIN, *SALIENCES)
    short = ("mean", "own", "table", "head")
    return Table(
        "Accuracy of models that the fit has not seen, predicted by four laws that differ in what "
        "goes into the same sigmoid: the mean loss of the validation text (mean), the mean loss of "
        "the half of it that is like the task (own), and the salience-weighted loss, with a free "
        "weight per token (table) or with weights from a linear head on the states of a small "
        "model outside the family (head). R² and mean squared error (MSE) are over all held-out "
        "models of a row.",
        ["held out", "task", *(f"R² {s}" for s in short), *(f"MSE {s}" for s in short)],
        _scores(outcomes, data, laws),
        labels=2,
    )


def _scores(outcomes: list[Outcome], data: Measurements, laws: Sequence[str]) -> list[list[str]]:
    rows = []
    for outcome in outcomes:
        r2 = [outcome.r2(law, data).tolist() for law in laws]
        mse = [outcome.mse(law, data).tolist() for law in laws]
        for index, task in enumerate(data.tasks):
            cells = [f"{found[index]:.3f}" for found in r2]
            cells += [f"{found[index]:.5f}" for found in mse]
            rows.append([outcome.split, task, *cells])
    return rows


def _about_models(context: Context, data: Measurements) -> list[Block]:
    plan, corpus = context.settings.plan, context.corpus
    millions = (f"{n / 1e6:.1f} million of {d}" for d, n in corpus.n_characters.items())
    introduction = (
        f"Text: {corpus.n_files} files of the standard library; characters: "
        f"{' and '.join(millions)}. A BPE tokenizer with {corpus.vocabulary} token ids was trained "
        "on them. Models: "
        f"{len(plan.runs)} training runs ({len(plan.mixtures)} mixtures of prose and code x "
        f"{len(plan.sizes)} sizes of Llama), {len(plan.steps)} checkpoints each, trained with "
        "trimtab.linear_cross_entropy. Training, validation text and tasks use different files."
    )
    tasks = [
        [task.name, task.domain, task.question, str(len(task.items)), f"{task.chance:.2f}"]
        for task in context.tasks
    ]
    # The spread of a share over n questions, at its widest.
    noise = max(0.5 / math.sqrt(len(task.items)) for task in context.tasks)
    rows = []
    mean = {d: data.nll[:, c].mean(1) for d, c in _domain_columns(data).items()}
    for index, c in enumerate(data.checkpoints):
        if c.step == plan.steps[-1]:
            losses = [f"{mean[domain][index]:.2f}" for domain in DOMAINS]
            scores = [f"{a:.3f}" for a in data.accuracy[index].tolist()]
            row = [c.run.mixture.name, c.run.size.name, f"{c.parameters:,}", f"{c.tokens:,}"]
            rows.append([*row, *losses, *scores])
    header = ["mixture", "size", "parameters", "tokens", *(f"loss: {d}" for d in DOMAINS)]
    curves = draw_curves(data, plan)
    return [
        Heading("Models and tasks"),
        Paragraph(introduction),
        Table(
            "Tasks: multiple choice by likelihood on held-out text. A measured accuracy is within "
            f"about {noise:.3f} (one standard error) of what endless questions would give.",
            ["task", "domain", "question", "questions", "chance"],
            tasks,
            labels=3,
        ),
        Table(
            "The last checkpoint of every run: mean loss in nats per token, and accuracy.",
            [*header, *data.tasks],
            rows,
            labels=2,
        ),
        context.save(
            curves,
            "salience_mean_loss",
            "Accuracy over the mean loss of the whole validation text, one line per training run, "
            "one point per checkpoint (circles: the smallest size, diamonds: the largest). "
            "Where colours lie apart, models with the same mean loss differ in accuracy, and no "
            "law from mean loss can tell them apart.",
        ),
    ]


def _about_predictions(
    context: Context,
    data: Measurements,
    outcomes: list[Outcome],
    duels: Duels,
    unfinished: int,
) -> list[Block]:
    method = (
        "Models are held out by whole runs, by whole mixtures, or the largest size is predicted "
        "from the smaller ones. Nothing about held-out models enters a fit; the regularization is "
        "chosen by cross-validation among the models of the fit. Clearly better or worse means: in "
        "95 of 100 resamplings of the runs. Fits that stopped at the solver's step limit, those "
        f"inside cross-validation included: {unfinished}."
    )
    findings = [
        row
        for other, pairs in duels.items()
        for ours, found in pairs.items()
        for row in by_split(ours, _WORDS[other], found)
    ]
    larger = torch.zeros(len(data.checkpoints), dtype=torch.bool)
    larger[outcomes[-1].models] = True
    (vector,) = outcomes[-1].fitted[TABLE]
    by_size = plot_predictions(
        vector, data.nll, data.accuracy, held_out=larger,
        baseline=fit_mean_law(data, ~larger), names=data.tasks,
    )  # fmt: skip
    return [
        Heading("Predicting what was held out"),
        Paragraph(method),
        Table("Which tasks went which way.", BY_SPLIT, findings, labels=len(BY_SPLIT)),
        Table(
            "For comparison, the law from training FLOP alone, under the same protocol.",
            ["held out", "task", "R² compute", "MSE compute"],
            _scores(outcomes, data, (COMPUTE,)),
            labels=2,
        ),
        context.save(
            draw_held_out(data, outcomes),
            "salience_held_out",
            "Held-out accuracy, predicted against measured. Each point is a checkpoint whose whole "
            "run, mixture or size was left out of the fit.",
        ),
        context.save(
            by_size,
            "salience_larger",
            "The largest size predicted from the smaller ones, with a free weight per token.",
        ),
    ]


def _about_tokens(
    context: Context, data: Measurements, text: Tensor, final: CapabilitySalience
) -> list[Block]:
    pieces = context.corpus.pieces
    ids = row_token_ids(text)
    columns = _domain_columns(data)
    rows = []
    for index, task in enumerate(data.tasks):
        weight = final.salience[index].double()
        shares = [f"{100 * weight[columns[d]].sum().item():.0f}" for d in DOMAINS]
        effective = math.exp(math.log(len(weight)) - final.kl[index].item())
        regularization = final.regularization[index]
        rows.append([task, *shares, f"{effective:,.0f}", f"{regularization:g}"])
    table = Table(
        f"Where the weight of {len(ids):,} validation tokens lies. Effective tokens: N times "
        "exp(-KL to uniform weights); with uniform weights it is all of them.",
        ["task", *(f"on {d}, %" for d in DOMAINS), "effective tokens", "regularization"],
        rows,
    )
    blocks: list[Block] = [Heading("Which tokens count"), table]
    blocks.append(
        context.save(
            draw_token_kinds(token_kinds(final.salience, ids, pieces), data.tasks),
            "salience_tokens",
            f"Mean weight over uniform weight of token ids that occur at least {_LEAST_COUNT} "
            "times in the validation text: the most salient and the least. ␣ is a space, ↵ a line "
            "break.",
        )
    )
    uniform = 1.0 / len(ids)
    length = text.shape[1] - 1
    prose, code = (torch.arange(2 * length) + start for start in (0, len(ids) // 2))
    words = [*(pieces[i] for i in ids[prose].tolist()), "\n\n", *(pieces[i] for i in ids[code])]
    between = torch.tensor([uniform])
    for index, task in enumerate(data.tasks):
        weight = torch.cat([final.salience[index][prose], between, final.salience[index][code]])
        caption = (
            f"A passage of prose and one of code under {task!r}: orange weighs more than uniform, "
            "blue less. The first token of a window has no loss and is left out."
        )
        picture = plot_tokens(words, weight, uniform=uniform, columns=80, title=task)
        path = context.save(picture, f"salience_text_{task}", caption).path
        blocks.append(Snippet(tokens_html(words, weight, uniform=uniform), caption, path))
    return blocks


def token_kinds(salience: Tensor, ids: Tensor, pieces: list[str]) -> list[list[tuple[str, float]]]:
    """Per task, token ids by mean weight over uniform weight: the most salient, then the least."""
    counts = torch.bincount(ids, minlength=len(pieces))
    frequent = (counts >= _LEAST_COUNT).nonzero()[:, 0]
    found = []
    for weight in salience.double():
        sums = torch.zeros(len(pieces), dtype=torch.float64).index_add_(0, ids, weight)
        ratio = sums[frequent] / counts[frequent] * len(ids)
        order = ratio.argsort(descending=True, stable=True).tolist()
        chosen = order[:_LISTED] + order[_LISTED:][-_LISTED:]
        found.append([(pieces[int(frequent[i])], float(ratio[i])) for i in chosen])
    return found


def _domain_columns(data: Measurements) -> dict[str, slice]:
    half = data.nll.shape[1] // 2
    return {DOMAINS[0]: slice(0, half), DOMAINS[1]: slice(half, None)}


def _numbers(
    data: Measurements,
    outcomes: list[Outcome],
    duels: Duels,
    final: CapabilitySalience,
    sentences: list[str],
) -> dict[str, Any]:
    columns = _domain_columns(data)
    checkpoints = [
        {
            "mixture": c.run.mixture.name,
            "size": c.run.size.name,
            "step": c.step,
            "tokens": c.tokens,
            "parameters": c.parameters,
            "flop": c.flop,
            "loss": {d: data.nll[i, columns[d]].mean().item() for d in DOMAINS},
            "accuracy": dict(zip(data.tasks, data.accuracy[i].tolist(), strict=True)),
        }
        for i, c in enumerate(data.checkpoints)
    ]
    held_out = {
        outcome.split: {
            task: {
                law: {
                    "r2": outcome.r2(law, data)[i].item(),
                    "mse": outcome.mse(law, data)[i].item(),
                }
                for law in LAWS
            }
            for i, task in enumerate(data.tasks)
        }
        for outcome in outcomes
    }
    return {
        "verdict": sentences,
        "tasks": dict(zip(data.tasks, data.chance, strict=True)),
        "validation_tokens": data.nll.shape[1],
        "checkpoints": checkpoints,
        "held_out": held_out,
        "regularization": {
            o.split: {law: [v.regularization for v in o.fitted[law]] for law in SALIENCES}
            for o in outcomes
        },
        "salience_against": {
            other: {
                ours: [vars(d) | {"result": d.result} for d in found]
                for ours, found in pairs.items()
            }
            for other, pairs in duels.items()
        },
        "fitted_on_all": {
            task: {
                "alpha": final.alpha[i].item(),
                "beta": final.beta[i].item(),
                "kl": final.kl[i].item(),
                "regularization": final.regularization[i],
                "weight_on": {d: final.salience[i, columns[d]].sum().item() for d in DOMAINS},
            }
            for i, task in enumerate(data.tasks)
        },
    }


SECTION = Section(
    "salience", "Capability Salience Vector: tokens that tell what a model can do", run
)
