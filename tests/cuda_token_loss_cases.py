"""Rows for the CUDA kernels of the token loss, the calls of its operators, and their checks.

Run as a script, this file does what the sanitised build has to survive.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import token_loss_oracle as oracle
from cuda_on_cpu import library
from trimtab.reference import token_loss as reference
from trimtab.testing import assert_within_budget

IGNORED = -100
EPS = torch.finfo(torch.float32).eps
LONG = 5000
DEVICES = {
    "one block": {},
    "clusters": {"shared_per_multiprocessor": 6 << 10},
    "clusters of long rows": {"shared_per_multiprocessor": 6 << 10, "shared_per_block": 1 << 10},
    "long rows": {"major": 8, "shared_per_multiprocessor": 6 << 10, "shared_per_block": 2 << 10},
}
EVERYTHING = {"logit_scale": 0.7, "softcap": 5.0, "label_smoothing": 0.2, "lse_square_scale": 0.1}
TRANSFORMS = [
    {},
    {"logit_scale": 0.0625},
    {"logit_scale": -1.5},
    {"softcap": 3.0},
    {"softcap": 3.0, "logit_scale": -2.5},
]


@functools.cache
def kernels() -> SimpleNamespace:
    return library.load("token_loss", sanitize=__name__ == "__main__")


class Rows(NamedTuple):
    """Rows in a larger memory, which holds NaN around them."""

    memory: Tensor
    rows: Tensor  # (N, V)

    def surroundings(self) -> Tensor:
        outside = torch.ones(self.memory.shape, dtype=torch.bool)
        offset, (stride, _) = self.rows.storage_offset(), self.rows.stride()
        outside.as_strided(self.rows.shape, (stride, 1), offset).fill_(False)
        return self.memory[outside]


def laid_out(values: Tensor, offset: int = 0, stride: int | None = None) -> Rows:
    """A copy of ``values`` (N, V) that starts ``offset`` elements into its memory."""
    count, classes = values.shape
    stride = classes if stride is None else stride
    memory = torch.full((offset + count * stride + 3,), math.nan, dtype=values.dtype)
    rows = memory.as_strided((count, classes), (stride, 1), offset)
    rows.copy_(values)
    return Rows(memory, rows)


def empty(like: Tensor) -> Tensor:
    return torch.full_like(like, math.nan)


def make(rows: int, classes: int, dtype: torch.dtype, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    return (torch.randn(rows, classes) * spread).to(dtype), torch.randint(classes, (rows,))


def run_loss(
    logits: Tensor,
    target: Tensor,
    coef: Tensor | None = None,
    class_weight: Tensor | None = None,
    grad: Tensor | None = None,
    ops: Any = None,
    **options: float,
) -> tuple[Tensor, Tensor]:
    full = {"logit_scale": 1.0, "softcap": 0.0, "label_smoothing": 0.0, "lse_square_scale": 0.0}
    loss = torch.full(target.shape, math.nan)
    grad = empty(logits) if grad is None else grad
    (ops or kernels()).token_loss_rows(
        logits, target, coef, class_weight, IGNORED, *(full | options).values(), loss, grad
    )
    return loss, grad


def run_logp(
    logits: Tensor,
    target: Tensor,
    inv_temperature: Tensor | None = None,
    grad: Tensor | None = None,
    ops: Any = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, ...]:
    outs = [torch.full(target.shape, math.nan) for _ in range(3)]
    outs += [torch.full(target.shape, -7), empty(logits) if grad is None else grad]
    (ops or kernels()).token_logp_rows(
        logits, target, inv_temperature, IGNORED, logit_scale, softcap, *outs
    )
    return tuple(outs)


def run_backward(
    logits: Tensor,
    target: Tensor,
    upstream: tuple[Tensor | None, ...],  # of logp, entropy, lse
    inv_temperature: Tensor | None = None,
    grad: Tensor | None = None,
    ops: Any = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    grad = empty(logits) if grad is None else grad
    (ops or kernels()).token_logp_rows_backward(
        logits, target, inv_temperature, IGNORED, logit_scale, softcap, *upstream, grad
    )
    return grad


def run_all(logits: Tensor, target: Tensor, ops: Any = None, **transform: float) -> list[Tensor]:
    """Results of all three operators."""
    ones, weight = torch.ones(len(target)), torch.rand(logits.shape[1])
    loss = {"label_smoothing": 0.1, "lse_square_scale": 0.01, **transform}
    return [
        *run_loss(logits, target, ones * 0.3, weight, ops=ops, **loss),
        *run_logp(logits, target, ops=ops, **transform),
        run_backward(logits, target, (ones, ones * -0.7, ones * 0.4), ops=ops, **transform),
    ]


def expected_loss(
    logits: Tensor, target: Tensor, coef: Tensor | None, class_weight: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in the precision of ``logits``; of float64 by the second oracle."""
    leaf = logits.clone().requires_grad_()
    options["softcap"] = options.get("softcap") or None
    if logits.dtype == torch.float64:
        eye = torch.eye(logits.shape[1], dtype=torch.float64)
        options["reduction"] = "none"
        loss = oracle.weighted_loss(
            leaf, eye, None, target, class_weight=class_weight, ignore_index=IGNORED, **options
        )
    else:
        loss = reference.token_loss(
            leaf, target, class_weight=class_weight, ignore_index=IGNORED, **options
        )
    coef = torch.ones_like(loss) if coef is None else coef.to(loss.dtype)
    keep = target != IGNORED
    (grad,) = torch.autograd.grad((loss[keep] * coef[keep]).sum(), leaf)
    return loss.detach(), grad


