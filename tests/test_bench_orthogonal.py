"""The orthogonal benchmark's own arithmetic: data, truth, judge, floors, contenders. No times."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

from trimtab.testing import BudgetError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
try:
    cases, figures, measure, providers = (
        importlib.import_module(name)
        for name in ("cases_orthogonal", "figures", "measure", "providers_orthogonal")
    )
    released, report, targets, truths = (
        importlib.import_module(name)
        for name in ("released_orthogonal", "report", "targets", "truth_orthogonal")
    )
finally:
    sys.path.remove(str(ROOT / "bench"))

DTYPES = ("float32", "bfloat16")
PENALTIES = [name for name, mode in cases.MODES.items() if mode.op == "orthogonal_penalty"]
WITH_GRADIENT = [name for name in PENALTIES if cases.MODES[name].backward]
PROJECTIONS = [name for name in cases.MODES if name not in PENALTIES]


def small(mode: str, dtype: str = "float32") -> Any:
    return next(
        case
        for case in cases.cases("cpu", quick=True)
        if (case.mode, case.dtype_name) == (mode, dtype)
    )


def provider(name: str) -> Any:
    return next(p for p in providers.PROVIDERS if p.name == name)


def results_of(name: str, case: Any, inputs: Any) -> dict[str, torch.Tensor]:
    return truths.sample(case, inputs, provider(name).step(case)(inputs))


def judgement(case: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Inputs, judge, and the loop's results."""
    inputs = cases.make_inputs(case)
    judge = truths.judge_of(case, truths.truth(case, inputs))
    return inputs, judge, results_of(providers.LOOP, case, inputs)


# Data


@pytest.mark.parametrize("mode", list(cases.MODES))
def test_the_parameters_are_the_memory_without_gap_or_overlap(mode):
    inputs = cases.make_inputs(small(mode))
    for flat, tensors in (
        (inputs.flat_previous, [t for stored in inputs.stored_previous for t in stored]),
        (inputs.flat_current, inputs.stored_current),
    ):
        place = flat.data_ptr()
        for tensor in tensors:
            assert isinstance(tensor, Parameter)
            assert tensor.is_contiguous()
            assert tensor.data_ptr() == place
            place += tensor.nbytes
        assert place == flat.data_ptr() + flat.nbytes


def test_modules_have_the_shapes_that_their_mode_says():
    tasks, ragged, linear = (cases.make_inputs(small(m)) for m in ("tasks", "ragged", "all_linear"))
    assert [tuple(t.shape) for t in tasks.previous[0]] == [(8, 64)] * 2
    assert [tuple(t.shape) for t in ragged.previous] == [(4, 64), (8, 16), (12, 64), (16, 16)]
    assert [tuple(t.shape) for t in ragged.current()] == [(8, 64), (4, 16), (2, 64), (8, 16)]
    assert [t.shape[1] for t in linear.current()] == [64] * 6 + [172]
    side_b = cases.make_inputs(small("side_b"))
    assert tuple(side_b.stored_current[0].shape) == (64, 8)
    assert side_b.current()[0].stride() == (1, 8)
    real = cases.Case("all_linear", "bfloat16", cases.LLAMA_ALL_LINEAR, "cpu")
    assert sorted({size.width for size in real.sizes}) == [4096, 11008]
    assert real.bytes == 2 * 112 * 32 * (6 * 4096 + 11008)


def test_the_stacks_and_the_projectors_are_the_parameters():
    for mode in ("l1", "side_b", "tasks"):
        inputs = cases.make_inputs(small(mode))
        previous, current = inputs.stacks()
        rows = [p for p, _ in inputs.pairs()]
        assert torch.equal(previous.flatten(0, 1), torch.cat(rows))
        assert torch.equal(current, torch.stack(inputs.current()))
        assert inputs.ends.tolist() == [16, 32, 48, 64]
    gpm = cases.make_inputs(small("gpm"))
    for projector, basis in zip(gpm.projectors, gpm.previous, strict=True):
        assert torch.equal(projector, basis.mT @ basis)


def test_copies_share_nothing_and_the_data_is_the_same_again():
    case = small("both")
    inputs, again = cases.make_inputs(case), cases.make_inputs(case)
    assert torch.equal(inputs.flat_previous, again.flat_previous)
    copied = inputs.copy()
    assert all(t.requires_grad for t in [*copied.current(), *copied.previous])
    assert torch.equal(copied.flat_current, inputs.flat_current)
    held = [{t.data_ptr() for t in (*i.previous, *i.current())} for i in (inputs, copied)]
    assert not held[0] & held[1]
    walked = cases.make_inputs(small("l1")).copy()
    parameters = {p.data_ptr() for p in walked.model.parameters()}
    assert {t.data_ptr() for _, t in walked.pairs()} <= parameters


