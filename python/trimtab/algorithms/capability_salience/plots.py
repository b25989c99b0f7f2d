"""Pictures of a fitted ``CapabilitySalience``. Matplotlib is imported when a figure is drawn."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trimtab.algorithms.capability_salience import CapabilitySalience

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MORE, _LESS = (0.96, 0.55, 0.20), (0.42, 0.65, 0.93)  # orange and blue, told apart by everyone
_LINE_BREAK = "\u21b5"
_CHARACTER = (0.07, 0.17)  # inches


class RankedToken(NamedTuple):
    """A token with its place in the text and its weight over the uniform weight."""

    position: int
    token: str
    ratio: float


def plot_predictions(
    fitted: CapabilitySalience,
    nll: Any,  # (M, N)
    accuracy: Any,  # (M,) or (M, C)
    *,
    held_out: Tensor | Sequence[bool] | None = None,  # (M,)
    baseline: CapabilitySalience | None = None,
    names: Sequence[str] | None = None,
    features: Any = None,
) -> Figure:
    """Predicted against measured accuracy: one column per capability, the baseline in a second row.

    Args:
        fitted: fitted law.
        nll: the models to show, as in ``predict``.
        accuracy: what was measured.
        held_out: True for models that the fit has not seen, drawn as open diamonds; R2 is written
            for the two kinds apart.
        baseline: another fitted law to show below, as the mean-loss law.
        names: of the capabilities.
        features: as in ``predict``, for ``fitted`` alone.

    Returns:
        A ``matplotlib.figure.Figure``; ``figure.savefig(path)`` writes it, no display is needed.
    """
    from matplotlib.figure import Figure

    measured = torch.as_tensor(accuracy).detach().cpu().double()
    measured = measured[:, None] if measured.ndim == 1 else measured
    models, count = measured.shape
    held = torch.zeros(models, dtype=torch.bool) if held_out is None else torch.as_tensor(held_out)
    if held.shape != (models,):
        raise ValueError(
            f"held_out must have one entry per model ({models}), got shape {tuple(held.shape)}; "
            "pass True for models that the fit has not seen"
        )
    if names is not None and len(names) != count:
        raise ValueError(f"names must be {count}, got {len(names)}; one per capability")
    rows = [("weighted loss", fitted.predict(nll, features=features))]
    if baseline is not None:
        rows.append(("baseline", baseline.predict(nll)))
        if math.isinf(min(baseline.regularization)):
            rows[1] = ("mean loss", rows[1][1])
    figure = Figure(figsize=(3.0 * count + 0.4, 3.0 * len(rows) + 0.2), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False, sharex="col", sharey="col")
    for row, (label, predicted) in enumerate(rows):
        for column in range(count):
            axis = axes[row, column]
            _draw_predictions(axis, measured[:, column], predicted[:, column].double(), held.bool())
            if row == 0:
                axis.set_title(f"capability {column}" if names is None else names[column])
            if column == 0:
                axis.set_ylabel(f"predicted from {label}")
            if row == len(rows) - 1:
                axis.set_xlabel("measured accuracy")
    return figure


def _draw_predictions(axis: Axes, measured: Tensor, predicted: Tensor, held: Tensor) -> None:
    """Models as points around the diagonal, with R2 of each kind in the legend."""
    axis.axline((0.0, 0.0), slope=1.0, color="0.7", linewidth=1.0, zorder=0)
    for label, rows, marker, face in (
        ("fitted", ~held, "o", "C0"),
        ("held out", held, "D", "none"),
    ):
        if not bool(rows.any()):
            continue
        x, y = measured[rows], predicted[rows]
        spread = float((x - x.mean()).square().sum())
        r2 = 1.0 - float((y - x).square().sum()) / spread if spread > 0 else math.nan
        edge = "C1" if face == "none" else face
        axis.scatter(
            x.numpy(), y.numpy(), s=18, marker=marker, facecolors=face, edgecolors=edge,
            label=f"{label}, R² {r2:.3f}",
        )  # fmt: skip
    axis.legend(fontsize="x-small", loc="upper left")


def plot_tokens(
    tokens: Sequence[str],
    salience: Tensor,  # (N,)
    *,
    uniform: float | None = None,
    columns: int = 90,
    title: str | None = None,
) -> Figure:
    """The text, every token on the colour of its weight: orange above uniform, blue below.

    The colour is the log of weight / uniform weight, full at the 98th percentile of its size.

    Args:
        tokens: decoded tokens; a line break ends a line and shows as an arrow.
        salience: their weights under one capability.
        uniform: weight that counts as neutral; None for ``1 / N``. Give it for a part of a text.
        columns: characters per line.
        title: of the figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    colours = [_colour(value) for value in _relative(tokens, salience, uniform)]
    placed, lines = _lay_out(tokens, columns)
    width, text_height = _CHARACTER[0] * columns, _CHARACTER[1] * lines
    height = text_height + (0.3 if title else 0.0)
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0.0, 0.0, 1.0, text_height / height))
    axis.set(xlim=(0, columns), ylim=(lines, 0))
    axis.axis("off")
    if title:
        axis.set_title(title, fontsize=9)
    for index, line, column, text in placed:
        axis.add_patch(Rectangle((column, line), len(text), 1, color=colours[index], linewidth=0))
        for offset, character in enumerate(text):
            if not character.isspace():
                axis.text(
                    column + offset + 0.5, line + 0.5, character,
                    family="monospace", fontsize=7, ha="center", va="center",
                )  # fmt: skip
    return figure


