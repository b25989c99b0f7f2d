"""Models that Self-CD can't run, or can't run as asked: refused, and nothing that it can."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from self_contrastive_cases import (
    KINDS,
    build,
    make,
    questions,
    released,
    tokens,
)
from trimtab.algorithms.self_contrastive import (
    ContrastiveBranch,
    ContrastiveLogitsProcessor,
    SelfContrastiveDecoding,
    self_contrastive_generate,
)

transformers = pytest.importorskip("transformers")

STEPS = 8
UNAWARE = {
    "bart": {
        "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
        "is_encoder_decoder": False, "is_decoder": True, "forced_eos_token_id": None,
    },
    "roberta": {"is_decoder": True},  # positions begin behind the padding token's id
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 128},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8,
                        "logits_soft_cap": 1e4},
}  # fmt: skip


def odd(kind: str) -> Any:
    return make(kind, **UNAWARE[kind])


@pytest.mark.parametrize("kind", UNAWARE)
def test_models_that_do_not_tell_padding_from_text_are_refused(kind: str) -> None:
    model, cached = odd(kind), kind in ("bart", "roberta")
    with pytest.raises(ValueError, match=r"model must tell padding from text, got .* for row 2 of"):
        self_contrastive_generate(model, **questions().arguments(), use_cache=cached)
    # Contexts of one length are not padded.
    even = build([tokens(7, 1), tokens(7, 2)], [tokens(7, 3), tokens(7, 4)])
    got = self_contrastive_generate(
        model, **even.arguments(), use_cache=cached, max_new_tokens=STEPS
    )
    assert torch.equal(got, released(model, even, 2.5, STEPS))


# `generate` itself begins Roberta's positions at 0.
@pytest.mark.parametrize("kind", [kind for kind in UNAWARE if kind != "roberta"])
def test_one_prompt_in_a_processor_pads_nothing(kind: str) -> None:
    model, one = odd(kind), questions().pick([0])
    processor = ContrastiveLogitsProcessor.self_contrastive(
        model, one.safety_ids, use_cache=kind in ("bart", "roberta")
    )
    got = model.generate(
        one.ids, attention_mask=one.mask, logits_processor=[processor], max_new_tokens=STEPS,
        do_sample=False, use_cache=kind in ("bart", "roberta"),
    )  # fmt: skip
    assert torch.equal(got, released(model, one, 2.5, STEPS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_not_taken_for_padding(kind: str, dtype: torch.dtype) -> None:
    model = make(kind).to(dtype)
    got = self_contrastive_generate(model, **questions().arguments(), max_new_tokens=2)
    assert got.shape[1] == questions().ids.shape[1] + 2


def test_many_layers_in_16_bits_are_not_taken_for_padding() -> None:
    model = make("llama", num_hidden_layers=32, hidden_size=64, intermediate_size=128)
    self_contrastive_generate(model.to(torch.bfloat16), **questions().arguments(), max_new_tokens=1)
    with pytest.raises(ValueError, match="model must tell padding"):
        self_contrastive_generate(odd("rwkv").to(torch.bfloat16), **questions().arguments(),
                                  use_cache=False)  # fmt: skip


def test_dropout_is_not_taken_for_padding() -> None:
    model = make("gpt2").train()  # with GPT-2's dropout of 0.1
    arguments = questions().arguments()
    ids = self_contrastive_generate(model, **arguments, max_new_tokens=1)
    assert ids.shape[1] == arguments["input_ids"].shape[1] + 1


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_prompt_learning_is_refused(kind: str) -> None:
    peft, asked = pytest.importorskip("peft"), questions()
    base = make("gpt2")
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(base, config).eval()
    match = f"model must have no prompt learning of PEFT, got {kind}Config"
    with pytest.raises(ValueError, match=match):
        self_contrastive_generate(model, **asked.arguments(), max_new_tokens=2)
    with pytest.raises(ValueError, match=match):
        ContrastiveBranch(model)
    decoding = SelfContrastiveDecoding(asked.safety_ids, asked.safety_mask)
    inputs = {"input_ids": asked.ids, "attention_mask": asked.mask, "max_new_tokens": STEPS}
    with pytest.raises(ValueError, match=match):
        model.generate(**inputs, custom_generate=decoding)
    # The model inside has none, and may be contrasted with.
    got = base.generate(**inputs, custom_generate=decoding)
    assert torch.equal(got, released(base, asked, 2.5, STEPS))


def test_adapters_of_the_weights_are_done() -> None:
    peft, asked = pytest.importorskip("peft"), questions()
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(make("llama"), config).eval()
    want = released(model, asked, 2.5, STEPS)
    got = self_contrastive_generate(model, **asked.arguments(), max_new_tokens=STEPS)
    assert torch.equal(got, want)
    decoding = SelfContrastiveDecoding(asked.safety_ids, asked.safety_mask)
    got = model.generate(
        input_ids=asked.ids, attention_mask=asked.mask, custom_generate=decoding,
        max_new_tokens=STEPS,
    )  # fmt: skip
    assert torch.equal(got, want)


class Wrapper(torch.nn.Module):
    """Hands everything on, and says nothing of what that is."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside, self.config = inside, inside.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside(*args, **kwargs)


