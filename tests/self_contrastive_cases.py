"""Tiny models and prompts for the tests of Self-CD, and the loop that the released code runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

VOCAB = 97
PAD, BOS, EOS = 0, 1, 2
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": BOS,
    "eos_token_id": None, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
}


def make(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model whose logits lie far enough apart for its argmax to mean something."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **KINDS.get(kind, {}), **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.6)
    return model.eval()


def tokens(length: int, seed: int) -> Tensor:
    """One prompt (T,), none of its tokens special."""
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def pad_left(rows: list[Tensor], pad: int = PAD) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts of unequal length."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.full((width - len(row),), pad), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return ids, mask


class Questions(NamedTuple):
    """Prompts without and with the safety prompt, as a model wants them."""

    plain: list[Tensor]
    safety: list[Tensor]
    ids: Tensor
    mask: Tensor
    safety_ids: Tensor
    safety_mask: Tensor

    def pick(self, rows: list[int]) -> Questions:
        return build([self.plain[row] for row in rows], [self.safety[row] for row in rows])

    def arguments(self) -> dict[str, Tensor]:
        """Of ``self_contrastive_generate``, after the model."""
        return {
            "input_ids": self.ids, "attention_mask": self.mask,
            "safety_input_ids": self.safety_ids, "safety_attention_mask": self.safety_mask,
        }  # fmt: skip


def build(plain: list[Tensor], safety: list[Tensor]) -> Questions:
    return Questions(plain, safety, *pad_left(plain), *pad_left(safety))


def questions(
    lengths: tuple[int, ...] = (5, 9, 2), extra: tuple[int, ...] = (11, 0, 3)
) -> Questions:
    """Unequal lengths on both sides; a safety context of the question's own length too."""
    plain = [tokens(length, 10 + i) for i, length in enumerate(lengths)]
    safety = [torch.cat([tokens(more, 20 + i), plain[i]]) for i, more in enumerate(extra)]
    # The context with nothing in front still has to differ from the plain one.
    safety = [row if len(row) > len(plain[i]) else row.flip(0) for i, row in enumerate(safety)]
    return build(plain, safety)


class Trace(NamedTuple):
    """New tokens of one question, and how far the likeliest logit was ahead at every step."""

    new: list[int]
    margins: list[float]


@torch.no_grad()
def released_loop(
    model: Any, plain: Tensor, safety: Tensor, ratio: float, steps: int, eos: int | None = None
) -> Trace:
    """One question as SelfCD.py does it: two full forward passes a token, no cache, float32."""
    new: list[int] = []
    margins = []
    for _ in range(steps):
        tail = torch.tensor(new, dtype=torch.int64)
        without = model(torch.cat([plain, tail])[None]).logits.float()[0, -1]
        within = model(torch.cat([safety, tail])[None]).logits.float()[0, -1]
        z = within - ratio * (within - without)
        best = z.topk(2)
        new.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        if new[-1] == eos:
            break
    return Trace(new, margins)


def released(
    model: Any, asked: Questions, ratio: float, steps: int, eos: int | None = None, pad: int = PAD
) -> Tensor:
    """What ``self_contrastive_generate`` must return, question by question."""
    traces = [
        released_loop(model, *pair, ratio, steps, eos)
        for pair in zip(asked.plain, asked.safety, strict=True)
    ]
    assert min(min(trace.margins) for trace in traces) > 1e-3, "no token may be a coin toss"
    width = max(len(trace.new) for trace in traces)
    new = [trace.new + [pad] * (width - len(trace.new)) for trace in traces]
    return torch.cat([asked.ids, torch.tensor(new)], 1)
