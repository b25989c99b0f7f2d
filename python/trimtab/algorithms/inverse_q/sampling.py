"""Prompts into batches, and batches into responses of the current policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.algorithms.inverse_q.responses import IGNORED, frozen
from trimtab.ops.contrast import contrastive_sample


class PromptCollator:
    """Rows with ``input_ids`` into a batch padded on the left, so that all prompts end together.

    Args:
        pad_token_id: what pads; the attention mask hides it.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, both (B, P).

        Raises:
            ValueError: an empty prompt.
        """
        prompts = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            if prompt.ndim != 1 or len(prompt) == 0:
                raise ValueError(
                    f"input_ids must be token ids (P,) of a prompt, got shape "
                    f"{tuple(prompt.shape)}; begin empty prompts with a BOS token"
                )
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        return {"input_ids": ids, "attention_mask": mask}


def row_seeds(seed: int, stream: Sequence[int], first: int, count: int) -> Tensor:  # (count,)
    """One 64-bit seed per row, a function of the seed, what it is for and the row's number."""
    words = [
        np.random.SeedSequence([seed, *stream, row]).generate_state(1, np.uint64)
        for row in range(first, first + count)
    ]
    return (
        torch.from_numpy(np.concatenate(words).view(np.int64)) if words else torch.empty(0).long()
    )


class _Draw:
    """Logits processor after which only the drawn token is left, so that greedy search takes it."""

    def __init__(self, seeds: Tensor, temperature: float, width: int, impl: str | None) -> None:
        self.seeds, self.temperature, self.width, self.impl = seeds, temperature, width, impl

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = contrastive_sample(
            scores,
            scores,
            alpha=0.0,
            temperature=self.temperature,
            seed=self.seeds.to(scores.device),
            position=input_ids.shape[1] - self.width,
            impl=self.impl,
        ).token
        if bool((drawn < 0).any()):
            raise ValueError(
                f"model must give finite logits, got NaN in row {int((drawn < 0).int().argmax())}; "
                "lower the learning rate, or look at the weights"
            )
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, drawn[:, None], 0.0)


@torch.no_grad()
def sample_responses(
    model: Any,
    input_ids: Tensor,  # (B, P), padded on the left
    attention_mask: Tensor,  # (B, P)
    *,
    seeds: Tensor,  # (B,)
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    impl: str | None = None,
) -> dict[str, Tensor]:  # of (B, T)
    """One response per prompt, from the whole of ``softmax(z / temperature)``.

    Nothing else shapes the distribution: filters and penalties of the model's generation config are
    left out, since rewards and losses are of the plain policy. A row's response depends on its
    prompt and seed, not on the rest of the batch (up to rounding of the logits), and on no state of
    a random generator.

    Cost: ``max_new_tokens`` decoding steps with a KV cache.

    Args:
        model: Hugging Face causal LM, plain or PEFT; read in evaluation mode.
        input_ids: prompts.
        attention_mask: 1 on the prompts.
        seeds: one 64-bit seed per row, see ``row_seeds``.
        max_new_tokens: length of the longest response.
        temperature: positive.
        eos_token_id: tokens that end a response and belong to it; None for none.
        pad_token_id: what follows a response that ended.
        impl: implementation of ``contrastive_sample``; None for the fastest available.

    Returns:
        A batch of ``InverseQ``: ``input_ids``, ``attention_mask`` and ``labels``.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = [] if eos_token_id is None else torch.as_tensor(eos_token_id).reshape(-1).tolist()
    plain = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=pad_token_id,
    )
    draw = _Draw(seeds, temperature, input_ids.shape[1], impl)
    own = inner.generation_config
    try:
        # `generate` fills what a config leaves open from the model's own.
        inner.generation_config = plain
        with frozen(model):
            ids = inner.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=plain,
                logits_processor=LogitsProcessorList([draw]),
            )
    finally:
        inner.generation_config = own
    response = ids[:, input_ids.shape[1] :]
    ended = torch.isin(response, torch.tensor(ends, dtype=response.dtype, device=ids.device))
    alive = (ended.long().cumsum(1) - ended.long()) == 0
    mask = torch.cat((attention_mask != 0, alive), 1)
    spoken = torch.cat((torch.zeros_like(attention_mask, dtype=torch.bool), alive), 1)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~spoken, IGNORED),
    }


def split_rows(batch: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Prompts and responses of a batch, row by row, without padding."""
    spoken = batch["labels"] != IGNORED
    prompt = (batch["attention_mask"] != 0) & ~spoken
    ids = batch["input_ids"]
    return (
        [row[keep] for row, keep in zip(ids, prompt, strict=True)],
        [row[keep] for row, keep in zip(ids, spoken, strict=True)],
    )
