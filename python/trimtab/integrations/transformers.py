"""Any Hugging Face causal LM with our loss, one line: ``apply(model)``."""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any

from torch import Tensor

from trimtab.integrations._deferred_loss import DeferredLoss, Settings, mesh_of
from trimtab.integrations._model_checks import check_formula, check_model, check_version
from trimtab.ops.token_loss import TokenLossOptions

__all__ = ["Applied", "apply", "revert"]

_SETTINGS = "_trimtab_settings"  # of a model that our loss is applied to


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
    PEFT and tensor parallelism. A head that tensor parallelism cuts, torch's own or transformers'
    ``tp_plan``, is used in its slices. FSDP has to have the head whole until the loss is made: in
    the root unit, or (FSDP2) in one with ``reshard_after_forward=False``. Refused are a head that
    is sharded again before, by FSDP2 or ZeRO-3, and a head in slices with adapters. Compiles with
    ``fullgraph=True`` where the model does.

    Args:
        model: a transformers causal LM, or one that PEFT wraps.
        return_logits: the default of forward's argument.
        logit_scale: factor of the logits; None for what the configuration names.
        softcap: bound of the logits; None for what the configuration names.
        impl: as for ``linear_cross_entropy``.
        options: as for ``linear_cross_entropy``.
        check: run the model on 8 tokens to see that the formula gives its own logits and loss.
            False for models that can't run yet (meta tensors), or not in this way (FSDP2; a plan
            that leaves each rank its slice of the logits).

    Returns:
        A handle with ``revert()``, which works in a ``with`` too. Applying again changes the
        settings.

    Raises:
        ImportError: transformers is missing or older than 4.50.
        ValueError: the model's logits or loss are something else.
    """
    check_version()
    inner = causal_lm(model)
    settings = Settings(return_logits, logit_scale, softcap, impl, options)
    previous = getattr(inner, _SETTINGS, None)
    if previous is None:
        check_model(inner)
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
    # What compiled code leaves behind, see `_deferred_loss.replaced`.
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
        whole_head = mesh_of(self.get_output_embeddings()) is None
        if return_logits and loss_weights is None and whole_head:
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


def _without_logits(output: Any) -> Any:
    """A model's output with None for its empty logits."""
    if isinstance(output, tuple):
        empty = [isinstance(part, Tensor) and part.shape[-1:] == (0,) for part in output]
        return tuple(None if e else part for e, part in zip(empty, output, strict=True))
    return type(output)(**{name: v for name, v in output.items() if name != "logits"})


def causal_lm(model: Any) -> Any:
    """The model itself, or the one that PEFT wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
