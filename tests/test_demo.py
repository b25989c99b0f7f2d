"""The demo: what it measures, what it says about it, and that its page stands alone."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

for name in ("transformers", "tokenizers", "matplotlib", "tqdm"):
    pytest.importorskip(name, reason="the demo's extra is not installed: trimtab[demo]")

from trimtab import demo
from trimtab.demo import corpus, laws, models, report, section, speed, tasks, verdict
from trimtab.demo.sections import SECTIONS

LIBRARY = {
    "alpha.py": '"""A module about nothing in particular, at some length."""\n# gone\nX = [1]\n',
    "beta.py": 'def f(a):\n    """Return the argument, changed as little as possible."""\n'
    "    return {a: (a, a)}  # kept\n",
    "test/skipped.py": '"""Nobody reads this docstring, since it is in a folder of tests."""\n',
    "broken.py": "def (:\n",
}


class Run(NamedTuple):
    folder: Path
    printed: str
    numbers: dict
    page: str


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert demo.main(["--quick", "--threads", "1", "--out", str(folder)]) == 0
    numbers = json.loads((folder / "numbers.json").read_text("utf-8"))
    page = (folder / "report.html").read_text("utf-8")
    return Run(folder, printed.getvalue(), numbers, page)


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


# The page


def test_the_page_needs_nothing_from_outside(quick: Run):
    sources = re.findall(r'src="([^"]*)"', quick.page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', quick.page))
    for word in ("<link", "<script", "@import", "url(", "http"):
        assert word not in quick.page, word


def test_every_picture_is_in_the_page(quick: Run):
    pictures = sorted(quick.folder.glob("*.png"))
    assert len(pictures) >= 6
    for path in pictures:
        assert base64.b64encode(path.read_bytes()).decode("ascii") in quick.page, path.name


def test_every_section_is_in_the_contents(quick: Run):
    for key, one in SECTIONS.items():
        assert f'<a href="#{key}">' in quick.page
        assert f'<h2 id="{key}">' in quick.page
        assert one.title in quick.printed


def test_the_page_ends_what_it_opens(quick: Run):
    for tag in ("section", "table", "figure", "details", "tr", "div", "p"):
        opened = len(re.findall(rf"<{tag}[ >]", quick.page))
        assert opened == quick.page.count(f"</{tag}>"), tag


def test_text_of_the_library_cannot_become_markup():
    table = section.Table("<i>", ["a<b"], [["<script>"]])
    page = report._block(table) + report._block(section.Paragraph("<script>"))
    assert "<script>" not in page
    assert "<i>" not in page
    assert "a&lt;b" in page


# The numbers


def test_the_table_on_the_terminal_shows_the_numbers_in_the_file(quick: Run):
    held_out = quick.numbers["sections"]["salience"]["held_out"]
    rows = 0
    for split, found in held_out.items():
        for task, scores in found.items():
            line = next(
                line
                for line in quick.printed.splitlines()
                if re.match(rf"  {split} +{task} ", line)
            )
            expected = [scores[law]["r2"] for law in laws.LAWS[1:]]
            errors = [f"{scores[law]['mse']:.5f}" for law in laws.LAWS[1:]]
            texts = [f"{r2:.3f}" for r2 in expected if r2 is not None]
            cells = line.split()
            assert cells[-3:] == errors
            assert [c for c in cells[-6:-3] if re.fullmatch(r"-?\d.*", c)] == texts
            rows += 1
    assert rows == 12


def test_scores_are_those_of_the_accuracies_in_the_file(quick: Run):
    """MSE from the file's own duels and checkpoints, so that no table is made up."""
    found = quick.numbers["sections"]["salience"]
    assert len(found["checkpoints"]) == 2 * 2 * 3
    for law, duels in found["salience_against"].items():
        for duel in duels:
            scores = found["held_out"][duel["split"]][duel["task"]]
            assert duel["ours"] == scores["salience"]["mse"]
            assert duel["other"] == scores[law]["mse"]
    for checkpoint in found["checkpoints"]:
        assert all(0.0 <= a <= 1.0 for a in checkpoint["accuracy"].values())


