"""The random stream of every implementation: Philox4x32-10, and Gumbel variates made of it.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A number
depends on ``(seed, position, v)`` alone: never on a device, a thread or a place in a batch. The
arithmetic behind a variate is float32 in a fixed order, without fused products, so that every
implementation gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# log1p(t) = t - t**2 / 2 + t**3 q(t) for sqrt(1/2) <= 1 + t < sqrt(2), within 7e-9 of t: a fit of
# ours by least squares on Chebyshev points.
_Q = (0.33333328, -0.25000829, 0.20001446, -0.16623273, 0.14197648, -0.13156946, 0.12785538,
      -0.076708652)  # fmt: skip
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_SQRT_HALF_BITS = 0x3F3504F3
# hi below this: the uniform variate is under 1 - sqrt(1/2).
_NEAR_ZERO = 0x4AFB0CCD


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on words of 32 bits, held in int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps around in int64; its low and its high word are right all the same.
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (odd >> 32 & _MASK) ^ c1 ^ k0,
            odd & _MASK,
            (even >> 32 & _MASK) ^ c3 ^ k1,
            even & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(
    seed: Tensor,  # (B,) int64
    position: Tensor,  # (B,) int64
    classes: int,
) -> tuple[Tensor, Tensor]:  # each (B, V) int64
    """The high and the low word of every token's 64 random bits."""
    pair = torch.arange((classes + 1) // 2, device=seed.device)
    seed, position = seed.unsqueeze(-1), position.unsqueeze(-1)
    counter = (pair, torch.zeros_like(pair), position & _MASK, position >> 32 & _MASK)
    r0, r1, r2, r3 = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))

    def interleave(even: Tensor, odd: Tensor) -> Tensor:
        return torch.stack((even, odd), -1).flatten(-2)[..., :classes]

    return interleave(r0, r2), interleave(r1, r3)


def gumbel(
    seed: Tensor,  # (B,) int64
    position: Tensor,  # (B,) int64
    classes: int,
) -> Tensor:  # (B, V) float32
    """Standard Gumbel variates ``-log(-log(1 - x))``, x uniform in 64 bits.

    The smallest x is 2**-64, so that a token of probability 1e-15 is drawn as often as it should.
    """
    return gumbel_of_words(*random_words(seed, position, classes))


def gumbel_of_words(high: Tensor, low: Tensor) -> Tensor:
    """The float32 Gumbel variate of 64 random bits, bit for bit the same everywhere."""
    x = _unit_interval(high, low)
    y = _unit_interval(high ^ _MASK, (low ^ _MASK) | 1)
    t, e = _split(y)
    near_zero = high < _NEAR_ZERO
    exponential = -_log(torch.where(near_zero, -x, t), torch.where(near_zero, 0.0, e))
    return -_log(*_split(exponential.clamp(min=2.0**-66)))


def _unit_interval(high: Tensor, low: Tensor) -> Tensor:
    return (high.float() + low.float() * 2.0**-32) * 2.0**-32


def _split(f: Tensor) -> tuple[Tensor, Tensor]:
    """``(t, e)`` with ``f = (1 + t) 2**e`` and ``1 + t`` in [sqrt(1/2), sqrt(2))."""
    bits = f.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    return (bits - (exponent << 23)).view(torch.float32) - 1.0, exponent.float()


def _log(t: Tensor, e: Tensor) -> Tensor:
    """``log((1 + t) 2**e)``."""
    q = torch.full_like(t, _Q[-1])
    for c in _Q[-2::-1]:
        q = q * t + c
    square = t * t
    r = square * t * q
    r = r + e * _LN2_LOW
    r = r - 0.5 * square
    r = r + t
    return r + e * _LN2_HIGH
