"""Process groups: which slice of the vocabulary a rank holds, and what the ranks tell each other.

A group goes by its name, a string, so that an operator can take it under ``torch.compile``.
"""

from __future__ import annotations

import zlib
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.ops._checks import FLOATING, bad, check_target_range

# What every rank announces first in every call; the order of the columns below.
_FACTS = ("slice", "tokens", "input's width", "dtype of the products", "options", "target")
# In place of the slice's size, from a rank whose call does not get through its checks.
_FAILED = -1


class Shard(NamedTuple):
    """That a head is one rank's slice of a vocabulary, as the sharded operators take it."""

    group: str
    sequence_parallel: bool


class Team(NamedTuple):
    """The ranks of a group and what each of them holds, the same on all of them."""

    group: Any  # ProcessGroup
    rank: int
    slices: list[int]  # rows of the head, per rank
    counts: list[int] | None  # tokens per rank if each brings its own, else None
    ends: Tensor  # (P,) where each slice ends in the vocabulary

    @property
    def classes(self) -> int:
        """Size of the whole vocabulary."""
        return sum(self.slices)

    @property
    def offset(self) -> int:
        """The first class of this rank's slice."""
        return sum(self.slices[: self.rank])

    @property
    def own(self) -> slice:
        """This rank's tokens among those of all ranks."""
        if self.counts is None:
            return slice(None)
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])

    def owner(self, target: Tensor) -> Tensor:
        """The rank whose slice has each target; any rank for a target that is in none."""
        return torch.bucketize(target, self.ends, right=True).clamp(max=len(self.slices) - 1)

    def own_tokens(self, values: Tensor) -> Tensor:
        """This rank's part of a per-token result, in memory of its own."""
        return values if self.counts is None else values[self.own].clone()

    def all_tokens(self, values: Any) -> Any:
        """The tokens of all ranks, in rank order; ``values`` itself if the ranks share them."""
        if values is None or self.counts is None:
            return values
        return gather(self.group, values, self.counts)


def process_group(name: str) -> Any:
    """The group of that name."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def gather(group: Any, values: Tensor, lengths: list[int], dim: int = 0) -> Tensor:
    """The ranks' tensors one after the other along ``dim``, where they may differ in length.

    Every rank sends as many bytes as the longest.
    """
    from torch import distributed

    values = values.movedim(dim, 0)
    longest = max(lengths)
    padded = values.new_zeros((longest, *values.shape[1:]))
    padded[: values.shape[0]] = values
    parts = padded.new_empty((len(lengths), *padded.shape))
    distributed.all_gather(list(parts), padded, group=group)
    if all(length == longest for length in lengths):
        return parts.flatten(0, 1).movedim(0, dim)
    pieces = [part[:length] for part, length in zip(parts, lengths, strict=True)]
    return torch.cat(pieces).movedim(0, dim)


def assemble(
    shard: Shard,
    weight: Tensor,  # (V / P, D)
    target: Tensor,  # (N,)
    keep: Tensor | None,  # (N,)
    compute_dtype: torch.dtype,
    options: tuple[Any, ...] = (),
) -> Team:
    """Exchange the sizes, and refuse a call in which the ranks do not agree.

    One collective of six integers, which waits for the stream. Its checksum covers the targets and
    which of them ``keep`` lets through: the ranks have to leave out the same rows. ``options`` are
    all that the ranks have to give alike, with the same ``repr`` in every process.
    """
    group = process_group(shard.group)
    kept = target if keep is None else torch.where(keep, target, -1)
    table = _exchange(
        group, [weight.shape[0], target.shape[0], weight.shape[1], FLOATING.index(compute_dtype),
                _code(options, shard.sequence_parallel)], _checksum(kept),
    )  # fmt: skip
    columns = _agreed(table, shard.sequence_parallel)
    if not sum(columns["slice"]):
        raise bad("linear_weight", "non-empty on some rank of group", columns["slice"],
                  "pass each rank its slice of the head")  # fmt: skip
    counts = columns["tokens"] if shard.sequence_parallel else None
    return Team(group, group.rank(), columns["slice"], counts, table[:, 0].cumsum(0))


def _exchange(group: Any, numbers: list[int], checksum: Tensor) -> Tensor:
    """Every rank's facts, (P, 6): the same collective whatever the call, and always its first.

    A backend answers collectives that do not match with an abort, or not at all.
    """
    from torch import distributed

    refuse_capture(checksum)
    facts = torch.tensor([*numbers, 0], device=checksum.device)
    facts[-1] = checksum
    table = facts.new_empty((group.size(), len(_FACTS)))
    distributed.all_gather(list(table), facts, group=group)
    return table


class FailingTogether:
    """``with FailingTogether(shard, weight):`` around checks that one rank alone may not pass.

    That rank tells the others in place of its first exchange of facts, and all of them raise.
    """

    def __init__(self, shard: Shard | None, weight: Tensor) -> None:
        self.shard, self.weight = shard, weight

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.shard is None or not isinstance(error, Exception) or torch.compiler.is_compiling():
            return
        # Whatever keeps the word from arriving (a device that the backend does not serve, ranks
        # that do not make the call), the caller is to see the first error.
        with suppress(RuntimeError):
            checksum = torch.zeros((), dtype=torch.int64, device=self.weight.device)
            _exchange(process_group(self.shard.group), [_FAILED, 0, 0, 0, 0], checksum)


def refuse_capture(tensor: Tensor) -> None:
    """The host has to know every rank's size before it decides on shapes."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "group must be None under CUDA graph capture, got a group of ranks that compare their "
            "sizes on the host; capture the model without its head"
        )


