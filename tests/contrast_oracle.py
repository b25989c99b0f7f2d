"""A second oracle of the contrast operators, in numpy: it shares no line with the package.

Rows are filtered by sorting them. What has to agree to the bit (the combination, the temperature,
the noise) is computed in the dtype that it is defined in, float32 or float64, each operation
rounded once; everything else in float64. Philox4x32-10 is computed in integers that do not wrap.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
F = np.float32
LOG_COEFFICIENTS = tuple(
    F(c)
    for c in (
        0.33333328, -0.25000829, 0.20001446, -0.16623273,
        0.14197648, -0.13156946, 0.12785538, -0.076708652,
    )
)  # fmt: skip


def philox4x32_10(counter, key):
    """Four words of Python integers, or of uint64 arrays that hold 32-bit numbers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        products = (MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2])
        c = [
            (products[1] >> 32) ^ c[1] ^ k[0],
            products[1] & MASK,
            (products[0] >> 32) ^ c[3] ^ k[1],
            products[0] & MASK,
        ]
        k = [(k[0] + WEYL[0]) & MASK, (k[1] + WEYL[1]) & MASK]
    return tuple(c)


def bits_of(seed: int, position: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The 64 random bits of every token, as (hi, lo)."""
    pairs = np.arange((classes + 1) // 2, dtype=np.uint64)
    words = philox4x32_10(
        [pairs, np.zeros_like(pairs), *(np.full_like(pairs, w) for w in halves(position))],
        [np.full_like(pairs, w) for w in halves(seed)],
    )
    hi, lo = (np.stack([words[i], words[i + 2]], 1).reshape(-1)[:classes] for i in (0, 1))
    return hi, lo


def halves(number: int) -> tuple[int, int]:
    """Low and high word of an int64 in two's complement."""
    return number & MASK, (number >> 32) & MASK


def uniform_pair(hi, lo):
    """(x, 1 - x) of 64 bits, each with all the digits that a float32 has."""
    scale = F(2.0**-32)
    hi, lo = hi.astype(np.uint32), lo.astype(np.uint32)
    x = (hi.astype(F) + lo.astype(F) * scale) * scale
    y = ((~hi).astype(F) + (~lo | np.uint32(1)).astype(F) * scale) * scale
    return x, y


def split(f):
    """(t, e) with f = (1 + t) 2**e and 1 + t within [sqrt(1/2), sqrt(2)]."""
    bits = f.view(np.int32)
    k = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    u = (bits - (k << np.int32(23))).view(F)
    return u - F(1), k.astype(F)


def log_from(t, e):
    q = np.full_like(t, LOG_COEFFICIENTS[7])
    for c in LOG_COEFFICIENTS[6::-1]:
        q = q * t + c
    t2 = t * t
    r = (t2 * t) * q
    r = r + e * F(-2.12194440e-4)
    r = r - F(0.5) * t2
    r = r + t
    return r + e * F(0.693359375)


def gumbel(seed: int, position: int, classes: int) -> np.ndarray:
    """The noise of every token of a row, float32."""
    hi, lo = bits_of(seed, position, classes)
    x, y = uniform_pair(hi, lo)
    near = hi < 0x4AFB0CCD
    t, e = split(y)
    exponential = -log_from(np.where(near, -x, t), np.where(near, F(0), e))
    exponential = np.maximum(exponential, F(2.0**-66))
    return -log_from(*split(exponential))


def combine(positive, negative=None, anchor=None, alpha=0.0):
    """(z, a) of one row before the mask, in the dtype of the rows: float32 or float64."""
    real = positive.dtype.type
    alpha = real(alpha)
    a = positive if anchor is None else anchor
    with np.errstate(invalid="ignore", over="ignore"):
        if negative is None:
            return positive.copy(), a
        d = np.where(positive == negative, real(0), positive - negative)
        z = a + alpha * d
    z = a.copy() if alpha == 0 else z
    return np.where(a == -np.inf, real(-np.inf), z), a


def masked(z, a, plausibility=None):
    """``z`` after the plausibility mask; all NaN where the largest anchor is NaN."""
    if plausibility is None:
        return z
    real = z.dtype.type
    top = a.max()
    if np.isnan(top):
        return np.full_like(z, np.nan)
    with np.errstate(over="ignore"):
        threshold = top + real(math.log(plausibility))
    return np.where(a < threshold, real(-np.inf), z)


class Row(NamedTuple):
    """What is known of one row."""

    token: int
    logp: float
    kept: int
    support: frozenset[int]
    margin: float  # relative distance of 1 - top_p from the nearest cumulative probability
    probs: np.ndarray | None  # (V,) float64, of the filtered distribution
    shifted: np.ndarray | None = None  # (V,) z / T less its maximum, -inf where it was filtered


BAD = Row(-1, math.nan, 0, frozenset(), math.inf, None)


def sample(
    positive, negative=None, *, anchor=None, alpha=0.0, plausibility=None, temperature=1.0,
    top_k=None, top_p=None, min_p=None, seed=0, position=0,
) -> Row:  # fmt: skip
    """``contrastive_sample`` of one row of float32 or float64 numbers."""
    real = positive.dtype.type
    z, a = combine(positive, negative, anchor, alpha)
    if len(z) == 0 or np.isnan(z).any() or np.isnan(a).any():
        return BAD
    z = masked(z, a, plausibility)
    if not np.isfinite(z.max()) or math.isnan(temperature) or temperature < 0:
        return BAD
    if temperature == 0:
        token = int(np.flatnonzero(z == z.max())[0])
        point = (np.arange(len(z)) == token).astype(np.float64)
        return Row(token, 0.0, 1, frozenset([token]), math.inf, point)
    with np.errstate(over="ignore"):
        s = z / real(temperature)
    if not np.isfinite(s.max()):
        return BAD
    return draw(s, top_k, top_p, min_p, seed, position)


def draw(s, top_k, top_p, min_p, seed, position) -> Row:
    real = s.dtype.type
    keep = s > -np.inf
    if top_k:
        keep &= s >= np.sort(s)[::-1][min(top_k, len(s)) - 1]
    shifted = s - s.max()
    weight = np.where(keep, np.exp(shifted.astype(np.float64)), 0.0)
    margin = math.inf
    if top_p is not None and top_p < 1:
        order = np.lexsort((np.arange(len(s)), s))
        below = weight[order].cumsum() / weight.sum()
        tail = real(1.0 - top_p)
        removed = below.astype(real) <= tail
        removed[-1] = False
        keep[order[removed]] = False
        # The last of all stays whatever its sum, and what has no weight goes in any case.
        edge = below[:-1][weight[order[:-1]] > 0]
        if len(edge) and tail > 0:
            margin = float(np.abs(edge / float(tail) - 1).min())
    if min_p is not None and min_p > 0:
        keep &= shifted >= real(math.log(min_p))
    weight = np.where(keep, weight, 0.0)
    keys = np.where(keep, shifted + gumbel(seed, position, len(s)).astype(s.dtype), -np.inf)
    token = int(np.flatnonzero(keys == keys.max())[0])
    logp = float(shifted[token]) - math.log(weight.sum())
    support = frozenset(np.flatnonzero(keep).tolist())
    shifted = np.where(keep, shifted, real(-np.inf))
    return Row(token, logp, len(support), support, margin, weight / weight.sum(), shifted)


def sample_rows(positive, negative=None, *, anchor=None, rows=(None, None, None), **options):
    """``sample`` of every output row; options are numbers or one per row, row maps are lists."""
    maps = [m for m in rows if m is not None]
    values = [v for v in options.values() if isinstance(v, (list, tuple, np.ndarray))]
    count = len((maps + values + [positive])[0])
    results = []
    for i in range(count):
        take = [
            None if t is None else t[i if m is None else m[i]]
            for t, m in zip((positive, negative, anchor), rows, strict=True)
        ]
        given = {
            name: v[i] if isinstance(v, (list, tuple, np.ndarray)) else v
            for name, v in options.items()
        }
        results.append(sample(take[0], take[1], anchor=take[2], **given))
    return results
