"""What O-LoRA asks of PEFT, which is imported when a model comes along."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from trimtab.algorithms.olora.layers import adapter_of, adapter_parameters, lora_layers

MIN_PEFT = "0.13"

# Parts of a config that can't be had once per task and summed.
_REFUSED = {
    "modules_to_save": (
        "copies of a layer, one per task, can't be summed: leave the layer frozen, or train it "
        "yourself; a head is saved by the task types of classification, so take task_type=None"
    ),
    "trainable_token_indices": "they can't be summed over tasks: use LoRA on the embedding",
    "target_parameters": "factors of several experts share a matrix: target modules",
    "layer_replication": "a second adapter would replicate the layers again: replicate before",
}


# Ways to begin that put a part of the base into the adapter.
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_peft() -> None:
    """Whether PEFT can be used.

    Raises:
        ImportError: it is missing or too old.
    """
    wanted = f"pip install 'peft>={MIN_PEFT}'"
    try:
        import peft
        from packaging.version import parse
    except ImportError as error:
        raise ImportError(f"OLoRA must have PEFT, which can't be imported; {wanted}") from error
    if parse(peft.__version__) < parse(MIN_PEFT):
        raise ImportError(
            f"OLoRA must have PEFT {MIN_PEFT} or later, got {peft.__version__}; {wanted}"
        )


def find_active_task(model: Any) -> str | None:
    """The adapter in training: the one that is active; of several, the one with gradients.

    Raises:
        ValueError: no LoRA adapters, or several in training.
    """
    wrapped = not hasattr(model, "peft_config") or hasattr(model, "_orig_mod")
    layers = {} if wrapped else lora_layers(model)
    if not layers:
        raise ValueError(
            f"model must have LoRA adapters, got {type(model).__name__}; use "
            "peft.get_peft_model, and pass the model that is inside of DDP or a compiled one"
        )
    anywhere = {name for layer in layers.values() for name in layer.active_adapters}
    active = [name for name in model.peft_config if name in anywhere]
    if len(active) > 1:
        active = [name for name in active if _in_training(layers.values(), name)]
    if len(active) > 1:
        raise ValueError(
            f"model must have one active adapter in training, got {active}; call "
            "model.set_adapter with its name"
        )
    return active[0] if active else None


def _in_training(layers: Any, name: str) -> bool:
    return any(p.requires_grad for layer in layers for p in adapter_parameters(layer, name))


def check_config(config: Any, place: int) -> None:
    """Whether an adapter can be one task of several, with ``place`` others before it.

    Raises:
        ValueError: not LoRA, or a setting that can't be had once per task.
    """
    kind = getattr(config, "peft_type", None)
    if getattr(kind, "value", kind) != "LORA":
        raise ValueError(
            f"config must be a peft.LoraConfig, got {type(config).__name__}; other adapters have "
            "no factors A and B"
        )
    for field, reason in _REFUSED.items():
        value = getattr(config, field, None)
        if value:
            raise ValueError(f"{field} must be None in O-LoRA, got {value!r}; {reason}")
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"bias must be 'none' in O-LoRA, got {config.bias!r}; biases of the base are shared by "
            "all tasks, so that a later one would change the earlier: use lora_bias=True"
        )
    init = str(getattr(config, "init_lora_weights", True))
    if init.split("_niter")[0] in _REWRITING:
        raise ValueError(
            f"init_lora_weights must leave the base as it is, got {init!r}; it rewrites the base, "
            "which all tasks share: use True, 'gaussian' or 'orthogonal'"
        )
    if place and config.use_dora and config.lora_dropout:
        raise ValueError(
            f"lora_dropout must be 0 with use_dora behind other tasks, got {config.lora_dropout}; "
            "PEFT scales what they add in evaluation, but not in training with dropout"
        )


def check_name(model: nn.Module, name: str) -> None:
    """Whether PEFT can tell an adapter's weights from others by its name.

    Raises:
        ValueError: it is part of the name of a parameter, or of a method of ``nn.ModuleDict``.
    """
    parts: set[str] = set()
    for full, _ in model.named_parameters():
        words = full.split(".")
        # What stands behind lora_A and the like is the name of an adapter.
        parts.update(
            word
            for before, word in zip(["", *words], words, strict=False)
            if not before.startswith("lora_")
        )
    if name in parts or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"name must not be a word in the names of parameters, got {name!r}; PEFT would leave "
            "weights out of what it saves: take another, such as 'task_0'"
        )


def add_adapter(model: Any, name: str, config: Any) -> None:
    """Adds an adapter to a ``PeftModel``, or to a model with injected adapters.

    Raises:
        ValueError: its targets match nothing.
    """
    import peft

    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            peft.inject_adapter_in_model(config, model, adapter_name=name)
    layers = [layer for layer in lora_layers(model).values() if adapter_of(layer, name) is not None]
    if not layers:  # PEFT below 0.19 says nothing when there are adapters already
        del model.peft_config[name]
        raise ValueError(
            f"target_modules must match modules of the model, got {config.target_modules!r}, not "
            "found; see the names in model.named_modules()"
        )
    for layer in layers:
        # New modules are in training mode, also in a model that is not.
        if name in layer.lora_dropout:
            layer.lora_dropout[name].train(layer.get_base_layer().training)


def note_active(model: Any, active: Sequence[str]) -> None:
    """Tells a ``PeftModel`` what its layers have been told."""
    import peft

    if isinstance(model, peft.PeftModel):
        tuner: Any = model.base_model
        tuner.active_adapter = list(active)
        model.active_adapter = active[0]


def need_peft_model(model: Any, what: str) -> None:
    """Refuses a model with injected adapters.

    Raises:
        ValueError: it is not a ``peft.PeftModel``.
    """
    import peft

    if not isinstance(model, peft.PeftModel):
        raise ValueError(
            f"model must be a peft.PeftModel to {what}, got {type(model).__name__} with injected "
            "adapters; use peft.get_peft_model"
        )


def check_mergeable(model: Any, tasks: Sequence[str]) -> None:
    """Whether PEFT's merge gives what the adapters compute.

    Raises:
        ValueError: it would not.
    """
    import peft
    from packaging.version import parse

    need_peft_model(model, "merge")
    # Before, the norm of a DoRA adapter was taken with the others already merged.
    dora = [name for name, config in model.peft_config.items() if config.use_dora]
    if dora and len(tasks) > 1 and parse(peft.__version__) < parse("0.21"):
        raise ValueError(
            f"use_dora must be False to merge several tasks with PEFT {peft.__version__}, got "
            f"{dora} with it; use PEFT 0.21 or later"
        )
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for name, layer in lora_layers(model).items():
        if users.get(id(getattr(layer.get_base_layer(), "weight", None)), 1) > 1:
            raise ValueError(
                f"model must not tie a weight that has LoRA to another to merge, got {name}; the "
                "other would change too: untie them before"
            )
