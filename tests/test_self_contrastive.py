"""Self-CD against the released procedure: two full forward passes a token, question by question."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from self_contrastive_cases import (
    EOS,
    KINDS,
    PAD,
    VOCAB,
    Questions,
    build,
    make,
    pad_left,
    questions,
    released,
    released_loop,
    tokens,
)
from trimtab import contrastive_sample
from trimtab.algorithms.self_contrastive import loop, self_contrastive_generate

transformers = pytest.importorskip("transformers")

STEPS = 10


class Watched(torch.nn.Module):
    """A model as an adapter library wraps it, which notes what it is called with."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside, self.config = inside, inside.config
        self.generation_config = inside.generation_config
        self.calls: list[dict[str, Any]] = []

    def get_base_model(self) -> Any:
        return self.inside

    def get_input_embeddings(self) -> Any:
        return self.inside.get_input_embeddings()

    def forward(self, **inputs: Any) -> Any:
        output = self.inside(**inputs)
        self.calls.append({**inputs, "logits": output.logits})
        return output


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_unequal_lengths_is_the_released_procedure(kind: str) -> None:
    model, asked = make(kind), questions()
    got = self_contrastive_generate(model, **asked.arguments(), max_new_tokens=STEPS)
    assert torch.equal(got, released(model, asked, 2.5, STEPS))
    assert got.dtype == torch.int64
    assert len(set(got[:, asked.ids.shape[1] :].flatten().tolist())) > 5, "a test of something"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [0, 1])
def test_one_question_is_the_released_procedure(kind: str, row: int) -> None:
    model, asked = make(kind), questions().pick([row])
    got = self_contrastive_generate(model, asked.ids, asked.safety_ids, max_new_tokens=STEPS)
    assert torch.equal(got, released(model, asked, 2.5, STEPS))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 3.0])
def test_ratio(ratio: float) -> None:
    model, asked = make("llama"), questions()
    got = self_contrastive_generate(model, **asked.arguments(), ratio=ratio, max_new_tokens=STEPS)
    assert torch.equal(got, released(model, asked, ratio, STEPS))


@pytest.mark.parametrize(("ratio", "side"), [(0.0, "safety"), (1.0, "plain")])
def test_the_ends_of_ratio_are_plain_decoding(ratio: float, side: str) -> None:
    model, asked = make("gpt2"), questions()
    ids, mask = pad_left(getattr(asked, side))
    want = model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)
    got = self_contrastive_generate(model, **asked.arguments(), ratio=ratio, max_new_tokens=STEPS)
    assert torch.equal(got[:, -STEPS:], want[:, -STEPS:])


def test_the_defaults_are_the_released_ones() -> None:
    default = {
        name: parameter.default
        for name, parameter in inspect.signature(self_contrastive_generate).parameters.items()
    }
    assert default["ratio"] == 2.5
    assert default["max_new_tokens"] == 200
    assert default["do_sample"] is False
    assert default["plausibility"] is None


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "mistral"])
def test_without_a_cache(kind: str) -> None:
    model, asked = make(kind), questions()
    got = self_contrastive_generate(
        model, **asked.arguments(), max_new_tokens=STEPS, use_cache=False
    )
    assert torch.equal(got, released(model, asked, 2.5, STEPS))


def test_a_model_that_has_no_cache_of_keys() -> None:
    model = make("mamba", state_size=4, expand=2, conv_kernel=3)
    asked = questions().pick([0])
    with pytest.raises(ValueError, match="use_cache must be False for MambaForCausalLM"):
        self_contrastive_generate(model, **asked.arguments(), max_new_tokens=2)
    got = self_contrastive_generate(
        model, **asked.arguments(), max_new_tokens=STEPS, use_cache=False
    )
    assert torch.equal(got, released(model, asked, 2.5, STEPS))


def test_what_pads_and_how_wide_changes_nothing() -> None:
    model, asked = make("gpt2"), questions()
    want = released(model, asked, 2.5, STEPS)
    arguments = asked.arguments()
    noise = torch.randint(3, VOCAB, asked.ids.shape)
    arguments["input_ids"] = torch.where(asked.mask.bool(), asked.ids, noise)
    for name, value in (("safety_input_ids", 5), ("safety_attention_mask", 0)):
        arguments[name] = torch.nn.functional.pad(arguments[name], (6, 0), value=value)
    arguments["attention_mask"] = arguments["attention_mask"].bool()
    got = self_contrastive_generate(model, **arguments, max_new_tokens=STEPS)
    assert torch.equal(got[:, -STEPS:], want[:, -STEPS:])
    assert torch.equal(got[:, :-STEPS], arguments["input_ids"]), "prompts come back as given"


