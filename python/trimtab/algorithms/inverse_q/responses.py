"""Prompts with responses, checked once, and a language model seen from their response tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.algorithms.causal_lm import (
    align,
    check_text,
    compare_with_model,
    evaluation_mode,
    find_head,
)
from trimtab.ops.token_loss import TokenLogp, TokenLossOptions, linear_logp

IGNORED = -100
_PROBED_TOKENS = 8


class ResponseBatch:
    """A batch as the losses and estimators see it.

    N is the number of response tokens, counted row after row and left to right; everything per
    token is (N,) inside and (B, T) outside, 0 where there is no response.

    Args:
        batch: tensors (B, T): ``input_ids``; ``attention_mask``, one run of ones per row, padding
            on either side, None or absent for no padding; ``labels``, equal to ``input_ids`` on
            the response tokens and -100 elsewhere. The label at t is predicted from the tokens
            before it, as in Hugging Face. More entries are kept in ``given``.

    Raises:
        ValueError: a shape that does not fit, a label that is no response token, a row whose first
            token is one, or an attention mask with gaps.
        TypeError: ids that are not integers.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        for name in ("input_ids", "labels"):
            if batch.get(name) is None:
                raise ValueError(
                    f"batch must have {name!r}, got {sorted(batch)}; see ResponseBatch"
                )
        self.given = batch
        self.input_ids: Tensor = batch["input_ids"]
        self.labels: Tensor = batch["labels"].to(self.input_ids.device)
        self.attention_mask: Tensor | None = batch.get("attention_mask")
        self.lengths, self.starts = check_text(self.input_ids, self.attention_mask)
        if self.labels.shape != self.input_ids.shape:
            raise ValueError(
                f"labels must have the shape of input_ids {tuple(self.input_ids.shape)}, got "
                f"{tuple(self.labels.shape)}; -100 marks what is no response"
            )
        self.response = self.labels != IGNORED
        """Where the response tokens are, (B, T)."""
        at = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        first, end = self.starts[:, None], (self.starts + self.lengths)[:, None]
        if bool((self.response & ((at <= first) | (at >= end))).any()):
            raise ValueError(
                "labels must be -100 on padding and on the first token of a row, which nothing "
                "predicts, got a response token there; give every row a prompt"
            )
        if bool((self.labels != self.input_ids)[self.response].any()):
            raise ValueError(
                "labels must be -100 or equal to input_ids, got another token; rewards are of the "
                "tokens in the context, so don't shift labels"
            )

    @property
    def count(self) -> int:
        """N, the number of response tokens."""
        return int(self.response.sum())

    @property
    def target(self) -> Tensor:
        """The response tokens, (N,)."""
        return self.input_ids[self.response].long()

    def aligned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, where they are real, and where the response is, every row starting at position 0."""
        ids, real = align(self.input_ids, self.starts, self.lengths)
        response, _ = align(self.response, self.starts, self.lengths)
        return ids, real, response.bool() & real

    def spread(self, values: Tensor) -> Tensor:  # (N,) -> (B, T)
        """Numbers per response token in their places, 0 elsewhere; differentiable."""
        out = values.new_zeros(self.response.shape)
        return out.masked_scatter(self.response.to(values.device), values)

    def cached(self, name: str) -> Tensor | None:
        """Numbers that came with the batch, (N,), without gradient."""
        values = self.given.get(name)
        if values is None:
            return None
        if values.shape != self.response.shape:
            raise ValueError(
                f"{name} must be of shape {tuple(self.response.shape)} as input_ids is, got "
                f"{tuple(values.shape)}; 0 where there is no response"
            )
        return values.detach()[self.response.to(values.device)]


class LanguageModel:
    """A Hugging Face causal LM seen from the response tokens: hidden states, log-probs, logits.

    Args:
        model: the causal LM, plain or wrapped by PEFT, its head frozen, trained or with LoRA. Final
            softcapping, ``logit_scale`` and ``logits_scaling`` are read from its config.
        temperature: what its logits are divided by.
        impl: implementation of the token-loss operators; None for the fastest available.
        options: chunk size and the like; ``chunk_size`` also bounds the logits made here.
    """

    def __init__(
        self,
        model: Any,
        *,
        temperature: float = 1.0,
        impl: str | None = None,
        options: TokenLossOptions | None = None,
    ) -> None:
        self.model, self.temperature = model, temperature
        self.impl, self.options = impl, options
        self.head = find_head(model, None, None, None, None)
        self._seen: tuple[ResponseBatch, Tensor] | None = None

    def hidden(self, batch: ResponseBatch) -> Tensor:  # (N, D)
        """Hidden states that predict the response tokens; kept until another batch comes."""
        if self._seen is None or self._seen[0] is not batch:
            self._seen = (batch, self.hidden_of(*batch.aligned()))
        return self._seen[1]

    def hidden_of(
        self,
        ids: Tensor,  # (B, T)
        real: Tensor,  # (B, T), every row starting at position 0
        response: Tensor,  # (B, T)
    ) -> Tensor:  # (N, D)
        """Hidden states from which the marked tokens are predicted.

        Rows start at position 0, so that padding on the left needs no position ids whatever the
        architecture, and padding on the right is seen by nothing that counts.
        """
        hidden = self.head.hidden(ids, None if bool(real.all()) else real)
        hidden = hidden[:, :-1][response[:, 1:].to(hidden.device)]
        return hidden.to(self.head.weight)

    def token_logp(
        self,
        hidden: Tensor,  # (N, D)
        target: Tensor,  # (N,)
        temperature: float | None = None,
    ) -> TokenLogp:  # of (N,)
        """Log-probability and entropy without the logits in memory."""
        return linear_logp(
            hidden,
            self.head.weight,
            target.to(self.head.weight.device),
            linear_bias=self.head.bias,
            temperature=self.temperature if temperature is None else temperature,
            logit_scale=self.head.scale,
            softcap=self.head.softcap,
            impl=self.impl,
            options=self.options,
        )

    def response_logp(self, batch: ResponseBatch) -> TokenLogp:  # of (N,)
        """Log-probability and entropy of the response tokens."""
        return self.token_logp(self.hidden(batch), batch.target)

    def logits(self, hidden: Tensor) -> Tensor:  # (n, D) -> (n, V)
        """Logits before the temperature, in float32 or float64."""
        head = self.head
        z = torch.nn.functional.linear(hidden, head.weight, head.bias)
        z = z.to(torch.promote_types(z.dtype, torch.float32)) * head.scale
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    def check(self) -> None:
        """Raises unless the head on the hidden states gives the model's own logits."""
        count = min(_PROBED_TOKENS, self.head.weight.shape[0])
        ids = torch.arange(count)[None]
        device = self.head.device.type
        with torch.no_grad(), evaluation_mode(self.model), torch.autocast(device, enabled=False):
            compare_with_model(self.model, self.head, ids, *check_text(ids, None))


@contextlib.contextmanager
def frozen(model: Any, adapters: bool = True) -> Iterator[None]:
    """No gradients and no dropout; with ``adapters=False`` a PEFT model is its base model."""
    disabled = contextlib.nullcontext() if adapters else model.disable_adapter()
    with torch.no_grad(), evaluation_mode(model), disabled:
        yield
