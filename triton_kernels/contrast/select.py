"""Thresholds of a row without sorting it: searches on the order of the floats.

A threshold is looked for among integer keys that stand in the order of the scores. A bracket of
keys ``[lo, hi]`` is narrowed by several pivots at once, each with the number of scores at or above
it, or with the mass below it. Sums of the same numbers in the same tree are monotone, so a bracket
never loses its answer.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ..common import sum_in_lanes, tile_index
from .combine import combine

# The key of -inf.
LOWEST_KEY = tl.constexpr(-2139095041)
# Pivots are looked for this far below the top of a bracket: there most rows have all their mass.
_SPAN = tl.constexpr(64.0)


@triton.jit
def key_of(s):
    """int32 in the order of the scores; both zeros have one key."""
    bits = (s + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(key):
    """The score of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def weight(d):
    """``exp(d)`` for d <= 0 without the rounding of ``d log2(e)``, which is worth |d| 2^-24."""
    product = d * 1.4426950216293335
    # What the product lost, and the constant: log2(e) in two float32.
    lost = tl.fma(d, 1.925963e-08, tl.fma(d, 1.4426950216293335, -product))
    e = tl.exp2(product)
    return tl.where(d > -87.0, tl.fma(e, lost * 0.6931471805599453, e), 0.0)


@triton.jit
def score(
    positive_ptr, negative_ptr, anchor_ptr, index, V, alpha, threshold, temperature,
    EVICT: tl.constexpr,
):  # fmt: skip
    """``s`` after the mask; NaN where a logit that counts is NaN, also under the mask."""
    z, a = combine(positive_ptr, negative_ptr, anchor_ptr, index, V, alpha, EVICT)
    if negative_ptr is None:
        z = tl.where(a == a, z, a)
    z = tl.where((a < threshold) & (z == z), float("-inf"), z)
    if temperature != 1.0:
        z = tl.div_rn(z, temperature)
    return z


@triton.jit
def _clamped(key, lo, hi):
    return tl.minimum(tl.maximum(key, lo + 1), hi)


@triton.jit
def _pivots(lo, hi):
    """Four keys in (lo, hi]: the one in the middle, and three at even distances in value.

    The middle halves the bracket whatever the values are.
    """
    high = value_of(hi)
    step = (high - tl.maximum(value_of(lo), high - _SPAN)) * 0.25
    return (
        (lo | hi) - ((lo ^ hi) >> 1),
        _clamped(key_of(high - step), lo, hi),
        _clamped(key_of(high - 2.0 * step), lo, hi),
        _clamped(key_of(high - 3.0 * step), lo, hi),
    )


@triton.jit
def _narrow(x, reached, count, lo, hi, count_lo, count_hi):
    """The bracket after a pivot, and how many keys are at or above lo, and above hi.

    ``reached`` is whether the answer is at or above the pivot; ``count``, how many keys are.
    """
    count_lo = tl.where(reached & (x >= lo), count, count_lo)
    count_hi = tl.where(reached | (x > hi), count_hi, count)
    lo = tl.where(reached, tl.maximum(lo, x), lo)
    hi = tl.where(reached, hi, tl.minimum(hi, x - 1))
    return lo, hi, count_lo, count_hi


@triton.jit
def _probe_list(
    x, key, w, above, k, below, total, tail, lo, hi, count_lo, count_hi, BY_MASS: tl.constexpr
):  # fmt: skip
    count = above + tl.sum((key >= x).to(tl.int32))
    if BY_MASS:
        reached = tl.div_rn(below + tl.sum(tl.where(key < x, w, 0.0)), total) <= tail
    else:
        reached = count >= k
    return _narrow(x, reached, count, lo, hi, count_lo, count_hi)


