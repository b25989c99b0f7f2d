"""Pictures of a fitted ``CapabilitySalience``; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def plot_predictions(
    fitted: Any,
    nll: Any,
    accuracy: Any,
    *,
    held_out: Tensor | None = None,  # (M,) bool
    baseline: Any = None,  # a fitted mean-loss law
    names: Sequence[str] | None = None,
    features: Any = None,
) -> Any:
    """Matplotlib figure: predicted against measured accuracy, one panel per capability (baseline beside)."""
    raise NotImplementedError


def plot_tokens(
    tokens: Sequence[str], salience: Tensor, *, columns: int = 90, title: str | None = None
) -> Any:
    """Matplotlib figure: the text, every token coloured by its salience relative to uniform."""
    raise NotImplementedError


def tokens_html(tokens: Sequence[str], salience: Tensor) -> str:
    """HTML snippet: the text with background colours; tokens escaped."""
    raise NotImplementedError


def extreme_tokens(
    tokens: Sequence[str], salience: Tensor, count: int = 20
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The most and the least salient tokens with ``weight / uniform weight``."""
    raise NotImplementedError