def _agreed(table: Tensor, sequence_parallel: bool) -> dict[str, list[int]]:
    """The facts by name, where the ranks' calls fit together."""
    columns = dict(zip(_FACTS, table.t().tolist(), strict=True))
    failed = [rank for rank, size in enumerate(columns["slice"]) if size == _FAILED]
    if failed:
        raise bad("group", "of ranks whose arguments pass their checks",
                  f"an error on ranks {failed}", "their own errors say what is wrong")  # fmt: skip
    differing = {
        name: values
        for name, values in columns.items()
        if len(set(values)) > 1 and not (sequence_parallel and name in ("tokens", "target"))
    }
    differing.pop("slice", None)
    if "tokens" in differing or "target" in differing:
        got = differing.get("tokens", "other targets, or weights of 0 in other places")
        raise bad(
            "target", "the same on every rank of group", f"{got} (tokens of each rank)"
            if "tokens" in differing else got,
            "for ranks with their own tokens pass TokenLossOptions(sequence_parallel=True); a head "
            "that a data-parallel wrapper shards has to be gathered first",
        )  # fmt: skip
    if differing:
        name, values = next(iter(differing.items()))
        if name == "options":
            values = [rank for rank, value in enumerate(values) if value != values[0]]
        got = f"other ones on ranks {values}" if name == "options" else values
        raise bad("group", f"of ranks that agree on the {name}", got,
                  "make the same call on every rank")  # fmt: skip
    return columns


def _code(*options: Any) -> int:
    """A number for the options, the same in every process (which ``hash`` is not)."""
    return zlib.crc32(repr(options).encode())


def _checksum(values: Tensor) -> Tensor:
    """Sum of mixed bits, which wraps; other values, or the same in another order, change it."""
    place = torch.arange(1, values.numel() + 1, device=values.device)
    mixed = values + place * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return (mixed ^ (mixed >> 32)).sum()


@torch.library.impl("trimtab::group_sum", "CompositeExplicitAutograd")
def _group_sum(values: Tensor, group: str, first_call: str | None = None) -> Tensor:
    """Sum over the ranks. Where it is a call's first collective, ``first_call`` tells it apart."""
    from torch import distributed

    ranks = process_group(group)
    if first_call is not None:
        code = _code("sum", first_call, values.shape, values.dtype)
        _agreed(_exchange(ranks, [0, 0, 0, 0, code], values.new_zeros((), dtype=torch.int64)), True)
    total = values.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=ranks)
    return total