@triton.jit
def search_list(key, w, n, above, k, below, total, tail, lo, hi, BY_MASS: tl.constexpr):
    """The threshold of top-k or of top-p among the ``n`` keys, (M,), that are within [lo, hi].

    By count it is the largest x with ``above + count(key >= x) >= k``, by mass the largest with
    ``(below + mass(key < x)) / total <= tail``; lo where no other is.
    """
    count_lo = above + n
    count_hi = above
    # The ends are often the answer.
    x0 = tl.minimum(lo, hi - 1) + 1
    x1 = hi
    x2 = hi
    x3 = hi
    while (lo < hi) & (count_lo - count_hi > 1):
        lo, hi, count_lo, count_hi = _probe_list(
            x0, key, w, above, k, below, total, tail, lo, hi, count_lo, count_hi, BY_MASS
        )  # fmt: skip
        lo, hi, count_lo, count_hi = _probe_list(
            x1, key, w, above, k, below, total, tail, lo, hi, count_lo, count_hi, BY_MASS
        )  # fmt: skip
        lo, hi, count_lo, count_hi = _probe_list(
            x2, key, w, above, k, below, total, tail, lo, hi, count_lo, count_hi, BY_MASS
        )  # fmt: skip
        lo, hi, count_lo, count_hi = _probe_list(
            x3, key, w, above, k, below, total, tail, lo, hi, count_lo, count_hi, BY_MASS
        )  # fmt: skip
        x0, x1, x2, x3 = _pivots(lo, hi)
    # One key that is left is the answer.
    last = tl.min(tl.where(key >= lo, key, hi))
    return tl.where((lo < hi) & (count_lo - count_hi == 1), last, lo)


@triton.jit
def nucleus(key, w, n, below, above, m, tail, lo, hi):
    """Where the nucleus of top-p ends: a key, and how many scores equal to it are outside.

    ``key`` and ``w``, (M,), hold the ``n`` scores within [lo, hi], unless lo is hi; ``below`` and
    ``above`` are the masses outside.
    """
    single = weight(value_of(lo) - m)
    ties = tl.where(lo == hi, n, 0)
    total = below + above + tl.where(lo == hi, n * single, tl.sum(w))
    if lo < hi:
        lo = search_list(key, w, n, 0, 0, below, total, tail, lo, hi, True)
        single = weight(value_of(lo) - m)
        below += tl.sum(tl.where(key < lo, w, 0.0))
        ties = tl.sum((key == lo).to(tl.int32))
    # Equals leave in the order of their indices, as many as fit in the tail; the last one stays.
    outside = tl.full([], 0, tl.int32)
    most = tl.maximum(ties - 1, 0)
    while outside < most:
        middle = outside + (most - outside + 1) // 2
        fits = tl.div_rn(below + middle * single, total) <= tail
        outside = tl.where(fits, middle, outside)
        most = tl.where(fits, most, middle - 1)
    return lo, outside


@triton.jit
def _probe_row(
    x, lane_count, lane_mass, total, by_mass, k, tail, lo, hi, count_lo, count_hi
):  # fmt: skip
    count = tl.sum(lane_count)
    reached = tl.where(by_mass, tl.div_rn(tl.sum(lane_mass), total) <= tail, count >= k)
    return _narrow(x, reached, count, lo, hi, count_lo, count_hi)


@triton.jit
def _tally(x, key, w, lane_count, lane_mass):
    """Running count of the keys from x on, and mass of those below."""
    reached = key >= x
    lane_count += tl.sum(tl.sum(reached.to(tl.int32), 2), 0)
    return lane_count, lane_mass + sum_in_lanes(tl.where(reached, 0.0, w))


