"""Self-CD as generate's custom_generate: what is asked for is done as the function does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from self_contrastive_cases import BOS, PAD, build, make, questions, released, tokens
from trimtab.algorithms.self_contrastive import SelfContrastiveDecoding, self_contrastive_generate

transformers = pytest.importorskip("transformers")

STEPS = 8
ASKED = questions()


def generate(model: Any, decoding: Any = None, **settings: Any) -> Tensor:
    if decoding is None:
        decoding = SelfContrastiveDecoding(ASKED.safety_ids, ASKED.safety_mask, seed=5)
    inputs = {"input_ids": ASKED.ids, "attention_mask": ASKED.mask, "max_new_tokens": STEPS}
    return model.generate(custom_generate=decoding, **{**inputs, **settings})


def function(model: Any, **settings: Any) -> Tensor:
    return self_contrastive_generate(
        model, **{**ASKED.arguments(), "max_new_tokens": STEPS, "seed": 5, **settings}
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "mistral"])
def test_greedy(kind: str) -> None:
    model = make(kind)
    assert torch.equal(generate(model), released(model, ASKED, 2.5, STEPS))
    assert torch.equal(generate(model, use_cache=False), released(model, ASKED, 2.5, STEPS))


def test_the_safety_contexts_may_go_to_generate() -> None:
    model, decoding = make("gpt2"), SelfContrastiveDecoding(ratio=2.0)
    for _ in range(2):  # one object, many calls
        got = generate(
            model, decoding, safety_input_ids=ASKED.safety_ids,
            safety_attention_mask=ASKED.safety_mask,
        )  # fmt: skip
        assert torch.equal(got, released(model, ASKED, 2.0, STEPS))
    shared = build(ASKED.plain, [ASKED.safety[1]] * 3)
    got = generate(model, SelfContrastiveDecoding(ASKED.safety_ids[1:2]))
    assert torch.equal(got, released(model, shared, 2.5, STEPS))
    with pytest.raises(ValueError, match="safety_input_ids must be given, got None"):
        generate(model, decoding)
    # A mask alone would be that of other ids.
    for bare in (decoding, SelfContrastiveDecoding(ASKED.safety_ids, ASKED.safety_mask)):
        with pytest.raises(ValueError, match="safety_input_ids must be given to generate along"):
            generate(model, bare, safety_attention_mask=ASKED.safety_mask)
    own = SelfContrastiveDecoding(ASKED.safety_ids, ASKED.safety_mask)
    got = generate(model, own, seed=7, do_sample=True)
    assert torch.equal(got, function(model, seed=7, do_sample=True, top_k=50))


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 0},
        {"temperature": 1.7, "top_k": 20},
        {"top_k": 0, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 0.5, "top_k": 0, "min_p": 0.1},
    ],
)
@pytest.mark.parametrize("copies", [1, 3])
def test_sampling_and_its_filters(filters: dict[str, Any], copies: int) -> None:
    model = make("gpt2")
    settings = {"do_sample": True, "num_return_sequences": copies, **filters}
    assert torch.equal(generate(model, **settings), function(model, **settings))


def test_the_filters_are_done_in_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a processor is of another kind, has options, or stands in another order."""
    model, ran = make("gpt2"), []
    kinds = [
        getattr(transformers, f"{name}LogitsWarper")
        for name in ("Temperature", "TopK", "TopP", "MinP", "Typical")
    ]
    for kind in kinds:

        def noted(
            self: Any, ids: Tensor, scores: Tensor, kind: Any = kind, call: Any = kind.__call__
        ):
            ran.append(kind.__name__.removesuffix("LogitsWarper"))
            return call(self, ids, scores)

        monkeypatch.setattr(kind, "__call__", noted)
    temperature, top_k, top_p, min_p, _ = kinds
    all_on = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "do_sample": True}
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None}
    heads = [temperature(1.5), top_k(20), top_p(0.9)]
    names = ["Temperature", "TopK", "TopP", "MinP"]
    cases: list[tuple[dict[str, Any], list[Any], list[str]]] = [
        ({}, [], []),
        (off, [*heads, min_p(0.02)], []),
        ({"renormalize_logits": True}, [], names),
        (off, [*heads, min_p(0.02, filter_value=-1e9)], names),
        (off, [*heads, min_p(0.02, min_tokens_to_keep=2)], names),
        (off, [*heads, min_p(0.02), top_p(1.0)], names),  # the last alone is done in the op
        ({}, [top_k(20, min_tokens_to_keep=2)], ["TopK"]),
    ]
    want = function(model, **all_on)
    for more, processors, expected in cases:
        ran.clear()
        got = generate(model, **{**all_on, **more, "logits_processor": processors})
        assert ran == expected * STEPS, (more, processors)
        assert torch.equal(got, want), (more, processors)
    ran.clear()
    generate(model, **all_on, typical_p=0.9)
    assert ran == [*names, "Typical"] * STEPS
    # A warper of the caller's own that the config does not make comes before those it makes.
    first = generate(model, do_sample=True, top_k=20, logits_processor=[temperature(1.5)])
    assert torch.equal(first, function(model, do_sample=True, top_k=20, temperature=1.5))
    last = generate(model, do_sample=True, top_k=20, logits_processor=[min_p(0.2)])
    by_hand = [min_p(0.2), top_k(20)]
    assert torch.equal(last, function(model, do_sample=True, logits_processor=by_hand))


