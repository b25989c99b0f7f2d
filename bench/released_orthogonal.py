"""The released code's way to the penalty: a walk over all parameters for every adapter.

O-LoRA's trainer (cmnfriend/O-LoRA, ``src/uie_trainer_lora.py``) finds an adapter's partner by its
name. What that costs depends on how many parameters the model has and how deep they lie, not on
their sizes: here the trees have the names of real models, and every weight that is no part of the
penalty is a single number. Dropouts and activations, which have no parameters, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Module, Parameter

_LLAMA_PREFIX = "base_model.model.model."
_LLAMA_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_LLAMA_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
_T5_PREFIX = "base_model.model."
_T5_MLP = ("DenseReluDense.wi", "DenseReluDense.wo")


def _llama(modules: int, targets: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Modules with weights, and whether an adapter sits on them."""
    yield _LLAMA_PREFIX + "embed_tokens", False
    for layer in range(modules // len(targets)):
        for name in (*_LLAMA_ATTENTION, *_LLAMA_MLP, *_LLAMA_NORMS):
            yield f"{_LLAMA_PREFIX}layers.{layer}.{name}", name in targets
    yield _LLAMA_PREFIX + "norm", False
    yield "base_model.model.lm_head", False


def _t5(modules: int) -> Iterator[tuple[str, bool]]:
    """The same for T5: a layer of each stack has three attentions together, q and v of each."""
    yield _T5_PREFIX + "shared", False
    for stack, attentions in (("encoder", ("SelfAttention",)),
                              ("decoder", ("SelfAttention", "EncDecAttention"))):  # fmt: skip
        for block in range(modules // 6):
            layers = f"{_T5_PREFIX}{stack}.block.{block}.layer"
            for i, attention in enumerate(attentions):
                for name in "qkvo":
                    yield f"{layers}.{i}.{attention}.{name}", name in "qv"
                if block == 0 and i == 0:
                    yield f"{layers}.{i}.{attention}.relative_attention_bias", False
                yield f"{layers}.{i}.layer_norm", False
            for name in (*_T5_MLP, "layer_norm"):
                yield f"{layers}.{len(attentions)}.{name}", False
        yield f"{_T5_PREFIX}{stack}.final_layer_norm", False


MODELS: dict[str, Callable[[int], Iterator[tuple[str, bool]]]] = {
    "llama q,v": lambda modules: _llama(modules, ("self_attn.q_proj", "self_attn.v_proj")),
    "llama all-linear": lambda modules: _llama(modules, (*_LLAMA_ATTENTION, *_LLAMA_MLP)),
    "t5 q,v": _t5,
}
"""Name -> for a number of adapters, ``(path of a module with a weight, has an adapter)``."""


def tree(model: str, previous: Sequence[Parameter], current: Sequence[Parameter]) -> Module:
    """A module tree with the model's names; the m-th adapter holds the m-th of both lists."""
    root, m = Module(), 0
    for path, has_adapter in MODELS[model](len(current)):
        _register(root, path + ".weight", _number())
        if has_adapter:
            parts = {"lora_A": previous[m], "lora_B": _number(),
                     "loranew_A": current[m], "loranew_B": _number()}  # fmt: skip
            for part, parameter in parts.items():
                _register(root, f"{path}.{part}.default.weight", parameter)
            m += 1
    if m != len(current):
        raise ValueError(f"{model} has {m} adapters, not {len(current)}")
    return root


def _number() -> Parameter:
    return Parameter(torch.zeros(1), requires_grad=False)


def _register(root: Module, name: str, parameter: Parameter) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, Module())
        root = root.get_submodule(part)
    root.register_parameter(last, parameter)


def walked_penalty(model: Module) -> Tensor:
    """The sum of absolute products, each partner looked up in a walk over all parameters."""
    total: Tensor | int = 0
    for name, previous in model.named_parameters():
        if "lora_A" not in name:
            continue
        place = name.split("lora_A")[0]
        for other, current in model.named_parameters():
            if "loranew_A" in other and other.split("loranew_A")[0] == place:
                total = total + torch.mm(previous, current.T).abs().sum()
                break
    return torch.as_tensor(total)
