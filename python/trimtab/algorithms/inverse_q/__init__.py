"""Inverse-Q*: token-level reinforcement learning without a reward or value model.

After Xia, Gao, Ge, Xi, Zhang, Huang, "Inverse-Q*: Token Level Reinforcement Learning for Aligning
Large Language Models Without Preference Data", Findings of EMNLP 2024.

The token MDP (certain: "From r to Q*", Rafailov et al., 2024): states ``s_t = (x, y_<t)``, actions
``y_t``, deterministic, no discount, KL weight beta to pi_ref::

    A*(s_t, y_t) = Q* - V* = beta log [pi*(y_t | s_t) / pi_ref(y_t | s_t)]
    sum_t A*(s_t, y_t) = R(x, y) - V*(s_0)

"Inverse": instead of fitting a policy to a known reward, the reward of every token is read off a
policy that is taken for optimal, and then imitated. Of the paper's own text only the abstract and
part of the introduction could be had: it promises token-level RL "without the need for additional
reward or value models", "estimating the conditionally optimal policy directly from the model's
responses". How pi* is estimated and which loss is minimised is our reading, an option each, and
said so where it stands: take it for an implementation in the style of Inverse-Q*.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.algorithms.inverse_q.estimators import (
    Distribution,
    Estimator,
    GivenPolicy,
    PrinciplePrompt,
    check_temperature,
)
from trimtab.algorithms.inverse_q.losses import (
    ClippedSurrogate,
    Imitation,
    Loss,
    ReverseKL,
    kl_per_token,
    leave_one_out,
    make_loss,
    needs_distribution,
    whiten,
)
from trimtab.algorithms.inverse_q.responses import LanguageModel, ResponseBatch, frozen
from trimtab.ops.token_loss import TokenLogp, TokenLossOptions

__all__ = [
    "ClippedSurrogate",
    "Distribution",
    "Estimator",
    "GivenPolicy",
    "Imitation",
    "InverseQ",
    "InverseQConfig",
    "InverseQTrainer",
    "LanguageModel",
    "PrinciplePrompt",
    "ResponseBatch",
    "ReverseKL",
]

if TYPE_CHECKING:
    from trimtab.algorithms.inverse_q.config import InverseQConfig
    from trimtab.algorithms.inverse_q.trainer import InverseQTrainer

SCORES = ("old_logp", "ref_logp", "logp_star")


class InverseQ:
    """Token rewards ``beta * (log pi* - log pi_ref)`` and the losses that learn from them.

    Log-probabilities come from hidden states, response tokens only, without logits in memory.

    A batch is a mapping of tensors (B, T): ``input_ids``, prompt and response; ``attention_mask``,
    one run of ones per row, padding on either side (optional); ``labels``, equal to ``input_ids``
    on the response tokens and -100 elsewhere, as in Hugging Face. Optional, and then taken instead
    of being computed, all (B, T): ``logp_star``, ``ref_logp``, ``old_logp`` (the policy that
    sampled; absent: the present one), ``advantages``.

    Args:
        model: the policy, a Hugging Face causal LM, plain or PEFT (not prompt learning). Its
            training mode is left alone, so dropout acts in ``loss`` as the mode says.
        ref_model: pi_ref, frozen. None: a PEFT model is its own reference with the adapters off,
            which costs no memory; of any other a copy is made now, one more model in memory, so
            that construction has to happen before training.
        estimator: pi*; see ``PrinciplePrompt``, ``GivenPolicy`` and ``Estimator``.
        beta: the reward's unit; 0.1 is our choice, the paper's value could not be had.
        loss: "imitation", "ppo" or "reverse_kl" for (a), (b), (c) with their defaults, or
            ``Imitation()``, ``ClippedSurrogate(...)``, ``ReverseKL(...)``.
        estimate_from: which model the estimator is given: "reference" (pi* stays put) or "policy"
            (pi* moves as the policy learns; frozen for the estimate).
        temperature: of pi_theta and pi_ref; sample at the same one.
        impl: implementation of the operators; None for the fastest available.
        options: chunk size and the like of the token-loss operators.

    Raises:
        ValueError: an unknown name, a value out of range, a model whose logits are not its head's
            on its hidden states, or ``loss="reverse_kl"`` with an estimator of sampled tokens only.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        *,
        estimator: Estimator,
        beta: float = 0.1,
        loss: str | Loss = "imitation",
        estimate_from: str = "reference",
        temperature: float = 1.0,
        impl: str | None = None,
        options: TokenLossOptions | None = None,
    ) -> None:
        if not 0.0 < beta < float("inf"):
            raise ValueError(f"beta must be positive, got {beta}; 0.1 is the default")
        if estimate_from not in ("reference", "policy"):
            raise ValueError(
                f"estimate_from must be 'reference' or 'policy', got {estimate_from!r}; "
                "'reference' keeps pi* fixed"
            )
        if not callable(estimator):
            raise ValueError(
                f"estimator must be callable, got {type(estimator).__name__}; see PrinciplePrompt"
            )
        check_temperature(temperature)
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "model must keep its adapters in its layers, got PEFT prompt learning; use LoRA"
            )
        self.model, self.estimator, self.beta = model, estimator, beta
        self.objective = make_loss(loss)
        needs_distribution(self.objective, estimator)
        self.estimate_from, self.temperature = estimate_from, temperature
        self._settings: dict[str, Any] = {
            "temperature": temperature, "impl": impl, "options": options,
        }  # fmt: skip
        self.policy().check()
        self.ref_model = self._make_reference(ref_model)

    def _make_reference(self, ref_model: Any) -> Any:
        """The reference, frozen; None for the policy with its adapters off."""
        if ref_model is None and hasattr(self.model, "disable_adapter"):
            return None
        if ref_model is self.model:
            raise ValueError("ref_model must be another model, got the policy; leave it None")
        if ref_model is None:
            ref_model = copy.deepcopy(self.model)
        else:
            LanguageModel(ref_model).check()
        return ref_model.requires_grad_(False).eval()

    @torch.no_grad()
    def token_rewards(self, batch: Mapping[str, Any]) -> Tensor:  # (B, T)
        """``beta * (log pi*(y_t|s_t) - log pi_ref(y_t|s_t))``, no gradient, 0 off the response.

        Cost: the estimator's, one forward pass of the reference and one product.

        Raises:
            ValueError, TypeError: a batch that does not fit, see ``ResponseBatch``.
        """
        checked = ResponseBatch(batch)
        star, ref = self._star_and_ref(checked)
        return checked.spread(self.beta * (star - ref))

    def loss(self, batch: Mapping[str, Any]) -> Tensor:  # ()
        """The chosen loss, a mean over the response tokens; 0 where there are none.

        Raises:
            ValueError, TypeError: a batch that does not fit, see ``ResponseBatch``.
        """
        return self.loss_and_metrics(batch)[0]

    def loss_and_metrics(
        self, batch: Mapping[str, Any], normalizer: float | Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and sums over response tokens of what is worth watching.

        Metrics: "tokens" (their number), "logp", "entropy" (of the policy, in nats), "kl" (to the
        reference, estimated by ``kl_per_token``) where the batch has ``ref_logp``, "star_kl" (to
        pi*, likewise) where it has ``logp_star``, "reward" where it has both, "clip_fraction" with
        "ppo", "exact_star_kl" with "reverse_kl".

        Args:
            batch: see the class.
            normalizer: what divides the sum over tokens; None for their number. With gradient
                accumulation: their number over all the batches of the step.
        """
        checked = ResponseBatch(batch)
        found = self.objective(self, checked)
        divisor = max(checked.count, 1) if normalizer is None else normalizer
        metrics = {
            "tokens": found.logp.new_tensor(checked.count),
            "logp": found.logp.sum(),
            "entropy": found.entropy.sum(),
            **found.extra,
        }
        star, ref = checked.cached("logp_star"), checked.cached("ref_logp")
        if ref is not None:
            metrics["kl"] = kl_per_token(found.logp, ref).sum()
        if star is not None:
            metrics["star_kl"] = kl_per_token(found.logp, star).sum()
        if ref is not None and star is not None:
            metrics["reward"] = self.beta * (star - ref).sum()
        return found.total / divisor, metrics

    @torch.no_grad()
    def score(
        self, batch: Mapping[str, Any], names: Sequence[str] = SCORES
    ) -> dict[str, Tensor]:  # of (B, T)
        """``old_logp``, ``ref_logp`` and ``logp_star`` of a batch just sampled, to be put into it.

        The policy is read in evaluation mode, as it was when it sampled.

        Args:
            batch: see the class.
            names: which of the three to compute.
        """
        checked = ResponseBatch(batch)
        found: dict[str, Tensor] = {}
        if "old_logp" in names:
            with frozen(self.model):
                found["old_logp"] = self.policy_tokens(checked).logp
        if "ref_logp" in names and "logp_star" in names:
            found["logp_star"], found["ref_logp"] = self._star_and_ref(checked)
        elif "ref_logp" in names:
            found["ref_logp"] = self.ref_logp(checked)
        elif "logp_star" in names:
            found["logp_star"] = self.star_logp(checked)
        return {name: checked.spread(values) for name, values in found.items()}

    @torch.no_grad()
    def advantages(
        self,
        batches: Sequence[Mapping[str, Any]],
        rewards: Sequence[Tensor] | None = None,  # of (B,)
        group_size: int = 1,
    ) -> list[Tensor]:  # of (B, T)
        """The advantages that ``ClippedSurrogate(advantage=)`` names, of the batches of one step.

        "sequence" compares, and ``normalize`` scales, over all of them together, so that how a step
        is cut into batches changes nothing. What a batch lacks of ``old_logp``, ``ref_logp`` and
        ``logp_star`` is computed.

        Args:
            batches: see the class.
            rewards: of "sequence", R of each response; None for the sum of its token rewards.
            group_size: of "sequence", responses per prompt, side by side; 1 compares all rows.

        Raises:
            ValueError: a loss without advantages, rewards for token advantages, or shapes that do
                not fit.
        """
        loss = self.objective
        if not isinstance(loss, ClippedSurrogate):
            raise ValueError(
                f"loss must be 'ppo' for advantages, got {type(loss).__name__}; see token_rewards"
            )
        if rewards is not None and loss.advantage != "sequence":
            raise ValueError(
                f"rewards must be None with advantage={loss.advantage!r}, got some; "
                "use advantage='sequence'"
            )
        checked = [ResponseBatch(batch) for batch in batches]
        if loss.advantage == "sequence":
            given = rewards if rewards is not None else [None] * len(checked)
            totals = [self._penalized(*pair) for pair in zip(checked, given, strict=True)]
            rows = leave_one_out(torch.cat(totals), group_size).split([len(t) for t in totals])
            flat = [
                row[:, None].expand(batch.response.shape)[batch.response]
                for row, batch in zip(rows, checked, strict=True)
            ]
        elif loss.advantage == "log_ratio":
            flat = [self.beta * (self.star_logp(b) - self._old_logp(b)) for b in checked]
        else:
            flat = [self.beta * (star - ref) for star, ref in map(self._star_and_ref, checked)]
        if loss.normalize:
            flat = list(whiten(torch.cat(flat)).split([len(part) for part in flat]))
        return [batch.spread(part) for batch, part in zip(checked, flat, strict=True)]

    def policy(self) -> LanguageModel:
        """The policy as it is now."""
        return LanguageModel(self.model, **self._settings)

    def policy_tokens(self, batch: ResponseBatch) -> TokenLogp:  # of (N,)
        """Log-probability and entropy of the response tokens under the policy, differentiable."""
        return self.policy().response_logp(batch)

    @torch.no_grad()
    def ref_logp(self, batch: ResponseBatch) -> Tensor:  # (N,)
        """Log-probability under the reference, from the batch if it has it."""
        given = batch.cached("ref_logp")
        if given is not None:
            return given
        with self._reference() as reference:
            return reference.response_logp(batch).logp

    @torch.no_grad()
    def star_logp(self, batch: ResponseBatch) -> Tensor:  # (N,)
        """Log-probability under pi*, from the batch if it has it."""
        given = batch.cached("logp_star")
        if given is not None:
            return given
        with self._source() as source:
            return self._estimate(batch, source)

    @torch.no_grad()
    def star_distribution(self, batch: ResponseBatch) -> Distribution:
        """The whole of pi* at the response tokens."""
        with self._source() as source:
            return self.estimator.distribution(source, batch)  # type: ignore[attr-defined]

    def _star_and_ref(self, batch: ResponseBatch) -> tuple[Tensor, Tensor]:  # each (N,)
        star, ref = batch.cached("logp_star"), batch.cached("ref_logp")
        if star is None and ref is None and self.estimate_from == "reference":
            # One pass of the reference serves the contrast of pi* and pi_ref alike.
            with self._reference() as reference:
                star, ref = self._estimate(batch, reference), reference.response_logp(batch).logp
        star = self.star_logp(batch) if star is None else star
        ref = self.ref_logp(batch) if ref is None else ref
        return star, ref.to(star)

    def _penalized(self, batch: ResponseBatch, rewards: Tensor | None) -> Tensor:  # (B,)
        """What the PPO-style baseline maximises: ``R - beta sum_t log(pi_old / pi_ref)``."""
        old = self._old_logp(batch)
        if rewards is None:
            star, ref = self._star_and_ref(batch)
            rewards = batch.spread(self.beta * (star - ref)).sum(1)
        elif rewards.shape != batch.lengths.shape:
            raise ValueError(
                f"rewards must be of shape ({len(batch.lengths)},), got {tuple(rewards.shape)}; "
                "one number per response"
            )
        else:
            ref = self.ref_logp(batch)
        penalty = batch.spread(self.beta * (old - ref.to(old))).sum(1)
        return rewards.to(penalty) - penalty

    def _old_logp(self, batch: ResponseBatch) -> Tensor:  # (N,)
        given = batch.cached("old_logp")
        return self.policy_tokens(batch).logp if given is None else given

    def _estimate(self, batch: ResponseBatch, source: LanguageModel) -> Tensor:  # (N,)
        star = self.estimator(source, batch)
        if star.shape != batch.response.shape:
            raise ValueError(
                f"estimator must give log-probabilities {tuple(batch.response.shape)}, got "
                f"{tuple(star.shape)}; batch.spread puts (N,) in place"
            )
        return star.detach()[batch.response.to(star.device)]

    @contextmanager
    def _reference(self) -> Iterator[LanguageModel]:
        model = self.model if self.ref_model is None else self.ref_model
        with frozen(model, adapters=self.ref_model is not None):
            yield LanguageModel(model, **self._settings)

    @contextmanager
    def _source(self) -> Iterator[LanguageModel]:
        if self.estimate_from == "reference":
            with self._reference() as reference:
                yield reference
        else:
            with frozen(self.model):
                yield self.policy()


def __getattr__(name: str) -> Any:
    # These two import transformers, the rest of the package does not.
    homes = {"InverseQConfig": "config", "InverseQTrainer": "trainer"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
