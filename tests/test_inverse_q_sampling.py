"""Prompts into responses: what is drawn, where it ends, and on what it depends."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from inverse_q_cases import make_model
from trimtab.algorithms.inverse_q import (
    ClippedSurrogate,
    GivenPolicy,
    Imitation,
    InverseQ,
    PrinciplePrompt,
    ReverseKL,
)
from trimtab.algorithms.inverse_q.losses import Loss
from trimtab.algorithms.inverse_q.sampling import (
    PromptCollator,
    row_seeds,
    sample_responses,
    split_rows,
)

PROMPTS = [{"input_ids": ids} for ids in ([5, 6, 7], [9], [11, 12, 13, 14, 15])]


def respond(model, prompts=PROMPTS, seed=0, **settings):
    batch = PromptCollator(0)(prompts)
    seeds = settings.pop("seeds", None)
    seeds = row_seeds(seed, (0,), 0, len(prompts)) if seeds is None else seeds
    settings = {"max_new_tokens": 6, "eos_token_id": 2, **settings}
    return sample_responses(model, **batch, seeds=seeds, **settings)


def test_prompts_are_padded_on_the_left() -> None:
    batch = PromptCollator(0)(PROMPTS)
    assert batch["input_ids"].tolist()[1] == [0, 0, 0, 0, 9]
    assert batch["attention_mask"].tolist()[0] == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="input_ids must be token ids"):
        PromptCollator(0)([{"input_ids": []}, {"input_ids": [1]}])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_plain_policy(temperature: float) -> None:
    """Chi-squared over 4000 seeds, with a generation config that would bend the distribution."""
    model = make_model(vocab_size=12, std=0.5)
    model.generation_config.update(repetition_penalty=9.0, top_k=2, suppress_tokens=[4, 5])
    own = model.generation_config
    rows = [{"input_ids": [5, 6, 7]}] * 4000
    batch = respond(model, rows, max_new_tokens=1, temperature=temperature, eos_token_id=None)
    counts = torch.bincount(batch["input_ids"][:, -1], minlength=12).double()
    logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1].detach()
    expected = 4000 * (logits / temperature).softmax(-1)
    assert ((counts - expected).square() / expected).sum() < 40  # p < 1e-4 at 11 degrees
    assert model.generation_config is own


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_response_depends_on_its_prompt_and_seed_alone(kind: str) -> None:
    model = make_model(kind)
    together = split_rows(respond(model))
    for row, prompt in enumerate(PROMPTS):
        alone = respond(model, [prompt], seeds=row_seeds(0, (0,), row, 1))
        for mine, theirs in zip(split_rows(alone), together, strict=True):
            assert mine[0].tolist() == theirs[row].tolist()
    assert together[0][2].tolist() == PROMPTS[2]["input_ids"]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(respond(model)["input_ids"], respond(model)["input_ids"])
    assert torch.equal(torch.get_rng_state(), state)
    other = respond(model, seed=1)["input_ids"]
    assert not torch.equal(other, respond(model)["input_ids"])


def test_a_response_ends_with_its_end_token() -> None:
    model = make_model(vocab_size=14)
    rows = [{"input_ids": [5, 6]}] * 40
    batch = respond(model, rows, max_new_tokens=9, eos_token_id=[2, 3])
    new = batch["input_ids"][:, 2:]
    lengths = set()
    for row, labels, mask in zip(new, batch["labels"], batch["attention_mask"], strict=True):
        ends = [at for at, token in enumerate(row.tolist()) if token in (2, 3)]
        length = ends[0] + 1 if ends else new.shape[1]
        assert labels[:2].tolist() == [-100, -100]
        assert labels[2 : 2 + length].tolist() == row[:length].tolist()
        assert (labels[2 + length :] == -100).all()
        assert mask.sum() == 2 + length
        assert (row[length:] == 0).all()
        lengths.add(length)
    assert len(lengths) > 3
    whole = respond(model, rows, max_new_tokens=9, eos_token_id=None)
    assert (whole["labels"][:, 2:] == whole["input_ids"][:, 2:]).all()


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="model must give finite logits"):
        respond(model)


def test_seeds_differ_by_seed_stream_and_row() -> None:
    seeds = [row_seeds(s, stream, 0, 50) for s in (0, 1) for stream in ((0, 3), (0, 4), (1,))]
    assert len(set(torch.cat(seeds).tolist())) == 300
    assert torch.equal(row_seeds(0, (0, 3), 10, 5), seeds[0][10:15])
    assert row_seeds(0, (0,), 0, 0).tolist() == []


def test_scores_are_read_without_dropout_and_the_mode_stays() -> None:
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5}
    model = make_model("gpt2", **rates)
    algorithm = InverseQ(model, estimator=PrinciplePrompt([20]), estimate_from="policy")
    batch, want = respond(model), algorithm.score(respond(model))
    modes = [module.training for module in model.train().modules()]
    got = algorithm.score(batch)
    for name, values in want.items():
        torch.testing.assert_close(got[name], values)
    assert torch.equal(respond(model)["input_ids"], batch["input_ids"])
    assert [module.training for module in model.modules()] == modes
    assert algorithm.loss(batch).item() != algorithm.loss(batch).item()


@pytest.mark.parametrize(
    "loss",
    [
        Imitation(),
        ClippedSurrogate(),
        ClippedSurrogate(advantage="log_ratio"),
        ClippedSurrogate(advantage="sequence"),
        ReverseKL(),
    ],
)
def test_training_moves_the_policy_to_the_model_with_the_principle(loss: Loss) -> None:
    model = make_model(std=0.4)
    estimator = PrinciplePrompt([20, 21], rho=1.0)
    exact = InverseQ(model, estimator=estimator, beta=1.0, loss="reverse_kl")
    algorithm = InverseQ(model, exact.ref_model, estimator=estimator, beta=1.0, loss=loss)
    rows = [{"input_ids": [5, 6, token]} for token in range(3, 35)]
    held_out = respond(model, rows, seed=99)
    before = exact.loss(held_out).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(30):
        batch = respond(model, rows, seed=step)
        optimizer.zero_grad()
        algorithm.loss(batch).backward()
        optimizer.step()
    # The sampled losses see one token per position; half of the way is beyond their noise.
    assert exact.loss(held_out).item() < 0.7 * before


def test_a_given_policy_can_be_reached() -> None:
    model, star = make_model(), make_model(seed=1)
    algorithm = InverseQ(model, estimator=GivenPolicy(star), loss="reverse_kl")
    batch = respond(model)
    before = algorithm.loss(batch).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        algorithm.loss(batch).backward()
        optimizer.step()
    assert algorithm.loss(batch).item() < 0.1 * before
