"""Token loss, log-probability and entropy of rows of logits, with their gradients: one program per row.

For a row ``raw`` with target ``y``, in float32::

    z_v   = softcap * tanh(logit_scale * raw_v / softcap) * inv_temperature      (no softcap: z = u)
    m     = max_v z_v                   s_y = z_y - m
    rest  = sum_{v != y} exp(z_v - m)   total = rest + exp(s_y)     1 - p_y = rest / total
    nll   = log(total) - s_y            (log1p(rest) where y is the maximum)
    lse   = m + log(total)              H = log(total) - sum_v exp(z_v - m) (z_v - m) / total

The target stays out of ``rest``: where ``p_y`` is near 1, ``1 - p_y`` and ``nll`` would otherwise be differences of
nearly equal numbers (Liger-Kernel issue 1268). Every gradient here has the form::

    d_v = f_v (p_v (P - K (log p_v + H)) - S w_v)   for v != y,     f_v = d z_v / d raw_v

with row scalars P, K, S, and a scalar of its own for ``v = y``. Two passes over a row: the first keeps a running
maximum and sum in each lane and combines the lanes once, at its end (Milakov and Gimelshein, 2018, eq. 4); the
second reads the row again, last tile first because that tile is the likeliest still in the L2 cache, and writes.

Arithmetic has fused multiply-adds only where ``fma`` is written, so that an element has the same bits in every
place that computes it; ``nll`` relies on this where it compares ``z_y`` with ``m``.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The lowest finite float32 and not -inf, so that no difference with it is NaN. Logits masked with it still count.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# exp of it is 0 in float32, and 0 times it is 0, which is not so for -inf.
_FLOOR = tl.constexpr(-1.0e4)


class Config(NamedTuple):
    """Shape of a program: a tile has ``steps`` x ``lanes`` elements."""

    lanes: int
    steps: int
    num_warps: int
    num_stages: int = 1


# L2 bytes for each multiprocessor: A100, H100 and H200, B200.
_L2_SHARE = {8: 40 * 2**20 // 108, 9: 50 * 2**20 // 132, 10: 126 * 2**20 // 148}


def launch_config(
    vocab: int, dtype: torch.dtype, capability: tuple[int, int], rereads: bool
) -> Config:
    """Program shape for rows of ``vocab`` logits.

    A thread loads 16 bytes at a time and has ``steps`` such loads in flight. A row that is read twice must be in L2
    at the second read: fewer, wider programs keep fewer rows under way (1,024 threads on a multiprocessor is what the
    registers allow, whichever way they are divided into programs).

    Args:
        vocab: length of a row.
        dtype: dtype of the logits.
        capability: compute capability, for the size of L2.
        rereads: whether the row is read a second time.
    """
    row_bytes = vocab * dtype.itemsize
    steps = 4
    wanted = triton.next_power_of_2(triton.cdiv(row_bytes, 32 * 16 * steps))
    num_warps = min(wanted, 8)
    if rereads:
        share = _L2_SHARE.get(capability[0], _L2_SHARE[9]) * 2 // 3
        num_warps = min(wanted, 32, max(num_warps, triton.next_power_of_2(32 * row_bytes // share)))
    return Config(num_warps * 32 * 16 // dtype.itemsize, steps, num_warps)


@triton.jit
def _log1p(x):  # x >= 0
    # The logarithm of the hardware is good to 2^-22 absolute near 1, so small x takes
    # 2 artanh(x / (2 + x)); coefficients are a minimax fit on [0, 0.5], relative error 2.3e-11.
    s = x / (2.0 + x)
    y = s * s
    series = tl.fma(y, 0.12048611, 0.14253614)
    series = tl.fma(y, series, 0.20000429)
    series = tl.fma(y, series, 0.33333332)
    return tl.where(x <= 0.5, 2.0 * tl.fma(s * y, series, s), tl.log(1.0 + x))


@triton.jit
def _tanh(x):
    """Tanh and its derivative, both with a small relative error everywhere."""
    e = tl.exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    large = (1.0 - e) * r
    # Minimax fit of tanh(x) / x on [0, 0.5], relative error 1.5e-8.
    y = x * x
    series = tl.fma(y, 0.01724149, -0.05304549)
    series = tl.fma(y, series, 0.13325879)
    series = tl.fma(y, series, -0.33333144)
    small = tl.fma(x * y, series, x)
    t = tl.where(tl.abs(x) < 0.5, small, tl.where(x < 0, -large, large))
    return t, 4.0 * e * r * r


@triton.jit
def _transform(raw, slope, cap, HAS_SOFTCAP: tl.constexpr):
    """``z`` and ``dz / d raw``."""
    if HAS_SOFTCAP:
        t, dt = _tanh(raw * slope)
        return cap * t, cap * slope * dt
    else:
        return raw * slope, slope


@triton.jit
def _tile(tile, LANES: tl.constexpr, STEPS: tl.constexpr):
    """Indices of a tile, (STEPS, LANES): each step is one wide load of the whole program."""
    step = tl.arange(0, STEPS)[:, None] * LANES
    return tile * (STEPS * LANES) + step + tl.arange(0, LANES)[None, :]


@triton.jit
def _load(ptr, index, inside, EVICT: tl.constexpr):
    return tl.load(ptr + index, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)


@triton.jit
def _read_row(
    row_ptr,
    class_weight_ptr,
    V,
    y,
    slope,
    cap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_ARGMAX: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    EVICT: tl.constexpr,
):
    """First pass.

    Returns ``m``, ``s_y``, ``rest``, ``total``, ``log(total)``, then where asked for: the entropy, ``sum_v w_v`` and
    ``sum_v w_v (z_v - m)``, and the first tile that holds the maximum.
    """
    z_y, _ = _transform(tl.load(row_ptr + y).to(tl.float32), slope, cap, HAS_SOFTCAP)
    # Sums of logits are taken relative to one of them, or a common offset would drown them.
    origin = tl.where(tl.abs(z_y) < float("inf"), z_y, 0.0)
    lane_max = tl.full((LANES,), _LOWEST, tl.float32)
    lane_sum = tl.zeros((LANES,), tl.float32)
    lane_moment = tl.zeros((LANES,), tl.float32)
    lane_weight = tl.zeros((LANES,), tl.float32)
    lane_logits = tl.zeros((LANES,), tl.float32)
    lane_tile = tl.zeros((LANES,), tl.int32)
    for tile in range(tl.cdiv(V, STEPS * LANES)):
        index = _tile(tile, LANES, STEPS)
        inside = index < V
        z, _ = _transform(_load(row_ptr, index, inside, EVICT), slope, cap, HAS_SOFTCAP)
        if HAS_SMOOTHING:
            shifted = tl.where(inside, z - origin, 0.0)
            if class_weight_ptr is not None:
                w = _load(class_weight_ptr, index, inside, "evict_last")
                lane_weight += tl.sum(w, 0)
                shifted *= w
            lane_logits += tl.sum(shifted, 0)
        z = tl.where(inside, z, float("-inf"))
        tile_max = tl.max(z, 0)
        new_max = tl.maximum(lane_max, tile_max)
        if HAS_ARGMAX:
            lane_tile = tl.where(tile_max > lane_max, tile, lane_tile)
        shift = lane_max - new_max
        d = z - new_max[None, :]
        e = tl.where(index == y, 0.0, tl.exp(d))
        rescale = tl.exp(shift)
        if HAS_ENTROPY:
            moved = rescale * tl.maximum(shift, _FLOOR)
            lane_moment = tl.fma(lane_moment, rescale, lane_sum * moved)
            lane_moment += tl.sum(e * tl.maximum(d, _FLOOR), 0)
        lane_sum = tl.fma(lane_sum, rescale, tl.sum(e, 0))
        lane_max = new_max

    row_max = tl.max(lane_max, 0)
    m = tl.maximum(row_max, z_y)
    shift = lane_max - m
    rescale = tl.exp(shift)
    rest = tl.sum(lane_sum * rescale, 0)
    s_y = z_y - m
    e_y = tl.exp(s_y)
    total = rest + e_y
    log_total = tl.where(s_y == 0.0, _log1p(rest), tl.log(total))
    entropy = 0.0
    if HAS_ENTROPY:
        moved = rescale * tl.maximum(shift, _FLOOR)
        moment = tl.sum(tl.fma(lane_moment, rescale, lane_sum * moved), 0)
        entropy = log_total - (moment + e_y * tl.maximum(s_y, _FLOOR)) / total
    weight_sum = V * 1.0
    logit_sum = 0.0
    if HAS_SMOOTHING:
        if class_weight_ptr is not None:
            weight_sum = tl.sum(lane_weight, 0)
        logit_sum = tl.sum(lane_logits, 0) - weight_sum * (m - origin)
    best_tile = 0
    if HAS_ARGMAX:
        best_tile = tl.min(tl.where(lane_max == row_max, lane_tile, V), 0)
    return m, s_y, rest, total, log_total, entropy, weight_sum, logit_sum, best_tile


@triton.jit
def _first_maximum(
    row_ptr,
    V,
    first_tile,
    last_tile,
    slope,
    cap,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Lowest index of the maximum among these tiles, or of the first NaN, as torch.argmax has it."""
    best = tl.full([], float("-inf"), tl.float32)
    at = tl.full([], 0, tl.int32) + V
    nan_at = tl.full([], 0, tl.int32) + V
    for tile in range(first_tile, last_tile + 1):
        index = _tile(tile, LANES, STEPS)
        inside = index < V
        z, _ = _transform(_load(row_ptr, index, inside, EVICT), slope, cap, HAS_SOFTCAP)
        is_nan = z != z
        nan_at = tl.minimum(nan_at, tl.min(tl.where(inside & is_nan, index, V)))
        z = tl.where(inside & (z == z), z, float("-inf"))
        tile_best = tl.max(z)
        better = (tile_best > best) | (at == V)
        at = tl.where(better, tl.min(tl.where(inside & (z == tile_best), index, V)), at)
        best = tl.maximum(best, tile_best)
    return tl.where(nan_at < V, nan_at, at)


