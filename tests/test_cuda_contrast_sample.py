"""The CUDA sampler, run on the CPU: the compiled CPU kernel's tokens, to the bit.

Run as a script, this file does what the sanitised build has to survive.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from torch import Tensor

import trimtab
from contrast_cases import LOW_PRECISION, NUCLEUS, assert_sampled, oracle_sample, rows
from cuda_on_cpu import library
from cuda_token_loss_cases import laid_out
from test_contrast_hypothesis import DTYPES, examples, sampling
from test_contrast_native import FILTERS, shapes_of_rows
from trimtab import _native
from trimtab.ops.contrast import _functions
from trimtab.testing import assert_same_bits

INF = math.inf
EPS = torch.finfo(torch.float32).eps
MOST = 600_000  # classes of a row
SIZES = (1, 3, 63, 127, 252, 507, 5000, 40000)
EVERYTHING = {"plausibility": 1e-3, "temperature": 0.7, "top_k": 90, "top_p": 0.9, "min_p": 1e-3}
# Name -> blocks of a cluster for a row of 507, and whether its scores go to scratch memory.
DEVICES = {
    "one block": (1, False),
    "clusters of 2": (2, False),
    "clusters of 4": (4, False),
    "clusters of 8": (8, False),
    "clusters in scratch": (8, True),
    "Ampere": (1, False),
    "Ampere in scratch": (1, True),
}

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif(_native.REASONS["cpu"] is not None, reason=str(_native.REASONS["cpu"])),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
devices = pytest.mark.parametrize("name", DEVICES)


@functools.cache
def kernels() -> SimpleNamespace:
    return library.load("contrast_sample", sanitize=__name__ == "__main__")


def call(
    positive: Tensor,
    negative: Tensor | None,
    anchor: Tensor | None = None,
    *,
    count: int | None = None,
    maps: tuple[Tensor | None, ...] = (None, None, None),
    ops: Any = None,
    **numbers: float | Tensor,
) -> tuple[Tensor, ...]:
    """The row operator itself; what it leaves unwritten is 77.

    A tensor is a parameter of each row.
    """
    count = len(positive) if count is None else count
    outs = [torch.full((count,), 77, dtype=torch.int64) for _ in range(2)]
    outs.insert(1, torch.full((count,), 77.0))
    full = {"alpha": 0.5, "log_beta": -INF, "temperature": 1.0, "top_k": 0, "tail": -1.0,
            "log_min_p": -INF, "seed": 3, "position": 4}  # fmt: skip
    assert not numbers.keys() - full.keys()
    given = [(full[name], numbers.get(name, full[name])) for name in full]
    pairs: list[float | Tensor | None] = []
    for usual, number in given:
        pairs += [usual, number] if isinstance(number, Tensor) else [number, None]
    (ops or kernels()).contrastive_sample_rows(positive, negative, anchor, *maps, *pairs, *outs)
    return tuple(outs)


@functools.cache
def own_bytes() -> int:
    """Shared memory of a block beside its scores."""
    row = torch.zeros(1, 8)
    call(row, row)
    return kernels().last_launch()["shared_bytes"] - 8 * row.element_size()


@contextlib.contextmanager
def played(name: str) -> Iterator[None]:
    """A device that cuts a row of 507 as an H200 does one of a hundred thousand."""
    cluster, scratch = DEVICES[name]
    facts: dict[str, int] = {"multiprocessors": 3}
    if name.startswith("Ampere"):
        facts |= {"major": 8, "compiled_for": 80}
    if not name.startswith("Ampere"):
        room = own_bytes() + 4 * 512 // cluster + 100
        facts["shared_per_multiprocessor"] = 2 * (room + 1024)
    if scratch:
        facts["shared_per_block"] = own_bytes() + 100
    with library.device(**facts):
        yield


def cuda(*rows_given: Tensor, **options: Any) -> trimtab.ops.contrast.Sampled:
    """``contrastive_sample`` on the CUDA kernel."""
    with mock.patch.object(_functions, "row_kernels", return_value=kernels()):
        return trimtab.contrastive_sample(*rows_given, **options, impl="native")


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


def assert_agrees(ours: Any, theirs: Any) -> None:
    """Token and support to the bit; logp but for the order in which its sum of doubles is made."""
    assert_same_bits(ours[0], theirs[0])
    assert_same_bits(ours[2], theirs[2])
    torch.testing.assert_close(ours[1], theirs[1], rtol=EPS, atol=MOST * 2**-53, equal_nan=True)


def agree(*rows_given: Tensor, **options: Any) -> trimtab.ops.contrast.Sampled:
    """The CUDA kernel gives what the CPU's gives."""
    ours = cuda(*rows_given, **options)
    assert_agrees(ours, trimtab.contrastive_sample(*rows_given, **options, impl="native"))
    return ours