def test_copies_hold_three_times_the_cache():
    inputs = cases.make_inputs(small("l1"))
    size = 4 * 4 * 64 * (16 + 8)
    assert len(measure.rotated(inputs, size, 1000 * size)) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", PENALTIES)
def test_rounding_decides_no_sign(mode, dtype):
    inputs = cases.make_inputs(small(mode, dtype))
    assert all(cases.signs_are_clear(p, c) for p, c in inputs.pairs())
    p, c = inputs.pairs()[-1]
    with torch.no_grad():
        c[0] -= (p[0] @ c[0]) / (p[0] @ p[0]) * p[0]
    assert not cases.signs_are_clear(p, c)


def test_only_small_products_are_moved():
    generator = torch.Generator().manual_seed(3)
    p, c = (torch.randn(n, 200, generator=generator, dtype=torch.float64) for n in (40, 8))
    before, after = p @ c.T, cases.with_clear_signs(p, c) @ c.T
    least = 2 * cases.CLEAR * p.norm(dim=1)[:, None] * c.norm(dim=1) / 200**0.5
    near = before.abs() < least
    assert 5 < int(near.sum()) < 60
    torch.testing.assert_close(after[~near], before[~near])
    torch.testing.assert_close(after[near], before[near].sign() * least[near])


def test_entries_have_the_size_of_lora_initialisation():
    inputs = cases.make_inputs(cases.Case("l1", "float32", (2, 112, 8, 4096), "cpu"))
    for flat in inputs:
        assert float(flat.std()) == pytest.approx((3 * 4096) ** -0.5, rel=0.01)
    for basis in cases.make_inputs(small("adapters")).previous:
        torch.testing.assert_close(basis @ basis.mT, torch.eye(16), rtol=0, atol=1e-6)


# The released code's walk


@pytest.mark.parametrize(
    ("model", "adapters", "parameters"),
    [("llama q,v", 64, 547), ("llama all-linear", 224, 1187), ("t5 q,v", 144, 1085)],
)
def test_trees_have_the_parameters_of_the_models(model, adapters, parameters):
    previous, current = ([Parameter(torch.zeros(1, 1)) for _ in range(adapters)] for _ in range(2))
    tree = released.tree(model, previous, current)
    found = dict(tree.named_parameters())
    assert len(found) == parameters
    names = [name for name in found if "lora_A" in name]
    assert [found[name] for name in names] == previous
    assert [found[name.replace("lora_A", "loranew_A")] for name in names] == current


def test_trees_are_named_as_the_models():
    def names(model: str, adapters: int) -> set[str]:
        tensors = [Parameter(torch.zeros(1, 1)) for _ in range(adapters)]
        return {name for name, _ in released.tree(model, tensors, tensors[:]).named_parameters()}

    llama = names("llama q,v", 4)
    assert "base_model.model.model.layers.1.self_attn.v_proj.loranew_B.default.weight" in llama
    t5 = names("t5 q,v", 12)
    assert "base_model.model.decoder.block.1.layer.1.EncDecAttention.q.lora_B.default.weight" in t5
    with pytest.raises(ValueError, match="4 adapters, not 5"):
        names("llama q,v", 5)


def test_the_walk_takes_each_pair_once():
    case = small("all_linear")
    inputs = cases.make_inputs(case)
    named = list(inputs.model.named_parameters())
    partners = [i for i, (name, _) in enumerate(named, 1) if "loranew_A" in name]
    visited: list[str] = []
    inputs.model.named_parameters = lambda: (visited.append(n) or (n, p) for n, p in named)
    expected = sum((p @ c.T).abs().sum() for p, c in inputs.pairs())
    torch.testing.assert_close(released.walked_penalty(inputs.model), expected)
    # Each walk ends at the partner.
    assert len(visited) == len(named) + sum(partners)


# Truth, work and floors


@pytest.mark.parametrize("mode", list(cases.MODES))
def test_the_truth_is_what_the_loop_gives_in_float64(mode):
    case = small(mode)
    inputs = cases.make_inputs(case)
    exactly = cases.Inputs(case, inputs.flat_previous.double(), inputs.flat_current.double())
    found = results_of(providers.LOOP, case, exactly)
    exact = truths.truth(case, inputs)
    assert set(found) == set(exact.results)
    for name, value in exact.results.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_scales_are_the_sums_of_absolute_terms():
    case = small("both")
    inputs = cases.make_inputs(case)
    scales = truths.truth(case, inputs).scales
    previous, current = ([t.detach().abs() for t in side]
                         for side in (inputs.previous, inputs.current()))  # fmt: skip
    assert scales["grad_current"] == pytest.approx(max(float(p.sum(0).max()) for p in previous))
    assert scales["grad_previous"] == pytest.approx(max(float(c.sum(0).max()) for c in current))