def test_wrappers_that_do_not_say_what_they_take_are_refused() -> None:
    model = make("gpt2")
    for wrapped, hint in (
        (torch.nn.DataParallel(model), "DataParallel; pass the inner model, model.module"),
        (Wrapper(model), "Wrapper; pass the inner model$"),
    ):
        with pytest.raises(ValueError, match=f"takes input_ids by name, got the wrapper {hint}"):
            self_contrastive_generate(wrapped, **questions().arguments())
        with pytest.raises(ValueError, match="takes input_ids by name"):
            ContrastiveBranch(wrapped)


def long_rope(kind: str, limit: int) -> Any:
    if kind == "longrope":
        rope = {"rope_type": kind, "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                "long_factor": [8.0] * 4, "original_max_position_embeddings": limit}  # fmt: skip
        return make("phi3", rope_parameters=rope, original_max_position_embeddings=limit)
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    return make("llama", rope_parameters=rope, max_position_embeddings=limit)


def ask(plain: int, safety: int) -> Any:
    return build([tokens(plain, 1)], [tokens(safety, 2)])


@pytest.mark.parametrize(
    ("kind", "limit", "lengths", "use_cache", "steps"),
    [
        ("longrope", 40, (6, 12), True, STEPS),
        ("longrope", 6, (7, 12), True, STEPS),
        ("longrope", 10, (6, 6), False, STEPS),
        ("dynamic", 40, (6, 12), True, STEPS),
        ("dynamic", 10, (6, 6), False, STEPS),
        ("longrope", 19, (6, 12), True, STEPS),  # the last token is not run
        ("dynamic", 19, (6, 12), True, STEPS),
    ],
)
def test_rope_by_length_where_it_is_exact(
    kind: str, limit: int, lengths: tuple[int, int], use_cache: bool, steps: int
) -> None:
    model, asked = long_rope(kind, limit), ask(*lengths)
    got = self_contrastive_generate(
        model, **asked.arguments(), max_new_tokens=steps, use_cache=use_cache
    )
    assert torch.equal(got, released(model, asked, 2.5, steps))


@pytest.mark.parametrize(
    ("kind", "limit", "lengths", "use_cache"),
    [
        ("longrope", 18, (6, 12), True),  # the cache has keys of the short factors
        ("longrope", 10, (6, 12), True),  # one context on each side of the limit
        ("longrope", 10, (6, 12), False),
        ("longrope", 10, (6, 8), False),
        ("dynamic", 18, (6, 12), True),
        ("dynamic", 10, (11, 11), True),
        ("dynamic", 10, (11, 12), False),
    ],
)
def test_rope_by_length_where_it_would_be_wrong(
    kind: str, limit: int, lengths: tuple[int, int], use_cache: bool
) -> None:
    model, asked = long_rope(kind, limit), ask(*lengths)
    with pytest.raises(
        ValueError, match=rf"original_max_position_embeddings \({limit}\) of a model with {kind}"
    ):
        self_contrastive_generate(
            model, **asked.arguments(), max_new_tokens=STEPS, use_cache=use_cache
        )
