"""What processes run for the tests of sharded heads, beyond ``sharded_cases``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor

import trimtab
from sharded_cases import cut, leaf, loss_case
from token_loss_cases import problem
from trimtab.ops.token_loss import _chunks
from trimtab.testing import uneven


def head_of(spec: dict[str, Any], group: Any) -> list[Any]:
    """Input, target and this rank's slice of weight and bias, as leaves."""
    given = problem(**spec["problem"])
    rank = 0 if group is None else group.rank()
    sizes = spec["sizes"] if group is not None else None
    input, weight, bias, _ = given.tensors(spec.get("dtype", torch.float64), token_weight=False)
    return [leaf(input), given.target, *(leaf(cut(t, sizes, rank)) for t in (weight, bias))]


def second_derivatives(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of a function of gradients, of the loss and of the log-probabilities."""
    results = {}
    for op in ("loss", "logp"):
        input, target, weight, bias = head_of(spec, group)
        leaves = (input, weight, bias)
        if op == "loss":
            out = trimtab.linear_cross_entropy(
                input, weight, target, linear_bias=bias, softcap=4.0, group=group,
                reduction=spec.get("reduction", "mean"),
            )  # fmt: skip
        else:
            found = trimtab.linear_logp(
                input, weight, target, linear_bias=bias, ignore_index=-100, group=group
            )
            out = found.logp + found.entropy * 0.5
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(grad.sin().sum() for grad in grads), leaves)
        for name, grad in zip(("input", "weight", "bias"), again, strict=True):
            results[f"{op} {name}.grad"] = grad
    return results


def derivatives_of_own_tokens(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients and second derivatives, also of the divisor, of ranks with their own tokens."""
    input, target, weight, bias = head_of(spec, group)
    counts = spec["counts"] if group is not None else None
    rank = 0 if group is None else group.rank()
    target, token_weight = (
        cut(values, counts, rank) for values in (target, problem(**spec["problem"]).token_weight)
    )
    leaves = {
        "input": leaf(cut(input.detach(), counts, rank)), "weight": weight, "bias": bias,
        "token_weight": leaf(token_weight.double()),
        "normalizer": torch.tensor(7.0, dtype=torch.float64, requires_grad=True),
    }  # fmt: skip
    results = {}
    for divisor in ("token_weight", leaves["normalizer"]):
        loss = trimtab.linear_cross_entropy(
            leaves["input"], weight, target, linear_bias=bias, token_weight=leaves["token_weight"],
            normalizer=divisor, group=group, impl=spec["impl"],
            options=trimtab.TokenLossOptions(sequence_parallel=group is not None),
        )  # fmt: skip
        used = dict(leaves)
        if isinstance(divisor, str):
            del used["normalizer"]
        grads = torch.autograd.grad(loss.square(), used.values(), create_graph=True)
        again = torch.autograd.grad(sum(grad.sin().sum() for grad in grads), used.values())
        for name, grad, second in zip(used, grads, again, strict=True):
            results |= {f"{len(used)} {name}": grad.detach(), f"{len(used)} {name} again": second}
    return results


def costs(group: Any, spec: dict[str, Any]) -> tuple[float, int, int]:
    """Products of ``loss_case`` in units of N x D x V, and the numbers that a rank sends."""
    products, gathered, reduced = [], [], []
    with (
        counting(torch, "mm", products, 0, 1),
        counting(torch, "addmm", products, 1, 2),
        sending("all_gather", gathered, 1),
        sending("all_reduce", reduced, 0),
    ):
        loss_case(group, spec)
    n, d = spec["problem"]["n"], spec["problem"]["d"]
    made = sum(products) / (2 * n * d * sum(spec["sizes"]))
    return made, *(sum(part.numel() for part in sent) for sent in (gathered, reduced))


def dtypes_of_sums(group: Any, spec: dict[str, Any]) -> set[torch.dtype]:
    """In which dtypes the ranks' gradients of the input are summed."""
    reduced: list[Tensor] = []
    with sending("all_reduce", reduced, 0):
        loss_case(group, spec)
    return {part.dtype for part in reduced}


def order(group: Any, spec: dict[str, Any]) -> list[str]:
    """The products of a loss, and when it starts and awaits its collectives."""
    events: list[str] = []

    def noted(name: str, original: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            found = original(*args, **kwargs)
            return Noted(name, found, events) if kwargs.get("async_op") else found

        return run

    with ExitStack() as stack:
        for owner, name in (
            (torch, "mm"), (torch, "addmm"), (torch.distributed, "all_gather"),
            (torch.distributed, "all_reduce"),
        ):  # fmt: skip
            original = getattr(owner, name)
            stack.enter_context(replaced(owner, name, noted(name, original)))
        loss_case(group, spec)
    return events


def steps(group: Any, spec: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What the rule for the chunks is asked for."""
    asked = []

    def rule(*arguments: Any) -> int:
        asked.append(arguments)
        return original(*arguments)

    original = _chunks.rows_per_chunk
    with replaced(_chunks, "rows_per_chunk", rule):
        loss_case(group, spec)
    return asked


class Noted:
    """A collective under way that notes when it is awaited."""

    def __init__(self, name: str, work: Any, events: list[str]) -> None:
        self.name, self.work, self.events = name, work, events

    def wait(self) -> None:
        self.events.append(f"wait {self.name}")
        self.work.wait()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def counting(owner: Any, name: str, flops: list[int], left: int, right: int) -> Any:
    multiply = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        a, b = args[left], args[right]
        flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return multiply(*args, **kwargs)

    return replaced(owner, name, run)


def sending(name: str, sent: list[Tensor], source: int) -> Any:
    collective = getattr(torch.distributed, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        if args[source].is_floating_point():
            sent.append(args[source])
        return collective(*args, **kwargs)

    return replaced(torch.distributed, name, run)


def contrast_case(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """``linear_contrastive_logp`` with its gradients, and ``linear_contrastive_sample``."""
    input, target, weight, bias = head_of(spec, group)
    negative = leaf(input.detach().flip(0))
    target = target.clamp(min=0)
    logp = trimtab.linear_contrastive_logp(
        input, negative, weight, target, alpha=0.5, linear_bias=bias, temperature=0.7,
        logit_scale=1.3, group=group,
    )  # fmt: skip
    logp.backward(uneven(logp))
    results = {
        "logp": logp.detach(), "positive.grad": input.grad, "negative.grad": negative.grad,
        "weight.grad": weight.grad, "bias.grad": bias.grad,
    }  # fmt: skip
    # Products that nothing rounds, so that the logits are the same however they are cut.
    whole = [(tensor.detach() * 4).round() / 4 for tensor in (input, negative, weight, bias)]
    for name, filters in FILTERS.items():
        drawn = trimtab.linear_contrastive_sample(
            whole[0], whole[1], whole[2], alpha=0.5, linear_bias=whole[3], seed=7,
            position=torch.arange(len(target)), logit_scale=2.0, group=group, **filters,
        )  # fmt: skip
        results |= {f"{name} {field}": value for field, value in drawn._asdict().items()}
    return results


FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "greedy": {"temperature": 0.0},
    "all": {"plausibility": 0.01, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "temperature": 1.5},
}


def ratio_case(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """``linear_logp_ratio`` of a policy and a reference of other hidden states."""
    input, target, weight, bias = head_of(spec, group)
    found = trimtab.linear_logp_ratio(
        input, weight, input.detach().sin(), weight.detach() * 0.5, target, linear_bias=bias,
        ignore_index=-100, group=group,
    )  # fmt: skip
    found.log_ratio.sum().backward()
    values = {name: value.detach() for name, value in found._asdict().items()}
    return {**values, "input.grad": input.grad, "weight.grad": weight.grad, "bias.grad": bias.grad}


def masked_slices(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """A bias of -inf on the classes of ``masked``: padding of the vocabulary."""
    input, target, weight, bias = head_of(spec, group)
    rank = 0 if group is None else group.rank()
    padding = cut(spec["masked"], spec["sizes"] if group is not None else None, rank)
    bias = bias.detach().masked_fill(padding, -torch.inf)
    target = torch.where((target >= 0) & spec["masked"][target.clamp(min=0)], 62, target)
    found = trimtab.linear_logp(
        input, weight, target, linear_bias=bias, ignore_index=-100, group=group
    )
    loss = found.logp.sum() + found.entropy.sum() + found.lse.sum()
    (loss + trimtab.linear_cross_entropy(input, weight, target, linear_bias=bias, group=group)
     ).backward()  # fmt: skip
    values = {name: value.detach() for name, value in found._asdict().items()}
    return {**values, "input.grad": input.grad, "weight.grad": weight.grad}


def compiled_case(group: Any, spec: dict[str, Any]) -> dict[str, bool]:
    """Whether the compiled operators give the bits of the others."""
    same = {}
    for name, function in {"loss": compiled_loss, "logp": compiled_logp}.items():
        found = []
        for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaves = head_of(spec, group)
            out = run(*leaves, group)
            out.sum().backward()
            found.append([out.detach(), *(leaves[at].grad for at in (0, 2, 3))])
        same[name] = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    input, _, weight, bias = (tensor.detach() for tensor in head_of(spec, group))
    token = torch.compile(compiled_token, fullgraph=True, backend="aot_eager")
    arguments = (input, weight, bias, group)
    same["token"] = torch.equal(token(*arguments), compiled_token(*arguments))
    return same


def unordered(group: Any, spec: dict[str, Any]) -> list[str]:
    """Collectives of a compiled graph, forward and backward, that nothing holds in their order."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._higher_order_ops.effects import with_effects

    loose, held = [], []

    def keep(graph: Any, _: Any) -> Any:
        for node in graph.graph.nodes:
            if str(node.target).startswith("trimtab."):
                loose.append(str(node.target))
            elif node.target is with_effects:
                held.append(str(node.args[1]))
        return make_boxed_func(graph.forward)

    def both(*leaves: Any) -> Tensor:
        return compiled_loss(*leaves, group) + compiled_logp(*leaves, group).sum()

    leaves = head_of(spec, group)
    torch.compile(both, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(*leaves).backward()
    assert len(held) == 3, held
    return loose


def compiled_loss(
    input: Tensor, target: Tensor, weight: Tensor, bias: Tensor, group: Any
) -> Tensor:
    return trimtab.linear_cross_entropy(
        input, weight, target, linear_bias=bias, group=group, label_smoothing=0.1
    )


def compiled_logp(
    input: Tensor, target: Tensor, weight: Tensor, bias: Tensor, group: Any
) -> Tensor:
    options = trimtab.TokenLossOptions(sequence_parallel=True)
    found = trimtab.linear_logp(
        input, weight, target, linear_bias=bias, ignore_index=-100, group=group, options=options
    )
    return found.logp + found.entropy


def compiled_token(input: Tensor, weight: Tensor, bias: Tensor, group: Any) -> Tensor:
    return trimtab.linear_contrastive_sample(
        input, input.flip(0), weight, alpha=0.5, linear_bias=bias, group=group
    ).token


def distributed_head(group: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """A DTensor head, by its placement alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (group.size(),))
    results = {}
    for name, placement in {"sharded": Shard(0), "replicated": Replicate()}.items():
        input, target, *parts = head_of(spec, None)
        weight, bias = (
            distribute_tensor(part.detach(), mesh, [placement]).requires_grad_() for part in parts
        )
        loss = trimtab.linear_cross_entropy(input, weight, target, linear_bias=bias)
        loss.backward(uneven(loss))
        for field, grad in (("weight", weight.grad), ("bias", bias.grad)):
            assert grad.placements == (placement,)
            results[f"{name} {field}.grad"] = grad.full_tensor()
        results |= {f"{name} loss": loss.detach(), f"{name} input.grad": input.grad}
    return results


def fully_sharded_head(group: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """An FSDP2 head: outside of forward with other tokens on each rank, and within forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    input, target, weight, bias = (tensor.detach() for tensor in head_of(spec, None))
    input, target = (
        cut(input, spec["counts"], group.rank()),
        cut(target, spec["counts"], group.rank()),
    )
    head = LossHead(weight, bias)
    fully_shard(head, mesh=init_device_mesh("cpu", (group.size(),)))
    own = trimtab.TokenLossOptions(sequence_parallel=True)
    outside = {"linear_bias": head.bias, "reduction": "sum"}
    text = raised(lambda: trimtab.linear_cross_entropy(input, head.weight, target, **outside))
    loss = trimtab.linear_cross_entropy(input, head.weight, target, options=own, **outside)
    grad = torch.autograd.grad(loss, head.weight)[0].full_tensor()
    head(input, target).backward()
    return {"raised": text, "loss": loss.detach(), "outside": grad,
            "within": head.weight.grad.full_tensor() * group.size()}  # fmt: skip


class LossHead(torch.nn.Module):
    """A head whose forward is the loss."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return trimtab.linear_cross_entropy(
            input, self.weight, target, linear_bias=self.bias, reduction="sum"
        )


def raised(function: Any) -> str:
    """What a call raises, as text."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def misuse(group: Any, spec: dict[str, Any]) -> dict[str, str]:
    """Calls that have to fail, on all ranks alike."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rank = group.rank()
    input, target, weight, _ = head_of(spec, group)
    mesh, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    columns = distribute_tensor(torch.ones(8, input.shape[1]), mesh, [Shard(1)])
    partitioned = torch.empty(0)
    partitioned.ds_id, partitioned.ds_shape = 3, torch.Size([63, 16])
    own = trimtab.TokenLossOptions(sequence_parallel=True)

    def loss(**changed: Any) -> Any:
        arguments = {"input": input, "linear_weight": weight, "target": target, "group": group}
        return lambda: trimtab.linear_cross_entropy(**{**arguments, **changed})

    other = target.clone()
    other[-1] = (rank + 1) % 4
    outside = target.clone()
    outside[3] = 63
    calls = {
        "other targets": loss(target=other),
        "other counts": loss(input=input[: 5 + rank], target=target[: 5 + rank]),
        "other widths": loss(input=input[:, : 8 + rank], linear_weight=weight[:, : 8 + rank]),
        "other options": loss(label_smoothing=0.1 if rank else 0.0),
        "other weights": loss(token_weight=torch.ones(len(target)).index_fill(
            0, torch.tensor([1 + rank]), 0.0)),
        "other scale": loss(logit_scale=1.0 + rank),
        "other smoothing": loss(label_smoothing=0.1 + rank / 8),
        "other sums": loss(options=trimtab.TokenLossOptions(
            accum_dtype=torch.bfloat16 if rank else torch.float32)),
        "other scale, reference": loss(logit_scale=1.0 + rank, impl="reference"),
        "own tokens of one": loss(options=own if rank == 1 else None),
        "gradients of one": loss(
            token_weight=torch.ones(len(target), requires_grad=rank == 1),
            normalizer="token_weight", options=replace(own, skip_zero_weight=False),
        ),
        "gradients of one, reference": loss(input=leaf(input, rank == 1), impl="reference"),
        "one operator of two": loss(weight=torch.ones(len(weight)) if rank else None),
        "divisor of the same tokens": loss(normalizer_group=group),
        "outside": loss(target=outside),
        "outside, own tokens": loss(target=outside if rank == 2 else target, options=own),
        "outside, reference": loss(target=outside, impl="reference"),
        "no vocabulary": loss(linear_weight=weight[:0]),
        "no group": loss(group=None, options=own),
        "mesh": loss(group=mesh),
        "columns": loss(linear_weight=columns, group=None),
        "square mesh": loss(
            linear_weight=distribute_tensor(torch.ones(8, 16), square, [Shard(0), Shard(0)]),
            group=None,
        ),
        "DTensor input": loss(input=columns, group=None),
        "ZeRO-3": loss(linear_weight=partitioned, group=None),
        "divisor": loss(normalizer_group=group, normalizer=3.0),
        "K-dimensional": loss(linear_weight=torch.ones(4, 3, 16)),
        "logits": lambda: trimtab.linear_contrastive_sample(
            input[: 3 + rank], input[: 3 + rank], weight, alpha=0.5, group=group
        ),
    }  # fmt: skip
    return {name: raised(call) for name, call in calls.items()}


def failing_alone(group: Any, spec: dict[str, Any]) -> dict[str, str]:
    """Calls that fail on rank 1 alone."""
    fails = group.rank() == 1
    input, target, weight, _ = head_of({**spec, "dtype": torch.float32}, group)
    target = target.clamp(min=0)
    own = trimtab.TokenLossOptions(sequence_parallel=True)
    cold = torch.ones(len(target)).index_fill(0, torch.tensor([2]), 0.0 if fails else 1.0)
    other = weight.double() if fails else weight
    contrast = {"alpha": 0.5, "group": group}
    calls = {
        "dtype": lambda: trimtab.linear_cross_entropy(input, other, target, group=group),
        "length": lambda: trimtab.linear_cross_entropy(
            input, weight, target[: 5 if fails else None], group=group, options=own),
        "temperature": lambda: trimtab.linear_logp(
            input, weight, target, temperature=cold, group=group, options=own),
        "rows": lambda: trimtab.linear_contrastive_logp(
            input, input[: 5 if fails else None], weight, target, **contrast),
        "filter": lambda: trimtab.linear_contrastive_sample(
            input, input, weight, top_p=2.0 if fails else 0.5, **contrast),
    }  # fmt: skip
    return {name: raised(call) for name, call in calls.items()}


def data_parallel(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """Pairs of ranks with a head in two slices, and half of the tokens each."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    given = problem(**spec["problem"])
    half = slice(0, 20) if mesh.get_local_rank("data") == 0 else slice(20, None)
    rank = mesh.get_local_rank("tensor")
    input, weight, bias, token_weight = given.tensors(torch.float64)
    class_weight = spec["class_weight"]
    if spec["normalizer"] == "token_weight":
        class_weight = None
    input, token_weight = leaf(input[half]), leaf(token_weight[half])
    weight, bias = (leaf(cut(t, spec["sizes"], rank)) for t in (weight, bias))
    loss = trimtab.linear_cross_entropy(
        input, weight, given.target[half], linear_bias=bias, token_weight=token_weight,
        weight=cut(class_weight, spec["sizes"], rank), group=mesh.get_group("tensor"),
        normalizer=spec["normalizer"], normalizer_group=mesh.get_group("data"),
    )  # fmt: skip
    loss.backward()
    return {
        "loss": loss.detach(), "input.grad": input.grad, "token_weight.grad": token_weight.grad,
        "weight.grad": weight.grad, "bias.grad": bias.grad,
    }  # fmt: skip


def die(group: Any, spec: dict[str, Any]) -> str:
    """Rank 1 ends in the middle of the loss; what the others see."""
    if group.rank() == 1:
        torch.distributed.all_reduce = lambda *_, **__: os._exit(1)
    return raised(lambda: loss_case(group, spec))
