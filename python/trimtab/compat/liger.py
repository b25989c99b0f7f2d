"""Liger Kernel's fused linear cross entropy by our kernels: change the import, keep the call.

Names, arguments and meanings are those of liger-kernel 0.8.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.ops.token_loss import TokenLossOptions, linear_cross_entropy, linear_logp

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCrossEntropyLoss",
    "liger_fused_linear_cross_entropy",
]


@dataclass
class CrossEntropyOutput:
    """The loss and what else was asked for; the others are None and have no gradient."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_fused_linear_cross_entropy(
    input: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    bias: Tensor | None = None,  # (V,)
    ce_weight: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy of a linear head without its logits in memory.

    ``trimtab.linear_cross_entropy`` with Liger's choices: the mean over nothing is 0 and not NaN;
    the z-loss is neither weighted by ``ce_weight`` nor divided by its sum, but by the number of
    tokens.

    Cost: 3 products of N x D x V forward and backward, 4 for ``reduction="none"``. One more for
    ``use_token_scaling``, one for whatever is returned beside the loss, and 4 for a z-loss beside
    ``ce_weight`` under a mean.

    Args:
        input: hidden states.
        weight: the head, of the input's dtype unless under autocast.
        target: int64 class indices.
        bias: bias of the head.
        ce_weight: class weights.
        ignore_index: target that gives no loss and no gradient.
        lse_square_scale: weight of the squared log-sum-exp (z-loss), part of the loss.
        label_smoothing: in [0, 1].
        reduction: "mean", "sum" or "none".
        softcap: bound of the logits.
        return_z_loss: also the z-loss, reduced as the loss is.
        accum_dtype: dtype in which the head's gradient is summed over chunks; None for the head's.
        use_token_scaling: weigh each token by the probability of its target, taken as a constant.
        return_token_accuracy: also how often the target has the largest logit (per token for
            "none").
        return_predicted_tokens: also the index of the largest logit, -1 for ignored tokens.
        chunk_mem_const: 1 leaves the size of a chunk of logits to the rule measured for the
            device; a larger number c asks for Liger's chunk, which holds c x N x D numbers.

    Returns:
        The loss, float32 (float64 for float64 inputs); a ``CrossEntropyOutput`` if something else
        was asked for.

    Raises:
        ValueError: a shape, device or value that does not fit.
        TypeError: a dtype that does not fit.
        IndexError: a target outside the vocabulary.
    """
    options = TokenLossOptions(
        chunk_size=_chunk_size(input, weight, chunk_mem_const),
        accum_dtype=weight.dtype if accum_dtype is None else accum_dtype,
    )
    kept = target != ignore_index
    count = kept.sum()
    measured = None
    if use_token_scaling or return_z_loss or return_token_accuracy or return_predicted_tokens:
        with torch.no_grad():
            measured = linear_logp(input, weight, target, linear_bias=bias, softcap=softcap,
                                   ignore_index=ignore_index, options=options)  # fmt: skip
    token_weight = None
    if use_token_scaling:
        assert measured is not None, "it was computed above"
        token_weight = measured.logp.exp()
    divisor = _divisor(target, kept, count, ce_weight) if reduction == "mean" else None
    # Under a mean with class weights the two terms have two divisors.
    apart = reduction == "mean" and ce_weight is not None and lse_square_scale != 0.0
    loss = linear_cross_entropy(
        input, weight, target, linear_bias=bias, weight=ce_weight, token_weight=token_weight,
        reduction=reduction, normalizer=divisor, ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap,
        lse_square_scale=0.0 if apart else lse_square_scale, options=options,
    )  # fmt: skip
    if apart:
        lse = linear_logp(input, weight, target, linear_bias=bias, softcap=softcap,
                          ignore_index=ignore_index, options=options).lse  # fmt: skip
        loss = loss + _z_loss(lse, lse_square_scale, token_weight, reduction, count)
    if measured is None or not (return_z_loss or return_token_accuracy or return_predicted_tokens):
        return loss
    z_loss = _z_loss(measured.lse, lse_square_scale, token_weight, reduction, count)
    right = (measured.predicted == target).float().masked_fill(~kept, 0.0)
    accuracy = right if reduction == "none" else right.sum() / count
    return CrossEntropyOutput(
        loss,
        z_loss if return_z_loss else None,
        accuracy if return_token_accuracy else None,
        measured.predicted if return_predicted_tokens else None,
    )


class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    """``liger_fused_linear_cross_entropy`` as a module; the head comes first in its call."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (N, D)
        target: Tensor,  # (N,)
        bias: Tensor | None = None,  # (V,)
    ) -> Tensor | CrossEntropyOutput:
        """The loss of hidden states under a head; see ``liger_fused_linear_cross_entropy``."""
        return liger_fused_linear_cross_entropy(
            _input, lin_weight, target, bias, self.ce_weight, self.ignore_index,
            self.lse_square_scale, self.label_smoothing, self.reduction, self.softcap,
            self.return_z_loss, self.accum_dtype, self.use_token_scaling,
            self.return_token_accuracy, self.return_predicted_tokens,
        )  # fmt: skip


def _chunk_size(input: Tensor, weight: Tensor, chunk_mem_const: int) -> int | None:
    """Rows of a chunk by Liger's formula, or None for our rule."""
    if isinstance(chunk_mem_const, bool) or not isinstance(chunk_mem_const, int) or (
        chunk_mem_const < 1
    ):  # fmt: skip
        raise ValueError(
            f"chunk_mem_const must be a positive integer, got {chunk_mem_const!r}; leave it at 1"
        )
    if chunk_mem_const == 1 or 0 in input.shape or 0 in weight.shape:
        return None
    rows, width = input.shape[0], input.shape[-1]
    chunks = -(-weight.shape[0] // (chunk_mem_const * width))
    least = -(-rows // chunks)
    return min(rows, 1 << (least - 1).bit_length())


def _divisor(target: Tensor, kept: Tensor, count: Tensor, ce_weight: Tensor | None) -> Tensor:
    """Liger's divisor of a mean; 1 where there is nothing, so that the loss is 0."""
    if ce_weight is None:
        return count.clamp(min=1)
    weights = ce_weight.detach()[target.clamp(0, ce_weight.shape[0] - 1)]
    total = torch.where(kept, weights, 0.0).sum()
    return torch.where(count == 0, 1.0, total)


def _z_loss(
    lse: Tensor,  # (N,)
    scale: float,
    token_weight: Tensor | None,  # (N,)
    reduction: str,
    count: Tensor,  # ()
) -> Tensor:
    """The z-loss of tokens whose log-sum-exp is 0 where they are ignored."""
    terms = scale * lse**2
    if token_weight is not None:
        terms = terms * token_weight
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else terms.sum() / count.clamp(min=1)
