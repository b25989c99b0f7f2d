"""Estimators of the conditionally optimal policy pi*, the plug-in of Inverse-Q*."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from trimtab.algorithms.inverse_q.responses import LanguageModel, ResponseBatch, frozen
from trimtab.ops.contrast import contrastive_logp, linear_contrastive_logp

CHUNK = 1024  # rows of logits in memory at a time where logits have to be made


class Estimator(Protocol):
    """What gives log pi* of every response token; any callable of this form will do.

    ``model`` is the frozen model that ``InverseQ(estimate_from=)`` names: call its methods, or
    ``model.model`` for the Hugging Face model itself. It runs without gradients.
    """

    def __call__(self, model: LanguageModel, batch: ResponseBatch) -> Tensor:
        """Log-probabilities (B, T); what stands off the response is not read."""
        ...


@runtime_checkable
class FullEstimator(Protocol):
    """An estimator that knows pi* of the whole vocabulary, which ``loss="reverse_kl"`` needs."""

    def distribution(self, model: LanguageModel, batch: ResponseBatch) -> Distribution:
        """The distribution pi*(. | s_t) of every response token."""
        ...


class Distribution(NamedTuple):
    """``softmax(((1 + rho) z_p - rho z_0) / T)`` per token, kept as hidden states.

    No nucleus is cut off, as decoding from it would (Linear Alignment keeps the tokens of a top-p
    mask): a sampled token outside it would have minus infinity as log-probability and reward.
    """

    model: LanguageModel
    positive: Tensor  # (N, D)
    negative: Tensor | None  # (N, D); None for rho = 0
    rho: float
    temperature: float

    def logp(self, target: Tensor) -> Tensor:  # (N,) -> (N,)
        """Log-probability of one token each: one product whatever rho is.

        A softcapped head (Gemma 2) does not commute with the contrast; then both rows of logits are
        made, a chunk at a time.
        """
        model, head = self.model, self.model.head
        if self.negative is None:
            return model.token_logp(self.positive, target, self.temperature).logp
        target = target.to(head.weight.device)
        if head.softcap is None:
            return linear_contrastive_logp(
                self.positive,
                self.negative,
                head.weight,
                target,
                alpha=self.rho,
                linear_bias=head.bias,
                temperature=self.temperature,
                logit_scale=head.scale,
                impl=model.impl,
                options=model.options,
            )
        parts = [
            contrastive_logp(
                model.logits(self.positive[low : low + CHUNK]),
                model.logits(self.negative[low : low + CHUNK]),
                target[low : low + CHUNK],
                alpha=self.rho,
                temperature=self.temperature,
                impl=model.impl,
            )
            for low in range(0, len(target), CHUNK)
        ]
        return torch.cat(parts) if parts else target.new_zeros(0, dtype=torch.float32)

    def log_probs(self, rows: slice) -> Tensor:  # (n, V)
        """Log-probabilities of the whole vocabulary for some of the tokens."""
        positive, model = self.positive[rows], self.model
        if self.negative is None:
            z = model.logits(positive)
        elif model.head.softcap is None:
            real = torch.promote_types(positive.dtype, torch.float32)
            difference = positive.to(real) - self.negative[rows]
            z = model.logits((positive + self.rho * difference).to(positive.dtype))
        else:
            z = model.logits(positive)
            z = z + self.rho * (z - model.logits(self.negative[rows]))
        return torch.log_softmax(z / self.temperature, -1)


class PrinciplePrompt:
    """pi* as the model with a principle in its context, with or without contrast.

    With p the principle, x the prompt and z the model's logits::

        pi*(. | x, y_<t) = softmax(((1 + rho) z(. | p, x, y_<t) - rho z(. | x, y_<t)) / T)

    What is certain: the abstract of Inverse-Q* (Xia et al., Findings of EMNLP 2024) says
    "estimating the conditionally optimal policy directly from the model's responses", without
    reward or value models. The estimator's formula could not be had. Our reading: optimal
    conditioned on a principle, as in the same group's Linear Alignment (Gao et al., ICML 2024),
    whose released code has this contrast (with rho 2, T 0.5 and a nucleus for decoding, which
    log-probabilities can't have). The two variants are rho = 0, plain context distillation, and
    rho > 0.

    Cost: one forward pass of the decoder over the longer context, for rho > 0 one more without the
    principle (shared with the reference's log-probabilities when both come from the reference), and
    one product of the head.

    Args:
        principle: token ids put before each row's prompt, or a callable from a row's prompt (P,) to
            the ids of the prompt with the principle (a chat template's system turn, say).
        rho: weight of the contrast, at least 0.
        temperature: T.
        keep: tokens at the start of the prompt that stay in front of the principle, such as 1 for
            a beginning-of-sequence token.

    Raises:
        ValueError: a negative rho or keep, a temperature that is not positive, or no principle.
    """

    def __init__(
        self,
        principle: Sequence[int] | Tensor | Callable[[Tensor], Tensor],
        *,
        rho: float = 0.0,
        temperature: float = 1.0,
        keep: int = 0,
    ) -> None:
        if not 0.0 <= rho < float("inf"):
            raise ValueError(f"rho must be at least 0, got {rho}; 0 is context distillation")
        check_temperature(temperature)
        if keep < 0 or (keep and callable(principle)):
            raise ValueError(
                f"keep must be 0 or more, and 0 with a callable principle, got {keep}; "
                "the callable sees the whole prompt"
            )
        if not callable(principle):
            principle = torch.as_tensor(principle)
            if principle.ndim != 1 or len(principle) == 0 or principle.is_floating_point():
                raise ValueError(
                    "principle must be token ids (P,) or a callable, got shape "
                    f"{tuple(principle.shape)} of {principle.dtype}; pass one sequence of ids"
                )
        self.principle: Any = principle
        self.rho, self.temperature, self.keep = rho, temperature, keep

    def __call__(self, model: LanguageModel, batch: ResponseBatch) -> Tensor:  # (B, T)
        """Log pi* of the response tokens."""
        return batch.spread(self.distribution(model, batch).logp(batch.target))

    def distribution(self, model: LanguageModel, batch: ResponseBatch) -> Distribution:
        """pi* of the whole vocabulary at the response tokens."""
        negative = model.hidden(batch) if self.rho > 0.0 else None
        positive = model.hidden_of(*self.contexts(batch))
        return Distribution(model, positive, negative, self.rho, self.temperature)

    def contexts(self, batch: ResponseBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Ids with the principle, where they are real, and where the response is, each (B, T')."""
        aligned, _, marked = batch.aligned()
        rows, marks = [], []
        for ids, mark, length in zip(aligned, marked, batch.lengths.tolist(), strict=True):
            prompt = int(mark.int().argmax()) if bool(mark.any()) else length
            before = self._with_principle(ids[:prompt]).to(ids)
            rows.append(torch.cat((before, ids[prompt:length])))
            marks.append(torch.cat((torch.zeros_like(before).bool(), mark[prompt:length])))
        pad = torch.nn.utils.rnn.pad_sequence
        real = pad([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        return pad(rows, batch_first=True), real, pad(marks, batch_first=True)

    def _with_principle(self, prompt: Tensor) -> Tensor:
        if callable(self.principle):
            made = self.principle(prompt)
            if not isinstance(made, Tensor) or made.ndim != 1 or len(made) == 0:
                raise ValueError(
                    f"principle must give token ids (P,), got {made!r}; return the new prompt"
                )
            return made
        fixed = self.principle.to(prompt)
        return torch.cat((prompt[: self.keep], fixed, prompt[self.keep :]))


class GivenPolicy:
    """pi* as another model of the same vocabulary: a stronger or an already aligned one.

    Not from the paper. It shows what the token rewards are once the optimal policy is known ("From
    r to Q*", Rafailov et al., 2024).

    Args:
        model: Hugging Face causal LM; frozen while it is read, in memory beside the others.
        temperature: what its logits are divided by.

    Raises:
        ValueError: a temperature that is not positive, or a model without a head of its own.
    """

    def __init__(self, model: Any, *, temperature: float = 1.0) -> None:
        check_temperature(temperature)
        self.model, self.temperature = model, temperature
        LanguageModel(model).check()

    def __call__(self, model: LanguageModel, batch: ResponseBatch) -> Tensor:  # (B, T)
        """Log pi* of the response tokens."""
        return batch.spread(self.distribution(model, batch).logp(batch.target))

    def distribution(self, model: LanguageModel, batch: ResponseBatch) -> Distribution:
        """pi* of the whole vocabulary at the response tokens."""
        with frozen(self.model):
            own = LanguageModel(self.model, impl=model.impl, options=model.options)
            return Distribution(own, own.hidden(batch), None, 0.0, self.temperature)


def check_temperature(temperature: float) -> None:
    """A positive number."""
    if not 0.0 < temperature < float("inf"):
        raise ValueError(
            f"temperature must be positive, got {temperature}; the limit 0 has no log-probabilities"
        )
