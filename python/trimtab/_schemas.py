"""Every operator of the package: its schema, and its fake for tracing.

The operators exist in every install, whether or not a compiled library was built, so that tracing,
fakes and error messages do not depend on the build. Two layers live here:

* ``*_rows`` operators mutate preallocated outputs and return nothing. The compiled libraries
  register them (CPU, CUDA); the Triton launchers take the same arguments in the same order.
* The others own a whole loop over chunks. They are opaque to ``torch.compile``, because the number
  of rows that they work on depends on values. Their bodies stand in ``trimtab.ops``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
except ImportError:  # private: it may move
    _register_effectful_op = None  # type: ignore[assignment]

_LIB = torch.library.Library("trimtab", "DEF")

# Shared by the row operators: z = softcap * tanh(logit_scale * logits / softcap), where softcap 0
# stands for none, times inv_temperature[row] where there is one.
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
# The same loop for a whole vocabulary, and for one rank's slice of it with the group's name.
_HEAD = "Tensor input, Tensor weight, Tensor? bias, Tensor target"
for _name, _shard in (("linear", ""), ("sharded", ", str group, bool sequence_parallel")):
    _LIB.define(
        f"{_name}_token_loss({_HEAD}, Tensor? coef, Tensor? class_weight, {_TRANSFORM}, "
        "float label_smoothing, float lse_square_scale, bool[3] needs_grad, bool skip_zero_coef, "
        f"int? chunk_size, ScalarType accum_dtype, ScalarType compute_dtype, str impl{_shard}) "
        "-> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias, "
        "Tensor grad_scale)"
    )
    _LIB.define(
        f"{_name}_token_logp({_HEAD}, Tensor? inv_temperature, {_TRANSFORM}, bool with_unit_grad, "
        f"int? chunk_size, ScalarType compute_dtype, str impl{_shard}) "
        "-> (Tensor logp, Tensor entropy, Tensor lse, Tensor predicted, Tensor unit_grad)"
    )
    _LIB.define(
        f"{_name}_token_logp_backward({_HEAD}, Tensor? inv_temperature, {_TRANSFORM}, "
        "Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, bool[3] needs_grad, "
        f"int? chunk_size, ScalarType accum_dtype, ScalarType compute_dtype, str impl{_shard}) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    )
_LIB.define("group_sum(Tensor values, str group, str? first_call=None) -> Tensor")
_LIB.define("gather_logits(Tensor logits, str group) -> Tensor")
_LIB.define(
    "sharded_class_weight_sum(Tensor class_weight, Tensor target, int ignore_index, str group, "
    "bool sequence_parallel) -> Tensor"
)
# A compiler may not reorder what talks to other ranks: two calls that do not depend on each other
# came in another order on a rank whose number of tokens, 1, had a graph of its own (inductor).
# In torch 2.10 graphs with such operators fail in the partitioner; 2.13 and 2.14 were tried.
_KEEPS_ORDER = _register_effectful_op is not None and torch.__version__ >= "2.13"
for _name in (
    "sharded_token_loss",
    "sharded_token_logp",
    "sharded_token_logp_backward",
    "sharded_class_weight_sum",
    "group_sum",
    "gather_logits",
):
    if _KEEPS_ORDER:
        _register_effectful_op(getattr(torch.ops.trimtab, _name).default, _EffectType.ORDERED)

# Shared by the contrast operators. A number and, where rows differ, one per row: the tensor wins.
_ROWS = "Tensor positive, Tensor? negative, Tensor? anchor"
_COMBINE = "float alpha, Tensor? alpha_rows"
_MASK = "float log_beta, Tensor? log_beta_rows"
_TEMPERATURE = "float temperature, Tensor? temperature_rows"
_LOGP = f"{_ROWS}, Tensor target, {_COMBINE}, {_TEMPERATURE}, int ignore_index"
_SAMPLE = (
    f"{_ROWS}, Tensor? positive_rows, Tensor? negative_rows, Tensor? anchor_rows, {_COMBINE}, "
    f"{_MASK}, {_TEMPERATURE}, int top_k, Tensor? top_k_rows, float tail, Tensor? tail_rows, "
    "float log_min_p, Tensor? log_min_p_rows, {integer} seed, Tensor? seed_rows, "
    "{integer} position, Tensor? position_rows"
)

_LIB.define(f"contrastive_logits_rows({_ROWS}, {_COMBINE}, {_MASK}, Tensor(a!) out) -> ()")
_LIB.define(f"contrastive_logp_rows({_LOGP}, Tensor(a!) logp) -> ()")
_LIB.define(
    f"contrastive_logp_rows_backward({_LOGP}, Tensor grad_logp, Tensor(a!)? grad_positive, "
    "Tensor(b!)? grad_negative, Tensor(c!)? grad_anchor) -> ()"
)
_LIB.define(
    f"contrastive_sample_rows({_SAMPLE.format(integer='int')}, Tensor(a!) token, Tensor(b!) logp, "
    "Tensor(c!) kept) -> ()"
)

_LIB.define(f"contrastive_logits({_ROWS}, {_COMBINE}, {_MASK}, str impl) -> Tensor")
_LIB.define(f"contrastive_logp({_LOGP}, str impl) -> Tensor")
_LIB.define(
    f"contrastive_logp_backward({_LOGP}, Tensor grad_logp, bool[3] needs_grad, str impl) "
    "-> (Tensor grad_positive, Tensor grad_negative, Tensor grad_anchor)"
)
_LIB.define(
    # Symbolic integers: decoding compiles once, not once per step and batch.
    f"contrastive_sample({_SAMPLE.format(integer='SymInt')}, SymInt rows, str impl) "
    "-> (Tensor token, Tensor logp, Tensor kept)"
)

# Shared by the penalty's two layers: `previous` holds the tensors of every module one after the
# other, counts[m] of them belong to module m. The gradients are flat: one contiguous block for each
# tensor, in the order of the list.
_PENALTY = "Tensor[] previous, int[] counts, Tensor[] current, Tensor? weight, bool squared"

_LIB.define(
    f"orthogonal_penalty_rows({_PENALTY}, Tensor(a!) value, Tensor(b!)? grad_current, "
    "Tensor(c!)? grad_previous) -> ()"
)
_LIB.define("project_out_rows(Tensor[] tensors, Tensor[] bases, Tensor(a!)[] outs) -> ()")
_LIB.define(
    f"orthogonal_penalty({_PENALTY}, bool[2] needs_grad, str impl) "
    "-> (Tensor value, Tensor grad_current, Tensor grad_previous)"
)
# Flat like the gradients: operators may not return tensors that share memory.
_LIB.define("project_out(Tensor[] tensors, Tensor[] bases, str impl) -> Tensor")


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of every per-token result: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fill(like: Tensor, shape: torch.Size, needed: bool, dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape if needed else (0,), dtype=dtype)


for _rows in (
    "token_loss_rows",
    "token_logp_rows",
    "token_logp_rows_backward",
    "accumulate",
    "contrastive_logits_rows",
    "contrastive_logp_rows",
    "contrastive_logp_rows_backward",
    "contrastive_sample_rows",
    "orthogonal_penalty_rows",
    "project_out_rows",
):

    @torch.library.register_fake(f"trimtab::{_rows}", lib=_LIB)
    def _(*args: object) -> None:
        return None


@torch.library.register_fake("trimtab::token_loss", lib=_LIB)
def _(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    with_grad, dtype = options[-2], logits.dtype
    loss = logits.new_empty(target.shape, dtype=result_dtype(dtype))
    return loss, _fill(logits, logits.shape, with_grad, dtype)


@torch.library.register_fake("trimtab::linear_token_loss", lib=_LIB)
def _fake_linear_token_loss(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    needs_grad, result = options[7], result_dtype(options[-2])
    loss = input.new_empty(target.shape, dtype=result)
    scale = input.new_empty((), dtype=result)
    return (loss, *_fake_grads(input, weight, bias, needs_grad), scale)


@torch.library.register_fake("trimtab::linear_token_logp", lib=_LIB)
def _fake_linear_token_logp(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    with_unit_grad, compute_dtype = options[4], options[-2]
    per_token = [input.new_empty(target.shape, dtype=result_dtype(compute_dtype)) for _ in range(3)]
    predicted = input.new_empty(target.shape, dtype=torch.int64)
    return (*per_token, predicted, _fill(input, input.shape, with_unit_grad, compute_dtype))


@torch.library.register_fake("trimtab::linear_token_logp_backward", lib=_LIB)
def _fake_linear_token_logp_backward(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    return _fake_grads(input, weight, bias, options[7])


for _name, _fake in (
    ("sharded_token_loss", _fake_linear_token_loss),
    ("sharded_token_logp", _fake_linear_token_logp),
    ("sharded_token_logp_backward", _fake_linear_token_logp_backward),
):

    @torch.library.register_fake(f"trimtab::{_name}", lib=_LIB)
    def _(*arguments: Any, _fake: Any = _fake) -> tuple[Tensor, ...]:
        *same, _group, _sequence_parallel = arguments
        return _fake(*same)


@torch.library.register_fake("trimtab::group_sum", lib=_LIB)
def _(values: Tensor, group: str, first_call: str | None = None) -> Tensor:
    return values.new_empty(values.shape)


@torch.library.register_fake("trimtab::gather_logits", lib=_LIB)
def _(logits: Tensor, group: str) -> Tensor:
    # The other ranks' slices are not known while tracing.
    classes = torch.library.get_ctx().new_dynamic_size(min=logits.shape[1])
    return logits.new_empty((logits.shape[0], classes))


@torch.library.register_fake("trimtab::sharded_class_weight_sum", lib=_LIB)
def _(class_weight: Tensor, *arguments: Any) -> Tensor:
    return class_weight.new_empty(())


def _fake_grads(
    input: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    like_bias = input if bias is None else bias
    return (
        _fill(input, input.shape, needs_grad[0], input.dtype),
        _fill(weight, weight.shape, needs_grad[1], weight.dtype),
        _fill(input, weight.shape[:1], needs_grad[2], like_bias.dtype),
    )


@torch.library.register_fake("trimtab::contrastive_logits", lib=_LIB)
def _(positive: Tensor, *options: Any) -> Tensor:
    return positive.new_empty(positive.shape, dtype=result_dtype(positive.dtype))


@torch.library.register_fake("trimtab::contrastive_logp", lib=_LIB)
def _(positive: Tensor, *options: Any) -> Tensor:
    return positive.new_empty(positive.shape[:1], dtype=result_dtype(positive.dtype))


@torch.library.register_fake("trimtab::contrastive_logp_backward", lib=_LIB)
def _(
    positive: Tensor, negative: Tensor, anchor: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    needs_grad = options[-2]
    return tuple(_fill(positive, positive.shape, need, positive.dtype) for need in needs_grad)


@torch.library.register_fake("trimtab::contrastive_sample", lib=_LIB)
def _(positive: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = (options[-2],)
    token = positive.new_empty(rows, dtype=torch.int64)
    logp = positive.new_empty(rows, dtype=result_dtype(positive.dtype))
    return token, logp, torch.empty_like(token)


@torch.library.register_fake("trimtab::orthogonal_penalty", lib=_LIB)
def _(previous: list[Tensor], counts: list[int], current: list[Tensor], *options: Any) -> Any:
    like, (needs_current, needs_previous) = current[0], options[-2]
    dtype = result_dtype(like.dtype)
    return (
        like.new_empty((), dtype=dtype),
        like.new_empty(sum(t.numel() for t in current) if needs_current else 0, dtype=dtype),
        like.new_empty(sum(t.numel() for t in previous) if needs_previous else 0, dtype=dtype),
    )


@torch.library.register_fake("trimtab::project_out", lib=_LIB)
def _(tensors: list[Tensor], bases: list[Tensor], impl: str) -> Tensor:
    return tensors[0].new_empty(sum(t.numel() for t in tensors))
