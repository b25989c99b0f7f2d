"""Any Hugging Face causal LM with our loss, one line: ``apply(model)``."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.algorithms.causal_lm import (
    evaluation_mode,
    linear_head,
    logit_transform,
    transform,
)
from trimtab.ops.token_loss import TokenLossOptions, cross_entropy, linear_cross_entropy

__all__ = ["Applied", "apply", "revert"]

_OLDEST = (4, 50)
_CHECKED_TOKENS = 8
_SETTINGS = "_trimtab_settings"  # of a model that our loss is applied to


@dataclass(frozen=True)
class Settings:
    """How a model's loss is to be computed; it travels with copies and pickles of the model."""

    return_logits: bool | None = None
    logit_scale: float | None = None
    softcap: float | None = None
    impl: str | None = None
    options: TokenLossOptions | None = None


class Applied:
    """What ``apply`` has done to a model; undone by ``revert()`` or at the end of a ``with``."""

    def __init__(self, model: Any, previous: Settings | None) -> None:
        self.model = model
        self._previous = previous

    def revert(self) -> None:
        """Back to how the model was before this ``apply``, be it with our loss or without."""
        if self._previous is None:
            revert(self.model)
        else:
            setattr(causal_lm(self.model), _SETTINGS, self._previous)

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


def apply(
    model: Any,
    *,
    return_logits: bool | None = None,
    logit_scale: float | None = None,
    softcap: float | None = None,
    impl: str | None = None,
    options: TokenLossOptions | None = None,
    check: bool = True,
) -> Applied:
    """Makes a causal LM compute its loss without its logits in memory.

    With labels, ``loss = sum_t w_t l_t / n`` of ``trimtab.linear_cross_entropy`` on what the model
    gives to its head: ``w`` the batch's ``loss_weights`` (1 without), ``n`` the
    ``num_items_in_batch`` that Trainer passes, else the number of labels not ignored. It is
    transformers' ``ForCausalLMLoss`` with its ``shift_labels`` and ``ignore_index``. The rest of
    the forward pass is the model's own, so a loss that it adds (the routers' of a mixture of
    experts) stays, and so do gradient checkpointing, autocast, ``generate`` and calls without
    labels.

    The model's forward takes two more arguments:

    - ``loss_weights`` of the labels' shape: what each label weighs, of any sign. Entry t belongs to
      ``labels[..., t]`` and is shifted with it, also when ``shift_labels`` is given. As it is in
      the signature, Trainer keeps the column of a data set; its collators don't pad it, for which
      there is ``trimtab.integrations.trl.WeightCollator``.
    - ``return_logits``: True for the logits, which then are made; False for None in their place.
      None is what ``apply`` was given, and without that: no logits in training, logits in
      evaluation, where Trainer's ``compute_metrics`` wants them.

    Cost: that of ``linear_cross_entropy``, 3 products and one chunk of logits. A head with LoRA
    adapters is copied once per call.

    State dict, ``save_pretrained``, pickles and copies stay as they are; a copy has our loss too.
    Apply before ``accelerate``, DDP, FSDP or ``torch.compile`` wrap the model; before or after
    PEFT. A head sharded on its own (FSDP, ZeRO-3, tensor parallelism) is refused. Compiles with
    ``fullgraph=True`` where the model does.

    Args:
        model: a transformers causal LM, or one that PEFT wraps.
        return_logits: the default of forward's argument.
        logit_scale: factor of the logits; None for what the configuration names.
        softcap: bound of the logits; None for what the configuration names.
        impl: as for ``linear_cross_entropy``.
        options: as for ``linear_cross_entropy``.
        check: run the model on 8 tokens to see that the formula gives its own logits and loss.
            False for models that can't run yet (meta tensors).

    Returns:
        A handle with ``revert()``, which works in a ``with`` too. Applying again changes the
        settings.

    Raises:
        ImportError: transformers is missing or older than 4.50.
        ValueError: the model's logits or loss are something else.
    """
    _check_version()
    inner = causal_lm(model)
    settings = Settings(return_logits, logit_scale, softcap, impl, options)
    previous = getattr(inner, _SETTINGS, None)
    if previous is None:
        _check_model(inner)
    own = own_class(inner)
    if check:
        check_formula(inner, own.forward, settings)
    inner.__class__ = _with_our_loss(own)
    setattr(inner, _SETTINGS, settings)
    return Applied(model, previous)


def revert(model: Any) -> None:
    """Gives a model its own loss back; does nothing to one that has it.

    Raises:
        ValueError: something has changed the model's class since (FSDP): unwrap it first.
    """
    inner = causal_lm(model)
    if getattr(inner, _SETTINGS, None) is None:
        return
    if "_trimtab_own" not in type(inner).__dict__:
        raise ValueError(
            f"model must have the class that apply gave it, got {type(inner)}; revert before what "
            "wraps the model (FSDP)"
        )
    inner.__class__ = own_class(inner)
    delattr(inner, _SETTINGS)
    # What compiled code leaves behind, see `replaced`.
    head = inner.get_output_embeddings()
    if head.__dict__.get("forward") == MethodType(type(head).forward, head):
        del head.forward
    left = inner.__dict__.pop("_loss_function", None)
    if left is not None and left is not inner.loss_function:
        inner.loss_function = left


