"""The demo: its options, its page and numbers, and what it says about them."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from trimtab import demo
from trimtab.demo import laws, report, section, speed, verdict
from trimtab.demo.sections import SECTIONS


class Run(NamedTuple):
    folder: Path
    printed: str
    numbers: dict
    page: str


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert demo.main(["--quick", "--threads", "1", "--out", str(folder)]) == 0
    numbers = json.loads((folder / "numbers.json").read_text("utf-8"))
    page = (folder / "report.html").read_text("utf-8")
    return Run(folder, printed.getvalue(), numbers, page)


# The page


def test_the_page_needs_nothing_from_outside(quick: Run):
    sources = re.findall(r'src="([^"]*)"', quick.page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', quick.page))
    for word in ("<link", "<script", "@import", "url(", "http"):
        assert word not in quick.page, word


def test_every_picture_is_in_the_page(quick: Run):
    pictures = sorted(quick.folder.glob("*.png"))
    assert len(pictures) >= 6
    for path in pictures:
        assert base64.b64encode(path.read_bytes()).decode("ascii") in quick.page, path.name


def test_every_section_is_in_the_contents(quick: Run):
    for key, one in SECTIONS.items():
        assert f'<a href="#{key}">' in quick.page
        assert f'<h2 id="{key}">' in quick.page
        assert one.title in quick.printed


def test_the_page_ends_what_it_opens(quick: Run):
    for tag in ("section", "table", "figure", "details", "tr", "div", "p"):
        opened = len(re.findall(rf"<{tag}[ >]", quick.page))
        assert opened == quick.page.count(f"</{tag}>"), tag


def test_text_of_the_library_cannot_become_markup():
    table = section.Table("<i>", ["a<b"], [["<script>"]])
    page = report._block(table) + report._block(section.Paragraph("<script>"))
    assert "<script>" not in page
    assert "<i>" not in page
    assert "a&lt;b" in page


# The numbers


def test_the_table_on_the_terminal_shows_the_numbers_in_the_file(quick: Run):
    held_out = quick.numbers["sections"]["salience"]["held_out"]
    rows = 0
    for split, found in held_out.items():
        for task, scores in found.items():
            line = next(
                line
                for line in quick.printed.splitlines()
                if re.match(rf"  {split} +{task} ", line)
            )
            shown = [scores[law] for law in laws.LAWS if law != laws.COMPUTE]
            cells = line.split()[-8:]
            assert cells[4:] == [f"{score['mse']:.5f}" for score in shown]
            # What is not finite is null in the file.
            for cell, score in zip(cells[:4], shown, strict=True):
                if score["r2"] is None:
                    assert not math.isfinite(float(cell))
                else:
                    assert cell == f"{score['r2']:.3f}"
            rows += 1
    assert rows == 12


def test_comparisons_are_of_the_scores_in_the_file(quick: Run):
    found = quick.numbers["sections"]["salience"]
    assert len(found["checkpoints"]) == 2 * 2 * 3
    for other, pairs in found["salience_against"].items():
        assert len(pairs) == 2
        for law, duels in zip(laws.SALIENCES, pairs.values(), strict=True):
            assert len(duels) == 12
            for duel in duels:
                scores = found["held_out"][duel["split"]][duel["task"]]
                assert duel["ours"] == scores[law]["mse"]
                assert duel["other"] == scores[other]["mse"]
    for checkpoint in found["checkpoints"]:
        assert all(0.0 <= a <= 1.0 for a in checkpoint["accuracy"].values())


def test_verdicts_are_on_the_page_and_on_the_terminal(quick: Run):
    flat = " ".join(quick.printed.split())
    for sentence in quick.numbers["sections"]["salience"]["verdict"]:
        assert " ".join(sentence.split()) in flat
        assert sentence.replace("'", "&#x27;") in quick.page


def test_models_learn(quick: Run):
    checkpoints = quick.numbers["sections"]["salience"]["checkpoints"]
    first, last = checkpoints[0], checkpoints[2]
    assert (first["mixture"], last["mixture"]) == ("prose", "prose")
    assert last["loss"]["prose"] < first["loss"]["prose"] - 0.2


def test_memory_and_error_of_the_loss(quick: Run):
    for both in quick.numbers["sections"]["speed"]["loss"].values():
        assert both["trimtab"]["extra_bytes"] < both["eager PyTorch"]["extra_bytes"]
        assert both["trimtab"]["over_budget"] == []


# Options


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[section.Context]:
    """Sections replaced by two that only look at their context."""
    contexts: list[section.Context] = []

    def look(key: str) -> section.Section:
        def run(context: section.Context) -> section.Result:
            contexts.append(context)
            return section.Result([key], section.Table("", ["x"], [["1"]]), [], {"key": key})

        return section.Section(key, key, run)

    monkeypatch.setattr("trimtab.demo.sections.SECTIONS", {k: look(k) for k in ("one", "two")})
    return contexts


def test_options_reach_the_sections(tiny: list[section.Context], tmp_path: Path):
    before = torch.get_num_threads()
    arguments = ["--sections", "two", "--seed", "7", "--threads", "1", "--out", str(tmp_path)]
    assert demo.main(arguments) == 0
    (context,) = tiny
    assert (context.seed, context.out, context.settings) == (7, tmp_path, section.FULL)
    assert torch.get_num_threads() == before
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert list(numbers["sections"]) == ["two"]
    assert numbers["machine"]["threads"].startswith("1 of")
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    assert [c.settings for c in tiny[1:]] == [section.QUICK] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sections", "salience,nothing"], "got nothing"),
        (["--threads", "0"], "must be at least 1, got 0"),
        (["--seed", "-1"], "must be at least 0, got -1"),
        (["--seed", "x"], "invalid number value: 'x'"),
    ],
)
def test_a_wrong_option_is_an_error(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    find = importlib.util.find_spec
    absent = ("tokenizers", "tqdm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in absent else find(n))
    assert demo.main(["--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.strip() == "trimtab demo needs tokenizers, tqdm; pip install 'trimtab[demo]'"
    assert not (tmp_path / "none").exists()


def test_no_library_source_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "empty"))
    assert demo.main(["--quick", "--out", str(tmp_path / "out")]) == 2
    assert "the standard library's source is not in" in capsys.readouterr().err


# What it says


def duels(*confidences: float, ours: float = 1.0, other: float = 2.0) -> list[verdict.Duel]:
    return [
        verdict.Duel("an unseen run", f"t{i}", ours, other, confidence)
        for i, confidence in enumerate(confidences)
    ]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (duels(1.0, 1.0, 1.0, 0.5), "predicts held-out models better than the mean loss."),
        (duels(1.0, 0.5, 0.5, 0.5), "is ahead of the mean loss"),
        (duels(0.5, 0.5, 0.5, 0.5), "no winner"),
        (duels(1.0, 0.0, 0.5, 0.5), "no winner"),
        (duels(0.0, 0.5, 0.5, 0.5), "is behind the mean loss"),
        (duels(0.0, 0.0, 0.0, 0.5), "predicts held-out models worse than the mean loss."),
    ],
)
def test_the_verdict_follows_the_numbers(found: list[verdict.Duel], words: str):
    assert words in verdict.verdict("It", "the mean loss", found)


def test_the_verdict_counts_and_gives_the_factor():
    text = verdict.verdict("It", "the mean loss", duels(1.0, 0.0, 0.5))
    assert "clearly better in 1, clearly worse in 1, and neither in 1" in text
    assert "2.00 times lower in the median" in text
    text = verdict.verdict("It", "the mean loss", duels(0.0, ours=3.0, other=1.5))
    assert "2.00 times higher in the median" in text


def test_what_it_makes_of_all_comparisons():
    better, worse, even = duels(1.0, 1.0), duels(0.0, 0.0), duels(0.5, 0.5)
    text = verdict.overall({"a": better, "b": better}, {"a": worse, "b": better}, [0.6])
    assert "is worth more here than the mean loss (b)" in text
    text = verdict.overall({"a": better, "b": worse}, {"a": worse, "b": better}, [0.571, 0.66])
    assert "needs no salience vector here" in text
    assert "57 to 66 %" in text
    for found in (worse, even):
        text = verdict.overall({"a": found, "b": worse}, {"a": better, "b": better}, [0.6])
        assert "does not favour the salience vector" in text


def test_every_way_of_holding_out_has_its_row():
    found = [*duels(1.0, 0.0, 0.5, 0.5), verdict.Duel("a larger model", "t0", 1.0, 2.0, 1.0)]
    rows = verdict.by_split("it", "the mean loss", found)
    assert rows == [
        ["an unseen run", "it", "the mean loss", "t0", "t1", "t2 and t3"],
        ["a larger model", "it", "the mean loss", "t0", "–", "–"],
    ]
    assert all(len(row) == len(verdict.BY_SPLIT) for row in rows)


def test_the_sentence_on_speed_follows_the_numbers():
    fast = speed.Measured(1.0, 10, {"loss": 1e-6}, [])
    slow = speed.Measured(2.0, 40, {"loss": 1e-6}, [])
    text = speed.sentence("float32", fast, slow)
    assert "2.00 times as fast as" in text
    assert "4.0 times less extra memory" in text
    assert "within twice eager's" in text
    text = speed.sentence("float32", replace(slow, over=["loss"]), fast)
    assert "2.00 times slower than" in text
    assert "4.0 times more extra memory" in text
    assert "beyond twice eager's and one rounding in the loss" in text
