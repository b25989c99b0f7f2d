"""A small chat model, trained on the spot: a Llama of some hundred words with a chat template."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import trimtab
from trimtab.demo.questions import SAFETY_PROMPT, Chat

_PAD, _END = "<|pad|>", "<|end|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_UNKNOWN = "<|unknown|>"
_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> "
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_IGNORED = -100


@dataclass(frozen=True)
class ChatPlan:
    """Everything that sets the size and training of the chat model."""

    width: int
    layers: int
    heads: int
    steps: int
    batch: int
    rate: float
    warmup: int


def conversation(question: str, with_prompt: bool) -> list[dict[str, str]]:
    """Messages up to the answer; without the prompt there is no system message at all."""
    messages = [{"role": "user", "content": question}]
    return [{"role": "system", "content": SAFETY_PROMPT}, *messages] if with_prompt else messages


def train_tokenizer(chats: Sequence[Chat]) -> Any:
    """A word-level tokenizer of the words in the chats, with a chat template.

    Returns:
        A `transformers.PreTrainedTokenizerFast` that pads on the left.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = r"\w+|[^\w\s]"
    texts = (SAFETY_PROMPT, *(text for c in chats for text in (c.question.text, c.answer)))
    words = sorted({word for text in texts for word in re.findall(pieces, text)})
    special = [_PAD, _END, _UNKNOWN, *_ROLES]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        unk_token=_UNKNOWN,
        additional_special_tokens=list(_ROLES),
        chat_template=_TEMPLATE,
        padding_side="left",
    )


def read_answer(tokenizer: Any, ids: Tensor) -> str:  # (T,)
    """The text of an answer: words apart, signs close to the word before them."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return re.sub(r" ([.,?])", r"\1", text)


def train_chat_model(
    tokenizer: Any,
    chats: Sequence[Chat],
    plan: ChatPlan,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Any:
    """Trains a Llama on the answers of the chats, each of which it sees once.

    Args:
        tokenizer: from `train_tokenizer`.
        chats: `steps * batch` of them are used.
        plan: shape and training.
        seed: of the weights.
        on_step: called after every step with the loss.

    Returns:
        A `transformers.LlamaForCausalLM` in evaluation mode.
    """
    torch.manual_seed(seed)
    model = _build(tokenizer, plan)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, plan))
    for ids, targets in _batches(tokenizer, chats, plan):
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state  # (B, T, D)
        loss = trimtab.linear_cross_entropy(hidden, model.lm_head.weight, targets[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(loss.item())
    return model.eval()


def _build(tokenizer: Any, plan: ChatPlan) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=plan.width,
            intermediate_size=8 * plan.width // 3 // 16 * 16,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            num_key_value_heads=plan.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _batches(
    tokenizer: Any, chats: Sequence[Chat], plan: ChatPlan
) -> Iterator[tuple[Tensor, Tensor]]:  # (B, T), (B, T)
    """Token ids padded on the right, and the same with all but the answers ignored."""
    for start in range(0, plan.steps * plan.batch, plan.batch):
        rows, answers = [], []
        for chat in chats[start : start + plan.batch]:
            messages = conversation(chat.question.text, chat.with_prompt)
            asked = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            answer = tokenizer.encode(f"{chat.answer} {_END}", add_special_tokens=False)
            rows.append(torch.tensor(asked + answer))
            answers.append(torch.tensor(len(asked) * [_IGNORED] + answer))
        pad = torch.nn.utils.rnn.pad_sequence
        yield (
            pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
            pad(answers, batch_first=True, padding_value=_IGNORED),
        )


def _rate(step: int, plan: ChatPlan) -> float:
    """Warm-up, then a cosine down to a tenth."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, done))
