"""Docstrings as the site shows them: shapes from the signature's comments, code after ``::``."""

from __future__ import annotations

import re
from typing import Any

import griffe

# An argument on a line of its own, and what its trailing comment says of its shape.
_SHAPE = re.compile(r"^\s*\*{0,2}(\w+)\s*[:=,].*?#\s*(.+?)\s*$")
# Google style would take a sentence that goes on indented for a titled box.
_GOES_ON = re.compile(r"(?m)^(Cost[^:\n]*: .*)\n {4,}(?=\S)")
_CODE_FOLLOWS = re.compile(r"(?m)^\s*::$|:(:)$")


class Docstrings(griffe.Extension):
    """Changes texts only; nothing is imported or run."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Each argument's shape stands before its text."""
        if func.docstring is None or func.lineno is None:
            return
        signature = func.source.split('"""', 1)[0]
        shapes = dict(match.groups() for line in signature.splitlines()
                      if (match := _SHAPE.match(line)))  # fmt: skip
        func.docstring.value = with_shapes(func.docstring.value, shapes)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """``text::`` before indented code is reStructuredText; Markdown needs the one colon."""
        if obj.docstring is not None:
            text = _CODE_FOLLOWS.sub(lambda m: m[1] or "", obj.docstring.value)
            obj.docstring.value = _GOES_ON.sub(r"\1\n", text)


def with_shapes(text: str, shapes: dict[str, str]) -> str:
    """A Google docstring whose ``Args`` begin with the arguments' shapes."""
    for name, shape in shapes.items():
        if "noqa" not in shape and "type:" not in shape:
            text = re.sub(rf"(?m)^(    \s*)({name}): ", rf"\1\2: ``{shape}``; ", text, count=1)
    return text
