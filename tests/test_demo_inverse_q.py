"""The demo's section on Inverse-Q*: score, policies, measuring, and what it says of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimtab.algorithms.inverse_q import InverseQ, PrinciplePrompt
from trimtab.demo import corpus, inverse_q, models, principle, report, section, steering
from trimtab.demo import steering_verdict as verdict
from trimtab.demo.principle import FILES, NUMBERS
from trimtab.demo.steering import Measured

PLAN = replace(
    inverse_q.QUICK,
    policy=replace(inverse_q.QUICK.policy, size=models.Size("tiny", 16, 1, 2), steps=3),
)


@pytest.fixture(scope="module")
def encoded() -> corpus.EncodedCorpus:
    text = corpus.read_corpus(0, max_files=120)
    return corpus.encode(text, corpus.train_tokenizer(text, 500))


@pytest.fixture(scope="module")
def learner(encoded: corpus.EncodedCorpus) -> principle.Learner:
    return principle.train_policy(encoded, PLAN.policy, seed=0)


@pytest.fixture
def bench(encoded: corpus.EncodedCorpus, learner: principle.Learner) -> steering.Bench:
    prompts = principle.held_out_prompts(encoded, PLAN.policy, PLAN.last_prompts)
    ids = torch.tensor(learner.pools["files"].principle)
    return steering.Bench(learner.model, ids, encoded, prompts, PLAN, seed=5)


def perturbed(bench: steering.Bench, scale: float = 0.05) -> steering.Policy:
    """A policy that is not the start policy."""
    model = models.build(PLAN.policy.size, bench.corpus.vocabulary, 64).eval()
    model.load_state_dict(bench.start.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return steering.Policy(model)


# The score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (0, 0)),
        ("path", (0, 0)),  # both ends may be cut
        (" the file ", (1, 2)),
        ("ile path to the dir", (1, 3)),
        (" os.path.join(Dir_Name, 'FILES') ", (3, 6)),
        (" profile pathological files2 ", (1, 3)),
    ],
)
def test_words_of_the_topic_are_counted(text: str, expected: tuple[int, int]):
    assert FILES.count(text) == expected


def test_shares_of_texts():
    assert principle.topic_share([" file a ", " b c ", ""]) == 0.25
    assert principle.topic_share([" file number a "], NUMBERS) == pytest.approx(1 / 3)
    assert principle.topic_share(["", "…"]) == 0.0
    assert principle.distinct_share([" path Path ", " a b ", "..."]) == 0.75
    assert principle.distinct_share([""]) == 0.0


def test_the_topics_share_no_word():
    assert not FILES.words & NUMBERS.words


# What the policy is trained on


def test_a_sentence_stands_before_the_windows_that_speak_of_its_topic_most(
    encoded: corpus.EncodedCorpus, learner: principle.Learner
):
    pools = learner.pools
    assert set(pools) == {"plain", "files", "numbers"}
    for topic in (FILES, NUMBERS):
        pool = pools[topic.name]
        assert encoded.tokenizer.decode(pool.principle) == topic.principle
        for own, every in zip(pool.rows, pools["plain"].rows, strict=True):
            assert len(own) == max(1, int(PLAN.policy.labelled * len(every)))
            shares = []
            for rows in (own, every):
                texts = principle.decode(encoded, torch.from_numpy(rows[:, PLAN.policy.prompt :]))
                pairs = [topic.count(text) for text in texts]
                shares.append(sorted((a / max(b, 1) for a, b in pairs), reverse=True))
            assert shares[0] == shares[1][: len(own)]
    assert pools["files"].share > 3 * pools["plain"].share


def test_what_is_held_out_is_not_trained_on(
    encoded: corpus.EncodedCorpus, learner: principle.Learner
):
    prompts = principle.held_out_prompts(encoded, PLAN.policy, 32)
    assert prompts.shape == (32, PLAN.policy.prompt)
    held = encoded.splits["validation"]["prose"].ids.tobytes()
    assert all(row.numpy().tobytes() in held for row in prompts[:16])
    trained = principle.training_prompts(learner, PLAN.policy)
    text = encoded.splits["train"]["prose"].ids.tobytes()
    assert all(row.numpy().tobytes() in text for row in trained[: len(trained) // 2])


def test_the_sentence_and_the_padding_have_no_loss(learner: principle.Learner):
    longest = max(len(pool.principle) for pool in learner.pools.values())
    generator = principle.np.random.default_rng(0)
    rows, target = principle._batch(learner.pools, PLAN.policy, longest, generator)
    assert rows.shape == target.shape == (8, longest + PLAN.policy.window)
    kinds = 4 * ["plain"] + 2 * ["files"] + 2 * ["numbers"]
    for row, wanted, kind in zip(rows, target, kinds, strict=True):
        pool = learner.pools[kind]
        n = len(pool.principle)
        assert row[:n].tolist() == pool.principle
        text = wanted != -100
        assert text.nonzero()[:, 0].tolist() == list(range(n, n + PLAN.policy.window))
        assert torch.equal(row[text], wanted[text])
        windows = {part.tobytes() for rows_of in pool.rows for part in rows_of}
        assert row[text].numpy().tobytes() in windows


def test_training_repeats_to_the_bit(encoded: corpus.EncodedCorpus, learner: principle.Learner):
    again = principle.train_policy(encoded, PLAN.policy, seed=0)
    other = principle.train_policy(encoded, PLAN.policy, seed=1)
    weights = [one.model.lm_head.weight for one in (learner, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not weights[0].requires_grad


# The policies


@pytest.mark.parametrize("kind", ["plain", "principle", "contrast"])
def test_responses_follow_the_logits(bench: steering.Bench, kind: str):
    """With all the mass on the likeliest token, cached decoding takes the uncached one's."""
    model = perturbed(bench, 0.2).model
    with torch.no_grad():
        model.model.norm.weight.mul_(1000.0)
    rho = 1.5 if kind == "contrast" else 0.0
    policy = steering.Policy(model, None if kind == "plain" else bench.principle, rho)
    prompts = bench.prompts[:5]
    responses = policy.respond(prompts, 6, seed=0)
    with torch.no_grad():
        assert torch.equal(policy.logits(prompts, responses).argmax(-1), responses)
        ids = torch.cat((prompts, responses), 1)
        front = bench.principle.expand(5, -1)
        alone = model(input_ids=ids).logits[:, prompts.shape[1] - 1 : -1]
        told = model(input_ids=torch.cat((front, ids), 1)).logits
        told = told[:, front.shape[1] + prompts.shape[1] - 1 : -1]
    wanted = {"plain": alone, "principle": told, "contrast": told + rho * (told - alone)}[kind]
    torch.testing.assert_close(policy.logits(prompts, responses), wanted, rtol=1e-4, atol=1e-2)