def test_masks_are_found_where_padding_cannot_be_text() -> None:
    model, asked = make("gpt2"), questions()
    got = self_contrastive_generate(model, asked.ids, asked.safety_ids, max_new_tokens=STEPS)
    assert torch.equal(got, released(model, asked, 2.5, STEPS))
    # In a prompt, behind its first token, the padding token is a token.
    inner = build([torch.tensor([5, PAD, 6]), tokens(5, 3)], [tokens(4, 4), tokens(7, 5)])
    got = self_contrastive_generate(model, inner.ids, inner.safety_ids, max_new_tokens=3)
    assert torch.equal(got, released(model, inner, 2.5, 3))


@pytest.mark.parametrize("also", [{"eos_token_id": PAD}, {"bos_token_id": PAD}])
def test_masks_are_asked_for_where_padding_may_be_text(also: dict[str, int]) -> None:
    model, asked = make("gpt2"), questions()
    for name, token in also.items():
        setattr(model.generation_config, name, token)
    with pytest.raises(ValueError, match="attention_mask must be given where the padding token 0"):
        self_contrastive_generate(model, asked.ids, asked.safety_ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="safety_attention_mask must be given"):
        self_contrastive_generate(
            model, asked.ids, asked.safety_ids, attention_mask=asked.mask, max_new_tokens=2
        )
    # One row needs no padding: what stands in it is text.
    one = build([torch.tensor([PAD, 7, 8])], [torch.tensor([PAD, 9, 7, 8])])
    got = self_contrastive_generate(
        model, one.ids, one.safety_ids, max_new_tokens=3, eos_token_id=[]
    )
    assert torch.equal(got, released(model, one, 2.5, 3))


def test_one_safety_context_for_all() -> None:
    model, asked = make("gpt2"), questions()
    shared = build(asked.plain, [asked.safety[0]] * 3)
    got = self_contrastive_generate(
        model, asked.ids, shared.safety_ids[:1], attention_mask=asked.mask, max_new_tokens=STEPS
    )
    assert torch.equal(got, released(model, shared, 2.5, STEPS))


def test_one_forward_pass_per_token_over_one_cache() -> None:
    model, asked = Watched(make("llama")), questions()
    self_contrastive_generate(model, **asked.arguments(), max_new_tokens=4)
    # The second call is the shortest row alone, for the check that padding is masked.
    shapes = [(6, 16), (1, 2), (6, 1), (6, 1), (6, 1)]
    assert [call["input_ids"].shape for call in model.calls] == shapes
    alone = model.calls.pop(1)
    assert torch.equal(alone["input_ids"][0], asked.plain[2])
    assert all(call["logits"].shape == (6, 1, VOCAB) for call in model.calls)
    positions = [call["position_ids"][:, -1].tolist() for call in model.calls]
    lengths = torch.tensor([len(row) for row in asked.plain + asked.safety])
    assert positions == [(lengths - 1 + step).tolist() for step in range(4)]
    assert [call["attention_mask"].shape[1] for call in model.calls] == [16, 17, 18, 19]


def test_no_mask_where_nothing_is_padded() -> None:
    model, asked = Watched(make("llama")), questions((5,), (0,))
    self_contrastive_generate(model, **asked.arguments(), max_new_tokens=3)
    assert all("attention_mask" not in call for call in model.calls)


def test_logits_go_to_the_op_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(positive: Tensor, negative: Tensor, **settings: Any) -> Any:
        if len(positive):
            seen.append((positive.dtype, positive is negative, positive.data_ptr()))
        return contrastive_sample(positive, negative, **settings)

    monkeypatch.setattr(loop, "contrastive_sample", spy)
    model, asked = Watched(make("llama").to(torch.bfloat16)), questions()
    self_contrastive_generate(model, **asked.arguments(), max_new_tokens=3)
    made = [call["logits"].data_ptr() for call in model.calls if len(call["input_ids"]) > 1]
    assert seen == [(torch.bfloat16, True, pointer) for pointer in made]


def test_rows_end_at_their_eos_and_are_padded() -> None:
    model, asked = make("gpt2"), questions()
    traces = [released_loop(model, *pair, 2.5, STEPS).new for pair in zip(*asked[:2], strict=True)]
    eos = traces[1][3]
    assert [eos in trace for trace in traces].count(True) < 3, "not all rows may end"
    got = self_contrastive_generate(
        model, **asked.arguments(), max_new_tokens=STEPS, eos_token_id=eos, pad_token_id=60
    )
    assert torch.equal(got, released(model, asked, 2.5, STEPS, eos, pad=60))
    assert got[1, -1] == 60
    # Several of them, from the model's generation config, until every row has ended.
    model.generation_config.eos_token_id = [trace[4 - row] for row, trace in enumerate(traces)]
    got = self_contrastive_generate(model, **asked.arguments(), max_new_tokens=STEPS)
    ends = [
        next(i for i, token in enumerate(trace) if token in model.generation_config.eos_token_id)
        for trace in traces
    ]
    assert got.shape[1] == asked.ids.shape[1] + max(ends) + 1
    for row, (trace, end) in enumerate(zip(traces, ends, strict=True)):
        new = got[row, asked.ids.shape[1] :].tolist()
        assert new == trace[: end + 1] + [PAD] * (max(ends) - end)
    full = self_contrastive_generate(
        model, **asked.arguments(), max_new_tokens=STEPS, eos_token_id=[]
    )
    assert torch.equal(full, released(model, asked, 2.5, STEPS))


