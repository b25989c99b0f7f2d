"""A policy steered by a principle prompt: methods side by side, and what is measured of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trimtab
from trimtab.algorithms.inverse_q import ClippedSurrogate, Imitation, InverseQ, PrinciplePrompt
from trimtab.demo.corpus import EncodedCorpus
from trimtab.demo.principle import PolicyPlan, decode, distinct_share, topic_share


@dataclass(frozen=True)
class Method:
    """One way of learning from the principle."""

    name: str
    loss: Imitation | ClippedSurrogate
    contrast: bool  # pi* has the plan's rho; without, rho = 0

    @property
    def is_clipped(self) -> bool:
        """The loss reads advantages."""
        return isinstance(self.loss, ClippedSurrogate)


@dataclass(frozen=True)
class SteeringPlan:
    """Everything that sets the size of the comparison: fixed numbers, the same for all methods."""

    policy: PolicyPlan
    rho: float
    response: int  # tokens
    batch: int  # responses per step
    rate: float  # of the optimizer, which takes one update a step
    measured_at: tuple[int, ...]  # steps; the last one ends the training
    prompts: int  # held out, at every measurement
    last_prompts: int  # held out, at the last one
    seeds: int


@dataclass(frozen=True)
class Measured:
    """A policy's own responses to held-out prompts.

    Reward, KL and entropy are in nats per token: expectations over the whole vocabulary at every
    position of the responses, hence free of the noise of the token that was drawn.
    """

    step: int
    score: float  # share of words on the topic
    reward: float  # of log(pi* / pi_ref)
    kl: float  # to the start policy, pi_ref
    entropy: float
    distinct: float  # share of different words in a response

    @property
    def gap(self) -> float:
        """KL to pi*, which the squared loss and the baseline both bring down."""
        return self.kl - self.reward


@dataclass(frozen=True)
class Course:
    """One method with one seed."""

    method: str
    seed: int
    points: list[Measured]  # the last one on more prompts
    texts: list[str]  # responses to the first prompts, at the end


class Policy(NamedTuple):
    """A model, alone or with the principle in its context, with or without contrast."""

    model: Any
    principle: Tensor | None = None  # (P,)
    rho: float = 0.0

    def logits(self, prompts: Tensor, responses: Tensor) -> Tensor:  # (B, P), (B, N) -> (B, N, V)
        """Logits at every token of the responses."""
        contexts = self._contexts(prompts)
        length = responses.shape[1]
        rows = [
            self.model(input_ids=torch.cat((context, responses[:, :-1]), 1)).logits[:, -length:]
            for context in contexts
        ]
        return self._combine(rows)

    @torch.no_grad()
    def respond(self, prompts: Tensor, length: int, seed: int) -> Tensor:  # (B, P) -> (B, length)
        """Draws responses from the whole of the distribution, with a KV cache."""
        from transformers import DynamicCache

        generator = torch.Generator().manual_seed(seed)
        inputs = self._contexts(prompts)
        caches = [DynamicCache() for _ in inputs]
        drawn: list[Tensor] = []
        for _ in range(length):
            rows = [
                self.model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                ).logits[:, -1]
                for ids, cache in zip(inputs, caches, strict=True)
            ]
            mass = self._combine(rows).softmax(-1).cumsum(-1)  # (B, V)
            point = torch.rand(len(mass), 1, generator=generator) * mass[:, -1:]
            drawn.append(torch.searchsorted(mass, point, right=True).clamp(max=mass.shape[1] - 1))
            inputs = [drawn[-1]] * len(inputs)
        return torch.cat(drawn, 1)

    def _contexts(self, prompts: Tensor) -> list[Tensor]:
        if self.principle is None:
            return [prompts]
        instructed = torch.cat((self.principle.expand(len(prompts), -1), prompts), 1)
        return [instructed, prompts] if self.rho > 0.0 else [instructed]

    def _combine(self, rows: list[Tensor]) -> Tensor:
        if len(rows) == 1:
            return rows[0]
        shape = rows[0].shape
        flat = (row.reshape(-1, shape[-1]) for row in rows)
        return trimtab.contrastive_logits(*flat, alpha=self.rho).reshape(shape)


@dataclass(frozen=True)
class Bench:
    """The start policy, the principle, and the held-out prompts to measure all methods on."""

    start: Any  # frozen: where all methods start, and pi_ref
    principle: Tensor  # (P,)
    corpus: EncodedCorpus
    prompts: Tensor  # (n, P), held out
    plan: SteeringPlan
    seed: int  # of the measurements: the same draws for all methods at the same step

    @property
    def optimum(self) -> Policy:
        """The contrast pi*, as a policy with the principle in its context."""
        return Policy(self.start, self.principle, self.plan.rho)

    @torch.no_grad()
    def measure(
        self, policy: Policy, step: int = 0, *, last: bool = False
    ) -> tuple[Measured, list[str]]:
        """Draws responses to held-out prompts; what they say, and the texts themselves."""
        # The first half of the prompts is prose, the second code: a stride keeps both.
        stride = 1 if last else max(1, len(self.prompts) // self.plan.prompts)
        prompts = self.prompts[::stride]
        responses = policy.respond(prompts, self.plan.response, self.seed + step)
        rows = (policy, Policy(self.start), self.optimum)
        logp, ref, star = (row.logits(prompts, responses).log_softmax(-1) for row in rows)
        p = logp.exp()
        texts = decode(self.corpus, responses)
        measured = Measured(
            step,
            topic_share(texts),
            (p * (star - ref)).sum(-1).mean().item(),
            (p * (logp - ref)).sum(-1).mean().item(),
            -(p * logp).sum(-1).mean().item(),
            distinct_share(texts),
        )
        return measured, texts

    def steer(
        self,
        method: Method,
        seed: int,
        prompts: Tensor,  # (n, P), to train on
        first: Measured,
        on_step: Callable[[], None] = lambda: None,
    ) -> Course:
        """Trains a copy of the start policy by one method.

        Args:
            method: the loss and pi*.
            seed: of the prompts and the responses.
            prompts: drawn from with replacement.
            first: the measurement of the start policy.
            on_step: called after every step.
        """
        plan = self.plan
        model = copy.deepcopy(self.start).requires_grad_(True)
        # With beta = 1 rewards are in nats; under Adam a factor on the loss changes nothing.
        algorithm = InverseQ(
            model,
            self.start,
            estimator=PrinciplePrompt(self.principle, rho=plan.rho if method.contrast else 0.0),
            beta=1.0,
            loss=method.loss,
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=plan.rate, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(seed)
        points = [first]
        texts: list[str] = []
        for step in range(1, plan.measured_at[-1] + 1):
            chosen = prompts[torch.randint(len(prompts), (plan.batch,), generator=generator)]
            draw = int(torch.randint(2**31, (), generator=generator))
            batch = as_batch(chosen, Policy(model).respond(chosen, plan.response, draw))
            batch |= algorithm.score(batch)
            if method.is_clipped:
                batch["advantages"] = algorithm.advantages([batch])[0]
            algorithm.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step in plan.measured_at:
                last = step == plan.measured_at[-1]
                measured, texts = self.measure(Policy(model), step, last=last)
                points.append(measured)
            on_step()
        return Course(method.name, seed, points, texts)


def as_batch(prompts: Tensor, responses: Tensor) -> dict[str, Tensor]:
    """What `InverseQ` takes: ids, and labels on the responses alone."""
    labels = torch.cat((torch.full_like(prompts, -100), responses), 1)
    return {"input_ids": torch.cat((prompts, responses), 1), "labels": labels}


def steps_to(points: list[Measured], score: float) -> int | None:
    """First measured step with at least this score; None if there is none."""
    return next((point.step for point in points if point.score >= score), None)


def numbers(course: Course) -> dict[str, Any]:
    """For numbers.json."""
    points = [asdict(point) | {"kl_to_optimum": point.gap} for point in course.points]
    return {"seed": course.seed, "points": points}
