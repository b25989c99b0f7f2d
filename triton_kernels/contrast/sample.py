"""One token of each row: combination, temperature, top-k, top-p, min-p and Gumbel-max."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import on, sum_in_lanes, tile_index
from .combine import parameter, row_of, threshold_of
from .config import options, row_stride
from .philox import gumbel, gumbel_bound, pair_bits
from .select import (
    LOWEST_KEY,
    collect,
    key_of,
    narrow_on_row,
    nucleus,
    read_list,
    score,
    search_list,
    value_of,
    weight,
)


@triton.jit
def _mapped(rows_ptr, count, row):
    """Row of a tensor that belongs to an output row, and whether the tensor lacks it."""
    at = parameter(row, rows_ptr, row)
    missing = (at < 0) | (at >= count)
    return tl.where(missing, 0, at), missing


@triton.jit
def _words(value_low, value_high, rows_ptr, row):
    """An int64 as two words of type uint32."""
    if rows_ptr is None:
        return value_low.to(tl.uint32, bitcast=True), value_high.to(tl.uint32, bitcast=True)
    else:
        value = tl.load(rows_ptr + row)
        return value.to(tl.uint32), (value >> 32).to(tl.uint32)


@triton.jit
def _store(token_ptr, logp_ptr, kept_ptr, row, token, logp, kept):
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logp_ptr + row, logp)
    tl.store(kept_ptr + row, kept.to(tl.int64))


@triton.jit
def _store_bad(token_ptr, logp_ptr, kept_ptr, row):
    zero = tl.full([], 0, tl.int32)
    _store(token_ptr, logp_ptr, kept_ptr, row, zero - 1, float("nan"), zero)


@triton.jit
def _maximum(
    positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Largest score of every place in the tiles; that of the row, NaN if one is; its index."""
    lane_max = tl.full((STEPS, LANES, VEC), float("-inf"), tl.float32)
    lane_tile = tl.zeros((STEPS, LANES, VEC), tl.int32)
    for tile in range(tl.cdiv(V, STEPS * LANES * VEC)):
        index = tile_index(tile, STEPS, LANES, VEC)
        s = score(
            positive_ptr, negative_ptr, anchor_ptr, index, V,
            alpha, threshold, temperature, "evict_last",
        )  # fmt: skip
        lane_tile = tl.where(s > lane_max, tile, lane_tile)
        lane_max = tl.maximum(lane_max, s, propagate_nan=tl.PropagateNan.ALL)
    unknown = tl.sum((lane_max != lane_max).to(tl.int32)) > 0
    m = tl.where(unknown, float("nan"), tl.max(lane_max))
    index = tile_index(lane_tile, STEPS, LANES, VEC)
    return lane_max, m, tl.min(tl.where(lane_max == m, index, V))


