"""The oracle for a sharded vocabulary: gather every logit, then what one machine would do.

Each collective is an autograd function whose backward is another of them, so that the results can
be differentiated twice. Ranks hold the same upstream gradient of whatever they hold alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.ops._autograd import needs_grad
from trimtab.ops._checks import NOTHING_IGNORED, check_target_range
from trimtab.ops.token_loss._groups import Shard, Team, assemble, gather
from trimtab.reference import token_loss as reference


class Gather(torch.autograd.Function):
    """The ranks' parts along a dimension, one after the other; backward takes this rank's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any, lengths: list[int], dim: int) -> Tensor:
        """One collective."""
        ctx.arguments = group, lengths, dim
        return gather(group, part, lengths, dim)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """No collective: every rank has the whole upstream."""
        return Split.apply(upstream, *ctx.arguments), None, None, None


class Split(torch.autograd.Function):
    """This rank's part of what all ranks hold; backward gathers the parts."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Any, lengths: list[int], dim: int) -> Tensor:
        """A copy."""
        ctx.arguments = group, lengths, dim
        start = sum(lengths[: group.rank()])
        return whole.narrow(dim, start, lengths[group.rank()]).clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """One collective."""
        return Gather.apply(upstream, *ctx.arguments), None, None, None


class Share(torch.autograd.Function):
    """What all ranks hold, used by each for a part of its own; backward sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        """Nothing to do."""
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """One collective."""
        return Total.apply(upstream, ctx.group), None


class Total(torch.autograd.Function):
    """The sum over the ranks, in float32 for 16 bits; backward hands each rank the upstream."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        """One collective."""
        from torch import distributed

        ctx.group = group
        wide = torch.promote_types(values.dtype, torch.float32)
        total = values.to(wide, copy=True, memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """Nothing to do, but for the second derivative."""
        return Share.apply(upstream, ctx.group), None


class Whole(NamedTuple):
    """A call as one machine would have it."""

    team: Team
    logits: Tensor  # (N, V)
    target: Tensor  # (N,)

    def own(self, values: Tensor) -> Tensor:
        """This rank's tokens, differentiably."""
        if self.team.counts is None:
            return values
        return Split.apply(values, self.team.group, self.team.counts, 0)


def _whole(
    shard: Shard,
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V / P, D)
    bias: Tensor | None,  # (V / P,)
    target: Tensor,  # (N,)
    dtype: torch.dtype,
    options: dict[str, Any],
) -> Whole:
    ignored = NOTHING_IGNORED if options["ignore_index"] is None else options["ignore_index"]
    alike = [float(value or 0) for value in options.values()]
    team = assemble(
        shard, weight, target, target != ignored, dtype,
        ("reference", *alike, *needs_grad(input, weight, bias)),
    )  # fmt: skip
    if team.counts is not None:
        input = Gather.apply(input, team.group, team.counts, 0)
    target = team.all_tokens(target)
    check_target_range(target, ignored, team.classes)
    part = F.linear(Share.apply(input, team.group), weight, bias)
    return Whole(team, Gather.apply(part, team.group, team.slices, 1), target)


def linear_token_loss(
    shard: Shard,
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V / P, D)
    bias: Tensor | None,  # (V / P,)
    target: Tensor,  # (N,)
    dtype: torch.dtype,
    *,
    class_weight: Tensor | None = None,  # (V / P,)
    **options: Any,
) -> Tensor:  # (N,)
    """The oracle's loss of each token; the logits of the whole vocabulary are in memory."""
    alike = {**options, "class_weight": class_weight is None}
    whole = _whole(shard, input, weight, bias, target, dtype, alike)
    if class_weight is not None:
        class_weight = gather(whole.team.group, class_weight, whole.team.slices)
    tokens = reference.token_loss(whole.logits, whole.target, class_weight=class_weight, **options)
    return whole.own(tokens)


def linear_token_logp(
    shard: Shard,
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V / P, D)
    bias: Tensor | None,  # (V / P,)
    target: Tensor,  # (N,)
    dtype: torch.dtype,
    *,
    inv_temperature: Tensor | None = None,  # (N,)
    **options: Any,
) -> tuple[Tensor, ...]:  # each (N,)
    """The oracle's logp, entropy, lse and argmax of each token."""
    alike = {**options, "inv_temperature": inv_temperature is None}
    whole = _whole(shard, input, weight, bias, target, dtype, alike)
    outputs = reference.token_logp(
        whole.logits,
        whole.target,
        inv_temperature=whole.team.all_tokens(inv_temperature),
        **options,
    )
    return tuple(whole.own(values) for values in outputs)
