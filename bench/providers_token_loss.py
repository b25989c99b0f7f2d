"""Who takes part in the token-loss benchmark, and how each is called.

Peers without token weights get them the way their users do it: ``reduction="none"``, times the
weights, summed. In mode "mean" everybody's own mean is called. Nobody is asked for more than the
loss and the gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import trimtab
from cases_token_loss import IGNORED, Case, Inputs, Outputs
from measure import Step
from suite import Provider, always, not_here

TokenLoss = Callable[[Inputs, str], Tensor]
"""``(inputs, reduction) -> loss``, for reduction "mean" or "none"."""

FLOOR = "products alone"
EAGER = "eager"


def finish(case: Case, inputs: Inputs, loss: Tensor) -> Outputs:
    """The loss and the gradients that the case asks for."""
    outputs = {"loss": loss.detach()}
    if case.mode == "logp":
        return outputs
    leaves = {"grad_input": inputs.x, "grad_weight": inputs.head, "grad_logits": inputs.logits}
    wanted = {
        name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad
    }
    upstream = None if case.about.scalar else inputs.upstream.to(loss.dtype)
    grads = torch.autograd.grad(loss, list(wanted.values()), upstream)
    return {**outputs, **dict(zip(wanted, grads, strict=True))}


def peer_step(case: Case, token_loss: TokenLoss) -> Step:
    """A step out of somebody's cross entropy without token weights."""

    def loss(inputs: Inputs) -> Tensor:
        if case.mode == "mean":
            return token_loss(inputs, "mean")
        tokens = token_loss(inputs, "none")
        if case.about.scalar:
            return (tokens * inputs.token_weight).sum() / (inputs.target != IGNORED).sum()
        return -tokens if case.mode == "logp" else tokens

    return lambda inputs: finish(case, inputs, loss(inputs))


# Ours


def ours_step(impl: str, accum_dtype: torch.dtype = torch.float32) -> Callable[[Case], Step]:
    """The operator of trimtab for the case."""
    options = trimtab.TokenLossOptions(accum_dtype=accum_dtype)

    def loss(case: Case, inputs: Inputs) -> Tensor:
        x, head, target = inputs.x, inputs.head, inputs.target
        if inputs.logits is not None:
            return trimtab.cross_entropy(inputs.logits, target, reduction="none", impl=impl)
        if case.mode == "logp":
            return trimtab.linear_logp(x, head, target, impl=impl, options=options).logp
        weighted = case.mode in ("weighted", "half")
        return trimtab.linear_cross_entropy(
            x, head, target, token_weight=inputs.token_weight if weighted else None,
            reduction="mean" if case.about.scalar else "none", impl=impl, options=options,
        )  # fmt: skip

    return lambda case: lambda inputs: finish(case, inputs, loss(case, inputs))


def ours_why_not(impl: str) -> Callable[[Case], str | None]:
    """The package's own reason, for tensors of the case's dtype and device."""

    def why_not(case: Case) -> str | None:
        x = torch.empty(1, 1, dtype=case.dtype, device=case.device)
        target = torch.zeros(1, dtype=torch.int64, device=case.device)
        arguments = (x, target) if case.mode == "rows" else (x, x, target)
        return not_here(case.op, case.device, impl, *arguments)

    return why_not


def _bf16_accumulation_why_not(case: Case) -> str | None:
    if case.device == "cpu" or case.dtype == torch.float32:
        return "for 16-bit heads on a GPU"
    if not case.wants_head_grad:
        return "no gradient of the head to accumulate"
    return ours_why_not("triton")(case)


# Torch


def eager(inputs: Inputs, reduction: str) -> Tensor:
    """Three lines of PyTorch."""
    logits = F.linear(inputs.x, inputs.head) if inputs.logits is None else inputs.logits
    return F.cross_entropy(logits, inputs.target, reduction=reduction)


def compiled_step(case: Case) -> Step:
    """torch.compile of eager, anew for every case: a function is compiled for a few shapes only."""
    torch._dynamo.reset()
    return peer_step(case, torch.compile(eager, dynamic=False))


def torch_chunked(batch_chunk_size: int | None) -> TokenLoss:
    """``F.linear_cross_entropy`` with the chunk size given, or with its defaults."""

    def token_loss(inputs: Inputs, reduction: str) -> Tensor:
        options: dict[str, Any] = {}
        if batch_chunk_size is not None:
            options = {"batch_chunk_size": batch_chunk_size, "chunking_method": None}
        return F.linear_cross_entropy(
            inputs.x, inputs.head, inputs.target, reduction=reduction,
            options=torch.nn.LinearCrossEntropyOptions(**options),
        )  # fmt: skip

    return token_loss


