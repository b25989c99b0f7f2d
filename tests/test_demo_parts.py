"""What the demo is made of: text, tasks, models, laws side by side, and the measuring of speed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from trimtab.demo import corpus, laws, models, speed, tasks

LIBRARY = {
    "alpha.py": '"""A module about nothing in particular, at some length."""\n# gone\nX = [1]\n',
    "beta.py": 'def f(a):\n    """Return the argument, changed as little as possible."""\n'
    "    return {a: (a, a)}  # kept\n",
    "test/skipped.py": '"""Nobody reads this docstring, since it is in a folder of tests."""\n',
    "broken.py": "def (:\n",
}


@pytest.fixture(scope="module")
def encoded() -> corpus.EncodedCorpus:
    text = corpus.read_corpus(0, max_files=120)
    return corpus.encode(text, corpus.train_tokenizer(text, 700))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, source in LIBRARY.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, "utf-8")
    return tmp_path


# The text


def test_prose_and_code_of_a_file_are_apart_and_in_one_split(library: Path):
    docstrings, code = corpus._parse(library / "beta.py") or ([], "")
    assert docstrings == ["Return the argument, changed as little as possible."]
    assert code == "def f(a):\n    return {a: (a, a)}  # kept\n"
    assert corpus._parse(library / "alpha.py") == (
        ["A module about nothing in particular, at some length."],
        "X = [1]\n",
    )
    assert corpus._parse(library / "broken.py") is None
    names = [path.name for path in corpus._library_files(library)]
    assert sorted(names) == ["alpha.py", "beta.py", "broken.py"]


def test_doctests_are_not_prose():
    text = "Add two numbers and return their sum.\n\n>>> add(1, 2)\n3\n\nMore words follow here."
    cleaned = corpus._clean_prose(text)
    assert cleaned == "Add two numbers and return their sum.\n\nMore words follow here."
    assert corpus._clean_prose("Too short.") == ""


def test_splits_share_no_file_and_depend_on_the_seed_alone():
    first, again = (corpus.read_corpus(0, max_files=60) for _ in range(2))
    assert first == again
    assert corpus.read_corpus(1, max_files=60) != first
    for domain in corpus.DOMAINS:
        parts = [set(first.documents[split][domain]) for split in corpus.SPLITS]
        assert sum(map(len, parts)) == len(set().union(*parts))


def test_tokens_give_the_text_back(encoded: corpus.EncodedCorpus):
    tokens = encoded.splits["validation"]["code"]
    text = "".join(encoded.pieces[i] for i in tokens.ids[:200])
    assert "\ufffd" in text or text in encoded.tokenizer.decode(
        tokens.ids[:400].tolist(), skip_special_tokens=False
    )
    whole = [encoded.pieces[i] for i, w in zip(tokens.ids, tokens.whole, strict=True) if w]
    assert {")", "]", "}"} <= set(whole)


# The tasks


def test_the_right_option_is_what_the_text_goes_on_with(encoded: corpus.EncodedCorpus):
    for task in tasks.build_tasks(encoded, 64, 40, 0):
        right = task.options.gather(1, task.answers[:, None])[:, 0]
        follows = task.rows[task.items[:, 0], task.items[:, 1] + 1]
        assert torch.equal(right, follows), task.name
        assert all(len(set(options)) == len(options) for options in task.options.tolist())
        assert task.items[:, 1].min() >= 15


def test_how_often_tokens_occur_is_of_no_use(encoded: corpus.EncodedCorpus):
    """Guessing the most frequent option is right as often as chance, to four standard errors."""
    for task in tasks.build_tasks(encoded, 64, 200, 0):
        ids = torch.from_numpy(encoded.splits["train"][task.domain].ids)
        counts = torch.bincount(ids, minlength=encoded.vocabulary).float()
        right = (counts[task.options].argmax(1) == task.answers).double().mean().item()
        error = math.sqrt(task.chance * (1 - task.chance) / len(task.answers))
        assert abs(right - task.chance) < 4 * error, task.name


def test_accuracy_is_that_of_the_likeliest_option(encoded: corpus.EncodedCorpus):
    made = tasks.build_tasks(encoded, 64, 20, 0)
    model = models.build(models.Size("tiny", 16, 1, 2), encoded.vocabulary, 64).eval()
    for task, measured in zip(made, tasks.measure(model, made, batch=7), strict=True):
        with torch.no_grad():
            logp = model(input_ids=task.rows).logits.log_softmax(-1)
        at = logp[task.items[:, 0], task.items[:, 1]].gather(1, task.options)
        assert measured == pytest.approx((at.argmax(1) == task.answers).double().mean().item())


# The models


def plan(steps: tuple[int, ...] = (2, 4)) -> models.Plan:
    mixtures = (models.Mixture("prose", 1.0), models.Mixture("code", 0.0))
    sizes = (models.Size("small", 16, 1, 2), models.Size("large", 24, 1, 2))
    return models.Plan(mixtures, sizes, steps, 4, 32, 0.04, 0.2, 2)


def test_training_repeats_to_the_bit(encoded: corpus.EncodedCorpus):
    first, again = (models.train_family(encoded, plan(), seed=3) for _ in range(2))
    other = models.train_family(encoded, plan(), seed=4)
    assert len(first.checkpoints) == 8
    for a, b, c in zip(first.checkpoints, again.checkpoints, other.checkpoints, strict=True):
        assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)
        assert not torch.equal(a.state["model.norm.weight"], c.state["model.norm.weight"])


def test_a_checkpoint_comes_back_as_the_model_it_was(encoded: corpus.EncodedCorpus):
    family = models.train_family(encoded, plan(), seed=0)
    checkpoint = family.last(family.plan.runs[0])
    assert checkpoint.step == 4
    model = family.model(checkpoint)
    assert all(torch.equal(p, checkpoint.state[n]) for n, p in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert checkpoint.parameters == sum(p.numel() for p in model.parameters())


def test_the_loss_of_training_is_that_of_the_logits(encoded: corpus.EncodedCorpus):
    model = models.build(models.Size("tiny", 16, 1, 2), encoded.vocabulary, 32)
    rows = torch.randint(encoded.vocabulary, (3, 33))
    loss = models.batch_loss(model, rows)
    logits = model(input_ids=rows[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    weight = model.lm_head.weight
    torch.testing.assert_close(
        torch.autograd.grad(loss, weight)[0], torch.autograd.grad(expected, weight)[0]
    )


@pytest.mark.parametrize(("prose", "rows"), [(1.0, 4), (0.5, 2), (0.0, 0)])
def test_a_batch_has_the_mixtures_share_of_prose(
    encoded: corpus.EncodedCorpus, prose: float, rows: int
):
    import numpy as np

    mixture = models.Mixture("m", prose)
    batch = models._batch(encoded, mixture, plan(), np.random.default_rng(0)).numpy()
    text = encoded.splits["train"]["prose"].ids.tobytes()
    assert [row.tobytes() in text for row in batch] == [True] * rows + [False] * (4 - rows)


# The laws


def made_up(salient: bool) -> tuple[laws.Measurements, models.Plan]:
    """Checkpoints of which accuracy follows one tenth of the tokens, or the mean of all."""
    mixtures = tuple(models.Mixture(f"m{i}", i / 3) for i in range(4))
    sizes = tuple(models.Size(f"s{i}", 8, 1, 1) for i in range(3))
    made = models.Plan(mixtures, sizes, (1, 2, 4), 1, 1, 1.0, 1.0, 1)
    checkpoints = [
        models.Checkpoint(run, step, step, 10, {}) for run in made.runs for step in made.steps
    ]
    generator = torch.Generator().manual_seed(0)
    count, tokens = len(checkpoints), 200
    levels = 3.0 + torch.rand(count, 2, generator=generator)
    nll = levels[:, 1:] + 0.3 * torch.randn(count, tokens, generator=generator)
    nll[:, :20] = levels[:, :1] + 0.3 * torch.randn(count, 20, generator=generator)
    score = nll[:, :20].mean(1) if salient else nll.mean(1)
    accuracy = 0.25 + 0.75 * torch.sigmoid(-3.0 * (score.double() - 3.4))
    columns = [slice(0, 100)]
    features = torch.arange(tokens)[:, None].lt(20).float()
    data = laws.Measurements(checkpoints, nll, accuracy[:, None], ["t"], [0.25], columns, features)
    return data, made


GRID = (math.inf, 0.3, 0.1, 0.03)


def test_the_comparison_finds_salience_where_it_is():
    data, made = made_up(salient=True)
    for split in laws.splits(data.checkpoints, made):
        outcome = laws.compare(data, split, GRID)
        for law in laws.SALIENCES:
            assert outcome.r2(law, data) > 0.7, (split.name, law)
            assert outcome.r2(law, data) > outcome.r2(laws.MEAN, data) + 0.2, (split.name, law)
            assert outcome.confidence(law, laws.MEAN, data, 0) > 0.95


def test_the_comparison_finds_none_where_there_is_none():
    data, made = made_up(salient=False)
    for split in laws.splits(data.checkpoints, made):
        outcome = laws.compare(data, split, GRID)
        assert outcome.r2(laws.MEAN, data) > 0.99, split.name
        for law in laws.SALIENCES:
            assert outcome.confidence(law, laws.MEAN, data, 0) <= 0.5, (split.name, law)


def test_runs_are_held_out_whole():
    data, made = made_up(salient=True)
    for split in laws.splits(data.checkpoints, made):
        for run in data.run.unique():
            assert len(split.labels[data.run == run].unique()) == 1, split.name
        assert len(split.models.unique()) == len(split.models)
    sizes = [len(split.models) for split in laws.splits(data.checkpoints, made)]
    assert sizes == [36, 36, 12]


def test_what_is_held_out_does_not_reach_the_fit():
    data, made = made_up(salient=True)
    split = laws.splits(data.checkpoints, made)[2]
    held = split.labels == 2
    changed = data.accuracy.clone()
    changed[held] = 1.0 - changed[held]
    outcome = laws.compare(data, split, GRID)
    again = laws.compare(replace(data, accuracy=changed), split, GRID)
    for law in laws.LAWS:
        assert torch.equal(outcome.predicted[law], again.predicted[law]), law


def test_a_tie_is_half():
    data, made = made_up(salient=True)
    outcome = laws.compare(data, laws.splits(data.checkpoints, made)[2], GRID)
    assert outcome.confidence(laws.MEAN, laws.MEAN, data, 0).tolist() == [0.5]


# Speed


def test_extra_memory_is_what_a_call_has_at_a_time():
    def call() -> dict[str, torch.Tensor]:
        first = torch.zeros(1_000_000)
        second = first + 1.0
        del first
        third = torch.zeros(500_000)
        return {"sum": second.sum() + third.sum()}

    extra = speed.extra_memory(call)
    assert 8_000_000 <= extra < 8_100_000


def test_the_loss_and_its_twin_agree():
    hidden, head = torch.randn(2, 5, 8), torch.randn(11, 8)
    target = torch.randint(11, (2, 5))
    for dtype in (torch.float32, torch.bfloat16):
        found = speed.compare(hidden.to(dtype), head.to(dtype), target, rounds=2)
        for one in found.values():
            assert one.over == []
            assert one.seconds > 0
            assert set(one.errors) == {"loss", "hidden gradient", "head gradient"}