@triton.jit
def narrow_on_row(
    positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
    m, by_mass, k, tail, base, enough, n, lo, hi,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The bracket of `search_list` on the whole row, down to ``enough`` scores or one key.

    Masses are of the scores from ``base`` on; ``n`` scores at most are at or above lo.
    """
    count_lo = tl.full([], 0, tl.int32) + n
    count_hi = tl.full([], 0, tl.int32)
    none = tl.zeros((LANES,), tl.int32)
    zero = tl.zeros((LANES,), tl.float32)
    while (lo < hi) & (count_lo - count_hi > enough):
        x0, x1, x2, x3 = _pivots(lo, hi)
        count0, count1, count2, count3 = none, none, none, none
        mass0, mass1, mass2, mass3, lane_total = zero, zero, zero, zero, zero
        for tile in range(tl.cdiv(V, STEPS * LANES * VEC)):
            s = score(
                positive_ptr, negative_ptr, anchor_ptr, tile_index(tile, STEPS, LANES, VEC), V,
                alpha, threshold, temperature, "evict_last",
            )  # fmt: skip
            key = key_of(s)
            w = tl.where(key >= base, weight(s - m), 0.0)
            count0, mass0 = _tally(x0, key, w, count0, mass0)
            count1, mass1 = _tally(x1, key, w, count1, mass1)
            count2, mass2 = _tally(x2, key, w, count2, mass2)
            count3, mass3 = _tally(x3, key, w, count3, mass3)
            lane_total += sum_in_lanes(w)
        total = tl.sum(lane_total)
        lo, hi, count_lo, count_hi = _probe_row(
            x0, count0, mass0, total, by_mass, k, tail, lo, hi, count_lo, count_hi
        )  # fmt: skip
        lo, hi, count_lo, count_hi = _probe_row(
            x1, count1, mass1, total, by_mass, k, tail, lo, hi, count_lo, count_hi
        )  # fmt: skip
        lo, hi, count_lo, count_hi = _probe_row(
            x2, count2, mass2, total, by_mass, k, tail, lo, hi, count_lo, count_hi
        )  # fmt: skip
        lo, hi, count_lo, count_hi = _probe_row(
            x3, count3, mass3, total, by_mass, k, tail, lo, hi, count_lo, count_hi
        )  # fmt: skip
    return lo, hi


@triton.jit
def collect(
    list_score_ptr, list_index_ptr,
    positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
    m, base, lo, hi, least, LIST: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Lists the scores within [lo, hi], ``s - m >= least``, in the order of their indices.

    Returns:
        How many there are, of which the first LIST are in the list; how many are above; the masses
        of those from ``base`` on that are below, and of those that are above.
    """
    BLOCK: tl.constexpr = STEPS * LANES * VEC
    lane_above = tl.zeros((LANES,), tl.int32)
    lane_below_mass = tl.zeros((LANES,), tl.float32)
    lane_above_mass = tl.zeros((LANES,), tl.float32)
    n = tl.full([], 0, tl.int32)
    # The last list has been read by every thread.
    tl.debug_barrier()
    for tile in range(tl.cdiv(V, BLOCK)):
        index = tile_index(tile, STEPS, LANES, VEC)
        s = score(
            positive_ptr, negative_ptr, anchor_ptr, index, V,
            alpha, threshold, temperature, "evict_last",
        )  # fmt: skip
        key = key_of(s)
        w = weight(s - m)
        lane_above += tl.sum(tl.sum((key > hi).to(tl.int32), 2), 0)
        lane_below_mass += sum_in_lanes(tl.where((key >= base) & (key < lo), w, 0.0))
        lane_above_mass += sum_in_lanes(tl.where(key > hi, w, 0.0))
        member = (key >= lo) & (key <= hi) & (s > float("-inf")) & (s - m >= least)
        found = tl.sum(member.to(tl.int32))
        if found > 0:
            flat = tl.reshape(member.to(tl.int32), (BLOCK,))
            at = n + tl.cumsum(flat, 0) - 1
            room = (flat > 0) & (at < LIST)
            tl.store(list_score_ptr + at, tl.reshape(s, (BLOCK,)), mask=room)
            tl.store(list_index_ptr + at, tl.reshape(index, (BLOCK,)), mask=room)
        n += found
    # What one thread wrote, others read.
    tl.debug_barrier()
    return n, tl.sum(lane_above), tl.sum(lane_below_mass), tl.sum(lane_above_mass)


@triton.jit
def read_list(list_score_ptr, n, m, base, LIST: tl.constexpr):
    """Keys and, from ``base`` on, weights of the list, (LIST,); past its end keys below all."""
    place = tl.arange(0, LIST)
    s = tl.load(list_score_ptr + place, mask=place < n, other=float("-inf"))
    key = tl.where(place < n, key_of(s), LOWEST_KEY - 1)
    return key, tl.where(key >= base, weight(s - m), 0.0)
