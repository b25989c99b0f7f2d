"""What the kernels of more than one family are made of."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

# Lowest finite float32: a difference with it is not NaN, and a logit masked with it still counts.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Its exp is 0 in float32, and 0 times it is 0. With -inf that product is NaN.
FLOOR = tl.constexpr(-1.0e4)


@functools.lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of an H100 where nothing is compiled."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` current: Triton launches there, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def exp(x):
    """``exp(x)``; 0 under 2^-126, which tl.exp spends three instructions more on."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for x >= 0, where ``1 + x`` alone would lose x."""
    # 2 artanh(x / (2 + x)), a minimax fit for x <= 0.5 with relative error 2.3e-11.
    s = x / (2.0 + x)
    y = s * s
    series = tl.fma(y, 0.12048611, 0.14253614)
    series = tl.fma(y, series, 0.20000429)
    series = tl.fma(y, series, 0.33333332)
    return tl.where(x <= 0.5, 2.0 * tl.fma(s * y, series, s), tl.log(1.0 + x))


@triton.jit
def tile_index(tile, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Indices of a tile, (STEPS, LANES, VEC): a step is one wide load of the whole program."""
    step = tl.arange(0, STEPS)[:, None, None] * (LANES * VEC)
    lane = tl.arange(0, LANES)[None, :, None] * VEC
    return tile * (STEPS * LANES * VEC) + step + lane + tl.arange(0, VEC)[None, None, :]


@triton.jit
def sum_in_lanes(x):
    """(STEPS, LANES, VEC) to (LANES,), without leaving the thread."""
    return tl.sum(tl.sum(x, 2), 0)
