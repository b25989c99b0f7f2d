"""The loop over chunks for one rank's slice of the vocabulary.

For slice r of the vocabulary, ``lse_r`` its log-sum-exp, ``w_r = exp(lse_r - lse)`` its share and
``p^r`` the softmax within it::

    -log w_r = log(1 + sum over the other q of exp(lse_q - lse_r))
    logp     = logp_r + log w_r                               r owns the target
    entropy  = sum_r w_r (entropy_r - log w_r)                every term is positive
    d logp    / d z_v = 1[v = y] - w_r p^r_v
    d lse     / d z_v = w_r p^r_v
    d entropy / d z_v = -w_r p^r_v (log p^r_v + log w_r + entropy)

So the ranks exchange a few numbers per token, and the row kernels for whole vocabularies make the
gradient in place, with upstreams that the shares turn into local ones; the target's element is then
written over. The exchange of one chunk runs during the next chunk's product: two buffers of logits.
``-log w_r`` is never ``lse - lse_r`` for the largest share, and 1 - p of the target comes from
logp: a confident row keeps its relative accuracy.

The input's gradient is summed over the ranks chunk by chunk, while the head's gradient is made: in
float32 (or ``accum_dtype``), since the ranks' parts cancel and 16 bits would round each sum again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab._schemas import result_dtype
from trimtab.ops._checks import NOTHING_IGNORED, check_target_range
from trimtab.ops.token_loss._chunks import (
    Chunk,
    _cast,
    _float16_scale,
    active_rows,
    chunks,
    reached,
    row_kernels,
    times,
)
from trimtab.ops.token_loss._gradients import HeadGradients
from trimtab.ops.token_loss._groups import Shard, Team, assemble
from trimtab.ops.token_loss._merge import (
    LossTerms,
    Merged,
    merge,
    smoothed_gradient,
    write_targets,
)


class Call(NamedTuple):
    """What the operators of this file share: the tokens of all ranks, and how to go over them."""

    team: Team
    input: Tensor  # (N, D)
    weight: Tensor  # (V / P, D)
    bias: Tensor | None  # (V / P,)
    target: Tensor  # (N,)
    rows: Tensor | None  # (n,)
    inv_temperature: Tensor | None  # (N,)
    transform: tuple[int, float, float]  # ignore_index, logit_scale, softcap
    chunk_size: int | None
    compute_dtype: torch.dtype
    kernels: Any


class Step(NamedTuple):
    """One chunk whose numbers the ranks have exchanged."""

    chunk: Chunk
    local: Tensor  # (n,) target within the slice, as the kernels take it
    at: Tensor  # (n,) the same as an index, 0 where another rank has the target
    merged: Merged


def steps(call: Call, terms: LossTerms | None) -> Iterator[Step]:
    """Each chunk with its merged numbers, one product behind the logits."""
    waiting: tuple[Any, ...] | None = None
    head, bias = _cast(call.weight, call.compute_dtype), _cast(call.bias, call.compute_dtype)
    for chunk in chunks(
        call.input, head, bias, call.target, call.rows, call.chunk_size, call.compute_dtype,
        buffers=2, largest_slice=max(call.team.slices),
    ):  # fmt: skip
        started = _exchange(call, chunk, terms)
        if waiting is not None:
            yield _arrived(call, terms, *waiting)
        waiting = (chunk, *started)
    if waiting is not None:
        yield _arrived(call, terms, *waiting)


def local_target(call: Call, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The target within the slice (0 where another rank has it), and whether it is there.

    Ignored rows get a number that no slice has, whatever ``ignore_index`` is; a target outside the
    vocabulary -1, for which the kernels answer NaN.
    """
    offset, size = call.team.offset, call.weight.shape[0]
    ignored = chunk.target == call.transform[0]
    local = chunk.target - offset
    owned = (local >= 0) & (local < size) & ~ignored
    outside = (chunk.target < 0) | (chunk.target >= call.team.classes)
    local = torch.where(owned, local, 0).masked_fill(outside, -1)
    return local.masked_fill(ignored, NOTHING_IGNORED), owned


def _exchange(call: Call, chunk: Chunk, terms: LossTerms | None) -> tuple[Any, ...]:
    """Start to gather this slice's numbers: lse, the target's logp, and what the loss needs."""
    from torch import distributed

    local, owned = local_target(call, chunk)
    at = torch.where(owned, local, 0)
    real = result_dtype(call.compute_dtype)
    count = 2 if terms is not None else 5
    extra = 0 if terms is None else terms.extra
    own = chunk.logits.new_zeros((count + extra, chunk.target.numel()), dtype=real)
    lse, logp = own[0], own[1]
    if call.weight.shape[0] == 0:
        lse.fill_(-torch.inf)
        if terms is None:
            own[3].fill_(-torch.inf)
    else:
        entropy, predicted = torch.empty_like(lse), torch.empty_like(local)
        call.kernels.token_logp_rows(
            chunk.logits, local, chunk.pick(call.inv_temperature), NOTHING_IGNORED,
            *call.transform[1:], logp, entropy, lse, predicted, None,
        )  # fmt: skip
        local = _finish_numbers(call, chunk, terms, own, entropy, predicted, local, owned)
    gathered = own.new_empty((len(call.team.slices), *own.shape))
    work = distributed.all_gather(list(gathered), own, group=call.team.group, async_op=True)
    # Under way it needs its source: the last one keeps it alive.
    return local, at, owned, gathered, work, own


