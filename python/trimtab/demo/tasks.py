"""Four multiple-choice tasks by likelihood, on held-out text: two of prose, two of code.

An item is a position in a window of text: given everything before it, which of the options comes
next? One forward pass serves every item of a window, and only the options' logits are made. The
options of an item are about equally frequent, or equally often the answer, so that a model which
only knows how often each token occurs stays near chance.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.demo.corpus import DOMAINS, DemoError, EncodedCorpus, windows

_FUNCTION_WORDS = frozenset(
    re.findall(
        " [a-z]+",
        " a an the this that of to in on at by for from with into as is are be was has have can may"
        " will should must and or but if when not no it",
    )
)
_CLOSING = (")", "]", "}")
_WORD = re.compile(r" [a-z]{4,}")
_NAME = re.compile(r" ?[A-Za-z_]{3,}")
_LEAST = 20  # times that a word or name stands in the training text
_MIN_CONTEXT = 16  # tokens before an item
_OPTIONS = 4
_NEIGHBOURS = 12  # the other options of an item are within so many ranks of frequency
_SAME = 32  # items with the same word or name as their answer
_BRACKETS_CAP = 2  # items of a window with the same answer: tables of brackets are no test


class Item(NamedTuple):
    """A position in a window, and the options with the right one first."""

    window: int
    last: int  # last token that is seen
    options: list[int]


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
    """The four tasks over at most `n_windows` windows of each domain's task split.

    Raises:
        DemoError: a task has no items, the text being too short.
    """
    texts = {domain: _Text(corpus, domain, context, n_windows, seed) for domain in DOMAINS}
    makers: tuple[tuple[str, str, str, MakeItems], ...] = (
        ("word", "prose", "Which of four equally common words comes next?", _word_items),
        ("grammar", "prose", "Which of four function words comes next?", _grammar_items),
        ("name", "code", "Which of four equally common names comes next?", _name_items),
        ("bracket", "code", "Which closing bracket comes next?", _bracket_items),
    )
    tasks = []
    for index, (name, domain, question, maker) in enumerate(makers):
        generator = np.random.default_rng([seed, index])
        items = maker(texts[domain], generator)
        if not items:
            raise DemoError(f"the held-out text has no items for the task {name!r}: too few files.")
        tasks.append(_task(name, domain, question, texts[domain].ids, items, generator))
    return tasks


@torch.inference_mode()
def measure(model: Any, tasks: list[Task], batch: int = 32) -> list[float]:
    """Accuracy of a Hugging Face causal LM on every task; windows that tasks share run once."""
    by_domain: dict[str, Tensor] = {}
    found = []
    for task in tasks:
        if task.domain not in by_domain:
            parts = [model.model(input_ids=r).last_hidden_state for r in task.rows.split(batch)]
            by_domain[task.domain] = torch.cat(parts)
        found.append(task.accuracy(by_domain[task.domain], model.lm_head.weight))
    return found


class _Text:
    """The windows of one domain's task split that the tasks ask about."""

    def __init__(
        self, corpus: EncodedCorpus, domain: str, context: int, n_windows: int, seed: int
    ) -> None:
        tokens = corpus.splits["tasks"][domain]
        ids, whole = windows(tokens.ids, context), windows(tokens.whole, context)
        if domain == "code":  # the rarest bracket decides how many bracket items there are
            rare = (ids == corpus.pieces.index(_CLOSING[-1])) & whole
            is_last = ~rare[:, _MIN_CONTEXT:].any(axis=1)
        else:
            is_last = np.zeros(len(ids), dtype=bool)
        order = np.random.default_rng(seed).permutation(len(ids))
        order = order[np.argsort(is_last[order], kind="stable")]
        kept = np.sort(order[:n_windows])
        self.ids, self.whole = ids[kept], whole[kept]  # (S, T)
        self.pieces = corpus.pieces
        train = corpus.splits["train"][domain]
        self.counts = np.bincount(train.ids[train.whole], minlength=len(corpus.pieces))  # (V,)

    def places(self, wanted: list[int]) -> list[tuple[int, int]]:
        """Where a whole piece out of `wanted` stands with enough context before it."""
        mask = self.whole & np.isin(self.ids, wanted)
        mask[:, :_MIN_CONTEXT] = False
        return [(int(s), int(t)) for s, t in np.argwhere(mask)]

    def by_frequency(self, pattern: re.Pattern[str]) -> list[int]:
        """Tokens that match and are not rare, the most frequent in training first."""
        order = np.argsort(-self.counts, kind="stable").tolist()
        order = [token for token in order if self.counts[token] >= _LEAST]
        return [token for token in order if pattern.fullmatch(self.pieces[token])]