@torch.library.impl("trimtab::sharded_class_weight_sum", "CompositeExplicitAutograd")
def _sharded_class_weight_sum(
    class_weight: Tensor,  # (V / P,)
    target: Tensor,  # (N,)
    ignore_index: int,
    group: str,
    sequence_parallel: bool,
) -> Tensor:
    """Sum of the class weights of the targets that are not ignored."""
    team = assemble(
        Shard(group, sequence_parallel), class_weight[:, None], target, target != ignore_index,
        class_weight.dtype, ("class weights",),
    )  # fmt: skip
    target = team.all_tokens(target)
    check_target_range(target, ignore_index, team.classes)
    here = (target >= team.offset) & (target < team.offset + class_weight.shape[0])
    local = (target - team.offset)[here & (target != ignore_index)]
    return torch.ops.trimtab.group_sum.default(class_weight[local].sum(), group)


@torch.library.impl("trimtab::gather_logits", "CompositeExplicitAutograd")
def _gather_logits(logits: Tensor, group: str) -> Tensor:
    """Rows of the whole vocabulary from every rank's slice of them, (B, V)."""
    ranks, (rows, classes) = process_group(group), logits.shape
    numbers = [classes, rows, 0, FLOATING.index(logits.dtype), _code("logits")]
    columns = _agreed(_exchange(ranks, numbers, logits.new_zeros((), dtype=torch.int64)), True)
    if len(set(columns["tokens"])) > 1:
        raise bad("positive", "of the same rows on every rank of group", columns["tokens"],
                  "make the same call on every rank")  # fmt: skip
    return gather(ranks, logits, columns["slice"], dim=1).contiguous()


class ReplicatedSum(torch.autograd.Function):
    """A sum over the ranks that every rank then uses alike, with the same upstream gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str) -> Tensor:
        """One collective."""
        ctx.group = group
        return torch.ops.trimtab.group_sum.default(values, group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """No collective: each rank has the whole upstream, and uses it for its own values."""
        return Replicated.apply(upstream, ctx.group), None


class Replicated(torch.autograd.Function):
    """What every rank holds alike and uses for tokens of its own: their upstreams are summed."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str) -> Tensor:
        """Nothing to do."""
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """One collective."""
        return ReplicatedSum.apply(upstream, ctx.group), None


class PartialSum(torch.autograd.Function):
    """A sum over ranks that use it each for tokens of its own: their upstreams are summed too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: str, first_call: str | None = None) -> Tensor:
        """One collective; with ``first_call`` one more, which compares it over the ranks."""
        ctx.group = group
        return torch.ops.trimtab.group_sum.default(values, group, first_call)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        """One collective."""
        return PartialSum.apply(upstream, ctx.group), None, None


def check_group(group: object, name: str = "group") -> str | None:
    """The name of a process group of more than one rank."""
    if group is None:
        return None
    # Dynamo of torch 2.10 can't ask a group what it has.
    if not torch.compiler.is_compiling() and not hasattr(group, "group_name"):
        raise TypeError(
            f"{name} must be a torch.distributed ProcessGroup that this rank is in, got "
            f"{type(group).__name__}; a DeviceMesh gives one by mesh.get_group()"
        )
    return group.group_name if group.size() > 1 else None  # type: ignore[attr-defined]


def check_normalizer_group(group: object, shard: Shard | None) -> str | None:
    """The name of the group over which the divisor is summed, of ranks with other tokens."""
    name = check_group(group, "normalizer_group")
    if name is None or shard is None or torch.compiler.is_compiling():
        return name
    from torch.distributed import get_process_group_ranks

    ranks = [get_process_group_ranks(process_group(each)) for each in (name, shard.group)]
    shared = sorted(set(ranks[0]) & set(ranks[1]))
    if len(shared) > 1:
        raise bad("normalizer_group", "without other ranks of group, which count the same tokens",
                  f"the ranks {shared} in both", "pass the data-parallel group")  # fmt: skip
    return name


def refuse_partitioned(name: str, tensor: object) -> None:
    """ZeRO-3 leaves an empty tensor in a parameter's place."""
    if isinstance(tensor, Tensor) and tensor.numel() == 0 and hasattr(tensor, "ds_id"):
        shape = tuple(getattr(tensor, "ds_shape", ()))
        raise bad(name, "gathered", f"a DeepSpeed ZeRO-3 partition of a tensor of shape {shape}",
                  "call within `with deepspeed.zero.GatheredParameters([...]):`")  # fmt: skip


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor, without importing what defines it."""
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    return not plain and isinstance(tensor, Tensor) and hasattr(tensor, "placements")


class LocalHead(NamedTuple):
    """This rank's part of a head in plain tensors."""

    weight: Tensor  # (V / P, D)
    bias: Tensor | None  # (V / P,)
    class_weight: Tensor | None  # (V / P,)
    shard: Shard | None


