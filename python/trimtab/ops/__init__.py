"""The public operators, and ``explain``, which tells what a call would run on."""

from __future__ import annotations

import inspect
from typing import Any

from trimtab._choose import Choice
from trimtab.ops import contrast, orthogonal, token_loss

_FAMILIES = (token_loss, contrast, orthogonal)


def explain(op_name: str, *args: Any, **kwargs: Any) -> Choice:
    """Which implementation ``op_name`` would take for these arguments, and why, without running it.

    Args:
        op_name: name of a public operator, as in ``trimtab.<op_name>``.
        *args: its positional arguments.
        **kwargs: its keyword arguments.

    Raises:
        ValueError: there is no such operator, or ``impl`` is no known name.
        TypeError: the arguments do not fit the operator.
        RuntimeError: the implementation asked for is not available here.
    """
    table = {name: choice for family in _FAMILIES for name, choice in family.CHOICES.items()}
    if op_name not in table:
        raise ValueError(f"op_name must be one of {', '.join(sorted(table))}, got {op_name!r}")
    function, choice = table[op_name]
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return choice(bound.arguments)
