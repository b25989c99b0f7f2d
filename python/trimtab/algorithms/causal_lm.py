"""A causal LM as hidden states and a head: what algorithms need of a model that makes no logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHECKED_TOKENS = 8  # positions on which the head is compared with the model's own logits


class Head(NamedTuple):
    """The way from tokens to logits: ``softcap * tanh(scale * (hidden W^T + b) / softcap)``."""

    hidden: Any  # (input_ids, attention_mask) -> hidden states (B, T, D)
    device: torch.device  # of the inputs that a model wants
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None


def find_head(
    model: Any,
    linear_weight: Tensor | None,
    linear_bias: Tensor | None,
    logit_scale: float | None,
    softcap: float | None,
) -> Head:
    """The way from tokens to logits, with what is given taken over what the model says."""
    if linear_weight is not None:
        scale = 1.0 if logit_scale is None else logit_scale
        return Head(model, linear_weight.device, linear_weight, linear_bias, scale, softcap)
    if linear_bias is not None:
        raise ValueError(
            "linear_bias must come with linear_weight, got it alone; pass both or neither"
        )
    # An adapter (PEFT) leaves its layers in the model it wraps; that one has the head.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    output = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    decoder = getattr(inner, "base_model", inner)
    if output is None or decoder is inner:
        raise ValueError(
            f"model must be a Hugging Face causal LM with a head, got {type(model).__name__}; "
            "or pass a callable for the hidden states with linear_weight"
        )
    config = inner.config.get_text_config()
    own_scale, own_softcap = logit_transform(config)
    logit_scale = own_scale if logit_scale is None else logit_scale
    softcap = own_softcap if softcap is None else softcap
    device = inner.get_input_embeddings().weight.device

    def hidden(ids: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.to(device, torch.int64)
        return decoder(input_ids=ids.to(device), attention_mask=mask, use_cache=False)[0]

    weight, bias = _head_parameters(output)
    return Head(hidden, device, weight, bias, logit_scale, softcap)


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Scale and softcap of the logits that a configuration names; 1 and None where it has none."""

    def named(name: str) -> float:
        return getattr(config, name, None) or 1.0

    # Cohere, Falcon-H1 and Muse multiply by their attribute, Granite divides by its own.
    scale = named("logit_scale") * named("lm_head_multiplier") * named("output_multiplier")
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    softcap = softcap or getattr(config, "output_logit_soft_cap", None)  # xLSTM
    return scale / named("logits_scaling"), softcap or None