def local_head(
    input: object,
    weight: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None = None,
    group: Any = None,
    sequence_parallel: bool = False,
) -> LocalHead:
    """Plain tensors of a head that may be sharded, and by whom.

    Raises:
        ValueError: a layout that is no slice of the vocabulary.
        TypeError: ``group`` is no process group, or ``input`` a DTensor.
    """
    name = check_group(group)
    for argument, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        refuse_partitioned(argument, tensor)
    if is_distributed(input):
        raise TypeError(
            "input must be a plain tensor, got a DTensor; pass input.full_tensor(), or "
            "input.to_local() where every rank holds all of it"
        )
    has_group = group is not None
    if is_distributed(weight):
        layout = _layout(weight)
        name = _group_of(weight, layout, group, name)
        has_group = layout == "sharded"
        locals_ = [
            _local(argument, tensor, weight, layout)
            for argument, tensor in (("linear_bias", bias), ("weight", class_weight))
        ]
        weight, (bias, class_weight) = weight.to_local(), locals_  # type: ignore[attr-defined]
    elif is_distributed(bias) or is_distributed(class_weight):
        raise TypeError(
            "linear_weight must be a DTensor where linear_bias or weight is one, got a plain "
            "tensor; pass their .to_local()"
        )
    if sequence_parallel and not has_group:
        raise bad("options.sequence_parallel", "False without a group", True,
                  "pass group=, the ranks that hold the other tokens")  # fmt: skip
    shard = None if name is None else Shard(name, sequence_parallel)
    return LocalHead(weight, bias, class_weight, shard)


def _layout(weight: Any) -> str:
    """Whether each rank holds a slice ("sharded") or everything ("replicated")."""
    if weight.device_mesh.ndim != 1:
        raise bad("linear_weight", "a DTensor on a mesh of one dimension",
                  f"{weight.device_mesh.ndim} dimensions",
                  "pass linear_weight.to_local() and group=mesh.get_group(name)")  # fmt: skip
    (placement,) = weight.placements
    if placement.is_replicate():
        return "replicated"
    if not placement.is_shard(0):
        raise bad("linear_weight", "a DTensor with placement Shard(0) or Replicate()", placement,
                  "linear_weight.redistribute(placements=[Shard(0)])")  # fmt: skip
    return "sharded"


def _group_of(weight: Any, layout: str, group: Any, given: str | None) -> str | None:
    """The name of the mesh's group, which a ``group`` that is given has to be."""
    if layout == "replicated":
        if group is not None:
            raise bad("group", "None for a DTensor that every rank holds all of", group,
                      "leave group out, or redistribute the head to Shard(0)")  # fmt: skip
        return None
    mesh = weight.device_mesh
    own = mesh.get_group()
    if not torch.compiler.is_compiling() and mesh.mesh.tolist() != sorted(mesh.mesh.tolist()):
        raise bad("linear_weight", "a DTensor on a mesh in the order of the ranks",
                  mesh.mesh.tolist(), "make the mesh of ascending ranks")  # fmt: skip
    if group is not None and given != check_group(own):
        raise bad("group", "that of linear_weight's device mesh", group, "leave group out")
    return check_group(own)


def _local(name: str, tensor: Any, weight: Any, layout: str) -> Any:
    """The local part of a tensor that lies as the head does; a plain one is a slice already."""
    if not is_distributed(tensor):
        return tensor
    if tensor.device_mesh != weight.device_mesh or _layout(tensor) != layout:
        raise bad(name, f"{layout} as linear_weight is", tensor.placements,
                  f"{name}.redistribute(linear_weight.device_mesh, "
                  "linear_weight.placements)")  # fmt: skip
    return tensor.to_local()
