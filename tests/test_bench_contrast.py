"""The contrast benchmark's own arithmetic: truth, judges, floors, contenders, report. No times."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import trimtab
from trimtab.testing import BudgetError

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
try:
    cases, decoding, figures, measure, providers = (
        importlib.import_module(name)
        for name in ("cases_contrast", "decoding_contrast", "figures", "measure",
                     "providers_contrast")
    )  # fmt: skip
    report, targets, truths = (
        importlib.import_module(name) for name in ("report", "targets", "truth_contrast")
    )
finally:
    sys.path.remove(str(ROOT / "bench"))

DRAWS = [name for name, mode in cases.MODES.items() if mode.draws]
VALUES = [name for name, mode in cases.MODES.items() if not mode.draws]
FILTERED = [name for name in DRAWS if cases.MODES[name].filters.temperature != 0.0]
DTYPES = ("float32", "bfloat16")
CHAIN = "Hugging Face chain"


def small(mode: str, dtype: str = "float32") -> Any:
    return cases.Case(
        mode, dtype, (24, 16, 700) if cases.MODES[mode].products else (24, 700), "cpu"
    )


def provider(name: str) -> Any:
    return next(p for p in providers.PROVIDERS if p.name == name)


def exactly(inputs: Any) -> Any:
    """The inputs in float64."""
    return inputs.map(lambda t: t.detach().double().requires_grad_(t.requires_grad))


def judgement(case: Any) -> tuple[Any, Any, Any]:
    inputs = cases.make_inputs(case)
    draw = truths.exact_draw(case, inputs)
    return inputs, draw, truths.judge_draw(case, inputs, draw)


def results_of(name: str, case: Any, inputs: Any) -> dict[str, torch.Tensor]:
    who = provider(name)
    results = dict(who.step(case)(inputs))
    return results | (who.probe(case)(inputs) if who.probe else {})


# Data and truth


def test_logits_look_like_a_language_models():
    case = cases.Case("topk_topp", "float32", (16, 32000), "cpu")
    inputs = cases.make_inputs(case)
    spread = inputs.positive.std(-1)
    assert 1.5 < float(spread.min()) < 2.2
    assert 2.8 < float(spread.max()) < 3.6
    top = inputs.positive.softmax(-1).amax(-1)
    assert float(top.min()) < 0.2
    assert float(top.max()) > 0.5
    pair = torch.stack([inputs.positive[0], inputs.negative[0]])
    assert 0.85 < float(torch.corrcoef(pair)[0, 1]) < 0.98
    flat = cases.make_inputs(case._replace(mode="flat"))
    assert float(flat.positive.softmax(-1).amax()) < 0.01


def test_copies_share_nothing_and_the_data_is_the_same_again():
    case = small("logp")
    inputs, again = cases.make_inputs(case), cases.make_inputs(case)
    assert torch.equal(inputs.positive, again.positive)
    copied = inputs.copy()
    assert copied.negative.requires_grad
    assert torch.equal(copied.negative, inputs.negative)
    assert copied.negative.data_ptr() != inputs.negative.data_ptr()


@pytest.mark.parametrize("mode", VALUES)
def test_the_truth_is_what_eager_gives_in_float64(mode):
    case = small(mode)
    inputs = cases.make_inputs(case)
    found = truths.sample(case, inputs, provider("eager").step(case)(exactly(inputs)))
    exact = truths.truth(case, inputs)
    assert set(found) == set(exact)
    for name, value in exact.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("mode", "name"),
    [(mode, name) for mode in FILTERED for name in ("eager", CHAIN, "VCD recipe")
     if provider(name).concerns(small(mode)) and provider(name).why_not(small(mode)) is None],
)  # fmt: skip
def test_the_distribution_is_that_of_everybody_in_float64(mode, name):
    case, who = small(mode), provider(name)
    inputs = exactly(cases.make_inputs(case))
    draw = truths.exact_draw(case._replace(dtype_name="float64"), inputs)
    found = who.probe(case)(inputs)["probability"]
    assert torch.equal(found > 0, draw.kept)
    torch.testing.assert_close(found, draw.logp.exp(), rtol=1e-9, atol=1e-12)


def test_flat_logits_keep_many_tokens_and_peaked_ones_few():
    def kept(mode: str) -> torch.Tensor:
        case = cases.Case(mode, "float32", (8, 32000), "cpu")
        return truths.exact_draw(case, cases.make_inputs(case)).kept.sum(-1)

    assert int(kept("flat_topp").min()) > 5000
    assert int(kept("topp").median()) < 500
    assert int(kept("topk_topp").max()) <= 50


def test_ties_at_the_edge_of_the_nucleus_are_unclear():
    filters = cases.Filters(top_p=0.5)
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    kept, unclear = truths.support(logits, filters)
    # Cumulated from below 1/4, 2/4, ...: as in the warper, what reaches 1/2 exactly goes too.
    assert kept.tolist() == [[False, False, True, True], [True, False, False, False]]
    assert unclear.tolist() == [[True] * 4, [False] * 4]


# Work and floors


@pytest.mark.parametrize("mode", [m for m in cases.MODES if cases.MODES[m].products])
def test_the_floor_makes_the_products_that_are_counted(mode):
    case = small(mode)
    inputs = cases.make_inputs(case)
    assert providers.floor_of(case) == providers.PRODUCTS
    with FlopCounterMode(display=False) as counter:
        provider(providers.PRODUCTS).step(case)(inputs)
    assert counter.get_total_flops() == case.flop


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["topk_topp", "three_rows", "logits", "logp"])
def test_the_floor_reads_every_element(mode, dtype):
    case = small(mode, dtype)
    inputs = cases.make_inputs(case)
    assert providers.floor_of(case) == providers.READ
    read = provider(providers.READ).step(case)
    for row in (t for t in inputs[:3] if t is not None):
        # Two columns: of two 16-bit numbers in one integer the second decides.
        for i, columns in ((0, slice(0, 2)), (11, slice(350, 352)), (23, slice(698, 700))):
            before = {name: v.clone() for name, v in read(inputs).items()}
            with torch.no_grad():
                kept = row[i, columns].clone()
                row[i, columns] = float("nan")  # whose bits are above those of every number
                changed = read(inputs)
                row[i, columns] = kept
            assert any(not torch.equal(before[name], changed[name]) for name in before)


def test_bytes_are_one_read_of_the_inputs_and_one_write_of_the_results():
    b, v = 24, 700
    assert small("topk_topp").bytes == 4 * 2 * b * v
    assert small("three_rows", "bfloat16").bytes == 2 * 3 * b * v
    assert small("logits", "bfloat16").bytes == 2 * 2 * b * v + 4 * b * v
    assert small("logp").bytes == 2 * 4 * 2 * b * v
    assert small("linear_logp").bytes == 4 * (2 * b * 16 + v * 16)
    assert small("linear_logp_grad").bytes == 2 * 4 * (2 * b * 16 + v * 16)


def test_no_case_is_measured_twice():
    for device in ("cpu", "cuda"):
        ids = [case.id for case in cases.cases(device)]
        assert len(set(ids)) == len(ids)
        shapes = [c.shape for c in cases.cases(device) if c.op == "contrastive_sample"]
        assert len({shape[0] for shape in shapes}) >= 4
        assert len({shape[1] for shape in shapes}) >= 4


def test_whoever_does_not_run_says_why():
    for who in [*providers.PROVIDERS, *decoding.PROVIDERS]:
        suite = decoding.cases("cpu") if who in decoding.PROVIDERS else cases.cases("cpu")
        for case in filter(who.concerns, suite):
            reason = who.reason(case, full=False)
            assert reason is None or len(reason) > 10
    assert "never timed" in provider("trimtab triton").reason(small("topk_topp"), full=True)
    assert "not installed" in provider("vllm").reason(small("topk_topp"), full=True)


# The judges


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", DRAWS)
def test_every_right_sampler_passes(mode, dtype):
    case = small(mode, dtype)
    inputs, _, judge = judgement(case)
    eager = results_of("eager", case, inputs)
    judge(eager, None)
    passed = {"eager"}
    for who in providers.PROVIDERS:
        usable = who.checked and not who.compiles and who.concerns(case)
        if usable and who.reason(case, full=True) is None:
            errors = judge(results_of(who.name, case, inputs), eager)
            assert all(0.0 <= error < 0.2 for error in errors.values())
            passed.add(who.name)
    assert {"eager", "trimtab reference"} <= passed
    assert passed & {CHAIN, "VCD recipe"} or mode == "three_rows"


def wrong_cases() -> list[Any]:
    """Name -> what a sampler that forgets something does, on the inputs or the filters."""
    swapped = lambda inputs: inputs._replace(positive=inputs.negative, negative=inputs.positive)  # noqa: E731
    plain = lambda inputs: inputs._replace(negative=inputs.positive)  # noqa: E731
    return [
        pytest.param("topk_topp", {"top_p": None}, None, id="top-p dropped"),
        pytest.param("topk_topp", {"top_k": 40}, None, id="top-k of another size"),
        pytest.param("topp", {"top_p": 0.85}, None, id="another top-p"),
        pytest.param("minp", {"min_p": 0.1}, None, id="another min-p"),
        pytest.param("all", {"temperature": 1.0}, None, id="temperature dropped"),
        pytest.param("all", {"min_p": None}, None, id="min-p dropped"),
        pytest.param("flat_topp", {"top_p": 0.89}, None, id="another nucleus, flat"),
        pytest.param("free", {}, swapped, id="rows swapped"),
        pytest.param("free", {}, plain, id="no contrast"),
        pytest.param("plausible", {"plausibility": 0.05}, None, id="another mask"),
    ]


@pytest.mark.parametrize(("mode", "filters", "change"), wrong_cases())
def test_a_wrong_distribution_does_not_pass(mode, filters, change, monkeypatch):
    case = small(mode)
    inputs, _, judge = judgement(case)
    eager = results_of("eager", case, inputs)
    about = cases.MODES[mode]
    wrong = about._replace(filters=about.filters._replace(**filters))
    with monkeypatch.context() as patch:
        patch.setitem(cases.MODES, mode, wrong)
        results = results_of("eager", case, inputs if change is None else change(inputs))
    # The draw may be right by luck; the distribution is not.
    results["token"] = eager["token"]
    with pytest.raises(BudgetError, match="distribution"):
        judge(results, eager)


@pytest.mark.parametrize("how", ["token", "seed", "kept", "logp", "outside", "shape"])
def test_ours_is_judged_by_token_support_and_probability(how):
    case = small("topk_topp")
    inputs, draw, judge = judgement(case)
    eager = results_of("eager", case, inputs)
    right = results_of("trimtab reference", case, inputs)
    assert judge(right, eager)["probability"] < 1e-6
    wrong = {name: value.clone() for name, value in right.items()}
    if how == "token":
        others = draw.kept.scatter(1, right["token"][:, None], False)
        wrong["token"][-1] = others[-1].nonzero()[0, 0]
    elif how == "seed":
        arguments = truths.sampling_arguments(case.about.filters) | {"seed": 3}
        wrong = trimtab.contrastive_sample(
            inputs.positive, inputs.negative, alpha=cases.ALPHA, **arguments, impl="reference"
        )._asdict()
    elif how == "kept":
        wrong["kept"][3] += 1
    elif how == "logp":
        wrong["logp"][5] *= 1 + 1e-4
    elif how == "outside":
        wrong["token"][0] = draw.s[0].argmin()
    elif how == "shape":
        wrong["token"] = wrong["token"][:-1]
    with pytest.raises(BudgetError):
        judge(wrong, eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_below_the_support_does_not_pass(dtype):
    case = small("topk_topp", dtype)
    inputs, draw, judge = judgement(case)
    eager = results_of("eager", case, inputs)
    assert judge({"token": eager["token"]}, eager) == {}
    worst = eager["token"].clone()
    worst[7] = draw.s[7].argmin()
    with pytest.raises(BudgetError, match="below the support"):
        judge({"token": worst}, eager)


def test_an_implausible_token_does_not_pass():
    """The contrast likes it best, the mask forbids it."""
    case = small("greedy")
    inputs = cases.make_inputs(case)
    inputs.positive[2, 9] = inputs.positive[2].amax() - 4.0
    inputs.negative[2, 9] = -40.0
    judge = truths.judge_draw(case, inputs, truths.exact_draw(case, inputs))
    eager = results_of("eager", case, inputs)
    judge(eager, eager)
    unmasked = inputs.positive + cases.ALPHA * (inputs.positive - inputs.negative)
    assert int(unmasked[2].argmax()) == 9
    with pytest.raises(BudgetError, match="below the support"):
        judge({"token": unmasked.argmax(-1)}, eager)


def test_greedy_ours_takes_the_first_of_equals():
    case = small("greedy")
    inputs = cases.make_inputs(case)
    for row in (inputs.positive, inputs.negative):
        row[:, 5] = row[:, 300] = 30.0
    judge = truths.judge_draw(case, inputs, truths.exact_draw(case, inputs))
    right = results_of("trimtab reference", case, inputs)
    assert judge(right, None) == {"shortfall": 0.0}
    assert judge({"token": torch.full((24,), 300)}, None) == {"shortfall": 0.0}
    with pytest.raises(BudgetError, match="first"):
        judge(right | {"token": torch.full((24,), 300)}, None)


# Peers that need a GPU, on stand-ins of their samplers


def a_draw(logits: torch.Tensor, k: int | None, p: float | None, order: str = "") -> torch.Tensor:
    assert order in ("", "top_k_first")
    kept, _ = truths.support(logits, cases.Filters(top_k=k, top_p=p))
    masked = logits.masked_fill(~kept, -torch.inf)
    return torch.multinomial(masked.softmax(-1), 1).squeeze(1)


@pytest.fixture
def stand_ins(monkeypatch):
    """Modules with the calls that FlashInfer and vLLM document."""
    sampling = types.ModuleType("flashinfer.sampling")
    sampling.softmax = lambda z, temperature=None: (z / (temperature or 1.0)).softmax(-1)
    sampling.sampling_from_logits = lambda z: a_draw(z, None, None)
    sampling.top_p_sampling_from_probs = lambda p, top_p: a_draw(p.log(), None, top_p)
    sampling.min_p_sampling_from_probs = lambda p, m: torch.multinomial(
        p.masked_fill(p < m * p.amax(-1, keepdim=True), 0.0), 1
    ).squeeze(1)
    sampling.top_k_top_p_sampling_from_logits = lambda z, k, p, filter_apply_order: a_draw(
        z, k, p, filter_apply_order
    )
    flashinfer = types.ModuleType("flashinfer")
    flashinfer.sampling = sampling
    modules = {"flashinfer": flashinfer, "flashinfer.sampling": sampling}
    for name in ("vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.ops"):
        modules[name] = types.ModuleType(name)
    sampler = types.ModuleType("vllm.v1.sample.ops.topk_topp_sampler")
    sampler.random_sample = lambda p, generators: torch.multinomial(p, 1).squeeze(1)
    kernel = types.ModuleType("vllm.v1.sample.ops.topk_topp_triton")

    def mask(z: torch.Tensor, k: Any, p: Any) -> torch.Tensor:
        assert z.dtype == torch.float32
        filters = cases.Filters(top_k=None if k is None else int(k[0]),
                                top_p=None if p is None else float(p[0]))  # fmt: skip
        return z.masked_fill(~truths.support(z, filters)[0], -torch.inf)

    kernel.apply_top_k_top_p_triton = mask
    modules |= {sampler.__name__: sampler, kernel.__name__: kernel}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("name", "mode"),
    [*(("flashinfer", mode) for mode in ("free", "topp", "minp", "topk_topp", "flat")),
     *(("vllm", mode) for mode in ("topp", "topk_topp", "linear_topk_topp"))],
)  # fmt: skip
def test_samplers_of_serving_engines_are_called_as_documented(name, mode):
    case = small(mode, "bfloat16")
    assert {"flashinfer": providers._flashinfer_takes, "vllm": providers._vllm_takes}[name](case)
    inputs, _, judge = judgement(case)
    eager = results_of("eager", case, inputs)
    assert judge(results_of(name, case, inputs), eager) == {}


# Targets and report


def a_row(mode: str, name: str, ms: float, **changes: Any) -> dict[str, Any]:
    case = cases.Case(mode, "bfloat16", targets.ROWS, "cpu")
    outcome = measure.Outcome("timed", "", (ms / 1e3,) * 3, "wall", 2**20, {"probability": 1e-6})
    impl = name.removeprefix("trimtab ") if name.startswith("trimtab") else None
    row = {**case.describe(), "provider": name, "impl": impl, **measure.summary(outcome)}
    row |= measure.against_floor(row, 0.5, case.flop, case.bytes)
    return {**row, "threads": 2, "run": "first", **changes}


def test_targets_are_read_off_the_rows():
    rows = [a_row("topk_topp", "trimtab native", 3.0), a_row("topk_topp", CHAIN, 120.0),
            a_row("topk_topp", "trimtab reference", 1.0),
            a_row("greedy", "trimtab native", 2.5)]  # fmt: skip
    found = {(v.target.mode, v.target.dtype): v for v in targets.verdicts(rows, "xeon-2core")}
    assert len(found) == 4
    assert found["topk_topp", "bfloat16"].value == pytest.approx(3 / 120)
    assert found["topk_topp", "bfloat16"].met
    assert found["greedy", "bfloat16"].value == pytest.approx(5.0)
    assert found["greedy", "bfloat16"].met is False
    assert found["greedy", "float32"].met is None


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> dict[str, Any]:
    """A quick benchmark of some cases, as pytest-benchmark's JSON."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/bench_contrast.py", "--quick",
         "-p", "no:cacheprovider", f"--benchmark-json={path}", "-k",
         "(topk_topp or greedy or linear_logp or logits or self_cd) and not bfloat16"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(path.read_text())


