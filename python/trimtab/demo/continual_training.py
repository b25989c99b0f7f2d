"""LoRA on one task after the other: sequential, incremental, O-LoRA; and on all of them at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.algorithms.olora import OLoRA
from trimtab.demo.continual import LabelTask, TaskSizes, Windows

SEQUENTIAL, INCREMENTAL, ORTHOGONAL, JOINT = "SeqLoRA", "IncLoRA", "O-LoRA", "joint training"


@dataclass(frozen=True)
class ContinualPlan:
    """Everything that sets the size of the comparison: fixed numbers, the same for all methods."""

    sizes: TaskSizes
    rank: int
    scale: int  # lora_alpha over the rank
    targets: tuple[str, ...]
    steps: int  # on every task
    batch: int
    rate: float
    lamdas: tuple[float, ...]  # tried as lamda_1 of O-LoRA
    seeds: int
    rounds: int  # in which the cost of a step is timed


@dataclass(frozen=True)
class Course:
    """One method with one seed.

    `accuracy[t, s]` is that on the test windows of task s after training on task t, NaN where task
    s had not come yet; joint training has the last row alone.
    """

    method: str
    lamda: float
    seed: int
    accuracy: Tensor  # (T, T)
    choice: float  # mean accuracy after the last task, on the windows kept apart for choices
    overlap: Tensor | None = field(default=None, repr=False)  # (T, T), of adapters of their own

    @property
    def final(self) -> Tensor:  # (T,)
        """Accuracy on every task after the last one."""
        return self.accuracy[-1]

    @property
    def average(self) -> float:
        """Mean of `final`."""
        return self.final.mean().item()

    @property
    def learnt(self) -> Tensor:  # (T,)
        """Accuracy on every task right after training on it."""
        return self.accuracy.diagonal()

    @property
    def shared(self) -> float:
        """Mean overlap of two different tasks; NaN where all share one adapter."""
        if self.overlap is None:
            return math.nan
        pairs = torch.ones_like(self.overlap).triu(1).bool()
        return self.overlap[pairs].mean().item()

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last: best accuracy so far less that at the end."""
        best = self.accuracy[:, :-1].nan_to_num(nan=0.0).amax(0)
        return (best - self.final[:-1]).mean().item()