@pytest.mark.parametrize("name", DEVICES)
def test_the_devices_cut_rows_as_they_say(name):
    cluster, scratch = DEVICES[name]
    row = torch.zeros(9, 507)
    with played(name):
        call(row, row)
    launch = kernels().last_launch()
    assert launch["cluster"] == cluster
    assert (launch["shared_bytes"] == own_bytes()) == scratch
    # Blocks that have their scores in scratch memory take several rows.
    resident = {1: 6, 8: 8}[cluster] if scratch else 9 * cluster
    assert launch["blocks"] == resident


@pytest.mark.parametrize(
    ("classes", "facts", "cluster", "scratch"),
    [
        (32000, {}, 2, False),
        (128256, {}, 8, False),
        (256000, {}, 8, False),
        (MOST, {}, 8, True),
        (32000, {"major": 8, "shared_per_block": 163 << 10}, 1, False),
        (128256, {"major": 8, "shared_per_block": 163 << 10}, 1, True),
    ],
)
def test_the_cut_of_whole_vocabularies(classes, facts, cluster, scratch):
    row = rows(1, classes).logits(torch.bfloat16, 2)
    with library.device(**facts):
        agree(*row, alpha=0.5, top_p=0.9)
    launch = kernels().last_launch()
    assert launch["cluster"] == cluster
    assert (launch["shared_bytes"] == own_bytes()) == scratch


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_sizes(classes, options):
    for dtype in LOW_PRECISION:
        given = rows(3, classes, dtype)
        p, n, a = given.logits(dtype)
        for anchor in ({}, {"anchor": a}):
            all_options = {"alpha": 0.5, "seed": torch.arange(3), **anchor, **options}
            got = agree(p, n, **all_options)
            truth = oracle_sample(p, n, **all_options)
            clear = [i for i, row in enumerate(truth) if row.margin > NUCLEUS]
            assert_sampled([field[clear] for field in got], [truth[i] for i in clear])


@devices
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_hostile_rows(name, options):
    with played(name):
        for v in (1, 255, 507):
            hostile = torch.stack(list(shapes_of_rows(v).values()))
            seeds = torch.arange(len(hostile)) + v
            # A contrast would add 0.0 to -0.0.
            agree(hostile, hostile, alpha=0.0, seed=seeds, position=v, **options)


def test_hostile_rows_of_several_vectors_to_a_thread():
    hostile = torch.stack(list(shapes_of_rows(40001).values()))
    for options in ({}, {"top_k": 2000}, {"top_p": 0.37}, {"top_p": 0.999, "top_k": 30000}):
        agree(hostile, hostile, alpha=0.0, **options)


@devices
@pytest.mark.parametrize("levels", [1, 2, 5, 40])
def test_ties_everywhere(name, levels):
    """Rows of few distinct values: thresholds fall on ties nearly always."""
    generator = torch.Generator().manual_seed(levels)
    tied = torch.randint(levels, (30, 507), generator=generator) / 8.0
    top_p = torch.rand(30, generator=generator)
    top_k = torch.randint(0, 520, (30,), generator=generator)
    with played(name):
        for filters in ({"top_k": top_k}, {"top_p": top_p}, {"top_k": top_k, "top_p": top_p}):
            agree(tied, tied, alpha=0.0, temperature=0.7, seed=torch.arange(30), **filters)
        agree(tied, tied, alpha=0.0, temperature=0.0)


@devices
@pytest.mark.parametrize(("start", "step"), [(1.9, 2.0**-23), (0.0, 2.0**-149)])
def test_numbers_that_the_temperature_makes_equal(name, start, step):
    """The k-th largest has equals among what is below it before the division."""
    order = torch.randperm(507, generator=torch.Generator().manual_seed(0))
    row = (start + step * order.double()).float().expand(24, -1)
    assert (row[0] / 1.8).unique().numel() < row[0].unique().numel()
    with played(name):
        agree(row, row, alpha=0.0, temperature=1.8, top_k=torch.arange(1, 25), seed=7)