def _finish_numbers(
    call: Call,
    chunk: Chunk,
    terms: LossTerms | None,
    own: Tensor,  # (k, n)
    entropy: Tensor,  # (n,)
    predicted: Tensor,  # (n,)
    local: Tensor,  # (n,)
    owned: Tensor,  # (n,)
) -> Tensor:
    """Fill in the rest; returns the target, where a slice that is -inf throughout is ignored.

    Such a slice (padding that a bias masks) has no softmax of its own, but a share: 0.
    """
    _, logit_scale, softcap = call.transform
    sign = -1.0 if logit_scale < 0 else 1.0
    top = chunk.logits.gather(1, predicted.clamp(min=0)[:, None]).squeeze(1).to(own.dtype)
    top = torch.tanh(top * logit_scale / softcap) if softcap > 0 else top * sign
    masked = top == -torch.inf
    own[0].masked_fill_(masked, -torch.inf)
    own[1].masked_fill_(masked | ~owned, 0.0)
    if terms is None:
        own[2] = entropy.masked_fill(masked, 0.0)
        own[3] = top
        bits = torch.int64 if own.dtype == torch.float64 else torch.int32
        own[4] = predicted.to(bits).view(own.dtype)
    else:
        terms.fill(call, chunk, own[2:], local, owned, masked)
    return local.masked_fill(masked, NOTHING_IGNORED)


def _arrived(
    call: Call,
    terms: LossTerms | None,
    chunk: Chunk,
    local: Tensor,  # (n,)
    at: Tensor,  # (n,)
    owned: Tensor,  # (n,)
    gathered: Tensor,  # (P, k, n)
    work: Any,
    own: Tensor,  # (k, n)
) -> Step:
    work.wait()
    ignored = chunk.target == call.transform[0]
    merged = merge(gathered, call.team, chunk.target, owned, ignored, terms)
    return Step(chunk, local, at, merged)


class GroupGradients:
    """``HeadGradients`` of a slice, with the input's gradient summed over the ranks."""

    def __init__(
        self,
        call: Call,
        needs_grad: list[bool],
        accum_dtype: torch.dtype,
        input_dtype: torch.dtype,
    ) -> None:
        self.needs_input, *needs_head = needs_grad
        self.team, self.rows = call.team, call.rows
        self.head = HeadGradients(
            call.input, call.weight, call.bias, [False, *needs_head], accum_dtype,
            call.compute_dtype, call.rows, call.kernels.accumulate,
        )  # fmt: skip
        self.weight = _cast(call.weight, call.compute_dtype)
        self.sum_dtype = torch.promote_types(accum_dtype, call.compute_dtype)
        self.bounds = _bounds(call) if self.needs_input else []
        own = call.input[call.team.own]
        self.input = own.new_zeros(own.shape if self.needs_input else (0,), dtype=input_dtype)
        self.waiting: tuple[Any, ...] | None = None
        self.done = 0

    def add(self, chunk: Chunk) -> None:
        """Add one chunk, whose logits hold their gradient."""
        if self.needs_input:
            part = torch.mm(chunk.logits, self.weight).to(self.sum_dtype)
            started = (chunk.rows, part, self.done, self._reduce(part))
            self._write()
            self.waiting = started
            self.done += part.shape[0]
        if self.weight.shape[0]:
            self.head.add(chunk.rows, chunk.input, chunk.logits, self.weight, chunk.last)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three gradients; an empty tensor for each that is not needed."""
        self._write()
        _, weight, bias = self.head.finish()
        return self.input, weight, bias

    def _reduce(self, part: Tensor) -> list[Any]:
        """Start to sum a part over the ranks: for all of them, or each row for who brought it."""
        from torch import distributed

        if self.team.counts is None:
            return [distributed.all_reduce(part, group=self.team.group, async_op=True)]
        return [
            distributed.reduce(part[low:high], group=self.team.group, group_dst=rank, async_op=True)
            for rank in range(len(self.team.slices))
            for low, high in [self._of_rank(rank, self.done, part.shape[0])]
            if low < high
        ]

    def _of_rank(self, rank: int, done: int, count: int) -> tuple[int, int]:
        """Which rows of a part that begins at ``done`` are of a rank's tokens."""
        low, high = self.bounds[rank], self.bounds[rank + 1]
        return min(max(low - done, 0), count), min(max(high - done, 0), count)

    def _write(self) -> None:
        """Wait for the sum under way, and put it in its place."""
        if self.waiting is None:
            return
        rows, part, done, works = self.waiting
        self.waiting = None
        for work in works:
            work.wait()
        low, high = self._of_rank(self.team.rank, done, part.shape[0])
        part = part[low:high].to(self.input.dtype)
        start = self.team.own.start or 0
        if isinstance(rows, slice):
            first = rows.start + low - start
            self.input[first : first + part.shape[0]] = part
        else:
            self.input[rows[low:high] - start] = part


