"""Inputs that the test files of token loss share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import trimtab
from trimtab.reference import token_loss as reference
from trimtab.testing import assert_within_budget, uneven, values_and_grads

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter computes in Python: it gets the smaller half of the shapes.
ODD_SIZES = (1, 3, 63, 127, 252, 507)


class Problem(NamedTuple):
    """A linear head with targets, in float64; every number is exact in the dtype under test."""

    input: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)
    target: Tensor  # (N,)
    token_weight: Tensor  # (N,)

    def tensors(self, dtype: torch.dtype, bias: bool = True, token_weight: bool = True) -> list:
        """The differentiable inputs in a dtype; token weights stay float32, or float64."""
        results = torch.float64 if dtype == torch.float64 else torch.float32
        return [
            self.input.to(dtype, copy=True),
            self.weight.to(dtype, copy=True),
            self.bias.to(dtype, copy=True) if bias else None,
            self.token_weight.to(results, copy=True) if token_weight else None,
        ]


def problem(
    n: int = 37,
    d: int = 16,
    v: int = 63,
    dtype: torch.dtype = torch.float32,
    *,
    ignored: bool = True,
    weight_shape: tuple[int, ...] = (),
    device: str = "cpu",
) -> Problem:
    """Random, with some targets ignored and token weights of both signs, one of them 0."""
    generator = torch.Generator().manual_seed(n * 1000 + v)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).double().to(device)

    target = torch.randint(v, (n,), generator=generator)
    if ignored:
        target[::5] = -100
    token_weight = torch.randn(*weight_shape, n, generator=generator).double()
    token_weight[..., 1:2] = 0.0
    return Problem(draw(n, d), draw(v, d), draw(v), target.to(device), token_weight.to(device))


def check_linear_cross_entropy(
    case: Any, given: Problem, dtype: torch.dtype, **options: Any
) -> None:
    """Loss and all gradients of ``case`` within the error budget of eager in ``dtype``."""
    bias, weighted = options.pop("bias", True), options.pop("weighted", True)

    def run(impl: str, precision: torch.dtype) -> list[Tensor]:
        def loss(
            input: Tensor, weight: Tensor, bias: Tensor | None, token_weight: Tensor | None
        ) -> Tensor:
            return trimtab.linear_cross_entropy(
                input,
                weight,
                given.target.to(input.device),
                linear_bias=bias,
                token_weight=token_weight,
                impl=impl,
                **options,
            )

        return values_and_grads(loss, given.tensors(precision, bias, weighted))

    truth = run("reference", torch.float64)
    eager = run("reference", dtype)
    actual = run(case.impl, dtype)
    scales = term_magnitudes(given, bias, weighted, options)
    names = [
        "loss",
        "input.grad",
        "weight.grad",
        *(["bias.grad"] if bias else []),
        *(["token_weight.grad"] if weighted else []),
    ]
    assert len(actual) == len(names)
    # Rounding z moves its probability by eps * |z|; in 16 bits eager's own error covers that.
    amplified = 1.0 + scales["z"] if dtype == torch.float32 else 1.0
    for name, ours, theirs, true in zip(names, actual, eager, truth, strict=True):
        scale = scales.get(name, 0.0) * (amplified if name.endswith("grad") else 1.0)
        assert_within_budget(ours, theirs, true, name=name, scale=scale)


def term_magnitudes(
    given: Problem, bias: bool, weighted: bool, options: dict[str, Any]
) -> dict[str, float]:
    """Sums of the magnitudes of the float64 terms behind each result, where their signs cancel.

    Rounding is relative to these: a sum that happens to come out near 0 is no more exact for it.
    Eager's own error is no stand-in there: on a handful of numbers it is often 0 by luck.
    """
    logits = torch.nn.functional.linear(given.input, given.weight, given.bias if bias else None)
    logits.requires_grad_()
    kept = {key: value for key, value in options.items() if key != "options"}
    loss = trimtab.cross_entropy(
        logits,
        given.target,
        token_weight=given.token_weight if weighted else None,
        impl="reference",
        **kept,
    )
    loss.backward(uneven(loss))
    grad = logits.grad.abs() + smoothing_terms(given, logits.detach(), weighted, options)
    scales = {
        "input.grad": (grad @ given.weight.abs()).max(),
        "weight.grad": (grad.T @ given.input.abs()).max(),
        "bias.grad": grad.sum(0).max(),
    }
    z = reference.transform_logits(
        logits.detach(), kept.get("logit_scale", 1.0), kept.get("softcap")
    )
    terms = z.abs().amax(-1) + z.logsumexp(-1).abs()
    if weighted:
        terms = terms * given.token_weight.abs()
    terms = terms.masked_fill(given.target == -100, 0.0)
    reduction = options.get("reduction", "mean")
    total = terms.max() if reduction == "none" else terms.sum(-1).max()
    if reduction == "mean":
        total = total / (given.target != -100).sum().clamp(min=1)
    return {
        name: float(scale) for name, scale in {**scales, "loss": total, "z": z.abs().max()}.items()
    }


def smoothing_terms(
    given: Problem, logits: Tensor, weighted: bool, options: dict[str, Any]
) -> Tensor | float:
    """Magnitude of what smoothing adds to the logits' gradient: two terms that nearly cancel."""
    smoothing = options.get("label_smoothing", 0.0)
    if smoothing == 0.0:
        return 0.0
    scale, kept = options.get("logit_scale", 1.0), given.target != -100
    c = torch.ones_like(logits[0]) if options.get("weight") is None else options["weight"]
    p = reference.transform_logits(logits, scale, options.get("softcap")).softmax(-1)
    terms = smoothing / len(c) * (c.sum() * p + c) * abs(scale) * kept[:, None]
    if weighted:
        weights = given.token_weight.abs().reshape(-1, len(kept)).amax(0)
        terms = terms * weights[:, None]
    divisor = options.get("normalizer") or kept.sum().clamp(min=1)
    divides = options.get("reduction", "mean") == "mean" and not isinstance(divisor, str)
    return terms / (divisor.min() if isinstance(divisor, Tensor) else divisor) if divides else terms


