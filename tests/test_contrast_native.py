"""The compiled CPU kernels of contrast: arithmetic to the bit, and rows made to break them."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import contrast_oracle as oracle
import trimtab
from contrast_cases import NUCLEUS, assert_sampled, check_sample, oracle_sample, rows
from trimtab import _native
from trimtab.testing import assert_same_bits

ROOT = Path(__file__).resolve().parent.parent
INF = math.inf
BLOCK = 256  # csrc/cpu/contrast_combine.inl
LARGEST, SMALLEST = torch.finfo(torch.float32).max, 1e-45
COMPILER = shutil.which(os.environ.get("CXX") or "g++")

pytestmark = pytest.mark.skipif(
    _native.REASONS["cpu"] is not None, reason=str(_native.REASONS["cpu"])
)


class case:
    """What the shared checks take for the implementation under test."""

    impl, device = "native", "cpu"


# Reads pairs of words; writes the variates of one number at a time, then of whole vectors, then the
# results of `largest_high_word`, `order_key` and `equals_in_tail` for the numbers that follow.
PROGRAM = r"""
#include <cstdio>
#include <vector>
#include "common/contrast.h"
#include "cpu/simd.h"
using namespace trimtab;
using M = TRIMTAB_ISA::Lanes<float>;
template <class T> std::vector<T> read(size_t count) {
  std::vector<T> x(count);
  if (fread(x.data(), sizeof(T), count, stdin) != count) throw 1;
  return x;
}
template <class T> void write(const std::vector<T>& x) {
  fwrite(x.data(), sizeof(T), x.size(), stdout);
}
int main() {
  const auto count = read<int64_t>(3);
  const auto high = read<uint32_t>(count[0]), low = read<uint32_t>(count[0]);
  std::vector<float> one, many(count[0]);
  for (int64_t i = 0; i < count[0]; ++i) one.push_back(gumbel<Scalar>(high[i], low[i]));
  for (int64_t i = 0; i < count[0]; i += M::width) {
    M::Uint h, l;
    memcpy(&h, &high[i], sizeof(h));
    memcpy(&l, &low[i], sizeof(l));
    M::store(&many[i], gumbel<M>(h, l));
  }
  write(one);
  write(many);
  std::vector<uint32_t> words;
  for (int64_t i = 0; i < count[1]; ++i) {
    const auto in = read<uint32_t>(6);
    const auto out = philox4x32_10<Scalar>({in[0], in[1], in[2], in[3]}, in[4], in[5]);
    for (auto word : {out.r0, out.r1, out.r2, out.r3}) words.push_back(uint32_t(word));
    M::Word zero{};
    const auto lanes = philox4x32_10<M>(
        {zero + in[0], zero + in[1], zero + in[2], zero + in[3]}, in[4], in[5]);
    for (auto word : {lanes.r0, lanes.r1, lanes.r2, lanes.r3})
      words.push_back(uint32_t(word[M::width / 2 - 1]));
  }
  write(words);
  std::vector<int64_t> limits;
  for (double bar : read<double>(count[2])) limits.push_back(largest_high_word(bar));
  write(limits);
}
"""
FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
               "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
}  # fmt: skip


def supports(isa: str) -> bool:
    if isa == "generic":
        return True
    levels = {"avx2": ("AVX2", "AVX512"), "avx512": ("AVX512",)}
    found = torch.backends.cpu.get_cpu_capability()
    return platform.machine() == "x86_64" and found in levels[isa]


def compiled_answers(isa: str, folder: Path, words: np.ndarray, blocks: list, bars: np.ndarray):
    """What the headers compute, built for one instruction set with the flags of the package."""
    source, program = folder / "check.cpp", folder / "check"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", *FLAGS[isa]]
    subprocess.run(
        [COMPILER, *flags, f"-I{ROOT / 'csrc'}", source, "-o", program], check=True, timeout=120
    )
    high, low = words.astype(np.uint32)
    given = np.array([len(high), len(blocks), len(bars)]).tobytes()
    given += high.tobytes() + low.tobytes() + np.array(blocks, np.uint32).tobytes()
    result = subprocess.run([program], input=given + bars.tobytes(), capture_output=True)
    assert result.returncode == 0
    sizes = [4 * len(high), 4 * len(high), 32 * len(blocks), 8 * len(bars)]
    parts = [
        result.stdout[end - size : end] for size, end in zip(sizes, np.cumsum(sizes), strict=True)
    ]
    kinds = (np.float32, np.float32, np.uint32, np.int64)
    return [np.frombuffer(part, kind) for part, kind in zip(parts, kinds, strict=True)]


CORNERS = [0, 1, 0xFFFF, 0x4AFB0CCC, 0x4AFB0CCD, 0x4AFB0CCE, 0x7FFFFFFF, 0x80000000, 0xFFFFFF7F,
           0xFFFFFF80, 0xFFFFFFFE, 0xFFFFFFFF]  # fmt: skip


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("isa", FLAGS)
def test_the_stream_to_the_bit(isa, tmp_path, monkeypatch):
    """Scalars and vectors against integers that do not wrap and numpy's float32."""
    if not supports(isa):
        pytest.skip(f"this processor has no {isa}")
    corners = np.stack(np.meshgrid(CORNERS, CORNERS)).reshape(2, -1)
    words = np.concatenate([corners, np.stack(oracle.bits_of(3, 4, 40_000))], 1)
    words = words[:, : words.shape[1] // 16 * 16]
    blocks = [(0,) * 6, (0xFFFFFFFF,) * 6,
              (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)]  # fmt: skip
    bars = np.linspace(-5, 47, 5000)
    one, many, drawn, limits = compiled_answers(isa, tmp_path, words, blocks, bars)
    monkeypatch.setattr(oracle, "bits_of", lambda *args: words.astype(np.uint64))
    noise = oracle.gumbel(0, 0, words.shape[1])
    assert one.tobytes() == noise.tobytes()
    assert many.tobytes() == noise.tobytes()
    expected = [oracle.philox4x32_10(block[:4], block[4:]) for block in blocks]
    assert drawn.tolist() == [word for block in expected for word in block * 2]
    for bar, limit in zip(bars, limits, strict=True):
        reach = words[0][noise >= bar]
        assert (reach <= limit).all(), "a token that could win would not be looked at"
        assert limit <= 2**32 * -math.expm1(-math.exp(2e-3 - bar)) + 2, "far too many would be"


CHECKS = """
import torch, contrast_cases as cases

class case: impl, device = "native", "cpu"

options = [
    {}, {"temperature": 0.0}, {"top_k": 7}, {"top_p": 0.83}, {"min_p": 0.07}, {"plausibility": 0.1},
    {"temperature": 0.7, "top_k": 300, "top_p": 0.9, "min_p": 0.01, "plausibility": 1e-4},
]
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for classes in (1, 3, 63, 507, 5000):
        given = cases.rows(5, classes, dtype)
        p, n, a = given.logits(dtype)
        cases.check_logp(case, given, dtype, alpha=1.5, temperature=0.7, anchored=classes % 2 == 0)
        for i, chosen in enumerate(options):
            anchor = {"anchor": a} if i % 2 else {}
            cases.check_sample(
                case, p, n, alpha=0.5, seed=torch.arange(5), position=i, **anchor, **chosen)
"""


@pytest.mark.parametrize("isa", FLAGS)
def test_every_instruction_set(isa):
    """The processor's own is what the other tests run; here the narrower ones run too."""
    result = subprocess.run(
        [sys.executable, "-c", CHECKS],
        env={**os.environ, "TRIMTAB_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parent),
             "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]


def shapes_of_rows(v: int) -> dict[str, torch.Tensor]:
    """Rows on which a filter or the draw could go wrong; float32."""
    generator = torch.Generator().manual_seed(v)
    normal = torch.randn(v, generator=generator)
    steps = torch.arange(v, dtype=torch.float32)
    spike, masked = torch.zeros(v), torch.full((v,), -INF)
    spike[v // 2] = 30.0
    masked[v // 3] = 1.0
    masked[-1] = 0.5
    return {
        "constant": torch.full((v,), 2.5),
        "ascending": steps * (20.0 / v),
        "descending": -steps * (20.0 / v),
        "steep": -steps,
        "two levels": (steps % 3 == 0).float(),
        "quarters": (normal * 2).round() / 4,
        "spike": spike,
        "all but two masked": masked,
        "zeros of both signs": torch.where(steps % 2 == 0, -0.0, 0.0),
        "zero before minus zero": torch.where(steps % 2 == 0, 0.0, -0.0),
        "subnormal": steps * SMALLEST,
        "huge": normal.sign() * LARGEST * 0.4,
        "flat": normal * 1e-3,
        "wide": normal * 30,
    }


HOSTILE = list(shapes_of_rows(4))
SIZES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5000]
# The numbers of blocks of 5000 tokens are 20: both sides of where the bound of the maxima ends.
FILTERS = [
    {}, {"top_k": 1}, {"top_k": 19}, {"top_k": 20}, {"top_k": 21}, {"top_k": 2000},
    {"top_k": 10**9},
    {"top_p": 0.0}, {"top_p": 0.37}, {"top_p": 0.999}, {"min_p": 1.0}, {"min_p": 0.03},
    {"plausibility": 1.0}, {"plausibility": 0.01, "top_k": 20},
    {"top_k": 40, "top_p": 0.61, "min_p": 0.02, "temperature": 0.3},
    {"temperature": 3.0, "top_k": 900, "top_p": 0.77},
]  # fmt: skip


def compare(positive: torch.Tensor, negative: torch.Tensor | None = None, **options) -> int:
    """Against the oracle, all rows but those whose nucleus ends on a rounding error."""
    got = trimtab.contrastive_sample(positive, positive.clone() if negative is None else negative,
                                     **options, impl="native")  # fmt: skip
    truth = oracle_sample(positive, positive if negative is None else negative, **options)
    clear = [i for i, row in enumerate(truth) if row.margin > NUCLEUS]
    assert_sampled([t[clear] for t in got], [truth[i] for i in clear])
    return len(clear)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_hostile_rows(options, poison):
    compared = 0
    for v in SIZES:
        hostile = torch.stack(list(shapes_of_rows(v).values()))
        seeds = torch.arange(len(hostile)) + v
        # A contrast would add 0.0 to -0.0.
        compared += compare(hostile, alpha=0.0, seed=seeds, position=v, **options)
    assert compared > 0.6 * len(SIZES) * len(HOSTILE)


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_draw_looks_at_every_token_that_could_win(kind):
    """Many draws of rows on which most tokens are ruled out by their random bits alone."""
    row = shapes_of_rows(1500)[kind]
    positions = torch.arange(200)
    compare(row.expand(200, -1), alpha=0.0, seed=5, position=positions)
    compare(row.expand(200, -1), alpha=0.0, seed=6, position=positions, top_k=300, temperature=2.0)


def test_of_equal_keys_the_lowest_index_wins():
    """Two tokens whose shifted logit plus noise is one number, found by moving one logit."""
    found = 0
    for seed in range(400):
        g = oracle.gumbel(seed, 0, 40)
        first, second = sorted(np.argsort(g)[-2:])
        row = np.full(40, -20.0, np.float32)
        row[0 if first else 1] = -2.0
        row[first] = -2.25
        row[second] = np.float32(-2.25) + (g[first] - g[second])
        shifted = row - row.max()
        keys = shifted + g
        if keys[first] != keys[second] or keys.max() != keys[first] or shifted[first] == 0:
            continue
        found += 1
        p = torch.tensor(row)[None]
        for options in ({}, {"top_k": 10}):
            got = trimtab.contrastive_sample(p, p, alpha=0.0, seed=seed, **options, impl="native")
            assert got.token.item() == first
    assert found > 20


@pytest.mark.parametrize("levels", [1, 2, 5, 40])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ties_everywhere(levels, temperature):
    """Rows of few distinct values: thresholds fall on ties nearly always."""
    generator = torch.Generator().manual_seed(levels)
    tied = torch.randint(levels, (60, 700), generator=generator) / 8.0
    top_p = torch.rand(60, generator=generator)
    top_k = torch.randint(0, 720, (60,), generator=generator)
    for filters in ({"top_k": top_k}, {"top_p": top_p}, {"top_k": top_k, "top_p": top_p}):
        count = compare(tied, alpha=0.0, temperature=temperature, seed=torch.arange(60), **filters)
        assert count > 40


@pytest.mark.parametrize("v", [128_256, 256_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_whole_vocabularies(v, dtype):
    p, n = rows(2, v, dtype).logits(dtype, 2)
    for filters in ({"top_k": 50, "top_p": 0.9}, {"top_p": 0.95}, {"plausibility": 0.1}, {}):
        check_sample(case, p, n, alpha=0.5, seed=torch.tensor([1, -1]), **filters)


def sample_rows_operator(positive, negative=None, maps=(None, None, None), count=3, **outputs):
    """``contrastive_sample_rows`` itself; what it leaves unwritten is 77."""
    token, logp, kept = (torch.full((count,), 77, dtype=d) for d in (torch.int64, torch.float32,
                                                                    torch.int64))  # fmt: skip
    given = {"token": token, "logp": logp, "kept": kept, **outputs}
    torch.ops.trimtab.contrastive_sample_rows(
        positive, negative, None, *maps, 0.5, None, -INF, None, 1.0, None, 0, None, -1.0, None,
        -INF, None, 3, None, 4, None, *given.values(),
    )  # fmt: skip
    return token, logp, kept


@pytest.mark.parametrize("bad", [-1, 4, 2**62, -(2**62)])
@pytest.mark.parametrize("which", [0, 1])
def test_a_row_map_out_of_range_is_a_bad_row(bad, which):
    p, n = rows(4, 40).logits(torch.float32, 2)
    maps = [torch.tensor([3, 0, 2]), torch.tensor([1, 1, 0]), None]
    clean = sample_rows_operator(p, n, maps)
    maps[which] = maps[which].clone()
    maps[which][1] = bad
    token, logp, kept = sample_rows_operator(p, n, maps)
    assert (token[1], kept[1]) == (-1, 0)
    assert logp[1].isnan()
    for ours, expected in zip((token, logp, kept), clean, strict=True):
        assert torch.equal(ours[::2], expected[::2])
    assert 77 not in [*token.tolist(), *kept.tolist()]


def test_nan_in_an_anchor_that_serves_the_mask_alone():
    """Without a negative row z is the positive row, which does not show the NaN."""
    p, a = rows(3, 600).logits(torch.float32, 2)
    a[1, 555] = math.nan
    for log_beta in (-INF, math.log(0.1)):
        token, logp = torch.full((3,), 77), torch.full((3,), 77.0)
        torch.ops.trimtab.contrastive_sample_rows(
            p, None, a, None, None, None, 0.0, None, log_beta, None, 1.0, None, 0, None, -1.0, None,
            -INF, None, 3, None, 4, None, token, logp, torch.zeros_like(token),
        )  # fmt: skip
        assert (token == -1).tolist() == [False, True, False]
        assert logp.isnan().tolist() == [False, True, False]


def test_nothing_to_do():
    for shape in ((0, 40), (0, 0)):
        assert len(sample_rows_operator(torch.zeros(shape), torch.zeros(shape), count=0)[0]) == 0
    token, logp, kept = sample_rows_operator(torch.zeros(3, 0), torch.zeros(3, 0))
    assert (token.tolist(), kept.tolist()) == ([-1] * 3, [0] * 3)
    assert logp.isnan().all()
    no_rows = torch.zeros(0, 40)
    maps = (torch.zeros(3, dtype=torch.int64), None, None)
    assert sample_rows_operator(no_rows, torch.zeros(3, 40), maps)[0].tolist() == [-1] * 3


def test_rows_that_share_memory():
    """Stride 0, rows apart, and a view whose rows overlap."""
    p, n = rows(4, 300).logits(torch.float32, 2)
    shared = sample_rows_operator(p[:1].expand(3, -1), n[1:2].expand(3, -1))
    copied = sample_rows_operator(p[[0, 0, 0]].contiguous(), n[[1, 1, 1]].contiguous())
    apart = sample_rows_operator(p.repeat(1, 2)[::2, :300], n[::2].clone(), count=2)
    closed = sample_rows_operator(p[::2].clone(), n[::2].clone(), count=2)
    windows = p.view(-1).as_strided((3, 300), (1, 1))
    seen = sample_rows_operator(windows, n[:3])
    own = sample_rows_operator(windows.clone(memory_format=torch.contiguous_format), n[:3])
    for ours, expected in ((shared, copied), (apart, closed), (seen, own)):
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b)


def test_what_the_operators_refuse():
    p, n = rows(3, 10).logits(torch.float32, 2)
    target, logp = torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    for wrong in ({"logp": torch.zeros(3).double()}, {"kept": torch.zeros(3)},
                  {"kept": torch.zeros(4, dtype=torch.int64)}, {"token": logp}):  # fmt: skip
        with pytest.raises(RuntimeError, match=next(iter(wrong))):
            sample_rows_operator(p, n, **wrong)
    for negative in (n.double(), n[:2], n[:, :9], n.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="negative"):
            sample_rows_operator(p, negative)
    with pytest.raises(RuntimeError, match="positive"):
        sample_rows_operator(p.long(), n)
    with pytest.raises(RuntimeError, match="negative_rows"):
        sample_rows_operator(p, n, (None, torch.zeros(3), None))
    logits = torch.ops.trimtab.contrastive_logits_rows
    for out in (torch.zeros(1, 10).expand(3, 10), p.double(), torch.zeros(3, 9)):
        with pytest.raises(RuntimeError, match="out"):
            logits(p, n, None, 0.5, None, -INF, None, out)
    backward = torch.ops.trimtab.contrastive_logp_rows_backward
    for grads in ((p.double(), None, None), (None, torch.zeros(1, 10).expand(3, 10), None),
                  (None, None, p)):  # fmt: skip
        with pytest.raises(RuntimeError, match="grad_"):
            backward(p, n, None, target, 0.5, None, 1.0, None, -1, logp, *grads)


def test_outputs_apart_in_memory():
    """Rows of an output with gaps between them; the gaps stay as they are."""
    p, n = rows(5, 70).logits(torch.float32, 2)
    target, upstream = torch.arange(5) * 17, torch.linspace(-1, 1, 5)
    wide = [torch.full((5, 90), 7.0) for _ in range(3)]
    torch.ops.trimtab.contrastive_logits_rows(
        p, n, None, 0.5, None, math.log(0.1), None, wide[0][:, :70]
    )
    arguments = (p, n, None, target, 0.5, None, 0.8, None, -1, upstream)
    torch.ops.trimtab.contrastive_logp_rows_backward(
        *arguments, wide[1][:, :70], wide[2][:, :70], None
    )
    narrow = [torch.full((5, 70), 7.0) for _ in range(3)]
    torch.ops.trimtab.contrastive_logits_rows(p, n, None, 0.5, None, math.log(0.1), None, narrow[0])
    torch.ops.trimtab.contrastive_logp_rows_backward(*arguments, narrow[1], None, None)
    torch.ops.trimtab.contrastive_logp_rows_backward(*arguments, None, narrow[2], None)
    for ours, expected in zip(wide, narrow, strict=True):
        assert torch.equal(ours[:, :70], expected)
        assert (ours[:, 70:] == 7.0).all()
        assert not (expected == 7.0).any()


def test_logp_of_hostile_rows():
    """Against float64, with every row's own target at the largest, the smallest and the last."""
    for v in SIZES:
        hostile = torch.stack(
            [row for kind, row in shapes_of_rows(v).items() if kind not in ("huge", "wide")]
        )
        for target in (hostile.argmax(1), hostile.argmin(1), torch.full((len(hostile),), v - 1)):
            got = trimtab.contrastive_logp(
                hostile, hostile.roll(1, 1), target, alpha=0.0, temperature=0.5, impl="native"
            )
            truth = torch.log_softmax(hostile.double() / 0.5, 1).gather(1, target[:, None])[:, 0]
            torch.testing.assert_close(got.double(), truth, rtol=3e-6, atol=3e-7)
            assert got.max() <= 0


def test_confident_rows_keep_their_digits():
    """The logp of a target far above the rest is near 0; 1 - p would round to 0 or be far off."""
    gap = torch.tensor([20.0, 40.0, 80.0])
    p = torch.zeros(3, 1000)
    p[:, 321] = gap
    rest = 999 * torch.exp(-gap.double())
    p.requires_grad_()
    logp = trimtab.contrastive_logp(
        p, torch.zeros(3, 1000), torch.full((3,), 321), alpha=0.0, impl="native"
    )
    torch.testing.assert_close(logp.detach().double(), -rest.log1p(), rtol=1e-6, atol=0)
    logp.sum().backward()
    torch.testing.assert_close(p.grad[:, 321].double(), rest / (1 + rest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
def test_gradient_of_a_masked_target(anchored):
    """A token at -inf in the anchor has no gradient, not even as the target."""
    p, n, a = rows(3, 300).logits(torch.float32)
    (a if anchored else p)[:, 7] = -INF
    leaves = [t.requires_grad_() for t in (p, n, a)[: 3 if anchored else 2]]

    def grads(impl):
        logp = trimtab.contrastive_logp(
            *leaves[:2], torch.tensor([7, 8, 7]), alpha=0.5, impl=impl,
            anchor=a if anchored else None,
        )  # fmt: skip
        assert torch.equal(logp == -INF, torch.tensor([True, False, True]))
        return torch.autograd.grad(logp.sum(), leaves)

    for ours, expected in zip(grads("native"), grads("reference"), strict=True):
        assert (ours[:, 7] == 0).all()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_threads_change_nothing():
    p, n, a = rows(37, 4000).logits(torch.float32)
    target = torch.arange(37) * 100

    def run():
        sampled = trimtab.contrastive_sample(
            p, n, anchor=a, alpha=0.5, top_p=0.9, seed=torch.arange(37), impl="native"
        )
        logp = trimtab.contrastive_logp(p, n, target, alpha=0.5, anchor=a, impl="native")
        return [*sampled, logp, trimtab.contrastive_logits(p, n, alpha=0.5, impl="native")]

    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            assert_same_bits(ours, expected)