@pytest.mark.parametrize("mode", list(cases.MODES))
def test_the_loop_makes_the_products_that_are_counted(mode):
    case = small(mode)
    inputs = cases.make_inputs(case)
    with FlopCounterMode(display=False) as counter:
        provider(providers.LOOP).step(case)(inputs)
    assert counter.get_total_flops() == case.flop


def test_bytes_are_what_the_floor_moves():
    previous, current = 4 * 16 * 64, 4 * 8 * 64
    assert small("l1").bytes == small("tasks").bytes == 4 * previous
    assert small("value", "bfloat16").bytes == 2 * previous
    assert small("both").bytes == 2 * 4 * previous
    assert small("ragged").bytes == 4 * (4 * 64 + 8 * 16 + 12 * 64 + 16 * 16)
    assert small("adapters").bytes == 4 * (previous + 2 * current)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [providers.READ, providers.READS])
@pytest.mark.parametrize("mode", ["l1", "tasks", "adapters"])
def test_the_floor_reads_every_element(mode, name, dtype):
    case = small(mode, dtype)
    inputs = cases.make_inputs(case)
    read = provider(name).step(case)
    flats = list(inputs) if case.projects and name == providers.READ else [inputs.flat_previous]
    for flat in flats:
        # Two at a time: of two 16-bit numbers in one integer the second decides.
        for place in (0, 64 * 16, flat.numel() - 2):
            before = {k: v.clone() for k, v in read(inputs).items() if "largest" in k}
            kept = flat[place : place + 2].clone()
            flat[place : place + 2] = float("nan")  # whose bits are above those of every number
            changed = read(inputs)
            flat[place : place + 2] = kept
            assert any(not torch.equal(v, changed[k]) for k, v in before.items())
    written = provider(providers.READ).step(small("both"))(cases.make_inputs(small("both")))
    assert written["grad_previous"].nbytes == 4 * 4 * 16 * 64


def test_no_case_is_measured_twice_and_all_modes_are():
    for device in ("cpu", "cuda"):
        suite = cases.cases(device)
        assert len({case.id for case in suite}) == len(suite)
        assert {case.mode for case in suite} == set(cases.MODES)
        curve = [c.shape for c in suite if (c.mode, c.dtype_name) == ("l1", "bfloat16")]
        assert {8, 16, 32, 64, 112} <= {s[1] for s in curve if s[2:] == (8, 4096)}
        assert {4, 8, 16, 64} <= {s[2] for s in curve if s[1] == 112}
        for case in filter(lambda case: case.model, suite):
            assert len(list(released.MODELS[case.model](case.shape[0]))) > case.shape[0]


def test_whoever_does_not_run_says_why():
    for who in providers.PROVIDERS:
        for case in filter(who.concerns, cases.cases("cpu")):
            reason = who.reason(case, full=False)
            assert reason is None or len(reason) > 10
    assert "never timed" in provider("trimtab triton").reason(small("l1"), full=True)
    assert "equal shapes" in provider("bmm").reason(small("ragged"), full=True)


def test_what_the_host_does_is_not_hidden_in_a_graph():
    on_gpu = cases.Case("l1", "bfloat16", (4, 16, 8, 64), "cuda", "llama q,v")
    launched = {p.name for p in providers.PROVIDERS if not p.contender(on_gpu).capturable}
    assert launched == {providers.PUBLISHED, "flattened loop, launched", "trimtab triton, launched"}
    shown = [p for p in providers.PROVIDERS if p.name.endswith(", launched")]
    assert all(p.concerns(on_gpu) and not p.concerns(small("l1")) for p in shown)


# Contenders and the judge


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", list(cases.MODES))
def test_every_right_contender_passes(mode, dtype):
    case = small(mode, dtype)
    inputs, judge, loop = judgement(case)
    assert judge(loop, None)
    passed = set()
    for who in providers.PROVIDERS:
        usable = who.checked and not who.compiles and who.concerns(case)
        if usable and who.reason(case, full=True) is None:
            errors = judge(results_of(who.name, case, inputs), loop)
            assert all(0.0 <= error < 0.05 for error in errors.values())
            passed.add(who.name)
    assert {providers.LOOP, "trimtab reference"} <= passed
    assert passed & {"bmm", "foreach_mm"}
    assert (providers.PUBLISHED in passed) == (mode in ("l1", "all_linear"))
    assert ("GPM's projectors" in passed) == (mode == "gpm")


