"""The two passes over a row, shared by the kernels. Symbols as in the package's docstring."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from ..common import FLOOR, LOWEST, exp, log1p, sum_in_lanes, tile_index


@triton.jit
def _tanh(x):
    """``tanh(x)`` and its derivative, each with a small relative error everywhere."""
    e = exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    large = (1.0 - e) * r
    # Minimax fit of tanh(x) / x for |x| <= 0.5 with relative error 1.5e-8.
    y = x * x
    series = tl.fma(y, 0.01724149, -0.05304549)
    series = tl.fma(y, series, 0.13325879)
    series = tl.fma(y, series, -0.33333144)
    small = tl.fma(x * y, series, x)
    t = tl.where(tl.abs(x) < 0.5, small, tl.where(x < 0.0, -large, large))
    return t, 4.0 * e * r * r


@triton.jit
def _bend(raw, slope, HAS_SOFTCAP: tl.constexpr):
    """``u`` with ``z = scale * u``, and ``du / d raw``."""
    if HAS_SOFTCAP:
        t, dt = _tanh(raw * slope)
        return t, dt * slope
    else:
        return raw, 1.0


@triton.jit
def _load(ptr, index, V, EDGE: tl.constexpr, EVICT: tl.constexpr):
    # Under a mask the load would be wide only where V is a multiple of 16.
    if EDGE:
        x = tl.load(ptr + index, mask=index < V, other=0.0, eviction_policy=EVICT)
    else:
        x = tl.load(ptr + index, eviction_policy=EVICT)
    return x.to(tl.float32)


@triton.jit
def _fold(
    lane_max, lane_sum, lane_moment, lane_weight, lane_logits, lane_tile,
    tile, row_ptr, class_weight_ptr, V, y, origin, slope, scale,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_ARGMAX: tl.constexpr, EVICT: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The lanes' running values with one tile more; an edge holds the target or the row's end."""
    index = tile_index(tile, STEPS, LANES, VEC)
    u = _bend(_load(row_ptr, index, V, EDGE, EVICT), slope, HAS_SOFTCAP)[0]
    z = u * scale
    if EDGE:
        z = tl.where(index < V, z, float("-inf"))
    tile_max = tl.max(tl.max(z, 2), 0)
    new_max = tl.maximum(lane_max, tile_max)
    if HAS_ARGMAX:
        lane_tile = tl.where(tile_max > lane_max, tile, lane_tile)
    shift = tl.maximum(lane_max - new_max, FLOOR)
    rescale = exp(shift)
    d = tl.fma(u, scale, -new_max[None, :, None])
    e = exp(d)
    if EDGE:
        e = tl.where((index < V) & (index != y), e, 0.0)
    if HAS_ENTROPY:
        moved = lane_sum * (rescale * shift)
        lane_moment = tl.fma(lane_moment, rescale, moved) + sum_in_lanes(e * tl.maximum(d, FLOOR))
    lane_sum = tl.fma(lane_sum, rescale, sum_in_lanes(e))
    if HAS_SMOOTHING:
        shifted = tl.fma(u, scale, -origin)
        if EDGE:
            shifted = tl.where(index < V, shifted, 0.0)
        if class_weight_ptr is not None:
            w = _load(class_weight_ptr, index, V, EDGE, "evict_last")
            lane_weight += sum_in_lanes(w)
            shifted *= w
        lane_logits += sum_in_lanes(shifted)
    return new_max, lane_sum, lane_moment, lane_weight, lane_logits, lane_tile


