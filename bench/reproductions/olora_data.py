"""Tasks of CL_Benchmark: reading, orders, splits, and how a task is put to a model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class UsageError(Exception):
    """The script can't do what was asked; the message says what to do."""


ORDERS = {
    "1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "3": ("yahoo", "amazon", "agnews", "dbpedia"),
    "long": (
        "yelp", "amazon", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2", "dbpedia", "agnews",
        "yahoo", "MultiRC", "BoolQA", "WiC",
    ),
}  # fmt: skip
"""The paper's orders 1 to 3, and the one of its long orders that was released as a script."""


UNLABELLED = "-"
"""MultiNLI's mark for rows whose annotators did not agree; they are left out."""


class Kind(NamedTuple):
    """What the tasks of one folder of CL_Benchmark ask for."""

    aspect: str  # before a label, to make a text of it
    question: str


KINDS = {
    "TC": Kind("topic", "Which of these topics is the text about?"),
    "SC": Kind("sentiment", "Which of these words says how the writer feels?"),
    "NLI": Kind("logical relation", "How does sentence 2 relate to sentence 1?"),
    "QQP": Kind("same meaning", "Do both sentences mean the same?"),
    "BoolQA": Kind("answer", "What does the passage answer to the question?"),
    "COPA": Kind("choice", "Which of these fits the text?"),
    "MultiRC": Kind("answer is right", "Is the answer right, going by the passage?"),
    "WiC": Kind("same sense", "Does the word have the same sense in both sentences?"),
}
OTHER = Kind("label", "Which of these fits the text?")


class Example(NamedTuple):
    """A text and what a model should say to it."""

    task: str
    sentence: str
    label: str


class Task(NamedTuple):
    """One task, with its rows already split."""

    name: str
    kind: str
    labels: tuple[str, ...]
    train: list[Example]
    held_out: list[Example]
    test: list[Example]


class Caps(NamedTuple):
    """How many rows of a task are used at most; None for all of them."""

    train: int | None
    held_out: int
    test: int | None


def find_tasks(folder: Path) -> dict[str, Path]:
    """Task name -> its folder, ``folder/<kind>/<task>``."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*/*/labels.json")):
        name = path.parent.name
        if name in found:
            raise UsageError(
                f"--data must have one task {name}, got {found[name]} and {path.parent}"
            )
        found[name] = path.parent
    if not found:
        raise UsageError(
            f"--data must be a folder with <kind>/<task>/labels.json, such as CL_Benchmark of "
            f"github.com/cmnfriend/O-LoRA, got {folder}"
        )
    return found


def choose_order(spec: Sequence[str], known: Sequence[str], skip_missing: bool) -> list[str]:
    """The tasks of an order by its name, or those named one by one."""
    names = ORDERS[spec[0]] if len(spec) == 1 and spec[0] in ORDERS else tuple(spec)
    if len(set(names)) < len(names):
        raise UsageError(f"--order must name each task once, got {' '.join(names)}")
    missing = [name for name in names if name not in known]
    kept = [name for name in names if name in known]
    if missing and not skip_missing:
        raise UsageError(
            f"--data must have every task of the order, got none called {', '.join(missing)}; "
            "--skip-missing goes on without them"
        )
    if len(kept) < 2:
        raise UsageError(f"--order must leave two tasks or more, got {', '.join(kept) or 'none'}")
    return kept


def read_task(folder: Path, caps: Caps) -> Task:
    """Reads and splits a task: the same rows for every method and seed.

    Files are shuffled with a fixed seed. Held-out rows are the first of ``train.json`` then, a
    fifth of them at most but one; training rows come after.
    """
    name, kind = folder.name, folder.parent.name
    labels = _load(folder / "labels.json")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UsageError(f"{folder / 'labels.json'} must be a list of words")
    if len(set(labels)) < max(2, len(labels)):
        raise UsageError(f"{folder / 'labels.json'} must have two or more different labels")
    train = _examples(folder / "train.json", name, labels)
    test = _examples(folder / "test.json", name, labels)
    held_out = min(caps.held_out, max(1, len(train) // 5))
    end = None if caps.train is None else held_out + caps.train
    return Task(name, kind, tuple(labels), train[held_out:end], train[:held_out], test[: caps.test])


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error


def _examples(path: Path, task: str, labels: Sequence[str]) -> list[Example]:
    rows = _load(path)
    if not isinstance(rows, list):
        raise UsageError(f"{path} must be a list of rows, got {type(rows).__name__}")
    examples = []
    for number, row in enumerate(rows, 1):
        fields = [row.get(key) for key in ("sentence", "label")] if isinstance(row, dict) else []
        if len(fields) != 2 or not all(isinstance(field, str) for field in fields):
            raise UsageError(f"{path}, row {number} must have a sentence and a label, both words")
        if fields[1] == UNLABELLED and UNLABELLED not in labels:
            continue
        if fields[1] not in labels:
            raise UsageError(
                f"{path}, row {number} must have a label of labels.json, got {fields[1]!r}"
            )
        examples.append(Example(task, fields[0].strip(), fields[1]))
    if len(examples) < 2:
        raise UsageError(f"{path} must have two rows or more, got {len(examples)}")
    random.Random(0).shuffle(examples)
    return examples


def label_text(task: Task, label: str) -> str:
    """What an encoder embeds for a label: "sentiment: very negative"."""
    return f"{KINDS.get(task.kind, OTHER).aspect}: {label}"


def prompt(task: Task) -> tuple[str, str]:
    """What stands before and behind the text for a model that generates the label.

    Like the released prompts it names the kind of task, the data set, the question and the
    options. The wording is ours.
    """
    kind = KINDS.get(task.kind, OTHER)
    options = " | ".join(task.labels)
    head = f"{kind.aspect} ({task.name})\n{kind.question} Options: {options}\n\n"
    return head, "\n\nThe fitting option:\n"