def broken_penalty(case: Any, inputs: Any, how: str) -> dict[str, torch.Tensor]:
    """What the reference gives where something of the last module is forgotten."""
    right = results_of("trimtab reference", case, inputs)
    p, c = (t.detach().double() for t in inputs.pairs()[-1])
    sizes, slopes = truths.size_and_slope(case, p @ c.T)
    lost, share = torch.zeros(()), torch.zeros_like(c)
    if how == "value alone":
        return {"value": right["value"]}
    if how == "half a gradient":
        return right | {"grad_current": right["grad_current"] / 2}
    if how == "not a number":
        share[-1, -1] = float("nan")
    elif how == "one sign":
        share[0] = 2 * slopes[0, 0] * p[0]
    elif how == "a row left out":
        lost, share = sizes[0].sum(), slopes[0][:, None] * p[0]
    elif how == "a module left out":
        lost, share = sizes.sum(), slopes.T @ p
    share = (share.T if case.about.layout == "columns" else share).flatten()
    right["value"] = right["value"] - lost
    right["grad_current"][-len(share) :] -= share.to(case.dtype)
    return right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", WITH_GRADIENT)
@pytest.mark.parametrize(
    "how",
    ["a row left out", "one sign", "a module left out", "value alone",
     "not a number", "half a gradient"],
)  # fmt: skip
def test_a_wrong_penalty_does_not_pass(how, mode, dtype):
    case = small(mode, dtype)
    inputs, judge, loop = judgement(case)
    judge(results_of("trimtab reference", case, inputs), loop)
    with pytest.raises(BudgetError):
        judge(broken_penalty(case, inputs, how), loop)


@pytest.mark.parametrize("mode", PENALTIES)
def test_another_norm_does_not_pass(mode, monkeypatch):
    case = small(mode)
    inputs, judge, loop = judgement(case)
    other = {"l1": "frobenius2", "frobenius2": "l1"}[case.about.norm]
    monkeypatch.setitem(cases.MODES, mode, case.about._replace(norm=other))
    with pytest.raises(BudgetError, match="value"):
        judge(results_of("trimtab reference", case, inputs), loop)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["as it was", "added", "another basis", "one module"])
@pytest.mark.parametrize("mode", PROJECTIONS)
def test_a_wrong_projection_does_not_pass(mode, how, dtype):
    case = small(mode, dtype)
    inputs, judge, loop = judgement(case)
    before = torch.cat([t.detach().flatten() for t in inputs.current()])
    if how == "as it was":
        wrong = before
    elif how == "added":
        wrong = 2 * before - loop["out"]
    elif how == "one module":
        wrong = loop["out"].clone()
        wrong[-inputs.current()[-1].numel() :] = inputs.current()[-1].detach().flatten()
    else:
        others = inputs.copy()
        others.previous.reverse()
        wrong = results_of(providers.LOOP, case, others)["out"]
    with pytest.raises(BudgetError, match="out"):
        judge({"out": wrong}, loop)


def test_a_float32_value_is_held_to_float32():
    """The 16-bit loop is off by percents, which is no licence for who adds in float32."""
    case = cases.Case("tasks", "bfloat16", (64, 112, 8, 64), "cpu")
    inputs, judge, loop = judgement(case)
    right = results_of("trimtab reference", case, inputs)
    assert judge(right, loop)["value"] < 1e-6
    assert judge(loop, None)["value"] > 0.1
    with pytest.raises(BudgetError, match="value"):
        judge(right | {"value": right["value"] * (1 + 1e-5)}, loop)
    judge(right | {"value": (right["value"] * 1.01).bfloat16()}, loop)


def test_a_sum_that_cancels_is_granted_a_rounding_of_its_terms():
    case = small("l1")
    inputs, judge, loop = judgement(case)
    exact = truths.truth(case, inputs)
    due, eps = exact.results["grad_current"], torch.finfo(torch.float32).eps
    terms = eps * exact.scales["grad_current"]
    budget = 2 * float((loop["grad_current"] - due).abs().max()) + eps * float(due.abs().max())
    assert terms > 0.3 * budget
    off = due.clone()
    off[due.abs().argmin()] += budget + 0.9 * terms
    judge(loop | {"grad_current": off}, loop)
    off[due.abs().argmin()] += 0.2 * terms
    with pytest.raises(BudgetError, match="grad_current"):
        judge(loop | {"grad_current": off}, loop)