@triton.jit
def read_row(
    row_ptr, class_weight_ptr, V, y, slope, scale,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    HAS_ARGMAX: tl.constexpr, EVICT: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """First pass.

    Returns:
        ``m``, ``s_y``, ``rest``, ``total``, ``nll`` and ``log(total)``; then, where asked for,
        ``H``, ``sum_v w_v``, ``sum_v w_v (z_v - m)``, and the first tile that holds the maximum.
    """
    u_y = _bend(tl.load(row_ptr + y).to(tl.float32), slope, HAS_SOFTCAP)[0]
    z_y = u_y * scale
    # Sums of logits are taken relative to one of them: a common offset would drown them.
    origin = tl.where(tl.abs(z_y) < float("inf"), z_y, 0.0)
    lane_max = tl.full((LANES,), LOWEST, tl.float32)
    lane_sum = tl.zeros((LANES,), tl.float32)
    lane_moment = tl.zeros((LANES,), tl.float32)
    lane_weight = tl.zeros((LANES,), tl.float32)
    lane_logits = tl.zeros((LANES,), tl.float32)
    lane_tile = tl.zeros((LANES,), tl.int32)
    BLOCK: tl.constexpr = STEPS * LANES * VEC
    for tile in range(tl.cdiv(V, BLOCK)):
        if (tile == y // BLOCK) | (tile == V // BLOCK):
            lane_max, lane_sum, lane_moment, lane_weight, lane_logits, lane_tile = _fold(
                lane_max, lane_sum, lane_moment, lane_weight, lane_logits, lane_tile,
                tile, row_ptr, class_weight_ptr, V, y, origin, slope, scale, HAS_SOFTCAP,
                HAS_ENTROPY, HAS_SMOOTHING, HAS_ARGMAX, EVICT, STEPS, LANES, VEC, True,
            )  # fmt: skip
        else:
            lane_max, lane_sum, lane_moment, lane_weight, lane_logits, lane_tile = _fold(
                lane_max, lane_sum, lane_moment, lane_weight, lane_logits, lane_tile,
                tile, row_ptr, class_weight_ptr, V, y, origin, slope, scale, HAS_SOFTCAP,
                HAS_ENTROPY, HAS_SMOOTHING, HAS_ARGMAX, EVICT, STEPS, LANES, VEC, False,
            )  # fmt: skip

    lanes_max = tl.max(lane_max, 0)
    m = tl.maximum(lanes_max, z_y)
    shift = tl.maximum(lane_max - m, FLOOR)
    rescale = exp(shift)
    rest = tl.sum(lane_sum * rescale, 0)
    s_y = tl.fma(u_y, scale, -m)
    e_y = exp(s_y)
    total = rest + e_y
    nll = tl.where(rest < e_y, log1p(rest / e_y), tl.log(total) - s_y)
    log_total = tl.where(rest < e_y, nll + s_y, tl.log(total))
    entropy = 0.0
    if HAS_ENTROPY:
        moved = lane_sum * (rescale * shift)
        moment = tl.sum(tl.fma(lane_moment, rescale, moved), 0) + e_y * tl.maximum(s_y, FLOOR)
        entropy = log_total - moment / total
    weight_sum = V * 1.0
    logit_sum = 0.0
    if HAS_SMOOTHING:
        if class_weight_ptr is not None:
            weight_sum = tl.sum(lane_weight, 0)
        logit_sum = tl.sum(lane_logits, 0) - weight_sum * (m - origin)
    best_tile = 0
    if HAS_ARGMAX:
        best_tile = tl.min(tl.where(lane_max == lanes_max, lane_tile, V), 0)
    return m, s_y, rest, total, nll, log_total, entropy, weight_sum, logit_sum, best_tile


@triton.jit
def first_maximum(
    row_ptr, V, first_tile, last_tile, slope, scale,
    HAS_SOFTCAP: tl.constexpr, EVICT: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Lowest index of the maximum in these tiles, or of the first NaN, as torch.argmax has it."""
    best = tl.full([], float("-inf"), tl.float32)
    at = tl.full([], 0, tl.int32) + V
    nan_at = tl.full([], 0, tl.int32) + V
    for tile in range(first_tile, last_tile + 1):
        index = tile_index(tile, STEPS, LANES, VEC)
        inside = index < V
        z = _bend(_load(row_ptr, index, V, True, EVICT), slope, HAS_SOFTCAP)[0] * scale
        nan_at = tl.minimum(nan_at, tl.min(tl.where(inside & (z != z), index, V)))
        z = tl.where(inside & (z == z), z, float("-inf"))
        tile_best = tl.max(z)
        better = (tile_best > best) | (at == V)
        at = tl.where(better, tl.min(tl.where(inside & (z == tile_best), index, V)), at)
        best = tl.maximum(best, tile_best)
    return tl.where(nan_at < V, nan_at, at)


@triton.jit
def _write_tile(
    tile, grad_ptr, row_ptr, class_weight_ptr, V, y, slope, scale,
    m, p_factor, d_factor, smoothing, at_target,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    index = tile_index(tile, STEPS, LANES, VEC)
    u, du = _bend(_load(row_ptr, index, V, EDGE, "evict_first"), slope, HAS_SOFTCAP)
    d = tl.fma(u, scale, -m)
    g = exp(d)
    if HAS_ENTROPY:
        g *= tl.fma(tl.maximum(d, FLOOR), d_factor, p_factor)
    else:
        g *= p_factor
    if HAS_SMOOTHING:
        if class_weight_ptr is not None:
            g -= smoothing * _load(class_weight_ptr, index, V, EDGE, "evict_last")
        else:
            g -= smoothing
    if EDGE:
        g = tl.where(index == y, at_target, g)
    if HAS_SOFTCAP:
        g *= du
    g = g.to(grad_ptr.dtype.element_ty)
    if EDGE:
        tl.store(grad_ptr + index, g, mask=index < V)
    else:
        tl.store(grad_ptr + index, g)


@triton.jit
def write_gradient(
    grad_ptr, row_ptr, class_weight_ptr, V, y, slope, scale,
    m, total, log_total, entropy, p_factor, entropy_factor, smoothing, at_target,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Second pass: the gradient with P, K, S and, for the target, ``f_y at_target``."""
    # What the row has in common goes into its scalars: P - K (log p_v + H) is linear in z_v - m.
    if HAS_ENTROPY:
        p_factor -= entropy_factor * (entropy - log_total)
    p_factor = p_factor * scale / total
    d_factor = -entropy_factor * scale / total
    smoothing = smoothing * scale
    at_target = at_target * scale
    BLOCK: tl.constexpr = STEPS * LANES * VEC
    tiles = tl.cdiv(V, BLOCK)
    for done in range(tiles):
        tile = tiles - 1 - done
        if (tile == y // BLOCK) | (tile == V // BLOCK):
            _write_tile(
                tile, grad_ptr, row_ptr, class_weight_ptr, V, y, slope, scale,
                m, p_factor, d_factor, smoothing, at_target,
                HAS_SOFTCAP, HAS_ENTROPY, HAS_SMOOTHING, STEPS, LANES, VEC, True,
            )  # fmt: skip
        else:
            _write_tile(
                tile, grad_ptr, row_ptr, class_weight_ptr, V, y, slope, scale,
                m, p_factor, d_factor, smoothing, at_target,
                HAS_SOFTCAP, HAS_ENTROPY, HAS_SMOOTHING, STEPS, LANES, VEC, False,
            )  # fmt: skip


@triton.jit
def fill_row(
    ptr, V, value, STEPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """Writes ``value`` all over a row."""
    for tile in range(tl.cdiv(V, STEPS * LANES * VEC)):
        index = tile_index(tile, STEPS, LANES, VEC)
        filler = tl.zeros((STEPS, LANES, VEC), tl.float32) + value
        tl.store(ptr + index, filler.to(ptr.dtype.element_ty), mask=index < V)
