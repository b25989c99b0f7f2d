"""ContrastiveLogitsProcessor inside generate, against full forward passes of unpadded contexts.

The tests named ``bug`` hold what transformers' own UnbatchedClassifierFreeGuidanceLogitsProcessor
(5.23, tiny GPT-2 and LLaMA models) does wrong or cannot do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from self_contrastive_cases import PAD, VOCAB, Questions, build, make, questions, tokens
from trimtab.algorithms.self_contrastive import (
    ContrastiveBranch,
    ContrastiveLogitsProcessor,
    SelfContrastiveDecoding,
    self_contrastive_generate,
)
from trimtab.algorithms.self_contrastive.decoder import Decoder
from trimtab.algorithms.self_contrastive.prompts import Prompts
from trimtab.testing import assert_within_budget

transformers = pytest.importorskip("transformers")

STEPS = 7
SCALE = 2.5


class Stateless(transformers.LogitsProcessor):
    """The formula in float64 with no memory: every context is run again, alone and unpadded.

    ``sides`` are pairs of a model and its prompts (one per row of the batch, or None for
    generate's own prompt without its padding); weights multiply the scores and each side.
    """

    def __init__(
        self,
        sides: list[tuple[Any, list[Tensor] | None]],
        weights: tuple[float, ...],
        width: int,
    ) -> None:
        self.sides, self.weights, self.width = sides, weights, width

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        z = self.weights[0] * scores.double()
        for (model, prompts), weight in zip(self.sides, self.weights[1:], strict=True):
            for row, ids in enumerate(input_ids):
                own = ids[: self.width]
                own = own[(own != PAD).cumsum(0) > 0]
                prompt = own if prompts is None else prompts[row * len(prompts) // len(input_ids)]
                context = torch.cat([prompt, ids[self.width :]])
                z[row] += weight * model(context[None]).logits[0, -1].double()
        return torch.log_softmax(z, -1).to(scores)


def guidance(model: Any, negative: list[Tensor], width: int, scale: float = SCALE) -> Stateless:
    return Stateless([(model, negative)], (scale, 1 - scale), width)


def run(model: Any, asked: Questions, processor: Any, **settings: Any) -> Any:
    torch.manual_seed(1)
    return model.generate(
        asked.ids, attention_mask=asked.mask, logits_processor=[processor],
        **{"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True,
           "output_scores": True, **settings},
    )  # fmt: skip


def assert_same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences, want.sequences)
    for ours, theirs in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    if "sequences_scores" in want:
        torch.testing.assert_close(got.sequences_scores, want.sequences_scores)


def ours(model: Any, asked: Questions, **changes: Any) -> ContrastiveLogitsProcessor:
    return ContrastiveLogitsProcessor.classifier_free_guidance(
        model, SCALE, asked.safety_ids, asked.safety_mask, **changes
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "qwen2", "mistral"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "top_k": 20, "temperature": 1.5, "top_p": 0.9},
        {"num_beams": 3},
    ],
    ids=["greedy", "sample", "beams"],
)
def test_bug4_unequal_negative_prompts_have_the_right_positions(
    kind: str, settings: dict[str, Any]
) -> None:
    model, asked = make(kind), questions()
    want = run(model, asked, guidance(model, asked.safety, asked.ids.shape[1]), **settings)
    assert_same(run(model, asked, ours(model, asked), **settings), want)
    # Without masks too, where the padding token can't be text; what pads does not matter.
    bare = ContrastiveLogitsProcessor.classifier_free_guidance(model, SCALE, asked.safety_ids)
    assert_same(run(model, asked, bare, **settings), want)


def test_bug4_a_mask_that_cannot_be_known_is_asked_for() -> None:
    model, asked = make("gpt2"), questions()
    model.generation_config.eos_token_id = PAD
    make_it = ContrastiveLogitsProcessor.classifier_free_guidance
    with pytest.raises(ValueError, match="negative_prompt_attention_mask must be given"):
        make_it(model, SCALE, asked.safety_ids)
    with pytest.raises(ValueError, match="negative_prompt_ids must be padded on the left"):
        make_it(model, SCALE, asked.safety_ids, asked.safety_mask.flip(1))
    prompts = ContrastiveLogitsProcessor.dexperts(model, model)
    with pytest.raises(ValueError, match="attention_mask must be given"):
        run(model, asked, prompts)
    named = ContrastiveLogitsProcessor.dexperts(model, model, asked.mask)
    assert run(model, asked, named).sequences.shape[1] > asked.ids.shape[1]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("settings", [
    {"num_beams": 4},
    {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0},
    {"num_beams": 4, "do_sample": True, "top_k": 10},
    {"num_beams": 3, "eos_token_id": [11, 12, 13, 14, 15, 16, 17, 18], "pad_token_id": PAD},
])  # fmt: skip
def test_bug1_the_negative_side_follows_the_beams(
    kind: str, use_cache: bool, settings: dict[str, Any]
) -> None:
    model, asked = make(kind), questions()
    want = run(model, asked, guidance(model, asked.safety, asked.ids.shape[1]), **settings)
    moved = want.beam_indices[:, 1:STEPS] - want.beam_indices[:, : STEPS - 1]
    assert (moved != 0).any(), "beams that never move test nothing"
    assert_same(run(model, asked, ours(model, asked, use_cache=use_cache), **settings), want)


def test_bug1_beams_of_equal_prompts_keep_their_own_negative_prompts() -> None:
    model, asked = make("gpt2"), questions()
    same = build([asked.plain[0]] * 3, asked.safety)
    want = run(model, same, guidance(model, same.safety, same.ids.shape[1]), num_beams=3)
    assert_same(run(model, same, ours(model, same), num_beams=3), want)
    # Negative prompts that the caller has repeated for the beams are the same prompts.
    repeated = build(same.plain, [row for row in same.safety for _ in range(3)])
    assert_same(run(model, same, ours(model, repeated), num_beams=3), want)


def test_bug1_scores_of_beams_are_log_probabilities() -> None:
    model, asked = make("gpt2"), questions()
    got = run(model, asked, ours(model, asked), num_beams=2, num_return_sequences=2)
    assert (got.sequences_scores < 0).all()
    scores = ours(model, asked)(asked.ids, 9 * torch.randn(3, VOCAB))
    torch.testing.assert_close(scores.logsumexp(1), torch.zeros(3), atol=1e-5, rtol=0)


def test_bug2_returned_sequences() -> None:
    model, asked = make("gpt2"), questions()
    settings = {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 2.0}
    want = run(model, asked, guidance(model, asked.safety, asked.ids.shape[1]), **settings)
    assert len({tuple(row) for row in want.sequences.tolist()}) == 9
    assert_same(run(model, asked, ours(model, asked), **settings), want)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_bug3_one_negative_prompt_for_all(settings: dict[str, Any]) -> None:
    model, asked = make("gpt2"), questions()
    shared = build(asked.plain, [asked.safety[0]])
    want = run(model, asked, guidance(model, shared.safety, asked.ids.shape[1]), **settings)
    assert_same(run(model, asked, ours(model, shared), **settings), want)


class Fixed:
    """A model whose next-token logits are given."""

    config = generation_config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def forward(self, input_ids: Tensor, use_cache: bool, **more: Any) -> Any:
        return SimpleNamespace(logits=self.logits[:, None])

    __call__ = forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bug5_both_sides_are_float32_from_the_raw_rows(dtype: torch.dtype) -> None:
    positive, negative = (5 * torch.randn(3, 5000)).to(dtype), (5 * torch.randn(3, 5000)).to(dtype)
    processor = ContrastiveLogitsProcessor.classifier_free_guidance(
        Fixed(negative), SCALE, torch.ones(3, 2, dtype=torch.int64), use_cache=False
    )
    got = processor(torch.ones(3, 4, dtype=torch.int64), positive.float())

    def guided(p: Tensor, n: Tensor) -> Tensor:
        return torch.log_softmax(p + (SCALE - 1) * (p - n), -1)

    truth = guided(positive.double(), negative.double())
    assert got.dtype == torch.float32
    assert_within_budget(got, guided(positive.float(), negative.float()), truth)


def test_bug6_continuous_batching_is_told_that_it_cannot() -> None:
    model, asked = make("gpt2"), questions()
    processor = ours(model, asked)
    assert isinstance(processor, transformers.LogitsProcessor)
    assert processor.supports_continuous_batching is False


def test_bug7_guidance_scale_means_one_thing() -> None:
    model, asked = make("gpt2"), questions().pick([0])
    scores = torch.randn(1, VOCAB)
    got = ours(model, asked)(asked.ids, scores)
    theirs = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(
        SCALE, model, asked.safety_ids, asked.safety_mask
    )
    with torch.no_grad():
        want = theirs(asked.ids, scores).log_softmax(-1)
        pair = torch.cat([scores, model(asked.safety_ids).logits[:, -1]])
    torch.testing.assert_close(got, want)
    for name, scale in (
        ("ClassifierFreeGuidance", SCALE),
        ("DiaClassifierFreeGuidance", SCALE - 1),
    ):
        other = getattr(transformers.generation.logits_process, f"{name}LogitsProcessor")(scale)
        torch.testing.assert_close(got, other(asked.ids, pair).log_softmax(-1))
    default = ContrastiveLogitsProcessor.classifier_free_guidance(model, SCALE)(asked.ids, scores)
    theirs = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(SCALE, model)
    with torch.no_grad():
        torch.testing.assert_close(default, theirs(asked.ids, scores).log_softmax(-1))


def test_one_object_serves_many_calls() -> None:
    model, asked = make("gpt2"), questions()
    processor = ours(model, asked)
    first = run(model, asked, processor)
    assert_same(run(model, asked, processor), first)
    assert_same(run(model, asked, processor, num_beams=3), run(
        model, asked, guidance(model, asked.safety, asked.ids.shape[1]), num_beams=3
    ))  # fmt: skip
    other = build([row.flip(0) for row in asked.plain], asked.safety)
    want = run(model, other, guidance(model, asked.safety, other.ids.shape[1]))
    assert_same(run(model, other, processor), want)
    # One token longer than what was seen, and yet another text.
    longer = build([tokens(len(row) + STEPS, 50 + len(row)) for row in asked.plain], asked.safety)
    want = run(model, longer, guidance(model, asked.safety, longer.ids.shape[1]))
    assert_same(run(model, longer, processor), want)


def test_a_bias_behind_the_processor_works_on_the_contrast() -> None:
    model, asked = make("gpt2"), questions()
    bias = [[[token], float(token % 7)] for token in range(5, 60)]
    behind = transformers.SequenceBiasLogitsProcessor(bias)
    settings = {"attention_mask": asked.mask, "max_new_tokens": STEPS, "do_sample": False}
    decoding = SelfContrastiveDecoding(asked.safety_ids, asked.safety_mask)
    want = model.generate(asked.ids, custom_generate=decoding, sequence_bias=bias, **settings)
    ours = ContrastiveLogitsProcessor.self_contrastive(model, asked.safety_ids, asked.safety_mask)
    got = model.generate(asked.ids, logits_processor=[ours, behind], **settings)
    assert torch.equal(got, want)
    # By the config, it comes before and is multiplied along with the scores.
    before = model.generate(asked.ids, logits_processor=[ours], sequence_bias=bias, **settings)
    assert not torch.equal(before, want)


def test_generate_on_its_own_output_goes_on() -> None:
    model, asked = make("gpt2"), questions()
    whole = run(model, asked, ours(model, asked), max_new_tokens=2 * STEPS).sequences
    processor = ours(model, asked)
    half = run(model, asked, processor).sequences
    mask = torch.cat([asked.mask, torch.ones(3, STEPS, dtype=torch.int64)], 1)
    longer = asked._replace(ids=half, mask=mask)
    assert torch.equal(run(model, longer, processor).sequences, whole)
    processor.reset()
    again = run(model, longer, processor)
    assert not torch.equal(again.sequences, whole), "the negative side has begun anew"
    assert_same(again, run(model, longer, guidance(model, asked.safety, half.shape[1])))


def test_assisted_decoding_rolls_back() -> None:
    model = make("gpt2")
    text = tokens(4, 3).repeat(5)
    asked = build([text], [tokens(6, 4)])
    want = run(model, asked, guidance(model, asked.safety, len(text)), max_new_tokens=14)
    got = run(model, asked, ours(model, asked), max_new_tokens=14, prompt_lookup_num_tokens=3)
    assert torch.equal(got.sequences, want.sequences)


def test_a_step_that_fails_can_be_repeated() -> None:
    model, asked = make("gpt2"), questions()
    one, two = (torch.cat([asked.ids, torch.full((3, n), 9)], 1) for n in (1, 2))
    scores = torch.zeros(3, VOCAB)
    processor, other = ours(model, asked), ours(model, asked)
    want = [other(ids, scores) for ids in (asked.ids, one, two)]
    processor(asked.ids, scores)
    forward = model.transformer.h[1].forward
    model.transformer.h[1].forward = None  # one layer's cache has grown, the other's not
    with pytest.raises(TypeError):
        processor(one, scores)
    model.transformer.h[1].forward = forward
    for ids, scored in ((one, want[1]), (two, want[2]), (asked.ids, want[0])):
        torch.testing.assert_close(processor(ids, scores), scored)


def test_ids_may_be_one_buffer_that_is_written_over() -> None:
    model, asked = make("gpt2"), questions().pick([0])
    asked = build(asked.plain * 2, asked.safety * 2)
    width, scores = asked.ids.shape[1], torch.zeros(2, VOCAB)
    processor, truth = ours(model, asked), guidance(model, asked.safety, width)
    buffer = torch.cat([asked.ids, torch.tensor([[11, 5], [12, 6]])], 1)
    for step in range(3):
        if step == 2:
            buffer[:, :-1] = buffer[:, :-1].flip(0)
        ids = buffer[:, : width + step]
        torch.testing.assert_close(processor(ids, scores), truth(ids, scores), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_dexperts(settings: dict[str, Any]) -> None:
    base, expert, anti = make("gpt2"), make("llama", 1), make("gpt2", 2)
    asked = questions()
    want = Stateless([(expert, None), (anti, None)], (1.0, 1.5, -1.5), asked.ids.shape[1])
    want = run(base, asked, want, **settings)
    dexperts = ContrastiveLogitsProcessor.dexperts
    for processor in (
        dexperts(expert, anti, asked.mask, alpha=1.5),
        dexperts(expert, anti, alpha=1.5),
        ContrastiveLogitsProcessor(
            ContrastiveBranch(anti), alpha=1.5, positive=ContrastiveBranch(expert)
        ),
    ):
        assert_same(run(base, asked, processor, **settings), want)


def test_context_aware() -> None:
    model, asked = make("llama"), questions()
    with_context = build(asked.safety, asked.plain)
    processor = ContrastiveLogitsProcessor.context_aware(model, asked.ids, asked.mask, alpha=0.8)
    want = guidance(model, asked.plain, with_context.ids.shape[1], scale=1.8)
    assert_same(run(model, with_context, processor), run(model, with_context, want))


class Seeing(torch.nn.Module):
    """A language model that sees a picture where the token 3 stands."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside, self.config = inside, inside.config
        self.generation_config = inside.generation_config

    def forward(self, input_ids: Tensor, picture: Tensor | None = None, **more: Any) -> Any:
        embedded = self.inside.get_input_embeddings()(input_ids)
        if picture is not None:
            embedded = embedded + picture[:, None] * (input_ids == 3)[..., None]
        return self.inside(inputs_embeds=embedded, **more)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_visual_contrastive(use_cache: bool, settings: dict[str, Any]) -> None:
    model, asked = make("llama"), questions()
    ids = torch.where(asked.mask.bool(), asked.ids, PAD)
    ids[:, -1] = 3
    ids[1] = ids[0]  # the same question about another picture
    asked = asked._replace(ids=ids, mask=(ids != PAD).long())
    pictures = 2 * torch.randn(3, 32)

    class Loop(Stateless):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            rows = []
            for row, context in enumerate(input_ids):
                real = context[(context != PAD).cumsum(0) > 0][None]
                picture = pictures[row * 3 // len(input_ids)][None]
                rows.append(Seeing(model)(real, picture).logits[0, -1])
            z = 1.5 * scores - 0.5 * torch.stack(rows).detach()
            low = scores < scores.max(1, keepdim=True).values + torch.log(torch.tensor(0.1))
            return torch.log_softmax(z.masked_fill(low, -float("inf")), -1)

    banned = {"suppress_tokens": [PAD, 3], **settings}  # they stand for something else here
    want = run(model, asked, Loop([], (), 0), **banned)
    processor = ContrastiveLogitsProcessor.visual_contrastive(
        Seeing(model), {"picture": pictures}, use_cache=use_cache, attention_mask=asked.mask
    )
    assert torch.equal(run(model, asked, processor, **banned).sequences, want.sequences)


@pytest.mark.parametrize("use_cache", [True, False])
def test_selected_rows_take_their_inputs_along(use_cache: bool) -> None:
    model, asked, pictures = Seeing(make("llama")), questions((4, 6), (0, 0)), torch.randn(2, 32)
    asked.ids[:, -1] = 3
    rows, new = torch.tensor([1, 1, 0]), torch.tensor([7, 8, 9])
    decoder = Decoder(model, use_cache=use_cache, model_inputs={"picture": pictures})
    with torch.no_grad():
        decoder.prefill(Prompts(asked.ids, asked.mask.bool()))
        decoder.select(rows)
        got = decoder.append(new)
        for place, row in enumerate(rows):
            context = torch.cat([asked.ids[row][asked.mask[row].bool()], new[place : place + 1]])
            want = model(context[None], pictures[row][None]).logits[0, -1]
            torch.testing.assert_close(got[place], want, atol=1e-3, rtol=1e-3)


def test_self_contrastive_is_self_cd_and_does_beams() -> None:
    model, asked = make("gpt2"), questions()
    make_it = ContrastiveLogitsProcessor.self_contrastive
    processor = make_it(model, asked.safety_ids, asked.safety_mask)
    want = self_contrastive_generate(model, **asked.arguments(), max_new_tokens=STEPS)
    assert torch.equal(run(model, asked, processor).sequences, want)
    beams = run(model, asked, guidance(model, asked.safety, asked.ids.shape[1]), num_beams=3)
    assert_same(run(model, asked, processor, num_beams=3), beams)


def test_a_mask_of_generate_survives() -> None:
    model, asked = make("gpt2"), questions()
    got = run(model, asked, ours(model, asked), suppress_tokens=list(range(90)))
    assert (got.sequences[:, -STEPS:] >= 90).all()


@pytest.mark.parametrize(
    ("match", "make_it"),
    [
        ("alpha must be finite", lambda c, m: c.classifier_free_guidance(m, float("inf"))),
        ("ratio must be finite", lambda c, m: c.self_contrastive(m, m, ratio=float("nan"))),
        ("plausibility must be", lambda c, m: c.visual_contrastive(m, cd_beta=2.0)),
        ("no_context_ids must be .prompts", lambda c, m: c.context_aware(m, torch.ones(3).long())),
    ],
)
def test_errors_when_it_is_made(match: str, make_it: Any) -> None:
    with pytest.raises(ValueError, match=match):
        make_it(ContrastiveLogitsProcessor, make("gpt2"))


def test_errors_of_rows_and_vocabularies() -> None:
    model, asked = make("gpt2"), questions()
    two = ours(model, asked.pick([0, 1]))
    with pytest.raises(ValueError, match="negative_prompt_ids must have a number of rows that div"):
        run(model, asked, two)
    small = ContrastiveLogitsProcessor.dexperts(model, make("llama", vocab_size=96))
    with pytest.raises(ValueError, match=r"scores must have the rows and vocabulary .*\(3, 96\)"):
        run(model, asked, small)
