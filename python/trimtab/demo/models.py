"""A family of small Llama models: mixtures of text x sizes x lengths of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import trimtab
from trimtab.demo.corpus import DOMAINS, EncodedCorpus


@dataclass(frozen=True)
class Mixture:
    """Share of prose in every batch; the rest is code."""

    name: str
    prose: float


@dataclass(frozen=True)
class Size:
    """Shape of a model."""

    name: str
    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Plan:
    """Everything that sets how long the family trains: fixed numbers, never the clock."""

    mixtures: tuple[Mixture, ...]
    sizes: tuple[Size, ...]
    steps: tuple[int, ...]  # lengths of training: one checkpoint at each
    batch: int
    context: int
    embedding_rate: float
    hidden_rate: float  # over the width: the wider the layers, the smaller their steps
    warmup: int

    @property
    def runs(self) -> list[Run]:
        """Every mixture at every size."""
        return [Run(mixture, size) for size in self.sizes for mixture in self.mixtures]


@dataclass(frozen=True)
class Run:
    """One training run; its checkpoints share a curve and are never split between fit and test."""

    mixture: Mixture
    size: Size

    @property
    def name(self) -> str:
        """As in tables."""
        return f"{self.mixture.name}, {self.size.name}"


@dataclass(frozen=True)
class Checkpoint:
    """A model after `step` steps of a run."""

    run: Run
    step: int
    tokens: int
    parameters: int
    state: dict[str, Tensor]

    @property
    def flop(self) -> float:
        """Training cost by the usual estimate, 6 x parameters x tokens."""
        return 6.0 * self.parameters * self.tokens


@dataclass(frozen=True)
class Family:
    """All checkpoints, and what is needed to run them again."""

    plan: Plan
    vocabulary: int
    checkpoints: list[Checkpoint]

    def model(self, checkpoint: Checkpoint) -> Any:
        """The Hugging Face model of a checkpoint, in evaluation mode."""
        model = build(checkpoint.run.size, self.vocabulary, self.plan.context)
        model.load_state_dict(checkpoint.state, strict=False)  # the tied head is the embedding
        return model.eval()

    def last(self, run: Run) -> Checkpoint:
        """The longest trained checkpoint of a run."""
        return max((c for c in self.checkpoints if c.run == run), key=lambda c: c.step)


def build(size: Size, vocabulary: int, context: int) -> Any:
    """A freshly initialised Llama with tied embedding, from torch's global generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=8 * size.width // 3 // 16 * 16,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        use_cache=False,
        initializer_range=0.05,  # so small a model learns faster than from the usual 0.02
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train_family(
    corpus: EncodedCorpus,
    plan: Plan,
    seed: int,
    on_step: Callable[[Run, int, float], None] = lambda run, step, loss: None,
) -> Family:
    """Trains every run of the plan, one after the other.

    Args:
        corpus: where the training tokens come from.
        plan: which runs, how long.
        seed: of the weights and of the order of the data, which all sizes of a mixture share.
        on_step: called after every step with the run, the step and the loss.
    """
    checkpoints: list[Checkpoint] = []
    for run in plan.runs:
        checkpoints += _train(run, corpus, plan, seed, on_step)
    return Family(plan, corpus.vocabulary, checkpoints)


def batch_loss(model: Any, rows: Tensor) -> Tensor:  # rows (B, T + 1)
    """Mean next-token loss by `trimtab.linear_cross_entropy`: the logits are never in memory."""
    hidden = model.model(input_ids=rows[:, :-1]).last_hidden_state  # (B, T, D)
    return trimtab.linear_cross_entropy(hidden, model.lm_head.weight, rows[:, 1:])


def _train(
    run: Run,
    corpus: EncodedCorpus,
    plan: Plan,
    seed: int,
    on_step: Callable[[Run, int, float], None],
) -> list[Checkpoint]:
    torch.manual_seed(seed)
    model = build(run.size, corpus.vocabulary, plan.context)
    parameters = sum(p.numel() for p in model.parameters())
    embedding = model.lm_head.weight
    groups = [
        {"params": [embedding], "lr": plan.embedding_rate},
        {
            "params": [p for p in model.parameters() if p is not embedding],
            "lr": plan.hidden_rate / run.size.width,
        },
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, plan))
    generator = np.random.default_rng([seed, plan.mixtures.index(run.mixture)])
    found: list[Checkpoint] = []
    for step in range(1, plan.steps[-1] + 1):
        loss = batch_loss(model, _batch(corpus, run.mixture, plan, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(run, step, loss.item())
        if step in plan.steps:
            state = {name: p.detach().clone() for name, p in model.named_parameters()}
            tokens = step * plan.batch * plan.context
            found.append(Checkpoint(run, step, tokens, parameters, state))
    return found


def _rate(step: int, plan: Plan) -> float:
    """Warm-up, then a cosine down to a tenth."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps[-1] - plan.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, done))


def _batch(
    corpus: EncodedCorpus, mixture: Mixture, plan: Plan, generator: np.random.Generator
) -> Tensor:  # (B, T + 1)
    """Random windows of the training text, prose and code in the mixture's exact proportion."""
    n_prose = round(mixture.prose * plan.batch)
    rows = []
    for domain, n in zip(DOMAINS, (n_prose, plan.batch - n_prose), strict=True):
        ids = corpus.splits["train"][domain].ids
        starts = generator.integers(0, len(ids) - plan.context - 1, size=n)
        rows += [ids[start : start + plan.context + 1] for start in starts]
    return torch.from_numpy(np.stack(rows))
