"""What else a vocabulary in slices has to do: costs, contrast, DTensors, misuse, lost ranks."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

import sharded_head_cases as cases
import sharded_pool
from sharded_cases import logp_case, loss_case
from token_loss_cases import CONFIDENT, problem
from trimtab import _schemas
from trimtab.ops.token_loss import _chunks
from trimtab.testing import assert_same_bits, uneven

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("no gloo", allow_module_level=True)

PROBLEM = {"n": 37, "d": 16, "v": 63}
SPEC: dict[str, Any] = {"problem": PROBLEM, "sizes": [21, 0, 41, 1]}


@pytest.fixture(scope="module")
def pool():
    with sharded_pool.pool() as made:
        yield made


def together(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One process's results from the ranks': slices one after the other, all else equal."""
    results = {}
    for name, first in found[0].items():
        parts = [rank[name] for rank in found]
        if name.endswith(("weight.grad", "bias.grad")) and "token_weight" not in name:
            results[name] = torch.cat(parts)
            continue
        for part in parts[1:]:
            assert_same_bits(part, first, name=name)
        results[name] = first
    return results


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to the rounding of float64 sums of a few hundred terms."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        finite = value[value.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        torch.testing.assert_close(
            actual[name], value, rtol=0.0, atol=1e-13 * (1 + scale), equal_nan=True, msg=name
        )


@pytest.mark.parametrize(
    "function", [cases.second_derivatives, cases.ratio_case, cases.contrast_case]
)
def test_several_processes_are_one(pool, function):
    close(together(pool.run(function, SPEC)), function(None, SPEC))


def test_second_derivatives_of_each_token(pool):
    spec = {**SPEC, "reduction": "none"}
    close(together(pool.run(cases.second_derivatives, spec)),
          cases.second_derivatives(None, spec))  # fmt: skip


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_derivatives_of_own_tokens(pool, impl):
    spec = {**SPEC, "counts": [20, 0, 16, 1], "impl": impl}
    ranks = pool.run(cases.derivatives_of_own_tokens, spec)
    found = {
        name: first if "normalizer" in name else torch.cat([rank[name] for rank in ranks])
        for name, first in ranks[0].items()
    }
    close(found, cases.derivatives_of_own_tokens(None, spec))
    for rank in ranks[1:]:
        close({name: rank[name] for name in rank if "normalizer" in name},
              {name: value for name, value in found.items() if "normalizer" in name})  # fmt: skip


@pytest.mark.parametrize("name", cases.FILTERS)
def test_every_rank_draws_the_tokens_of_one_process(pool, name):
    spec = {**SPEC, "dtype": torch.float32}
    found = together(pool.run(cases.contrast_case, spec))
    expected = cases.contrast_case(None, spec)
    for field in ("token", "kept", "logp"):
        assert_same_bits(found[f"{name} {field}"], expected[f"{name} {field}"])
    assert (found[f"{name} token"] >= 0).all()


@pytest.mark.parametrize(
    ("reduction", "frozen", "products"),
    [("mean", False, 3), ("none", False, 4), ("mean", True, 2), ("none", True, 2)],
)
def test_costs(pool, reduction, frozen, products):
    options = {"reduction": reduction}
    spec = {**SPEC, "frozen": frozen, "options": options, "chunk_size": 8, "weight_grad": False}
    found = pool.run(cases.costs, spec)
    given = problem(**PROBLEM)
    active = int(((given.target >= 0) & (given.token_weight != 0)).sum())
    share = active / PROBLEM["n"]
    assert sum(made for made, _, _ in found) == pytest.approx(products * share)
    # With each token's upstream known only in backward, the first of them is 0.
    passes = 2 if products == 4 else 1
    for rank, (made, gathered, reduced) in enumerate(found):
        assert made == pytest.approx(products * share * SPEC["sizes"][rank] / PROBLEM["v"])
        assert gathered == pytest.approx(2 * active * passes, abs=2)
        assert reduced == active * PROBLEM["d"]