def _bounds(call: Call) -> list[int]:
    """Where each rank's tokens begin among the active rows, and where the last one's end."""
    count = call.target.numel() if call.rows is None else call.rows.numel()
    if call.team.counts is None:
        ranks = len(call.team.slices)
        return [0 if rank <= call.team.rank else count for rank in range(ranks + 1)]
    starts = torch.tensor([0, *call.team.counts]).cumsum(0)
    if call.rows is None:
        return starts.tolist()
    return torch.searchsorted(call.rows, starts.to(call.rows.device)).tolist()


def _call(
    shard: Shard,
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V / P, D)
    bias: Tensor | None,  # (V / P,)
    target: Tensor,  # (N,)
    coef: Tensor | None,  # (N,), its zeros are left out
    inv_temperature: Tensor | None,  # (N,)
    transform: tuple[int, float, float],
    how: tuple[int | None, torch.dtype, str],
    options: tuple[Any, ...],
) -> Call:
    """Agree with the other ranks, and bring the tokens of all of them together."""
    chunk_size, compute_dtype, impl = how
    keep = target != transform[0]
    if coef is not None:
        keep &= coef != 0
    options = (coef is None, inv_temperature is None, chunk_size, *transform[1:], *options)
    team = assemble(shard, weight, target, keep, compute_dtype, options)
    target = team.all_tokens(target)
    check_target_range(target, transform[0], team.classes)
    rows = active_rows(target, transform[0], team.all_tokens(coef))
    if team.counts is not None:
        input = input.to(compute_dtype)
    return Call(
        team, team.all_tokens(input), weight, bias, target, rows, team.all_tokens(inv_temperature),
        transform, chunk_size, compute_dtype, row_kernels(impl),
    )  # fmt: skip


@torch.library.impl("trimtab::sharded_token_loss", "CompositeExplicitAutograd")
def sharded_token_loss(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V / P, D)
    bias: Tensor | None,  # (V / P,)
    target: Tensor,  # (N,)
    coef: Tensor | None,  # (N,)
    class_weight: Tensor | None,  # (V / P,)
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    label_smoothing: float,
    lse_square_scale: float,
    needs_grad: list[bool],
    skip_zero_coef: bool,
    chunk_size: int | None,
    accum_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    impl: str,
    group: str,
    sequence_parallel: bool,
) -> tuple[Tensor, ...]:
    """``linear_token_loss`` of a slice: loss and input's gradient as for the whole vocabulary."""
    terms = LossTerms(class_weight, label_smoothing, lse_square_scale)
    call = _call(
        Shard(group, sequence_parallel), input, weight, bias, target,
        coef if skip_zero_coef else None, None, (ignore_index, logit_scale, softcap),
        (chunk_size, compute_dtype, impl), (*terms.code, *needs_grad, skip_zero_coef, accum_dtype),
    )  # fmt: skip
    loss = call.input.new_zeros(call.target.shape, dtype=result_dtype(compute_dtype))
    coef, scale = call.team.all_tokens(coef), loss.new_ones(())
    if coef is not None and compute_dtype == torch.float16:
        scale = _float16_scale([coef], call.input, needs_grad[1] or needs_grad[2])
        coef = coef / scale
    gradients = GroupGradients(call, needs_grad, accum_dtype, input.dtype)
    terms = terms.with_sums(call.team, loss)
    for step in steps(call, terms):
        loss[step.chunk.rows] = terms.loss(step.merged)
        if any(needs_grad):
            factor = step.chunk.pick(coef)
            _loss_gradient(call, step, terms, loss.new_ones(()) if factor is None else factor)
            gradients.add(step.chunk)
    return (call.team.own_tokens(loss), *gradients.finish(), scale)


def _loss_gradient(call: Call, step: Step, terms: LossTerms, coef: Tensor) -> None:
    """The gradient of ``sum(coef * loss)`` for the logits, in their place."""
    if call.weight.shape[0] == 0:
        return
    merged = step.merged
    if terms.label_smoothing > 0:
        smoothed_gradient(
            step.chunk.logits, step.local, step.at, merged, terms, coef, *call.transform[1:]
        )
        return
    upstream = [-coef * merged.target_weight, None, None]
    if terms.lse_square_scale != 0.0:
        upstream[2] = coef * 2 * terms.lse_square_scale * merged.lse
    _logp_gradient(call, step, upstream)


