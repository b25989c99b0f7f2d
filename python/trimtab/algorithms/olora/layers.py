"""The LoRA layers of a model and each task's tensors in them, found by the names PEFT gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

SIDES = {"A": ("A",), "B": ("B",), "both": ("A", "B")}
"""Argument ``side`` -> the factors whose subspaces are compared."""


class Slot(NamedTuple):
    """Where a parameter hangs, so that one which was replaced is noticed."""

    module: str
    factor: str  # "A" or "B"
    holder: Mapping[str, Any]
    key: str

    def tensor(self) -> Tensor:
        """The parameter that hangs there.

        Raises:
            ValueError: it is not whole on this process.
        """
        found = self.holder.get(self.key)
        if sharded(found):
            raise ValueError(
                f"model must have its adapters whole on every process, got {self.module} sharded "
                "(DeepSpeed ZeRO-3, FSDP or tensor parallelism); use DDP, or ZeRO-2 at most"
            )
        return found  # type: ignore[return-value]


def sharded(tensor: Any) -> bool:
    """Whether a parameter lacks a part of itself: a DTensor, ZeRO-3's, or what FSDP leaves."""
    if not isinstance(tensor, Tensor) or hasattr(tensor, "ds_id"):
        return True
    return tensor.numel() == 0 or hasattr(tensor, "placements")


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer, for every layer with LoRA adapters; a layer used twice stands here once."""
    return {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, f"lora_{f}", None), nn.ModuleDict) for f in "AB")
    }


def slots(name: str, layer: Any, task: str) -> dict[str, Slot]:
    """Factor -> slot of a task's two factors in a layer; empty where the task has none."""
    if task in layer.lora_A:
        linears = {"A": layer.lora_A[task], "B": layer.lora_B[task]}
        return {f: Slot(name, f, linear._parameters, "weight") for f, linear in linears.items()}
    if task in getattr(layer, "lora_embedding_A", ()):
        tables = {"A": layer.lora_embedding_A, "B": layer.lora_embedding_B}
        return {f: Slot(name, f, table._parameters, task) for f, table in tables.items()}
    return {}


def adapter_of(layer: Any, task: str) -> Any:
    """What a layer has as factor A of a task: a module, an embedding's parameter, or None."""
    found = layer.lora_A._modules.get(task)
    if found is None and hasattr(layer, "lora_embedding_A"):
        found = layer.lora_embedding_A._parameters.get(task)
    return found


def rows(factor: str, tensor: Tensor) -> Tensor:
    """A factor as vectors of its subspace: the rows of A, the columns of B.

    Linear, Conv1D and embedding layers alike have A (r, d_in) and B (d_out, r); those of a
    convolution have the positions of its kernel behind.
    """
    matrix = tensor if tensor.dim() == 2 else tensor.flatten(1)
    return matrix if factor == "A" else matrix.mT


def adapter_parameters(layer: Any, task: str) -> Iterator[nn.Parameter]:
    """All that a task trains in a layer: A, B, and what variants such as DoRA add."""
    for table in layer.adapter_layer_names:
        entries: Any = getattr(layer, table, ())
        if task not in entries:
            continue
        if isinstance(entries[task], nn.Module):
            yield from entries[task].parameters()
        elif isinstance(entries[task], nn.Parameter):
            yield entries[task]


def freeze(layer: Any, tasks: Iterable[str]) -> None:
    """Freezes tasks in a layer, and tells PEFT to leave them so where it can be told.

    PEFT's ``set_adapter``, ``set_requires_grad`` and ``enable_adapters`` (the end of every ``with
    model.disable_adapter()``) turn on the gradients of all active adapters; since 0.21 they leave
    out what ``frozen_peft_weight_names`` names.
    """
    for task in tasks:
        if hasattr(layer, "frozen_peft_weight_names"):
            marks = {**layer.frozen_peft_weight_names, task: tuple(layer.adapter_layer_names)}
            layer.frozen_peft_weight_names = marks
        for parameter in adapter_parameters(layer, task):
            parameter.requires_grad_(False)
            # The last step's: an optimizer that still has it would train on.
            parameter.grad = None


def thaw(layer: Any, task: str) -> None:
    """Takes back what ``freeze`` told PEFT; the next ``set_adapter`` turns the gradients on."""
    marks = dict(getattr(layer, "frozen_peft_weight_names", {}))
    if marks.get(task) == tuple(layer.adapter_layer_names):
        del marks[task]
        layer.frozen_peft_weight_names = marks
