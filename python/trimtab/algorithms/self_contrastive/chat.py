"""Both contexts of a chat: with the safety prompt and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Message = Mapping[str, Any]

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
    of that. A template that refuses a system message, or leaves it out, gets the text in front of
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
        template_arguments: further arguments of ``apply_chat_template``.

    Returns:
        ``input_ids``, ``attention_mask``, ``safety_input_ids`` and ``safety_attention_mask``, as
        ``self_contrastive_generate(model, **inputs)`` takes them.

    Raises:
        ValueError: no message, or a chat without a user message that needs one.
        TypeError: content that isn't text where a prompt has to go in front of it.
    """
    if len(messages) == 0:
        raise ValueError("messages must be a chat or several, got none; pass one message at least")
    several = not isinstance(messages[0], Mapping)
    chats: list[list[Message]] = [list(chat) for chat in (messages if several else [messages])]  # type: ignore[arg-type]
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

    try:
        text = apply([{"role": "system", "content": system}, *rest])
    except TemplateError:
        text = None
    # A template that knows no system role may also pass over it without a word.
    if text is not None and system.strip() in text:
        return text
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
