"""Validation and flattening: bad input is met here, before any kernel runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab._choose import Choice, choose
from trimtab._schemas import result_dtype
from trimtab.ops._checks import (
    FLOATING,
    bad,
    check_devices,
    check_floating,
    check_target,
    looks_at_values,
)

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class TokenLossOptions:
    """How the loss over a linear head is computed; the result's meaning never depends on it.

    Attributes:
        chunk_size: rows of logits in memory at a time; None for the measured rule of the device.
        accum_dtype: dtype in which the head's gradient is summed over chunks and, with ``group``,
            the input's over the ranks. For a 16-bit head ``torch.float32`` costs one (V, D) buffer
            when there are three or more chunks (on CUDA: always), and with ``group`` twice the
            bytes; the head's own dtype rounds at every chunk and rank.
        skip_zero_weight: leave out the rows whose every token weight is 0, as ignored rows are.
            On CUDA finding them costs one synchronisation, so there it is done only outside
            graph capture.
        deterministic: None follows ``torch.use_deterministic_algorithms``. Every kernel of this
            family is deterministic, so no value of it changes anything.
        sequence_parallel: with ``group``: the ranks bring tokens of their own (any number, also
            none) in place of all of them the same. Tokens and inputs are gathered, per-token
            results and the input's gradient are of the own tokens, a mean, a sum and their divisor
            go over the tokens of all ranks.
    """

    chunk_size: int | None = None
    accum_dtype: torch.dtype = torch.float32
    skip_zero_weight: bool = True
    deterministic: bool | None = None
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.chunk_size is not None and (
            not isinstance(self.chunk_size, int) or self.chunk_size < 1
        ):
            raise ValueError(
                f"chunk_size must be a positive number of rows or None, got {self.chunk_size}; "
                "None lets the device's rule decide"
            )
        if self.accum_dtype not in FLOATING:
            raise TypeError(
                f"accum_dtype must be a floating dtype, got {self.accum_dtype}; use torch.float32"
            )


class Head(NamedTuple):
    """A flattened call on a linear head."""

    input: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    target: Tensor  # (N,)
    compute_dtype: torch.dtype
    shape: torch.Size  # of the target as given


def check_options(options: object) -> TokenLossOptions:
    """The options given, or the defaults."""
    if options is None:
        return TokenLossOptions()
    if not isinstance(options, TokenLossOptions):
        raise TypeError(
            f"options must be a TokenLossOptions, got {type(options).__name__}; "
            "use trimtab.TokenLossOptions(...)"
        )
    return options


def check_head(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    name: str = "input",
    *,
    may_be_empty: bool = False,
) -> Head:
    """Shapes, devices and dtypes of a linear head's arguments; flattens the leading dimensions.

    ``name`` is what the operator calls its hidden states; ``may_be_empty`` is for the slice of a
    vocabulary that other ranks hold more of.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"linear_weight must be a tensor, got {type(weight).__name__}; pass the head's weight"
        )
    if weight.dim() != 2:
        raise bad("linear_weight", "of shape (V, D)", tuple(weight.shape),
                  "pass the head's weight as nn.Linear stores it")  # fmt: skip
    if weight.shape[1] == 0 or (weight.shape[0] == 0 and not may_be_empty):
        raise bad("linear_weight", "non-empty", tuple(weight.shape),
                  "a sharded (ZeRO-3, FSDP) weight has to be gathered first")  # fmt: skip
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise bad(name, f"of shape (..., {weight.shape[1]})", tuple(input.shape),
                  "check which hidden states belong to this head")  # fmt: skip
    check_target(target, input.shape[:-1])
    if bias is not None and bias.shape != weight.shape[:1]:
        raise bad(
            "linear_bias",
            f"of shape ({weight.shape[0]},)",
            tuple(bias.shape),
            "one number per class",
        )
    check_devices(input, {"linear_weight": weight, "target": target, "linear_bias": bias}, name)
    dtype = compute_dtype(input, weight, bias, name)
    flat = input.reshape(-1, input.shape[-1])
    return Head(flat, weight, bias, target.reshape(-1), dtype, target.shape)


