"""Contexts of one model that grow together: one forward pass per token for all, with one cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.algorithms.self_contrastive.prompts import Prompts


class Decoder:
    """Next-token logits of R contexts under one causal LM.

    Positions count from each row's first real token, for models with absolute and with rotary
    positions alike. Only the last position's logits are made where the model can be told so. The
    model stays in the mode, training or evaluation, that it is in.

    Args:
        model: Hugging Face causal LM, also compiled or with an adapter.
        use_cache: keep keys and values; else every step runs the whole contexts again.
        model_inputs: further inputs of the forward pass over the prompts, as ``pixel_values``.

    Raises:
        ValueError: an encoder-decoder model.
    """

    def __init__(
        self,
        model: Any,
        *,
        use_cache: bool = True,
        model_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                "model must be a decoder, got an encoder-decoder model "
                f"{type(model).__name__}; its prompts go to the encoder, which is not supported"
            )
        self.model, self.use_cache = model, use_cache
        self.model_inputs = dict(model_inputs or {})
        accepted = _forward_arguments(model)
        self._takes_positions = "position_ids" in accepted
        names = ("logits_to_keep", "num_logits_to_keep")  # the second is before transformers 4.50
        self._last_only = {name: 1 for name in names if name in accepted}
        self._cache: Any = None

    def prefill(self, prompts: Prompts) -> Tensor:
        """Logits after the prompts, (R, V)."""
        self._ids, self._mask = prompts
        self._padded = not bool(self._mask.all())
        self._cache = None
        return self._forward(self._ids, self.model_inputs)

    def append(self, tokens: Tensor) -> Tensor:  # (R,)
        """Logits (R, V) after one more token each."""
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
        # Without padding there is no mask, so that attention may take its causal fast path.
        if self._padded:
            inputs["attention_mask"] = self._mask.long()
        if self._takes_positions:
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
                    "cache of keys and values from it; without a cache it works"
                )
        return output.logits[:, -1]


def input_device(model: Any, default: torch.device) -> torch.device:
    """Where a model wants its token ids."""
    if hasattr(model, "get_input_embeddings"):
        return model.get_input_embeddings().weight.device
    return getattr(model, "device", default)


def _forward_arguments(model: Any) -> set[str]:
    model = getattr(model, "_orig_mod", model)  # torch.compile
    # An adapter (PEFT) hands keyword arguments on to the model it wraps.
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(getattr(model, "forward", model)).parameters)
