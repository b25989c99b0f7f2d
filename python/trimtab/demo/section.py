"""What a section of the demo is: it runs on a shared context and returns a result to show."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.demo.corpus import EncodedCorpus, encode, read_corpus, train_tokenizer
from trimtab.demo.models import Family, Mixture, Plan, Run, Size, train_family
from trimtab.demo.tasks import Task, build_tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Heading:
    """Title of a part of a section."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells are text already; the first `labels` columns are aligned to the left."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    labels: int = 1


@dataclass(frozen=True)
class Figure:
    """A picture in the output folder."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Snippet:
    """HTML with the corpus text in it escaped; its picture is folded below."""

    html: str
    caption: str
    picture: Path


Block = Paragraph | Heading | Table | Figure | Snippet


@dataclass(frozen=True)
class Result:
    """What a section found."""

    verdict: list[str]  # sentences made from the numbers; the first one is the answer
    table: Table  # shown on the terminal and first in the report
    blocks: list[Block]
    numbers: dict[str, Any]  # for numbers.json


@dataclass(frozen=True)
class Section:
    """One algorithm's part of the demo."""

    key: str
    title: str
    run: Callable[[Context], Result]


@dataclass(frozen=True)
class Settings:
    """Everything that sets the size of the run: fixed numbers, so that machines agree."""

    max_files: int | None
    vocabulary: int
    plan: Plan
    validation_windows: int  # per domain
    task_windows: int  # per domain
    regularizations: tuple[float, ...]  # tried in the fits; infinity is the mean loss
    speed_windows: int  # in the batch of the comparison with eager
    speed_rounds: int


_MIXTURES = (
    Mixture("prose", 1.0),
    Mixture("mostly prose", 0.75),
    Mixture("mostly code", 0.25),
    Mixture("code", 0.0),
)
FULL = Settings(
    max_files=None,
    vocabulary=2048,
    plan=Plan(
        mixtures=_MIXTURES,
        sizes=(Size("small", 32, 2, 2), Size("medium", 64, 2, 4), Size("large", 128, 3, 4)),
        steps=(60, 120, 240, 480),
        batch=8,
        context=96,
        embedding_rate=0.04,
        hidden_rate=0.2,
        warmup=40,
    ),
    validation_windows=100,
    task_windows=260,
    regularizations=(math.inf, 1.0, 0.3, 0.1, 0.03, 0.01),
    speed_windows=64,
    speed_rounds=15,
)
QUICK = Settings(
    max_files=120,
    vocabulary=768,
    plan=Plan(
        mixtures=_MIXTURES[::3],
        sizes=(Size("small", 24, 1, 2), Size("large", 48, 2, 3)),
        steps=(20, 40, 80),
        batch=8,
        context=64,
        embedding_rate=0.04,
        hidden_rate=0.2,
        warmup=10,
    ),
    validation_windows=32,
    task_windows=60,
    regularizations=(math.inf, 0.3, 0.03),
    speed_windows=16,
    speed_rounds=3,
)


@dataclass
class Context:
    """What the sections share: text, tokenizer, models, the output folder."""

    out: Path
    seed: int = 0
    settings: Settings = FULL
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def corpus(self) -> EncodedCorpus:
        """The library's text in token ids."""
        with self.timed("text and tokenizer"):
            with self.bar(None, "reading the library", "file") as bar:

                def count(files: list[Path]) -> Iterator[Path]:
                    bar.reset(total=len(files))
                    for file in files:
                        yield file
                        bar.update()

                text = read_corpus(self.seed, max_files=self.settings.max_files, progress=count)
            return encode(text, train_tokenizer(text, self.settings.vocabulary))

    @cached_property
    def tasks(self) -> list[Task]:
        """The downstream tasks."""
        settings = self.settings
        return build_tasks(self.corpus, settings.plan.context, settings.task_windows, self.seed)

    @cached_property
    def family(self) -> Family:
        """The trained models."""
        return self._train(self.settings.plan, "training")

    @cached_property
    def reader(self) -> Any:
        """A model outside the family, of as much prose as code, whose states describe a text."""
        plan = self.settings.plan
        size = plan.sizes[len(plan.sizes) // 2]
        alone = replace(plan, mixtures=(Mixture("half", 0.5),), sizes=(size,))
        family = self._train(replace(alone, steps=plan.steps[-1:]), "training a reader")
        return family.model(family.checkpoints[0])

    def _train(self, plan: Plan, label: str) -> Family:
        corpus = self.corpus
        total = len(plan.runs) * plan.steps[-1]
        with self.timed("training"), self.bar(total, label, "step") as bar:

            def on_step(run: Run, step: int, loss: float) -> None:
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix_str(f"{run.name}, loss {loss:.2f}")

            return train_family(corpus, plan, self.seed, on_step)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time inside to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def bar(self, total: int | None, label: str, unit: str) -> Any:
        """A progress bar."""
        from tqdm import tqdm

        # In a log every redraw is a line.
        seconds = 0.1 if sys.stderr.isatty() else 15.0
        return tqdm(
            total=total, desc=f"{label:<19}", unit=unit, mininterval=seconds, dynamic_ncols=True
        )

    def save(self, figure: MatplotlibFigure, name: str, caption: str) -> Figure:
        """Writes a matplotlib figure as PNG."""
        path = self.out / f"{name}.png"
        # No creation date or version inside: the same numbers give the same file.
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
        return Figure(path, caption)