def _torch_chunked_why_not(case: Case) -> str | None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked linear_cross_entropy"
    return _takes_a_head(case)


def _takes_a_head(case: Case) -> str | None:
    return "takes hidden states, not logits" if case.mode == "rows" else None


def _several_times_eager(case: Case) -> str | None:
    if case.mode not in ("weighted", "mean"):
        return "several times eager's time; weighted, which is a loss per token for it, shows it"
    if case.sweep and (case.classes > 32768 or case.rows > 2048):
        return "many seconds a call at this size"
    return None


def _many_times_eager(case: Case) -> str | None:
    if case.sweep:
        return "many times eager's time; the cases with D 1024 show it"
    return _several_times_eager(case)


def products_step(case: Case) -> Step:
    """The products that the case can't do without, each into fresh memory; for rows, one copy."""

    @torch.no_grad()
    def step(inputs: Inputs) -> Outputs:
        if inputs.logits is not None:
            return {"copied": torch.empty_like(inputs.logits).copy_(inputs.logits)}
        x, head = inputs.active, inputs.head
        logits = torch.mm(x, head.t())
        outputs = {"logits": logits}
        if case.about.products == 4:
            outputs["logits"] = torch.mm(x, head.t())
        if case.about.products >= 2:
            outputs["grad_input"] = torch.mm(logits, head)
        if case.about.products >= 3:
            outputs["grad_weight"] = torch.mm(logits.t(), x)
        return outputs

    return step


# Others


def liger(inputs: Inputs, reduction: str) -> Tensor:
    """Liger's fused linear cross entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        inputs.x, inputs.head, inputs.target, ignore_index=IGNORED, reduction=reduction
    )


def cce(**options: Any) -> TokenLoss:
    """Apple's cut cross entropy."""

    def token_loss(inputs: Inputs, reduction: str) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(
            inputs.x,
            inputs.head,
            inputs.target,
            ignore_index=IGNORED,
            reduction=reduction,
            **options,
        )

    return token_loss


def quack(inputs: Inputs, reduction: str) -> Tensor:
    """QuACK's chunked linear cross entropy."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(
        inputs.x, inputs.head, inputs.target, ignore_index=IGNORED, reduction=reduction
    )


def _gpu_peer(module: str, modes: tuple[str, ...] | None = None) -> Callable[[Case], str | None]:
    def why_not(case: Case) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if case.device == "cpu":
            return f"{module}'s kernels need a GPU"
        if modes is not None and case.mode not in modes:
            return f"{module} has neither token weights nor a loss per token"
        return _takes_a_head(case)

    return why_not


def _cce_compile_why_not(case: Case) -> str | None:
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return "cut_cross_entropy is not installed"
    return _takes_a_head(case)


def _peer(token_loss: TokenLoss) -> Callable[[Case], Step]:
    return lambda case: peer_step(case, token_loss)


def _compiles(case: Case) -> str:
    return "each shape takes up to a minute to compile"


def _oracle(case: Case) -> str | None:
    if case.mode in ("weighted", "logp", "rows") and not case.sweep:
        return None
    return "the oracle is not made for speed; other cases show it"


PROVIDERS = (
    Provider(FLOOR, products_step, always, checked=False),
    Provider(EAGER, _peer(eager), always),
    *(
        Provider(f"trimtab {impl}", ours_step(impl), ours_why_not(impl), impl=impl,
                 costly=_oracle if impl == "reference" else always)
        for impl in ("native", "triton", "reference")
    ),
    Provider("trimtab triton, bf16 accumulation", ours_step("triton", torch.bfloat16),
             _bf16_accumulation_why_not, impl="triton"),
    Provider("torch.compile", compiled_step, always, compiles=True, costly=_compiles),
    Provider("torch chunked", _peer(torch_chunked(None)), _torch_chunked_why_not,
             costly=_many_times_eager),
    Provider("torch chunked 1024", _peer(torch_chunked(1024)), _torch_chunked_why_not,
             costly=_several_times_eager),
    Provider("liger", _peer(liger), _gpu_peer("liger_kernel")),
    Provider("cce", _peer(cce()), _gpu_peer("cut_cross_entropy")),
    Provider("cce unfiltered", _peer(cce(filter_eps=None)), _gpu_peer("cut_cross_entropy")),
    Provider("cce torch_compile", _peer(cce(impl="torch_compile")), _cce_compile_why_not,
             compiles=True, costly=_compiles),
    Provider("quack", _peer(quack), _gpu_peer("quack", ("mean",))),
)  # fmt: skip