def test_processors_work_on_the_combined_logits() -> None:
    model = make("gpt2")
    want = released(model, ASKED, 2.5, STEPS)
    banned = sorted(set(want[:, ASKED.ids.shape[1] :].flatten().tolist()))
    got = generate(model, suppress_tokens=banned, repetition_penalty=1.3)
    processors = [
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.generation.SuppressTokensLogitsProcessor(banned),
    ]
    assert torch.equal(got, function(model, logits_processor=processors))
    assert not set(got[:, ASKED.ids.shape[1] :].flatten().tolist()) & set(banned)
    assert torch.equal(function(model), want)


def test_lengths_eos_and_padding() -> None:
    model, width = make("gpt2"), ASKED.ids.shape[1]
    want = released(model, ASKED, 2.5, STEPS)
    eos = [int(want[0, width + 3]), int(want[2, width + 1])]
    ended = {"eos_token_id": eos, "pad_token_id": 60}
    got = generate(model, **ended)
    assert torch.equal(got, function(model, **ended))
    assert got[2, -1] == 60
    config = transformers.GenerationConfig(max_length=width + 5, do_sample=False, **ended)
    short = generate(model, generation_config=config, max_new_tokens=None)
    assert torch.equal(short, function(model, max_new_tokens=5, **ended))
    model.generation_config.eos_token_id = eos
    assert torch.equal(generate(model), function(model))
    assert torch.equal(generate(model, min_new_tokens=STEPS)[:, : width + 1], want[:, : width + 1])
    assert generate(model, min_new_tokens=STEPS).shape == want.shape
    assert generate(model, max_time=1e-9).shape == (3, width + 1)

    class Ends(transformers.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.tensor([True, False, True]) & (input_ids.shape[1] >= width + 2)

    got = generate(model, eos_token_id=None, stopping_criteria=[Ends()])
    assert torch.equal(got, function(model, eos_token_id=[], stopping_criteria=[Ends()]))


def test_without_any_padding_token_rows_go_on_until_all_have_ended() -> None:
    model, width = make("gpt2", pad_token_id=None, bos_token_id=None), ASKED.ids.shape[1]

    class Ends(transformers.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            new = input_ids.shape[1] - width
            return torch.tensor([new >= 1, new >= 4, new >= 2])

    got = generate(model, stopping_criteria=[Ends()])
    assert torch.equal(got, released(model, ASKED, 2.5, 4))


def test_a_streamer_of_our_own() -> None:
    model, asked, parts = make("gpt2"), ASKED.pick([1]), []

    class Streamer(transformers.generation.BaseStreamer):
        def put(self, value: Tensor) -> None:
            parts.append(value.flatten())

        def end(self) -> None:
            parts.append(torch.empty(0, dtype=torch.int64))

    decoding = SelfContrastiveDecoding(asked.safety_ids, streamer=Streamer())
    got = generate(model, decoding, input_ids=asked.ids, attention_mask=asked.mask)
    assert len(parts) == STEPS + 2
    assert torch.equal(torch.cat(parts), got[0])
    many = SelfContrastiveDecoding(ASKED.safety_ids, streamer=Streamer())
    with pytest.raises(ValueError, match="streamer must have one sequence, got 3"):
        generate(model, many)


def test_one_seed_per_prompt() -> None:
    model = make("gpt2")
    decoding = SelfContrastiveDecoding(ASKED.safety_ids, ASKED.safety_mask, seed=[4, 5, 6])
    got = generate(model, decoding, do_sample=True, num_return_sequences=2, top_k=0)
    want = function(model, seed=[4, 5, 6], do_sample=True, num_return_sequences=2)
    assert torch.equal(got, want)
    torch.manual_seed(3)
    free = SelfContrastiveDecoding(ASKED.safety_ids, ASKED.safety_mask)
    first = generate(model, free, do_sample=True)
    assert not torch.equal(generate(model, free, do_sample=True), first)
    torch.manual_seed(3)
    assert torch.equal(generate(model, free, do_sample=True), first)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("num_beams", {"num_beams": 2}),
        ("guidance_scale", {"guidance_scale": 1.5}),
        ("penalty_alpha", {"penalty_alpha": 0.6, "top_k": 4}),
        ("dola_layers", {"dola_layers": "high"}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
        ("cache_implementation", {"cache_implementation": "static"}),
        ("return_dict_in_generate", {"return_dict_in_generate": True}),
        ("prefill_chunk_size", {"prefill_chunk_size": 2}),
        ("output_attentions", {"output_attentions": True, "return_dict_in_generate": False}),
        ("past_key_values", {"past_key_values": transformers.DynamicCache()}),
        ("position_ids", {"position_ids": torch.arange(9)[None].expand(3, 9)}),
        ("logits_to_keep", {"logits_to_keep": 3}),
        ("token_type_ids", {"token_type_ids": torch.zeros(3, 9, dtype=torch.int64)}),
        ("safety_input_ids", {"safety_input_ids": ASKED.safety_ids[:2]}),
    ],
)
def test_what_cannot_be_done_is_an_error(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        generate(make("gpt2"), **settings)


def test_a_ratio_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="ratio must be finite"):
        SelfContrastiveDecoding(ASKED.safety_ids, ratio=float("inf"))


def test_prompts_without_a_mask() -> None:
    model = make("gpt2")
    want = released(model, ASKED, 2.5, STEPS)
    bare = SelfContrastiveDecoding(ASKED.safety_ids)
    assert torch.equal(generate(model, bare, attention_mask=None), want)
    model.generation_config.bos_token_id = PAD
    with pytest.raises(ValueError, match="safety_attention_mask must be given"):
        generate(model, bare)
    model.generation_config.bos_token_id = BOS
    one = build([tokens(4, 1)], [tokens(6, 2)])
    got = generate(
        model, SelfContrastiveDecoding(one.safety_ids), input_ids=one.ids, attention_mask=None
    )
    assert torch.equal(got, released(model, one, 2.5, STEPS))
