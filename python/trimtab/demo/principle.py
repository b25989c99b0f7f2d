"""A principle that a small policy has learnt to follow: "Write about files:", and who measures it.

What training puts in: windows of real text, half of them alone, the others behind one of two
sentences. A sentence stands before the windows that speak of its topic most, and there is nothing
else to learn its meaning from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import trimtab
from trimtab.demo.corpus import DOMAINS, EncodedCorpus
from trimtab.demo.models import Size, build

_WORD = re.compile(r"[A-Za-z]+")
_IGNORED = -100


@dataclass(frozen=True)
class Topic:
    """A principle in words, and the words that tell whether a text follows it."""

    name: str
    principle: str
    words: frozenset[str]

    def count(self, text: str) -> tuple[int, int]:
        """Words of the topic and all words; words that the text's ends may have cut are left out.

        A word is a run of letters: `file_path` are two.
        """
        found = [m for m in _WORD.finditer(text) if m.start() > 0 and m.end() < len(text)]
        return sum(m[0].lower() in self.words for m in found), len(found)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILES = Topic(
    "files",
    "Write about files:\n",
    _words(
        "file files filename filenames filesystem path paths pathname directory directories dir "
        "dirs folder folders"
    ),
)
NUMBERS = Topic(
    "numbers",
    "Write about numbers:\n",
    _words("number numbers numeric int ints integer integers float floats decimal digit digits"),
)


@dataclass(frozen=True)
class PolicyPlan:
    """Everything that sets what the start policy is trained on, and for how long."""

    size: Size
    window: int  # tokens of text
    prompt: int  # of which so many are not looked at when a window's topic is measured
    labelled: float  # share of the windows that stand behind a topic's sentence
    steps: int
    batch: int
    embedding_rate: float = 0.04
    hidden_rate: float = 0.2  # over the width
    warmup: int = 40


@dataclass(frozen=True)
class Pool:
    """Training windows of one kind, by domain."""

    principle: list[int]  # token ids in front; none for the plain windows
    rows: list[np.ndarray]  # (n, window) per domain
    share: float  # of words on the pool's own topic (plain: on files)


@dataclass(frozen=True)
class Learner:
    """The start policy, frozen, and the text that it was trained on."""

    model: Any
    pools: dict[str, Pool]  # "plain", then the topics by name
    loss: float  # mean of the last tenth of the steps, nats per token


def build_pools(corpus: EncodedCorpus, plan: PolicyPlan) -> dict[str, Pool]:
    """All training windows, and per topic those that speak of it most, as many of each domain."""
    rows = [_windows(corpus, "train", domain, plan.window) for domain in DOMAINS]
    counts = {
        topic.name: [_shares(corpus, part[:, plan.prompt :], topic) for part in rows]
        for topic in (FILES, NUMBERS)
    }
    pools = {"plain": Pool([], rows, _mean(counts[FILES.name]))}
    for topic in (FILES, NUMBERS):
        shares = counts[topic.name]
        chosen = [
            np.argsort(-share, kind="stable")[: max(1, int(plan.labelled * len(share)))]
            for share in shares
        ]
        ids = corpus.tokenizer.encode(topic.principle).ids  # type: ignore[attr-defined]
        pools[topic.name] = Pool(
            ids,
            [part[index] for part, index in zip(rows, chosen, strict=True)],
            _mean([share[index] for share, index in zip(shares, chosen, strict=True)]),
        )
    return pools


def train_policy(
    corpus: EncodedCorpus,
    plan: PolicyPlan,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Learner:
    """Trains the policy that all methods start from.

    Every batch is half plain windows and a quarter of each topic's, prose and code in turn. The
    loss is on the text, not on the sentence before it.

    Args:
        corpus: the text.
        plan: what and how long.
        seed: of the weights and of the order of the data.
        on_step: called after every step with the loss.
    """
    pools = build_pools(corpus, plan)
    longest = max(len(pool.principle) for pool in pools.values())
    torch.manual_seed(seed)
    model = build(plan.size, corpus.vocabulary, plan.window + longest)
    head = model.lm_head.weight
    groups = [
        {"params": [head], "lr": plan.embedding_rate},
        {
            "params": [p for p in model.parameters() if p is not head],
            "lr": plan.hidden_rate / plan.size.width,
        },
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, plan))
    generator = np.random.default_rng([seed, len(pools)])
    losses: list[float] = []
    for _ in range(plan.steps):
        rows, target = _batch(pools, plan, longest, generator)
        hidden = model.model(input_ids=rows[:, :-1]).last_hidden_state  # (B, T, D)
        loss = trimtab.linear_cross_entropy(hidden, head, target[:, 1:], ignore_index=_IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        on_step(losses[-1])
    last = losses[-max(1, len(losses) // 10) :]
    return Learner(model.eval().requires_grad_(False), pools, sum(last) / len(last))


def held_out_prompts(corpus: EncodedCorpus, plan: PolicyPlan, count: int) -> Tensor:  # (n, P)
    """Openings of validation windows, half prose and half code, spread over the text."""
    parts = []
    for domain in DOMAINS:
        rows = _windows(corpus, "validation", domain, plan.window, shifts=1)[:, : plan.prompt]
        n = min(count // len(DOMAINS), len(rows))
        parts.append(rows[np.linspace(0, len(rows) - 1, n).astype(np.int64)])
    return torch.from_numpy(np.concatenate(parts))


def training_prompts(learner: Learner, plan: PolicyPlan) -> Tensor:  # (n, P)
    """Openings of plain training windows, as many of prose as of code."""
    rows = learner.pools["plain"].rows
    n = min(map(len, rows))
    spread = [part[np.linspace(0, len(part) - 1, n).astype(np.int64)] for part in rows]
    return torch.from_numpy(np.concatenate(spread)[:, : plan.prompt])


def decode(corpus: EncodedCorpus, rows: Tensor) -> list[str]:  # rows (B, T)
    """Token ids as text."""
    return corpus.tokenizer.decode_batch(rows.tolist(), skip_special_tokens=False)  # type: ignore[attr-defined, no-any-return]


def topic_share(texts: Sequence[str], topic: Topic = FILES) -> float:
    """Share of a topic's words among all words of the texts together; 0 without words."""
    pairs = [topic.count(text) for text in texts]
    words = sum(total for _, total in pairs)
    return sum(own for own, _ in pairs) / words if words else 0.0


