"""The methods of the table, each trained through the tasks from where it was broken off."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from olora_data import Example, Task, UsageError
from olora_models import Learner, batches
from olora_results import Run, Store
from torch import Tensor

from trimtab.algorithms.olora import OLoRA

RELEASED = "released"
RELEASED_LONG = {
    "yelp": (0.0, 0.0), "amazon": (0.5, 0.0), "MNLI": (0.5, 0.0), "CB": (0.5, 0.0),
    "COPA": (0.5, 0.1), "QQP": (0.5, 0.1), "RTE": (0.5, 0.3), "IMDB": (0.5, 0.0),
    "SST-2": (0.5, 0.1), "dbpedia": (5.0, 0.0), "agnews": (5.0, 0.0), "yahoo": (5.0, 0.1),
    "MultiRC": (5.0, 0.0), "BoolQA": (5.0, 0.1), "WiC": (5.0, 0.3),
}  # fmt: skip
"""lamda_1 and lamda_2 of the released script of the long order; those of 1 to 3 have 0.5 and 0."""


class Method(NamedTuple):
    """How a row of the table is trained."""

    title: str
    grows: bool = False  # an adapter per task: all active, the last one trained
    norm: str | None = None  # of the penalty
    joint: bool = False  # all tasks at once


METHODS = {
    "seqlora": Method("SeqLoRA"),
    "inclora": Method("IncLoRA", grows=True),
    "olora": Method("O-LoRA", grows=True, norm="l1"),
    "olora-squared": Method("O-LoRA, squared norm", grows=True, norm="frobenius2"),
    "joint": Method("joint training", joint=True),
}


def factors(lamda: float | str, order: str, task: str) -> tuple[float, float]:
    """lamda_1 and lamda_2 for a task."""
    if lamda == RELEASED:
        return RELEASED_LONG[task] if order == "long" else (0.5, 0.0)
    return float(lamda), 0.0


def fit(
    learner: Learner, examples: Sequence[Example], options: argparse.Namespace, *, rate: float,
    seed: int, add_penalty: Callable[[], Any] | None = None,
) -> None:  # fmt: skip
    """AdamW at a constant rate, no warm-up, no weight decay; the penalty once per step."""
    learner.model.train()
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(options.epochs):
        order = torch.randperm(len(examples), generator=generator).tolist()
        for numbers in batches(order, options.batch_size):
            rows = [examples[number] for number in numbers]
            terms = learner.count(rows)
            for part in batches(rows, options.micro_batch_size or len(rows)):
                with learner.autocast():
                    loss = learner.loss(part)
                (loss / terms).backward()
            if add_penalty is not None:
                add_penalty()
            torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()


class Training:
    """One run. The model is without adapters before and after.

    The first task is the same for all but joint training: one adapter, and a penalty that is
    exactly 0. It is trained once per seed; its adapters are kept.
    """

    def __init__(
        self, learner: Learner, tasks: Sequence[Task], run: Run, store: Store,
        options: argparse.Namespace,
    ) -> None:  # fmt: skip
        self.learner, self.tasks, self.run = learner, tasks, run
        self.store, self.options = store, options
        self.method = METHODS[run.method]
        self.olora: OLoRA | None = None

    def finish(self, done: int) -> None:
        """Trains what is missing after ``done`` stages."""
        self._wrap(done)
        end = stages(self.run, self.tasks)
        for index in range(done, end):
            begin = time.perf_counter()
            self._learn(index)
            if index + 1 < end:
                self.store.save_adapters(self.run, index + 1, adapter_state(self.learner.model))
            accuracy = self._measure(index)
            name = "all" if self.method.joint else self.tasks[index].name
            self.store.add(self.run, name, accuracy)
            self.store.drop_adapters(self.run, index)
            took = time.perf_counter() - begin
            print(f"olora: {self.run}: {name}, {took:.0f} s", file=sys.stderr)
        self.learner.model = self.learner.model.unload()

    def _wrap(self, done: int) -> None:
        """Puts the adapters around the model as they were after ``done`` stages."""
        from peft import get_peft_model

        names = [f"task{i + 1}" for i in range(max(1, done) if self.method.grows else 1)]
        torch.manual_seed(self._seed(0))
        try:
            model = get_peft_model(self.learner.model, self._config(), adapter_name=names[0])
        except ValueError as error:
            raise UsageError(f"--target-modules must fit the model: {error}") from error
        for name in names[1:]:
            model.add_adapter(name, self._config())
        if done:
            self._load(model, done)
        self.learner.model = model
        if self.method.grows:
            self.olora = OLoRA(model, lamda_1=0.0, norm=self.method.norm or "l1")

    def _load(self, model: Any, done: int) -> None:
        state = self.store.adapters(self.run, done)
        if state is None or state.keys() != adapter_state(model).keys():
            raise UsageError(
                f"--out must have the adapters of {self.run} after {done} tasks; delete it to "
                "begin anew"
            )
        model.load_state_dict(state, strict=False)

    def _learn(self, index: int) -> None:
        torch.manual_seed(self._seed(index))
        first = index == 0 and not self.method.joint
        if first and self.store.adapters(self.run, 1) is not None:
            self._load(self.learner.model, 1)
            return
        add_penalty = None
        if self.olora is not None and index > 0:
            self.olora.start_task(f"task{index + 1}", self._config())
            self.olora.lamda_1, self.olora.lamda_2 = factors(
                self.run.lamda, self.options.order_name, self.tasks[index].name
            )
            add_penalty = self.olora.accumulate_grads if self.method.norm else None
        rows = [self.tasks[index]] if not self.method.joint else self.tasks
        fit(
            self.learner, [row for task in rows for row in task.train], self.options,
            rate=self.options.lr[0 if index == 0 else -1], seed=self._seed(index),
            add_penalty=add_penalty,
        )  # fmt: skip

    def _measure(self, index: int) -> dict[str, float]:
        """Accuracies on the tasks so far; on held-out rows only what lambda is chosen by."""
        last = self.method.joint or index == len(self.tasks) - 1
        if self.run.split == "held_out":
            seen = self.tasks if last else []
            return {task.name: self.learner.accuracy(task.held_out) for task in seen}
        seen = self.tasks if last else self.tasks[: index + 1]
        return {task.name: self.learner.accuracy(task.test) for task in seen}

    def _config(self) -> Any:
        from peft import LoraConfig

        options = self.options
        return LoraConfig(
            r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout,
            target_modules=options.target_modules,
        )  # fmt: skip

    def _seed(self, index: int) -> int:
        return 1000 * self.run.seed + index


def stages(run: Run, tasks: Sequence[Task]) -> int:
    """How many times a run trains."""
    return 1 if METHODS[run.method].joint else len(tasks)


def adapter_state(model: Any) -> dict[str, Tensor]:
    """Name -> tensor, of all adapters."""
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}
