"""The three losses of Inverse-Q*, each over the response tokens of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimtab.algorithms.inverse_q.estimators import CHUNK, Distribution, FullEstimator
from trimtab.algorithms.inverse_q.responses import LanguageModel, ResponseBatch

if TYPE_CHECKING:
    from trimtab.algorithms.inverse_q import InverseQ

ADVANTAGES = ("reward", "log_ratio", "sequence")


class PolicyTokens(NamedTuple):
    """A loss summed over the response tokens, and what it learnt of the policy on the way."""

    total: Tensor  # ()
    logp: Tensor  # (N,), without gradient
    entropy: Tensor  # (N,), without gradient
    extra: dict[str, Tensor]  # metrics of this loss alone, summed over the tokens


class Loss(Protocol):
    """One of the losses; ``InverseQ`` divides the total by the number of response tokens."""

    def __call__(self, algorithm: InverseQ, batch: ResponseBatch) -> PolicyTokens:
        """The loss of a batch."""
        ...


@dataclass(frozen=True)
class Imitation:
    """(a) Reward imitation, squared: ``beta**2 / N sum_t (log pi_theta - log pi*)**2``.

    The learner's implied reward, ``beta log(pi_theta / pi_ref)``, is drawn to ``r_t`` without
    gradient through pi*; pi_ref cancels. For the logits z of token t::

        d loss / d z = 2 beta**2 / N (log pi_theta - log pi*) (onehot(y_t) - softmax(z))

    Our reading: the paper's text could not be had. "Reward imitation" is the phrase of a summary of
    it; the squared form is ours.

    Cost beyond the forward passes, in products of N x D x V: pi_theta 4 (2 with the head frozen).
    """

    def __call__(self, algorithm: InverseQ, batch: ResponseBatch) -> PolicyTokens:
        """The loss of a batch."""
        policy = algorithm.policy_tokens(batch)
        gap = policy.logp - algorithm.star_logp(batch).to(policy.logp)
        total = algorithm.beta**2 * gap.square().sum()
        return PolicyTokens(total, policy.logp.detach(), policy.entropy.detach(), {})


@dataclass(frozen=True)
class ClippedSurrogate:
    """(b) PPO's clipped surrogate with the token rewards as advantages: no critic, no GAE.

    ::

        q_t = pi_theta / pi_old
        loss = -1/N sum_t min(q_t A_t, clip(q_t, 1 - clip_range, 1 + clip_range) A_t)
               + kl_coef / N sum_t (exp(d_t) - d_t - 1),   d_t = log pi_ref - log pi_theta

    What is certain: a paper by a co-author (OREAL, section 2.4) gives ``log(pi / pi_ref)`` as the
    token advantage of Inverse-Q*. That a clipped PPO update uses it is our reading of two secondary
    texts ("PPO-like updates").

    Cost beyond the forward passes, in products: pi_theta 4 (2 with the head frozen), pi_ref 1.

    Attributes:
        clip_range: how far q_t may move from 1 before its gradient stops.
        advantage: "reward", ``A_t = r_t = beta log(pi* / pi_ref)``. Its optimum lies beyond pi*, so
            clip, KL or early stopping have to hold the policy. "log_ratio", ``A_t = beta log(pi* /
            pi_old)``: its optimum is pi*, and its expected gradient that of ``ReverseKL``.
            "sequence", the PPO-style baseline without token credit: every token of a response gets
            the response's reward minus ``beta sum_t log(pi_old / pi_ref)``, minus the mean of that
            over the other responses (RLOO).
        kl_coef: weight of the extra term, a KL to the reference that is never negative.
        normalize: bring the advantages to mean 0 and variance 1 over the batch's response tokens.

    Raises:
        ValueError: a value out of its range.
    """

    clip_range: float = 0.2
    advantage: str = "reward"
    kl_coef: float = 0.0
    normalize: bool = False

    def __post_init__(self) -> None:
        if not self.clip_range > 0.0:
            raise ValueError(f"clip_range must be positive, got {self.clip_range}; 0.2 is usual")
        if self.advantage not in ADVANTAGES:
            raise ValueError(
                f"advantage must be one of {ADVANTAGES}, got {self.advantage!r}; 'reward' is r_t"
            )
        if not 0.0 <= self.kl_coef < float("inf"):
            raise ValueError(f"kl_coef must be at least 0, got {self.kl_coef}; 0 turns it off")

    def __call__(self, algorithm: InverseQ, batch: ResponseBatch) -> PolicyTokens:
        """The loss of a batch."""
        policy = algorithm.policy_tokens(batch)
        logp = policy.logp
        given = batch.cached("old_logp")
        old = logp.detach() if given is None else given.to(logp)
        advantage = batch.cached("advantages")
        if advantage is None:
            given_old = {**batch.given, "old_logp": batch.spread(old)}
            advantage = algorithm.advantages([given_old])[0][batch.response]
        advantage = advantage.to(logp)
        ratio = (logp - old).exp()
        clipped = ratio.clamp(1.0 - self.clip_range, 1.0 + self.clip_range)
        objective = torch.minimum(ratio * advantage, clipped * advantage)
        total = -objective.sum()
        if self.kl_coef > 0.0:
            total = total + self.kl_coef * kl_per_token(logp, algorithm.ref_logp(batch)).sum()
        stopped = (clipped * advantage < ratio * advantage).sum()
        extra = {"clip_fraction": stopped.to(logp)}
        return PolicyTokens(total, logp.detach(), policy.entropy.detach(), extra)


@dataclass(frozen=True)
class ReverseKL:
    """(c) Reverse KL over the whole vocabulary: ``beta / N sum_t KL(pi_theta || pi*)(s_t)``.

    It is what ``ClippedSurrogate(advantage="log_ratio")`` estimates: at pi_old = pi_theta the
    gradient of (b), averaged over ``y_t ~ pi_theta(.|s_t)``, is that of (c), prefixes held fixed.
    Our reading; the paper's loss could not be had.

    Cost beyond the forward passes, in products: pi_theta 4 (3 with the head frozen), pi* 2.
    Backward makes the logits of each chunk again, so that no more than a chunk is in memory.

    Attributes:
        chunk_size: tokens whose logits are in memory at a time.

    Raises:
        ValueError: a chunk_size below 1.
    """

    chunk_size: int = CHUNK

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {self.chunk_size}; try {CHUNK}")

    def __call__(self, algorithm: InverseQ, batch: ResponseBatch) -> PolicyTokens:
        """The loss of a batch."""
        star = algorithm.star_distribution(batch)
        policy = algorithm.policy()
        hidden, target = policy.hidden(batch), batch.target
        parts = []
        for low in range(0, max(len(target), 1), self.chunk_size):
            rows = slice(low, low + self.chunk_size)
            parts.append(
                checkpoint(
                    _reverse_kl,
                    policy,
                    hidden[rows],
                    star,
                    rows,
                    target[rows],
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        kl, logp, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        extra = {"exact_star_kl": kl.detach().sum()}
        return PolicyTokens(algorithm.beta * kl.sum(), logp.detach(), entropy.detach(), extra)


def _reverse_kl(
    policy: LanguageModel,
    hidden: Tensor,  # (n, D)
    star: Distribution,
    rows: slice,
    target: Tensor,  # (n,)
) -> tuple[Tensor, Tensor, Tensor]:  # each (n,)
    """KL(pi_theta || pi*), log-probability of the target, and entropy of the policy."""
    logp = torch.log_softmax(policy.logits(hidden) / policy.temperature, -1)
    with torch.no_grad():
        star_logp = star.log_probs(rows).to(logp)
    p = logp.exp()
    kl = (p * (logp - star_logp)).sum(-1)
    chosen = logp.detach().gather(-1, target.to(logp.device)[:, None])[:, 0]
    return kl, chosen, -(p * logp).detach().sum(-1)


def kl_per_token(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(pi || pi_ref) of each token, estimated from the sampled one alone: ``e^d - d - 1``.

    With ``d = log pi_ref - log pi`` its mean over samples of pi is the KL (``E[e^d] = 1``), and no
    term is negative.
    """
    d = ref_logp.to(logp) - logp
    return d.expm1() - d


