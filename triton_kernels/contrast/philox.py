"""The random stream: Philox4x32-10, and Gumbel variates with the same bits everywhere.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The
arithmetic is that of ``trimtab.reference.philox``: float32, each operation rounded once, in order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
# High words below it belong to uniform variates under 1 - sqrt(1/2).
_NEAR_ZERO = tl.constexpr(0x4AFB0CCD)
_ONES = tl.constexpr(0xFFFFFFFF)
_UNIT = tl.constexpr(2.0**-32)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on words of type uint32."""
    for _ in tl.static_range(10):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c2 = (
            tl.umulhi(c2, tl.full(c2.shape, _MULTIPLIER_1, tl.uint32)) ^ c1 ^ k0,
            tl.umulhi(c0, tl.full(c0.shape, _MULTIPLIER_0, tl.uint32)) ^ c3 ^ k1,
        )
        c1 = product_1
        c3 = product_0
        k0 = k0 + _WEYL_0
        k1 = k1 + _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def pair_bits(pair, seed_low, seed_high, position_low, position_high):
    """Four words: high and low of token ``2 pair``, high and low of token ``2 pair + 1``."""
    zero = tl.zeros(pair.shape, tl.uint32)
    return philox4x32(
        pair.to(tl.uint32), zero, zero + position_low, zero + position_high, seed_low, seed_high
    )


@triton.jit
def _split(f):
    """``(t, e)`` with ``f = (1 + t) 2^e`` and ``1 + t`` in [sqrt(1/2), sqrt(2))."""
    bits = f.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    u = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return u - 1.0, exponent.to(tl.float32)


@triton.jit
def _log(t, e):
    """``log((1 + t) 2^e)``."""
    q = t * -0.076708652 + 0.12785538
    q = q * t - 0.13156946
    q = q * t + 0.14197648
    q = q * t - 0.16623273
    q = q * t + 0.20001446
    q = q * t - 0.25000829
    q = q * t + 0.33333328
    square = t * t
    r = square * t * q
    r = r + e * -2.12194440e-4
    r = r - 0.5 * square
    r = r + t
    return r + e * 0.693359375


@triton.jit
def gumbel(high, low):
    """Standard Gumbel variate of 64 random bits, two tensors of type uint32."""
    x = (high.to(tl.float32) + low.to(tl.float32) * _UNIT) * _UNIT
    y = ((high ^ _ONES).to(tl.float32) + ((low ^ _ONES) | 1).to(tl.float32) * _UNIT) * _UNIT
    near_zero = high < _NEAR_ZERO
    t, e = _split(y)
    exponential = -_log(tl.where(near_zero, -x, t), tl.where(near_zero, 0.0, e))
    t, e = _split(tl.maximum(exponential, 2.0**-66))
    return -_log(t, e)


@triton.jit
def gumbel_bound(high):
    """At least the Gumbel variate, from its high word.

    ``-log(1 - x) >= x``; and ``log2 x`` is above its chord between two powers of two, which is what
    the bits of a float say. 0.01 is far more than all roundings.
    """
    chord = high.to(tl.float32).to(tl.int32, bitcast=True).to(tl.float32)
    return (159.0 * 0.6931471805599453 + 0.01) - chord * (0.6931471805599453 * 2.0**-23)
