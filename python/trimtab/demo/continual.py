"""Label tasks for continual learning: a passage of the library's text, a question, one word to say.

Every task reads passages of one domain and has answers of its own. An answer is the first token of
a word, as the model's tokenizer has it, and no two answers of any tasks share one, so a model that
may say any word of its vocabulary can mistake one task's answers for another's. That is how it
forgets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from trimtab.demo.corpus import END, DemoError, EncodedCorpus

PARTS = ("train", "choice", "test")
"""To train on; to choose settings by; to measure, from files that no model was trained on."""

_CHOICE = 0.15  # of the training passages are for choices
_SHORTEST = 8  # tokens of a passage
_CHARACTERS = 10  # read for every token of a passage, so that none lacks text
_FEWEST = 6  # windows of an answer in every part
_FUNCTION = re.compile(
    r"^ *(?:async )?def (\w+)(.*?)(?=^ *(?:(?:async )?def|class) |^ *@|\Z)",
    re.DOTALL | re.MULTILINE,
)
_RAISE = re.compile(r"\braise ([A-Z]\w*Error)\b")
_FIRST_WORD = re.compile(r"([A-Za-z]+)\s+(.*)", re.DOTALL)
_AUXILIARY = re.compile(r"\s(is|are|was|be|been|has|have|do|does|will|would|can|may|must|should)\b")


@dataclass(frozen=True)
class Question:
    """What is asked, and where its passages come from."""

    name: str
    domain: str
    text: str  # for the report
    ending: str  # stands behind every passage; the answer is the token after it
    passages: Callable[[str], Iterator[tuple[str, str]]]  # of a document: passage and answer
    keeps_end: bool = False  # of a passage that is too long the end is kept, not the beginning


@dataclass(frozen=True)
class Windows:
    """Passages with the question behind them."""

    rows: Tensor  # (n, L) token ids
    answers: Tensor  # (n,) number of the answer in its task

    def __len__(self) -> int:
        return len(self.answers)


@dataclass(frozen=True)
class LabelTask:
    """One question with its answers, equally many windows of each in every part."""

    question: Question
    answers: list[str]
    labels: Tensor  # (K,) token ids of the answers
    parts: dict[str, Windows]

    @property
    def name(self) -> str:
        """As in tables."""
        return self.question.name

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the answers."""
        return 1.0 / len(self.answers)


@dataclass(frozen=True)
class TaskSizes:
    """How large the tasks are."""

    length: int  # tokens of a window, the question's among them
    answers: int  # of a task, at most
    passages: dict[str, int]  # of each answer in every part, at most


def questions() -> tuple[Question, ...]:
    """The tasks in the order in which they are learnt: code and prose take turns."""
    return (
        Question("verb", "code", "A function without its name: with which word does it begin?",
                 "\n def", _functions),
        Question("opening", "prose", "A docstring without its first word: how did it begin?",
                 "\n begin", _openings),
        Question("exception", "code", "The lines before a raise: which exception is it?",
                 "\n raise", _raises, keeps_end=True),
        Question("auxiliary", "prose", "A text up to an auxiliary verb: which one is it?",
                 "\n then", _auxiliaries, keeps_end=True),
    )  # fmt: skip


def build_label_tasks(corpus: EncodedCorpus, sizes: TaskSizes, seed: int) -> list[LabelTask]:
    """Finds the passages and encodes them.

    The answers of a task are its most frequent ones that no earlier task has. Of the training
    passages, some are kept apart for choices. No passage stands in two parts.

    Args:
        corpus: text whose split "train" is for training and choices, all else for testing.
        sizes: of the windows and parts.
        seed: of the order in which passages are taken.

    Raises:
        DemoError: a task has fewer than two answers with enough passages.
    """
    texts = {domain: _documents(corpus, domain) for domain in ("prose", "code")}
    taken: set[int] = set()
    tasks = []
    for index, question in enumerate(questions()):
        generator = np.random.default_rng([seed, index])
        task = _build(corpus, question, texts[question.domain], sizes, taken, generator)
        taken.update(task.labels.tolist())
        tasks.append(task)
    return tasks


def read_passage(corpus: EncodedCorpus, row: Tensor) -> str:  # (L,)
    """The text of a window without its padding."""
    ids = [i for i in row.tolist() if i != _end(corpus)]
    return str(corpus.tokenizer.decode(ids))  # type: ignore[attr-defined]


def _documents(corpus: EncodedCorpus, domain: str) -> dict[str, list[str]]:
    """Documents as text: those to train on, all others to test on."""
    found: dict[str, list[str]] = {"train": [], "test": []}
    for split, domains in corpus.splits.items():
        ids = domains[domain].ids
        ends = np.flatnonzero(ids == _end(corpus))
        pieces = [piece[piece != _end(corpus)].tolist() for piece in np.split(ids, ends)]
        texts = corpus.tokenizer.decode_batch(pieces)  # type: ignore[attr-defined]
        found["train" if split == "train" else "test"] += texts
    return found


