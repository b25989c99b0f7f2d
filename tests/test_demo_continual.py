"""The demo's label tasks for continual learning: passages, answers, parts that stay apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trimtab.demo import continual, corpus
from trimtab.demo.continual import PARTS, LabelTask, TaskSizes

SIZES = TaskSizes(length=20, answers=3, passages={"train": 40, "choice": 8, "test": 8})


@pytest.fixture(scope="module")
def encoded() -> corpus.EncodedCorpus:
    text = corpus.read_corpus(0, max_files=120)
    return corpus.encode(text, corpus.train_tokenizer(text, 600))


@pytest.fixture(scope="module")
def tasks(encoded: corpus.EncodedCorpus) -> list[LabelTask]:
    return continual.build_label_tasks(encoded, SIZES, seed=0)


def test_functions_lose_their_name_and_end_where_the_next_begins():
    source = (
        "import x\n\n"
        "def get_item(a):\n    return get_item(a - 1) + get_items\n\n"
        "@cached\n"
        "class A(B):\n"
        "    async def __init__(self):\n        super().__init__()\n"
        "    def repr(self): pass\n"
    )
    assert list(continual._functions(source)) == [
        ("def _(a):\n    return _(a - 1) + get_items", "get"),
        ("def _(self):\n        super()._()", "init"),
        ("def _(self): pass", "repr"),
    ]


def test_docstrings_lose_their_first_word():
    text = "Return the x\nof y.\n\n  indented\n\n*Note* that\n\nreturn (this)\n"
    assert list(continual._openings(text)) == [("the x\nof y.", "return"), ("(this)\n", "return")]


def test_what_stands_before_a_raise():
    source = "a\n    if b:\n        raise ValueError(c)\n    raise error\n    raise KeyError\n"
    assert list(continual._raises(source)) == [
        ("a\n    if b:", "ValueError"),
        (source[: source.rindex("    raise")].rstrip(), "KeyError"),
    ]


def test_texts_end_before_an_auxiliary():
    assert list(continual._auxiliaries("This is it, and\nwas his. Cannot island.")) == [
        ("This", "is"),
        ("This is it, and", "was"),
    ]


def test_parts_are_balanced_and_apart(encoded: corpus.EncodedCorpus, tasks: list[LabelTask]):
    assert [task.name for task in tasks] == ["verb", "opening", "exception", "auxiliary"]
    for task in tasks:
        assert 2 <= len(task.answers) <= SIZES.answers
        assert task.chance == 1.0 / len(task.answers)
        passages = {}
        ending = encoded.tokenizer.encode(task.question.ending).ids
        for part, windows in task.parts.items():
            counts = windows.answers.bincount(minlength=len(task.answers))
            assert counts.min() == counts.max() > 0
            assert counts.max() <= SIZES.passages[part]
            assert windows.rows.shape == (len(windows), SIZES.length)
            assert (windows.rows[:, -len(ending) :] == torch.tensor(ending)).all()
            passages[part] = {tuple(row) for row in windows.rows.tolist()}
            assert len(passages[part]) == len(windows)
        assert not passages["train"] & passages["test"]
        assert not passages["train"] & passages["choice"]
        assert not passages["choice"] & passages["test"]


def test_no_two_answers_share_a_token(encoded: corpus.EncodedCorpus, tasks: list[LabelTask]):
    labels = torch.cat([task.labels for task in tasks])
    assert len(labels.unique()) == len(labels)
    for task in tasks:
        for answer, label in zip(task.answers, task.labels.tolist(), strict=True):
            assert encoded.pieces[label].strip()
            assert answer.startswith(encoded.pieces[label].strip())


def test_a_task_leaves_out_the_answers_of_those_before(
    encoded: corpus.EncodedCorpus, monkeypatch: pytest.MonkeyPatch
):
    twice = 2 * (continual.questions()[3],)
    monkeypatch.setattr(continual, "questions", lambda: twice)
    first, second = continual.build_label_tasks(encoded, SIZES, seed=0)
    assert not {*first.labels.tolist()} & {*second.labels.tolist()}
    assert not {*first.answers} & {*second.answers}


@pytest.mark.parametrize("name", ["exception", "auxiliary"])
def test_test_passages_are_from_files_held_out(
    encoded: corpus.EncodedCorpus, tasks: list[LabelTask], name: str
):
    """These two leave the text as it is, so a passage can be looked up."""
    (task,) = (task for task in tasks if task.name == name)
    texts = {
        split: encoded.tokenizer.decode(
            domains[task.question.domain].ids.tolist(), skip_special_tokens=False
        )
        for split, domains in encoded.splits.items()
    }
    ending = task.question.ending

    def inside(split: str, row: Tensor) -> bool:
        return continual.read_passage(encoded, row).removesuffix(ending) in texts[split]

    test = task.parts["test"].rows
    assert all(inside("validation", row) or inside("tasks", row) for row in test)
    # A few short ones stand in any file.
    assert sum(inside("train", row) for row in test) < 0.2 * len(test)
    for part in ("train", "choice"):
        assert all(inside("train", row) for row in task.parts[part].rows)


@pytest.mark.parametrize("name", ["exception", "auxiliary"])
def test_answers_are_what_the_text_goes_on_with(
    encoded: corpus.EncodedCorpus, tasks: list[LabelTask], name: str
):
    (task,) = (task for task in tasks if task.name == name)
    text = encoded.tokenizer.decode(encoded.splits["train"][task.question.domain].ids.tolist())
    windows = task.parts["train"]
    for row, answer in list(zip(windows.rows, windows.answers.tolist(), strict=True))[::7]:
        passage = continual.read_passage(encoded, row).removesuffix(task.question.ending)
        places = [i + len(passage) for i in range(len(text)) if text.startswith(passage, i)]
        goes_on = [text[place : place + 80].lstrip() for place in places]
        said = task.answers[answer]
        start = f"raise {said}" if name == "exception" else said
        assert any(t.startswith(start) for t in goes_on)


def test_tasks_follow_the_seed(encoded: corpus.EncodedCorpus, tasks: list[LabelTask]):
    again = continual.build_label_tasks(encoded, SIZES, seed=0)
    other = continual.build_label_tasks(encoded, SIZES, seed=1)
    for a, b, c in zip(tasks, again, other, strict=True):
        assert all(torch.equal(a.parts[p].rows, b.parts[p].rows) for p in PARTS)
        assert not torch.equal(a.parts["train"].rows, c.parts["train"].rows)


def test_too_little_text_is_one_sentence(encoded: corpus.EncodedCorpus):
    splits = dict(encoded.splits)
    splits["validation"] = splits["tasks"] = {
        domain: corpus.Tokens(tokens.ids[:50], tokens.whole[:50])
        for domain, tokens in encoded.splits["tasks"].items()
    }
    with pytest.raises(corpus.DemoError, match="too few passages for the task 'verb'"):
        continual.build_label_tasks(replace(encoded, splits=splits), SIZES, seed=0)
