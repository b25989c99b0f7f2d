"""From the numbers of every slice to those of the whole vocabulary, per token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.ops._checks import NOTHING_IGNORED
from trimtab.ops.token_loss._groups import Team

# Logits whose smoothed gradient is made at a time: its float32 intermediates stay small.
_BLOCK = 2**21


class Merged(NamedTuple):
    """Numbers of the whole vocabulary, and this slice's share; each (n,)."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    predicted: Tensor
    owned: Tensor  # whether the target is in this slice
    target_weight: Tensor  # class weight of the target, or ()
    uniform: Tensor  # sum over v of c_v (lse - z_v), for label smoothing
    away: Tensor  # -log of this slice's share
    local_entropy: Tensor

    def upstreams(
        self, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Upstream gradients of the slice's own entropy and lse, each (n,), the target aside."""
        share = torch.exp(-self.away)
        push = torch.zeros_like(share)
        if grad_logp is not None:
            push = push - share * grad_logp
        if grad_lse is not None:
            push = push + share * grad_lse
        if grad_entropy is None:
            return None, push
        bend = share * grad_entropy
        return bend, push + bend * (self.local_entropy - self.entropy + self.away)

    def at_target(
        self, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
    ) -> Tensor:
        """The gradient for z at the target, (n,): 1 - p comes from log p, never from p."""
        p = torch.exp(self.logp)
        value = torch.zeros_like(p)
        if grad_logp is not None:
            value = value - grad_logp * torch.expm1(self.logp)
        if grad_lse is not None:
            value = value + p * grad_lse
        if grad_entropy is not None:
            value = value - torch.where(p > 0, p * grad_entropy * (self.logp + self.entropy), 0.0)
        return value


def write_targets(logits: Tensor, at: Tensor, owned: Tensor, value: Tensor) -> None:
    """Set a row's element ``at`` (n,) to ``value`` (n,) where the target is in this slice."""
    index = at[:, None]
    kept = torch.where(owned[:, None], value[:, None].to(logits.dtype), logits.gather(1, index))
    logits.scatter_(1, index, kept)


class LossTerms(NamedTuple):
    """What the loss adds to the log-probability, for one slice."""

    class_weight: Tensor | None  # (V / P,)
    label_smoothing: float
    lse_square_scale: float
    sums: Tensor | None = None  # (P,) sum of the class weights of each slice
    classes: int = 0  # of the whole vocabulary

    @property
    def code(self) -> tuple[bool, float, float]:
        """What the ranks have to give alike; it also decides which numbers they exchange."""
        return self.class_weight is None, self.label_smoothing, self.lse_square_scale

    @property
    def extra(self) -> int:
        """How many numbers per token the loss adds to the exchange."""
        return (self.class_weight is not None) + (self.label_smoothing > 0)

    def with_sums(self, team: Team, like: Tensor) -> LossTerms:
        """The same, knowing the slices' sizes and the sums of their class weights."""
        from torch import distributed

        if self.class_weight is None:
            sums = like.new_tensor(team.slices)
        elif self.label_smoothing > 0:
            sums = like.new_empty(len(team.slices))
            own = self.class_weight.sum().to(like.dtype).reshape(1)
            distributed.all_gather(list(sums.split(1)), own, group=team.group)
        else:
            sums = None
        return self._replace(sums=sums, classes=team.classes)

    def fill(
        self, call: Any, chunk: Any, out: Tensor, local: Tensor, owned: Tensor, masked: Tensor
    ) -> None:
        """This slice's numbers: the target's class weight, and ``sum of c_v (lse_r - z_v)``."""
        if self.class_weight is not None:
            index = local.clamp(0, self.class_weight.numel() - 1)
            out[0] = torch.where(owned, self.class_weight[index], 0.0)
        if self.label_smoothing > 0:
            # With a smoothing of 1 the row kernel's loss is this sum over the slice's size.
            part = torch.empty_like(out[-1])
            call.kernels.token_loss_rows(
                chunk.logits, local, None, self.class_weight, NOTHING_IGNORED,
                *call.transform[1:], 1.0, 0.0, part, None,
            )  # fmt: skip
            out[-1] = (part * chunk.logits.shape[1]).masked_fill(masked, torch.inf)

    def loss(self, merged: Merged) -> Tensor:
        """Loss of each token, (n,)."""
        loss = -(1.0 - self.label_smoothing) * merged.target_weight * merged.logp
        if self.label_smoothing > 0:
            loss = loss + self.label_smoothing / self.classes * merged.uniform
        if self.lse_square_scale != 0.0:
            loss = loss + self.lse_square_scale * merged.lse.square()
        return loss


def merge(
    gathered: Tensor,  # (P, k, n)
    team: Team,
    target: Tensor,  # (n,)
    owned: Tensor,  # (n,)
    ignored: Tensor,  # (n,)
    terms: LossTerms | None,
) -> Merged:
    """Merge by the largest log-sum-exp, which stays out of the sum of the others."""
    each = gathered[:, 0]
    largest, where = each.max(0)
    shares = torch.exp(each - largest).scatter(0, where[None], 0.0)
    log_total = torch.log1p(shares.sum(0))
    away = (largest - each) + log_total
    owner = team.owner(target)[None]
    logp = (gathered[:, 1] - away).gather(0, owner).squeeze(0)
    zeros = torch.zeros_like(logp)
    entropy, predicted, local_entropy = zeros, target, zeros
    weight = uniform = logp.new_ones(())
    if terms is None:
        share = torch.exp(-away)
        spread = share * (gathered[:, 2] + away)
        entropy = spread.masked_fill(share == 0, 0.0).sum(0).masked_fill(ignored, 0.0)
        local_entropy = gathered[team.rank, 2]
        nothing = ignored | (target < 0) | (target >= team.classes)
        predicted = _predicted(gathered, team).masked_fill(nothing, -1)
    else:
        if terms.class_weight is not None:
            weight = gathered[:, 2].gather(0, owner).squeeze(0)
        if terms.label_smoothing > 0:
            assert terms.sums is not None, "with_sums() comes before the first chunk"
            moved = torch.where(terms.sums[:, None] == 0, 0.0, terms.sums[:, None] * away)
            uniform = (gathered[:, -1] + moved).sum(0).masked_fill(ignored, 0.0)
    return Merged(
        logp.masked_fill(ignored, 0.0), (largest + log_total).masked_fill(ignored, 0.0), entropy,
        predicted, owned, weight, uniform, away[team.rank], local_entropy,
    )  # fmt: skip


def _predicted(gathered: Tensor, team: Team) -> Tensor:
    """Global index of the largest logit: the first rank among equals, or the first with NaN."""
    best = gathered[:, 3].argmax(0)
    bits = torch.int64 if gathered.dtype == torch.float64 else torch.int32
    local = gathered[:, 4].contiguous().view(bits).gather(0, best[None]).squeeze(0)
    starts = team.ends.roll(1).index_fill(0, team.ends.new_zeros(1), 0)
    return local.long() + starts[best]


def smoothed_gradient(
    logits: Tensor,  # (n, V / P), overwritten
    local: Tensor,  # (n,)
    at: Tensor,  # (n,)
    merged: Merged,
    terms: LossTerms,
    coef: Tensor,  # (n,) or ()
    logit_scale: float,
    softcap: float,
) -> None:
    """The gradient of ``sum(coef * loss)`` with label smoothing, in place.

    The row kernels tie the pull on the class weights to their own slice's sum, so this is made of
    torch's operators, a block of rows at a time::

        d_v = coef ((1 - s) c_y (p_v - 1[v = y]) + s / V (C p_v - c_v) + 2 lse_square_scale lse p_v)
    """
    assert terms.sums is not None, "with_sums() comes before the first chunk"
    hard = (1.0 - terms.label_smoothing) * merged.target_weight
    smooth = terms.label_smoothing / terms.classes
    push = smooth * terms.sums.sum() + 2.0 * terms.lse_square_scale * merged.lse
    p_target = torch.exp(merged.logp)
    c = torch.ones_like(merged.lse[:0]) if terms.class_weight is None else terms.class_weight
    c_target = c[at] if terms.class_weight is not None else torch.ones_like(p_target)
    value = coef * (hard * torch.expm1(merged.logp) + push * p_target - smooth * c_target)
    usable = local != NOTHING_IGNORED
    coef = torch.where(usable, coef, 0.0)
    flat = coef * (hard + push)
    lse = torch.where(usable, merged.lse, torch.inf)
    for start in range(0, logits.shape[0], max(1, _BLOCK // logits.shape[1])):
        here = slice(start, start + max(1, _BLOCK // logits.shape[1]))
        raw = logits[here].to(lse.dtype) * logit_scale
        slope: Any = logit_scale
        if softcap > 0:
            bent = torch.tanh(raw / softcap)
            raw, slope = softcap * bent, logit_scale * (1 - bent) * (1 + bent)
        grad = torch.exp(raw - lse[here, None]) * flat[here, None]
        pulled = (coef[here] * smooth)[:, None]
        grad -= pulled if terms.class_weight is None else pulled * terms.class_weight
        write_targets(grad, at[here], merged.owned[here], value[here])
        logits[here] = grad * slope