def _build(
    corpus: EncodedCorpus,
    question: Question,
    texts: dict[str, list[str]],
    sizes: TaskSizes,
    taken: set[int],
    generator: np.random.Generator,
) -> LabelTask:
    found = _by_answer(question, texts, sizes.length)
    seen: set[tuple[int, ...]] = set()
    answers: list[str] = []
    labels: list[int] = []
    rows: dict[str, list[list[list[int]]]] = {part: [] for part in PARTS}
    for answer in sorted(found["train"], key=lambda a: (-len(found["train"][a]), a)):
        label = _label(corpus, answer)
        if label in taken or label in labels or len(found["test"].get(answer, ())) < _FEWEST:
            continue
        train, test = (
            _encode(corpus, question, found[split][answer], sizes.length, seen, generator)
            for split in ("train", "test")
        )
        apart = int(_CHOICE * len(train))
        encoded = {"train": train[apart:], "choice": train[:apart], "test": test}
        if min(map(len, encoded.values())) < _FEWEST:
            continue
        answers.append(answer)
        labels.append(label)
        for part in PARTS:
            rows[part].append(encoded[part][: sizes.passages[part]])
        if len(answers) == sizes.answers:
            break
    if len(answers) < 2:
        raise DemoError(
            f"the library's text has too few passages for the task {question.name!r}: {answers}; "
            "run the demo without --quick, or with a Python that has more of its library."
        )
    parts = {part: _windows(rows[part]) for part in PARTS}
    return LabelTask(question, answers, torch.tensor(labels), parts)


def _by_answer(
    question: Question, texts: dict[str, list[str]], length: int
) -> dict[str, dict[str, list[str]]]:
    """Passages by split and answer, cut to about what fits a window."""
    most = _CHARACTERS * length
    found: dict[str, dict[str, list[str]]] = {split: {} for split in texts}
    for split, documents in texts.items():
        for document in documents:
            for passage, answer in question.passages(document):
                cut = passage[-most:] if question.keeps_end else passage[:most]
                found[split].setdefault(answer, []).append(cut)
    return found


def _encode(
    corpus: EncodedCorpus,
    question: Question,
    passages: Sequence[str],
    length: int,
    seen: set[tuple[int, ...]],
    generator: np.random.Generator,
) -> list[list[int]]:
    """Windows in random order, padded in front; those in `seen` are left out and then added."""
    tokenizer = corpus.tokenizer
    ending = tokenizer.encode(question.ending).ids  # type: ignore[attr-defined]
    room = length - len(ending)
    found = []
    encodings = tokenizer.encode_batch(list(passages))  # type: ignore[attr-defined]
    for index in generator.permutation(len(passages)).tolist():
        ids = encodings[index].ids
        ids = ids[-room:] if question.keeps_end else ids[:room]
        if len(ids) < _SHORTEST or tuple(ids) in seen:
            continue
        seen.add(tuple(ids))
        found.append([*(room - len(ids)) * [_end(corpus)], *ids, *ending])
    return found


def _label(corpus: EncodedCorpus, answer: str) -> int:
    """The first token of a word, leaving out a lone space."""
    ids = corpus.tokenizer.encode(f" {answer}").ids  # type: ignore[attr-defined]
    return int(next(i for i in ids if corpus.pieces[i].strip()))


def _windows(rows: list[list[list[int]]]) -> Windows:
    """As many of every answer as there are of the rarest."""
    count = min(map(len, rows))
    ids = torch.tensor([row for group in rows for row in islice(group, count)])
    return Windows(ids, torch.arange(len(rows)).repeat_interleave(count))


def _end(corpus: EncodedCorpus) -> int:
    return int(corpus.tokenizer.token_to_id(END))  # type: ignore[attr-defined]


def _functions(document: str) -> Iterator[tuple[str, str]]:
    for match in _FUNCTION.finditer(document):
        name, rest = match.groups()
        verb = name.strip("_").split("_")[0]
        yield "def _" + re.sub(rf"\b{name}\b", "_", rest).rstrip(), verb


def _openings(document: str) -> Iterator[tuple[str, str]]:
    for paragraph in document.split("\n\n"):
        match = _FIRST_WORD.match(paragraph)
        if match:
            yield match[2], match[1].lower()


def _raises(document: str) -> Iterator[tuple[str, str]]:
    for match in _RAISE.finditer(document):
        yield document[: match.start()].rstrip(), match[1]


def _auxiliaries(document: str) -> Iterator[tuple[str, str]]:
    for match in _AUXILIARY.finditer(document):
        yield document[: match.start()], match[1]
