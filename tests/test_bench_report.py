"""What becomes of measured rows: the machine's name, the targets, the report and its pictures."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
try:
    cases, contrast_cases, decoding, families, machine, measure = (
        importlib.import_module(name)
        for name in ("cases_token_loss", "cases_contrast", "decoding_contrast", "families",
                     "machine", "measure")
    )  # fmt: skip
    providers, contrast_providers, figures, report, targets = (
        importlib.import_module(name)
        for name in ("providers_token_loss", "providers_contrast", "figures", "report", "targets")
    )
    orthogonal_cases, orthogonal_providers = (
        importlib.import_module(name) for name in ("cases_orthogonal", "providers_orthogonal")
    )
finally:
    sys.path.remove(str(ROOT / "bench"))

MIB = 2**20


def test_every_target_is_a_case_of_the_suite():
    modules = {
        "token_loss": (cases, providers),
        "contrast": (contrast_cases, contrast_providers),
        "orthogonal": (orthogonal_cases, orthogonal_providers),
    }
    for target in targets.TARGETS:
        suite, contenders = modules[target.family]
        found = suite.cases({"cpu": "cpu", "h200": "cuda"}[target.machine])
        described = (target.op, target.mode, target.dtype, list(target.shape))
        assert any((c.op, c.mode, c.dtype_name, c.describe()["shape"]) == described for c in found)
        assert target.provider is None or target.provider in {p.name for p in contenders.PROVIDERS}


def test_the_reports_know_every_mode_and_floor():
    assert set(families.TOKEN_LOSS.modes) == set(cases.MODES)
    assert families.TOKEN_LOSS.floors == (providers.FLOOR,)
    assert set(families.CONTRAST.modes) == {*contrast_cases.MODES, decoding.Case.mode}
    floors = {contrast_providers.READ, contrast_providers.PRODUCTS, decoding.FLOOR}
    assert set(families.CONTRAST.floors) == floors
    assert set(families.ORTHOGONAL.modes) == set(orthogonal_cases.MODES)
    assert families.ORTHOGONAL.floors == (orthogonal_providers.READ,)
    assert floors | {providers.FLOOR, orthogonal_providers.READ} == figures.FLOORS
    suite = [*contrast_cases.cases("cpu"), *decoding.cases("cpu"), *orthogonal_cases.cases("cpu")]
    for case in suite:
        axes = families.FAMILIES[case.family].axes_for(case.op)
        assert len(axes) == len(case.describe()["shape"])


def test_targets_of_another_family_are_not_shown():
    shown = targets.verdicts([a_row("eager", 1000.0)], "xeon-2core")
    assert {verdict.target.family for verdict in shown} == {"token_loss"}


def test_machines_are_named_by_what_they_are():
    xeon = "Intel(R) Xeon(R) Processor @ 2.60GHz"
    flags = {"avx2", "avx512f", "amx_tile"}
    assert machine.machine_name(xeon, 2, flags, None) == "xeon-2core-avx512-amx"
    epyc = "AMD EPYC 7763 64-Core Processor"
    assert machine.machine_name(epyc, 8, {"avx2"}, None) == "epyc-7763-8core-avx2"
    assert machine.machine_name(xeon, 2, flags, "NVIDIA H200") == "h200"
    assert machine.machine_name(xeon, 2, set(), "NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"


def test_the_header_names_no_host():
    header = machine.header()
    assert header["torch"] == torch.__version__
    assert header["threads"] == torch.get_num_threads()
    assert platform.node() not in json.dumps(header).split('"')


def a_row(provider: str, ms: float, **changes: Any) -> dict[str, Any]:
    case = cases.Case("weighted", "bfloat16", *targets.BASE, "cpu")
    impl = provider.removeprefix("trimtab ") if provider.startswith("trimtab") else None
    outcome = measure.Outcome("timed", "", (ms / 1e3,) * 3, "wall", 100 * MIB, {"loss": 1e-3})
    row = {**case.describe(), "provider": provider, "impl": impl, **measure.summary(outcome)}
    row |= measure.against_floor(row, 1000.0, case.flop, case.bytes)
    return {**row, "threads": 2, "run": "first", **changes}


def verdict_of(rows: list[dict[str, Any]], quantity: str) -> Any:
    found = targets.verdicts(rows, "xeon-2core")
    return next(v for v in found if v.target.quantity == quantity and v.target.mode == "weighted")


def test_rates_follow_from_the_time():
    row = a_row("trimtab native", 2000.0)
    assert row["over_floor"] == 2.0
    assert row["floor_percent"] == 50.0
    assert row["gflops"] == pytest.approx(6 * 2048 * 1024 * 32000 / 2 / 1e9, rel=1e-3)


def test_targets_are_read_off_the_rows():
    rows = [a_row("trimtab native", 1050.0, extra_mib=150.0), a_row("trimtab reference", 900.0),
            a_row("eager", 1000.0, extra_mib=200.0, errors={"loss": 5e-4})]  # fmt: skip
    assert verdict_of(rows, targets.TIME_OVER_PRODUCTS).value == pytest.approx(1.05)
    assert verdict_of(rows, targets.TIME_OVER_PRODUCTS).met
    assert verdict_of(rows, targets.TIME_OVER_EAGER).met is False
    assert verdict_of(rows, targets.MEMORY_OVER_EAGER).value == pytest.approx((150 - 125) / 200)
    assert verdict_of(rows, targets.ERROR_OVER_EAGER).value == pytest.approx(2.0)
    half = a_row("trimtab native", 525.0, mode="half")
    found = targets.verdicts([*rows, half], "xeon-2core")
    assert next(v.value for v in found if v.target.mode == "half") == pytest.approx(0.5)


def test_rows_of_different_runs_are_not_compared():
    rows = [a_row("trimtab native", 1050.0), a_row("eager", 1000.0, run="second")]
    assert verdict_of(rows, targets.TIME_OVER_EAGER).met is None
    other_case = [a_row("trimtab native", 1050.0, mode="none")]
    assert verdict_of(other_case, targets.TIME_OVER_PRODUCTS).met is None


def test_new_rows_replace_old_ones_and_unused_runs_go():
    run = {"quick": False}
    old = report.Results({"first": run}, [a_row("eager", 9.0)], [])
    other = report.Results({"first": run}, [a_row("eager", 9.0), a_row("liger", 9.0)], [])
    new = report.Results({"second": run}, [a_row("eager", 7.0, run="second")], [])
    assert [row["p50_ms"] for row in old.merge(new).rows] == [7.0]
    assert list(old.merge(new).runs) == ["second"]
    assert list(other.merge(new).runs) == ["first", "second"]
    gone = {**a_row("eager", 1.0, run="second"), "status": "failed", "reason": "out of memory"}
    assert old.merge(report.Results({"second": run}, [], [gone])).rows == []


def test_results_are_one_line_a_row(tmp_path):
    results = report.Results({"first": {}}, [a_row("eager", 9.0), a_row("liger", 9.0)], [])
    path = tmp_path / "token_loss.json"
    path.write_text(results.dump())
    assert report.Results.load(path).rows == results.rows
    assert sum('"provider"' in line for line in path.read_text().splitlines()) == 2


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A quick benchmark of some cases, as pytest-benchmark's JSON."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/bench_token_loss.py", "--quick",
         "-p", "no:cacheprovider", "-k", "weighted-bfloat16 or rows-float32 or half-float32",
         f"--benchmark-json={path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return path, json.loads(path.read_text())


def test_the_suite_gives_pytest_benchmark_the_measured_rounds(quick_run):
    _, raw = quick_run
    names = {row["extra_info"]["provider"] for row in raw["benchmarks"]}
    assert {"eager", providers.FLOOR, "trimtab reference"} <= names
    for row in raw["benchmarks"]:
        info = row["extra_info"]
        assert row["stats"]["median"] * 1e3 == pytest.approx(info["p50_ms"], rel=1e-3, abs=1e-4)
        assert row["stats"]["rounds"] == info["rounds"]
        # Not just positive: on a busy machine the rate of a quick case rounds to 0.
        rate = info["flop"] / info["p50_ms"] / 1e6
        assert info["gflops"] == pytest.approx(rate, rel=1e-2, abs=0.051)
        assert info["commit"] == raw["machine_info"]["commit"]
    left_out = {row["provider"]: row for row in raw["left_out"]}
    assert left_out["trimtab triton"]["status"] == "not run" or torch.cuda.is_available()
    assert platform.node() not in raw["machine_info"].values()


def test_a_quick_run_is_shown_and_not_kept(quick_run, tmp_path, capsys):
    path, _ = quick_run
    assert report.main([str(path), "--out", str(tmp_path)]) == 0
    assert "nothing is kept" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_report_has_rows_tables_and_pictures(quick_run, tmp_path, capsys):
    _, raw = quick_run
    raw["machine_info"]["quick"] = False
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(raw))
    for _ in range(2):
        assert report.main([str(path), "--out", str(tmp_path / "results")]) == 0
    assert "not measured" in capsys.readouterr().out
    folder = tmp_path / "results" / raw["machine_info"]["machine"]
    kept = json.loads((folder / "token_loss.json").read_text())
    assert len(kept["rows"]) == len(raw["benchmarks"])
    assert all(row["run"] in kept["runs"] for row in [*kept["rows"], *kept["left_out"]])
    text = (folder / "token_loss.md").read_text()
    for name in ("token_loss-time.svg", "token_loss-memory.svg", "token_loss-floor.svg"):
        assert f"({name})" in text
        assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
    for row in kept["rows"]:
        assert f"| {row['provider']} |" in text