@pytest.mark.parametrize("equals", [1000, 1020, 1024, 1025, 1100])
def test_candidates_around_the_length_of_the_list(equals):
    """1,024 of them fit."""
    row = torch.zeros(2, 5000)
    row[:, :equals] = 3.0
    row[:, equals : 2 * equals] = 2.0
    agree(row, row, alpha=0.0, top_k=torch.tensor([3, 1010]), min_p=0.2)
    agree(row, row, alpha=0.0, top_p=torch.tensor([0.3, 0.8]), seed=torch.arange(2))


@pytest.mark.parametrize("name", ["one block", "clusters of 8", "clusters in scratch"])
@pytest.mark.parametrize("left", [1, 1023, 1024, 1025, 1500])
def test_masks_that_leave_about_what_the_list_holds(name, left):
    """The mask's own list, or, past its end, the row; in both the anchor decides, not z."""
    generator = torch.Generator().manual_seed(left)
    p, n = (torch.randn(2, 1700, generator=generator) for _ in range(2))
    a = torch.full((2, 1700), -9.0)
    a[:, torch.randperm(1700, generator=generator)[:left]] = 1.0
    p[:, a[0].argmin()] = 90.0
    with played(name):
        for filters in ({"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.9}, {}):
            got = agree(p, n, anchor=a, alpha=0.5, plausibility=1e-3, **filters)
            assert (a[0, got.token] == 1.0).all()
            assert filters or (got.kept == left).all()


@pytest.mark.parametrize("tail", [0.0, 1e-45, 1e-38, 1e-20, 1e-9, 1e-7, 0.999, 1.0])
def test_tails_of_every_size(tail):
    """Masses are counted in units of the tail, however small it is."""
    hostile = torch.stack([*shapes_of_rows(507).values(), torch.linspace(-100.0, 0.0, 507)])
    ours, theirs = (
        call(hostile, None, ops=ops, tail=tail) for ops in (kernels(), torch.ops.trimtab)
    )
    assert_agrees(ours, theirs)


def test_many_draws():
    """Most tokens are ruled out by their random bits alone: never one that would win."""
    for kind in ("flat", "two levels", "wide", "descending"):
        row = shapes_of_rows(507)[kind].expand(300, -1)
        for options in ({}, {"top_k": 100, "temperature": 2.0}):
            agree(row, row, alpha=0.0, seed=5, position=torch.arange(300), **options)


@devices
def test_bad_rows_leave_the_others_alone(name):
    p, n, a = rows(9, 507).logits(torch.float32)
    p[1, 500], n[2, 3], a[3, 77] = math.nan, math.nan, math.nan
    p[4], p[5, 7] = -INF, INF
    a[6] = -INF
    p[7, 9], n[7, 9] = -INF, -INF
    with played(name):
        for options in ({}, EVERYTHING, {"temperature": 0.0}):
            for anchor in ({}, {"anchor": a}):
                for alpha in (0.5, 0.0):
                    got = agree(p, n, alpha=alpha, **anchor, **options)
                    bad = (got.token == -1).tolist()
                    assert 1 < sum(bad) < 7
                    assert (got.kept == 0).tolist() == got.logp.isnan().tolist() == bad


def test_anchor_that_serves_the_mask_alone():
    p, a = rows(3, 507).logits(torch.float32, 2)
    a[1, 444] = math.nan
    for log_beta in (-INF, math.log(0.1)):
        ours, theirs = (
            call(p, None, a, ops=ops, alpha=0.0, log_beta=log_beta)
            for ops in (kernels(), torch.ops.trimtab)
        )
        assert_agrees(ours, theirs)
        assert (ours[0] == -1).tolist() == [False, True, False]


def test_nothing_to_do():
    for shape in ((0, 40), (0, 0)):
        assert len(call(torch.zeros(shape), torch.zeros(shape))[0]) == 0
    token, logp, kept = call(torch.zeros(3, 0), torch.zeros(3, 0))
    assert (token.tolist(), kept.tolist()) == ([-1] * 3, [0] * 3)
    assert logp.isnan().all()
    maps = (torch.zeros(3, dtype=torch.int64), None, None)
    empty = call(torch.zeros(0, 40), torch.zeros(3, 40), maps=maps, count=3)
    assert empty[0].tolist() == [-1] * 3


@pytest.mark.parametrize("bad", [-1, 4, 2**62, -(2**62)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_row_maps(bad, which):
    tensors = rows(4, 40).logits(torch.float32)
    maps = [torch.tensor([3, 0, 2]), torch.tensor([1, 1, 0]), torch.tensor([0, 3, 3])]
    clean = call(*tensors, maps=maps, count=3)
    assert_agrees(clean, call(*tensors, maps=maps, count=3, ops=torch.ops.trimtab))
    maps[which] = maps[which].clone()
    maps[which][1] = bad
    broken = call(*tensors, maps=maps, count=3)
    assert (broken[0][1], broken[2][1]) == (-1, 0)
    assert broken[1][1].isnan()
    for ours, expected in zip(broken, clean, strict=True):
        assert_same_bits(ours[::2], expected[::2])


@pytest.mark.parametrize("name", ["one block", "clusters of 4"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_layouts(name, dtype):
    """Rows that start anywhere in 16 bytes, rows apart, overlapping and shared ones."""
    p, n, a = rows(3, 507, dtype).logits(dtype)
    options = {"log_beta": math.log(1e-3), "tail": 0.2}
    with played(name):
        expected = call(p, n, a, **options)
        assert_agrees(expected, call(p, n, a, ops=torch.ops.trimtab, **options))
        for offset, stride in ((0, 512), (1, 507), (3, 508), (8, 520)):
            assert_same(call(laid_out(p, offset, stride).rows, n, a, **options), expected)
            assert_same(
                call(*(laid_out(x, offset, stride).rows for x in (p, n, a)), **options), expected
            )
        windows = p.view(-1).as_strided((3, 507), (1, 1))
        assert_same(call(windows, n), call(windows.clone(memory_format=torch.contiguous_format), n))
        assert_same(call(p[:1].expand(3, -1), n), call(p[[0, 0, 0]], n))


def test_parameters_of_each_row():
    p, n, a = rows(6, 252).logits(torch.float32)
    agree(
        p, n, anchor=a, alpha=torch.tensor([0.0, 0.5, -0.5, 1.5, 8.0, 0.1]),
        plausibility=torch.tensor([1.0, 0.5, 0.1, 1e-6, 1e-3, 1e-3]),
        temperature=torch.tensor([0.0, 0.3, 1.0, 2.5, 1.0, 0.7]),
        top_k=torch.tensor([0, 1, 5, 252, 300, 40]), min_p=torch.tensor([0, 0.5, 0.01, 0, 0.1, 0]),
        top_p=torch.tensor([1.0, 0.9, 0.3, 0.0, 0.99, 0.7]),
        seed=torch.tensor([0, -1, 2**63 - 1, -(2**63), 2**32, 7]),
        position=torch.tensor([0, -1, 2**40, 5, -7, 2**32 - 1]),
    )  # fmt: skip


def test_what_nobody_chose():
    @examples(60)
    @given(sampling(DTYPES))
    def run(drawn):
        p, n, options = drawn
        agree(p, n, **options)

    run()


@pytest.mark.parametrize("name", ["one block", "clusters of 8", "clusters in scratch"])
def test_the_order_of_threads_changes_no_bit(name):
    tied = rows(7, 507).logits(torch.float32, 2)
    tied[0] = (tied[0] * 2).round() / 2
    results = []
    with played(name):
        for order in library.ORDERS:
            with library.schedule(order, seed=3):
                results.append([
                    *call(*tied, alpha=0.0, tail=0.3), *call(*tied, top_k=33, log_beta=-3.0),
                    *call(*tied, temperature=0.0), *call(*tied),
                ])  # fmt: skip
    for other in results[1:]:
        assert_same(other, results[0])


def test_zeros_of_both_signs_in_any_order_of_threads():
    """Which thread has the one token that is kept changes with the order; its result does not."""
    generator = torch.Generator().manual_seed(1)
    row = torch.where(torch.rand(30, 600, generator=generator) < 0.5, -0.0, 0.0)
    row[torch.rand(30, 600, generator=generator) > 1 / 8] = -5.0
    results = []
    with played("Ampere"):
        for order in library.ORDERS:
            with library.schedule(order, seed=1):
                drawn = [
                    call(row, None, **options)
                    for options in ({"top_k": 6}, {"tail": 1.0}, {"top_k": 6, "tail": 1.0},
                                    {"log_beta": -1.0, "tail": 1.0})
                ]  # fmt: skip
                results.append([(token, logp.view(torch.int32)) for token, logp, _ in drawn])
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert_same(ours, first)


# What the blocks of a cluster do with a row of 1700: where they leave it, and how they part.
KINDS: dict[str, dict[str, float]] = {
    "no such row": {},
    "NaN": {},
    "all masked": {"log_beta": -1.0},
    "mask's list, greedy": {"log_beta": -1.0, "temperature": 0.0},
    "mask's list": {"log_beta": -1.0, "tail": 0.2},
    "mask past its list": {"log_beta": -60.0, "top_k": 5, "temperature": 0.7},
    "mask past its list, greedy": {"log_beta": -60.0, "temperature": 0.0},
    "list of top-k": {"top_k": 7, "tail": 0.3},
    "row of top-k": {"top_k": 900},
    "list of top-p": {"tail": 0.7, "temperature": 0.5},
    "list of top-p that is too short": {"tail": 0.01, "temperature": 2.0},
    "row of both": {"tail": 0.01, "top_k": 1500, "temperature": 2.0},
    "no search": {"log_min_p": -3.0, "temperature": 0.9},
}


@pytest.mark.parametrize("name", ["clusters in scratch", "Ampere in scratch"])
def test_after_a_row_of_any_kind_comes_one_of_any_other(name):
    """Blocks that are done with a row go on, while the first may still work on its list."""
    order = [kind for pair in itertools.product(KINDS, KINDS) for kind in pair]
    p, n = rows(len(order), 1700).logits(torch.bfloat16, 2)
    places = torch.arange(len(order))
    for i, kind in enumerate(order):
        if kind == "no such row":
            places[i] = -1
        elif kind == "NaN":
            p[i, 1699 * (i % 2)] = math.nan
        elif kind == "all masked":
            p[i] = -INF
    usual = {"log_beta": -INF, "temperature": 1.0, "top_k": 0, "tail": -1.0, "log_min_p": -INF}
    numbers = {
        option: torch.tensor([KINDS[kind].get(option, number) for kind in order])
        for option, number in usual.items()
    }
    expected = call(p, n, maps=(places, None, None), ops=torch.ops.trimtab, **numbers)
    bad = torch.tensor([kind in ("no such row", "NaN", "all masked") for kind in order])
    assert ((expected[0] == -1) == bad).all()
    results = []
    with played(name):
        for schedule in library.ORDERS:
            with library.schedule(schedule, seed=11):
                results.append(call(p, n, maps=(places, None, None), **numbers))
    assert_agrees(results[0], expected)
    for other in results[1:]:
        assert_same(other, results[0])


def test_a_row_does_not_depend_on_its_batch():
    p, n = rows(20, 507).logits(torch.float32, 2)
    with played("clusters in scratch"):
        whole = call(p, n, tail=0.1)
        for i in range(0, 20, 7):
            part = call(p[i : i + 1], n[i : i + 1], tail=0.1)
            assert_same(part, [field[i : i + 1] for field in whole])


def test_wrong_calls_are_errors():
    p, n = rows(3, 10).logits(torch.float32, 2)
    with pytest.raises(RuntimeError, match="got Double; use impl='reference'"):
        call(p.double(), n.double())
    for negative in (n.half(), n[:2], n[:, :9], n.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="negative"):
            call(p, negative)
    with pytest.raises(RuntimeError, match="negative_rows"):
        call(p, n, maps=(None, torch.zeros(3), None))
    with pytest.raises(RuntimeError, match="positive"):
        call(p.long(), n)


def test_sanitised():
    library.build(library.ROOT / "csrc" / "cuda" / "contrast_sample.cu", sanitize=True)
    library.run_sanitized(__file__)


def visit_every_edge() -> None:
    """Rows that end where their memory does, in every layout, on every device."""
    for name in DEVICES:
        with played(name):
            for dtype in (torch.float32, torch.bfloat16):
                for classes in (0, 1, 7, 8, 127, 507):
                    for offset, stride in ((0, classes), (1, classes), (0, classes + 3)):
                        memory = torch.randn(offset + 2 * stride + classes).to(dtype)
                        tight = memory.as_strided((3, classes), (stride, 1), offset)
                        call(tight, tight.clone(), tight, log_beta=-9.0, top_k=100, tail=0.3)
                        call(torch.zeros_like(tight), None, tail=0.7)


if __name__ == "__main__":
    visit_every_edge()