def compute_dtype(
    input: Tensor, weight: Tensor, bias: Tensor | None, name_of_input: str = "input"
) -> torch.dtype:
    """Dtype of the products: autocast's if it is on, as for ``F.linear``; else the common one."""
    for name, tensor in ((name_of_input, input), ("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None:
            check_floating(name, tensor)
    device = input.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (input.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(
                f"{name} must be {input.dtype} as {name_of_input} is, got {tensor.dtype}; cast one "
                "of them, or run under torch.autocast"
            )
    return input.dtype


def check_class_weight(weight: Tensor | None, classes: int, like: Tensor) -> Tensor | None:
    """Class weights as contiguous (V,) in the result's dtype."""
    if weight is None:
        return None
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise bad("weight", f"of shape ({classes},), one per class", tuple(weight.shape),
                  "token_weight= takes one weight per token")  # fmt: skip
    check_floating("weight", weight)
    if weight.requires_grad:
        raise bad("weight", "without gradient", "requires_grad=True",
                  "class weights are constants: weight.detach(), or token_weight=")  # fmt: skip
    check_devices(like, {"weight": weight})
    return weight.to(result_dtype(like.dtype)).contiguous()


def check_scalars(
    *,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
) -> float:
    """Ranges of the scalar options. Returns the softcap, 0 for none, as the kernels take it."""
    given = {
        "label_smoothing": label_smoothing,
        "softcap": softcap or 0.0,
        "logit_scale": logit_scale,
        "lse_square_scale": lse_square_scale,
    }
    for name, value in given.items():
        if not isinstance(value, (int, float)):
            raise TypeError(
                f"{name} must be a number, got {type(value).__name__}; a tensor's gradient would "
                "be lost: scale `input` by it, or pass float(...)"
            )
        if not -math.inf < value < math.inf:
            raise bad(name, "finite", value, "leave it out for the default")
    if not 0.0 <= label_smoothing <= 1.0:
        raise bad("label_smoothing", "in [0, 1]", label_smoothing, "0 turns it off")
    if softcap is not None and not softcap > 0.0:
        raise bad("softcap", "positive or None", softcap, "None turns it off")
    return 0.0 if softcap is None else float(softcap)


def check_reduction(
    reduction: str,
    normalizer: object,
    token_weight: Tensor | None,
    count: int | None,
    normalizer_group: object = None,
) -> None:
    """Reduction, and whether its divisor makes sense."""
    if reduction not in REDUCTIONS:
        raise bad(
            "reduction", "'mean', 'sum' or 'none'", repr(reduction), "see torch's cross_entropy"
        )
    if normalizer_group is not None and (
        reduction != "mean" or isinstance(normalizer, (int, float, Tensor))
    ):
        raise bad("normalizer_group", "None unless reduction='mean' counts its own divisor",
                  f"reduction={reduction!r}, normalizer={normalizer!r}",
                  "a number is used as it is: sum it over the ranks yourself")  # fmt: skip
    if normalizer is None:
        return
    if reduction != "mean":
        raise bad("normalizer", "None unless reduction='mean'", repr(normalizer),
                  f"it divides the mean; divide the {reduction!r} result yourself")  # fmt: skip
    if isinstance(normalizer, str) and normalizer != "token_weight":
        raise bad("normalizer", "a number, a tensor or 'token_weight'", repr(normalizer),
                  "None divides by the number of tokens")  # fmt: skip
    if isinstance(normalizer, str) and token_weight is None:
        raise bad(
            "token_weight", "given when normalizer='token_weight'", None, "leave normalizer out"
        )
    if isinstance(normalizer, Tensor) and normalizer.numel() not in (1, count):
        raise bad("normalizer", "one number, or one per weight vector", tuple(normalizer.shape),
                  "use normalizer.sum() for one")  # fmt: skip


def check_token_weight(token_weight: Tensor | None, target: Tensor) -> int | None:
    """Shape of the token weights: K for ``(K,) + target.shape``, None for ``target``'s shape."""
    if token_weight is None:
        return None
    check_floating("token_weight", token_weight)
    check_devices(target, {"token_weight": token_weight})
    if token_weight.shape == target.shape:
        return None
    if token_weight.dim() != target.dim() + 1 or token_weight.shape[1:] != target.shape:
        shape = tuple(target.shape)
        given = tuple(token_weight.shape)
        raise bad("token_weight", f"of shape {shape} or (K, {str(shape)[1:]}", given,
                  "one weight per token, or K vectors of them")  # fmt: skip
    return token_weight.shape[0]


def inverse_temperature(temperature: float | Tensor, head: Head) -> Tensor | None:
    """``1 / temperature`` per token, (N,) in the result's dtype; None for a temperature of 1."""
    dtype = result_dtype(head.compute_dtype)
    least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(
                f"temperature must be a number or a tensor, got {type(temperature).__name__}; "
                "one number for all tokens, or a tensor with one per token"
            )
        if not least <= temperature <= most:
            raise bad(
                "temperature",
                "positive and finite",
                temperature,
                "the limit 0 is an argmax: see `predicted`",
            )
        if temperature == 1.0:
            return None
        return torch.full(
            head.target.shape, 1.0 / temperature, dtype=dtype, device=head.target.device
        )
    if temperature.requires_grad:
        raise bad(
            "temperature", "without gradient", "requires_grad=True", "use temperature.detach()"
        )
    check_devices(head.target, {"temperature": temperature})
    if temperature.dim() > 0 and temperature.shape != head.shape:
        shape = tuple(head.shape)
        raise bad("temperature", f"a number or of shape {shape}", tuple(temperature.shape),
                  "one temperature per token")  # fmt: skip
    if looks_at_values(temperature) and bool(
        (~((temperature >= least) & (temperature <= most))).any()
    ):
        raise bad("temperature", "positive and finite everywhere", temperature.tolist(), "clamp it")
    return temperature.to(dtype).reciprocal().expand(head.shape).reshape(-1)


def check_no_group(group: object, normalizer_group: object) -> None:
    """A K-dimensional head has no slices."""
    for name, given in (("group", group), ("normalizer_group", normalizer_group)):
        if given is not None:
            raise bad(name, "None with a K-dimensional head", given, "gather the head first")


def choice_for_head(op: str, arguments: dict[str, Any]) -> Choice:
    """What ``explain`` answers for an operator on a linear head."""
    input, weight = arguments["input"], arguments["linear_weight"]
    bias = arguments.get("linear_bias")
    return choose(op, input.device.type, compute_dtype(input, weight, bias), arguments["impl"])


def class_last(logits: Tensor) -> Tensor:
    """Torch's ``(N, C, d1, ...)`` as rows ``(N * d1 * ..., C)``."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1]) if logits.dim() > 1 else logits[None]


def multi_dimensional_logits(
    input: Tensor, weight: Tensor, bias: Tensor | None, options: TokenLossOptions | None
) -> Tensor:
    """Logits ``(N, C, d1, ...)`` of torch's K-dimensional head ``(C, d1, ..., D)``."""
    if options is not None:
        raise bad(
            "options", "None with a K-dimensional head", options, "its logits are made at once"
        )
    if weight.numel() == 0:
        raise bad("linear_weight", "non-empty", tuple(weight.shape), "gather a sharded one first")
    if input.dim() != 2 or input.shape[1] != weight.shape[-1]:
        raise bad("input", f"of shape (N, {weight.shape[-1]}) for a K-dimensional head",
                  tuple(input.shape), "flatten its leading dimensions")  # fmt: skip
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise bad("linear_bias", f"of shape {tuple(weight.shape[:-1])}", tuple(bias.shape),
                  "one number per class and position")  # fmt: skip
    compute_dtype(input, weight, bias)
    flat_bias = None if bias is None else bias.reshape(-1)
    logits = F.linear(input, weight.reshape(-1, weight.shape[-1]), flat_bias)
    return logits.reshape(input.shape[0], *weight.shape[:-1])