def transform(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``softcap * tanh(scale * logits / softcap)`` in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_head(
    output: Any,
    hidden: Tensor,  # (..., D)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias of the one linear map that a head and its LoRA adapters (PEFT) make.

    With adapters ``x W^T + s drop(x) A^T B^T = [x, drop(x) A^T] [W, s B]^T``: input (..., D + r)
    and weight (V, D + r), so dropout and 16-bit heads lose nothing. It copies W once per call.

    Raises:
        ValueError: a head that is no linear map of ``hidden``.
    """
    output = _saved_module(output)
    base = output.base_layer if hasattr(output, "base_layer") else output
    plain = isinstance(base, torch.nn.Linear) and type(base).forward is torch.nn.Linear.forward
    adapted = base is not output and not output.disable_adapters and not output.merged
    active = [n for n in output.active_adapters if n in output.lora_A] if adapted else []
    if not plain or any(not _is_lora(output, name) for name in active):
        raise ValueError(
            "model must have an nn.Linear as its head, or one with plain LoRA adapters, got "
            f"{type(output).__name__}; leave the head out of what is quantized or adapted"
        )
    inputs, weights, bias = [hidden], [base.weight], base.bias
    for name in active:
        down, up, scale = output.lora_A[name], output.lora_B[name], output.scaling[name]
        reduced = down(output.lora_dropout[name](hidden.to(down.weight.dtype)))
        inputs.append(reduced.to(hidden.dtype))
        weights.append((scale * up.weight).to(base.weight.dtype))
        if up.bias is not None:
            more = (scale * up.bias).to(base.weight.dtype)
            bias = more if bias is None else bias + more
    if not active:
        return hidden, base.weight, bias
    return torch.cat(inputs, -1), torch.cat(weights, -1), bias


def _saved_module(output: Any) -> Any:
    """The copy of a head that PEFT trains (``modules_to_save``), or the head itself."""
    if not hasattr(output, "modules_to_save"):
        return output
    name = output.active_adapters[0] if output.active_adapters else None
    if output.disable_adapters or name not in output.modules_to_save:
        return output.original_module
    return output.modules_to_save[name]


def _is_lora(layer: Any, name: str) -> bool:
    """Whether an adapter adds a product of two matrices and no more (DoRA does more)."""
    variant = name in getattr(layer, "lora_variant", ()) or layer.use_dora.get(name)
    return isinstance(layer.lora_A[name], torch.nn.Linear) and not variant


def _head_parameters(output: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head, its LoRA adapters (PEFT) added up, differentiable in them."""
    if not hasattr(output, "base_layer"):
        return output.weight, getattr(output, "bias", None)
    base = output.base_layer
    weight, bias = base.weight, getattr(base, "bias", None)
    if output.disable_adapters:
        return weight, bias
    if output.merged or not all(_adds_up(output, name) for name in output.active_adapters):
        raise ValueError(
            "model must have a linear head, or one with unmerged LoRA adapters without dropout, "
            f"got {type(output).__name__}; leave the head out of the adapter's targets"
        )
    for name in output.active_adapters:
        delta = output.lora_B[name].weight @ output.lora_A[name].weight
        weight = weight + (output.scaling[name] * delta).to(weight.dtype)
    return weight, bias


def _adds_up(layer: Any, name: str) -> bool:
    """Whether an adapter is no more than a product of two matrices that joins the weight."""
    if name not in getattr(layer, "lora_A", ()):
        return False
    dropout = layer.lora_dropout[name]
    drops = getattr(dropout, "p", 0.0) > 0.0 and dropout.training
    return not drops and layer.lora_B[name].bias is None and not layer.use_dora.get(name)


def compare_with_model(
    model: Any, head: Head, input_ids: Tensor, lengths: Tensor, starts: Tensor
) -> None:
    """Raises unless the head on the hidden states gives the model's logits up to rounding."""
    longest = int(lengths.argmax())
    part = slice(longest, longest + 1)
    ids, _ = align(input_ids[part], starts[part], lengths[part].clamp(max=_CHECKED_TOKENS))
    wanted = model(input_ids=ids.to(head.device), use_cache=False).logits[0]
    hidden = head.hidden(ids, None)[0].to(head.weight)
    got = torch.nn.functional.linear(hidden, head.weight, head.bias)
    got = transform(got, head.scale, head.softcap)
    error = excess(got, wanted, head.weight.dtype)
    if error:
        raise ValueError(
            "model must make its logits as softcap * tanh(logit_scale * head(hidden) / softcap), "
            f"got logits of {type(model).__name__} that differ by {error:.3g}; pass logit_scale or "
            "softcap, or a callable for the hidden states with linear_weight"
        )


def excess(
    got: Tensor,
    wanted: Tensor,  # of got's shape, or no match
    dtype: torch.dtype,
) -> float:
    """Largest distance of two sets of logits, 0 if rounding in ``dtype`` explains it."""
    # Rounding of the products and of what follows them, relative to the largest logit.
    eps = max(torch.finfo(each).eps for each in (dtype, wanted.dtype))
    if got.shape != wanted.shape:
        return float("inf")
    wanted = wanted.to(got)
    error = float((got - wanted).abs().max())
    return 0.0 if error <= 16 * eps * float(wanted.abs().max()) else error


def check_text(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Length and first real position of each sequence, both (S,)."""
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(
            f"input_ids must be integers, got {input_ids.dtype}; pass the tokenizer's ids"
        )
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be (sequences, positions), got shape {tuple(input_ids.shape)}; "
            "use input_ids[None] for one sequence"
        )
    count, width = input_ids.shape
    if attention_mask is None:
        zeros = torch.zeros(count, dtype=torch.int64, device=input_ids.device)
        return zeros + width, zeros
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got "
            f"{tuple(attention_mask.shape)}; pass the one that came with them"
        )
    real = attention_mask.to(input_ids.device) != 0
    lengths, starts = real.sum(1), real.int().argmax(1)
    runs = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
    if bool((runs > 1).any()):
        raise ValueError(
            f"attention_mask must be one run of ones per sequence, got gaps in sequence "
            f"{int((runs > 1).int().argmax())}; give the parts as sequences of their own"
        )
    return lengths, starts


def align(ids: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences moved to start at position 0, cut to the longest; ids and where they are real."""
    at = torch.arange(max(int(lengths.max()), 1), device=ids.device)
    real = at < lengths[:, None]  # (B, T')
    return ids.long().gather(1, (starts[:, None] + at).clamp(max=ids.shape[1] - 1)), real


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Dropout off; afterwards each module is in the mode it was in."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
