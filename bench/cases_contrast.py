"""What the contrast family is measured on: filters, shapes, and data.

Logits look like a language model's: per row a Zipf law whose slope runs from nearly flat to
confident over the batch, and noise, most of it common to both rows of a pair. In the flat modes
there are no likely tokens, which is where samplers that search for a threshold take longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALPHA = 1.5  # Self-CD's ratio of 2.5
SLOPES = (1.25, 3.0)  # of the logits over the logarithm of the rank, first and last row
COMMON, OWN = 1.0, 0.5  # noise of a pair, and of each of its rows
HEAD_SPREAD = 3.0  # standard deviation of a head's logits
# Rows whose gradients are compared with the truth; values are compared everywhere.
SAMPLED = 64
SEED = 20240811


class Filters(NamedTuple):
    """What stands between the contrasted logits and the draw; None is off."""

    plausibility: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


_USUAL = Filters(top_k=50, top_p=0.9)


class Mode(NamedTuple):
    """One way in which the family is used."""

    op: str
    filters: Filters = Filters()
    read: int = 2  # rows of logits per output row
    flat: bool = False
    products: int = 0
    backward: bool = False

    @property
    def draws(self) -> bool:
        """Whether tokens come out, not values."""
        return self.op in ("contrastive_sample", "linear_contrastive_sample")


_SAMPLE = "contrastive_sample"
MODES = {
    "topk_topp": Mode(_SAMPLE, _USUAL),
    "greedy": Mode(_SAMPLE, Filters(plausibility=0.1, temperature=0.0)),
    "free": Mode(_SAMPLE),
    "topp": Mode(_SAMPLE, Filters(top_p=0.9)),
    "minp": Mode(_SAMPLE, Filters(min_p=0.05)),
    "all": Mode(_SAMPLE, Filters(None, 0.7, 50, 0.9, 0.05)),
    "plausible": Mode(_SAMPLE, Filters(plausibility=0.1)),
    "three_rows": Mode(_SAMPLE, _USUAL, read=3),
    "flat": Mode(_SAMPLE, _USUAL, flat=True),
    "flat_topp": Mode(_SAMPLE, Filters(top_p=0.9), flat=True),
    "logits": Mode("contrastive_logits", Filters(plausibility=0.1)),
    "logp": Mode("contrastive_logp", backward=True),
    "linear_logp": Mode("linear_contrastive_logp", products=1),
    "linear_logp_grad": Mode("linear_contrastive_logp", products=4, backward=True),
    "linear_topk_topp": Mode("linear_contrastive_sample", _USUAL, products=1),
}


class Case(NamedTuple):
    """One mode at one shape."""

    mode: str
    dtype_name: str
    shape: tuple[int, ...]  # (B, V), or (N, D, V) with a head
    device: str
    sweep: bool = False  # a point of a curve, which is timed for less long

    family = "contrast"
    capturable = True

    @property
    def about(self) -> Mode:
        return MODES[self.mode]

    @property
    def op(self) -> str:
        return self.about.op

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def classes(self) -> int:
        return self.shape[-1]

    @property
    def id(self) -> str:
        return f"{self.mode}-{self.dtype_name}-{'x'.join(map(str, self.shape))}"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype_name)

    @property
    def flop(self) -> int:
        product = 2 * self.rows * self.shape[1] * self.classes
        return self.about.products * product if self.about.products else 0

    @property
    def bytes(self) -> int:
        size, directions = self.dtype.itemsize, 2 if self.about.backward else 1
        if self.about.products:
            width = self.shape[1]
            return (2 * self.rows + self.classes) * width * size * directions
        written = 4 if self.mode == "logits" else 0
        read = self.about.read * size * directions
        return self.rows * self.classes * (read + written)

    def describe(self) -> dict[str, object]:
        """The fields that name this case in a result row."""
        return {
            "family": self.family, "op": self.op, "mode": self.mode, "dtype": self.dtype_name,
            "shape": list(self.shape), "device": self.device,
        }  # fmt: skip


class Inputs(NamedTuple):
    """The tensors of a case; what is differentiated requires grad."""

    positive: Tensor  # (B, V), or hidden states (N, D)
    negative: Tensor  # the same
    anchor: Tensor | None  # (B, V)
    head: Tensor | None  # (V, D)
    target: Tensor  # (B,)
    upstream: Tensor  # (B,)

    def copy(self) -> Inputs:
        """The same values in memory of their own."""
        return Inputs(
            *(
                None if t is None else t.detach().clone().requires_grad_(t.requires_grad)
                for t in self
            )
        )

    def map(self, change: Any) -> Inputs:
        """These inputs with all floating tensors changed."""
        return Inputs(*(t if t is None or not t.is_floating_point() else change(t) for t in self))


def make_inputs(case: Case) -> Inputs:
    """Deterministic data of the case."""
    rows, classes = case.rows, case.classes
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=case.device, generator=generator)

    head = anchor = None
    if case.about.products:
        width = case.shape[1]
        common = normal(rows, width)
        positive, negative = (common + OWN * normal(rows, width) for _ in range(2))
        head = (normal(classes, width) * (HEAD_SPREAD / width**0.5)).to(case.dtype)
    else:
        common = COMMON * normal(rows, classes)
        if not case.about.flat:
            uniform = torch.rand(rows, classes, device=case.device, generator=generator)
            slopes = torch.linspace(*SLOPES, rows, device=case.device)[:, None]
            common -= slopes * torch.log1p(classes * uniform)
        positive, negative = (common + OWN * normal(rows, classes) for _ in range(2))
        if case.about.read == 3:
            anchor = (common + OWN * normal(rows, classes)).to(case.dtype)
    target = torch.randint(classes, (rows,), device=case.device, generator=generator)
    upstream = normal(rows)
    positive, negative = positive.to(case.dtype), negative.to(case.dtype)
    if case.about.backward:
        for tensor in (positive, negative, head):
            if tensor is not None:
                tensor.requires_grad_()
    return Inputs(positive, negative, anchor, head, target, upstream)


def cases(device: str, *, quick: bool = False) -> list[Case]:
    """The suite: the rows of the targets, the other ways of use, then sweeps over B and V."""
    if quick:
        modes = [
            Case(mode, dtype, (6, 16, 512) if MODES[mode].products else (6, 512), device)
            for dtype in ("float32", "bfloat16")
            for mode in MODES
        ]
        return [*modes, *(Case("topk_topp", "float32", (6, v), device) for v in (256, 1024))]
    suite = _cuda_cases() if device == "cuda" else _cpu_cases()
    found: dict[tuple[Any, ...], Case] = {}
    for case in suite:
        # A point of a sweep that is a case already is not measured twice.
        found.setdefault(case[:4], case)
    return list(found.values())


def _cpu_cases() -> Iterator[Case]:
    rows = (16, 128256)
    for dtype in ("float32", "bfloat16"):
        for mode in ("topk_topp", "greedy"):
            yield Case(mode, dtype, rows, "cpu")
    for mode in ("free", "topp", "minp", "all", "plausible", "three_rows", "flat", "flat_topp",
                 "logits"):  # fmt: skip
        yield Case(mode, "bfloat16", rows, "cpu")
    for dtype in ("float32", "bfloat16"):
        yield Case("logp", dtype, (1024, 32000), "cpu")
        yield Case("linear_logp", dtype, (2048, 1024, 32000), "cpu")
    yield Case("linear_logp_grad", "bfloat16", (2048, 1024, 32000), "cpu")
    yield Case("linear_topk_topp", "bfloat16", (16, 1024, 128256), "cpu")
    for batch in (1, 4, 16, 64):
        yield Case("topk_topp", "bfloat16", (batch, 128256), "cpu", sweep=True)
    for classes in (8192, 32000, 65536, 128256, 256000):
        yield Case("topk_topp", "bfloat16", (16, classes), "cpu", sweep=True)


def _cuda_cases() -> Iterator[Case]:
    rows = (256, 128256)
    for mode in ("all", "topk_topp", "greedy", "free", "topp", "minp", "plausible", "three_rows",
                 "flat", "flat_topp", "logits"):  # fmt: skip
        yield Case(mode, "bfloat16", rows, "cuda")
    for mode in ("all", "greedy"):
        yield Case(mode, "float32", rows, "cuda")
    yield Case("logp", "bfloat16", (8192, 128256), "cuda")
    for mode in ("linear_logp", "linear_logp_grad"):
        yield Case(mode, "bfloat16", (8192, 4096, 128256), "cuda")
    yield Case("linear_topk_topp", "bfloat16", (256, 4096, 128256), "cuda")
    for batch in (1, 16, 64, 256, 512):
        yield Case("all", "bfloat16", (batch, 128256), "cuda")
    for classes in (32000, 64000, 128256, 256000):
        yield Case("all", "bfloat16", (256, classes), "cuda")
