"""The loss of a model's forward pass from what goes into its head, in the place of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.algorithms.causal_lm import linear_head, logit_transform
from trimtab.ops.token_loss import TokenLossOptions, cross_entropy, linear_cross_entropy


@dataclass(frozen=True)
class Settings:
    """How a model's loss is to be computed; it travels with copies and pickles of the model."""

    return_logits: bool | None = None
    logit_scale: float | None = None
    softcap: float | None = None
    impl: str | None = None
    options: TokenLossOptions | None = None


class DeferredLoss:
    """The loss of one forward pass: it sees what goes into the head, and the call of the loss."""

    takes_slices = True  # a head in slices, by tensor parallelism

    def __init__(self, model: Any, settings: Settings, weights: Tensor | None = None) -> None:
        self.model, self.settings, self.weights = model, settings, weights
        self.hidden: Tensor | None = None
        self.mesh: Any = None  # of the head while it was called
        self.calls = 0

    @contextlib.contextmanager
    def in_place(self, keep_logits: bool = False) -> Iterator[None]:
        """The model's loss function is ours within it, and its head makes logits of width 0.

        What the model does to its logits (scale, softcap, casts) then costs nothing.
        """
        own = self.model.loss_function
        with replaced(self.model, "_loss_function", self.of_batch, own):
            if keep_logits:
                yield
                return
            head = self.model.get_output_embeddings()
            with replaced(head, "forward", self.take_hidden, head.forward):
                yield

    def take_hidden(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """Stands in for the head's forward."""
        self.mesh = mesh_of(self.model.get_output_embeddings())
        self.hidden = whole(hidden)
        return hidden.new_empty((*hidden.shape[:-1], 0))

    def of_batch(
        self,
        logits: Tensor,
        labels: Tensor | None = None,  # (B, T)
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,  # (B, T)
        **_: Any,
    ) -> Tensor:
        """Stands in for ``ForCausalLMLoss``, of which it has the arguments."""
        self.calls += 1
        rows = logits if self.hidden is None else self.hidden
        target = shifted(labels, ignore_index) if shift_labels is None else shift_labels
        check_positions(target, rows)
        weights = shifted_weights(self.weights, labels)
        given = {
            "token_weight": None if weights is None else weights.reshape(-1).to(rows.device),
            "normalizer": _on_device(num_items_in_batch, rows.device),
            "ignore_index": ignore_index,
            "impl": self.settings.impl,
        }
        target = target.reshape(-1).to(rows.device)
        if self.hidden is None:
            check_classes(logits, self.model.get_output_embeddings())
            return cross_entropy(logits.reshape(len(target), -1), target, **given)
        hidden, weight, transform = self.head()
        return linear_cross_entropy(
            hidden.reshape(len(target), -1), weight, target, options=self.settings.options,
            **transform, **given,
        )  # fmt: skip

    def _check_layout(self, output: Any) -> None:
        """The head lies as it did when it was called, in a way that our loss can use."""
        now = mesh_of(output)
        if now != self.mesh:
            raise ValueError(
                f"model must keep its head as its forward had it until the loss, got it back on "
                f"{now}; leave the head in the root unit of FSDP, or pass "
                "reshard_after_forward=False for its own"
            )
        if now is not None and not self.takes_slices:
            raise ValueError(
                "model must have a whole head, got a DTensor; leave the head out of the "
                "tensor-parallel plan"
            )
        if now is not None and hasattr(output, "base_layer"):
            raise ValueError(
                "model must have a head without adapters where it is a DTensor, got "
                f"{type(output).__name__}; leave the head out of the adapters' targets or out of "
                "the tensor-parallel plan"
            )

    def head(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Input (B, T, D) and weight (V, D) of the head, and what else makes logits of them."""
        assert self.hidden is not None, "the head has been called"
        scale, softcap = transform_of(self.model, self.settings)
        output = self.model.get_output_embeddings()
        self._check_layout(output)
        hidden, weight, bias = linear_head(output, self.hidden)
        return hidden, weight, {"linear_bias": bias, "logit_scale": scale, "softcap": softcap}


def mesh_of(head: Any) -> Any:
    """The device mesh of a head whose weight is a DTensor, else None."""
    return getattr(getattr(getattr(head, "base_layer", head), "weight", None), "device_mesh", None)


def whole(hidden: Tensor) -> Tensor:
    """What goes into a head as a plain tensor: torch's tensor parallelism passes a DTensor."""
    if not hasattr(hidden, "placements"):
        return hidden
    if not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(
            "model must give its head hidden states that every rank has all of, got "
            f"{hidden.placements}; put the head into the tensor-parallel plan as "
            "ColwiseParallel(output_layouts=Replicate())"
        )
    return hidden.to_local()  # type: ignore[attr-defined]


def check_positions(
    target: Tensor,
    rows: Tensor,  # (..., D)
) -> None:
    """There is a target for each position that reached the head."""
    if target.numel() != rows[..., 0].numel():
        raise ValueError(
            f"labels must be one per position {tuple(rows.shape[:-1])}, got "
            f"{tuple(target.shape)}; leave logits_to_keep out"
        )


def check_classes(
    logits: Tensor,  # (..., V)
    head: Any,
) -> None:
    """Where tensor parallelism cuts a head, its logits are nevertheless those of all classes."""
    if mesh_of(head) is not None and logits.shape[-1] != head.weight.shape[0]:
        raise ValueError(
            f"model must give the logits of all {head.weight.shape[0]} classes to a loss, got "
            f"{logits.shape[-1]}; pass return_logits=False, or put the head into the "
            "tensor-parallel plan as ColwiseParallel(output_layouts=Replicate())"
        )


def shifted(labels: Tensor | None, ignore_index: int) -> Tensor:
    """What each position predicts; the last one nothing."""
    if labels is None:
        raise ValueError("labels must be given, got None; or pass shift_labels beside them")
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def shifted_weights(
    weights: Tensor | None,  # (B, T)
    labels: Tensor | None,  # (B, T)
) -> Tensor | None:
    """Token weights moved with their labels."""
    if weights is None:
        return None
    if labels is None or weights.shape != labels.shape:
        wanted = None if labels is None else tuple(labels.shape)
        raise ValueError(
            f"loss_weights must have the shape of labels {wanted}, got {tuple(weights.shape)}; "
            "give one weight per label"
        )
    weights = weights if weights.is_floating_point() else weights.float()
    return F.pad(weights, (0, 1))[..., 1:]


def _on_device(count: Any, device: torch.device) -> Any:
    return count.to(device) if isinstance(count, Tensor) else count


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any, absent: Any) -> Iterator[None]:
    """An attribute of an instance set within it, and afterwards what it was.

    Where there was none there is none again, or, in compiled code, ``absent``: Dynamo can't undo
    setting an attribute.
    """
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is not None or torch.compiler.is_compiling():
            setattr(owner, name, absent if before is None else before)
        else:
            delattr(owner, name)


def transform_of(model: Any, settings: Settings) -> tuple[float, float | None]:
    """Scale and softcap: what ``apply`` was given, else what the configuration says now."""
    scale, softcap = logit_transform(model.config.get_text_config())
    scale = scale if settings.logit_scale is None else settings.logit_scale
    return scale, softcap if settings.softcap is None else settings.softcap
