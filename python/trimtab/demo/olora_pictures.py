"""Pictures of the section on O-LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from trimtab.demo.continual import LabelTask
from trimtab.demo.continual_training import INCREMENTAL, JOINT, ORTHOGONAL, SEQUENTIAL
from trimtab.demo.olora_verdict import Outcome

_COLOURS = {SEQUENTIAL: "#4f8fbf", INCREMENTAL: "#274b7a", ORTHOGONAL: "#c2571a", JOINT: "0.45"}
_MARKERS = {SEQUENTIAL: "^", INCREMENTAL: "s", ORTHOGONAL: "o", JOINT: "D"}


def draw_matrices(found: Sequence[Outcome], tasks: Sequence[LabelTask]) -> Figure:
    """Accuracy on every task after every task, a panel for each method, mean over the seeds."""
    figure = Figure(figsize=(2.5 * len(found) + 0.8, 3.4), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True)
    names = [task.name for task in tasks]
    tables = [100.0 * torch.stack([c.accuracy for c in o.courses]).mean(0) for o in found]
    top = max(float(table.nan_to_num().max()) for table in tables)
    for axis, outcome, table in zip(axes, found, tables, strict=True):
        image = _heat_map(axis, table, max(top, 1.0), "{:.0f}")
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        axis.set_title(outcome.name, fontsize=10)
        axis.set_xlabel("accuracy on", fontsize=9)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set_ylabel("after training on", fontsize=9)
    figure.colorbar(image, ax=axes, label="%", shrink=0.85)
    return figure


def draw_courses(found: Sequence[Outcome], tasks: Sequence[LabelTask]) -> Figure:
    """Average accuracy so far, and accuracy on the first task, after every task."""
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    places = torch.arange(len(tasks), dtype=torch.float64)
    for index, outcome in enumerate(found):
        matrices = 100.0 * torch.stack([course.accuracy for course in outcome.courses]).double()
        for axis, values in zip(panels, (matrices.nanmean(2), matrices[:, :, 0]), strict=True):
            known = values.isfinite().all(0)  # joint training has the last row alone
            spread = values.std(0, correction=int(len(values) > 1))[known]
            # Side by side, for the spreads not to hide each other.
            shifted = places[known] + 0.06 * (index - (len(found) - 1) / 2)
            axis.errorbar(
                shifted.numpy(), values.mean(0)[known].numpy(), spread.numpy(),
                color=_COLOURS[outcome.method], marker=_MARKERS[outcome.method], markersize=5,
                linewidth=1.6, elinewidth=1.0, capsize=3, label=outcome.name,
            )  # fmt: skip
    for axis, title in zip(
        panels,
        ("Mean over the tasks so far", f"The first task, “{tasks[0].name}”"),
        strict=True,
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(tasks)), [task.name for task in tasks], fontsize=9)
        axis.set_xlabel("after training on", fontsize=9)
        _plain(axis)
    panels[0].set_ylabel("accuracy, %", fontsize=9)
    panels[0].set_ylim(bottom=0.0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False, fontsize=9)  # fmt: skip
    return figure


def draw_overlap(
    plain: Outcome, ours: Outcome, tasks: Sequence[LabelTask], found: Sequence[Outcome]
) -> Figure:
    """Overlap of the tasks' subspaces without and with the penalty, and what lamda_1 does to it."""
    figure = Figure(figsize=(11.0, 3.1), layout=ConstrainedLayoutEngine(wspace=0.05))
    axes = figure.subplots(1, 4, width_ratios=(1.0, 1.0, 1.1, 1.1))
    names = [task.name for task in tasks]
    tables = [
        torch.stack([c.overlap for c in outcome.courses if c.overlap is not None]).mean(0)
        for outcome in (plain, ours)
    ]
    for table in tables:
        table.fill_diagonal_(torch.nan)
    top = max(float(table.nan_to_num().max()) for table in tables)
    for axis, table, outcome in zip(axes, tables, (plain, ours), strict=False):
        _heat_map(axis, table, max(top, 1e-6), "{:.3f}", size=7)
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        axis.set_title(f"Overlap\n{outcome.name}", fontsize=9)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[1].set_yticks([])
    swept = [plain, *(o for o in found if o.method == ORTHOGONAL)]
    places = range(len(swept))
    labels = ["0", *(f"{outcome.lamda:g}" for outcome in swept[1:])]
    for axis, title in zip(axes[2:], ("Overlap", "Accuracy after the last task, %"), strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xticks(places, labels, fontsize=8)
        axis.set_xlabel("lamda_1", fontsize=9)
        _plain(axis)
    style = {"color": _COLOURS[ORTHOGONAL], "marker": "o", "markersize": 4, "capsize": 3,
             "elinewidth": 1.0}  # fmt: skip
    axes[2].errorbar(places, *_means([o.overlap for o in swept]), **style)
    axes[2].set_ylim(bottom=0.0)
    axes[3].errorbar([p + 0.06 for p in places], *_means([o.average for o in swept]),
                     label="test windows", **style)  # fmt: skip
    axes[3].errorbar([p - 0.06 for p in places], *_means([o.choice for o in swept]),
                     label="windows for the choice",
                     **style | {"color": "0.5", "marker": "s", "linestyle": "--"})  # fmt: skip
    axes[3].legend(frameon=False, fontsize=8)
    return figure


def _means(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [fmean(v) for v in values], [stdev(v) if len(v) > 1 else 0.0 for v in values]


def _heat_map(axis: Axes, table: Tensor, top: float, form: str, size: int = 9) -> AxesImage:
    """A matrix as colours and numbers; NaN is left blank."""
    image = axis.imshow(table.numpy(), cmap="Blues", vmin=0.0, vmax=top)
    for i, j in table.isfinite().nonzero().tolist():
        value = float(table[i, j])
        colour = "white" if value > 0.6 * top else "0.15"
        axis.text(j, i, form.format(value), ha="center", va="center", color=colour, fontsize=size)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return image


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