def test_responses_are_drawn_from_the_distribution(bench: steering.Bench):
    """Frequencies of 4,000 first tokens: chi-squared within five standard deviations."""
    policy = perturbed(bench, 0.3)
    n = 4000
    prompts = bench.prompts[:1].expand(n, -1)
    counts = torch.bincount(
        policy.respond(prompts, 1, seed=3)[:, 0], minlength=bench.corpus.vocabulary
    ).double()
    with torch.no_grad():
        p = policy.logits(bench.prompts[:1], torch.zeros(1, 1).long())[0, 0].double().softmax(-1)
    common = p * n >= 5
    expected = torch.cat((p[common], p[~common].sum()[None])) * n
    found = torch.cat((counts[common], counts[~common].sum()[None]))
    squares = ((found - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert freedom > 5
    assert abs(squares - freedom) < 5 * math.sqrt(2 * freedom)


def test_a_seed_fixes_the_responses(bench: steering.Bench):
    policy = steering.Policy(bench.start)
    first, again, other = (policy.respond(bench.prompts, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# The measuring


def test_the_start_policy_is_no_distance_from_itself(bench: steering.Bench):
    measured, texts = bench.measure(steering.Policy(bench.start), last=True)
    assert measured.kl == 0.0
    assert 0.0 < measured.entropy <= math.log(bench.corpus.vocabulary)
    assert len(texts) == PLAN.last_prompts
    optimum, _ = bench.measure(bench.optimum)
    assert optimum.gap == pytest.approx(0.0, abs=1e-6)


def test_the_reward_is_the_expectation_of_that_of_the_algorithm(
    encoded: corpus.EncodedCorpus, bench: steering.Bench
):
    """Over responses of one token, all of them, each as likely as the policy makes it."""
    policy = perturbed(bench)
    plan = replace(PLAN, response=1, prompts=1, last_prompts=1)
    one = replace(bench, prompts=bench.prompts[:1], plan=plan)
    measured, _ = one.measure(policy)
    size = encoded.vocabulary
    batch = steering.as_batch(one.prompts.expand(size, -1), torch.arange(size)[:, None])
    estimator = PrinciplePrompt(bench.principle, rho=plan.rho)
    algorithm = InverseQ(policy.model, bench.start, estimator=estimator, beta=1.0)
    with torch.no_grad():
        logp = algorithm.policy_tokens(steering_batch(batch)).logp
    p = logp.exp()
    scores = algorithm.score(batch)
    rewards = algorithm.token_rewards(batch)[:, -1]
    # Means of differences of float32 log-probabilities, which are of the size of log(size).
    close = partial(pytest.approx, rel=1e-4, abs=2**-22 * math.log(size))
    assert measured.reward == close((p * rewards).sum().item())
    kl = (p * (logp - scores["ref_logp"][:, -1])).sum().item()
    assert measured.kl == close(kl)
    gap = (p * (logp - scores["logp_star"][:, -1])).sum().item()
    assert measured.gap == close(gap)
    assert measured.entropy == close(-(p * logp).sum().item())


def steering_batch(batch: dict[str, Tensor]):
    from trimtab.algorithms.inverse_q import ResponseBatch

    return ResponseBatch(batch)


@pytest.mark.parametrize("method", inverse_q.METHODS, ids=lambda method: method.name)
def test_a_course_starts_where_it_should_and_repeats(
    bench: steering.Bench, learner: principle.Learner, method: steering.Method
):
    before = bench.start.lm_head.weight.clone()
    prompts = principle.training_prompts(learner, PLAN.policy)
    first, _ = bench.measure(steering.Policy(bench.start))
    steps: list[int] = []
    course = bench.steer(method, 3, prompts, first, lambda: steps.append(1))
    again = bench.steer(method, 3, prompts, first)
    other = bench.steer(method, 4, prompts, first)
    assert [point.step for point in course.points] == [0, *PLAN.measured_at]
    assert course.points[0] is first
    assert len(steps) == PLAN.measured_at[-1]
    assert course == again
    assert course.points[-1] != other.points[-1]
    assert course.points[-1].kl > 0.0
    assert len(course.texts) == PLAN.last_prompts
    assert torch.equal(bench.start.lm_head.weight, before)


@pytest.mark.parametrize("method", [inverse_q.OURS, inverse_q.BASELINE], ids=lambda m: m.name)
def test_both_come_nearer_to_the_same_optimum(bench: steering.Bench, method: steering.Method):
    plan = replace(PLAN, rate=3e-3, batch=64, measured_at=(12,))
    wide = replace(bench, plan=plan)
    first, _ = wide.measure(steering.Policy(bench.start), last=True)
    course = wide.steer(method, 0, bench.prompts, first)
    assert first.gap > 0.0
    assert course.points[-1].gap < 0.8 * first.gap


def test_context_distillation_stays_nearer_to_the_start(bench: steering.Bench):
    """Its optimum is the policy with the principle, which the contrast lies beyond."""
    wide = replace(bench, plan=replace(PLAN, rate=3e-3, batch=64, measured_at=(12,)))
    first, _ = wide.measure(steering.Policy(bench.start))
    ours, plain = (
        wide.steer(method, 0, bench.prompts, first).points[-1]
        for method in (inverse_q.OURS, inverse_q.DISTILLATION)
    )
    assert plain.kl < 0.5 * ours.kl
    assert plain.gap > ours.gap


def test_steps_to_a_score():
    points = [measured(score=0.1), measured(score=0.3, step=2), measured(score=0.2, step=4)]
    assert steering.steps_to(points, 0.1) == 0
    assert steering.steps_to(points, 0.25) == 2
    assert steering.steps_to(points, 0.31) is None


# What it says


def measured(score: float = 0.1, kl: float = 0.0, distinct: float = 0.9, step: int = 0) -> Measured:
    return Measured(step, score, 0.0, kl, 3.0, distinct)


def outcome(
    *scores: float,
    responses: tuple[int | None, ...] = (64, 64, 64),
    kl: float = 0.2,
    distinct: float = 0.9,
) -> verdict.Outcome:
    finals = [measured(score, kl, distinct) for score in scores]
    return verdict.Outcome("it", finals, list(responses))


START, OPTIMUM = measured(0.03), measured(0.25, kl=0.3)


@pytest.mark.parametrize(
    ("scores", "optimum", "words"),
    [
        ((0.24, 0.25, 0.26), OPTIMUM, "Inverse-Q* steers the policy without preference data, "),
        ((0.01, 0.011, 0.012), OPTIMUM, "steers the policy away from the principle"),
        ((0.02, 0.04, 0.03), OPTIMUM, "does not show that Inverse-Q* steers the policy"),
        ((0.24, 0.25, 0.26), measured(0.02), "nothing to steer to"),
    ],
)
def test_the_answer_follows_the_numbers(scores: tuple[float, ...], optimum: Measured, words: str):
    text = verdict.answer(outcome(*scores), {"x": outcome(0.1, 0.1)}, START, optimum, 640)
    assert words in text
    assert text.count("640") == 1
    assert f"{100 * sum(scores) / 3:.1f} ± " in text
    assert "a KL of 0.20 ± 0.00" in text


@pytest.mark.parametrize(
    ("others", "responses", "words"),
    [
        ((0.07, 0.08, 0.09), (None, None, None), "further than the other:"),
        ((0.34, 0.35, 0.36), (32, 32, 32), "less far than the other:"),
        ((0.24, 0.25, 0.26), (96, 128, None), "about as far as the other but in fewer samples:"),
        ((0.24, 0.25, 0.26), (32, 32, 32), "about as far as the other but in more samples:"),
        ((0.24, 0.25, 0.26), (64, 32, 96), "about as far as the other:"),
    ],
)
def test_the_answer_names_the_others(
    others: tuple[float, ...], responses: tuple[int | None, ...], words: str
):
    ours, other = outcome(0.24, 0.25, 0.26), outcome(*others, responses=responses)
    assert words in verdict.answer(ours, {"the other": other}, START, OPTIMUM, 640)


@pytest.mark.parametrize(
    ("ours", "other", "words"),
    [
        ((0.24, 0.25, 0.26), (0.07, 0.08, 0.09), "Inverse-Q* ends higher"),
        ((0.07, 0.08, 0.09), (0.24, 0.25, 0.26), "Inverse-Q* ends lower"),
        ((0.2, 0.25, 0.3), (0.19, 0.24, 0.29), "no clear difference in score"),
    ],
)
def test_where_both_end(ours: tuple[float, ...], other: tuple[float, ...], words: str):
    text = verdict.against(outcome(*ours), outcome(*other), "The other")
    assert text.startswith("The other ends at ")
    assert words in text
    assert "KL;" not in text


@pytest.mark.parametrize(
    ("kl", "words"), [(0.1, ", and at a higher KL"), (0.3, ", and at a lower KL")]
)
def test_what_the_score_costs(kl: float, words: str):
    text = verdict.against(outcome(0.2, 0.2, 0.2), outcome(0.2, 0.2, 0.2, kl=kl), "The other")
    assert words in text


@pytest.mark.parametrize(
    ("ours", "other", "words"),
    [
        ((64, 96, 64), (320, 256, None), "it gets 80 % of the way from the start to pi* in 320"),
        ((64, 96, 64), (320, 256, None), "Inverse-Q* in 64."),
        ((64, 96, 64), (None, 256, None), "it never gets 80 %"),
        ((None, 96, None), (None, 256, None), "neither gets 80 %"),
        ((None, 96, None), (256, 256, None), "Inverse-Q* never does"),
        ((64, 64, 64), (64, 64, 64), "both get 80 %"),
    ],
)
def test_how_fast_both_come_there(
    ours: tuple[int | None, ...], other: tuple[int | None, ...], words: str
):
    pair = (outcome(0.2, 0.2, 0.2, responses=n) for n in (ours, other))
    assert words in verdict.against(*pair, "The other")


@pytest.mark.parametrize(
    ("kl", "distinct", "words"),
    [
        (4.0, 0.2, "runs past pi* into repetition"),
        (4.0, 0.85, "runs past pi*:"),
        (0.3, 0.85, "has not run past pi*"),
    ],
)
def test_what_becomes_of_the_clipped_reading(kl: float, distinct: float, words: str):
    found = outcome(0.8, 0.8, 0.8, kl=kl, distinct=distinct)
    text = verdict.beyond(found, START, OPTIMUM)
    assert words in text
    assert f"a KL of {kl:.2f}" in text


def test_a_difference_is_clear_by_students_test():
    """With equal variances 1 and three values each, 2.78 * sqrt(2 / 3) = 2.27 is the limit."""
    assert verdict.compare([1.0, 2.0, 3.0], [3.26, 4.26, 5.26]) == "unclear"
    assert verdict.compare([1.0, 2.0, 3.0], [3.28, 4.28, 5.28]) == "lower"
    assert verdict.compare([3.28, 4.28, 5.28], [1.0, 2.0, 3.0]) == "higher"
    # Against an exact number: 4.30 / sqrt(3) = 2.48.
    assert verdict.compare([1.0, 2.0, 3.0], [4.47]) == "unclear"
    assert verdict.compare([1.0, 2.0, 3.0], [4.49]) == "lower"
    assert verdict.compare([1.0], [9.0]) == "unclear"


def test_outcomes_are_by_method_and_count_responses():
    points = [measured(0.0), measured(0.19, step=1), measured(0.21, step=3)]
    courses = [
        steering.Course("a", 0, points, []),
        steering.Course("b", 0, points[:2], []),
        steering.Course("a", 1, points[::2], []),
    ]
    found = verdict.outcomes(courses, measured(0.0), measured(0.25), batch=32)
    assert list(found) == ["a", "b"]
    assert found["a"].responses == [96, 96]
    assert found["b"].responses == [None]
    assert math.isinf(found["b"].median_responses)
    assert found["a"].shown("score", 1, 100.0) == "21.0 ± 0.0"
    assert found["b"].shown("score", 1, 100.0) == "19.0"
    nowhere = verdict.outcomes(courses, measured(0.3), measured(0.25), batch=32)
    assert nowhere["a"].responses == [None, None]


def test_a_response_on_one_line():
    assert inverse_q.one_line("a  b\n\n    c\td") == "a b↵↵ c⇥d"
    assert len(inverse_q.one_line("word " * 99)) == 96


# The section


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[section.Context, section.Result]:
    context = section.Context(tmp_path_factory.mktemp("out"), 0, section.QUICK)
    return context, inverse_q.run(context)


def test_the_table_shows_the_numbers(quick: tuple[section.Context, section.Result]):
    _, result = quick
    assert len(result.verdict) == 4
    assert all(len(row) == len(result.table.header) for row in result.table.rows)
    methods = result.numbers["methods"]
    assert list(methods) == [method.name for method in inverse_q.METHODS]
    shown = {row[0]: row for row in result.table.rows}
    for name, found in methods.items():
        finals = [run["points"][-1] for run in found["runs"]]
        assert len(finals) == inverse_q.QUICK.seeds
        scores = torch.tensor([100 * final["score"] for final in finals], dtype=torch.float64)
        assert shown[name][1] == f"{scores.mean():.1f} ± {scores.std():.1f}"
        for final in finals:
            assert 0.0 <= final["score"] <= 1.0
            assert final["kl"] > 0.0
            assert final["entropy"] > 0.0
    start = result.numbers["references"]["start policy"]
    assert shown["start policy"][1] == f"{100 * start['score']:.1f}"
    assert start["kl"] == 0.0


def test_the_section_can_be_shown(quick: tuple[section.Context, section.Result], tmp_path: Path):
    context, result = quick
    (picture,) = (block for block in result.blocks if isinstance(block, section.Figure))
    assert picture.path.read_bytes().startswith(b"\x89PNG")
    report.write_page(tmp_path / "report.html", [(inverse_q.SECTION, result)], {}, {})
    page = (tmp_path / "report.html").read_text("utf-8")
    for sentence in result.verdict:
        assert sentence in page
    assert "could not be had" in page
    assert page.count("<img") == 1
    report.write_numbers(tmp_path / "numbers.json", result.numbers)
    assert json.loads((tmp_path / "numbers.json").read_text("utf-8"))["verdict"] == result.verdict
    assert {"inverse-q: start policy", "inverse-q: steering"} <= set(context.seconds)
