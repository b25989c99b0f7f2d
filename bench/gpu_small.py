"""Every operator of a family once on small shapes, forward and backward: for a memory checker.

    compute-sanitizer --tool=memcheck python bench/gpu_small.py FAMILY [--impl native]

Results are compared with the oracle's, so that a kernel that writes nothing is noticed too. On a
machine without CUDA it runs on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import trimtab

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 1), (3, 63), (4, 127), (5, 507), (2, 9000))

Run = Callable[[str], Sequence[Tensor]]
"""``impl -> results and gradients``."""


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype).requires_grad_()


def with_gradients(result: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return (result.detach(), *torch.autograd.grad(result.float().sum(), leaves))


def loss(x: Tensor, w: Tensor, target: Tensor, weights: Tensor, impl: str) -> Sequence[Tensor]:
    found = trimtab.linear_cross_entropy(
        x, w, target, token_weight=weights, softcap=20.0, label_smoothing=0.1,
        lse_square_scale=1e-3, impl=impl,
    )  # fmt: skip
    return with_gradients(found, x, w)


def linear_logp(
    x: Tensor, w: Tensor, target: Tensor, weights: Tensor, impl: str
) -> Sequence[Tensor]:
    found = trimtab.linear_logp(x, w, target, impl=impl)
    return with_gradients(found.logp * weights + found.entropy, x, w)


def token_loss() -> Iterator[tuple[str, Run]]:
    """The loss and its gradients, and log-probabilities with entropy."""
    for dtype in DTYPES:
        for rows, classes in SIZES:
            given = (
                normal(rows, 8, dtype=dtype), normal(classes, 8, dtype=dtype),
                torch.randint(classes, (rows,)).to(DEVICE), torch.rand(rows).to(DEVICE),
            )  # fmt: skip
            for run in (loss, linear_logp):
                yield f"{run.__name__} {dtype} {rows} x {classes}", partial(run, *given)


def logits(p: Tensor, n: Tensor, target: Tensor, impl: str) -> Sequence[Tensor]:
    return [trimtab.contrastive_logits(p, n, alpha=1.5, plausibility=0.1, impl=impl)]


def logp(p: Tensor, n: Tensor, target: Tensor, impl: str) -> Sequence[Tensor]:
    return with_gradients(trimtab.contrastive_logp(p, n, target, alpha=1.5, impl=impl), p, n)


def sample(p: Tensor, n: Tensor, target: Tensor, impl: str) -> Sequence[Tensor]:
    every = {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "plausibility": 0.01}
    drawn = [
        trimtab.contrastive_sample(p.detach(), n.detach(), alpha=1.5, impl=impl, **filters)
        for filters in ({}, every, {"top_p": 0.99}, {"temperature": 0.0})
    ]
    return [part for found in drawn for part in found]


def contrast() -> Iterator[tuple[str, Run]]:
    """Rows, log-probabilities with gradients, and draws."""
    for dtype in DTYPES:
        for rows, classes in SIZES:
            given = (
                normal(rows, classes, dtype=dtype), normal(rows, classes, dtype=dtype),
                torch.randint(classes, (rows,)).to(DEVICE),
            )  # fmt: skip
            for run in (logits, logp, sample):
                yield f"{run.__name__} {dtype} {rows} x {classes}", partial(run, *given)


def penalty(
    previous: list[Tensor], current: list[Tensor], norm: str, impl: str
) -> Sequence[Tensor]:
    found = trimtab.orthogonal_penalty(previous, current, norm=norm, impl=impl)
    return with_gradients(found, *previous, *current)


def project(previous: list[Tensor], current: list[Tensor], impl: str) -> Sequence[Tensor]:
    with torch.no_grad():
        return trimtab.project_out(previous, [0.1 * c for c in current], impl=impl)


def orthogonal() -> Iterator[tuple[str, Run]]:
    """Ragged modules, both norms, both sides, and the projection."""
    shapes = ((1, 1, 1), (3, 2, 63), (17, 8, 127), (40, 8, 507), (130, 16, 1024))
    for dtype in DTYPES:
        previous = [normal(r, d, dtype=dtype) for r, _, d in shapes]
        current = [normal(r, d, dtype=dtype) for _, r, d in shapes]
        for norm in ("l1", "frobenius2"):
            yield f"penalty {dtype} {norm}", partial(penalty, previous, current, norm)
        yield f"project {dtype}", partial(project, previous, current)


FAMILIES = {"token_loss": token_loss, "contrast": contrast, "orthogonal": orthogonal}


def compare(name: str, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Close to the oracle's, in the coarse measure that shows a missing write."""
    for place, (a, b) in enumerate(zip(ours, expected, strict=True)):
        where = f"{name}, result {place}"
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                raise SystemExit(f"{where}: {(a != b).sum()} of {a.numel()} differ")
            continue
        size = b.detach().double().abs()
        size = float(size[size.isfinite()].max()) if size.isfinite().any() else 1.0
        torch.testing.assert_close(
            a.double(), b.double(), rtol=0.05, atol=0.05 * size, equal_nan=True,
            msg=lambda text, where=where: f"{where}: {text}",
        )  # fmt: skip


def main() -> None:
    """Runs a family."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--impl", choices=("native", "triton"), help="default: both that can run")
    options = parser.parse_args()
    torch.manual_seed(0)
    impls = [options.impl] if options.impl else ["native"] + ["triton"] * (DEVICE == "cuda")
    count = 0
    for name, run in FAMILIES[options.family]():
        expected = run("reference")
        for impl in impls:
            compare(f"{name}, {impl}", run(impl), expected)
            count += 1
    print(f"{options.family}: {count} calls on {DEVICE} agree with the oracle")


if __name__ == "__main__":
    main()
