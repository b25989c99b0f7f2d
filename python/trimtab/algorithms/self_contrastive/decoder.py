"""Contexts of one model that grow together: one forward pass per token for all, with one cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.algorithms.self_contrastive.prompts import Prompts

# A padded row against the same row alone: rms difference of the logits over their standard
# deviation. Random weights on the CPU, where padding is masked: at most 5e-7 in float32, 3.1e-2 in
# bfloat16 (LLaMA, 32 layers; one logit off by 1.3e-1). Where it is not: 6e-2 (RecurrentGemma), 0.16
# (RWKV) to 0.9 (Bart). TF32 rounds to an eighth of what bfloat16 does.
_TOLERANCE, _TOLERANCE_16_BIT = 0.02, 0.1


class Decoder:
    """Next-token logits of R contexts under one causal LM.

    Positions count from each row's first real token, for models with absolute and with rotary
    positions alike; where no row is padded, they are the model's own. Only the last position's
    logits are made where the model can be told so. The model stays in the mode, training or
    evaluation, that it is in.

    Not every model tells padding from text: some take no positions, some pass over the mask. So
    where rows are padded, the shortest also runs alone, once, and has to get the same logits: the
    root mean square of the difference must not exceed 2 % of their standard deviation, or 10 % with
    16-bit weights or under autocast, where a lesser error can't be told from rounding. A model in
    training mode (dropout) and prompts with ``model_inputs`` are not checked.

    Args:
        model: Hugging Face causal LM, also compiled or with an adapter.
        use_cache: keep keys and values; else every step runs the whole contexts again.
        model_inputs: further inputs of the forward pass over the prompts, as ``pixel_values``.

    Raises:
        ValueError: a model that ``model_arguments`` refuses.
    """

    def __init__(
        self,
        model: Any,
        *,
        use_cache: bool = True,
        model_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        accepted = model_arguments(model)
        self.model, self.use_cache = model, use_cache
        self.model_inputs = dict(model_inputs or {})
        self._takes_positions = "position_ids" in accepted
        names = ("logits_to_keep", "num_logits_to_keep")  # the second is before transformers 4.50
        self._last_only = {name: 1 for name in names if name in accepted}
        self._rope = _length_dependent_rope(model)
        self._cache: Any = None

    def prefill(self, prompts: Prompts) -> Tensor:
        """Logits after the prompts, (R, V).

        Raises:
            ValueError: the model does not tell padding from text, has no cache to go on with, or
                can't be exact at these lengths.
        """
        self._ids, self._mask = prompts
        self._padded = not bool(self._mask.all())
        self._cache = None
        if self._rope is not None:
            lengths = self._mask.sum(1)
            self._shortest, self._longest = int(lengths.min()), int(lengths.max())
            self._check_lengths(self._longest)
        logits = self._forward(self._ids, self.model_inputs)
        if (
            self._padded
            and not self.model_inputs
            and not getattr(_inner(self.model), "training", False)
        ):
            self._check_padding(logits)
        return logits

    def append(self, tokens: Tensor) -> Tensor:  # (R,)
        """Logits (R, V) after one more token each.

        Raises:
            ValueError: the contexts have reached a length where the model's cache is wrong.
        """
        if self._rope is not None:
            self._shortest, self._longest = self._shortest + 1, self._longest + 1
            self._check_lengths(self._longest - 1)
        last = tokens[:, None].to(self._ids.device)
        self._mask = torch.cat([self._mask, torch.ones_like(last, dtype=torch.bool)], 1)
        if self.use_cache:
            return self._forward(last, {})
        self._ids = torch.cat([self._ids, last], 1)
        return self._forward(self._ids, self.model_inputs)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may be left out or stand twice."""
        rows = rows.to(self._mask.device)
        self._mask = self._mask[rows]
        if self.use_cache:
            self._cache.reorder_cache(rows)
        else:
            self._ids = self._ids[rows]
            self.model_inputs = {
                name: value[rows] if isinstance(value, Tensor) else value
                for name, value in self.model_inputs.items()
            }

    def _forward(self, ids: Tensor, model_inputs: Mapping[str, Any]) -> Tensor:
        inputs: dict[str, Any] = {**self._last_only, **model_inputs}
        # Without padding there is no mask, so that attention may take its causal fast path, and the
        # model counts positions itself: some (Roberta) don't begin at 0.
        if self._padded:
            inputs["attention_mask"] = self._mask.long()
        if self._padded and self._takes_positions:
            positions = (self._mask.long().cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -ids.shape[1] :]
        if self._cache is not None:
            inputs["past_key_values"] = self._cache
        output = self.model(input_ids=ids, use_cache=self.use_cache, **inputs)
        if self.use_cache:
            self._cache = getattr(output, "past_key_values", None)
            if not hasattr(self._cache, "reorder_cache"):
                raise ValueError(
                    f"use_cache must be False for {type(self.model).__name__}, got True and no "
                    "cache of keys and values from it; set use_cache=False"
                )
        return output.logits[:, -1]

    def _check_padding(self, logits: Tensor) -> None:  # (R, V)
        row = int(self._mask.sum(1).argmin())
        ids = self._ids[row][self._mask[row]][None]
        alone = self.model(input_ids=ids, use_cache=False, **self._last_only).logits[0, -1].float()
        together = logits[row].float()
        # Tokens that a model rules out are -inf in both; NaN is found where tokens are chosen.
        known = alone.isfinite() & together.isfinite()
        alone, together = alone[known], together[known]
        error = (together - alone).square().mean().sqrt() / alone.std()
        if bool(error > self._tolerance(logits)):
            raise ValueError(
                f"model must tell padding from text, got {type(self.model).__name__}, whose logits "
                f"for row {row} of the stacked prompts change by {100 * float(error):.0f} % of "
                "their standard deviation with padding; use ContrastiveLogitsProcessor in generate "
                "with one prompt at a time, which pads nothing"
            )

    def _tolerance(self, logits: Tensor) -> float:
        wide = (torch.float32, torch.float64)
        weights = getattr(_inner(self.model), "dtype", logits.dtype)
        exact = logits.dtype in wide and weights in wide
        if exact and not torch.is_autocast_enabled(logits.device.type):
            return _TOLERANCE
        return _TOLERANCE_16_BIT

    def _check_lengths(self, before: int) -> None:
        """Refuse the lengths now reached if keys, or other rows, have other frequencies."""
        kind, limit = self._rope or ("", 0)
        shortest, longest = self._shortest, self._longest
        if longest <= limit:
            return
        # LongRoPE has one set of frequencies below the limit and one above it; dynamic NTK has one
        # for each length above. A forward pass takes that of its longest row, for all rows.
        if kind == "longrope":
            fits = shortest > limit and (not self.use_cache or before > limit)
        else:
            fits = shortest == longest and not self.use_cache
        if not fits:
            raise ValueError(
                f"contexts must not grow beyond original_max_position_embeddings ({limit}) of a "
                f"model with {kind} RoPE, got {shortest} to {longest} tokens and "
                f"use_cache={self.use_cache}, where one set of frequencies does not fit all keys; "
                "make them shorter"
            )


