"""Accuracies as they come in, the adapters between two tasks, and the table at the end."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from olora_data import UsageError
from torch import Tensor

Accuracies = dict[str, float]  # task -> share of its rows


class Run(NamedTuple):
    """One method trained through all tasks once."""

    method: str
    lamda: float | str  # "released" for the schedule of the released scripts
    seed: int
    split: str  # "test", or "held_out" for a run that only chooses lambda

    def __str__(self) -> str:
        lamda = f" {shown(self.lamda)}" if self.lamda else ""
        return f"{self.method}{lamda}, seed {self.seed}, {self.split.replace('_', '-')} rows"


def shown(lamda: float | str | None) -> str:
    """Lambda as it is written: 5, not 5.0; nothing for a method without one."""
    return "" if lamda is None else lamda if isinstance(lamda, str) else f"{lamda:g}"


class Scores(NamedTuple):
    """Of one run, as shares."""

    average: float  # accuracy after the last task, mean over tasks
    forgetting: float | None  # mean over earlier tasks: best before the last task, minus the end
    transfer: float | None  # mean over earlier tasks: the end, minus right after the task


def average_of(accuracies: Accuracies, tasks: Sequence[str]) -> float:
    """Mean over the tasks, each with the same weight."""
    return statistics.fmean(accuracies[task] for task in tasks)


def scores(matrix: Sequence[Accuracies], tasks: Sequence[str]) -> Scores:
    """The measures of a run; ``matrix[i]`` holds what was reached after the i-th stage.

    ``average = mean_j a[T, j]``; ``forgetting = mean_{j<T} (max_{j<=i<T} a[i, j] - a[T, j])``;
    ``transfer = mean_{j<T} (a[T, j] - a[j, j])``. A run of one stage has only the first.
    """
    last = matrix[-1]
    average = average_of(last, tasks)
    if len(matrix) < 2:
        return Scores(average, None, None)
    earlier = list(enumerate(tasks))[:-1]
    best = [max(row[task] for row in matrix[j:-1]) for j, task in earlier]
    return Scores(
        average,
        statistics.fmean(b - last[task] for b, (_, task) in zip(best, earlier, strict=True)),
        statistics.fmean(last[task] - matrix[j][task] for j, task in earlier),
    )


def atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """A file that is there as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class Store:
    """``results.jsonl``, one line per run and task, and the adapters of runs that go on."""

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out = out
        self._path, self._folder = out / "results.jsonl", out / "adapters"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._check(settings)
        self._lines = self._read()

    def _check(self, settings: Mapping[str, Any]) -> None:
        path = self.out / "settings.json"
        if path.exists():
            kept = json.loads(path.read_text())
            changed = [name for name in settings if kept.get(name) != settings[name]]
            if changed:
                raise UsageError(
                    f"--out has results with another {', '.join(changed)}; use another folder"
                )
            return
        atomically(path, lambda file: file.write(json.dumps(settings, indent=1).encode() + b"\n"))

    def _read(self) -> list[dict[str, Any]]:
        lines = []
        text = self._path.read_text() if self._path.exists() else ""
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
                lines.append({key: row[key] for key in (*Run._fields, "task", "accuracy")})
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{self._path}, line {number} is not a result; delete --out to begin anew"
                ) from error
        return lines

    def rows(self, run: Run) -> list[Accuracies]:
        """What a run has reached after each of its stages so far."""
        return [line["accuracy"] for line in self._lines if _of(line) == run]

    def add(self, run: Run, task: str, accuracy: Accuracies) -> None:
        """Keeps what was reached after a task; waits until it is on the disk."""
        self._lines.append({**run._asdict(), "task": task, "accuracy": accuracy})
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        atomically(self._path, lambda file: file.write(text.encode()))

    def _file(self, run: Run, done: int) -> Path:
        if done == 1:
            return self._folder / f"first-task-seed{run.seed}.pt"
        lamda = f"-{run.lamda}" if run.lamda else ""
        return self._folder / f"{run.method}{lamda}-seed{run.seed}-{run.split}-{done}.pt"

    def save_adapters(self, run: Run, done: int, state: Mapping[str, Tensor]) -> None:
        """Keeps the adapters after ``done`` tasks; the first task's belong to every method."""
        atomically(self._file(run, done), lambda file: torch.save(dict(state), file))

    def adapters(self, run: Run, done: int) -> dict[str, Tensor] | None:
        """The adapters after ``done`` tasks, None if they are not there."""
        path = self._file(run, done)
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def drop_adapters(self, run: Run, done: int) -> None:
        """Deletes what a run needs no more; the first task's adapters stay."""
        if done > 1:
            self._file(run, done).unlink(missing_ok=True)


def _of(line: Mapping[str, Any]) -> Run:
    return Run(*(line[field] for field in Run._fields))


class Row(NamedTuple):
    """One line of the table: a method over its seeds."""

    title: str
    lamda: float | str | None
    runs: list[list[Accuracies]]  # seed -> stage -> accuracies


def _spread(values: Sequence[float | None], signed: bool = False) -> str:
    """Mean and sample standard deviation in percent."""
    if any(value is None for value in values):
        return "-"
    numbers = [100 * value for value in values if value is not None]
    mean = f"{statistics.fmean(numbers):{'+' if signed else ''}.1f}"
    return f"{mean} ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else mean


def table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Percent; methods down; the accuracies by task are those after the last task."""
    lines = [["method", "lambda", "average", "forgetting", "backward transfer", *tasks]]
    for row in rows:
        found = [scores(matrix, tasks) for matrix in row.runs]
        lines.append([
            row.title, shown(row.lamda),
            _spread([one.average for one in found]), _spread([one.forgetting for one in found]),
            _spread([one.transfer for one in found], signed=True),
            *(_spread([matrix[-1][task] for matrix in row.runs]) for task in tasks),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *body = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def cells(rows: Sequence[Row], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The table for programs: measures and accuracies of every run."""
    return [
        {
            "method": row.title, "lambda": row.lamda, "accuracies": row.runs,
            "scores": [scores(matrix, tasks)._asdict() for matrix in row.runs],
        }
        for row in rows
    ]  # fmt: skip
