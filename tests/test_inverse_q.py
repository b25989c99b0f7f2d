"""Inverse-Q*: rewards, losses and estimators against full logits in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from inverse_q_cases import (
    MODELS,
    PRINCIPLE,
    Adapted,
    Largest,
    chosen,
    full_logits,
    gradients,
    make_batch,
    make_model,
    spread,
    star_logits,
)
from trimtab.algorithms.inverse_q import (
    ClippedSurrogate,
    GivenPolicy,
    InverseQ,
    PrinciplePrompt,
    ResponseBatch,
    ReverseKL,
)
from trimtab.algorithms.inverse_q.losses import kl_per_token, leave_one_out, whiten

BETA = 0.3
close = torch.testing.assert_close


def build(model: Any, *, rho: float = 0.0, **settings: Any) -> InverseQ:
    settings = {"estimator": PrinciplePrompt(PRINCIPLE, rho=rho), "beta": BETA, **settings}
    return InverseQ(model, **settings)


def all_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert any(bool(tensor.any()) for tensor in want)
    for mine, theirs in zip(got, want, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rho", [0.0, 1.5])
@pytest.mark.parametrize("kind", MODELS)
def test_rewards_are_log_ratios_of_the_full_distributions(kind: str, rho: float, side: str) -> None:
    model, batch = make_model(kind), make_batch(side)
    star = chosen(star_logits(model, batch, rho), batch, 0.7)
    ref = chosen(full_logits(model, batch, None), batch, 1.3)
    estimator = PrinciplePrompt(PRINCIPLE, rho=rho, temperature=0.7)
    got = build(model, estimator=estimator, temperature=1.3).token_rewards(batch)
    assert not got.requires_grad
    close(got, spread(BETA * (star - ref), batch).detach())
    assert bool((got[batch["labels"] == -100] == 0).all())


def oracle(loss: str, model: Any, batch: dict[str, Tensor], star: Tensor, extra: Any) -> Tensor:
    """The three losses, written down from their formulas on full logits."""
    logits = full_logits(model, batch, None)
    logp, star_logp = chosen(logits, batch), chosen(star, batch)
    if loss == "imitation":
        return BETA**2 * (logp - star_logp).square().mean()
    if loss == "reverse_kl":
        p = torch.log_softmax(logits, -1)
        return BETA * (p.exp() * (p - torch.log_softmax(star, -1))).sum(-1).mean()
    ratio = (logp - extra["old"]).exp()
    advantage = BETA * (star_logp - extra["ref"])
    clipped = ratio.clamp(0.8, 1.2) * advantage
    kl = (extra["ref"] - logp).exp() - 1 - (extra["ref"] - logp)
    return -torch.minimum(ratio * advantage, clipped).mean() + 0.2 * kl.mean()


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("rho", [0.0, 1.5])
@pytest.mark.parametrize("loss", ["imitation", "ppo", "reverse_kl"])
def test_losses_and_their_gradients(loss: str, rho: float, frozen_head: bool) -> None:
    first, model, batch = make_model(), make_model(seed=1), make_batch()
    with torch.no_grad():
        star = star_logits(first, batch, rho)
        ref = chosen(full_logits(first, batch, None), batch)
        old = chosen(full_logits(model, batch, None), batch)
        old = old + 0.3 * torch.linspace(-1, 1, len(old)).sin()
    made: Any = ClippedSurrogate(kl_coef=0.2) if loss == "ppo" else loss
    made = ReverseKL(chunk_size=5) if loss == "reverse_kl" else made
    model.lm_head.weight.requires_grad_(not frozen_head)
    algorithm = build(model, rho=rho, ref_model=first, loss=made)
    want = oracle(loss, model, batch, star, {"old": old, "ref": ref})
    got = algorithm.loss({**batch, "old_logp": spread(old, batch)})
    close(got, want)
    model.requires_grad_(True)
    model.lm_head.weight.requires_grad_(not frozen_head)
    trained = [p for p in model.parameters() if p.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad(got, trained), torch.autograd.grad(want, trained), strict=True
    ):
        close(mine, theirs)
        assert bool(theirs.any())


@pytest.mark.parametrize("rho", [0.0, 1.5])
@pytest.mark.parametrize("kind", MODELS)
def test_the_exact_kl_of_every_kind_of_head(kind: str, rho: float) -> None:
    first, model, batch = make_model(kind), make_model(kind, seed=1), make_batch()
    estimator = PrinciplePrompt(PRINCIPLE, rho=rho, temperature=0.7)
    algorithm = build(
        model, estimator=estimator, temperature=1.3, ref_model=first, loss="reverse_kl"
    )
    with torch.no_grad():
        p = torch.log_softmax(full_logits(model, batch, None) / 1.3, -1)
        star = torch.log_softmax(star_logits(first, batch, rho) / 0.7, -1)
    close(algorithm.loss(batch).detach(), BETA * (p.exp() * (p - star)).sum(-1).mean())


def test_the_analytic_gradient_of_the_squared_loss() -> None:
    first, model, batch = make_model(), make_model(seed=1), make_batch()
    algorithm = build(model, ref_model=first)
    (got,) = torch.autograd.grad(algorithm.loss(batch), [model.lm_head.weight])
    with torch.no_grad():
        logits = full_logits(model, batch, None)
        delta = chosen(logits, batch) - chosen(star_logits(first, batch, 0.0), batch)
        target = batch["labels"][batch["labels"] != -100]
        onehot = torch.nn.functional.one_hot(target, logits.shape[1])
        dz = 2 * BETA**2 / len(delta) * delta[:, None] * (onehot - logits.softmax(-1))
        hidden = algorithm.policy().hidden(ResponseBatch(batch))
    close(got, dz.mT @ hidden)


def test_exact_kl_is_the_expectation_of_the_sampled_surrogate() -> None:
    """By enumeration: sum_y pi(y) grad of (b) on y is the gradient of (c)."""
    first, model = make_model(vocab_size=14), make_model(seed=1, vocab_size=14)
    prompt = torch.tensor([4, 5, 6, 7])
    rows = torch.stack([torch.cat((prompt, torch.tensor([y]))) for y in range(14)])
    labels = rows.clone()
    labels[:, :4] = -100
    sampled = build(model, ref_model=first, loss=ClippedSurrogate(advantage="log_ratio"))
    exact = build(model, ref_model=first, loss="reverse_kl")
    p = model(prompt[None]).logits[0, -1].softmax(-1).tolist()
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for y in range(14):
        one = {"input_ids": rows[y : y + 1], "labels": labels[y : y + 1]}
        for sum_, part in zip(total, gradients(sampled.loss(one), model), strict=True):
            sum_ += p[y] * part
    one = {"input_ids": rows[:1], "labels": labels[:1]}
    all_equal(gradients(exact.loss(one), model), total)
    _, metrics = exact.loss_and_metrics(one)
    close(BETA * metrics["exact_star_kl"], exact.loss(one).detach())
    reward = build(model, ref_model=first, loss=ClippedSurrogate(advantage="reward"))
    differs = gradients(reward.loss(one), model)
    assert any(
        not torch.allclose(a, b)
        for a, b in zip(differs, gradients(sampled.loss(one), model), strict=True)
    )


def test_rewards_telescope_to_the_reward_minus_the_value() -> None:
    """pi* of a known reward by soft backward induction: sum_t A* = R - V*(s_0)."""
    model, vocabulary = make_model(vocab_size=6, pad_token_id=0), 6
    prompt = torch.tensor([3, 4, 5])
    pairs = torch.cartesian_prod(torch.arange(vocabulary), torch.arange(vocabulary))
    rows = torch.cat((prompt.expand(len(pairs), 3), pairs), 1)
    reward = torch.linspace(-1, 1, len(pairs), dtype=torch.float64).cos()
    with torch.no_grad():
        ref = torch.log_softmax(model(rows).logits, -1)
    first = ref[::vocabulary, 2]  # the same for all rows
    second = ref[::vocabulary, 3]  # (V, V): row y_1, column y_2
    q2 = reward.reshape(vocabulary, vocabulary)
    v1 = BETA * torch.logsumexp(second + q2 / BETA, 1)
    v0 = BETA * torch.logsumexp(first[0] + v1 / BETA, 0)
    star1 = first[0] + (v1 - v0) / BETA
    star2 = second + (q2 - v1[:, None]) / BETA

    def estimator(lm: Any, batch: ResponseBatch) -> Tensor:
        y1, y2 = batch.input_ids[:, 3], batch.input_ids[:, 4]
        return batch.spread(torch.stack((star1[y1], star2[y1, y2]), 1).reshape(-1))

    labels = rows.clone()
    labels[:, :3] = -100
    got = build(model, estimator=estimator).token_rewards({"input_ids": rows, "labels": labels})
    close(got.sum(1), reward - v0)
    close(got[:, 3], v1[pairs[:, 0]] - v0)


@pytest.mark.parametrize("loss", ["imitation", "ppo", "reverse_kl"])
def test_rows_are_the_same_alone_and_in_a_batch(loss: str) -> None:
    model, batch = make_model("gpt2", seed=1), make_batch("left")
    algorithm = build(model, rho=1.5, ref_model=make_model("gpt2"), loss=loss)
    together = algorithm.token_rewards(batch)
    counts = (batch["labels"] != -100).sum(1)
    alone, sums = [], []
    for row in range(len(counts)):
        real = batch["attention_mask"][row] == 1
        one = {name: tensor[row : row + 1, real] for name, tensor in batch.items()}
        alone.append(algorithm.token_rewards(one)[0])
        sums.append(algorithm.loss(one) * counts[row])
        close(alone[-1], together[row, real])
    close(torch.stack(sums).sum() / counts.sum(), algorithm.loss(batch))
    right = make_batch("right")
    close(algorithm.loss(right), algorithm.loss(batch))


def test_only_what_the_labels_mark_counts() -> None:
    model, batch = make_model(), make_batch("right")
    algorithm = build(model, ref_model=make_model(seed=1))
    want, rewards = algorithm.loss(batch), algorithm.token_rewards(batch)
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["input_ids"][batch["attention_mask"] == 0] = 5
    close(algorithm.loss(changed), want, rtol=0, atol=0)
    fewer = {**batch, "labels": batch["labels"].clone()}
    fewer["labels"][0, 6] = -100
    got = algorithm.token_rewards(fewer)
    assert got[0, 6] == 0
    assert rewards[0, 6] != 0
    rewards[0, 6] = 0
    close(got, rewards)
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for loss in ("imitation", "ppo", "reverse_kl"):
        algorithm = build(model, ref_model=make_model(seed=1), rho=1.0, loss=loss)
        assert algorithm.loss(nothing).item() == 0.0
        assert not algorithm.token_rewards(nothing).any()


def test_where_the_principle_goes() -> None:
    model, batch = make_model(), make_batch("left", ((3, 2), (5, 4)))
    kept = PrinciplePrompt(PRINCIPLE, keep=1)
    ids, real, marks = kept.contexts(ResponseBatch(batch))
    row = batch["input_ids"][1]
    assert ids[1].tolist() == [int(row[0]), *PRINCIPLE, *row[1:].tolist()]
    assert marks[1].nonzero()[:, 0].tolist() == [8, 9, 10, 11]
    assert real.sum(1).tolist() == [8, 12]
    same = PrinciplePrompt(
        lambda prompt: torch.cat((prompt[:1], torch.tensor(PRINCIPLE), prompt[1:]))
    )
    rewards = [build(model, estimator=e).token_rewards(batch) for e in (kept, same)]
    close(*rewards, rtol=0, atol=0)
    assert not torch.allclose(rewards[0], build(model).token_rewards(batch))
    unchanged = PrinciplePrompt(lambda prompt: prompt)
    close(
        build(model, estimator=unchanged).token_rewards(batch),
        torch.zeros(batch["labels"].shape, dtype=torch.float64),
    )


def test_a_given_policy_has_known_rewards() -> None:
    model, star, batch = make_model(), make_model("gpt2", seed=2), make_batch()
    estimator = GivenPolicy(star, temperature=0.5)
    want = chosen(full_logits(star, batch, None), batch, 0.5)
    want = want - chosen(full_logits(model, batch, None), batch)
    for loss in ("imitation", "reverse_kl"):
        algorithm = build(model, estimator=estimator, loss=loss)
        close(algorithm.token_rewards(batch), spread(BETA * want, batch).detach())
        algorithm.loss(batch).backward()
    assert all(p.grad is None for p in star.parameters())


def test_the_reference_stays_where_the_policy_began() -> None:
    model, batch = make_model(), make_batch()
    algorithm, moving = (build(model, estimate_from=f) for f in ("reference", "policy"))
    before = algorithm.token_rewards(batch)
    close(moving.token_rewards(batch), before)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    close(algorithm.token_rewards(batch), before)
    star = chosen(star_logits(model, batch, 0.0), batch)
    ref = chosen(full_logits(make_model(), batch, None), batch)
    close(moving.token_rewards(batch), spread(BETA * (star - ref), batch).detach())
    close(
        moving.score(batch)["logp_star"], spread(star, batch).detach(),
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["imitation", "reverse_kl"])
def test_an_adapted_model_is_its_own_reference_and_trains_its_lora_head(loss: str) -> None:
    model, batch = Adapted(make_model()), make_batch()
    algorithm = build(model, loss=loss)
    assert algorithm.ref_model is None
    plain = make_model()
    close(algorithm.token_rewards(batch), build(plain).token_rewards(batch))
    assert model.disabled == 1
    with torch.no_grad():
        star = star_logits(plain, batch, 0.0)
    got = algorithm.loss(batch)
    want = oracle(loss, model, batch, star, {})
    close(got, want)
    head = model.inside.lm_head
    trained = [head.lora_A["a"].weight, head.lora_B["a"].weight]
    all_equal(*(list(torch.autograd.grad(value, trained)) for value in (got, want)))
    head.lora_dropout["a"] = torch.nn.Dropout(0.1)
    with pytest.raises(ValueError, match="model must have a linear head"):
        algorithm.loss(batch) if model.train() else None
    assert algorithm.token_rewards(batch).shape == batch["labels"].shape
    head.merged = True
    with pytest.raises(ValueError, match="model must have a linear head"):
        build(model)


def test_no_more_than_a_chunk_of_logits_is_in_memory() -> None:
    model, batch = make_model(vocab_size=101), make_batch()
    count = int((batch["labels"] != -100).sum())
    algorithm = build(model, rho=1.5, loss=ReverseKL(chunk_size=4))
    with Largest(model) as seen:
        algorithm.loss(batch).backward()
    assert seen.largest == 4 < count
    # Each chunk's logits twice, for the policy and for pi*, and again in backward.
    assert seen.products == 4 * count


def test_the_contrast_takes_one_product() -> None:
    model, batch = make_model(vocab_size=101), make_batch()
    count = int((batch["labels"] != -100).sum())
    for rho in (0.0, 1.5):
        algorithm = build(model, rho=rho, impl="reference")
        with Largest(model) as seen:
            algorithm.star_logp(ResponseBatch(batch))
        assert seen.products == count
    calls: list[None] = []
    algorithm.ref_model.model.register_forward_hook(lambda *_: calls.append(None))
    algorithm.token_rewards(batch)
    assert len(calls) == 2, "the pass without the principle serves the contrast and pi_ref"


@pytest.mark.parametrize("loss", ["imitation", "ppo", "reverse_kl"])
def test_bfloat16_and_autocast(loss: str) -> None:
    wide, batch = make_model(seed=1), make_batch()
    want = build(wide, rho=1.5, ref_model=make_model(), loss=loss).loss(batch).item()
    narrow = [make_model(seed=s).bfloat16() for s in (1, 0)]
    got = build(narrow[0], rho=1.5, ref_model=narrow[1], loss=loss).loss(batch)
    single = [make_model(seed=s).float() for s in (1, 0)]
    algorithm = build(single[0], rho=1.5, ref_model=single[1], loss=loss)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = algorithm.loss(batch)
    mixed.backward()
    eager = build(narrow[0], ref_model=narrow[1], rho=1.5, loss=loss, impl="reference").loss(batch)
    assert got.dtype == mixed.dtype == torch.float32
    # What bfloat16 does to the model itself; the reference implementation has all of it.
    error = abs(eager.item() - want) + 8 * torch.finfo(torch.bfloat16).eps * abs(want)
    assert abs(got.item() - want) <= 2 * error
    assert abs(mixed.item() - want) <= 2 * error
    assert single[0].lm_head.weight.grad.isfinite().all()


def test_metrics_are_sums_over_tokens() -> None:
    first, model, batch = make_model(), make_model(seed=1), make_batch()
    algorithm = build(model, ref_model=first, loss="ppo")
    scores = algorithm.score(batch)
    loss, metrics = algorithm.loss_and_metrics({**batch, **scores}, normalizer=10.0)
    logits = full_logits(model, batch, None).detach()
    logp, ref = chosen(logits, batch), chosen(full_logits(first, batch, None), batch).detach()
    star = chosen(star_logits(first, batch, 0.0), batch).detach()
    close(metrics["reward"], BETA * (star - ref).sum())
    close(metrics["kl"], ((ref - logp).exp() - 1 - (ref - logp)).sum())
    close(metrics["star_kl"], ((star - logp).exp() - 1 - (star - logp)).sum())
    close(metrics["entropy"], torch.distributions.Categorical(logits=logits).entropy().sum())
    assert metrics["tokens"] == len(logp)
    assert metrics["clip_fraction"] == 0
    close(loss * 10.0 / len(logp), algorithm.loss(batch))
    close(scores["old_logp"], spread(logp, batch))


def test_the_kl_estimate_is_unbiased() -> None:
    p, q = (torch.softmax(torch.randn(9, dtype=torch.float64), 0) for _ in range(2))
    terms = kl_per_token(p.log(), q.log())
    assert (terms >= 0).all()
    close((p * terms).sum(), (p * (p / q).log()).sum())


def test_advantages_of_whole_responses() -> None:
    model, batch = make_model(seed=1), make_batch()
    loss = ClippedSurrogate(advantage="sequence")
    algorithm = build(model, ref_model=make_model(), loss=loss)
    scores = algorithm.score(batch)
    rewards = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    penalty = BETA * (scores["old_logp"] - scores["ref_logp"]).sum(1)
    total = rewards - penalty
    for group, others in ((1, [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]),
                          (2, [[1], [0], [3], [2]])):  # fmt: skip
        (got,) = algorithm.advantages([{**batch, **scores}], [rewards], group)
        want = torch.stack([total[row] - total[rest].mean() for row, rest in enumerate(others)])
        response = batch["labels"] != -100
        close(got, torch.where(response, want[:, None], 0.0))
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 2), slice(2, 4))]
    parts = algorithm.advantages(halves, [rewards[:2], rewards[2:]])
    close(torch.cat(parts), algorithm.advantages([batch], [rewards])[0])
    summed = (BETA * (scores["logp_star"] - scores["ref_logp"])).sum(1)
    close(algorithm.advantages([batch])[0], algorithm.advantages([batch], [summed])[0])
    normal = build(model, ref_model=make_model(), loss=ClippedSurrogate(normalize=True))
    parts = normal.advantages(halves)
    tokens = torch.cat([p[h["labels"] != -100] for p, h in zip(parts, halves, strict=True)])
    close(tokens.mean().item(), 0.0)
    close(tokens.square().mean().item(), 1.0)


def test_small_groups_and_equal_values() -> None:
    close(leave_one_out(torch.tensor([3.0]), 1), torch.tensor([3.0]))
    assert whiten(torch.full((7,), 0.1)).abs().max() == 0
    with pytest.raises(ValueError, match="group_size must divide"):
        leave_one_out(torch.zeros(3), 2)


def test_what_is_in_the_batch_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(seed=1), make_batch()
    for loss in ("imitation", "ppo"):
        algorithm = build(model, ref_model=make_model(), loss=loss)
        want = algorithm.loss(batch)
        full = {**batch, **algorithm.score(batch)}
        monkeypatch.setattr(algorithm, "_reference", lambda: pytest.fail("already there"))
        close(algorithm.loss(full), want)
        twice = {**full, "logp_star": 2 * full["logp_star"]}
        assert algorithm.loss(twice).item() != want.item()
        if loss == "ppo":
            given = {**full, "advantages": torch.zeros_like(full["ref_logp"])}
            assert algorithm.loss(given).item() == 0.0


def bad_batch(**changes: Any) -> dict[str, Any]:
    return {**make_batch("left"), **changes}


LABELS = make_batch("left")["labels"]
GAPS = torch.ones_like(LABELS)
GAPS[0, 3] = 0
FIRST = LABELS.clone()
FIRST[3, -5] = make_batch("left")["input_ids"][3, -5]
OTHER = LABELS.clone()
OTHER[0, -1] += 1


@pytest.mark.parametrize(
    ("error", "match", "batch"),
    [
        (ValueError, "batch must have 'labels'", {"input_ids": LABELS}),
        (ValueError, "labels must have the shape", bad_batch(labels=LABELS[:2])),
        (ValueError, "labels must be -100 on padding", bad_batch(labels=FIRST)),
        (ValueError, "labels must be -100 or equal", bad_batch(labels=OTHER)),
        (ValueError, "attention_mask must be one run", bad_batch(attention_mask=GAPS)),
        (TypeError, "input_ids must be integers", bad_batch(input_ids=LABELS.float())),
        (ValueError, "logp_star must be of shape", bad_batch(logp_star=torch.zeros(2))),
    ],
)
def test_batches_that_do_not_fit(error: type[Exception], match: str, batch: Any) -> None:
    with pytest.raises(error, match=match):
        build(make_model()).loss(batch)


@pytest.mark.parametrize(
    ("match", "make"),
    [
        ("beta must be", lambda m: build(m, beta=0.0)),
        ("loss must be one of", lambda m: build(m, loss="dpo")),
        ("estimate_from must be", lambda m: build(m, estimate_from="teacher")),
        ("temperature must be", lambda m: build(m, temperature=0.0)),
        ("estimator must be callable", lambda m: build(m, estimator=3)),
        ("ref_model must be another", lambda m: build(m, ref_model=m)),
        ("distribution", lambda m: build(m, estimator=lambda lm, b: b, loss="reverse_kl")),
        ("model must be a Hugging Face", lambda m: build(torch.nn.Linear(2, 2))),
        ("estimator must give", lambda m: build(m, estimator=lambda lm, b: torch.zeros(1)).loss(
            make_batch())),
        ("loss must be 'ppo'", lambda m: build(m).advantages([make_batch()])),
        ("rewards must be None", lambda m: build(m, loss="ppo").advantages(
            [make_batch()], [torch.zeros(4)])),
        ("rewards must be of shape", lambda m: build(
            m, loss=ClippedSurrogate(advantage="sequence")).advantages(
            [make_batch()], [torch.zeros(3)])),
        ("rho must be", lambda m: PrinciplePrompt([1], rho=-1.0)),
        ("keep must be", lambda m: PrinciplePrompt([1], keep=-1)),
        ("keep must be", lambda m: PrinciplePrompt(lambda p: p, keep=1)),
        ("principle must be", lambda m: PrinciplePrompt([])),
        ("principle must give", lambda m: build(
            m, estimator=PrinciplePrompt(lambda p: p[:0])).loss(make_batch())),
        ("temperature must be", lambda m: GivenPolicy(m, temperature=-1.0)),
        ("clip_range must be", lambda m: ClippedSurrogate(clip_range=0.0)),
        ("advantage must be", lambda m: ClippedSurrogate(advantage="gae")),
        ("kl_coef must be", lambda m: ClippedSurrogate(kl_coef=-1.0)),
        ("chunk_size must be", lambda m: ReverseKL(chunk_size=0)),
    ],
)  # fmt: skip
def test_errors_name_the_argument(match: str, make: Any) -> None:
    with pytest.raises(ValueError, match=match):
        make(make_model())


def test_prompt_learning_is_refused() -> None:
    model = copy.deepcopy(make_model())
    model.active_peft_config = type("Config", (), {"is_prompt_learning": True})()
    with pytest.raises(ValueError, match="prompt learning"):
        build(model)
