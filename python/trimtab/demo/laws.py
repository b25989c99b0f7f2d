"""Held-out comparison of laws that predict accuracy: compute, mean loss, own domain, salience.

All are the same sigmoid fitted in the same way; they differ in the number that goes into it.
Models are held out by whole runs, mixtures or sizes, never as neighbours on one training curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import trimtab
from trimtab.algorithms.capability_salience import choose_regularization
from trimtab.demo.models import Checkpoint, Plan

COMPUTE, MEAN, DOMAIN = "compute", "mean loss", "own domain"
TABLE, HEAD = "salience table", "salience head"  # a free weight per token; a head on features
BASELINES, SALIENCES = (COMPUTE, MEAN, DOMAIN), (TABLE, HEAD)
LAWS = BASELINES + SALIENCES
_RESAMPLES = 2000


@dataclass(frozen=True)
class Measurements:
    """M checkpoints: the loss of every validation token, and the accuracy on every task."""

    checkpoints: list[Checkpoint]
    nll: Tensor  # (M, N) float32
    accuracy: Tensor  # (M, C) float64
    tasks: list[str]
    chance: list[float]  # (C)
    columns: list[slice]  # (C) the tokens of each task's own domain
    features: Tensor  # (N, F) of the validation tokens, from a model outside the family

    @property
    def run(self) -> Tensor:  # (M,)
        """Number of the training run of each checkpoint."""
        names = [c.run.name for c in self.checkpoints]
        first = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([first[name] for name in names])


@dataclass(frozen=True)
class Split:
    """A way to hold models out: each label in `held` in turn, fitted on all other labels."""

    name: str
    labels: Tensor  # (M,)
    held: list[int]
    folds: Tensor  # (M,) labels by which the fit's own models choose the regularization

    @property
    def models(self) -> Tensor:
        """Indices of the models that are held out once."""
        return torch.cat([(self.labels == label).nonzero()[:, 0] for label in self.held])


@dataclass(frozen=True)
class Outcome:
    """Held-out predictions of every law under one split."""

    split: str
    models: Tensor  # (H,) indices
    predicted: dict[str, Tensor]  # (H, C) per law
    fitted: dict[str, list[trimtab.CapabilitySalience]]  # per fold

    def mse(self, law: str, data: Measurements) -> Tensor:  # (C,)
        """Mean squared error over the held-out models."""
        return (self.predicted[law] - data.accuracy[self.models]).square().mean(0)

    def r2(self, law: str, data: Measurements) -> Tensor:  # (C,)
        """Coefficient of determination over the held-out models of all folds together."""
        measured = data.accuracy[self.models]
        return 1.0 - self.mse(law, data) / measured.var(0, correction=0)

    def confidence(self, ours: str, other: str, data: Measurements, seed: int) -> Tensor:  # (C,)
        """Share of resamplings of the runs in which `ours` has the lower error; a tie is half."""
        errors = {
            law: (self.predicted[law] - data.accuracy[self.models]).square()
            for law in (ours, other)
        }
        gain = errors[other] - errors[ours]
        _, run = data.run[self.models].unique(return_inverse=True)
        runs = int(run.max()) + 1
        totals = torch.zeros(runs, gain.shape[1], dtype=gain.dtype).index_add_(0, run, gain)
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(runs, (_RESAMPLES, runs), generator=generator)
        summed = totals[picks].sum(1)  # (_RESAMPLES, C)
        return ((summed > 0).double() + 0.5 * (summed == 0).double()).mean(0)


def splits(checkpoints: list[Checkpoint], plan: Plan) -> list[Split]:
    """Unseen runs, unseen mixtures, and a size larger than every one in the fit."""
    mixture = torch.tensor([plan.mixtures.index(c.run.mixture) for c in checkpoints])
    size = torch.tensor([plan.sizes.index(c.run.size) for c in checkpoints])
    # Every fold holds out one run per size, each of another mixture.
    diagonal = (mixture + size) % len(plan.mixtures)
    return [
        Split("an unseen run", diagonal, sorted(set(diagonal.tolist())), diagonal),
        Split("an unseen mixture", mixture, sorted(set(mixture.tolist())), mixture),
        # The smaller sizes are too few to be folds.
        Split("a larger model", size, [len(plan.sizes) - 1], diagonal),
    ]


def compare(
    data: Measurements,
    split: Split,
    grid: Sequence[float],
    on_fold: Callable[[], object] = lambda: None,
) -> Outcome:
    """Predicts every held-out model of a split by every law.

    The regularization of the salience vectors is chosen from `grid` among the fit's own models
    alone, by holding out some of them by `split.folds`.
    """
    found: dict[str, list[Tensor]] = {law: [] for law in LAWS}
    fitted: dict[str, list[trimtab.CapabilitySalience]] = {law: [] for law in SALIENCES}
    for label in split.held:
        test, fit = split.labels == label, split.labels != label
        for law in BASELINES:
            found[law].append(_baseline(law, data, fit, test))
        for law in SALIENCES:
            vector = fit_salience(law, data, fit, split.folds, grid)
            fitted[law].append(vector)
            found[law].append(vector.predict(data.nll[test]).double())
        on_fold()
    predicted = {law: torch.cat(parts) for law, parts in found.items()}
    return Outcome(split.name, split.models, predicted, fitted)


def fit_salience(
    law: str,
    data: Measurements,
    fit: Tensor,  # (M,) bool
    folds: Tensor,  # (M,) labels
    grid: Sequence[float],
) -> trimtab.CapabilitySalience:
    """A salience vector on some models, its regularization chosen by cross-validation on them."""
    nll, accuracy, folds = data.nll[fit], data.accuracy[fit], folds[fit]
    if len(folds.unique()) < 2:
        folds = data.run[fit]
    features = data.features if law == HEAD else None
    weights = "head" if law == HEAD else "table"
    choice = choose_regularization(
        nll,
        accuracy,
        grid=grid,
        folds=folds,
        features=features,
        floor=data.chance,
        weights=weights,
    )
    vector = trimtab.CapabilitySalience(
        len(data.tasks),
        floor=data.chance,
        weights=weights,
        regularization=choice.regularization,
    )
    return vector.fit(nll, accuracy, features=features)


def fit_mean_law(data: Measurements, fit: Tensor) -> trimtab.CapabilitySalience:
    """The law from the mean loss: the same class with uniform weights."""
    law = trimtab.CapabilitySalience(len(data.tasks), floor=data.chance, regularization=math.inf)
    return law.fit(data.nll[fit], data.accuracy[fit])


def _baseline(law: str, data: Measurements, fit: Tensor, test: Tensor) -> Tensor:  # (H, C)
    if law == MEAN:
        return fit_mean_law(data, fit).predict(data.nll[test]).double()
    parts = []
    for task, columns in enumerate(data.columns):
        if law == COMPUTE:
            flop = torch.tensor([c.flop for c in data.checkpoints], dtype=torch.float64)
            number = -flop.log10()[:, None]  # falls as accuracy rises, like a loss
        else:
            number = data.nll[:, columns]
        model = trimtab.CapabilitySalience(floor=data.chance[task], regularization=math.inf)
        model.fit(number[fit], data.accuracy[fit, task])
        parts.append(model.predict(number[test]).double())
    return torch.cat(parts, 1)