CONFIDENT = (0.5, 0.9, 0.999, 0.99999, 0.9999999, 1 - 1e-12)


def confident_rows(classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits whose targets have about the probabilities ``CONFIDENT``, and the targets."""
    each = torch.tensor([(1 - p) / p / (classes - 1) for p in CONFIDENT], dtype=torch.float64)
    rows = each.log()[:, None].repeat(1, classes) + torch.randn(len(CONFIDENT), classes) / 4
    target = torch.randint(classes, (len(CONFIDENT),))
    return rows.to(dtype).scatter_(1, target[:, None], 0.0), target


def check_confident_rows(
    logits: Tensor, loss: tuple[Tensor, Tensor], logp: tuple[Tensor, ...], back: Tensor,
    target: Tensor,
) -> None:  # fmt: skip
    """What the row operators write keeps the relative precision of ``1 - p``.

    Args:
        logits: of ``confident_rows``.
        loss: loss and gradient.
        logp: logp, entropy, lse, predicted and the gradient of logp.
        back: the gradient of logp from backward, with upstreams of 1.
        target: of ``confident_rows``.
    """
    dtype, eps = logits.dtype, torch.finfo(torch.float32).eps
    # Not the oracle: float64's own log_softmax has lost half of its digits in the last row.
    z = logits.double()
    others = z.exp().scatter(1, target[:, None], 0.0)
    rest = others.sum(1)
    truth, at = torch.log1p(rest), -rest / (1 + rest)
    # An exponential turns the rounding of its argument into a relative error: |z| eps. Then a
    # handful of roundings for sums, quotient and logarithm.
    bound = eps * (8 + z.abs().amax(1))
    found, entropy, _, predicted, unit = logp
    for name, actual, exact in [
        ("loss", loss[0], truth),
        ("logp", found, -truth),
        ("grad", loss[1].gather(1, target[:, None]).squeeze(1), at),
        ("unit grad", unit.gather(1, target[:, None]).squeeze(1), -at),
        ("backward", back.gather(1, target[:, None]).squeeze(1), -at),
        ("entropy", entropy, truth - (others * z).sum(1) / (1 + rest)),
    ]:
        relative = ((actual.double() - exact) / exact).abs()
        allowed = bound + (torch.finfo(dtype).eps if actual.dtype != torch.float32 else 0)
        assert (relative <= allowed).all(), f"{name}: {relative.tolist()} over {allowed.tolist()}"
    assert torch.minimum(loss[0], -found).min() >= 0
    assert torch.equal(predicted, logits.argmax(1))
