"""What the orthogonal family is measured on: modes, shapes and data.

A case is a model's adapters: for each of its modules the earlier tasks' rows and the new task's.
Entries have the size that LoRA's initialisation gives them, ``(3 d) ** -0.5``.

The l1 norm's gradient is the sign of a product of rows, which rounding decides where the product is
next to 0. No product of the data is: each is at least ``CLEAR`` of the size that products of random
rows have. For that the earlier rows are moved a little within the span of the new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from released_orthogonal import tree

CLEAR = 0.05
# Widths of LLaMA-7B: of the last of a layer's seven products, and of the others.
_WIDE, _NARROW = 11008, 4096


class Mode(NamedTuple):
    """One way in which the family is used."""

    op: str = "orthogonal_penalty"
    norm: str = "l1"
    backward: bool = True
    grad_previous: bool = False
    layout: str = "equal"


MODES = {
    "l1": Mode(),
    "all_linear": Mode(layout="all_linear"),
    "tasks": Mode(layout="tasks"),
    "frobenius2": Mode(norm="frobenius2"),
    "value": Mode(backward=False),
    "both": Mode(grad_previous=True),
    "side_b": Mode(layout="columns"),
    "ragged": Mode(layout="ragged"),
    "adapters": Mode("project_out"),
    "gpm": Mode("project_out"),
}


class Size(NamedTuple):
    """The matrices of one module."""

    previous: tuple[int, ...]  # rows of each of its tensors
    current: int
    width: int


class Case(NamedTuple):
    """One mode at one shape."""

    mode: str
    dtype_name: str
    shape: tuple[int, int, int, int]  # M, R, r, d, each the largest; (M, k, n, d) of project_out
    device: str
    model: str = ""  # whose names the parameters have, for the released code's walk
    sweep: bool = False  # a point of a curve, which is timed for less long

    family = "orthogonal"
    capturable = True

    @property
    def about(self) -> Mode:
        return MODES[self.mode]

    @property
    def op(self) -> str:
        return self.about.op

    @property
    def projects(self) -> bool:
        return self.op == "project_out"

    @property
    def id(self) -> str:
        return f"{self.mode}-{self.dtype_name}-{'x'.join(map(str, self.shape))}"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name)

    @property
    def sizes(self) -> tuple[Size, ...]:
        return _sizes(self)

    @property
    def equal(self) -> bool:
        """Whether all modules have the same shapes."""
        return len(set(self.sizes)) == 1

    @property
    def flop(self) -> int:
        products = 2 if self.projects else 1 + self.about.backward + self.about.grad_previous
        return products * sum(2 * sum(s.previous) * s.current * s.width for s in self.sizes)

    @property
    def bytes(self) -> int:
        """One read of the earlier rows, and one write if they have gradients.

        For projections one read of bases and tensors, and one write of the results.
        """
        previous = sum(sum(s.previous) * s.width for s in self.sizes)
        current = sum(s.current * s.width for s in self.sizes)
        moved = previous + 2 * current if self.projects else previous
        return (moved + self.about.grad_previous * previous) * self.dtype.itemsize

    @property
    def tiny(self) -> Case:
        """The same mode with small matrices; 42 modules are whole layers of every model."""
        return self._replace(shape=(42, 16, 8, 344))

    def describe(self) -> dict[str, object]:
        """The fields that name this case in a result row."""
        return {
            "family": self.family, "op": self.op, "mode": self.mode, "dtype": self.dtype_name,
            "shape": list(self.shape), "device": self.device,
        }  # fmt: skip


@lru_cache(maxsize=64)
def _sizes(case: Case) -> tuple[Size, ...]:
    count, rows, rank, width = case.shape
    layout = case.about.layout

    def size(m: int) -> Size:
        if layout == "tasks":
            return Size((rank,) * (rows // rank), rank, width)
        if layout == "all_linear":
            return Size((rows,), rank, width if m % 7 == 6 else width * _NARROW // _WIDE)
        if layout == "ragged":
            return Size((rows * (1 + m % 4) // 4,), max(1, rank >> m % 3), width >> 2 * (m % 2))
        return Size((rows,), rank, width)

    return tuple(map(size, range(count)))


Outputs = dict[str, Tensor]


class Inputs:
    """The tensors of a case: parameters of modules, one after the other in two blocks of memory.

    Whoever keeps them stacked finds them so, and the others find parameters like any.
    """

    def __init__(self, case: Case, flat_previous: Tensor, flat_current: Tensor) -> None:
        self.case, self.flat_previous, self.flat_current = case, flat_previous, flat_current
        columns, about = case.about.layout == "columns", case.about
        # As they are stored: rows, or in the mode "side_b" columns.
        self.stored_previous = [
            [_parameter(t, about.grad_previous) for t in tensors]
            for tensors in _cut(flat_previous, [s.previous for s in case.sizes], case)
        ]
        self.stored_current = [
            _parameter(t, about.backward and not case.projects)
            for (t,) in _cut(flat_current, [(s.current,) for s in case.sizes], case)
        ]
        tensors = [[t.mT if columns else t for t in stored] for stored in self.stored_previous]
        self.previous: list[Any] = (
            tensors if about.layout == "tasks" else list(chain.from_iterable(tensors))
        )
        self.model = None
        if case.model:
            self.model = tree(case.model, [t for (t,) in self.stored_previous], self.stored_current)
        # Where each module's rows end, for grouped products.
        rows = torch.tensor([sum(s.previous) for s in case.sizes], device=flat_previous.device)
        self.ends = rows.cumsum(0, dtype=torch.int32)
        self.projectors: list[Tensor] = []
        if case.mode == "gpm":
            self.projectors = [(q.mT @ q).detach() for q in self.previous]

    def __iter__(self) -> Iterator[Tensor]:
        """The memory that every call reads."""
        yield from (self.flat_previous, self.flat_current)

    def copy(self) -> Inputs:
        """The same values in memory of their own."""
        return Inputs(self.case, self.flat_previous.clone(), self.flat_current.clone())

    def current(self) -> list[Tensor]:  # M times (r, d)
        """The new rows; views of columns are made in every call, as autograd asks for."""
        columns = self.case.about.layout == "columns"
        return [t.mT for t in self.stored_current] if columns else list(self.stored_current)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Every matrix of earlier rows with the new rows of its module."""
        entries = ([p] if isinstance(p, Tensor) else p for p in self.previous)
        current = self.current()
        return [(p, c) for tensors, c in zip(entries, current, strict=True) for p in tensors]

    def stacks(self) -> tuple[Tensor, Tensor]:  # (M, R, d), (M, r, d)
        """Both blocks as they are, where all modules have the same shapes."""
        count, rows, rank, width = self.case.shape
        if self.case.about.layout == "columns":
            return (
                self.flat_previous.view(count, width, rows).mT,
                self.flat_current.view(count, width, rank).mT,
            )
        return (
            self.flat_previous.view(count, rows, width),
            self.flat_current.view(count, rank, width),
        )

    def due(self) -> dict[str, list[Tensor]]:
        """What comes out beside the value, by name: tensors of the same shapes."""
        if self.case.projects:
            return {"out": list(self.stored_current)}
        due = {}
        if self.case.about.backward:
            due["grad_current"] = list(self.stored_current)
        if self.case.about.grad_previous:
            due["grad_previous"] = list(chain.from_iterable(self.stored_previous))
        return due


