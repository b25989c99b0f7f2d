"""Every operator of the package: its schema, and its fake for tracing.

The operators exist in every install, whether or not a compiled library was built, so that tracing, fakes and
error messages do not depend on the build. Two layers live here:

* ``*_rows`` operators mutate preallocated outputs and return nothing. The compiled libraries register them
  (CPU, CUDA); the Triton launchers take the same arguments in the same order.
* The others own a whole loop over chunks. They are opaque to ``torch.compile``, because the number of rows
  that they work on depends on values. Their bodies stand in ``trimtab.ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIB = torch.library.Library("trimtab", "DEF")

# Shared by the row operators: the logits of a chunk become z = softcap * tanh(logit_scale * logits / softcap)
# (softcap 0 stands for none), times inv_temperature[row] where there is one.
_TRANSFORM = "int ignore_index, float logit_scale, float softcap"

_LIB.define(
    "token_loss_rows(Tensor logits, Tensor target, Tensor? coef, Tensor? class_weight, "
    f"{_TRANSFORM}, float label_smoothing, float lse_square_scale, "
    "Tensor(a!) loss, Tensor(b!)? grad) -> ()"
)
_LIB.define(
    "token_logp_rows(Tensor logits, Tensor target, Tensor? inv_temperature, "
    f"{_TRANSFORM}, Tensor(a!) logp, Tensor(b!) entropy, Tensor(c!) lse, Tensor(d!) predicted, "
    "Tensor(e!)? grad) -> ()"
)
_LIB.define(
    "token_logp_rows_backward(Tensor logits, Tensor target, Tensor? inv_temperature, "
    f"{_TRANSFORM}, Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, "
    "Tensor(a!) grad) -> ()"
)
_LIB.define("accumulate(Tensor? accumulator, Tensor part, Tensor(a!) out) -> ()")

_LIB.define(
    "token_loss(Tensor logits, Tensor target, Tensor? coef, Tensor? class_weight, "
    f"{_TRANSFORM}, float label_smoothing, float lse_square_scale, bool with_grad, str impl) "
    "-> (Tensor loss, Tensor grad)"
)
_LIB.define(
    "linear_token_loss(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? coef, "
    f"Tensor? class_weight, {_TRANSFORM}, float label_smoothing, float lse_square_scale, "
    "bool[3] needs_grad, bool skip_zero_coef, int? chunk_size, ScalarType accum_dtype, "
    "ScalarType compute_dtype, str impl) "
    "-> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_scale)"
)
_LIB.define(
    "linear_token_logp(Tensor input, Tensor weight, Tensor? bias, Tensor target, "
    f"Tensor? inv_temperature, {_TRANSFORM}, bool with_unit_grad, int? chunk_size, "
    "ScalarType compute_dtype, str impl) "
    "-> (Tensor logp, Tensor entropy, Tensor lse, Tensor predicted, Tensor unit_grad)"
)
_LIB.define(
    "linear_token_logp_backward(Tensor input, Tensor weight, Tensor? bias, Tensor target, "
    f"Tensor? inv_temperature, {_TRANSFORM}, "
    "Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, bool[3] needs_grad, "
    "int? chunk_size, ScalarType accum_dtype, ScalarType compute_dtype, str impl) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of every per-token result: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fill(like: Tensor, shape: tuple, needed: bool, dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape if needed else (0,), dtype=dtype)


for _rows in ("token_loss_rows", "token_logp_rows", "token_logp_rows_backward", "accumulate"):

    @torch.library.register_fake(f"trimtab::{_rows}", lib=_LIB)
    def _(*args: object) -> None:
        return None


@torch.library.register_fake("trimtab::token_loss", lib=_LIB)
def _(logits, target, coef, class_weight, ignore_index, logit_scale, softcap, label_smoothing,
      lse_square_scale, with_grad, impl):  # fmt: skip
    loss = logits.new_empty(target.shape, dtype=result_dtype(logits.dtype))
    return loss, _fill(logits, tuple(logits.shape), with_grad, logits.dtype)


@torch.library.register_fake("trimtab::linear_token_loss", lib=_LIB)
def _(input, weight, bias, target, coef, class_weight, ignore_index, logit_scale, softcap, label_smoothing,
      lse_square_scale, needs_grad, skip_zero_coef, chunk_size, accum_dtype, compute_dtype, impl):  # fmt: skip
    return (
        input.new_empty(target.shape, dtype=result_dtype(compute_dtype)),
        *_fake_grads(input, weight, bias, needs_grad),
        input.new_empty((), dtype=result_dtype(compute_dtype)),
    )


@torch.library.register_fake("trimtab::linear_token_logp", lib=_LIB)
def _(input, weight, bias, target, inv_temperature, ignore_index, logit_scale, softcap, with_unit_grad,
      chunk_size, compute_dtype, impl):  # fmt: skip
    result = result_dtype(compute_dtype)
    return (
        *(input.new_empty(target.shape, dtype=result) for _ in range(3)),
        input.new_empty(target.shape, dtype=torch.int64),
        _fill(input, tuple(input.shape), with_unit_grad, compute_dtype),
    )


@torch.library.register_fake("trimtab::linear_token_logp_backward", lib=_LIB)
def _(input, weight, bias, target, inv_temperature, ignore_index, logit_scale, softcap, grad_logp,
      grad_entropy, grad_lse, needs_grad, chunk_size, accum_dtype, compute_dtype, impl):  # fmt: skip
    return _fake_grads(input, weight, bias, needs_grad)


def _fake_grads(
    input: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _fill(input, tuple(input.shape), needs_grad[0], input.dtype),
        _fill(weight, tuple(weight.shape), needs_grad[1], weight.dtype),
        _fill(
            input,
            (weight.shape[0],),
            needs_grad[2],
            bias.dtype if bias is not None else input.dtype,
        ),
    )