def test_verdicts_are_on_the_page_and_on_the_terminal(quick: Run):
    flat = " ".join(quick.printed.split())
    for sentence in quick.numbers["sections"]["salience"]["verdict"]:
        assert " ".join(sentence.split()) in flat
        assert sentence.replace("'", "&#x27;") in quick.page


def test_models_learn(quick: Run):
    checkpoints = quick.numbers["sections"]["salience"]["checkpoints"]
    first, last = checkpoints[0], checkpoints[2]
    assert (first["mixture"], last["mixture"]) == ("prose", "prose")
    assert last["loss"]["prose"] < first["loss"]["prose"] - 0.2


def test_memory_and_error_of_the_loss(quick: Run):
    for both in quick.numbers["sections"]["speed"]["loss"].values():
        assert both["trimtab"]["extra_bytes"] < both["eager PyTorch"]["extra_bytes"]
        assert both["trimtab"]["over_budget"] == []


# Options


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[section.Context]]:
    """Sections replaced by two that only look at their context."""
    contexts: list[section.Context] = []

    def look(key: str) -> section.Section:
        def run(context: section.Context) -> section.Result:
            contexts.append(context)
            return section.Result([key], section.Table("", ["x"], [["1"]]), [], {"key": key})

        return section.Section(key, key, run)

    monkeypatch.setattr("trimtab.demo.sections.SECTIONS", {k: look(k) for k in ("one", "two")})
    return contexts


def test_options_reach_the_sections(tiny: list[section.Context], tmp_path: Path):
    before = torch.get_num_threads()
    arguments = ["--sections", "two", "--seed", "7", "--threads", "1", "--out", str(tmp_path)]
    assert demo.main(arguments) == 0
    (context,) = tiny
    assert (context.seed, context.out, context.settings) == (7, tmp_path, section.FULL)
    assert torch.get_num_threads() == before
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert list(numbers["sections"]) == ["two"]
    assert numbers["machine"]["threads"].startswith("1 of")
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    assert [c.settings for c in tiny[1:]] == [section.QUICK] * 2


def test_an_unknown_section_is_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--sections", "salience,nothing"])
    assert stopped.value.code == 2
    assert "got nothing" in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    find = importlib.util.find_spec
    absent = ("tokenizers", "tqdm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in absent else find(n))
    assert demo.main(["--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.strip() == "trimtab demo needs tokenizers, tqdm; pip install 'trimtab[demo]'"
    assert not (tmp_path / "none").exists()


def test_no_library_source_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "empty"))
    assert demo.main(["--quick", "--out", str(tmp_path / "out")]) == 2
    assert "the standard library's source is not in" in capsys.readouterr().err


# What it says


def duels(*confidences: float, ours: float = 1.0, other: float = 2.0) -> list[verdict.Duel]:
    return [
        verdict.Duel("an unseen run", f"t{i}", ours, other, confidence)
        for i, confidence in enumerate(confidences)
    ]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (duels(1.0, 1.0, 1.0, 0.5), "predicts held-out models better than the mean loss."),
        (duels(1.0, 0.5, 0.5, 0.5), "is ahead of the mean loss"),
        (duels(0.5, 0.5, 0.5, 0.5), "no winner"),
        (duels(1.0, 0.0, 0.5, 0.5), "no winner"),
        (duels(0.0, 0.5, 0.5, 0.5), "is behind the mean loss"),
        (duels(0.0, 0.0, 0.0, 0.5), "predicts held-out models worse than the mean loss."),
    ],
)
def test_the_verdict_follows_the_numbers(found: list[verdict.Duel], words: str):
    assert words in verdict.verdict("the mean loss", found)