def test_results_of_other_shapes_do_not_pass():
    case = small("side_b")
    inputs = cases.make_inputs(case)
    outputs = provider(providers.LOOP).step(case)(inputs)
    with pytest.raises(BudgetError, match=r"grad_current 2: \(8, 64\), due is \(64, 8\)"):
        truths.sample(case, inputs, outputs | {"grad_current.2": outputs["grad_current.2"].T})
    del outputs["grad_current.3"]
    with pytest.raises(BudgetError, match="grad_current 3: None"):
        truths.sample(case, inputs, outputs)


# Targets and report


def a_row(mode: str, name: str, ms: float, dtype: str = "bfloat16") -> dict[str, Any]:
    case = cases.Case(mode, dtype, targets.LLAMA_QV, "cpu")
    outcome = measure.Outcome("timed", "", (ms / 1e3,) * 3, "wall", 2**20, {"value": 1e-6})
    impl = name.removeprefix("trimtab ") if name.startswith("trimtab") else None
    row = {**case.describe(), "provider": name, "impl": impl, **measure.summary(outcome)}
    row |= measure.against_floor(row, 3.0, case.flop, case.bytes)
    return {**row, "threads": 2, "run": "first"}


def test_targets_are_read_off_the_rows():
    assert targets.LLAMA_QV == cases.LLAMA_QV
    assert targets.LLAMA_ALL_LINEAR == cases.LLAMA_ALL_LINEAR
    rows = [a_row("l1", "trimtab native", 6.0), a_row("l1", providers.LOOP, 18.0),
            a_row("l1", "trimtab reference", 1.0), a_row("l1", "trimtab triton, launched", 1.0),
            a_row("l1", "trimtab native", 12.0, "float32")]  # fmt: skip
    found = {(v.target.dtype, v.target.quantity): v for v in targets.verdicts(rows, "xeon-2core")}
    assert len(found) == 4
    assert found["bfloat16", targets.TIME_OVER_LOOP].value == pytest.approx(1 / 3)
    assert found["bfloat16", targets.TIME_OVER_LOOP].met
    assert found["float32", targets.TIME_OVER_READ].met is False
    assert found["float32", targets.TIME_OVER_LOOP].met is None
    assert rows[0]["gbps"] == pytest.approx(2 * 64 * 112 * 4096 / 6e-3 / 1e9, rel=1e-2)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> dict[str, Any]:
    """A quick benchmark of some cases, as pytest-benchmark's JSON."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/bench_orthogonal.py", "--quick",
         "-p", "no:cacheprovider", f"--benchmark-json={path}", "-k",
         "l1-float32 or all_linear-bfloat16 or gpm-float32"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(path.read_text())


def test_the_suite_measures_penalties_and_projections(quick_run):
    rows = [row["extra_info"] for row in quick_run["benchmarks"]]
    by_mode = {mode: {r["provider"] for r in rows if r["mode"] == mode}
               for mode in {r["mode"] for r in rows}}  # fmt: skip
    reads = {providers.READ, providers.READS}
    assert reads | {providers.LOOP, providers.PUBLISHED, "bmm"} <= by_mode["l1"]
    assert reads | {providers.LOOP, providers.PUBLISHED, "foreach_mm"} <= by_mode["all_linear"]
    assert {providers.READ, "bmm, stacked ahead", "GPM's projectors"} <= by_mode["gpm"]
    assert all("trimtab native" in names for names in by_mode.values())
    left_out = {row["provider"]: row["reason"] for row in quick_run["left_out"]}
    assert "equal shapes" in left_out["bmm"]


def test_the_report_has_targets_tables_and_pictures(quick_run, tmp_path, capsys):
    quick_run["machine_info"]["quick"] = False
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(quick_run))
    assert report.main([str(path), "--out", str(tmp_path / "results")]) == 0
    capsys.readouterr()
    folder = tmp_path / "results" / quick_run["machine_info"]["machine"]
    kept = json.loads((folder / "orthogonal.json").read_text())
    assert len(kept["rows"]) == len(quick_run["benchmarks"])
    text = (folder / "orthogonal.md").read_text()
    assert "| M x R x r x d | provider | ms (p20 to p80) | x floor | GB/s |" in text
    assert "| M x k x n x d | provider | ms (p20 to p80) | x floor | GB/s |" in text
    assert "time over the flattened loop's" in text
    for name in ("orthogonal-time.svg", "orthogonal-memory.svg", "orthogonal-floor.svg"):
        assert f"({name})" in text
        assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
    bars = figures.bars(kept["rows"])
    assert providers.PUBLISHED in bars["l1, float32"]
    assert providers.READ not in {name for b in bars.values() for name in b}
