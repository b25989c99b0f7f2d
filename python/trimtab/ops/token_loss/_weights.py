"""From token weights and the reduction to one coefficient per token, differentiably."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab._schemas import result_dtype
from trimtab.ops.token_loss._groups import PartialSum, Replicated, ReplicatedSum, Shard


class Ranks(NamedTuple):
    """Over which ranks the divisor and the reduced loss are summed."""

    shard: Shard | None  # the classes are sharded, and with it maybe the tokens
    normalizer_group: str | None  # further tokens, each with a loss of its own

    # Not a property: Dynamo of torch 2.10 can't look into those of named tuples.
    def token_group(self) -> str | None:
        """The group whose ranks bring tokens of their own to one loss."""
        split = self.shard is not None and self.shard.sequence_parallel
        return self.shard.group if split and self.shard is not None else None


class Coefficients(NamedTuple):
    """What each token's loss is multiplied by."""

    values: Tensor | None  # (N,) or (K, N); None: all ones, ignored tokens aside
    divisor: Tensor | None  # (), (K,) or None: what the values were divided by

    def active(self) -> Tensor | None:
        """1 for the tokens that any weight lets through, else 0; None if weights decide nothing."""
        if self.values is None or self.values.requires_grad:
            return None
        nonzero = self.values.detach() != 0
        return (nonzero.any(0) if nonzero.dim() == 2 else nonzero).to(self.values.dtype)

    def with_nan_of_nothing(self, loss: Tensor, count: int | None) -> Tensor:
        """NaN for the mean over nothing, as torch gives, with its gradients left at 0."""
        if self.divisor is not None:
            loss = loss + 0.0 / self.divisor.detach().reshape(-1 if loss.dim() else ())
        return loss.reshape(1) if count == 1 and loss.dim() == 0 else loss


def token_coefficients(
    target: Tensor,  # (N,)
    token_weight: Tensor | None,  # target's shape as given, or (K,) + it
    class_weight: Tensor | None,  # (V,)
    count: int | None,
    reduction: str,
    normalizer: float | Tensor | str | None,
    ignore_index: int,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
) -> Coefficients:
    """Weights over the reduction's divisor; exactly 0 where the target is ignored."""
    dtype = result_dtype(dtype)
    valid = target != ignore_index
    weights = None
    if token_weight is not None:
        weights = token_weight.to(dtype).reshape(
            target.shape if count is None else (count, target.numel())
        )
        weights = torch.where(valid, weights, 0.0)
    if reduction == "none":
        return Coefficients(weights, None)
    if weights is None:
        weights = valid.to(dtype)
    if reduction == "sum":
        return Coefficients(weights, None)
    divisor = _divisor(
        target, ignore_index, weights, class_weight, normalizer, ranks or Ranks(None, None)
    )
    column = divisor.unsqueeze(-1) if divisor.dim() else divisor
    nothing = column == 0
    values = torch.where(nothing, 0.0, weights / torch.where(nothing, 1.0, column))
    return Coefficients(values, divisor)


def _divisor(
    target: Tensor,
    ignore_index: int,
    weights: Tensor,
    class_weight: Tensor | None,
    normalizer: float | Tensor | str | None,
    ranks: Ranks,
) -> Tensor:
    if isinstance(normalizer, Tensor):
        divisor = normalizer.to(weights).squeeze()
        if ranks.token_group() is not None and divisor.requires_grad:
            return Replicated.apply(divisor, ranks.token_group())
        return divisor
    if isinstance(normalizer, (int, float)):
        return weights.new_full((), float(normalizer))
    valid = target != ignore_index
    if isinstance(normalizer, str):
        divisor = weights.sum(-1)
    elif class_weight is None:
        divisor = valid.sum().to(weights.dtype)
    elif ranks.shard is None:
        of_target = class_weight[target.clamp(0, class_weight.numel() - 1)]
        divisor = torch.where(valid, of_target, 0.0).sum()
    else:
        divisor = torch.ops.trimtab.sharded_class_weight_sum.default(
            class_weight, target, ignore_index, *ranks.shard
        )
    counted = normalizer is None and class_weight is not None
    if ranks.token_group() is not None and not counted:
        # Ranks whose backward differs are told apart here.
        kind = f"{normalizer} {divisor.requires_grad}"
        divisor = PartialSum.apply(divisor, ranks.token_group(), kind)
    if ranks.normalizer_group is not None:
        divisor = PartialSum.apply(divisor, ranks.normalizer_group)
    return divisor


def reduce_tokens(
    tokens: Tensor,  # (N,)
    coefficients: Coefficients,
    reduction: str,
    count: int | None,
    shape: torch.Size,
    token_group: str | None = None,
) -> Tensor:
    """The loss from each token's unweighted loss: (), (K,), ``shape`` or (K,) + ``shape``."""
    leading = () if count is None else (count,)
    if reduction == "none":
        values = coefficients.values
        weighted = tokens if values is None else _weighted(values, tokens)
        return weighted.reshape((*leading, *shape))
    assert coefficients.values is not None, "a reduction has a coefficient for every token"
    loss = _weighted(coefficients.values, tokens).sum(-1)
    if token_group is not None:
        loss = ReplicatedSum.apply(loss, token_group)
    return coefficients.with_nan_of_nothing(loss, count)


def _weighted(values: Tensor, tokens: Tensor) -> Tensor:
    """``values * tokens``; a constant weight of 0 gives 0 whatever the token's loss."""
    if values.requires_grad:
        return values * tokens
    return torch.where(values != 0, values * tokens, 0.0)