@dataclass(frozen=True)
class Bench:
    """The model all methods start from, and the tasks in their order."""

    base: Any  # frozen
    tasks: list[LabelTask]
    plan: ContinualPlan

    @property
    def config(self) -> Any:
        """The LoRA of one task."""
        from peft import LoraConfig

        plan = self.plan
        return LoraConfig(
            r=plan.rank,
            lora_alpha=plan.scale * plan.rank,
            target_modules=list(plan.targets),
            task_type="CAUSAL_LM",
        )

    def courses(self, seed: int, on_step: Callable[[], None] = lambda: None) -> list[Course]:
        """All methods with one seed: the same adapters to start from, the same batches.

        The first task is the same for all that take one task after the other, so it is trained
        once.
        """
        model = self._adapted(seed)
        self._train(model, 0, seed, on_step=on_step)
        first = self._row(model, 0)
        found = [self._sequential(copy.deepcopy(model), first, seed, on_step)]
        for lamda in (0.0, *self.plan.lamdas):
            found.append(self._incremental(copy.deepcopy(model), first, lamda, seed, on_step))
        return [*found, self._joint(seed, on_step)]

    @property
    def steps(self) -> int:
        """Training steps of `courses`."""
        one, several = self.plan.steps, len(self.tasks) - 1
        return one + one * several * (2 + len(self.plan.lamdas)) + one * (several + 1)

    def grown(self, seed: int, lamda: float) -> OLoRA:
        """A model with an adapter of every task, none of them trained: to time steps on."""
        olora = OLoRA(self._adapted(seed), lamda_1=lamda)
        for task in self.tasks[1:]:
            olora.start_task(task.name, self.config)
        return olora

    def _adapted(self, seed: int) -> Any:
        from peft import get_peft_model

        torch.manual_seed(seed)
        name = self.tasks[0].name
        return get_peft_model(copy.deepcopy(self.base), self.config, adapter_name=name)

    def _sequential(
        self, model: Any, first: Tensor, seed: int, on_step: Callable[[], None]
    ) -> Course:
        rows = [first]
        for index in range(1, len(self.tasks)):
            self._train(model, index, seed, on_step=on_step)
            rows.append(self._row(model, index))
        return Course(SEQUENTIAL, 0.0, seed, torch.stack(rows), self._choice(model))

    def _incremental(
        self, model: Any, first: Tensor, lamda: float, seed: int, on_step: Callable[[], None]
    ) -> Course:
        """A new adapter for every task; without the penalty that is incremental LoRA."""
        olora = OLoRA(model, lamda_1=lamda)
        rows = [first]
        for index, task in enumerate(self.tasks[1:], start=1):
            torch.manual_seed(_mix(seed, index))
            olora.start_task(task.name, self.config)
            penalty = olora.penalty if lamda > 0.0 else None
            self._train(model, index, seed, penalty, on_step)
            rows.append(self._row(model, index))
        method = ORTHOGONAL if lamda > 0.0 else INCREMENTAL
        accuracy, choice = torch.stack(rows), self._choice(model)
        return Course(method, lamda, seed, accuracy, choice, olora.overlap())

    def _joint(self, seed: int, on_step: Callable[[], None]) -> Course:
        """As many steps as all tasks together have, on batches of all of them."""
        model = self._adapted(seed)
        self._train(model, None, seed, on_step=on_step)
        count = len(self.tasks)
        accuracy = torch.full((count, count), torch.nan)
        accuracy[-1] = self._row(model, count - 1)
        return Course(JOINT, 0.0, seed, accuracy, self._choice(model))

    def _train(
        self,
        model: Any,
        index: int | None,
        seed: int,
        penalty: Callable[[], Tensor] | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Adam on what requires gradients; `index` None for all tasks."""
        tasks = self.tasks if index is None else [self.tasks[index]]
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=self.plan.rate, fused=True)
        generator = torch.Generator().manual_seed(_mix(seed, -1 if index is None else index))
        for _ in range(self.plan.steps * len(tasks)):
            rows, labels = draw(tasks, self.plan.batch, generator)
            loss = F.cross_entropy(model(input_ids=rows, logits_to_keep=1).logits[:, -1], labels)
            if penalty is not None:
                loss = loss + penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            on_step()

    def _row(self, model: Any, last: int) -> Tensor:  # (T,)
        """Test accuracy on the tasks up to `last`, NaN on the others."""
        seen = self.tasks[: last + 1]
        missing = [torch.nan] * (len(self.tasks) - len(seen))
        return torch.tensor([*accuracies(model, seen, "test"), *missing])

    def _choice(self, model: Any) -> float:
        return torch.tensor(accuracies(model, self.tasks, "choice")).mean().item()


def draw(
    tasks: Sequence[LabelTask], batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # (B, L), (B,)
    """Training windows, each of a random one of the tasks, and the tokens that answer them."""
    counts = torch.randint(len(tasks), (batch,), generator=generator).bincount(minlength=len(tasks))
    rows, labels = [], []
    for task, count in zip(tasks, counts.tolist(), strict=True):
        windows = task.parts["train"]
        chosen = torch.randint(len(windows), (count,), generator=generator)
        rows.append(windows.rows[chosen])
        labels.append(task.labels[windows.answers[chosen]])
    return torch.cat(rows), torch.cat(labels)


@torch.no_grad()
def accuracies(model: Any, tasks: Sequence[LabelTask], part: str, batch: int = 128) -> list[float]:
    """Share of windows whose answer is the likeliest token of the whole vocabulary, by task.

    Batches of 32 windows stay in the cache: they take half the time of 128 on the CPU.
    """
    found = []
    for task in tasks:
        windows: Windows = task.parts[part]
        said = [
            model(input_ids=rows, logits_to_keep=1).logits[:, -1].argmax(-1)
            for rows in windows.rows.split(batch)
        ]
        right = torch.cat(said) == task.labels[windows.answers]
        found.append(right.double().mean().item())
    return found


def _mix(seed: int, index: int) -> int:
    """A seed of its own for every task of every seed; -1 is for all tasks."""
    return 1000 * seed + index + 1