@functools.cache
def _with_our_loss(own: Any) -> Any:
    """A subclass that looks like a model's class to whoever asks, and has our forward.

    A class and not an attribute ``forward`` of the model: that would be lost or left behind by
    pickles, copies, ``DataParallel`` and accelerate.
    """
    # PreTrainedModel finds what it knows of a class by its full name.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    methods = {"forward": _our_forward(own.forward), "__reduce_ex__": _reduce}
    return type(own.__name__, (own,), {**names, **methods, "_trimtab_own": own})


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickles by the model's own class: that is what its name finds."""
    reduced: Any = object.__reduce_ex__(self, max(protocol, 2))
    _, _, *state = reduced
    return (_rebuild, (own_class(self),), *state)


def _rebuild(own: Any) -> Any:
    ours = _with_our_loss(own)
    return ours.__new__(ours)


def own_class(model: Any) -> Any:
    return getattr(type(model), "_trimtab_own", type(model))


def _our_forward(own_forward: Any) -> Any:
    """A model's forward with our loss, and two more arguments in its signature."""
    signature = inspect.signature(own_forward)
    place = (
        list(signature.parameters).index("labels") - 1 if "labels" in signature.parameters else 0
    )

    def forward(
        self: Any,
        *args: Any,
        loss_weights: Tensor | None = None,  # (B, T)
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        settings = getattr(self, _SETTINGS, None)
        labels = args[place] if len(args) > place else kwargs.get("labels")
        if loss_weights is not None and (labels is None or settings is None):
            raise ValueError(
                "loss_weights must come with labels and trimtab's loss, got none; pass labels, or "
                "apply(model)"
            )
        if labels is None or settings is None:
            return own_forward(self, *args, **kwargs)
        if return_logits is None:
            return_logits = settings.return_logits
        if return_logits is None:
            return_logits = not self.training
        if return_logits and loss_weights is None:
            return own_forward(self, *args, **kwargs)
        loss = DeferredLoss(self, settings, loss_weights)
        with loss.in_place(keep_logits=return_logits):
            output = own_forward(self, *args, **kwargs)
        return output if return_logits else _without_logits(output)

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("loss_weights", "return_logits")
    ]
    own = list(signature.parameters.values())
    last = len(own) - (own[-1].kind is inspect.Parameter.VAR_KEYWORD)
    # No __wrapped__: accelerate would follow it to the model's own forward.
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own[:last], *added, *own[last:]]
    )
    forward.__doc__ = own_forward.__doc__
    return forward