def tokens_html(
    tokens: Sequence[str],
    salience: Tensor,  # (N,)
    *,
    uniform: float | None = None,
) -> str:
    """The picture of ``plot_tokens`` as an HTML snippet; tokens are escaped, titles give the ratio.

    Args:
        tokens: decoded tokens.
        salience: their weights under one capability.
        uniform: weight that counts as neutral; None for ``1 / N``.
    """
    relative = _relative(tokens, salience, uniform)
    neutral = _neutral(salience, uniform)
    spans = []
    for token, value, weight in zip(tokens, relative, salience.tolist(), strict=True):
        colour = "#" + "".join(f"{round(255 * part):02x}" for part in _colour(value))
        ratio = f"{weight / neutral:.3g}"
        spans.append(
            f'<span style="background-color:{colour}" title="{ratio} x uniform">'
            f"{html.escape(token)}</span>"
        )
    style = "font-family:monospace;white-space:pre-wrap;color:#000;background-color:#fff"
    return f'<div style="{style}">{"".join(spans)}</div>'


def extreme_tokens(
    tokens: Sequence[str],
    salience: Tensor,  # (N,)
    count: int = 20,
    *,
    uniform: float | None = None,
) -> tuple[list[RankedToken], list[RankedToken]]:
    """The most salient tokens, and the least, each from the extreme inwards.

    Args:
        tokens: decoded tokens.
        salience: their weights under one capability.
        count: how many of each kind, at most N.
        uniform: weight to divide by; None for ``1 / N``.
    """
    _check_tokens(tokens, salience)
    ratio = salience.double() / _neutral(salience, uniform)
    order = torch.sort(ratio, descending=True, stable=True).indices.tolist()
    ranked = [RankedToken(index, tokens[index], float(ratio[index])) for index in order]
    return ranked[:count], ranked[::-1][:count]


def _check_tokens(tokens: Sequence[str], salience: Tensor) -> None:
    if salience.shape != (len(tokens),):
        raise ValueError(
            f"salience must have one weight per token ({len(tokens)}), got shape "
            f"{tuple(salience.shape)}; pass one row, as fitted.salience[0]"
        )


def _neutral(salience: Tensor, uniform: float | None) -> float:
    return 1.0 / max(len(salience), 1) if uniform is None else uniform


def _relative(tokens: Sequence[str], salience: Tensor, uniform: float | None) -> list[float]:
    """Log of weight / uniform weight, scaled to [-1, 1]."""
    _check_tokens(tokens, salience)
    # A weight that has underflowed to 0 is as blue as any.
    ratio = (salience.double() / _neutral(salience, uniform)).clamp(min=1e-30)
    size = ratio.log().abs()
    # Rounding of equal weights must not be painted as if it were salience.
    full = max(float(size.sort().values[int(0.98 * (len(size) - 1))]), 1e-3) if len(size) else 1.0
    return (ratio.log() / full).clamp(-1.0, 1.0).tolist()


def _colour(value: float) -> tuple[float, float, float]:
    """White at 0, orange at 1, blue at -1."""
    end = _MORE if value > 0 else _LESS
    red, green, blue = (1.0 + abs(value) * (part - 1.0) for part in end)
    return red, green, blue


def _lay_out(tokens: Sequence[str], columns: int) -> tuple[list[tuple[int, int, int, str]], int]:
    """Pieces (token, line, column, text) on a grid of characters, and the number of lines."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}; the default is 90")
    placed: list[tuple[int, int, int, str]] = []
    line = column = 0
    for index, token in enumerate(tokens):
        for character in token.replace("\r\n", "\n"):
            if column == columns:
                line, column = line + 1, 0
            shown = _LINE_BREAK if character == "\n" else character
            shown = shown if shown.isprintable() else " "
            last = placed[-1] if placed else None
            if last and last[:2] == (index, line):
                placed[-1] = (index, line, last[2], last[3] + shown)
            else:
                placed.append((index, line, column, shown))
            column = columns if character == "\n" else column + 1
    return placed, line + 1