def leave_one_out(
    rewards: Tensor,  # (R,)
    group_size: int,
) -> Tensor:  # (R,)
    """Each reward minus the mean of the others of its group: neighbours, ``group_size`` at a time.

    With ``group_size=1`` all R form one group. A group of one has no others: its reward stays.

    Raises:
        ValueError: R is no multiple of ``group_size``.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(
            f"group_size must divide the number of responses ({len(rewards)}), got {group_size}; "
            "pass as many responses for every prompt, those of one prompt side by side"
        )
    groups = rewards.reshape(-1, group_size) if group_size > 1 else rewards.reshape(1, -1)
    others = groups.shape[1] - 1
    if others < 1:
        return rewards
    return (groups - (groups.sum(1, keepdim=True) - groups) / others).reshape(-1)


def whiten(values: Tensor) -> Tensor:  # (N,)
    """Mean 0 and variance 1; values that are equal up to rounding give 0."""
    if not values.numel():
        return values
    centred = values - values.mean()
    deviation = centred.square().mean().sqrt()
    rounding = 4 * torch.finfo(values.dtype).eps * values.abs().max()
    return torch.where(deviation > rounding, centred / deviation, 0.0)


def make_loss(loss: str | Loss) -> Loss:
    """A loss from its name, with its defaults, or the loss given."""
    named: dict[str, Any] = {
        "imitation": Imitation, "ppo": ClippedSurrogate, "reverse_kl": ReverseKL,
    }  # fmt: skip
    if not isinstance(loss, str):
        return loss
    if loss not in named:
        raise ValueError(
            f"loss must be one of {tuple(named)} or a loss object, got {loss!r}; 'imitation' is "
            "the default"
        )
    return named[loss]()


def needs_distribution(loss: Loss, estimator: Any) -> None:
    """Raises if the loss reads the whole of pi* and the estimator only knows sampled tokens."""
    if isinstance(loss, ReverseKL) and not isinstance(estimator, FullEstimator):
        raise ValueError(
            "loss='reverse_kl' must have an estimator with a distribution() method, got "
            f"{type(estimator).__name__}; add one, or use loss='imitation' or 'ppo'"
        )