def check(names: str, actual: Any, eager: Any, truth: Any, largest_z: float) -> None:
    for name, *three in zip(names.split(), actual, eager, truth, strict=True):
        # Rounding z moves its probability by eps |z|; in 16 bits eager's own error covers that.
        amplified = three[0].dtype == torch.float32 and name.startswith("grad")
        magnitude = float(three[2].abs().max()) if amplified else 0.0
        assert_within_budget(*three, name=name, scale=magnitude * (1 + largest_z))


def check_loss(
    logits: Tensor, target: Tensor, actual: Any, coef: Any, class_weight: Any, **options: float
) -> None:
    eager = expected_loss(logits, target, coef, class_weight, **options)
    truth = expected_loss(logits.double(), target, coef, class_weight, **options)
    softcap = options.get("softcap") or math.inf
    largest = float((logits.float() * options.get("logit_scale", 1.0)).abs().max())
    check("loss grad", actual, eager, truth, min(softcap, largest))


def check_logp(
    logits: Tensor, target: Tensor, actual: tuple[Tensor, ...], back: Tensor,
    upstream: tuple[Tensor | None, ...], inv_temperature: Tensor | None = None, **options: Any,
) -> None:  # fmt: skip
    options["softcap"] = options.get("softcap") or None

    def expected(rows: Tensor) -> list[Tensor]:
        leaf = rows.clone().requires_grad_()
        if rows.dtype == torch.float64:
            eye = torch.eye(rows.shape[1], dtype=torch.float64)
            temperature = 1.0 if inv_temperature is None else 1 / inv_temperature.double()
            values = oracle.logp_and_entropy(leaf, eye, None, target, temperature, **options)
        else:
            values = reference.token_logp(leaf, target, inv_temperature=inv_temperature, **options)[
                :3
            ]
        terms = [
            (g.to(v.dtype) * v).sum()
            for g, v in zip(upstream, values, strict=True)
            if g is not None
        ]
        unit, grad = (
            torch.autograd.grad(f, leaf, retain_graph=True)[0]
            for f in (values[0].sum(), sum(terms))
        )
        return [*(value.detach() for value in values), unit, grad]

    factor = 1.0 if inv_temperature is None else float(inv_temperature.abs().max())
    largest = float((logits.float() * options.get("logit_scale", 1.0)).abs().max())
    largest = min(options["softcap"] or math.inf, largest) * factor
    results = [*actual[:3], actual[4], back]
    truth = expected(logits.double())
    check("logp entropy lse grad grad", results, expected(logits), truth, largest)
    z = reference.transform_logits(logits, options.get("logit_scale", 1.0), options["softcap"])
    assert torch.equal(actual[3], z.argmax(1))


def visit_every_edge() -> None:
    """Rows that end where their memory does, in every layout, on every device."""
    for facts in DEVICES.values():
        with library.device(**facts):
            for dtype in (torch.float32, torch.bfloat16):
                for classes in (0, 1, 7, 8, 127, 507):
                    for offset, stride in ((0, classes), (1, classes), (0, classes + 3)):
                        values, target = make(3, max(classes, 1), dtype)
                        memory = torch.zeros(offset + 2 * stride + classes, dtype=dtype)
                        rows = memory.as_strided((3, classes), (stride, 1), offset)
                        rows.copy_(values[:, :classes])
                        run_all(rows, target, logit_scale=0.7, softcap=5.0)
                        run_logp(rows, target, grad=rows)
    for count in (1, 9, 4097):
        part = torch.ones(count, dtype=torch.float16)
        kernels().accumulate(torch.ones(count), part, torch.empty(count))


if __name__ == "__main__":
    visit_every_edge()
