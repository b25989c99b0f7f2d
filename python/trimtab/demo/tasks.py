"""Four multiple-choice tasks by likelihood, on held-out text: two of prose, two of code.

An item is a position in a window of text: given everything before it, which of the options comes
next? One forward pass serves every item of a window, and only the options' logits are made. The
options of an item are equally frequent or equally often the answer, so that a model which knows no
more than how often each token occurs stays near chance.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.demo.corpus import EncodedCorpus, windows

_FUNCTION_WORDS = tuple(
    " " + word
    for word in (
        "a an the this that of to in on at by for from with into as is are be was has have can may "
        "will should must and or but if when not no it"
    ).split()
)
_CLOSING = (")", "]", "}")
_CONTENT_WORD = re.compile(r" [a-z]{4,}")
_IDENTIFIER = re.compile(r" ?[A-Za-z_]{3,}")
_MIN_CONTEXT = 16  # tokens before an item
_OPTIONS = 4
_NEIGHBOURS = 12  # distractors are at most this many ranks of frequency away


@dataclass(frozen=True)
class Task:
    """Items of one kind over the windows of one domain."""

    name: str
    domain: str
    question: str
    rows: Tensor  # (S, T) windows
    items: Tensor  # (n, 2) window and position of the last token that is seen
    options: Tensor  # (n, K) token ids
    answers: Tensor  # (n,) which option is right

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1.0 / self.options.shape[1]

    def accuracy(self, hidden: Tensor, head: Tensor) -> float:  # (S, T, D), (V, D)
        """Share of items whose right option is the likeliest.

        Only K logits per item are made, since the softmax's divisor is the same for all options.
        """
        picked = hidden[self.items[:, 0], self.items[:, 1]]  # (n, D)
        scores = torch.einsum("nd,nkd->nk", picked, head[self.options])
        return (scores.argmax(1) == self.answers).double().mean().item()


def build_tasks(corpus: EncodedCorpus, context: int, n_windows: int, seed: int) -> list[Task]:
    """The four tasks over the first `n_windows` windows of each domain's task split."""
    makers = (
        ("word", "prose", "Which of four equally common words comes next?", _word_items),
        ("grammar", "prose", "Which of four function words comes next?", _grammar_items),
        ("name", "code", "Which of four names, all in use above, comes next?", _name_items),
        ("bracket", "code", "Which closing bracket comes next?", _bracket_items),
    )
    tasks = []
    for index, (name, domain, question, maker) in enumerate(makers):
        tokens = corpus.splits["tasks"][domain]
        ids = windows(tokens.ids, context)[:n_windows]
        whole = windows(tokens.whole, context)[:n_windows]
        generator = np.random.default_rng([seed, index])
        found = maker(corpus, ids, whole, generator)
        tasks.append(_task(name, domain, question, ids, found, generator))
    return tasks


@torch.inference_mode()
def measure(model: Any, tasks: list[Task], batch: int = 32) -> list[float]:
    """Accuracy of a Hugging Face causal LM on every task; windows that tasks share run once."""
    by_rows: dict[str, Tensor] = {}
    found = []
    for task in tasks:
        if task.domain not in by_rows:
            parts = [model.model(input_ids=r).last_hidden_state for r in task.rows.split(batch)]
            by_rows[task.domain] = torch.cat(parts)
        found.append(task.accuracy(by_rows[task.domain], model.lm_head.weight))
    return found


Item = tuple[int, int, list[int]]  # window, position of the last seen token, answer then distractors


def _task(
    name: str,
    domain: str,
    question: str,
    ids: np.ndarray,
    found: list[Item],
    generator: np.random.Generator,
) -> Task:
    items = torch.tensor([item[:2] for item in found])
    options = torch.tensor([item[2] for item in found])
    order = torch.from_numpy(generator.permuted(np.tile(np.arange(options.shape[1]), (len(found), 1)), axis=1))
    answers = (order == 0).long().argmax(1)
    rows = torch.from_numpy(ids.copy())
    return Task(name, domain, question, rows, items, options.gather(1, order), answers)


