"""O-LoRA: every task learns in low-rank subspaces orthogonal to those of the tasks before it.

After Wang, Chen, Ge, Xia, Bao, Zheng, Zhang, Gui, Huang, "Orthogonal Subspace Learning for Language
Model Continual Learning", Findings of EMNLP 2023, and its released code. With one LoRA adapter per
task, those of earlier tasks frozen::

    y     = W x + sum_t s_t B_t A_t x                    s_t = alpha_t / r_t, A_t (r_t, d_in)
    loss += lamda_1 sum_{i<t} L_orth(A_i, A_t) + lamda_2 (sum over new A, B of their 2-norm)

The released code and the paper differ, so both are options. ``norm``: the code adds up the absolute
values of ``A_i A_t^T``, equation 8 their squares. ``side``: the code compares the rows of PEFT's
``lora_A``; the A of the paper's equation 2 is the up-projection, PEFT's ``lora_B``, whose columns
span the subspace (its authors say that ``lora_A`` is meant). The defaults are the code's. The paper
does not define the second term; it is the code's. (PEFT's ``init_lora_weights="olora"`` is another
method.)
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from trimtab.algorithms.olora.layers import SIDES, adapter_parameters, freeze, lora_layers, thaw
from trimtab.algorithms.olora.overlap import module_name, overlap_table, principal_cosines
from trimtab.algorithms.olora.peft_model import (
    add_adapter,
    check_config,
    check_mergeable,
    check_name,
    check_peft,
    find_active_task,
    note_active,
)
from trimtab.algorithms.olora.subspaces import Subspaces
from trimtab.ops.orthogonal import orthogonal_penalty

__all__ = ["OLoRA"]

NORMS = ("l1", "frobenius2")


class OLoRA:
    """Continual learning on stock PEFT: one adapter per task, each orthogonal to those before.

    Takes the model's active adapter as the task in training and every other adapter as finished,
    in the order in which they were added; freezes the finished ones and activates all of them
    together. In a loop of your own::

        olora = OLoRA(get_peft_model(base, LoraConfig(...), adapter_name="yelp"))
        ...                               # train: loss = model(...).loss + olora.penalty()
        olora.start_task("amazon", LoraConfig(...))
        ...                               # a new optimizer over what requires grad

    For ``transformers.Trainer`` see ``trimtab.OLoRACallback``. Tasks may differ in rank, targets
    and dropout. ``lamda_1`` and ``lamda_2`` are plain attributes: the released scripts set them
    anew for every task (0 to 5 and 0 to 0.3).

    PEFT's ``save_pretrained``, ``load_adapter`` and the like work as ever. A call that changes
    which adapters are active, such as ``set_adapter``, is found out by ``penalty`` and undone by
    ``activate``. To train a finished task again, make it PEFT's active adapter and make a new
    ``OLoRA``.

    Args:
        model: a ``peft.PeftModel`` with LoRA adapters on any base, also a quantised one; or a model
            into which LoRA was injected (``inject_adapter_in_model``, transformers' own
            ``add_adapter``), which can do all but ``merge`` and ``save``.
        lamda_1: factor of the orthogonality penalty. 0 skips it.
        lamda_2: factor of the norms of the new A and B. 0 skips them.
        norm: "l1" (released code) or "frobenius2" (paper, equation 8).
        side: "A" (released code), "B" (paper, read by the letter) or "both", their sum.
        impl: implementation of ``orthogonal_penalty``; None for the fastest available.

    Raises:
        ValueError: no LoRA adapters, more than one active adapter in training, a setting of an
            adapter that can't be had once per task (``modules_to_save``, ``bias``,
            ``trainable_token_indices``, ``target_parameters``, ``layer_replication``), sharded
            parameters, or an argument out of range.
        ImportError: PEFT is missing or older than 0.13.
    """

    def __init__(
        self,
        model: Any,
        *,
        lamda_1: float = 0.5,
        lamda_2: float = 0.0,
        norm: str = "l1",
        side: str = "A",
        impl: str | None = None,
    ) -> None:
        for name, value, known in (("norm", norm, NORMS), ("side", side, tuple(SIDES))):
            if value not in known:
                raise ValueError(
                    f"{name} must be one of {known}, got {value!r}; {known[0]!r} is the released "
                    "code"
                )
        self.model, self._norm, self._side, self.impl = model, norm, side, impl
        self.lamda_1, self.lamda_2 = lamda_1, lamda_2
        self._factors()
        check_peft()
        self._current: str | None = find_active_task(model)
        for place, (name, config) in enumerate(model.peft_config.items()):
            check_config(config, place)
            check_name(model, name)
        self.activate()

    @property
    def norm(self) -> str:
        """As given."""
        return self._norm

    @property
    def side(self) -> str:
        """As given."""
        return self._side

    @property
    def task(self) -> str | None:
        """The task in training, None when all are finished."""
        return self._current

    @property
    def finished(self) -> list[str]:
        """The finished tasks, in order."""
        return [name for name in self.model.peft_config if name != self._current]

    def start_task(self, name: str, config: Any) -> None:
        """Adds an adapter and trains it alone, with all of them active.

        The task before is finished if it is still open. An optimizer holds the parameters that it
        was made with, so make a new one (a new ``Trainer``).

        The new weights are drawn from a stream of torch's generator and the number of tasks:
        Trainer sets the same seed for every task, and tasks that draw the same numbers begin in
        the same subspace (as those of the released scripts do), from which training has to turn
        them away.

        Args:
            name: of the adapter, as PEFT has it.
            config: its ``peft.LoraConfig``, which is copied.

        Raises:
            ValueError: a name in use or one that PEFT or Trainer can't handle, or a config as in
                the class; the task before then stays open.
        """
        if not isinstance(name, str) or not name or set(name) & set("./\\"):
            raise ValueError(
                f"name must be a string that can name a folder, got {name!r}; use one without "
                "dots and slashes"
            )
        if name in self.model.peft_config or name == "default":
            raise ValueError(
                f"name must be new and not 'default', got {name!r}; PEFT saves 'default' in "
                "another place, where Trainer does not look once there are other adapters"
            )
        check_name(self.model, name)
        check_config(config, len(self.model.peft_config))
        self.activate()  # says what is wrong before anything is changed
        before = self._current
        try:
            with _own_stream(len(self.model.peft_config)):
                add_adapter(self.model, name, copy.deepcopy(config))
            self._current = name
            self.activate()
        except BaseException:
            self._current = before
            self.activate()
            raise

    def finish_task(self) -> None:
        """Freezes the task in training; it stays active.

        Raises:
            RuntimeError: there is none.
        """
        self._need_task("finish_task")
        self._current = None
        self.activate()

    def activate(self) -> None:
        """Makes all adapters active and the task in training the only one with gradients.

        For after calls that changed that: PEFT's ``set_adapter``, ``delete_adapter``,
        ``load_adapter``. Adapters that were added behind the back count as finished.

        Raises:
            RuntimeError: merged adapters, or the task in training was deleted.
            ValueError: sharded parameters.
        """
        layers, finished = lora_layers(self.model), self.finished
        if not layers:
            raise RuntimeError(
                "model must have LoRA layers, got none, as after merge; make a new OLoRA"
            )
        if self._current is not None and self._current not in self.model.peft_config:
            raise RuntimeError(
                f"model must have the adapter {self._current!r} in training, got "
                f"{list(self.model.peft_config)}; make a new OLoRA"
            )
        if any(layer.merged for layer in layers.values()):
            raise RuntimeError(
                "model must not be merged in training, got merged adapters; call "
                "model.unmerge_adapter()"
            )
        for layer in layers.values():
            if self._current is not None:
                thaw(layer, self._current)
            if layer.disable_adapters:
                layer.enable_adapters(True)
            # In their order: PEFT's DoRA scales all that the adapters before it have added.
            layer.set_adapter(list(self.model.peft_config))
            freeze(layer, finished)
        # Trainer, when it resumes, makes an optimizer for the first active adapter alone.
        note_active(self.model, self.tasks()[::-1])
        self._subspaces = Subspaces(layers, finished, self._current, self.side)

    def penalty(self) -> Tensor:  # ()
        """The penalty of the task in training, to be added to its loss once per optimizer step.

        ``lamda_1 * orthogonal_penalty(finished tasks, task) + lamda_2 * sum of 2-norms``: exactly 0
        for the first task with ``lamda_2`` 0. The gradient of a norm at 0 is 0. With k micro-steps
        per optimizer step, add ``penalty() / k`` to each loss of a mean, or ``penalty()`` once; the
        released code adds it undivided to each, an effective ``lamda_1 * k``.

        Cost: that of ``orthogonal_penalty``, one call per device. The tensors are collected once
        per task; a call looks whether they are still the model's, and collects anew if not.

        Returns:
            A scalar, float32 (float64 with float64 adapters), on the device of the adapters.

        Raises:
            RuntimeError: no task in training, or not all adapters active: the forward pass would
                leave tasks out.
            ValueError: sharded parameters.
        """
        first, second = self._factors()
        self.check("penalty")
        found = self._subspaces
        total = found.zero()
        if first != 0.0:
            for previous, current in found.compared():
                value = orthogonal_penalty(previous, current, norm=self.norm, impl=self.impl)
                total = total + first * value.to(total)
        if second != 0.0:
            for norm in found.norms():
                total = total + second * norm.to(total)
        return total

    def accumulate_grads(self, scaler: Any = None) -> Tensor:  # ()
        """Adds the penalty's gradient to ``.grad``, as its backward would; once per optimizer step.

        For loops with micro-steps, mixed precision or DDP: call it anywhere between
        ``optimizer.zero_grad()`` and unscaling, clipping or stepping, but not between a forward
        pass and its backward. Under DDP every process adds the same, and their mean is the same.

        Args:
            scaler: the ``GradScaler`` of the loop, if any; its scale is applied without a
                synchronisation.

        Returns:
            The penalty, detached.

        Raises:
            RuntimeError, ValueError: as ``penalty``.
        """
        with torch.enable_grad():
            value = self.penalty()
            if not value.requires_grad:
                return value
            scaled = value if scaler is None else scaler.scale(value)
            tensors = self._subspaces.trainable()
            # Not backward(): that would set off the hooks by which DDP counts gradients.
            grads = torch.autograd.grad(scaled, tensors, allow_unused=True)
        for tensor, grad in zip(tensors, grads, strict=True):
            if grad is None:
                continue
            if tensor.grad is None:
                tensor.grad = grad.contiguous()
            else:
                tensor.grad.add_(grad)
        return value.detach()

    def overlap(self, *, per_module: bool = False) -> Tensor:  # (T, T) or (M, T, T)
        """How much the tasks' subspaces have in common: mean squared cosine of principal angles.

        With orthonormal rows Q_s, Q_t of two tasks in a module and k the smaller of their ranks,
        ``||Q_s Q_t^T||_F^2 / k``: the mean of the squared cosines of their k principal angles. 1 is
        one inside the other, 0 orthogonal; random subspaces have about max(r) / d.

        Args:
            per_module: each module (and side) for itself, in the order of ``modules()``.

        Returns:
            Symmetric, float32, on the CPU, tasks in the order of ``tasks()``; the mean over the
            modules that both tasks adapt. NaN where there is none, or a task's matrix is zero.
        """
        tasks = self.tasks()
        tables = torch.stack([overlap_table(m, tasks) for m in self._fresh().modules])
        return tables if per_module else tables.nanmean(0)

    def principal_cosines(self, first: str, second: str) -> dict[str, Tensor]:
        """Cosines of the principal angles between two tasks in every module that both adapt.

        Args:
            first: a task.
            second: another.

        Returns:
            Name of the module, with the side behind -> (k,) cosines, descending, k the smaller of
            the two ranks.
        """
        for name in (first, second):
            if name not in self.tasks():
                raise ValueError(f"first and second must be of {self.tasks()}, got {name!r}")
        return {
            module_name(module): principal_cosines(module, first, second)
            for module in self._fresh().modules
            if first in module and second in module
        }

    def parameters(self) -> list[Tensor]:
        """What the task in training trains, for an optimizer; empty when all are finished."""
        if self._current is None:
            return []
        layers = lora_layers(self.model).values()
        found = [p for layer in layers for p in adapter_parameters(layer, self._current)]
        return [p for p in found if p.requires_grad]

    def tasks(self) -> list[str]:
        """All tasks in order, the one in training last."""
        return [*self.finished, *([] if self._current is None else [self._current])]

    def modules(self) -> list[str]:
        """The modules of ``overlap(per_module=True)``: names, with the side behind."""
        return [module_name(module) for module in self._fresh().modules]

    def merge(self) -> Any:
        """Finishes, and merges all tasks into the base weights through PEFT's own merge.

        Merging is for the end: a task learnt on merged weights can't be told from them.

        Returns:
            The base model, without adapters.

        Raises:
            ValueError: not a ``PeftModel``, a weight with LoRA that is tied to another, or DoRA
                among several adapters and PEFT before 0.21: it would merge something else.
        """
        tasks = self.tasks()
        check_mergeable(self.model, tasks)
        if self._current is not None:
            self.finish_task()
        return self.model.merge_and_unload(adapter_names=tasks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves all tasks as PEFT does, and their order and the settings in ``olora.json``.

        Plain PEFT opens every task: ``PeftModel.from_pretrained(base, f"{path}/{task}",
        adapter_name=task)``; that of the name "default" lies in ``path`` itself. Of several
        processes one should call it.

        Args:
            path: a folder; made if it is not there.

        Raises:
            ValueError: not a ``PeftModel``.
            RuntimeError: the model was merged.
        """
        from trimtab.algorithms.olora import files

        files.save(self, path)

    @classmethod
    def load(cls, model: Any, path: str | os.PathLike[str], **changes: Any) -> OLoRA:
        """The whole sequence of ``save``, or of a Trainer's checkpoint with ``OLoRACallback``.

        A task that was in training when it was saved is in training again.

        Args:
            model: the base model, without adapters. It is wrapped: use ``.model`` of the result.
            path: the folder.
            changes: arguments of ``OLoRA`` to take instead of the saved ones.

        Raises:
            FileNotFoundError: no such folder, or no ``olora.json`` in it.
            ValueError: files that do not fit each other or the model.
        """
        from trimtab.algorithms.olora import files

        wrapped, index = files.load(model, path)
        olora = cls(wrapped, **{**index["settings"], **changes})
        if index["training"] is None:
            olora.finish_task()
        return olora

    def settings(self) -> dict[str, Any]:
        """What ``OLoRA(model, **settings)`` needs to be made again."""
        lamda_1, lamda_2 = self._factors()
        return {"lamda_1": lamda_1, "lamda_2": lamda_2, "norm": self.norm, "side": self.side}

    def check(self, caller: str) -> None:
        """Refreshes what was replaced and freezes what was thawed, or says what is wrong.

        Raises:
            RuntimeError: as ``penalty``.
        """
        self._need_task(caller)
        self._fresh()
        problem = self._subspaces.problem()
        if problem is not None:
            raise RuntimeError(
                f"model must have all tasks active and {self._current!r} in training, got "
                f"{problem}; call OLoRA.activate()"
            )

    def _fresh(self) -> Subspaces:
        """The tensors as they are now; what PEFT thawed of finished tasks is frozen again."""
        found = self._subspaces
        if not found.hold(self.model.peft_config):
            found = Subspaces(lora_layers(self.model), self.finished, self._current, self.side)
            self._subspaces = found
        if found.thawed():
            for layer in found.layers.values():
                freeze(layer, found.finished)
        return found

    def _need_task(self, caller: str) -> None:
        if self._current is None:
            raise RuntimeError(
                f"{caller} must have a task in training, got all finished; call start_task"
            )

    def _factors(self) -> tuple[float, float]:
        """The two factors, checked: they are attributes that anyone may set."""
        for name in ("lamda_1", "lamda_2"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0.0 <= float(value) < math.inf:
                raise ValueError(
                    f"{name} must be a finite number from 0 on, got {value!r}; 0.5 and 0 are the "
                    "released code's lamda_1 and lamda_2"
                )
        return float(self.lamda_1), float(self.lamda_2)


@contextmanager
def _own_stream(place: int) -> Iterator[None]:
    """Random numbers that depend on torch's generator and on how many tasks there are."""
    seed = int(torch.randint(2**62, ())) + place
    state = torch.get_rng_state()
    # Not torch.manual_seed, which seeds CUDA too; PEFT draws on the CPU.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