@pytest.mark.parametrize("accum_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ranks_parts_are_summed_as_wide_as_asked(pool, accum_dtype):
    spec = {**SPEC, "dtype": torch.bfloat16, "accum_dtype": accum_dtype}
    assert pool.run(cases.dtypes_of_sums, spec) == [{accum_dtype}] * 4


def test_collectives_run_during_products(pool):
    """Each is awaited only after a product that came after its start."""
    spec = {"problem": PROBLEM, "sizes": [40, 23], "weighted": False, "chunk_size": 8}
    for events in pool.run(cases.order, spec, ranks=2):
        for kind, products in (("all_gather", {"addmm"}), ("all_reduce", {"mm", "addmm"})):
            starts = [at for at, name in enumerate(events) if name == kind]
            waits = [at for at, name in enumerate(events) if name == f"wait {kind}"]
            # The first gathering is of sizes; the last chunk's numbers have no product to hide in.
            starts = starts[-len(waits) :]
            assert len(waits) == 4
            for start, wait in list(zip(starts, waits, strict=True))[:-1]:
                assert products & set(events[start:wait]), events


def test_ranks_with_unequal_slices_make_the_same_steps(pool):
    """On CUDA the rule looks at the number of classes."""
    first, *others = pool.run(cases.steps, SPEC)
    assert first[0][1] == max(SPEC["sizes"])
    assert all(asked == first for asked in others)


def test_two_buffers_take_the_memory_of_one():
    one = _chunks.rows_per_chunk(1 << 20, 16032, 2, "cuda", None)
    two = _chunks.rows_per_chunk(1 << 20, 16032, 2, "cuda", None, 2)
    assert 0.98 < 2 * two / one < 1.02  # chunks are of nearly equal size
    assert _chunks.rows_per_chunk(8192, 16032, 2, "cuda", None, 2) == 4096
    assert _chunks.rows_per_chunk(1500, 16032, 2, "cuda", None, 2) == 1500
    assert _chunks.rows_per_chunk(1500, 16032, 2, "cuda", 1500, 2) == 1500


def test_a_slice_that_a_bias_masks_throughout(pool):
    masked = torch.zeros(63, dtype=torch.bool)
    masked[21:62] = True
    spec = {**SPEC, "masked": masked, "problem": {**PROBLEM, "n": 12}}
    close(together(pool.run(cases.masked_slices, spec)), cases.masked_slices(None, spec))


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_confident_rows_keep_their_relative_accuracy(pool, impl):
    sizes, classes = SPEC["sizes"], PROBLEM["v"]
    each = torch.tensor([(1 - p) / p / (classes - 1) for p in CONFIDENT], dtype=torch.float64)
    logits = each.log()[:, None].repeat(1, classes) + torch.randn(len(CONFIDENT), classes) / 4
    target = torch.tensor([0, 20, 21, 61, 62, 40])
    logits = logits.scatter(1, target[:, None], 0.0).float()
    # The head is the identity's image: its products round nothing, and show its gradient.
    tensors = torch.eye(len(CONFIDENT)), logits.T.contiguous(), torch.zeros(classes)
    spec = {
        "problem": {"n": len(CONFIDENT)}, "sizes": sizes, "tensors": tensors, "target": target,
        "upstream": ("logp",), "options": {"impl": impl},
    }  # fmt: skip
    found = pool.run(logp_case, spec)
    z = logits.double()
    others = z.exp().scatter(1, target[:, None], 0.0)
    rest = others.sum(1)
    upstream = uneven(torch.empty(len(CONFIDENT))).double()
    grad = torch.cat([rank["weight.grad"] for rank in found]).T.double()
    bound = torch.finfo(torch.float32).eps * (12 + z.abs().amax(1))
    at_target = grad.gather(1, target[:, None]).squeeze(1)[1:] / upstream[1:]
    for name, actual, exact in [
        ("logp", found[0]["logp"], -torch.log1p(rest)),
        ("entropy", found[0]["entropy"], torch.log1p(rest) - (others * z).sum(1) / (1 + rest)),
        ("grad", at_target, (rest / (1 + rest))[1:]),
    ]:
        relative = ((actual.double() - exact) / exact).abs()
        assert (relative <= bound[-len(exact) :]).all(), f"{name}: {relative.tolist()}"


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_an_unlikely_slice_keeps_the_accuracy_of_every_element(pool, impl):
    """Where the target's slice has a share of 1e-7, no element is what rounding leaves of a sum."""
    logits = torch.randn(6, 63)
    logits[:, 21:62] += 16.0
    target = torch.tensor([0, 5, 20, 62, 7, 62])
    tensors = torch.eye(6), logits.T.contiguous(), torch.zeros(63)
    spec = {
        "problem": {"n": 6}, "sizes": SPEC["sizes"], "tensors": tensors, "target": target,
        "upstream": ("logp",), "options": {"impl": impl},
    }  # fmt: skip
    grad = torch.cat([rank["weight.grad"] for rank in pool.run(logp_case, spec)]).T.double()
    z = logits.double()
    exact = torch.zeros_like(z).scatter(1, target[:, None], 1.0) - torch.softmax(z, 1)
    exact *= uneven(torch.empty(6)).double()[:, None]
    bound = torch.finfo(torch.float32).eps * (12 + z.abs().amax(1, keepdim=True))
    assert ((grad - exact).abs() <= bound * exact.abs()).all()


def test_everything_ignored(pool):
    target = torch.full((37,), -100)
    for reduction in ("mean", "sum"):
        spec = {**SPEC, "target": target, "options": {"reduction": reduction}}
        found = together(pool.run(loss_case, spec))
        assert found["loss"].isnan() if reduction == "mean" else found["loss"] == 0
        grads = [value for name, value in found.items() if name.endswith("grad")]
        assert len(grads) == 4
        assert all((grad == 0).all() for grad in grads)


def test_distributed_tensors(pool):
    expected = loss_case(None, {**SPEC, "weighted": False})
    for rank in pool.run(cases.distributed_head, SPEC):
        for layout in ("sharded", "replicated"):
            close({name: rank[f"{layout} {name}"] for name in expected}, expected)


def test_a_head_that_fsdp_shards(pool):
    spec = {**SPEC, "counts": [10, 9, 9, 9]}
    options = {"reduction": "sum"}
    one = loss_case(None, {**spec, "weighted": False, "options": options})
    for rank in pool.run(cases.fully_sharded_head, spec):
        assert rank["raised"].startswith("ValueError: target must be the same on every rank")
        found = {"loss": rank["loss"], "outside": rank["outside"], "within": rank["within"]}
        expected = one["weight.grad"] / 0.37  # the upstream of one process
        close(found, {"loss": one["loss"], "outside": expected, "within": expected})


def test_compiled_without_a_break(pool):
    for rank in pool.run(cases.compiled_case, {**SPEC, "sizes": [16, 16, 16, 15]}):
        assert rank == {"loss": True, "logp": True, "token": True}


@pytest.mark.skipif(not _schemas._KEEPS_ORDER, reason="this torch keeps no order")
def test_compilers_keep_the_order_of_collectives(pool):
    assert pool.run(cases.unordered, SPEC) == [[]] * 4


@pytest.mark.parametrize("normalizer", [None, "token_weight"])
def test_a_divisor_over_data_parallel_ranks(pool, normalizer):
    class_weight = torch.linspace(0.0, 2.0, 63)
    spec = {
        "problem": PROBLEM, "sizes": [40, 23], "normalizer": normalizer,
        "class_weight": class_weight,
    }  # fmt: skip
    options = {"normalizer": normalizer}
    if normalizer is None:
        options["class_weight"] = class_weight
    one = loss_case(None, {"problem": PROBLEM, "sizes": [63], "options": options})
    ranks = pool.run(cases.data_parallel, spec)
    # Ranks 0 and 1 have the first tokens, 2 and 3 the others; 0 and 2 the first slice.
    summed = {"loss": ranks[0]["loss"] + ranks[2]["loss"]}
    for name in ("input.grad", "token_weight.grad"):
        summed[name] = torch.cat([ranks[1][name], ranks[3][name]])
    for name in ("weight.grad", "bias.grad"):
        summed[name] = torch.cat([ranks[r][name] + ranks[r + 2][name] for r in (0, 1)])
    upstream = 0.37  # of one process
    close(summed, {name: v if name == "loss" else v / upstream for name, v in one.items()})


MISUSE = {
    "other targets": "ValueError: target must be the same on every rank",
    "other counts": "ValueError: target must be the same on every rank",
    "other widths": "ValueError: group must be of ranks that agree on the input's width",
    "other options": "ValueError: group must be of ranks that agree on the options",
    "other weights": "ValueError: target must be the same on every rank",
    "other scale": "ValueError: group must be of ranks that agree on the options",
    "other smoothing": "ValueError: group must be of ranks that agree on the options",
    "other sums": "ValueError: group must be of ranks that agree on the options",
    "other scale, reference": "ValueError: group must be of ranks that agree on the options",
    "own tokens of one": "ValueError: ",
    "gradients of one": "ValueError: group must be of ranks that agree on the options",
    "gradients of one, reference": "ValueError: group must be of ranks that agree on the options",
    "one operator of two": "ValueError: group must be of ranks that agree on",
    "divisor of the same tokens": "ValueError: normalizer_group must be without other ranks",
    "outside": "IndexError: target must be in [0, 63)",
    "outside, own tokens": "IndexError: target must be in [0, 63)",
    "outside, reference": "IndexError: target must be in [0, 63)",
    "no vocabulary": "ValueError: linear_weight must be non-empty on some rank",
    "no group": "ValueError: options.sequence_parallel must be False without a group",
    "mesh": "TypeError: group must be a torch.distributed ProcessGroup",
    "columns": "ValueError: linear_weight must be a DTensor with placement Shard(0)",
    "square mesh": "ValueError: linear_weight must be a DTensor on a mesh of one dimension",
    "DTensor input": "TypeError: input must be a plain tensor",
    "ZeRO-3": "ValueError: linear_weight must be gathered",
    "divisor": "ValueError: normalizer_group must be None",
    "K-dimensional": "ValueError: group must be None",
    "logits": "ValueError: positive must be of the same rows",
}


def test_misuse_is_an_error_on_every_rank(pool):
    for rank in pool.run(cases.misuse, SPEC):
        assert rank.keys() == MISUSE.keys()
        for name, text in rank.items():
            assert text.startswith(MISUSE[name]), (name, text)
            assert ";" in text, "an error says what to do"
    # The processes are in step again.
    test_everything_ignored(pool)


ALONE = {
    "dtype": "TypeError: linear_weight must be torch.float32",
    "length": "ValueError: target must be of shape",
    "temperature": "ValueError: temperature must be positive",
    "rows": "ValueError: negative must be",
    "filter": "ValueError: top_p must be",
}


def test_all_ranks_hear_of_one_that_fails_its_checks(pool):
    heard = "ValueError: group must be of ranks whose arguments pass their checks, got an error on "
    for rank, texts in enumerate(pool.run(cases.failing_alone, SPEC)):
        assert texts.keys() == ALONE.keys()
        for name, text in texts.items():
            assert text.startswith(ALONE[name] if rank == 1 else f"{heard}ranks [1]"), (name, text)
    test_everything_ignored(pool)


def test_a_group_of_one_rank_is_no_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        spec = {**SPEC, "sizes": [63]}
        group = torch.distributed.group.WORLD
        with cases.replaced(torch.distributed, "all_gather", None):
            found = loss_case(group, spec)
        close(found, loss_case(None, spec))
    finally:
        torch.distributed.destroy_process_group()


def test_the_others_hear_of_a_rank_that_dies():
    pool = sharded_pool.Pool(ranks=2)
    try:
        pool.start(cases.die, {**SPEC, "sizes": [40, 23], "chunk_size": 8})
        start = time.monotonic()
        pool.connections.pop()
        (text,) = pool.results(seconds=sharded_pool.TIMEOUT.total_seconds())
        assert text.startswith(("RuntimeError", "DistBackendError")), text
        assert time.monotonic() - start < sharded_pool.TIMEOUT.total_seconds()
    finally:
        for process in pool.processes:
            process.kill()
        pool.close()
