"""Cut Cross-Entropy's linear cross entropy by our kernels: change the import, keep the call.

Names, arguments and meanings are those of cut-cross-entropy 25.1.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.ops.token_loss import linear_cross_entropy as our_linear_cross_entropy

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]

_OURS = ("reference", "native", "triton")


def linear_cross_entropy(
    e: Tensor,  # (..., D)
    c: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool = False,
    filter_eps: float | str | None = "high",
    impl: Any = "cce",
) -> Tensor:
    """Cross entropy of a linear head without its logits in memory.

    ``trimtab.linear_cross_entropy``, of which it has the formula, the cost and the errors.

    Args:
        e: hidden states.
        c: the head, of the hidden states' dtype unless under autocast.
        targets: int64 class indices.
        ignore_index: target that gives no loss and no gradient.
        softcap: bound of the logits.
        reduction: "mean", "sum" or "none".
        shift: position t predicts ``targets[..., t + 1]``; "none" then has one entry fewer in its
            last dimension.
        filter_eps: how small a probability may be for its gradient to be left out: None, a
            number, "auto" or "high". Ours leaves out nothing, which every value allows, so the
            gradient is that of None.
        impl: "cce" for the fastest of ours, or "reference", "native", "triton".

    Raises:
        ValueError: a value that does not fit, or an implementation that is not ours
            ("torch_compile").
        TypeError: a dtype that does not fit.
        IndexError: a target outside the vocabulary.
    """
    name = getattr(impl, "name", impl)
    name = name.lower() if isinstance(name, str) else name
    if name not in ("cce", None, *_OURS):
        raise ValueError(
            f"impl must be 'cce', 'reference', 'native' or 'triton', got {impl!r}; call "
            "cut_cross_entropy for its own"
        )
    allowed = filter_eps is None or isinstance(filter_eps, (int, float))
    if not allowed and filter_eps not in ("auto", "high"):
        raise ValueError(
            f"filter_eps must be None, a number, 'auto' or 'high', got {filter_eps!r}; "
            "the gradient is exact with each of them"
        )
    if shift:
        if targets.dim() == 0 or targets.shape != e.shape[:-1]:
            raise ValueError(
                f"targets must have the shape {tuple(e.shape[:-1])} of e with shift=True, got "
                f"{tuple(targets.shape)}; give one per position"
            )
        # Ignoring a last position costs nothing; cutting it off would copy the hidden states.
        targets = F.pad(targets, (0, 1), value=ignore_index)[..., 1:]
    loss = our_linear_cross_entropy(
        e, c, targets, ignore_index=ignore_index, softcap=softcap, reduction=reduction,
        impl=name if name in _OURS else None,
    )  # fmt: skip
    return loss[..., :-1] if shift and reduction == "none" else loss


class LinearCrossEntropy(torch.nn.Module):
    """``linear_cross_entropy`` as a module."""

    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        filter_eps: float | str | None = "high",
        shift: bool = False,
        impl: Any = "cce",
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.softcap = softcap
        self.reduction = reduction
        self.filter_eps = filter_eps
        self.shift = shift
        self.impl = impl

    def forward(
        self,
        e: Tensor,  # (..., D)
        c: Tensor,  # (V, D)
        targets: Tensor,  # (...)
    ) -> Tensor:
        """The loss of hidden states under a head; see ``linear_cross_entropy``."""
        return linear_cross_entropy(
            e, c, targets, self.ignore_index, self.softcap, reduction=self.reduction,
            filter_eps=self.filter_eps, shift=self.shift, impl=self.impl,
        )  # fmt: skip
