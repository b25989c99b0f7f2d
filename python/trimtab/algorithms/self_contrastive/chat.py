"""Both contexts of a chat: with the safety prompt and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Message = Mapping[str, Any]

# What only makes sense for ids that the template's method would make itself.
_OF_THE_TOKENIZER = (
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "tokenizer_kwargs",
)  # fmt: skip

SAFETY_PROMPT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content."
)
"""The safety prompt of the released Self-CD code."""

HELPFUL_PROMPT = (
    "You are an assistant that always prioritizes helpfulness. That is, you always give answers to "
    "any user queries."
)
"""The paper's "Prompt" baseline: plain decoding behind this text, without any contrast."""


def self_contrastive_inputs(
    tokenizer: Any,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    *,
    safety_prompt: str = SAFETY_PROMPT,
    plain_prompt: str | None = None,
    separator: str = " ",
    device: torch.device | str | None = None,
    **template_arguments: Any,
) -> dict[str, Any]:
    """Both contexts of one chat or several, by the tokenizer's chat template, padded on the left.

    The safety prompt is the system message; where the chat has one of its own, it stands in front
    of that. A template that refuses a system message, or passes over it, gets the text in front of
    the first user message: with the template of the first Mistral models and the defaults this is
    the paper's prompt, ``<s>[INST] {safety_prompt} {user} [/INST]``.

    A template may put a system message of its own where a chat has none. ``plain_prompt`` says
    what the plain context has instead; the empty string is an empty system message.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template.
        messages: one chat, a list of ``{"role": ..., "content": ...}``, or a list of chats.
        safety_prompt: what the model is told in one context and not in the other.
        plain_prompt: system message of the other context; None for none.
        separator: between a system prompt and the text that it is put in front of.
        device: of the result.
        template_arguments: further arguments of ``apply_chat_template`` for the text, not for
            tokens: the ids are made here, whole and padded to the longest.

    Returns:
        ``input_ids``, ``attention_mask``, ``safety_input_ids`` and ``safety_attention_mask``, as
        ``self_contrastive_generate(model, **inputs)`` takes them.

    Raises:
        ValueError: no message, a chat without a user message that needs one, a blank safety prompt,
            or a template argument that is about tokens.
        TypeError: messages are something else than chats, or content isn't text where a prompt has
            to go in front of it.
    """
    chats = _as_chats(messages)
    if not isinstance(safety_prompt, str):
        raise TypeError(
            f"safety_prompt must be text, got {type(safety_prompt).__name__}; use a str"
        )
    if not safety_prompt.strip():
        raise ValueError(
            "safety_prompt must have words, got a blank; without one there is nothing to contrast"
        )
    for name in _OF_THE_TOKENIZER:
        if name in template_arguments:
            raise ValueError(
                f"{name} must be left out, got {template_arguments[name]!r}; the prompts come "
                "whole, as tensors padded on the left"
            )
    go_on = template_arguments.get("continue_final_message", False)
    template_arguments.setdefault("add_generation_prompt", not go_on)
    inputs = {}
    for prefix, prompt in (("", plain_prompt), ("safety_", safety_prompt)):
        rows = []
        for chat in chats:
            text = _render(tokenizer, chat, prompt, separator, template_arguments)
            # The template has written the special tokens.
            rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids, mask = _pad_left(rows, tokenizer.pad_token_id)
        inputs[f"{prefix}input_ids"] = ids.to(device)
        inputs[f"{prefix}attention_mask"] = mask.to(device)
    return inputs


def _as_chats(messages: Any) -> list[list[Message]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise TypeError(
            f"messages must be a list of messages or of chats, got {type(messages).__name__}; a "
            'question is [{"role": "user", "content": question}]'
        )
    if len(messages) == 0:
        raise ValueError("messages must be a chat or several, got none; pass one message at least")
    chats = [messages] if isinstance(messages[0], Mapping) else messages
    for chat in chats:
        if not isinstance(chat, Sequence) or isinstance(chat, str):
            raise TypeError(
                f"messages must be one chat or a list of chats, got a {type(chat).__name__} in the "
                'list; a question is [{"role": "user", "content": question}]'
            )
        for message in chat:
            if not isinstance(message, Mapping):
                raise TypeError(
                    'messages must be of {"role": ..., "content": ...}, got a '
                    f"{type(message).__name__}; make it a message"
                )
    return [list(chat) for chat in chats]


def _render(
    tokenizer: Any,
    chat: list[Message],
    prompt: str | None,
    separator: str,
    template_arguments: dict[str, Any],
) -> str:
    def apply(messages: list[Message]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **template_arguments)

    own = chat[0]["content"] if chat and chat[0].get("role") == "system" else None
    rest = chat if own is None else chat[1:]
    if prompt is None and not isinstance(own, str):
        return apply(chat)
    system = str(own) if prompt is None else _join(prompt, own, separator)
    from jinja2 import TemplateError

    # A template that knows no system role refuses it, or passes over it without a word. The words
    # of the prompt prove nothing: they may stand in the question too, or be written otherwise.
    try:
        first, second = (apply([{"role": "system", "content": c}, *rest]) for c in ("one", "two"))
    except TemplateError:
        first = second = ""
    if first != second:
        return apply([{"role": "system", "content": system}, *rest])
    place = next((i for i, message in enumerate(rest) if message.get("role") == "user"), None)
    if place is None:
        raise ValueError(
            "messages must have a user message, got none in a chat whose template has no system "
            "role; add the question"
        )
    question = {**rest[place], "content": _join(system, rest[place]["content"], separator)}
    return apply([*rest[:place], question, *rest[place + 1 :]])


def _join(prompt: str, content: Any, separator: str) -> str:
    if content is None:
        return prompt
    if not isinstance(content, str):
        raise TypeError(
            "messages must have text where a prompt goes in front of it, got a "
            f"{type(content).__name__}; put the prompt there yourself"
        )
    return f"{prompt}{separator}{content}" if prompt else content


def _pad_left(rows: list[list[int]], pad_token_id: int | None) -> tuple[Tensor, Tensor]:
    """Ids and mask; what pads doesn't matter behind the mask."""
    width = max(len(row) for row in rows)
    pad = 0 if pad_token_id is None else pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