def distinct_share(texts: Sequence[str]) -> float:
    """Share of different words in a text, mean over the texts that have words; 0 without any."""
    lists = [[word.lower() for word in _WORD.findall(text)] for text in texts]
    shares = [len(set(words)) / len(words) for words in lists if words]
    return sum(shares) / len(shares) if shares else 0.0


def _windows(
    corpus: EncodedCorpus, split: str, domain: str, length: int, shifts: int = 2
) -> np.ndarray:  # (n, length)
    """Windows side by side, and once more for every shift by a part of the length."""
    ids = corpus.splits[split][domain].ids
    starts = [length * shift // shifts for shift in range(shifts)]
    return np.concatenate(
        [ids[s : s + (len(ids) - s) // length * length].reshape(-1, length) for s in starts]
    )


def _shares(corpus: EncodedCorpus, rows: np.ndarray, topic: Topic) -> np.ndarray:  # (n,)
    pairs = np.array([topic.count(text) for text in decode(corpus, torch.from_numpy(rows))])
    return pairs[:, 0] / np.maximum(pairs[:, 1], 1)


def _mean(parts: Sequence[np.ndarray]) -> float:
    """Both domains count alike, as they do in the batches."""
    return float(np.mean([part.mean() for part in parts]))


def _batch(
    pools: dict[str, Pool], plan: PolicyPlan, longest: int, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:  # (B, longest + window) each
    """Rows, and targets that leave out the sentences and the padding behind the text."""
    quarter = plan.batch // 4
    counts = {"plain": plan.batch - 2 * quarter, FILES.name: quarter, NUMBERS.name: quarter}
    rows = np.zeros((plan.batch, longest + plan.window), dtype=np.int64)
    target = np.full_like(rows, _IGNORED)
    kinds = (kind for kind, n in counts.items() for _ in range(n))
    for index, kind in enumerate(kinds):
        pool = pools[kind]
        choices = pool.rows[index % len(DOMAINS)]
        window = choices[generator.integers(len(choices))]
        text = slice(len(pool.principle), len(pool.principle) + plan.window)
        rows[index, : text.start] = pool.principle
        rows[index, text] = target[index, text] = window
    return torch.from_numpy(rows), torch.from_numpy(target)


def _rate(step: int, plan: PolicyPlan) -> float:
    """Warm-up, then a cosine down to a tenth."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, done))