def _positions(ids: np.ndarray, whole: np.ndarray, wanted: set[int]) -> list[tuple[int, int]]:
    """Where a whole piece out of `wanted` stands with enough context before it."""
    mask = whole & np.isin(ids, list(wanted))
    mask[:, :_MIN_CONTEXT] = False
    return [(int(s), int(t)) for s, t in np.argwhere(mask)]


def _word_items(
    corpus: EncodedCorpus, ids: np.ndarray, whole: np.ndarray, generator: np.random.Generator
) -> list[Item]:
    train = corpus.splits["train"]["prose"]
    counts = Counter(train.ids[train.whole].tolist())
    function = {p.strip() for p in _FUNCTION_WORDS}
    ranked = [
        token
        for token, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if n >= 20
        and _CONTENT_WORD.fullmatch(corpus.pieces[token])
        and corpus.pieces[token].strip() not in function
    ]
    rank = {token: i for i, token in enumerate(ranked)}
    items: list[Item] = []
    for s, t in _positions(ids, whole, set(ranked)):
        answer = int(ids[s, t])
        low = max(0, min(rank[answer] - _NEIGHBOURS, len(ranked) - 2 * _NEIGHBOURS - 1))
        near = [token for token in ranked[low : low + 2 * _NEIGHBOURS + 1] if token != answer]
        items.append((s, t - 1, [answer, *_draw(near, _OPTIONS - 1, generator)]))
    return items


def _grammar_items(
    corpus: EncodedCorpus, ids: np.ndarray, whole: np.ndarray, generator: np.random.Generator
) -> list[Item]:
    known = [token for token, piece in enumerate(corpus.pieces) if piece in _FUNCTION_WORDS]
    places = _balanced(ids, _positions(ids, whole, set(known)), generator)
    return [
        (s, t - 1, [int(ids[s, t]), *_draw([k for k in known if k != ids[s, t]], _OPTIONS - 1, generator)])
        for s, t in places
    ]


def _name_items(
    corpus: EncodedCorpus, ids: np.ndarray, whole: np.ndarray, generator: np.random.Generator
) -> list[Item]:
    names = {
        token
        for token, piece in enumerate(corpus.pieces)
        if _IDENTIFIER.fullmatch(piece) and not keyword.iskeyword(piece.strip())
    }
    items: list[Item] = []
    for s, t in _balanced(ids, _positions(ids, whole, names), generator):
        above = {int(i) for i, w in zip(ids[s, :t], whole[s, :t], strict=True) if w} & names
        answer = int(ids[s, t])
        others = sorted(above - {answer})
        if answer in above and len(others) >= _OPTIONS - 1:
            items.append((s, t - 1, [answer, *_draw(others, _OPTIONS - 1, generator)]))
    return items


def _bracket_items(
    corpus: EncodedCorpus, ids: np.ndarray, whole: np.ndarray, generator: np.random.Generator
) -> list[Item]:
    closing = [corpus.pieces.index(sign) for sign in _CLOSING]
    places = _balanced(ids, _positions(ids, whole, set(closing)), generator)
    return [(s, t - 1, [int(ids[s, t]), *(c for c in closing if c != ids[s, t])]) for s, t in places]


def _balanced(
    ids: np.ndarray, places: list[tuple[int, int]], generator: np.random.Generator
) -> list[tuple[int, int]]:
    """Caps every answer at the count of the median one, so that no answer is worth guessing."""
    counts = Counter(int(ids[place]) for place in places)
    if not counts:
        return []
    cap = max(8, sorted(counts.values())[len(counts) // 2])
    kept: list[tuple[int, int]] = []
    used: Counter[int] = Counter()
    for index in generator.permutation(len(places)):
        answer = int(ids[places[index]])
        if used[answer] < cap:
            used[answer] += 1
            kept.append(places[index])
    return sorted(kept)


def _draw(tokens: list[int], n: int, generator: np.random.Generator) -> list[int]:
    return [tokens[i] for i in generator.choice(len(tokens), size=n, replace=False)]


MakeItems = Callable[[EncodedCorpus, np.ndarray, np.ndarray, np.random.Generator], list[Item]]