@triton.jit
def _write_gradient(
    grad_ptr,
    row_ptr,
    class_weight_ptr,
    V,
    y,
    slope,
    cap,
    m,
    total,
    log_total,
    entropy,
    p_factor,
    entropy_factor,
    smoothing,
    at_target,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Second pass: ``f_v (p_v (P - K (log p_v + H)) - S w_v)``, and ``f_y at_target`` for the target."""
    inv_total = 1.0 / total
    tiles = tl.cdiv(V, STEPS * LANES)
    for done in range(tiles):
        index = _tile(tiles - 1 - done, LANES, STEPS)
        inside = index < V
        raw = _load(row_ptr, index, inside, "evict_first")
        z, dz = _transform(raw, slope, cap, HAS_SOFTCAP)
        d = z - m
        g = tl.exp(d) * inv_total
        if HAS_ENTROPY:
            log_p = tl.maximum(d, _FLOOR) - log_total
            g *= p_factor - entropy_factor * (log_p + entropy)
        else:
            g *= p_factor
        if HAS_SMOOTHING:
            if class_weight_ptr is not None:
                g -= smoothing * _load(class_weight_ptr, index, inside, "evict_last")
            else:
                g -= smoothing
        g = dz * tl.where(index == y, at_target, g)
        tl.store(grad_ptr + index, g.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _fill_row(ptr, V, value, LANES: tl.constexpr, STEPS: tl.constexpr):
    for tile in range(tl.cdiv(V, STEPS * LANES)):
        index = _tile(tile, LANES, STEPS)
        filler = tl.zeros((STEPS, LANES), tl.float32) + value
        tl.store(ptr + index, filler.to(ptr.dtype.element_ty), mask=index < V)


@triton.jit(do_not_specialize=["ignore_index"])
def _loss_kernel(
    logits_ptr,
    logits_row_stride,
    target_ptr,
    coef_ptr,
    class_weight_ptr,
    loss_ptr,
    grad_ptr,
    grad_row_stride,
    V,
    ignore_index,
    slope,
    cap,
    label_smoothing,
    lse_square_scale,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    y = tl.load(target_ptr + row)
    if (y == ignore_index) | (y < 0) | (y >= V):
        value = tl.where(y == ignore_index, 0.0, float("nan"))
        tl.store(loss_ptr + row, value)
        if grad_ptr is not None:
            _fill_row(grad_ptr + row * grad_row_stride, V, value, LANES, STEPS)
        return
    y = y.to(tl.int32)
    m, s_y, rest, total, log_total, _, weight_sum, logit_sum, _ = _read_row(
        row_ptr, class_weight_ptr, V, y, slope, cap, HAS_SOFTCAP, False, HAS_SMOOTHING, False,
        LANES, STEPS, "evict_first" if grad_ptr is None else "evict_last",
    )  # fmt: skip
    w_y = 1.0
    if class_weight_ptr is not None:
        w_y = tl.load(class_weight_ptr + y)
    lse = m + log_total
    loss = (1.0 - label_smoothing) * w_y * (log_total - s_y) + lse_square_scale * lse * lse
    if HAS_SMOOTHING:
        loss += label_smoothing / V * (weight_sum * log_total - logit_sum)
    tl.store(loss_ptr + row, loss)
    if grad_ptr is not None:
        c = 1.0
        if coef_ptr is not None:
            c = tl.load(coef_ptr + row)
        s = c * label_smoothing / V
        main = c * (1.0 - label_smoothing) * w_y
        extra = s * weight_sum + c * 2.0 * lse_square_scale * lse
        at_target = tl.exp(s_y) / total * extra - main * (rest / total) - s * w_y
        _write_gradient(
            grad_ptr + row * grad_row_stride, row_ptr, class_weight_ptr, V, y, slope, cap, m, total,
            log_total, 0.0, main + extra, 0.0, s, at_target, HAS_SOFTCAP, False, HAS_SMOOTHING,
            LANES, STEPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def _logp_kernel(
    logits_ptr,
    logits_row_stride,
    target_ptr,
    inv_temperature_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    predicted_ptr,
    grad_ptr,
    grad_row_stride,
    V,
    ignore_index,
    slope,
    cap,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    y = tl.load(target_ptr + row)
    if (y == ignore_index) | (y < 0) | (y >= V):
        value = tl.where(y == ignore_index, 0.0, float("nan"))
        tl.store(logp_ptr + row, value)
        tl.store(entropy_ptr + row, value)
        tl.store(lse_ptr + row, value)
        tl.store(predicted_ptr + row, -1)
        if grad_ptr is not None:
            _fill_row(grad_ptr + row * grad_row_stride, V, value, LANES, STEPS)
        return
    y = y.to(tl.int32)
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)
        if HAS_SOFTCAP:
            cap *= inv_temperature
        else:
            slope *= inv_temperature
    m, s_y, rest, total, log_total, entropy, _, _, best_tile = _read_row(
        row_ptr, None, V, y, slope, cap, HAS_SOFTCAP, True, False, True, LANES, STEPS,
        "evict_first" if grad_ptr is None else "evict_last",
    )  # fmt: skip
    tl.store(logp_ptr + row, s_y - log_total)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, m + log_total)
    # A row with NaN or infinity, or without a number above the lowest, is searched from end to end.
    whole = (total != total) | (m <= _LOWEST)
    last_tile = tl.where(whole, tl.cdiv(V, STEPS * LANES) - 1, best_tile)
    predicted = _first_maximum(
        row_ptr, V, tl.where(whole, 0, best_tile), last_tile, slope, cap, HAS_SOFTCAP, LANES, STEPS,
        "evict_first" if grad_ptr is None else "evict_last",
    )  # fmt: skip
    tl.store(predicted_ptr + row, predicted.to(tl.int64))
    if grad_ptr is not None:
        _write_gradient(
            grad_ptr + row * grad_row_stride, row_ptr, None, V, y, slope, cap, m, total, log_total,
            0.0, -1.0, 0.0, 0.0, rest / total, HAS_SOFTCAP, False, False, LANES, STEPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def _logp_backward_kernel(
    logits_ptr,
    logits_row_stride,
    target_ptr,
    inv_temperature_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    grad_lse_ptr,
    grad_ptr,
    grad_row_stride,
    V,
    ignore_index,
    slope,
    cap,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    grad_ptr += row * grad_row_stride
    y = tl.load(target_ptr + row)
    if (y == ignore_index) | (y < 0) | (y >= V):
        _fill_row(grad_ptr, V, tl.where(y == ignore_index, 0.0, float("nan")), LANES, STEPS)
        return
    y = y.to(tl.int32)
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)
        if HAS_SOFTCAP:
            cap *= inv_temperature
        else:
            slope *= inv_temperature
    HAS_ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    m, s_y, rest, total, log_total, entropy, _, _, _ = _read_row(
        row_ptr, None, V, y, slope, cap, HAS_SOFTCAP, HAS_ENTROPY, False, False, LANES, STEPS,
        "evict_last",
    )  # fmt: skip
    g_logp = 0.0
    g_entropy = 0.0
    g_lse = 0.0
    if grad_logp_ptr is not None:
        g_logp = tl.load(grad_logp_ptr + row)
    if grad_entropy_ptr is not None:
        g_entropy = tl.load(grad_entropy_ptr + row)
    if grad_lse_ptr is not None:
        g_lse = tl.load(grad_lse_ptr + row)
    log_p_y = tl.maximum(s_y, _FLOOR) - log_total
    at_target = tl.exp(s_y) / total * (g_lse - g_entropy * (log_p_y + entropy))
    at_target += g_logp * (rest / total)
    _write_gradient(
        grad_ptr, row_ptr, None, V, y, slope, cap, m, total, log_total, entropy, g_lse - g_logp,
        g_entropy, 0.0, at_target, HAS_SOFTCAP, HAS_ENTROPY, False, LANES, STEPS,
    )  # fmt: skip


@functools.lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _options(logits: Tensor, rereads: bool, logit_scale: float, softcap: float) -> dict[str, Any]:
    """Arguments that every kernel takes by name."""
    config = launch_config(logits.shape[1], logits.dtype, _capability(logits.device), rereads)
    return {
        "V": logits.shape[1],
        "slope": logit_scale / softcap if softcap > 0.0 else logit_scale,
        "cap": softcap,
        "HAS_SOFTCAP": softcap > 0.0,
        "LANES": config.lanes,
        "STEPS": config.steps,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": False,
    }


def token_loss_rows(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64
    coef: Tensor | None,  # (N,) float32
    class_weight: Tensor | None,  # (V,) float32
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    label_smoothing: float,
    lse_square_scale: float,
    loss: Tensor,  # (N,) float32
    grad: Tensor | None,  # (N, V)
) -> None:
    """Loss of each row, and the gradient of ``sum(coef * loss)`` with respect to the logits.

    ``loss = (1 - eps) w_y nll + eps / V sum_v w_v (lse - z_v) + lse_square_scale lse^2`` where ``eps`` is
    ``label_smoothing`` (Szegedy et al., 2016, section 7) and the square is the z-loss of PaLM (2022, section 5).

    Args:
        logits: rows; float32, float16 or bfloat16; unit stride along V, any row stride.
        target: class of each row.
        coef: weight of each row's gradient; None is 1. It does not enter ``loss``.
        class_weight: ``w``; None is 1.
        ignore_index: rows with this target get loss 0 and gradient 0, whatever ``coef`` is.
        logit_scale: factor on the logits, before the cap.
        softcap: bound of the logits; 0 is none.
        label_smoothing: ``eps``.
        lse_square_scale: factor of ``lse^2``.
        loss: written. A target outside [0, V) gives NaN.
        grad: written where given, rounded once to its dtype; may be ``logits`` itself, or have another row stride.

    Cost: one read of the logits, and one write for the gradient.
    """
    rows, vocab = logits.shape
    if rows == 0 or vocab == 0:
        return
    with _on(logits.device):
        _loss_kernel[(rows,)](
            logits,
            logits.stride(0),
            target,
            coef,
            class_weight,
            loss,
            grad,
            0 if grad is None else grad.stride(0),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            lse_square_scale=lse_square_scale,
            HAS_SMOOTHING=label_smoothing > 0.0,
            **_options(logits, grad is not None, logit_scale, softcap),
        )


def token_logp_rows(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64
    inv_temperature: Tensor | None,  # (N,) float32
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    logp: Tensor,  # (N,) float32
    entropy: Tensor,  # (N,) float32
    lse: Tensor,  # (N,) float32
    predicted: Tensor,  # (N,) int64
    grad: Tensor | None,  # (N, V)
) -> None:
    """Log-probability of the target, entropy (nats), log-sum-exp and index of the largest logit of each row.

    Args:
        logits: rows; float32, float16 or bfloat16; unit stride along V, any row stride.
        target: class of each row.
        inv_temperature: factor of each row on the capped logits; None is 1.
        ignore_index: rows with this target get 0, 0, 0 and -1, and gradient 0. Pass one that does not occur for none.
        logit_scale: factor on the logits, before the cap.
        softcap: bound of the logits; 0 is none.
        logp: written. A target outside [0, V) gives NaN here and in the next two.
        entropy: written.
        lse: written.
        predicted: written: the lowest index among the maxima, or the first NaN; -1 for a target outside [0, V).
        grad: written where given: the gradient of ``sum(logp)`` with respect to the logits; may be ``logits`` itself.

    Cost: one read of the logits, and one write for the gradient.
    """
    rows, vocab = logits.shape
    if rows == 0 or vocab == 0:
        return
    with _on(logits.device):
        _logp_kernel[(rows,)](
            logits,
            logits.stride(0),
            target,
            inv_temperature,
            logp,
            entropy,
            lse,
            predicted,
            grad,
            0 if grad is None else grad.stride(0),
            ignore_index=ignore_index,
            **_options(logits, grad is not None, logit_scale, softcap),
        )


def token_logp_rows_backward(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64
    inv_temperature: Tensor | None,  # (N,) float32
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    grad_logp: Tensor | None,  # (N,) float32
    grad_entropy: Tensor | None,  # (N,) float32
    grad_lse: Tensor | None,  # (N,) float32
    grad: Tensor,  # (N, V)
) -> None:
    """Gradient with respect to the logits, given those of logp, entropy and lse.

    ``dz_v = g_logp (delta_vy - p_v) + g_lse p_v - g_entropy p_v (log p_v + H)``.

    Args:
        logits: rows; float32, float16 or bfloat16; unit stride along V, any row stride.
        target: class of each row.
        inv_temperature: factor of each row on the capped logits; None is 1.
        ignore_index: rows with this target get gradient 0.
        logit_scale: factor on the logits, before the cap.
        softcap: bound of the logits; 0 is none.
        grad_logp: upstream gradient; None is 0.
        grad_entropy: upstream gradient; None is 0.
        grad_lse: upstream gradient; None is 0.
        grad: written; may be ``logits`` itself, or have another row stride.

    Cost: one read of the logits and one write.
    """
    rows, vocab = logits.shape
    if rows == 0 or vocab == 0:
        return
    with _on(logits.device):
        _logp_backward_kernel[(rows,)](
            logits,
            logits.stride(0),
            target,
            inv_temperature,
            grad_logp,
            grad_entropy,
            grad_lse,
            grad,
            grad.stride(0),
            ignore_index=ignore_index,
            **_options(logits, True, logit_scale, softcap),
        )


def accumulate(accumulator: Tensor | None, part: Tensor, out: Tensor) -> None:
    """``out = accumulator + part``, added in float32 and rounded once to ``out``'s dtype.

    Args:
        accumulator: sum so far; None is 0. It may be ``out`` itself.
        part: the summand, ``out``'s shape.
        out: written.
    """
    if accumulator is None:
        out.copy_(part)
    else:
        torch.add(accumulator, part, out=out)