def _logp_gradient(call: Call, step: Step, upstream: list[Tensor | None]) -> None:
    """The gradient for the logits, in their place, from those of logp, entropy and lse."""
    if call.weight.shape[0] == 0:
        return
    logits, merged = step.chunk.logits, step.merged
    inv_temperature = step.chunk.pick(call.inv_temperature)
    raw = logits.gather(1, step.at[:, None]).squeeze(1)
    bend, push = merged.upstreams(*upstream)
    call.kernels.token_logp_rows_backward(
        logits, step.local, inv_temperature, NOTHING_IGNORED, *call.transform[1:], None, bend,
        push, logits,
    )  # fmt: skip
    value = merged.at_target(*upstream) * _slope(call, raw.to(push.dtype))
    value = value if inv_temperature is None else value * inv_temperature
    write_targets(logits, step.at, merged.owned, value)


def _slope(call: Call, raw: Tensor) -> Tensor | float:
    """Derivative of z at a temperature of 1 for the logit."""
    _, logit_scale, softcap = call.transform
    if softcap == 0:
        return logit_scale
    bent = torch.tanh(raw * logit_scale / softcap)
    return (1 - bent) * (1 + bent) * logit_scale


@torch.library.impl("trimtab::sharded_token_logp", "CompositeExplicitAutograd")
def sharded_token_logp(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V / P, D)
    bias: Tensor | None,  # (V / P,)
    target: Tensor,  # (N,)
    inv_temperature: Tensor | None,  # (N,)
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    with_unit_grad: bool,
    chunk_size: int | None,
    compute_dtype: torch.dtype,
    impl: str,
    group: str,
    sequence_parallel: bool,
) -> tuple[Tensor, ...]:
    """``linear_token_logp`` of a slice: every result as for the whole vocabulary."""
    call = _call(
        Shard(group, sequence_parallel), input, weight, bias, target, None, inv_temperature,
        (ignore_index, logit_scale, softcap), (chunk_size, compute_dtype, impl),
        (with_unit_grad,),
    )  # fmt: skip
    logp = call.input.new_zeros(call.target.shape, dtype=result_dtype(compute_dtype))
    entropy, lse = torch.zeros_like(logp), torch.zeros_like(logp)
    predicted = torch.full_like(call.target, -1)
    gradients = GroupGradients(call, [with_unit_grad, False, False], torch.float32, compute_dtype)
    for step in steps(call, None):
        merged, rows = step.merged, step.chunk.rows
        logp[rows], entropy[rows], lse[rows] = merged.logp, merged.entropy, merged.lse
        predicted[rows] = merged.predicted
        if with_unit_grad:
            _logp_gradient(call, step, [torch.ones_like(merged.logp), None, None])
            gradients.add(step.chunk)
    results = (call.team.own_tokens(values) for values in (logp, entropy, lse, predicted))
    return (*results, gradients.finish()[0])


@torch.library.impl("trimtab::sharded_token_logp_backward", "CompositeExplicitAutograd")
def sharded_token_logp_backward(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V / P, D)
    bias: Tensor | None,  # (V / P,)
    target: Tensor,  # (N,)
    inv_temperature: Tensor | None,  # (N,)
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    grad_logp: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    grad_lse: Tensor | None,  # (N,)
    needs_grad: list[bool],
    chunk_size: int | None,
    accum_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    impl: str,
    group: str,
    sequence_parallel: bool,
) -> tuple[Tensor, ...]:
    """``linear_token_logp_backward`` of a slice: the logits and the exchange again."""
    given = [grad_logp, grad_entropy, grad_lse]
    call = _call(
        Shard(group, sequence_parallel), input, weight, bias, target, reached(target, given),
        inv_temperature, (ignore_index, logit_scale, softcap), (chunk_size, compute_dtype, impl),
        (*needs_grad, *(grad is None for grad in given), accum_dtype),
    )  # fmt: skip
    upstream = [call.team.all_tokens(grad) for grad in given]
    scale = None
    if compute_dtype == torch.float16:
        scale = _float16_scale(upstream, call.input, needs_grad[1] or needs_grad[2])
        upstream = [None if grad is None else grad / scale for grad in upstream]
    gradients = GroupGradients(call, needs_grad, accum_dtype, input.dtype)
    for step in steps(call, None):
        _logp_gradient(call, step, [step.chunk.pick(grad) for grad in upstream])
        gradients.add(step.chunk)
    grads = gradients.finish()
    return grads if scale is None else tuple(times(grad, scale) for grad in grads)