@triton.jit
def _thresholds_by_list(
    list_score_ptr, list_index_ptr,
    positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
    lane_max, m, k, tail, log_min_p, LIST: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """What top-k and top-p leave of a row, if the list holds it.

    Returns:
        A key, from which on scores stay; how many scores equal to it leave all the same; whether
        the list held the answer; the key from which on scores were listed, and how many there are.
    """
    BLOCK: tl.constexpr = STEPS * LANES * VEC
    MOST: tl.constexpr = (LIST if LIST < BLOCK else BLOCK) // 2
    top = key_of(m)
    floor = tl.full([], LOWEST_KEY, tl.int32)
    t = floor
    outside = tl.full([], 0, tl.int32)
    # The largest scores of `rank` places in the tiles: so many scores are that large at least.
    rank = tl.where(k > 0, k, tl.where(tail >= 0.0, MOST, 0))
    if (rank > 0) & (rank <= MOST):
        places = tl.reshape(key_of(lane_max), (BLOCK,))
        floor = search_list(places, 0.0, BLOCK, 0, rank, 0.0, 1.0, 0.0, floor, top, False)
    n, above, below, above_mass = collect(
        list_score_ptr, list_index_ptr,
        positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
        m, t, floor, top, tl.where(rank > 0, float("-inf"), log_min_p),
        LIST, STEPS, LANES, VEC,
    )  # fmt: skip
    listed = n <= LIST
    if listed:
        key, w = read_list(list_score_ptr, n, m, t, LIST)
        inside = n
        if k > 0:
            t = search_list(key, w, n, above, k, 0.0, 1.0, 0.0, floor, top, False)
            w = tl.where(key >= t, w, 0.0)
            inside = tl.sum((key >= t).to(tl.int32))
            below = 0.0
        if tail >= 0.0:
            # The nucleus may reach further down than the list.
            listed = tl.div_rn(below, below + tl.sum(w)) <= tail
            if listed:
                t, outside = nucleus(
                    key, w, inside, below, above_mass, m, tail, tl.maximum(t, floor), top
                )  # fmt: skip
    return t, outside, listed, floor, n


@triton.jit
def _thresholds_by_row(
    list_score_ptr, list_index_ptr,
    positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
    m, k, tail, floor, n, LIST: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """As `_thresholds_by_list`, by bracketing first top-k's threshold and then that of top-p."""
    top = key_of(m)
    t = tl.full([], LOWEST_KEY, tl.int32)
    outside = tl.full([], 0, tl.int32)
    for phase in range(2):
        by_mass = phase == 1
        # With k of them or fewer listed, all that is above -inf stays.
        if (by_mass & (tail >= 0.0)) | ((phase == 0) & (k > 0) & (k <= n)):
            lo = tl.maximum(tl.where(by_mass, t, floor), LOWEST_KEY + 1)
            lo, hi = narrow_on_row(
                positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
                m, by_mass, k, tail, t, LIST, tl.where(by_mass, V, n), lo, top,
                STEPS, LANES, VEC,
            )  # fmt: skip
            count, above, below, above_mass = collect(
                list_score_ptr, list_index_ptr,
                positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
                m, t, lo, hi, float("-inf"), LIST, STEPS, LANES, VEC,
            )  # fmt: skip
            key, w = read_list(list_score_ptr, tl.minimum(count, LIST), m, t, LIST)
            if by_mass:
                t, outside = nucleus(key, w, count, below, above_mass, m, tail, lo, hi)
            else:
                t = search_list(key, w, count, above, k, 0.0, 1.0, 0.0, lo, hi, False)
    return t, outside


@triton.jit
def _thresholds(
    list_score_ptr, list_index_ptr,
    positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
    lane_max, m, k, tail, log_min_p, LIST: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A key, from which on scores stay, and how many scores equal to it leave all the same.

    Then whether the list holds all that stay, and its length.
    """
    t = tl.full([], LOWEST_KEY, tl.int32)
    outside = tl.full([], 0, tl.int32)
    n = tl.full([], 0, tl.int32)
    listed = n > 0
    chosen = (k > 0) | (tail >= 0.0)
    if chosen | (log_min_p > float("-inf")) | (threshold > float("-inf")):
        t, outside, listed, floor, n = _thresholds_by_list(
            list_score_ptr, list_index_ptr,
            positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
            lane_max, m, k, tail, log_min_p, LIST, STEPS, LANES, VEC,
        )  # fmt: skip
        if chosen & (listed == 0):
            t, outside = _thresholds_by_row(
                list_score_ptr, list_index_ptr,
                positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
                m, k, tail, floor, n, LIST, STEPS, LANES, VEC,
            )  # fmt: skip
    return t, outside, listed, n


@triton.jit
def _winner(keep, d, high, low, index, V):
    """The largest key of a tile and its token."""
    key = tl.where(keep, d + gumbel(high, low), float("-inf"))
    largest = tl.max(key)
    return largest, tl.min(tl.where(key == largest, index, V))


@triton.jit
def _draw_from_list(
    list_score_ptr, list_index_ptr, n, V, m, t, outside, log_min_p,
    seed_low, seed_high, position_low, position_high, LIST: tl.constexpr,
):  # fmt: skip
    """Token, and number and mass of those that are kept."""
    key, w = read_list(list_score_ptr, n, m, t, LIST)
    place = tl.arange(0, LIST)
    index = tl.load(list_index_ptr + place, mask=place < n, other=0)
    d = value_of(key) - m
    keep = (place < n) & (key >= t) & (d >= log_min_p)
    if outside > 0:
        tie = (keep & (key == t)).to(tl.int32)
        keep = keep & ((tie == 0) | (tl.cumsum(tie, 0) > outside))
    words = pair_bits(index >> 1, seed_low, seed_high, position_low, position_high)
    odd = (index & 1) > 0
    _, token = _winner(
        keep, d, tl.where(odd, words[2], words[0]), tl.where(odd, words[3], words[1]), index, V
    )  # fmt: skip
    return token, tl.sum(keep.to(tl.int32)), tl.sum(tl.where(keep, w, 0.0))


@triton.jit
def _draw_from_row(
    positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
    m, t, outside, log_min_p, seed_low, seed_high, position_low, position_high,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """As `_draw_from_list`. A tile's keys are worked out where a bound of them reaches the best."""
    BLOCK: tl.constexpr = STEPS * LANES * VEC
    lane_kept = tl.zeros((LANES,), tl.int32)
    lane_mass = tl.zeros((LANES,), tl.float32)
    seen = tl.full([], 0, tl.int32)
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], -1, tl.int32)
    for tile in range(tl.cdiv(V, BLOCK)):
        index = tile_index(tile, STEPS, LANES, VEC)
        s = score(
            positive_ptr, negative_ptr, anchor_ptr, index, V,
            alpha, threshold, temperature, "evict_first",
        )  # fmt: skip
        key = key_of(s)
        d = s - m
        keep = (s > float("-inf")) & (key >= t) & (d >= log_min_p)
        if seen < outside:
            tie = tl.reshape((keep & (key == t)).to(tl.int32), (BLOCK,))
            leaves = (tie > 0) & (seen + tl.cumsum(tie, 0) <= outside)
            keep = keep & ~tl.reshape(leaves, (STEPS, LANES, VEC))
            seen += tl.sum(tie)
        lane_kept += tl.sum(tl.sum(keep.to(tl.int32), 2), 0)
        lane_mass += sum_in_lanes(tl.where(keep, weight(d), 0.0))
        pair = tile_index(tile, STEPS, LANES, VEC // 2)
        words = pair_bits(pair, seed_low, seed_high, position_low, position_high)
        high = tl.reshape(tl.join(words[0], words[2]), (STEPS, LANES, VEC))
        low = tl.reshape(tl.join(words[1], words[3]), (STEPS, LANES, VEC))
        bound = tl.max(tl.where(keep, d + gumbel_bound(high), float("-inf")))
        if bound >= best:
            largest, at = _winner(keep, d, high, low, index, V)
            token = tl.where(largest > best, at, token)
            best = tl.maximum(best, largest)
    return token, tl.sum(lane_kept), tl.sum(lane_mass)


@triton.jit(
    do_not_specialize=[
        "positive_count", "negative_count", "anchor_count", "top_k",
        "seed_low", "seed_high", "position_low", "position_high",
    ]
)  # fmt: skip
def sample_kernel(
    positive_ptr, positive_row_stride, positive_rows_ptr, positive_count,
    negative_ptr, negative_row_stride, negative_rows_ptr, negative_count,
    anchor_ptr, anchor_row_stride, anchor_rows_ptr, anchor_count,
    alpha, alpha_rows_ptr, log_beta, log_beta_rows_ptr, temperature, temperature_rows_ptr,
    top_k, top_k_rows_ptr, tail, tail_rows_ptr, log_min_p, log_min_p_rows_ptr,
    seed_low, seed_high, seed_rows_ptr, position_low, position_high, position_rows_ptr,
    token_ptr, logp_ptr, kept_ptr, list_score_ptr, list_index_ptr, V,
    ALIGNMENT: tl.constexpr, LIST: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``: arguments as in `contrastive_sample_rows`."""
    row = tl.program_id(0).to(tl.int64)
    at, bad = _mapped(positive_rows_ptr, positive_count, row)
    positive_ptr = row_of(positive_ptr, at, positive_row_stride, ALIGNMENT)
    if negative_ptr is not None:
        at, missing = _mapped(negative_rows_ptr, negative_count, row)
        negative_ptr = row_of(negative_ptr, at, negative_row_stride, ALIGNMENT)
        bad = bad | missing
    if anchor_ptr is not None:
        at, missing = _mapped(anchor_rows_ptr, anchor_count, row)
        anchor_ptr = row_of(anchor_ptr, at, anchor_row_stride, ALIGNMENT)
        bad = bad | missing
    temperature = parameter(temperature, temperature_rows_ptr, row)
    if bad | (temperature < 0.0) | (temperature != temperature):
        _store_bad(token_ptr, logp_ptr, kept_ptr, row)
        return
    greedy = temperature == 0.0
    temperature = tl.where(greedy, 1.0, temperature)
    alpha = parameter(alpha, alpha_rows_ptr, row)
    log_beta = parameter(log_beta, log_beta_rows_ptr, row)
    threshold = tl.full([], float("-inf"), tl.float32)
    if log_beta > float("-inf"):
        threshold = threshold_of(
            positive_ptr if anchor_ptr is None else anchor_ptr, V, log_beta, STEPS, LANES, VEC
        )
    lane_max, m, token = _maximum(
        positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
        STEPS, LANES, VEC,
    )  # fmt: skip
    if (m != m) | (tl.abs(m) == float("inf")) | (threshold != threshold):
        _store_bad(token_ptr, logp_ptr, kept_ptr, row)
        return
    if greedy:
        _store(token_ptr, logp_ptr, kept_ptr, row, token, 0.0, tl.full([], 1, tl.int32))
        return
    log_min_p = parameter(log_min_p, log_min_p_rows_ptr, row)
    k = parameter(top_k, top_k_rows_ptr, row)
    list_score_ptr += row * LIST
    list_index_ptr += row * LIST
    k = tl.where((k < V) & (k > 0), k, 0).to(tl.int32)
    tail = parameter(tail, tail_rows_ptr, row)
    t, outside, listed, n = _thresholds(
        list_score_ptr, list_index_ptr,
        positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
        lane_max, m, k, tail, log_min_p, LIST, STEPS, LANES, VEC,
    )  # fmt: skip
    seed_low, seed_high = _words(seed_low, seed_high, seed_rows_ptr, row)
    position_low, position_high = _words(position_low, position_high, position_rows_ptr, row)
    if listed:
        token, kept, mass = _draw_from_list(
            list_score_ptr, list_index_ptr, n, V, m, t, outside, log_min_p,
            seed_low, seed_high, position_low, position_high, LIST,
        )  # fmt: skip
    else:
        token, kept, mass = _draw_from_row(
            positive_ptr, negative_ptr, anchor_ptr, V, alpha, threshold, temperature,
            m, t, outside, log_min_p, seed_low, seed_high, position_low, position_high,
            STEPS, LANES, VEC,
        )  # fmt: skip
    s = score(positive_ptr, negative_ptr, anchor_ptr, token, V, alpha, threshold, temperature, "")
    _store(token_ptr, logp_ptr, kept_ptr, row, token, s - m - tl.log(mass), kept)


def _halves(number: int) -> tuple[int, int]:
    """Low and high word of an int64, each as an int32: their type never hangs on the value."""
    return tuple(((number >> shift) + 2**31 & 0xFFFFFFFF) - 2**31 for shift in (0, 32))


def _count(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.shape[0]


def contrastive_sample_rows(
    positive: Tensor,  # (P, V)
    negative: Tensor | None,  # (N, V)
    anchor: Tensor | None,  # (A, V)
    positive_rows: Tensor | None,  # (B,) int64
    negative_rows: Tensor | None,  # (B,) int64
    anchor_rows: Tensor | None,  # (B,) int64
    alpha: float,
    alpha_rows: Tensor | None,  # (B,) float32
    log_beta: float,
    log_beta_rows: Tensor | None,  # (B,) float32
    temperature: float,
    temperature_rows: Tensor | None,  # (B,) float32
    top_k: int,
    top_k_rows: Tensor | None,  # (B,) int64
    tail: float,
    tail_rows: Tensor | None,  # (B,) float32
    log_min_p: float,
    log_min_p_rows: Tensor | None,  # (B,) float32
    seed: int,
    seed_rows: Tensor | None,  # (B,) int64
    position: int,
    position_rows: Tensor | None,  # (B,) int64
    token: Tensor,  # (B,) int64
    logp: Tensor,  # (B,) float32
    kept: Tensor,  # (B,) int64
) -> None:
    """Draws a token of each row; its log-probability among those that the filters keep.

    A ``*_rows`` tensor of a parameter wins over the number of its name.

    Args:
        positive: rows; float32, float16 or bfloat16; unit stride along V, any row stride.
        negative: rows of the same dtype; None for ``z = p``.
        anchor: rows of the same dtype; None for the positive ones.
        positive_rows: the positive row of each output row; None for its own number.
        negative_rows: the negative row.
        anchor_rows: the anchor row.
        alpha: weight of the contrast.
        alpha_rows: of each row.
        log_beta: logarithm of the plausibility; -inf for no mask.
        log_beta_rows: of each row.
        temperature: ``T``; 0 for the lowest index among the largest.
        temperature_rows: of each row.
        top_k: how many of the largest stay, and all equals of the last; 0 for all.
        top_k_rows: of each row.
        tail: probability of what top-p removes, ``1 - top_p``; negative for none.
        tail_rows: of each row.
        log_min_p: logarithm of the least ratio to the largest probability; -inf for none.
        log_min_p_rows: of each row.
        seed: key of the random stream.
        seed_rows: of each row.
        position: place in the random stream.
        position_rows: of each row.
        token: written; -1 for a row that holds no distribution (a NaN, +inf, nothing left, a row
            number outside its tensor, a temperature below 0).
        logp: written; 0 for a temperature of 0, NaN with a token of -1.
        kept: written: how many tokens were left to draw from.

    Cost: one read of the rows from memory and one or two that find them in L2 if there is room; a
    few more where so many scores tie, or so flat is the distribution, that the candidates of top-k
    or top-p don't fit a list of 2,048. Scratch of 16 KiB a row at most. One launch.
    """
    rows = token.shape[0]
    if rows == 0:
        return
    config, shared = options(positive, (negative, anchor))
    lists = (rows, config.candidates)
    limit = 2**31 - 1
    with on(token.device):
        sample_kernel[(rows,)](
            positive, row_stride(positive), positive_rows, _count(positive),
            negative, row_stride(negative), negative_rows, _count(negative),
            anchor, row_stride(anchor), anchor_rows, _count(anchor),
            float(alpha), alpha_rows, float(log_beta), log_beta_rows,
            float(temperature), temperature_rows, min(max(top_k, 0), limit), top_k_rows,
            float(tail), tail_rows, float(log_min_p), log_min_p_rows,
            *_halves(seed), seed_rows, *_halves(position), position_rows, token, logp, kept,
            torch.empty(lists, dtype=torch.float32, device=token.device),
            torch.empty(lists, dtype=torch.int32, device=token.device),
            LIST=config.candidates,
            **shared,
        )  # fmt: skip