def test_the_suite_measures_ops_and_generation(quick_run):
    rows = [row["extra_info"] for row in quick_run["benchmarks"]]
    by_mode = {mode: {r["provider"] for r in rows if r["mode"] == mode}
               for mode in {r["mode"] for r in rows}}  # fmt: skip
    assert {"eager", "one read", "trimtab reference", CHAIN} <= by_mode["topk_topp"]
    assert {"eager", "VCD recipe"} <= by_mode["greedy"]
    assert {"eager", "products alone"} <= by_mode["linear_logp"]
    assert {"released loop", "forwards alone", "Hugging Face guidance"} <= by_mode["self_cd"]
    for row in rows:
        if row["mode"] == "self_cd":
            assert row["tokens_per_s"] == pytest.approx(1e3 / row["p50_ms"], rel=1e-2)
            assert row["timing"] == "wall"
        assert row["commit"] == quick_run["machine_info"]["commit"]
    left_out = {row["provider"]: row["reason"] for row in quick_run["left_out"]}
    assert "not installed" in left_out["flashinfer"]
    assert quick_run["machine_info"]["peers"]["transformers"]


def test_the_report_has_targets_tables_and_pictures(quick_run, tmp_path, capsys):
    quick_run["machine_info"]["quick"] = False
    for row in [r["extra_info"] for r in quick_run["benchmarks"]]:
        # As if measured at the shape of the targets.
        if row["mode"] == "greedy":
            row["shape"] = list(targets.ROWS)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(quick_run))
    assert report.main([str(path), "--out", str(tmp_path / "results")]) == 0
    capsys.readouterr()
    folder = tmp_path / "results" / quick_run["machine_info"]["machine"]
    kept = json.loads((folder / "contrast.json").read_text())
    assert len(kept["rows"]) == len(quick_run["benchmarks"])
    text = (folder / "contrast.md").read_text()
    assert "| B x prompt x new tokens | provider | ms (p20 to p80) | x floor | tokens/s |" in text
    assert "| B x V | provider | ms (p20 to p80) | x floor | GB/s |" in text
    assert "- released loop, 3 x 12 x 6: timed on the first 6 tokens of one sequence" in text
    assert "time over the Hugging Face chain's" in text
    assert "linear_cross_entropy" not in text
    for name in ("contrast-time.svg", "contrast-memory.svg", "contrast-floor.svg"):
        assert f"({name})" in text
        assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
    assert ">B 6<" in (folder / "contrast-time.svg").read_text()
    bars = figures.bars(kept["rows"])
    assert CHAIN in bars["topk_topp, float32"]
    assert not {"one read", "products alone", "forwards alone"} & {
        n for b in bars.values() for n in b
    }
