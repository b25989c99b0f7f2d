"""Pictures of the salience section that the library has no function for."""

from __future__ import annotations

import re

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trimtab.demo.laws import MEAN, SALIENCES, Measurements, Outcome
from trimtab.demo.models import Plan

_COLOURS = ("#c2571a", "#dd9a3c", "#4f8fbf", "#274b7a", "#6a9a4a", "#7a5195")
_MARKERS = ("o", "s", "D", "^", "v")
_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})
_SHOWN = 14  # characters of a token


def draw_curves(data: Measurements, plan: Plan) -> Figure:
    """Accuracy over mean loss, one panel per task, colours for mixtures, markers for sizes."""
    count = len(data.tasks)
    figure = Figure(figsize=(3.1 * count, 3.3), layout="constrained")
    loss = data.nll.mean(1)
    for axis, task, chance, column in zip(
        figure.subplots(1, count, squeeze=False)[0],
        data.tasks,
        data.chance,
        data.accuracy.T,
        strict=True,
    ):
        for run in plan.runs:
            rows = [i for i, c in enumerate(data.checkpoints) if c.run == run]
            axis.plot(
                loss[rows].numpy(), column[rows].numpy(), linewidth=0.8, markersize=4,
                color=_COLOURS[plan.mixtures.index(run.mixture) % len(_COLOURS)],
                marker=_MARKERS[plan.sizes.index(run.size) % len(_MARKERS)],
                label=run.mixture.name if run.size == plan.sizes[0] else None,
            )  # fmt: skip
        axis.axhline(chance, color="0.6", linewidth=0.8, linestyle=":")
        axis.set(title=task, xlabel="mean loss, nats per token")
        axis.invert_xaxis()
        _plain(axis)
    figure.axes[0].set_ylabel("accuracy (dotted: chance)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def draw_held_out(data: Measurements, outcomes: list[Outcome]) -> Figure:
    """Predicted against measured, a row per law, a column per task, colours for the splits."""
    laws = (MEAN, *SALIENCES)
    count = len(data.tasks)
    figure = Figure(figsize=(3.1 * count, 2.9 * len(laws)), layout="constrained")
    axes = figure.subplots(len(laws), count, squeeze=False, sharex="col", sharey="col")
    for row, law in enumerate(laws):
        for column, task in enumerate(data.tasks):
            axis = axes[row, column]
            axis.axline((0.5, 0.5), slope=1.0, color="0.75", linewidth=1.0, zorder=0)
            for index, outcome in enumerate(outcomes):
                label = f"{outcome.split}, R² {outcome.r2(law, data)[column].item():.2f}"
                axis.scatter(
                    data.accuracy[outcome.models, column].numpy(),
                    outcome.predicted[law][:, column].numpy(),
                    s=14, alpha=0.75, linewidths=0, marker=_MARKERS[index],
                    color=_COLOURS[2 * index % len(_COLOURS)], label=label,
                )  # fmt: skip
            if row == 0:
                axis.set_title(task)
            if row == len(laws) - 1:
                axis.set_xlabel("measured accuracy")
            if column == 0:
                axis.set_ylabel(f"predicted from {law}")
            axis.legend(fontsize=7, frameon=False, handletextpad=0.1, borderpad=0.1)
            _plain(axis)
    return figure


def draw_token_kinds(kinds: list[list[tuple[str, float]]], tasks: list[str]) -> Figure:
    """Bars of weight over uniform weight on a log scale, one panel per task."""
    count = len(tasks)
    rows = max(len(found) for found in kinds)
    figure = Figure(figsize=(3.1 * count, 0.21 * rows + 0.9), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, task, found in zip(axes, tasks, kinds, strict=True):
        ratios = [max(ratio, 1e-6) for _, ratio in found]
        places = range(len(found))
        # Bars grow from 1, which is the uniform weight.
        axis.barh(
            places, [ratio - 1.0 for ratio in ratios], left=1.0, height=0.72,
            color=["#c2571a" if ratio > 1.0 else "#4f8fbf" for ratio in ratios],
        )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yticks(places, [_visible(token) for token, _ in found], fontsize=8)
        for label in axis.get_yticklabels():
            label.set(family="monospace", parse_math=False)
        axis.invert_yaxis()
        axis.axvline(1.0, color="0.4", linewidth=0.8)
        axis.set(title=task, xlabel="weight / uniform weight")
        _plain(axis)
    return figure


def _visible(token: str) -> str:
    text = re.sub("␣{4,}", lambda run: f"␣×{len(run[0])}", token.translate(_VISIBLE))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
