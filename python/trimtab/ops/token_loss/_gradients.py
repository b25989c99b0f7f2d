"""Sums a linear head's gradients over chunks, without a second buffer where the library can."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Rows of the head's gradient that are summed while their product is still in a cache. Products of
# 500 rows ran four times slower than of 2,000 (bfloat16, D 1024, AMX).
_SLICE_ROWS = 2048


class HeadGradients:
    """Gradients of ``sum_t l_t`` for the input, the head's weight and its bias.

    ``add`` takes each chunk's gradient for the logits. What is not needed is neither computed nor
    allocated. The head's gradient is summed in ``accum_dtype`` or the products' dtype if wider.
    """

    def __init__(
        self,
        input: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        needs_grad: list[bool],
        accum_dtype: torch.dtype,
        compute_dtype: torch.dtype,
        rows: Tensor | None,  # (n,)
        accumulate: Callable[[Tensor | None, Tensor, Tensor], None],
        input_dtype: torch.dtype | None = None,
    ) -> None:
        needs_input, needs_weight, needs_bias = needs_grad
        self.compute_dtype = compute_dtype
        self.accum_dtype = torch.promote_types(accum_dtype, compute_dtype)
        # The kernels know the products' dtype and float32; a sum that meets any other is torch's.
        known = {compute_dtype, torch.float32}
        self.accumulate = accumulate if {self.accum_dtype, weight.dtype} <= known else _accumulate
        # Every row is written once when all are active; the others keep their zeros.
        new_input = input.new_empty if rows is None else input.new_zeros
        self.input = new_input(
            input.shape if needs_input else (0,), dtype=input_dtype or input.dtype
        )
        self.weight = (
            torch.empty_like(weight, memory_format=torch.contiguous_format)
            if needs_weight
            else weight.new_empty((0,))
        )
        bias_like = input if bias is None else bias
        self.bias = bias_like.new_empty((weight.shape[0],) if needs_bias else (0,))
        self.needs_grad = needs_grad
        # Where the head's gradient stands so far: nothing, `weight` itself, or a wider buffer.
        self.sum: Tensor | None = None
        self.bias_sum: Tensor | None = None

    def add(
        self,
        rows: Tensor | slice,
        input: Tensor,  # (n, D)
        grad_logits: Tensor,  # (n, V)
        head: Tensor,  # (V, D), in the dtype of the products
        last: bool,
    ) -> None:
        """Add one chunk; ``last`` lets the final sum go straight to its place."""
        needs_input, needs_weight, needs_bias = self.needs_grad
        if needs_input:
            if isinstance(rows, slice) and self.input.dtype == self.compute_dtype:
                torch.mm(grad_logits, head, out=self.input[rows])
            else:
                self.input[rows] = torch.mm(grad_logits, head).to(self.input.dtype)
        if needs_weight:
            self._add_weight(grad_logits, input, last)
        if needs_bias:
            self._add_bias(grad_logits)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three gradients; an empty tensor for each that is not needed."""
        if self.sum is None:
            self.weight.zero_()
        elif self.sum is not self.weight:
            self.weight.copy_(self.sum)
        if self.bias_sum is None:
            self.bias.zero_()
        else:
            self.bias.copy_(self.bias_sum)
        return self.input, self.weight, self.bias

    def _add_bias(self, grad_logits: Tensor) -> None:
        """In slices: torch widens what it sums, and a chunk of logits is all we have room for."""
        if self.bias_sum is None:
            self.bias_sum = torch.zeros_like(self.bias, dtype=self.accum_dtype)
        for start in range(0, self.bias.shape[0], _SLICE_ROWS):
            here = slice(start, start + _SLICE_ROWS)
            self.bias_sum[here] += grad_logits[:, here].sum(0, dtype=self.accum_dtype)

    def _add_weight(self, grad_logits: Tensor, input: Tensor, last: bool) -> None:
        own_dtype = self.weight.dtype == self.compute_dtype
        if grad_logits.is_cuda and self.compute_dtype != self.accum_dtype == torch.float32:
            self._add_weight_wide(grad_logits, input)
        elif own_dtype and (self.accum_dtype == self.compute_dtype or self.sum is None):
            # The first product waits in the gradient itself: in its own dtype nothing is lost.
            beta = 0 if self.sum is None else 1
            torch.addmm(self.weight, grad_logits.t(), input, beta=beta, out=self.weight)
            self.sum = self.weight
        elif own_dtype and last and self.sum is self.weight:
            # The second of two is added inside the product, which sums in float32.
            torch.addmm(self.weight, grad_logits.t(), input, out=self.weight)
        else:
            self._add_weight_sliced(grad_logits, input, last)

    def _add_weight_wide(self, grad_logits: Tensor, input: Tensor) -> None:
        """By cuBLAS, which reads 16-bit operands and adds to float32: no part is rounded."""
        beta = 0 if self.sum is None else 1
        if self.sum is None:
            wide = self.weight.dtype == torch.float32
            self.sum = self.weight if wide else torch.empty_like(self.weight, dtype=torch.float32)
        torch.ops.aten.addmm.dtype_out(
            self.sum, grad_logits.t(), input, torch.float32, beta=beta, out=self.sum
        )

    def _add_weight_sliced(self, grad_logits: Tensor, input: Tensor, last: bool) -> None:
        """Torch's CPU products can't widen their result: each slice is summed while in cache.

        A wider buffer is made only for the second of three or more chunks.
        """
        previous = self.sum
        wide_enough = torch.promote_types(self.weight.dtype, self.accum_dtype) == self.weight.dtype
        if last or wide_enough:
            self.sum = self.weight
        elif previous is None or previous is self.weight:
            self.sum = torch.empty_like(self.weight, dtype=self.accum_dtype)
        assert self.sum is not None
        rows = self.weight.shape[0]
        buffer = input.new_empty((min(_SLICE_ROWS, rows), input.shape[1]))
        for start in range(0, rows, _SLICE_ROWS):
            here = slice(start, min(start + _SLICE_ROWS, rows))
            part = buffer[: here.stop - here.start]
            torch.mm(grad_logits[:, here].t(), input, out=part)
            self.accumulate(None if previous is None else previous[here], part, self.sum[here])


def _accumulate(previous: Tensor | None, part: Tensor, out: Tensor) -> None:
    total = part.to(torch.float64)
    out.copy_(total if previous is None else total.add_(previous))