def input_device(model: Any, default: torch.device) -> torch.device:
    """Where a model wants its token ids."""
    if hasattr(model, "get_input_embeddings"):
        return model.get_input_embeddings().weight.device
    return getattr(model, "device", default)


def model_arguments(model: Any) -> set[str]:
    """Names of what a model's forward pass takes.

    Raises:
        ValueError: an encoder-decoder model, one with prompt learning of PEFT, or a wrapper that
            does not say what it takes, as DataParallel.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model must be a decoder, got an encoder-decoder model {name}; its prompts go to the "
            "encoder, which is not supported"
        )
    refuse_prompt_learning(model)
    inner = _inner(model)
    accepted = set(inspect.signature(getattr(inner, "forward", inner)).parameters)
    if "input_ids" not in accepted:
        has_module = isinstance(getattr(model, "module", None), torch.nn.Module)
        raise ValueError(
            "model must have a forward pass that takes input_ids by name, got the wrapper "
            f"{name}; pass the inner model{', model.module' if has_module else ''}"
        )
    return accepted


def refuse_prompt_learning(model: Any) -> None:
    """Refuse PEFT's prompt tuning and its like, whose virtual tokens stand in front of a prompt.

    Raises:
        ValueError: the model's active adapter is one of these.
    """
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(
            f"model must have no prompt learning of PEFT, got {type(adapter).__name__}; its "
            "virtual tokens fit neither cache nor mask here, use an adapter of the weights (LoRA)"
        )


def _inner(model: Any) -> Any:
    model = getattr(model, "_orig_mod", model)  # torch.compile
    # An adapter (PEFT) hands keyword arguments on to the model it wraps.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _length_dependent_rope(model: Any) -> tuple[str, int] | None:
    """Kind of a RoPE whose frequencies depend on the length, and from where on; None for others."""
    config: Any = getattr(_inner(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    # `rope_scaling` is the name before transformers 5.
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return None
    kinds = [part for part in rope.values() if isinstance(part, Mapping)] or [rope]
    for part in kinds:  # by layer type, or one for all
        kind = part.get("rope_type", part.get("type"))
        if kind in ("longrope", "dynamic"):
            limit = part.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return kind, int(limit or config.max_position_embeddings)
    return None