FILTERS = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02}


def sampled_loop(model: Any, asked: Questions, seeds: list[int], copy: int = 0) -> Tensor:
    """Sampling with full forward passes of single questions."""
    rows = []
    for plain, safety, seed in zip(asked.plain, asked.safety, seeds, strict=True):
        new = torch.empty(0, dtype=torch.int64)
        for step in range(STEPS):
            sides = [
                model(torch.cat([side, new])[None]).logits.detach()[:, -1]
                for side in (plain, safety)
            ]
            drawn = contrastive_sample(
                *sides, alpha=1.5, plausibility=1e-4, seed=seed, position=step + (copy << 32),
                impl="reference", **FILTERS,
            )  # fmt: skip
            new = torch.cat([new, drawn.token])
        rows.append(new)
    return torch.stack(rows)


def sample(model: Any, asked: Questions, seed: Any, **changes: Any) -> Tensor:
    settings = {"do_sample": True, "max_new_tokens": STEPS, "plausibility": 1e-4, **FILTERS}
    got = self_contrastive_generate(
        model, **asked.arguments(), seed=seed, **{**settings, **changes}
    )
    return got[:, asked.ids.shape[1] :]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_sampling_is_the_same_whatever_the_batch(kind: str) -> None:
    model, asked, seeds = make(kind), questions(), [3, -(2**40), 7]
    want = sampled_loop(model, asked, seeds)
    assert torch.equal(sample(model, asked, seeds), want)
    assert torch.equal(sample(model, asked, torch.tensor(seeds)), want)
    for order in ([2, 0], [1], [0, 1, 2, 1, 0]):
        got = sample(model, asked.pick(order), [seeds[row] for row in order])
        assert torch.equal(got, want[order])
    assert torch.equal(sample(model, asked, 3)[0], want[0]), "one seed for all"
    assert not torch.equal(sample(model, asked, 4)[0], want[0])


@pytest.mark.parametrize("use_cache", [True, False])
def test_returned_sequences_have_streams_of_their_own(use_cache: bool) -> None:
    model, asked, seeds = make("gpt2"), questions(), [3, 4, 3]
    got = sample(model, asked, seeds, num_return_sequences=3, use_cache=use_cache)
    want = torch.stack([sampled_loop(model, asked, seeds, copy) for copy in range(3)], 1)
    assert torch.equal(got, want.flatten(0, 1))
    assert len({tuple(row) for row in got.tolist()}) == 9
    watched = Watched(model)
    sample(watched, asked, seeds, num_return_sequences=3)
    rows = [len(call["input_ids"]) for call in watched.calls]
    assert rows == [6, 1] + [18] * (STEPS - 1), "a prompt runs once, and one for the check"


