"""The loop over chunks of rows: products around row kernels, one chunk of logits at a time.

Cost in products of N x D x V: 1 for the logits, 1 more for each gradient (input, head) that is
needed. Rows that can't contribute are left out of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab._schemas import result_dtype
from trimtab.ops._checks import check_target_range
from trimtab.ops.token_loss._gradients import HeadGradients

_CUDA_CHUNK_BYTES = 512 * 2**20


class Chunk(NamedTuple):
    """The rows of one step."""

    rows: Tensor | slice  # into the flat inputs
    input: Tensor  # (n, D)
    target: Tensor  # (n,)
    logits: Tensor  # (n, V), overwritten by the next step, or the one after with two buffers
    last: bool

    def pick(self, values: Tensor | None) -> Tensor | None:
        """This chunk's part of a per-token tensor, contiguous."""
        return None if values is None else values[self.rows].contiguous()


def row_kernels(impl: str) -> Any:
    """The namespace that holds the row operators of an implementation."""
    if impl == "native":
        return torch.ops.trimtab
    from trimtab.triton_kernels import token_loss

    return token_loss


def rows_per_chunk(
    rows: int, classes: int, itemsize: int, device: str, chunk_size: int | None, buffers: int = 1
) -> int:
    """Rows of logits in memory at a time, in chunks of nearly equal size.

    Each chunk reads and writes the head's gradient once, which its products have to outweigh. On a
    CPU with bfloat16 matrix units that took 1,024 rows. Two buffers share the bytes of one, and
    get a chunk each where that leaves 1,024 rows: one chunk's exchange needs another's product.
    """
    least_steps = 1
    if chunk_size is None:
        bytes_of_each = _CUDA_CHUNK_BYTES // buffers
        chunk_size = 1024 if device == "cpu" else max(1024, bytes_of_each // (classes * itemsize))
        least_steps = max(1, min(buffers, rows // 1024))
    steps = max(least_steps, -(-rows // chunk_size))
    return max(1, -(-rows // steps))


def row_stride(classes: int, itemsize: int, device: str) -> int:
    """Elements from one row of logits to the next.

    On CUDA every row starts on 16 bytes, whatever the vocabulary: the kernels then load 16 bytes at
    a time, and cuBLAS may use its aligned products.
    """
    aligned = 16 // itemsize
    return -(-classes // aligned) * aligned if device == "cuda" else classes


def active_rows(target: Tensor, ignore_index: int, coef: Tensor | None) -> Tensor | None:
    """Indices of the rows that can contribute, or None for all of them.

    Their number decides the shapes that follow, so on CUDA this waits for the stream once; under
    graph capture that is not possible, and every row is computed.
    """
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    keep = target != ignore_index
    if coef is not None:
        keep &= coef != 0
    rows = keep.nonzero().squeeze(-1)
    return None if rows.numel() == target.numel() else rows


def chunks(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    rows: Tensor | None,  # (n,)
    chunk_size: int | None,
    compute_dtype: torch.dtype,
    buffers: int = 1,
    largest_slice: int | None = None,
) -> Iterator[Chunk]:
    """Yield the logits chunk by chunk, in one buffer or in turn in several.

    ``largest_slice`` takes the place of V in the rule for the chunk's size: ranks that hold unequal
    slices of a vocabulary have to make the same steps.
    """
    classes = weight.shape[0]
    count = target.numel() if rows is None else rows.numel()
    step = rows_per_chunk(
        count, largest_slice or classes, compute_dtype.itemsize, input.device.type, chunk_size,
        buffers,
    )  # fmt: skip
    stride = row_stride(classes, compute_dtype.itemsize, input.device.type)
    turns = min(buffers, -(-count // step))
    space = input.new_empty((turns, min(step, count), stride), dtype=compute_dtype)[..., :classes]
    for turn, start in enumerate(range(0, count, step)):
        picked = (
            slice(start, min(start + step, count)) if rows is None else rows[start : start + step]
        )
        part = input[picked].to(compute_dtype)
        logits = space[turn % turns, : part.shape[0]]
        if bias is None:
            torch.mm(part, weight.t(), out=logits)
        else:
            torch.addmm(bias, part, weight.t(), out=logits)
        yield Chunk(picked, part, target[picked].contiguous(), logits, start + step >= count)


def reached(target: Tensor, upstream: list[Tensor | None]) -> Tensor:
    """Nonzero for the tokens that any upstream gradient is not 0 for, (N,)."""
    found = torch.zeros(target.shape, device=target.device)
    for grad in upstream:
        if grad is not None:
            found += grad != 0
    return found


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    return None if tensor is None else tensor.to(dtype)


@torch.library.impl("trimtab::linear_token_loss", "CompositeExplicitAutograd")
def linear_token_loss(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    coef: Tensor | None,  # (N,)
    class_weight: Tensor | None,  # (V,)
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
) -> tuple[Tensor, ...]:
    """Loss per token and, in the same pass, the gradients of ``sum(coef * loss)``.

    Without ``coef`` it counts as ones. Gradients come divided by ``grad_scale``, a power of two
    that keeps small coefficients inside float16's range and is 1 for every other dtype.
    """
    check_target_range(target, ignore_index, weight.shape[0])
    kernels = row_kernels(impl)
    loss = input.new_zeros(target.shape, dtype=result_dtype(compute_dtype))
    scale = loss.new_ones(())
    if coef is not None and compute_dtype == torch.float16:
        scale = _float16_scale([coef], input, needs_grad[1] or needs_grad[2])
        coef = coef / scale
    rows = active_rows(target, ignore_index, coef if skip_zero_coef else None)
    gradients = HeadGradients(
        input, weight, bias, needs_grad, accum_dtype, compute_dtype, rows, kernels.accumulate
    )
    head = _cast(weight, compute_dtype)
    for chunk in chunks(
        input, head, _cast(bias, compute_dtype), target, rows, chunk_size, compute_dtype
    ):
        part = loss.new_empty(chunk.target.shape)
        grad = chunk.logits if any(needs_grad) else None
        kernels.token_loss_rows(
            chunk.logits, chunk.target, chunk.pick(coef), class_weight, ignore_index, logit_scale,
            softcap, label_smoothing, lse_square_scale, part, grad,
        )  # fmt: skip
        loss[chunk.rows] = part
        gradients.add(chunk.rows, chunk.input, chunk.logits, head, chunk.last)
    return (loss, *gradients.finish(), scale)


@torch.library.impl("trimtab::linear_token_logp", "CompositeExplicitAutograd")
def linear_token_logp(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    inv_temperature: Tensor | None,  # (N,)
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    with_unit_grad: bool,
    chunk_size: int | None,
    compute_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, ...]:
    """Log-probability, entropy, lse, argmax and, where asked, ``d logp_t / d input_t``."""
    check_target_range(target, ignore_index, weight.shape[0])
    kernels = row_kernels(impl)
    logp = input.new_zeros(target.shape, dtype=result_dtype(compute_dtype))
    entropy, lse = torch.zeros_like(logp), torch.zeros_like(logp)
    predicted = torch.full_like(target, -1)
    rows = active_rows(target, ignore_index, None)
    needs = [with_unit_grad, False, False]
    gradients = HeadGradients(
        input,
        weight,
        bias,
        needs,
        torch.float32,
        compute_dtype,
        rows,
        kernels.accumulate,
        compute_dtype,
    )
    head = _cast(weight, compute_dtype)
    for chunk in chunks(
        input, head, _cast(bias, compute_dtype), target, rows, chunk_size, compute_dtype
    ):
        parts = [values.new_empty(chunk.target.shape) for values in (logp, entropy, lse, predicted)]
        kernels.token_logp_rows(
            chunk.logits, chunk.target, chunk.pick(inv_temperature), ignore_index, logit_scale,
            softcap, *parts, chunk.logits if with_unit_grad else None,
        )  # fmt: skip
        for values, part in zip((logp, entropy, lse, predicted), parts, strict=True):
            values[chunk.rows] = part
        gradients.add(chunk.rows, chunk.input, chunk.logits, head, chunk.last)
    return logp, entropy, lse, predicted, gradients.finish()[0]


@torch.library.impl("trimtab::linear_token_logp_backward", "CompositeExplicitAutograd")
def linear_token_logp_backward(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
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
) -> tuple[Tensor, ...]:
    """Gradients for upstreams that only backward knows: the logits are made again."""
    kernels = row_kernels(impl)
    upstream: list[Tensor | None] = [grad_logp, grad_entropy, grad_lse]
    scale = None
    if compute_dtype == torch.float16:
        scale = _float16_scale(upstream, input, needs_grad[1] or needs_grad[2])
        upstream = [None if grad is None else grad / scale for grad in upstream]
    rows = active_rows(target, ignore_index, reached(target, upstream))
    gradients = HeadGradients(
        input, weight, bias, needs_grad, accum_dtype, compute_dtype, rows, kernels.accumulate
    )
    head = _cast(weight, compute_dtype)
    for chunk in chunks(
        input, head, _cast(bias, compute_dtype), target, rows, chunk_size, compute_dtype
    ):
        kernels.token_logp_rows_backward(
            chunk.logits, chunk.target, chunk.pick(inv_temperature), ignore_index, logit_scale,
            softcap, *(chunk.pick(grad) for grad in upstream), chunk.logits,
        )  # fmt: skip
        gradients.add(chunk.rows, chunk.input, chunk.logits, head, chunk.last)
    grads = gradients.finish()
    return grads if scale is None else tuple(times(grad, scale) for grad in grads)


def times(grad: Tensor, factor: Tensor) -> Tensor:
    """``grad * factor``, multiplied in the factor's own dtype: 65536 has no place in float16."""
    return torch.mul(grad, factor.reshape((1,) * grad.dim())).to(grad.dtype)


@torch.library.impl("trimtab::token_loss", "CompositeExplicitAutograd")
def token_loss(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    coef: Tensor | None,  # (N,)
    class_weight: Tensor | None,  # (V,)
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    label_smoothing: float,
    lse_square_scale: float,
    with_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Loss per token from logits that exist already, and the gradient of ``sum(coef * loss)``."""
    check_target_range(target, ignore_index, logits.shape[-1])
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    loss = logits.new_empty(target.shape, dtype=result_dtype(logits.dtype))
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if with_grad else None
    row_kernels(impl).token_loss_rows(
        logits, target, coef, class_weight, ignore_index, logit_scale, softcap, label_smoothing,
        lse_square_scale, loss, grad,
    )  # fmt: skip
    return loss, logits.new_empty((0,)) if grad is None else grad


def _float16_scale(upstreams: list[Tensor | None], input: Tensor, sums_rows: bool) -> Tensor:
    """A power of two to divide the coefficients by, so that float16 neither over- nor underflows.

    It brings the largest to [1, 2), or lower: where rows are summed for the head, the sum of all,
    times the largest input, stays below 2**15.
    """
    given = [value.abs() for value in upstreams if value is not None and value.numel() > 0]
    wanted = torch.stack(
        [value.amax() for value in given] or [input.new_ones((), dtype=torch.float32)]
    )
    if sums_rows and given:
        total = torch.stack([value.sum() for value in given]).sum()
        reach = input.abs().amax().float().clamp(min=1.0)
        wanted = torch.cat([wanted, (total * reach * 2.0**-14).unsqueeze(0)])
    largest = wanted.amax()
    usable = torch.isfinite(largest) & (largest > 0)
    _, exponent = torch.frexp(torch.where(usable, largest, torch.ones_like(largest)))
    return torch.ldexp(torch.ones_like(largest), exponent - 1)
