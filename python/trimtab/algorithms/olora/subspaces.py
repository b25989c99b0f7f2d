"""The tensors of all tasks, collected once, in the lists that the operator takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.algorithms.olora.layers import (
    SIDES,
    Slot,
    adapter_of,
    adapter_parameters,
    rows,
    slots,
)


class Compared(NamedTuple):
    """Modules on one device that the task in training shares with finished ones."""

    factors: list[str]  # "A" or "B"
    previous: list[list[Tensor]]
    current: list[Tensor]


class Subspaces:
    """Which tensors the penalty reads, and whether they are still those of the model.

    The published loop looks for the partner of each tensor among all parameters, in every
    micro-step; here that is done once per task, and again when something was replaced.

    Args:
        layers: name -> LoRA layer.
        finished: the tasks before, in order.
        current: the task in training, if any.
        side: whose rows, a key of ``SIDES``.

    Raises:
        ValueError: sharded parameters.
    """

    def __init__(
        self, layers: Mapping[str, Any], finished: Sequence[str], current: str | None, side: str
    ) -> None:
        self.layers, self.finished, self.current = layers, list(finished), current
        self._tasks = {*finished} if current is None else {*finished, current}
        self.modules: list[dict[str, Slot]] = []
        """Task -> slot, for every module and side that any task adapts."""
        self._trained: dict[torch.device, list[Tensor]] = {}
        self._compared: dict[torch.device, Compared] = {}
        # PEFT adds and deletes an adapter in all layers at once: the first one tells of all.
        self._firsts: dict[str, tuple[Any, Any, list[Slot]]] = {}
        held: list[Slot] = []
        self._frozen: list[Tensor] = []
        for name, layer in layers.items():
            for task in finished:
                self._frozen += adapter_parameters(layer, task)
            pairs = {task: slots(name, layer, task) for task in (*finished, current) if task}
            pairs = {task: pair for task, pair in pairs.items() if pair}
            for task, pair in pairs.items():
                first = layer, adapter_of(layer, task), list(pair.values())
                self._firsts.setdefault(task, first)
            for slot in pairs.get(current or "", {}).values():
                tensor = slot.tensor()
                self._trained.setdefault(tensor.device, []).append(tensor)
                held.append(slot)
            if pairs:
                self.modules += [{t: pairs[t][f] for t in pairs} for f in SIDES[side]]
        for module in self.modules:
            self._compare(module)
        held += [slot for module in self.modules for slot in module.values()]
        self._held = [(slot.holder, slot.key, slot.tensor()) for slot in held]
        self._are_rows = all(
            factor == "A" and tensor.dim() == 2
            for group in self._compared.values()
            for factor, tensor in zip(group.factors, group.current, strict=True)
        )

    def _compare(self, module: Mapping[str, Slot]) -> None:
        earlier = [module[task].tensor() for task in self.finished if task in module]
        if self.current is None or self.current not in module or not earlier:
            return
        slot = module[self.current]
        tensor = slot.tensor()
        group = self._compared.setdefault(tensor.device, Compared([], [], []))
        group.factors.append(slot.factor)
        group.previous.append(earlier)
        group.current.append(tensor)

    def hold(self, adapters: Mapping[str, Any]) -> bool:
        """Whether the model still has these adapters, and these parameters in them."""
        return (
            adapters.keys() == self._tasks
            and all(adapter_of(layer, task) is found
                    for task, (layer, found, _) in self._firsts.items())
            and all(holder.get(key) is tensor for holder, key, tensor in self._held)
        )  # fmt: skip

    def thawed(self) -> bool:
        """Whether something turned on gradients of a finished task, as PEFT below 0.21 does."""
        return any(parameter.requires_grad for parameter in self._frozen)

    def problem(self) -> str | None:
        """Why a forward pass would not be that of all tasks with the current one in training."""
        if self.current not in self._firsts:
            return f"no layer with {self.current!r}"
        layer, _, pair = self._firsts[self.current]
        if layer.merged:
            return "merged adapters"
        if layer.disable_adapters:
            return "disabled adapters"
        if set(layer.active_adapters) != self._tasks:
            return f"active adapters {layer.active_adapters}"
        if not any(slot.tensor().requires_grad for slot in pair):
            return f"{self.current!r} frozen"
        return None

    def zero(self) -> Tensor:  # ()
        """0 in the penalty's dtype, on the device of the first module."""
        # Not the device of the key: a model that was moved since keeps its parameters.
        like = next(iter(self._trained.values()))[0]
        return torch.zeros((), dtype=_wide(like), device=like.device)

    def compared(self) -> Iterator[tuple[list[list[Tensor]], list[Tensor]]]:
        """For each device what ``orthogonal_penalty`` takes as ``previous`` and ``current``."""
        for factors, previous, current in self._compared.values():
            if self._are_rows:
                yield previous, current
            else:
                yield (
                    [[rows(f, t) for t in ts] for f, ts in zip(factors, previous, strict=True)],
                    [rows(f, t) for f, t in zip(factors, current, strict=True)],
                )

    def norms(self) -> Iterator[Tensor]:
        """For each device the sum of the 2-norms of the tensors in training."""
        for tensors in self._trained.values():
            norms = [torch.linalg.vector_norm(t, dtype=_wide(t)) for t in tensors]
            yield torch.stack(norms).sum()

    def trainable(self) -> list[Tensor]:
        """A and B of the task in training, where they have gradients."""
        return [t for tensors in self._trained.values() for t in tensors if t.requires_grad]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