def test_without_a_seed_torch_draws_one() -> None:
    model, asked = make("gpt2"), questions().pick([0, 0])
    torch.manual_seed(5)
    first = sample(model, asked, None)
    assert not torch.equal(first[0], first[1]), "one for each prompt"
    assert not torch.equal(sample(model, asked, None), first)
    torch.manual_seed(5)
    assert torch.equal(sample(model, asked, None), first)
    state = torch.get_rng_state()
    sample(model, asked, 1)
    self_contrastive_generate(model, **asked.arguments(), max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("processors", [[], [lambda ids, scores: scores]])
def test_plausibility_keeps_what_the_plain_side_holds_likely(processors: list[Any]) -> None:
    model, asked = make("gpt2"), questions()
    got = self_contrastive_generate(
        model, **asked.arguments(), max_new_tokens=4, plausibility=1.0, ratio=9.0,
        logits_processor=processors,
    )  # fmt: skip
    plain = self_contrastive_generate(model, **asked.arguments(), max_new_tokens=4, ratio=1.0)
    assert torch.equal(got, plain), "beta = 1 leaves the plain side's likeliest token"


def test_logits_processors_work_on_the_combined_logits() -> None:
    model, asked = make("gpt2"), questions()
    want = released(model, asked, 2.5, STEPS)
    seen = []

    def note(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append((ids.clone(), scores.clone()))
        return scores

    first = want[:, asked.ids.shape[1]]

    def ban(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, first[:, None], -float("inf"))

    arguments = {**asked.arguments(), "max_new_tokens": STEPS}
    got = self_contrastive_generate(model, **arguments, logits_processor=[note])
    assert torch.equal(got, want)
    for step, (ids, scores) in enumerate(seen):
        assert torch.equal(ids, want[:, : asked.ids.shape[1] + step])
        assert scores.dtype == torch.float32
        assert torch.equal(scores.argmax(1), want[:, asked.ids.shape[1] + step])
    full = [model(side[0][None]).logits.detach()[0, -1] for side in (asked.plain, asked.safety)]
    torch.testing.assert_close(seen[0][1][0], full[1] - 2.5 * (full[1] - full[0]))
    banned = self_contrastive_generate(model, **arguments, logits_processor=(ban,))
    assert not (banned[:, asked.ids.shape[1] :] == first[:, None]).any()
    # The filters come after the processors, in the op or as transformers' own classes.
    warpers = [
        transformers.TemperatureLogitsWarper(1.5), transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.9), transformers.MinPLogitsWarper(0.02),
    ]  # fmt: skip
    off = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
    here = sample(model, asked, 3, logits_processor=[note], num_return_sequences=2)
    there = sample(model, asked, 3, logits_processor=warpers, num_return_sequences=2, **off)
    assert torch.equal(here, there)
    assert torch.equal(here, sample(model, asked, 3, num_return_sequences=2))


def test_stopping_criteria_end_rows() -> None:
    model, asked = make("gpt2"), questions()
    want, width = released(model, asked, 2.5, STEPS), asked.ids.shape[1]

    class Ends(transformers.StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            new = input_ids.shape[1] - width
            return torch.tensor([new >= 2, new >= 5, new >= 3])

    for criteria in ([Ends()], transformers.StoppingCriteriaList([Ends()])):
        got = self_contrastive_generate(
            model, **asked.arguments(), max_new_tokens=STEPS, stopping_criteria=criteria
        )
        assert got.shape[1] == width + 5
        for row, new in enumerate((2, 5, 3)):
            assert torch.equal(got[row, : width + new], want[row, : width + new])
            assert (got[row, width + new :] == PAD).all()


def test_a_streamer_gets_the_prompt_and_every_token() -> None:
    model, asked = make("gpt2"), questions().pick([1])
    parts: list[Any] = []

    class Streamer(transformers.generation.BaseStreamer):
        def put(self, value: Tensor) -> None:
            parts.append(value.clone())

        def end(self) -> None:
            parts.append("end")

    want = released(model, asked, 2.5, STEPS)
    eos = int(want[0, asked.ids.shape[1] + 6])
    want = released(model, asked, 2.5, STEPS, eos)
    self_contrastive_generate(
        model, **asked.arguments(), max_new_tokens=STEPS, eos_token_id=eos, streamer=Streamer()
    )
    assert parts.pop() == "end"
    assert torch.equal(parts[0], asked.ids)
    assert all(part.shape == (1,) for part in parts[1:])
    assert torch.equal(torch.cat([parts[0][0], *parts[1:]]), want[0])


def test_the_model_is_left_in_its_mode_and_without_gradients() -> None:
    model, asked = make("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), questions()
    want = released(model, asked, 2.5, STEPS)
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    noted = Watched(model)
    got = self_contrastive_generate(noted, **asked.arguments(), max_new_tokens=STEPS)
    assert torch.equal(got, want)
    assert [module.training for module in model.modules()] == before
    assert not any(call["logits"].requires_grad for call in noted.calls)


def test_logits_with_nan_are_an_error_that_names_the_row() -> None:
    model, asked = make("gpt2"), questions()

    class Broken(Watched):
        def forward(self, **inputs: Any) -> Any:
            output = super().forward(**inputs)
            output.logits[4:5] = float("nan")  # row 1 behind its safety prompt
            return output

    for more in ({}, {"eos_token_id": EOS}, {"pad_token_id": 60}):
        with pytest.raises(ValueError, match=r"model must give logits .* rows \[1\]"):
            self_contrastive_generate(Broken(model), **asked.arguments(), max_new_tokens=3, **more)


def test_memory_is_taken_as_it_is_needed() -> None:
    model, asked = (
        make("gpt2", n_positions=1024, max_position_embeddings=1024),
        questions().pick([0]),
    )
    one = self_contrastive_generate(model, **asked.arguments(), max_new_tokens=300)
    stop = asked.ids.shape[1] + 300

    def enough(ids: Tensor, scores: Any) -> bool:
        return ids.shape[1] == stop

    got = self_contrastive_generate(
        model, **asked.arguments(), max_new_tokens=10**12, stopping_criteria=[enough]
    )
    assert torch.equal(got, one)
