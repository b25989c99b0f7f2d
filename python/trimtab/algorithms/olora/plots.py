"""Pictures of the overlap between tasks. Matplotlib is imported when a figure is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _PAPER, _NONE = "black", "white", "0.85"


def plot_overlap(
    overlap: Tensor,  # (T, T)
    tasks: Sequence[str] | None = None,
    *,
    largest: float | None = None,
    title: str | None = None,
) -> Figure:
    """Heat map of ``OLoRA.overlap()``: how much each pair of tasks has in common.

    The diagonal, 1 by definition, is left grey, and so are pairs without a common module.

    Args:
        overlap: mean squared cosines.
        tasks: names, as ``OLoRA.tasks()``; None for numbers.
        largest: value of the darkest colour, to compare figures; None for the largest pair's.
        title: of the figure.

    Returns:
        A ``matplotlib.figure.Figure``; ``figure.savefig(path)`` writes it, no display is needed.

    Raises:
        ValueError: not a square, or as many names as it has no rows.
    """
    from matplotlib.figure import Figure

    table = overlap.detach().cpu().double().clone()
    if table.dim() != 2 or table.shape[0] != table.shape[1]:
        raise ValueError(
            f"overlap must be of shape (T, T), got {tuple(table.shape)}; call overlap() without "
            "per_module"
        )
    count = len(table)
    names = [str(i) for i in range(count)] if tasks is None else list(tasks)
    if len(names) != count:
        raise ValueError(f"tasks must be {count} names, got {len(names)}; pass OLoRA.tasks()")
    table.fill_diagonal_(torch.nan)
    shown = table[table.isfinite()]
    top = largest if largest is not None else max(float(shown.max()) if len(shown) else 0.0, 1e-6)
    side = 1.6 + 0.5 * count
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(_NONE)
    image = axes.imshow(table.numpy(), cmap="Blues", vmin=0.0, vmax=top)
    axes.set_xticks(range(count), names, rotation=45, ha="right")
    axes.set_yticks(range(count), names)
    for i, j in table.isfinite().nonzero().tolist():
        value = float(table[i, j])
        color = _PAPER if value > 0.6 * top else _INK
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize="x-small")
    figure.colorbar(image, ax=axes, label="mean squared cosine", shrink=0.8)
    if title is not None:
        axes.set_title(title)
    return figure
