"""Both contexts of a chat, with a tokenizer and templates made here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from self_contrastive_cases import make
from trimtab.algorithms.self_contrastive import (
    HELPFUL_PROMPT,
    SAFETY_PROMPT,
    self_contrastive_generate,
    self_contrastive_inputs,
)

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

WORDS = "<pad> <s> </s> <unk> [INST] [/INST] <system> <user> <assistant> how do i kill a process ?"
WITH_SYSTEM = (
    "{{ '<s>' }}{% for m in messages %}{{ ' <' + m['role'] + '> ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)
# As the first Mistral models: user and assistant take turns, anything else is refused.
REFUSES = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
PASSES_OVER = REFUSES.replace("{{ raise_exception('no such role') }}", "")
BRINGS_ITS_OWN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<system> a process ' }}{% endif %}" + WITH_SYSTEM
)

ASK = [{"role": "user", "content": "how do i kill a process ?"}]


def tokenizer(template: str) -> Any:
    prompts = f"{SAFETY_PROMPT} {HELPFUL_PROMPT} be kind and brief".split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*WORDS.split(), *prompts]))}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    # It adds a token of its own where the template has written it already.
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
        eos_token="</s>", chat_template=template,
    )  # fmt: skip


def texts(tok: Any, inputs: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Both contexts of each row as words, of the real tokens."""

    def words(prefix: str) -> list[str]:
        pairs = zip(inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"], strict=True)
        return [" ".join(tok.convert_ids_to_tokens(ids[mask.bool()])) for ids, mask in pairs]

    return list(zip(words(""), words("safety_"), strict=True))


def test_the_papers_prompts() -> None:
    """Word for word what the released script puts into both contexts."""
    tok = tokenizer(REFUSES)
    ((plain, safety),) = texts(tok, self_contrastive_inputs(tok, ASK))
    assert plain == "<s> [INST] how do i kill a process ? [/INST]"
    assert safety == f"<s> [INST] {SAFETY_PROMPT} how do i kill a process ? [/INST]"
    assert SAFETY_PROMPT.startswith("You are a helpful, respectful and honest assistant. Always")
    assert SAFETY_PROMPT.endswith("sexist, toxic, dangerous, or illegal content.")
    assert "prioritizes helpfulness" in HELPFUL_PROMPT


def test_a_system_message_where_the_template_has_one() -> None:
    tok = tokenizer(WITH_SYSTEM)
    ((plain, safety),) = texts(tok, self_contrastive_inputs(tok, ASK, safety_prompt="be kind"))
    assert plain == "<s> <user> how do i kill a process ? <assistant>"
    assert safety == "<s> <system> be kind <user> how do i kill a process ? <assistant>"


def test_a_template_that_passes_over_the_system_message() -> None:
    tok = tokenizer(PASSES_OVER)
    inputs = self_contrastive_inputs(tok, ASK, safety_prompt="be kind", separator=" and ")
    assert texts(tok, inputs)[0][1] == "<s> [INST] be kind and how do i kill a process ? [/INST]"


def test_the_template_decides_whether_there_is_a_system_role_not_the_words() -> None:
    # The question has the prompt's words, and the template passes over the system message.
    tok = tokenizer(PASSES_OVER)
    inputs = self_contrastive_inputs(tok, ASK, safety_prompt="a process")
    assert texts(tok, inputs)[0][1] == "<s> [INST] a process how do i kill a process ? [/INST]"
    # The system message is there, in other letters.
    tok = tokenizer(WITH_SYSTEM.replace("m['content']", "m['content'] | lower"))
    inputs = self_contrastive_inputs(tok, ASK, safety_prompt="BE kind")
    assert texts(tok, inputs)[0][1].startswith("<s> <system> be kind <user> how")


@pytest.mark.parametrize("template", [WITH_SYSTEM, REFUSES, PASSES_OVER])
def test_a_system_message_of_the_chats_own_stays(template: str) -> None:
    tok = tokenizer(template)
    chat = [{"role": "system", "content": "be brief"}, *ASK]
    ((plain, safety),) = texts(tok, self_contrastive_inputs(tok, chat, safety_prompt="be kind"))
    lead = "<system>" if template is WITH_SYSTEM else "[INST]"
    assert plain.startswith(f"<s> {lead} be brief")
    assert safety.startswith(f"<s> {lead} be kind be brief")
    assert plain.split("brief")[1] == safety.split("brief")[1]
    assert chat[0]["content"] == "be brief", "the caller's messages are the caller's"


def test_what_the_plain_context_has_instead() -> None:
    tok = tokenizer(BRINGS_ITS_OWN)
    plain = texts(tok, self_contrastive_inputs(tok, ASK))[0][0]
    assert plain.startswith("<system> a process <s> <user>")
    plain = texts(tok, self_contrastive_inputs(tok, ASK, plain_prompt=""))[0][0]
    assert plain.startswith("<s> <system> <user>")
    plain = texts(tok, self_contrastive_inputs(tok, ASK, plain_prompt=HELPFUL_PROMPT))[0][0]
    assert plain.startswith(f"<s> <system> {HELPFUL_PROMPT} <user>")


def test_several_chats_are_padded_on_the_left_and_ready_to_run() -> None:
    tok = tokenizer(WITH_SYSTEM)
    more = [
        {"role": "user", "content": "how ?"}, {"role": "assistant", "content": "kill it"},
        {"role": "user", "content": "do i ?"},
    ]  # fmt: skip
    inputs = self_contrastive_inputs(tok, [ASK, more])
    assert list(inputs) == [
        "input_ids", "attention_mask", "safety_input_ids", "safety_attention_mask"
    ]  # fmt: skip
    assert inputs["input_ids"].shape == (2, 12)
    assert inputs["attention_mask"].sum(1).tolist() == [10, 12]
    assert inputs["input_ids"][0, :2].tolist() == [tok.pad_token_id] * 2
    assert texts(tok, inputs)[1][0].endswith("<assistant> kill <unk> <user> do i ? <assistant>")
    model = make("llama")
    got = self_contrastive_generate(model, **inputs, max_new_tokens=4)
    for row, chat in enumerate([ASK, more]):
        alone = self_contrastive_inputs(tok, chat)
        want = self_contrastive_generate(model, **alone, max_new_tokens=4)
        assert torch.equal(got[row, -4:], want[0, -4:])
        for side in ("", "safety_"):
            assert alone[f"{side}attention_mask"].all()


def test_arguments_of_the_template_are_handed_on() -> None:
    tok = tokenizer(WITH_SYSTEM)
    plain = texts(tok, self_contrastive_inputs(tok, ASK, add_generation_prompt=False))[0][0]
    assert plain.endswith("process ?")
    begun = [*ASK, {"role": "assistant", "content": "kill"}]
    plain = texts(tok, self_contrastive_inputs(tok, begun, continue_final_message=True))[0][0]
    assert plain.endswith("<assistant> kill")
    tok.pad_token = None
    inputs = self_contrastive_inputs(tok, [ASK, begun], device="cpu")
    assert inputs["input_ids"][0, 0] == 0, "any token does behind a mask"


@pytest.mark.parametrize(
    ("error", "match", "messages"),
    [
        (ValueError, "messages must be a chat or several, got none", []),
        (ValueError, "messages must have a user message", [{"role": "assistant", "content": "a"}]),
        (TypeError, "messages must be a list of messages or of chats, got str", "how ?"),
        (TypeError, "messages must be a list of messages or of chats, got NoneType", None),
        (TypeError, "messages must be one chat or a list of chats, got a str", ["how ?", "why ?"]),
        (TypeError, "messages must be one chat or a list of chats, got a dict", [ASK, ASK[0]]),
        (TypeError, "messages must be of .* got a list", [ASK[0], ASK]),
        (TypeError, "messages must have text .* got a list", [{"role": "user", "content": ["a"]}]),
    ],
)
def test_errors(error: type[Exception], match: str, messages: Any) -> None:
    with pytest.raises(error, match=match):
        self_contrastive_inputs(tokenizer(REFUSES), messages, plain_prompt="be kind")


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_safety_prompt_is_an_error(blank: str) -> None:
    with pytest.raises(ValueError, match="safety_prompt must have words"):
        self_contrastive_inputs(tokenizer(WITH_SYSTEM), ASK, safety_prompt=blank)
    with pytest.raises(TypeError, match="safety_prompt must be text, got NoneType"):
        self_contrastive_inputs(tokenizer(WITH_SYSTEM), ASK, safety_prompt=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "argument",
    [
        {"truncation": True},
        {"max_length": 4},
        {"padding": "max_length"},
        {"return_tensors": "np"},
        {"return_dict": False},
        {"tokenize": True},
        {"tokenizer_kwargs": {"add_special_tokens": True}},
    ],
)
def test_arguments_about_tokens_are_refused(argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(argument))} must be left out"):
        self_contrastive_inputs(tokenizer(WITH_SYSTEM), ASK, **argument)
