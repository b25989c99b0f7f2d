"""What self_contrastive_generate says to arguments that don't fit, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from self_contrastive_cases import BOS, PAD, VOCAB, make, questions
from trimtab.algorithms.self_contrastive import self_contrastive_generate

transformers = pytest.importorskip("transformers")


class Counted(torch.nn.Module):
    """A model that counts its forward passes."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside, self.config = inside, inside.config
        self.generation_config, self.calls = inside.generation_config, 0

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        self.calls += 1
        return self.inside(input_ids=input_ids, **inputs)


ASKED = questions()
NAN = float("nan")


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (TypeError, "input_ids must be a tensor, got list", {"input_ids": [[1]]}),
        (TypeError, "input_ids must be integers", {"input_ids": ASKED.ids.float()}),
        (ValueError, "^input_ids must be .prompts", {"input_ids": ASKED.ids[0]}),
        (ValueError, "^input_ids must be .prompts", {"input_ids": ASKED.ids[:0]}),
        (ValueError, "^safety_input_ids must be .prompts", {"safety_input_ids": ASKED.ids[:, :0]}),
        (ValueError, "safety_input_ids must have 3 rows",
         {"safety_input_ids": ASKED.ids[:2], "safety_attention_mask": None}),
        (ValueError, "^attention_mask must have the shape", {"attention_mask": ASKED.mask[:1]}),
        (ValueError, "^safety_attention_mask must have the shape",
         {"safety_attention_mask": ASKED.mask}),
        (ValueError, "input_ids must be padded on the left, .* row 0",
         {"attention_mask": ASKED.mask.flip(1)}),
        (ValueError, "^input_ids must be padded on the left, .* row 0",
         {"input_ids": ASKED.ids.flip(1), "attention_mask": None}),
        (ValueError, "attention_mask must be one run of ones .* row 1",
         {"attention_mask": torch.ones_like(ASKED.mask).index_put(
             (torch.tensor(1), torch.tensor(4)), torch.tensor(0))}),
        (ValueError, "max_new_tokens must be a positive", {"max_new_tokens": 0}),
        (ValueError, "max_new_tokens must be a positive", {"max_new_tokens": 2.5}),
        (ValueError, "num_return_sequences must be a positive", {"num_return_sequences": 0}),
        (ValueError, "num_return_sequences must be 1 without", {"num_return_sequences": 2}),
        (ValueError, "ratio must be finite", {"ratio": NAN}),
        (ValueError, "plausibility must be", {"plausibility": 0.0}),
        (ValueError, "temperature must be", {"do_sample": True, "temperature": -1.0}),
        (ValueError, "top_p must be", {"top_p": 1.5}),
        (ValueError, "top_k must be", {"top_k": -1}),
        (ValueError, "seed must be a number or of shape", {"do_sample": True, "seed": [1, 2]}),
        (ValueError, "seed must be of 64 bits", {"do_sample": True, "seed": 2**63}),
        (TypeError, "seed must be integers", {"do_sample": True, "seed": [1.0, 2.0, 3.0]}),
        (ValueError, "streamer must have one sequence, got 3", {"streamer": object()}),
        (TypeError, "logits_processor must be a list", {"logits_processor": print}),
        (TypeError, "stopping_criteria must be a list", {"stopping_criteria": print}),
        (TypeError, "^attention_mask must be a tensor, got list", {"attention_mask": [[1]]}),
        (TypeError, "ratio must be a number, got str", {"ratio": "2"}),
        (TypeError, "ratio must be a number, got NoneType", {"ratio": None}),
        (TypeError, "ratio must be a number, got bool", {"ratio": True}),
        (ValueError, "temperature must be 0 or more, got -1.0", {"temperature": -1.0}),
        (TypeError, "seed must be integers, got bool", {"seed": True}),
        (TypeError, "seed must be integers, got str", {"do_sample": True, "seed": "a"}),
        (TypeError, "logits_processor must be callables, got int", {"logits_processor": [3]}),
        (TypeError, "stopping_criteria must be callables", {"stopping_criteria": [print, "a"]}),
        (ValueError, "pad_token_id must be 0 or more, got -5", {"pad_token_id": -5}),
        (ValueError, "eos_token_id must be 0 or more, got -1", {"eos_token_id": [3, -1]}),
        (TypeError, "eos_token_id must be of integers, got str", {"eos_token_id": "2"}),
        (TypeError, "pad_token_id must be of integers, got float", {"pad_token_id": 1.0}),
    ],
)  # fmt: skip
def test_errors_come_before_the_model_runs(
    error: type[Exception], match: str, changes: dict[str, Any]
) -> None:
    model = Counted(make("gpt2"))
    with pytest.raises(error, match=match):
        self_contrastive_generate(model, **{**ASKED.arguments(), "max_new_tokens": 2, **changes})
    assert model.calls == 0


def test_what_ends_rows_needs_something_to_pad_with() -> None:
    model = Counted(make("gpt2", pad_token_id=None))
    with pytest.raises(ValueError, match="pad_token_id must be given"):
        self_contrastive_generate(model, **ASKED.arguments(), stopping_criteria=[print])
    assert model.calls == 0


@pytest.mark.parametrize(
    ("error", "answer", "match"),
    [
        (TypeError, None, r"stopping_criteria must return a mask \(3,\) .* got NoneType from func"),
        (ValueError, torch.tensor([True, False]), r"must return a mask \(3,\) of bool, got \(2,\)"),
        (ValueError, torch.zeros(3), r"must return a mask \(3,\) of bool, got .*float32"),
    ],
)
def test_what_a_criterion_returns_is_looked_at(
    error: type[Exception], answer: Any, match: str
) -> None:
    def criterion(ids: Tensor, scores: Any) -> Any:
        return answer

    with pytest.raises(error, match=match):
        self_contrastive_generate(
            make("gpt2"), **ASKED.arguments(), stopping_criteria=[criterion], max_new_tokens=2
        )


def test_encoder_decoders_are_refused() -> None:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=BOS, pad_token_id=PAD,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="model must be a decoder, got an encoder-decoder"):
        self_contrastive_generate(model, **ASKED.arguments())