MakeItems = Callable[[_Text, np.random.Generator], list[Item]]


def _task(
    name: str,
    domain: str,
    question: str,
    ids: np.ndarray,
    items: list[Item],
    generator: np.random.Generator,
) -> Task:
    options = torch.tensor([item.options for item in items])
    places = np.tile(np.arange(options.shape[1]), (len(items), 1))
    order = torch.from_numpy(generator.permuted(places, axis=1))
    where = torch.tensor([(item.window, item.last) for item in items])
    answers = (order == 0).long().argmax(1)
    rows = torch.from_numpy(ids.copy())
    return Task(name, domain, question, rows, where, options.gather(1, order), answers)


def _word_items(text: _Text, generator: np.random.Generator) -> list[Item]:
    ranked = [t for t in text.by_frequency(_WORD) if text.pieces[t] not in _FUNCTION_WORDS]
    return _equally_common(text, ranked, generator)


def _name_items(text: _Text, generator: np.random.Generator) -> list[Item]:
    ranked = [t for t in text.by_frequency(_NAME) if not keyword.iskeyword(text.pieces[t].strip())]
    return _equally_common(text, ranked, generator)


def _equally_common(text: _Text, ranked: list[int], generator: np.random.Generator) -> list[Item]:
    """Items whose options are neighbours in `ranked`, the most frequent first."""
    rank = {token: i for i, token in enumerate(ranked)}
    items = []
    for s, t in _capped(text, text.places(ranked), generator, lambda answer, _: (answer,), _SAME):
        place = rank[int(text.ids[s, t])]
        more = ranked[max(0, place - _NEIGHBOURS) : place]
        less = ranked[place + 1 : place + 1 + _NEIGHBOURS]
        if min(len(more), len(less)) < _OPTIONS - 1:
            continue
        # As many more frequent ones as chance will have it, so that being frequent is no clue.
        n_more = int(generator.integers(_OPTIONS))
        others = [
            near[i]
            for near, n in ((more, n_more), (less, _OPTIONS - 1 - n_more))
            for i in generator.choice(len(near), size=n, replace=False)
        ]
        items.append(Item(s, t - 1, [ranked[place], *others]))
    return items


def _grammar_items(text: _Text, generator: np.random.Generator) -> list[Item]:
    known = [token for token, piece in enumerate(text.pieces) if piece in _FUNCTION_WORDS]
    places = text.places(known)
    counts = Counter(int(text.ids[place]) for place in places)
    cap = sorted(counts.values())[len(counts) // 2] if counts else 0
    kept = _capped(text, places, generator, lambda answer, _: (answer,), cap)
    # Drawn as often as they are the answer, the others are as likely for who sees no context.
    pool = [int(text.ids[place]) for place in kept]
    items = []
    for place in kept:
        options = [int(text.ids[place])]
        while len(options) < min(_OPTIONS, len(counts)):
            other = pool[generator.integers(len(pool))]
            if other not in options:
                options.append(other)
        items.append(Item(place[0], place[1] - 1, options))
    return items


def _bracket_items(text: _Text, generator: np.random.Generator) -> list[Item]:
    closing = [text.pieces.index(sign) for sign in _CLOSING]
    places = text.places(closing)
    places = _capped(text, places, generator, lambda *both: both, _BRACKETS_CAP)
    counts = Counter(int(text.ids[place]) for place in places)
    rarest = min(counts[sign] for sign in closing)
    items = []
    for s, t in _capped(text, places, generator, lambda answer, _: (answer,), rarest):
        answer = int(text.ids[s, t])
        items.append(Item(s, t - 1, [answer, *(sign for sign in closing if sign != answer)]))
    return items


def _capped(
    text: _Text,
    places: list[tuple[int, int]],
    generator: np.random.Generator,
    group: Callable[[int, int], tuple[int, ...]],
    cap: int,
) -> list[tuple[int, int]]:
    """A random choice of places, at most `cap` of each group of (answer, window)."""
    used: Counter[tuple[int, ...]] = Counter()
    kept = []
    for index in generator.permutation(len(places)):
        s, t = places[index]
        key = group(int(text.ids[s, t]), s)
        if used[key] < cap:
            used[key] += 1
            kept.append((s, t))
    return sorted(kept)
