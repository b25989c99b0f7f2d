"""The site: every number in it comes from a row, every link leads somewhere, nothing is missing."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab
from test_readme import README, snippets
from test_style import machine_traces, unanchored
from trimtab.ops import contrast, orthogonal, token_loss

CHOICES = {**token_loss.CHOICES, **contrast.CHOICES, **orthogonal.CHOICES}
ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
RESULTS = ROOT / "bench" / "results"
LINK = re.compile(r"\]\(([^)\s]+)\)")
VARIABLE = re.compile(r"""(?:environ|getenv|setenv|setdefault)\W[^\n]*?["'](TRIMTAB_[A-Z_]+)["']""")
# Algorithms that have a page are what stands in this folder, other than helpers.
HELPERS = {"__init__", "__pycache__", "causal_lm"}


@pytest.fixture
def measured(monkeypatch):
    """The script ``docs/measured.py``; other tests import other modules of these names."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("measured")


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def blocks() -> list:
    found = []
    for page in pages():
        for block in re.finditer(
            r"<!-- (rows|targets): (.*?) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL
        ):
            found.append(pytest.param(*block.groups(), id=f"{page.stem}-{block[2][:40]}"))
    return found


def rows_of(**fields: str) -> list[dict]:
    files = [json.loads(path.read_text()) for path in RESULTS.glob("*/*.json")]
    rows = [row for file in files for row in file["rows"]]
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


# --- numbers in prose ---


SECTIONS = {"Token loss": "token_loss", "Contrast": "contrast", "Orthogonality": "orthogonal"}


def unsupported_times(text: str) -> tuple[list[str], int]:
    """Times that no median of the section's family rounds to, and how many were looked at."""
    wrong, looked, rows = [], 0, rows_of()
    _, *parts = re.split(r"^(#+ .*)$", text, flags=re.MULTILINE)
    for head, body in zip(parts[::2], parts[1::2], strict=True):
        if head.startswith("## "):
            family = SECTIONS.get(head[3:])
            rows = rows_of() if family is None else rows_of(family=family)
        times = [row["p50_ms"] for row in rows]
        for number in () if "GPU" in head else re.findall(r"(\d+(?:\.\d+)?) ms\b", body):
            digits, looked = len(number.partition(".")[2]), looked + 1
            if not any(round(time, digits) == float(number) for time in times):
                wrong.append(f"{head}: {number} ms")
    return wrong, looked


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_every_time_on_a_cpu_is_a_rows(page):
    """To the digits that the text gives; what is said of GPUs is said to be a prediction."""
    wrong, looked = unsupported_times((ROOT / page).read_text())
    assert (wrong, looked > 5) == ([], True)


def test_a_time_of_no_row_is_found():
    text = "## Contrast\n\n### CPU\n\nIt takes 123456.7 ms.\n\n### GPU\n\nPrediction: 0.123 ms.\n"
    assert unsupported_times(text) == (["### CPU: 123456.7 ms"], 1)


def test_the_table_of_costs_is_what_the_script_prints(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    table = importlib.import_module("scaling").table(8192)
    assert table in (DOCS / "scaling.md").read_text()


# --- generated blocks ---


def test_blocks_are_up_to_date(measured):
    stale = [page.name for page in pages() if measured.filled(page.read_text()) != page.read_text()]
    assert stale == [], "run python docs/measured.py"


def test_pictures_are_up_to_date(measured, tmp_path):
    wanted = {
        picture.picture: measured.texts_of(picture.draw(tmp_path))
        for page in pages() for picture in measured.pictures(page.read_text())
    }  # fmt: skip
    found = {path.name: measured.texts_of(path) for path in (DOCS / "figures").glob("*.svg")}
    assert found == wanted, "run python docs/measured.py"
    assert all(found.values())


def unsupported(options: str, text: str) -> list[str]:
    """Cells of a block's tables with a number that no row of that operator and mode has."""
    op = re.search(r"op=(\S+)", options)[1]
    wrong, mode, heads = [], None, []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            mode, heads = cells[0].strip("`"), cells[1:]
        elif line.startswith("| "):
            for i, cell in enumerate(cells[1:]):
                dtype = heads[i - i % 2].split(",")[0]
                field = "extra_mib" if i % 2 else "p50_ms"
                rows = rows_of(op=op, mode=mode, dtype=dtype, provider=cells[0])
                values = [row[field] for row in rows if row[field] is not None]
                if cell and not any(agree(float(cell), value) for value in values):
                    wrong.append(f"{mode}, {cells[0]}: {cell}")
    return wrong


def agree(shown: float, value: float) -> bool:
    """Three digits are shown, or all before the point."""
    return abs(shown - value) <= max(0.5 if value >= 999.5 else 0.0, 0.0051 * abs(value))


@pytest.mark.parametrize(("kind", "options", "text"), blocks())
def test_every_number_has_its_row(kind, options, text):
    if kind == "rows":
        assert "| `" in text, "a block without a table"
        assert unsupported(options, text) == []
        op = re.search(r"op=(\S+)", options)[1]
        for picture in re.findall(r"\(\.\./figures/(\S+)\)", text):
            assert unsupported_in_picture(op, (DOCS / "figures" / picture).read_text()) == []
    else:
        family = re.search(r"family=(\S+)", options)[1]
        report = "\n".join(path.read_text() for path in RESULTS.glob(f"*/{family}.md"))
        table = [line for line in text.splitlines() if line.startswith("| ")]
        assert table
        assert [line for line in table if line not in report] == []


def unsupported_in_picture(op: str, svg: str) -> list[str]:
    """Labels of bars that no row of the operator has."""
    values = [row[field] for row in rows_of(op=op) for field in ("p50_ms", "extra_mib")]
    labels = re.findall(r"<text[^>]*font-size: 7px[^>]*>\s*([\d.]+)\s*</text>", svg)
    assert labels, "a picture without numbers"
    return [
        label for label in labels
        if not any(value is not None and agree(float(label), value) for value in values)
    ]  # fmt: skip


def test_a_number_without_a_row_is_found():
    table = "| `weighted` | bfloat16, ms | extra MiB |\n|---|---|---|\n| eager | {} | 309 |\n"
    row = rows_of(op="linear_cross_entropy", mode="weighted", dtype="bfloat16", provider="eager")[0]
    right = f"{row['p50_ms']:.3g}"
    options = "op=linear_cross_entropy modes=weighted"
    assert unsupported(options, table.format(right)) == []
    assert unsupported(options, table.format("123")) == ["weighted, eager: 123"]
    svg = '<text style="font-size: 7px x">{}</text>'
    assert unsupported_in_picture("linear_cross_entropy", svg.format(right)) == []
    assert unsupported_in_picture("linear_cross_entropy", svg.format("0.123")) == ["0.123"]


def test_what_is_stale_is_named_and_made_anew(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "DOCS", tmp_path)
    (tmp_path / "ops").mkdir()
    page = tmp_path / "ops" / "cross_entropy.md"
    page.write_text((DOCS / "ops" / page.name).read_text().replace("| eager | ", "| eager | 1"))
    assert measured.main(["--check"]) == 1
    assert "cross_entropy.md" in capsys.readouterr().err
    assert not (tmp_path / "figures").exists()
    assert measured.main([]) == 0
    assert page.read_text() == (DOCS / "ops" / page.name).read_text()
    assert measured.main(["--check"]) == 0
    (picture,) = (tmp_path / "figures").glob("*.svg")
    picture.write_text(picture.read_text().replace(">eager<", ">other<"))
    assert measured.main(["--check"]) == 1
    assert picture.name in capsys.readouterr().err


# --- completeness ---


def nav_pages() -> set[str]:
    """The pages that the navigation names; the file has tags, so it is not parsed as YAML."""
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n", 1)[1]
    return set(re.findall(r"\S+\.md\b", nav))


def test_every_page_is_in_the_navigation():
    assert nav_pages() == {page.relative_to(DOCS).as_posix() for page in pages()}


def test_every_operator_has_its_page():
    found = {page.stem for page in (DOCS / "ops").glob("*.md")} - {"index"}
    assert found == set(CHOICES)
    for op in found:
        page, home = (DOCS / "ops" / f"{op}.md").read_text(), CHOICES[op][0].__module__
        assert f"::: {home}.{op}\n" in page
        assert f"]({op}.md)" in (DOCS / "ops" / "index.md").read_text()
        for heading in ("## Speed and memory", "## Limits", "## Formula, cost, arguments"):
            assert heading in page


def test_every_algorithm_has_its_page():
    folder = ROOT / "python" / "trimtab" / "algorithms"
    names = {path.stem for path in folder.iterdir()} - HELPERS
    assert {page.stem for page in (DOCS / "algorithms").glob("*.md")} - {"index"} == names
    for name in names:
        page = (DOCS / "algorithms" / f"{name}.md").read_text()
        for heading in ("## The method", "## Recipe", "## Result", "## Reference"):
            assert heading in page


def test_every_public_name_is_rendered():
    rendered = set(re.findall(r"^::: (\S+)", "\n".join(p.read_text() for p in pages()), re.M))
    last = {name.rsplit(".", 1)[-1] for name in rendered}
    constants = {"HELPFUL_PROMPT", "SAFETY_PROMPT", "__version__"}
    assert set(trimtab.__all__) - last - constants == set()


def test_every_environment_variable_is_on_its_page():
    files = [ROOT / "setup.py", ROOT / "Makefile"]
    for folder in ("python", "bench", "csrc", "triton_kernels"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".h", ".cpp", ".cu")]
    used = {name for path in files for name in VARIABLE.findall(path.read_text())}
    page = (DOCS / "environment.md").read_text()
    assert {"TRIMTAB_IMPL", "TRIMTAB_CHECK", "TRIMTAB_CPU_ISA", "TRIMTAB_BUILD"} <= used
    assert used == set(re.findall(r"^\| `(TRIMTAB_[A-Z_]+)", page, re.M))


def test_the_pages_keep_the_rules_for_texts():
    texts = [*pages(), ROOT / "mkdocs.yml", ROOT / "CITATION.cff", *ROOT.glob(".github/*/*")]
    assert {p.name: found for p in texts if (found := machine_traces(p.read_text()))} == {}
    assert {p.name: found for p in texts if (found := unanchored(p.read_text()))} == {}


# --- links ---


def broken_links(page: Path, text: str) -> list[str]:
    links = [link for link in LINK.findall(text) if not re.match(r"https?:|mailto:", link)]
    return [link for link in links if not leads_somewhere(page, link)]


def leads_somewhere(page: Path, link: str) -> bool:
    target, _, anchor = link.partition("#")
    path = (page.parent / target) if target else page
    if not path.exists() or not anchor or path.suffix != ".md":
        return path.exists()
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    anchors = {re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-") for heading in headings}
    return anchor in anchors


@pytest.mark.parametrize("page", [*pages(), *sorted(ROOT.glob("*.md"))], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_found():
    page = DOCS / "index.md"
    text = "[a](environment.md) [b](nowhere.md) [c](ops/index.md#limits) [d](https://x.y)"
    assert broken_links(page, text) == ["nowhere.md", "ops/index.md#limits"]


# --- snippets, and the site itself ---


def own_snippets() -> list:
    """The Python of the pages, other than what the README has."""
    known = README.read_text()
    return [
        pytest.param(source, id=f"{page.stem}-line-{line}")
        for page in pages() for line, source in snippets(page.read_text())
        if source not in known
    ]  # fmt: skip


@pytest.mark.parametrize("source", own_snippets())
def test_a_snippet_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "snippet", "exec"), {"__name__": "snippet"})


def test_links_out_of_the_docs_lead_back_in(monkeypatch):
    pytest.importorskip("mkdocs", reason="make docs installs it")
    monkeypatch.syspath_prepend(str(DOCS / "tools"))
    hooks = importlib.import_module("links")
    text = "[rows](../../bench/results/m/f.md) [how](../../CONTRIBUTING.md) [near](x.md) [#](#a)"
    assert hooks.rewrite(text, "ops/op.md") == (
        "[rows](../results/m/f.md) [how](../contributing.md) [near](x.md) [#](#a)"
    )


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings_handlers", reason="make docs installs it")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    page = (tmp_path / "ops" / "linear_cross_entropy.html").read_text()
    assert "::</p>" not in page
    assert "<code>(V, D)</code>; the head" in page  # what the signature's comment tells
    remote = re.compile(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?https?://""")
    assert [p.name for p in tmp_path.rglob("*.html") if remote.search(p.read_text())] == []