def named(kind: str, tensors: Sequence[Tensor]) -> Outputs:
    """Results of one kind: "kind.0", "kind.1", ..."""
    return {f"{kind}.{i}": tensor for i, tensor in enumerate(tensors)}


def _parameter(tensor: Tensor, requires_grad: bool) -> Parameter:
    return Parameter(tensor, requires_grad=requires_grad)


def _cut(flat: Tensor, rows: Sequence[Sequence[int]], case: Case) -> list[list[Tensor]]:
    """Views of the block: for every module tensors of so many rows (or columns)."""
    columns, place, found = case.about.layout == "columns", 0, []
    for counts, size in zip(rows, case.sizes, strict=True):
        tensors = []
        for count in counts:
            part = flat[place : place + count * size.width]
            tensors.append(part.view((size.width, count) if columns else (count, size.width)))
            place += count * size.width
        found.append(tensors)
    return found


def make_inputs(case: Case) -> Inputs:
    """Deterministic data of the case."""
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=case.device, generator=generator)

    def empty(numbers: int) -> Tensor:
        return torch.empty(numbers, dtype=case.dtype, device=case.device)

    flat_previous = empty(sum(sum(s.previous) * s.width for s in case.sizes))
    flat_current = empty(sum(s.current * s.width for s in case.sizes))
    made = Inputs(case, flat_previous, flat_current)
    tensors = zip(made.stored_previous, made.stored_current, case.sizes, strict=True)
    columns = case.about.layout == "columns"
    with torch.no_grad():
        for stored, current, size in tensors:
            c = normal(size.current, size.width) * (3 * size.width) ** -0.5
            c = c.to(case.dtype).double()
            p = normal(sum(size.previous), size.width).double()
            if case.projects:
                p = torch.linalg.qr(p.mT).Q.mT
            else:
                p = with_clear_signs(p * (3 * size.width) ** -0.5, c)
            current.copy_(c.mT if columns else c)
            for part, tensor in zip(p.split(size.previous), stored, strict=True):
                tensor.copy_(part.mT if columns else part)
    if not case.projects and not all(signs_are_clear(p, c) for p, c in made.pairs()):
        raise RuntimeError(f"{case.id}: rounding decides the sign of a product of the data")
    # Again from the filled memory: what is made ahead of the calls depends on the values.
    return Inputs(case, flat_previous, flat_current)


