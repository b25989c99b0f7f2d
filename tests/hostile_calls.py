"""Calls of the compiled row operators that nobody should make; a program for sanitised builds.

Each call is valid but for one argument. It has to return or to raise: a crash, a read out of bounds
or undefined behaviour ends the process, and its last line tells the call that did it.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import trimtab
from trimtab import _native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (0, 1, -1, 7, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63))
REALS = (0.0, -0.0, 1.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
Arguments = dict[str, Any]


def real_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def size(rng: random.Random) -> int:
    return rng.choice((0, 1, 2, 3, 5, 17, 63, 130))


def matrix(rng: random.Random, n: int, v: int, dtype: torch.dtype) -> Tensor:
    """Rows with or without a gap, at any offset, with numbers of all kinds."""
    gap, offset = rng.choice((0, 0, 1, 7)), rng.choice((0, 0, 1, 3))
    memory = torch.randn(offset + n * (v + gap), dtype=torch.float64).mul_(3)
    if memory.numel() and rng.random() < 0.3:
        memory[rng.randrange(memory.numel())] = rng.choice(REALS)
    rows = memory.to(dtype)[offset:].reshape(n, v + gap)[:, :v]
    return rows[:1].expand(n, v) if n and rng.random() < 0.1 else rows


def vector(rng: random.Random, n: int, dtype: torch.dtype, optional: bool = False) -> Any:
    return None if optional and rng.random() < 0.5 else torch.rand(n).to(dtype)


def target(rng: random.Random, n: int, v: int) -> Tensor:
    classes = [rng.randrange(v) if v else 0 for _ in range(n)]
    if n and rng.random() < 0.4:
        classes[rng.randrange(n)] = rng.choice((-100, v, *INTEGERS))
    return torch.tensor(classes, dtype=torch.int64)


def transform(rng: random.Random) -> Arguments:
    return {
        "ignore_index": rng.choice((-100, 0, 2**63 - 1)),
        "logit_scale": rng.choice((1.0, 0.25)),
        "softcap": rng.choice((0.0, 5.0)),
    }


def token_loss_rows(rng: random.Random) -> Arguments:
    n, v, dtype = size(rng), size(rng), rng.choice(DTYPES)
    logits, real = matrix(rng, n, v, dtype), real_of(dtype)
    grad = rng.choice((None, torch.empty(n, v, dtype=dtype), logits))
    return {
        "logits": logits, "target": target(rng, n, v), "coef": vector(rng, n, real, True),
        "class_weight": vector(rng, v, real, True), **transform(rng),
        "label_smoothing": rng.choice((0.0, 0.1, 1.0)), "lse_square_scale": rng.choice((0.0, 0.1)),
        "loss": torch.empty(n, dtype=real), "grad": grad,
    }  # fmt: skip


def token_logp_rows(rng: random.Random) -> Arguments:
    n, v, dtype = size(rng), size(rng), rng.choice(DTYPES)
    logits, real = matrix(rng, n, v, dtype), real_of(dtype)
    results = {name: torch.empty(n, dtype=real) for name in ("logp", "entropy", "lse")}
    return {
        "logits": logits, "target": target(rng, n, v),
        "inv_temperature": vector(rng, n, real, True), **transform(rng), **results,
        "predicted": torch.empty(n, dtype=torch.int64),
        "grad": rng.choice((None, torch.empty(n, v, dtype=dtype), logits)),
    }  # fmt: skip


def token_logp_rows_backward(rng: random.Random) -> Arguments:
    n, v, dtype = size(rng), size(rng), rng.choice(DTYPES)
    logits, real = matrix(rng, n, v, dtype), real_of(dtype)
    upstream = {f"grad_{k}": vector(rng, n, real, True) for k in ("logp", "entropy", "lse")}
    return {
        "logits": logits, "target": target(rng, n, v),
        "inv_temperature": vector(rng, n, real, True), **transform(rng), **upstream,
        "grad": rng.choice((torch.empty(n, v, dtype=dtype), logits)),
    }  # fmt: skip


def accumulate(rng: random.Random) -> Arguments:
    shape, dtype = (size(rng), size(rng)), rng.choice(DTYPES)
    wide = rng.choice((dtype, real_of(dtype)))
    part = torch.randn(shape).to(dtype)
    accumulator = rng.choice((None, torch.randn(shape).to(wide)))
    return {
        "accumulator": accumulator, "part": part,
        "out": rng.choice((torch.empty(shape, dtype=rng.choice((dtype, wide))), part)),
    }  # fmt: skip


def contrast_rows(rng: random.Random, n: int, v: int, dtype: torch.dtype) -> Arguments:
    return {
        "positive": matrix(rng, n, v, dtype),
        "negative": rng.choice((None, matrix(rng, n, v, dtype), matrix(rng, n, v, dtype))),
        "anchor": rng.choice((None, matrix(rng, n, v, dtype))),
    }


def numbers(rng: random.Random, n: int, dtype: torch.dtype, **values: tuple) -> Arguments:
    """A number of each name and, sometimes, one for each row."""
    found: Arguments = {}
    for name, choices in values.items():
        found[name] = rng.choice(choices)
        kind = torch.int64 if isinstance(found[name], int) else real_of(dtype)
        rows = torch.tensor([rng.choice(choices) for _ in range(n)], dtype=kind)
        found[f"{name}_rows"] = rng.choice((None, rows))
    return found


ALPHA = (0.0, 0.5, -1.0, float("inf"), float("nan"))
BETA = (float("-inf"), -1.0, 0.0, float("nan"))
TEMPERATURE = (1.0, 0.0, 0.5, 1e-30, float("nan"), -1.0)


def contrastive_logits_rows(rng: random.Random) -> Arguments:
    n, v, dtype = size(rng), size(rng), rng.choice(DTYPES)
    return {
        **contrast_rows(rng, n, v, dtype), **numbers(rng, n, dtype, alpha=ALPHA, log_beta=BETA),
        "out": torch.empty(n, v, dtype=real_of(dtype)),
    }  # fmt: skip


def contrastive_logp_rows(rng: random.Random) -> Arguments:
    n, v, dtype = size(rng), size(rng), rng.choice(DTYPES)
    return {
        **contrast_rows(rng, n, v, dtype), "target": target(rng, n, v),
        **numbers(rng, n, dtype, alpha=ALPHA, temperature=TEMPERATURE), "ignore_index": -100,
        "logp": torch.empty(n, dtype=real_of(dtype)),
    }  # fmt: skip


def contrastive_logp_rows_backward(rng: random.Random) -> Arguments:
    given = contrastive_logp_rows(rng)
    upstream = torch.rand_like(given.pop("logp"))
    positive = given["positive"]
    grads = {
        f"grad_{name}": rng.choice((None, torch.empty(positive.shape, dtype=positive.dtype)))
        for name in ("positive", "negative", "anchor")
    }
    return {**given, "grad_logp": upstream, **grads}


def contrastive_sample_rows(rng: random.Random) -> Arguments:
    n, v, dtype = size(rng), size(rng), rng.choice(DTYPES)
    b = rng.choice((n, size(rng)))
    maps = {
        f"{name}_rows": torch.randint(max(n, 1), (b,)) if b != n or rng.random() < 0.3 else None
        for name in ("positive", "negative", "anchor")
    }
    for rows in maps.values():
        if rows is not None and b and rng.random() < 0.3:
            rows[rng.randrange(b)] = rng.choice((n, *INTEGERS))
    values = numbers(
        rng, b, dtype, alpha=ALPHA, log_beta=BETA, temperature=TEMPERATURE,
        top_k=(v, 1, 0, *INTEGERS), tail=(-1.0, 0.1, 0.9, 1.0, float("nan")),
        log_min_p=(float("-inf"), -3.0, 0.0, float("nan")), seed=INTEGERS, position=INTEGERS,
    )  # fmt: skip
    return {
        **contrast_rows(rng, n, v, dtype), **maps, **values,
        "token": torch.empty(b, dtype=torch.int64),
        "logp": torch.empty(b, dtype=real_of(dtype)), "kept": torch.empty(b, dtype=torch.int64),
    }  # fmt: skip


def orthogonal_penalty_rows(rng: random.Random) -> Arguments:
    dtype, modules = rng.choice(DTYPES), rng.choice((1, 2, 5))
    counts = [rng.choice((0, 1, 3)) for _ in range(modules)]
    widths = [size(rng) for _ in range(modules)]
    previous = [
        matrix(rng, size(rng), d, dtype)
        for d, count in zip(widths, counts, strict=True)
        for _ in range(count)
    ]
    current = [matrix(rng, size(rng), d, dtype) for d in widths]
    real = real_of(dtype)
    elements = [sum(t.numel() for t in given) for given in (current, previous)]
    grads = [rng.choice((None, torch.empty(length, dtype=real))) for length in elements]
    return {
        "previous": previous, "counts": counts, "current": current,
        "weight": vector(rng, modules, real, True), "squared": rng.random() < 0.5,
        "value": torch.empty((), dtype=real), "grad_current": grads[0], "grad_previous": grads[1],
    }  # fmt: skip


def project_out_rows(rng: random.Random) -> Arguments:
    dtype, count = rng.choice(DTYPES), rng.choice((1, 2, 4))
    widths = [size(rng) for _ in range(count)]
    tensors = [matrix(rng, size(rng), d, dtype) for d in widths]
    bases = [matrix(rng, size(rng), d, dtype) for d in widths]
    return {"tensors": tensors, "bases": bases,
            "outs": [torch.empty(t.shape, dtype=dtype) for t in tensors]}  # fmt: skip


OPERATORS: tuple[Callable[[random.Random], Arguments], ...] = (
    token_loss_rows, token_logp_rows, token_logp_rows_backward, accumulate,
    contrastive_logits_rows, contrastive_logp_rows, contrastive_logp_rows_backward,
    contrastive_sample_rows, orthogonal_penalty_rows, project_out_rows,
)  # fmt: skip


def spoil(rng: random.Random, value: Any) -> Any:
    """Another value of the same kind: what only the kernels' own checks can refuse."""
    if isinstance(value, Tensor):
        return spoil_tensor(rng, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(REALS)
    if isinstance(value, list):
        changed = list(value)
        if changed and rng.random() < 0.7:
            index = rng.randrange(len(changed))
            changed[index] = spoil(rng, changed[index])
            return changed
        return changed[:-1] if changed and rng.random() < 0.5 else changed * 2
    return value


def spoil_tensor(rng: random.Random, tensor: Tensor) -> Tensor:
    other = rng.choice((*DTYPES, torch.int64, torch.int32, torch.bool))
    shape = tuple(tensor.shape)
    changes: tuple[Callable[[], Tensor], ...] = (
        lambda: tensor.to(other),
        lambda: torch.zeros((*shape, 2), dtype=tensor.dtype),
        lambda: torch.zeros(shape[:-1], dtype=tensor.dtype),
        lambda: torch.zeros([n + 1 for n in shape], dtype=tensor.dtype),
        lambda: torch.zeros([max(n - 1, 0) for n in shape], dtype=tensor.dtype),
        lambda: torch.zeros([0] * len(shape), dtype=tensor.dtype),
        lambda: torch.zeros(tuple(reversed(shape)), dtype=tensor.dtype).T.mT
        if len(shape) == 2 else tensor,
        lambda: torch.zeros((1,) * len(shape), dtype=tensor.dtype).expand(shape),
        lambda: torch.zeros([2 * n for n in shape], dtype=tensor.dtype)[(slice(None, None, 2),)
                                                                       * len(shape)],
        lambda: torch.empty(shape, dtype=tensor.dtype, device="meta"),
    )  # fmt: skip
    return rng.choice(changes)()


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}/{value.stride()}@{value.device}"
    if isinstance(value, list):
        return f"[{', '.join(map(describe, value))}]"
    return repr(value)


def say_at_once(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run(
    calls: int, seed: int = 0, say: Callable[[str], None] = say_at_once
) -> dict[str, list[int]]:
    """Operator -> calls that returned and calls that raised. ``say`` is told each before it."""
    torch.manual_seed(seed)
    rng, answers = random.Random(seed), {make.__name__: [0, 0] for make in OPERATORS}
    for _ in range(calls):
        make = rng.choice(OPERATORS)
        given = make(rng)
        if rng.random() < 0.6:
            name = rng.choice(list(given))
            given[name] = spoil(rng, given[name])
        words = ", ".join(f"{name}={describe(value)}" for name, value in given.items())
        say(f"{make.__name__}({words})")
        try:
            getattr(torch.ops.trimtab, make.__name__)(*given.values())
            answers[make.__name__][0] += 1
        except RuntimeError:  # also NotImplementedError
            answers[make.__name__][1] += 1
    return answers


if __name__ == "__main__":
    assert _native.REASONS["cpu"] is None, _native.REASONS["cpu"]
    answers = run(*map(int, sys.argv[1:]))
    sys.stdout.write(json.dumps({"package": trimtab.__path__[0], "answers": answers}))
