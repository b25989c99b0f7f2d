"""Which models ``trimtab.integrations.transformers.apply`` takes: what it checks before."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from trimtab.algorithms.causal_lm import evaluation_mode, linear_head, transform
from trimtab.integrations._deferred_loss import (
    DeferredLoss,
    Settings,
    mesh_of,
    replaced,
    transform_of,
)

_OLDEST = (4, 50)
_CHECKED_TOKENS = 8


def check_version() -> None:
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


def check_model(model: Any) -> None:
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
    head = model.get_output_embeddings()
    # Where transformers' own tensor parallelism cuts a head, it replaces its forward.
    if "forward" in head.__dict__ and mesh_of(head) is None:
        raise _refuse(model, "whose head's forward has been replaced",
                      "load it on one device, without accelerate's hooks")  # fmt: skip
    if model.loss_function is not ForCausalLMLoss:
        raise _refuse(model, f"with the loss function {model.loss_function}", leave)


def check_formula(model: Any, own_forward: Any, settings: Settings) -> None:
    """Runs a model on a few tokens: its logits from given ones, its loss, and the same with ours.

    Raises:
        ValueError: they differ by more than rounding, or can't be computed without logits.
    """
    if is_fully_sharded(model):
        raise _refuse(model, "whose parameters are whole in its own forward only (FSDP)",
                      "apply before fully_shard, or pass check=False")  # fmt: skip
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
        return like(hidden, planted[-1].clone())

    loss = DeferredLoss(model, settings)
    with evaluation_mode(model), torch.no_grad():
        with replaced(head, "forward", plant, head.forward):
            found = own_forward(model, **batch, return_dict=True).logits
        if found.shape != planted[0].shape:
            raise _refuse(model, f"with logits {tuple(found.shape)} of {tuple(planted[0].shape)}",
                          "it does more to them; where each rank has a slice of them, apply before "
                          "parallelize_module or pass check=False")  # fmt: skip
        own = own_forward(model, **batch, labels=ids, return_dict=True)
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


def is_fully_sharded(model: Any) -> bool:
    """Whether FSDP2 has the model, seen without importing it."""
    return any(base.__name__ == "FSDPModule" for base in type(model).__mro__)


def like(given: Tensor, tensor: Tensor) -> Any:
    """A tensor as a DTensor that every rank has all of, where ``given`` is one."""
    if not hasattr(given, "placements"):
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(tensor, given.device_mesh, given.placements)  # type: ignore[attr-defined]


def _compare(
    model: Any, planted: Tensor, found: Tensor, own: Any, ours: Tensor, settings: Settings
) -> None:
    """Whether the planted logits came out as the formula says, and the losses agree."""
    scale, softcap = transform_of(model, settings)
    wanted = transform(planted, scale, softcap)
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