def _usual(p: Tensor, c: Tensor) -> Tensor:  # (R, r)
    """The size of a product of random rows of these lengths."""
    return p.norm(dim=1)[:, None] * c.norm(dim=1) / p.shape[1] ** 0.5


def with_clear_signs(p: Tensor, c: Tensor) -> Tensor:  # (R, d), (r, d) -> (R, d), float64
    """``p`` with its small products made twice as large as ``CLEAR`` asks for."""
    products = p @ c.T
    wanted = products.abs().clamp_min(2 * CLEAR * _usual(p, c)).copysign(products)
    return p + (wanted - products) @ torch.linalg.solve(c @ c.T, c)


@torch.no_grad()
def signs_are_clear(p: Tensor, c: Tensor) -> bool:
    """Whether no product of the rows is next to 0."""
    p, c = p.double(), c.double()
    return bool(((p @ c.T).abs() >= CLEAR * _usual(p, c)).all())


def cases(device: str, *, quick: bool = False) -> list[Case]:
    """The suite: the rows of the targets, the other ways of use, then sweeps over R and r."""
    if quick:
        shapes = {"all_linear": (7, 8, 8, 172), "gpm": (2, 8, 32, 32)}
        models = {"l1": "llama q,v", "all_linear": "llama all-linear"}
        usual = (4, 16, 8, 64)
        modes = [
            Case(mode, dtype, shapes.get(mode, usual), device, models.get(mode, ""))
            for dtype in _BOTH_DTYPES
            for mode in MODES
        ]
        return [*modes, *(Case("l1", "float32", (4, rows, 8, 64), device) for rows in (4, 8))]
    suite = _cuda_cases() if device == "cuda" else _cpu_cases()
    found: dict[tuple[Any, ...], Case] = {}
    for case in suite:
        # A point of a sweep that is a case already is not measured twice.
        found.setdefault(case[:4], case)
    return list(found.values())


RANK = 8
# Fourteen earlier tasks of rank 8, as when the last of O-LoRA's fifteen trains.
LLAMA_QV = (64, 112, RANK, _NARROW)
LLAMA_ALL_LINEAR = (224, 112, RANK, _WIDE)
T5_QV = (144, 112, RANK, 1024)
_BOTH_DTYPES = ("float32", "bfloat16")


def _cpu_cases() -> Iterator[Case]:
    for dtype in _BOTH_DTYPES:
        yield Case("l1", dtype, LLAMA_QV, "cpu", "llama q,v")
    yield Case("all_linear", "bfloat16", LLAMA_ALL_LINEAR, "cpu", "llama all-linear")
    yield Case("l1", "float32", T5_QV, "cpu", "t5 q,v")
    for mode in ("tasks", "frobenius2", "both", "side_b", "ragged"):
        for dtype in _BOTH_DTYPES:
            yield Case(mode, dtype, LLAMA_QV, "cpu")
    yield Case("value", "bfloat16", LLAMA_QV, "cpu")
    yield from _projections(_BOTH_DTYPES, "cpu")
    yield from _sweeps("cpu")


def _cuda_cases() -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        yield Case("l1", dtype, LLAMA_QV, "cuda", "llama q,v")
        yield Case("all_linear", dtype, LLAMA_ALL_LINEAR, "cuda", "llama all-linear")
        yield Case("l1", dtype, T5_QV, "cuda", "t5 q,v")
    for mode in ("tasks", "frobenius2", "value", "both", "side_b", "ragged"):
        yield Case(mode, "bfloat16", LLAMA_QV, "cuda")
    yield from _projections(_BOTH_DTYPES, "cuda")
    yield from _sweeps("cuda")


def _projections(dtypes: Sequence[str], device: str) -> Iterator[Case]:
    for dtype in dtypes:
        yield Case("adapters", dtype, LLAMA_QV, device)
        yield Case("gpm", dtype, (12, 64, 1024, 1024), device)


def _sweeps(device: str) -> Iterator[Case]:
    """Over the number of earlier tasks, and over the rank of the new one."""
    count, rows, rank, width = LLAMA_QV
    for tasks in (1, 2, 4, 8, 14):
        yield Case("l1", "bfloat16", (count, tasks * RANK, rank, width), device, sweep=True)
    for rank in (4, 8, 16, 64):
        yield Case("l1", "bfloat16", (count, rows, rank, width), device, sweep=True)