class DeferredLoss:
    """The loss of one forward pass: it sees what goes into the head, and the call of the loss."""

    def __init__(self, model: Any, settings: Settings, weights: Tensor | None = None) -> None:
        self.model, self.settings, self.weights = model, settings, weights
        self.hidden: Tensor | None = None
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
        self.hidden = hidden
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
            return cross_entropy(logits.reshape(len(target), -1), target, **given)
        hidden, weight, transform = self.head()
        return linear_cross_entropy(
            hidden.reshape(len(target), -1), weight, target, options=self.settings.options,
            **transform, **given,
        )  # fmt: skip

    def head(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Input (B, T, D) and weight (V, D) of the head, and what else makes logits of them."""
        assert self.hidden is not None, "the head has been called"
        scale, softcap = _transform_of(self.model, self.settings)
        hidden, weight, bias = linear_head(self.model.get_output_embeddings(), self.hidden)
        if type(weight).__name__ == "DTensor":
            raise ValueError(
                "model must have a whole head, got a DTensor; leave the head in the root unit of "
                "FSDP and out of the tensor-parallel plan"
            )
        return hidden, weight, {"linear_bias": bias, "logit_scale": scale, "softcap": softcap}


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


def _without_logits(output: Any) -> Any:
    """A model's output with None for its empty logits."""
    if isinstance(output, tuple):
        empty = [isinstance(part, Tensor) and part.shape[-1:] == (0,) for part in output]
        return tuple(None if e else part for e, part in zip(empty, output, strict=True))
    return type(output)(**{name: v for name, v in output.items() if name != "logits"})


def _transform_of(model: Any, settings: Settings) -> tuple[float, float | None]:
    """Scale and softcap: what ``apply`` was given, else what the configuration says now."""
    scale, softcap = logit_transform(model.config.get_text_config())
    scale = scale if settings.logit_scale is None else settings.logit_scale
    return scale, softcap if settings.softcap is None else settings.softcap


def causal_lm(model: Any) -> Any:
    """The model itself, or the one that PEFT wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_version() -> None:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "trimtab.integrations.transformers needs transformers, which can't be imported; "
            "install trimtab[transformers]"
        ) from error
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < _OLDEST:
        raise ImportError(
            f"trimtab.integrations.transformers needs transformers >= 4.50, got "
            f"{transformers.__version__}; upgrade it"
        )


def _refuse(model: Any, got: str, instead: str) -> ValueError:
    return ValueError(
        "model must be a transformers causal LM that computes ForCausalLMLoss of softcap * "
        f"tanh(logit_scale * head(hidden) / softcap), got {type(model).__name__} {got}; {instead}"
    )


def _check_model(model: Any) -> None:
    """Refuses what can be seen without running the model."""
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss

    leave = "call trimtab.linear_cross_entropy on its hidden states instead"
    if not isinstance(model, PreTrainedModel):
        raise _refuse(model, "which is no PreTrainedModel", "pass the model before it is wrapped")
    if model.config.is_encoder_decoder:
        raise _refuse(model, "with an encoder", leave)
    if model.get_output_embeddings() is None:
        raise _refuse(model, "without a head", leave)
    if "labels" not in inspect.signature(type(model).forward).parameters:
        raise _refuse(model, "whose forward takes no labels", leave)
    if "forward" in model.__dict__:
        raise _refuse(model, "whose forward has been replaced",
                      "apply before accelerate prepares it, and without other patches")  # fmt: skip
    if "forward" in model.get_output_embeddings().__dict__:
        raise _refuse(model, "whose head's forward has been replaced",
                      "load it on one device, without accelerate's hooks")  # fmt: skip
    if model.loss_function is not ForCausalLMLoss:
        raise _refuse(model, f"with the loss function {model.loss_function}", leave)


def check_formula(model: Any, own_forward: Any, settings: Settings) -> None:
    """Runs a model on a few tokens: its logits from given ones, its loss, and the same with ours.

    Raises:
        ValueError: they differ by more than rounding, or can't be computed without logits.
    """
    head = model.get_output_embeddings()
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(_CHECKED_TOKENS, device=device)[None]
    ids = ids % model.get_input_embeddings().weight.shape[0]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    planted: list[Tensor] = []

    def plant(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        rows = linear_head(head, hidden)[1].shape[0]
        steps = torch.linspace(-1.0, 2.0, hidden.shape[-2], device=device, dtype=torch.float64)
        values = torch.linspace(-1.0, 1.0, rows, device=device, dtype=torch.float64)
        planted.append((10.0 ** steps[:, None] * values).to(hidden.dtype).expand(1, -1, -1))
        return planted[-1].clone()

    loss = DeferredLoss(model, settings)
    with evaluation_mode(model), torch.no_grad():
        own = own_forward(model, **batch, labels=ids, return_dict=True)
        with replaced(head, "forward", plant, head.forward):
            found = own_forward(model, **batch, return_dict=True).logits
        try:
            with loss.in_place():
                ours = own_forward(model, **batch, labels=ids, return_dict=True).loss
        except Exception as error:
            raise _refuse(model, "which makes its loss of its logits in another way",
                          "leave its loss alone") from error  # fmt: skip
    if len(planted) != 1 or loss.calls != 1 or loss.hidden is None:
        raise _refuse(model, "which does not call its head and its loss function once",
                      "another package may have replaced its forward")  # fmt: skip
    _compare(model, planted[0], found, own, ours, settings)


def _compare(
    model: Any, planted: Tensor, found: Tensor, own: Any, ours: Tensor, settings: Settings
) -> None:
    """Whether the planted logits came out as the formula says, and the losses agree."""
    scale, softcap = _transform_of(model, settings)
    wanted = transform(planted, scale, softcap)
    if found.shape != wanted.shape:
        raise _refuse(model, f"with logits {tuple(found.shape)} of {tuple(wanted.shape)}",
                      "it does more to them")  # fmt: skip
    eps = max(torch.finfo(dtype).eps for dtype in (planted.dtype, found.dtype))
    # A rounding for each of scale, quotient, tanh and product.
    wrong = (found.to(wanted) - wanted).abs() > 4 * eps * wanted.abs()
    if bool(wrong.any()):
        raise _refuse(model, f"with logit_scale={scale:g} and softcap={softcap}, and other logits",
                      "pass logit_scale or softcap, or leave its loss alone")  # fmt: skip
    # The products are rounded relative to the largest logit, and transformers' loss is float32.
    eps = max(eps, torch.finfo(torch.float32).eps)
    allowed = 16 * eps * float(own.logits.abs().max() + own.loss.abs())
    error = float((ours - own.loss).abs())
    if not error <= allowed:
        raise _refuse(model, f"whose loss {float(own.loss):g} differs by {error:.3g}",
                      "its loss has terms that need its logits")  # fmt: skip
