"""Token loss of one rank's slice; without a group, what one process would do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import trimtab
from token_loss_cases import problem
from trimtab.testing import uneven


def cut(values: Tensor | None, sizes: list[int] | None, rank: int) -> Tensor | None:
    """A rank's part along the first dimension."""
    if values is None or sizes is None:
        return values
    start = sum(sizes[:rank])
    return values[start : start + sizes[rank]].clone()


def leaf(values: Tensor | None, needed: bool = True) -> Tensor | None:
    return None if values is None else values.detach().clone().requires_grad_(needed)


def loss_case(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """Loss and gradients of ``linear_cross_entropy``, of a rank's slice where there is a group."""
    rank = 0 if group is None else group.rank()
    given = problem(**spec["problem"])
    dtype = spec.get("dtype", torch.float64)
    sizes = spec["sizes"] if group is not None else None
    counts = spec.get("counts") if group is not None else None
    input, weight, bias, token_weight = given.tensors(dtype, spec.get("bias", True))
    frozen = spec.get("frozen", False)
    options = dict(spec.get("options", {}))
    target = spec.get("target", given.target)
    if "class_weight" in options:
        options["weight"] = cut(options.pop("class_weight"), sizes, rank)
    if not spec.get("weighted", True):
        token_weight = None
    if counts is not None:
        input, target = cut(input, counts, rank), cut(target, counts, rank)
        if token_weight is not None:
            token_weight = cut(token_weight.movedim(-1, 0), counts, rank).movedim(0, -1)
    input = leaf(input, spec.get("input_grad", True))
    token_weight = leaf(token_weight, spec.get("weight_grad", True))
    weight, bias = (leaf(cut(t, sizes, rank), not frozen) for t in (weight, bias))
    loss = trimtab.linear_cross_entropy(
        input, weight, target, linear_bias=bias, token_weight=token_weight, group=group,
        options=trimtab.TokenLossOptions(
            chunk_size=spec.get("chunk_size"), sequence_parallel=counts is not None,
            accum_dtype=spec.get("accum_dtype", torch.float32),
        ), **options,
    )  # fmt: skip
    upstream = uneven(loss)
    if counts is not None and loss.dim() > 0 and loss.shape[-1:] == target.shape:
        whole = uneven(loss.new_empty(*loss.shape[:-1], sum(counts)))
        upstream = cut(whole.movedim(-1, 0), counts, rank).movedim(0, -1)
    loss.backward(upstream)
    results = {"loss": loss.detach()}
    leaves = {"input": input, "weight": weight, "bias": bias, "token_weight": token_weight}
    for name, tensor in leaves.items():
        if tensor is not None and tensor.grad is not None:
            results[f"{name}.grad"] = tensor.grad
    return results


def logp_case(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """Every field of ``linear_logp`` and the gradients of those that ``upstream`` names."""
    rank = 0 if group is None else group.rank()
    given = problem(**spec["problem"])
    sizes = spec["sizes"] if group is not None else None
    counts = spec.get("counts") if group is not None else None
    input, weight, bias, _ = given.tensors(spec.get("dtype", torch.float64))
    if "tensors" in spec:
        input, weight, bias = spec["tensors"]
    target = cut(spec.get("target", given.target), counts, rank)
    options = dict(spec.get("options", {}))
    if isinstance(options.get("temperature"), Tensor):
        options["temperature"] = cut(options["temperature"], counts, rank)
    frozen = spec.get("frozen", False)
    input = leaf(cut(input, counts, rank))
    weight, bias = (leaf(cut(t, sizes, rank), not frozen) for t in (weight, bias))
    found = trimtab.linear_logp(
        input, weight, target, linear_bias=bias, ignore_index=-100, group=group,
        options=trimtab.TokenLossOptions(
            chunk_size=spec.get("chunk_size"), sequence_parallel=counts is not None
        ), **options,
    )  # fmt: skip
    named = [getattr(found, name) for name in spec.get("upstream", ("logp", "entropy", "lse"))]
    whole = uneven(found.logp.new_empty(spec["problem"]["n"]))
    torch.autograd.backward(named, [cut(whole * (k + 1), counts, rank) for k in range(len(named))])
    results = {name: value.detach() for name, value in found._asdict().items()}
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.grad is not None:
            results[f"{name}.grad"] = tensor.grad
    return results