def test_the_verdict_counts_and_gives_the_factor():
    text = verdict.verdict("the mean loss", duels(1.0, 0.0, 0.5))
    assert "clearly better in 1, clearly worse in 1, and neither in 1" in text
    assert "2.00 times lower in the median" in text
    text = verdict.verdict("the mean loss", duels(0.0, ours=3.0, other=1.5))
    assert "2.00 times higher in the median" in text


def test_what_it_makes_of_both_comparisons():
    better, worse, even = duels(1.0, 1.0), duels(0.0, 0.0), duels(0.5, 0.5)
    assert "worth more here" in verdict.overall(better, better, [0.6])
    text = verdict.overall(better, worse, [0.571, 0.66])
    assert "needs no salience vector here" in text
    assert "57 to 66 %" in text
    assert "needs no salience vector here" in verdict.overall(better, even, [0.6])
    for found in (worse, even):
        assert "does not favour the salience vector" in verdict.overall(found, better, [0.6])


def test_every_way_of_holding_out_has_its_sentence():
    found = duels(1.0, 0.0, 0.5)
    (sentence,) = verdict.by_split("the mean loss", found)
    expected = "better on t0; worse on t1; no clear difference on t2."
    assert sentence == f"On an unseen run, against the mean loss: {expected}"


def test_the_sentence_on_speed_follows_the_numbers():
    fast = speed.Measured(1.0, 10, {"loss": 1e-6}, [])
    slow = speed.Measured(2.0, 40, {"loss": 1e-6}, [])
    text = speed.sentence("float32", fast, slow)
    assert "2.00 times as fast as" in text
    assert "4.0 times less extra memory" in text
    assert "within twice eager's" in text
    text = speed.sentence("float32", replace(slow, over=["loss"]), fast)
    assert "2.00 times slower than" in text
    assert "4.0 times more extra memory" in text
    assert "beyond twice eager's and one rounding in the loss" in text


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
    """Guessing the most frequent option is right as often as chance, within four standard errors."""
    for task in tasks.build_tasks(encoded, 64, 200, 0):
        ids = torch.from_numpy(encoded.splits["train"][task.domain].ids)
        counts = torch.bincount(ids, minlength=encoded.vocabulary).float()
        right = (counts[task.options].argmax(1) == task.answers).double().mean().item()
        error = math.sqrt(task.chance * (1 - task.chance) / len(task.answers))
        assert abs(right - task.chance) < 4 * error + 0.03, task.name


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
    data = laws.Measurements(checkpoints, nll, accuracy[:, None], ["t"], [0.25], columns)
    return data, made


def test_the_comparison_finds_salience_where_it_is():
    data, made = made_up(salient=True)
    for split in laws.splits(data.checkpoints, made):
        outcome = laws.compare(data, split)
        assert outcome.r2(laws.SALIENCE, data) > 0.7, split.name
        assert outcome.r2(laws.SALIENCE, data) > outcome.r2(laws.MEAN, data) + 0.2, split.name
        assert outcome.confidence(laws.MEAN, data, 0) > 0.95


def test_the_comparison_finds_none_where_there_is_none():
    data, made = made_up(salient=False)
    for split in laws.splits(data.checkpoints, made):
        outcome = laws.compare(data, split)
        assert outcome.r2(laws.MEAN, data) > 0.99, split.name
        assert outcome.confidence(laws.MEAN, data, 0) <= 0.5


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
    outcome, again = laws.compare(data, split), laws.compare(replace(data, accuracy=changed), split)
    for law in laws.LAWS:
        assert torch.equal(outcome.predicted[law], again.predicted[law]), law


def test_a_tie_is_half():
    data, made = made_up(salient=True)
    outcome = laws.compare(data, laws.splits(data.checkpoints, made)[2])
    tied = replace(outcome, predicted=dict.fromkeys(laws.LAWS, outcome.predicted[laws.MEAN]))
    assert tied.confidence(laws.MEAN, data, 0).tolist() == [0.5]


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
