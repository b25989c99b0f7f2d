"""The parts of the O-LoRA reproduction script that need no model: data, orders, measures, table."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

FOLDER = str(Path(__file__).resolve().parent.parent / "bench" / "reproductions")
sys.path.insert(0, FOLDER)
try:
    olora, data, methods, models, results = (
        importlib.import_module(name)
        for name in ("olora", "olora_data", "olora_methods", "olora_models", "olora_results")
    )
finally:
    sys.path.remove(FOLDER)

ALL = data.Caps(None, 200, None)


def rows_of(count: int, labels: Any = ("Good", "Bad")) -> list[dict[str, str]]:
    return [{"label": labels[i % len(labels)], "sentence": f"Text: no {i}\n"} for i in range(count)]


def write(folder: Path, train: Any, test: Any, labels: Any = ("Good", "Bad")) -> Path:
    folder.mkdir(parents=True)
    for name, content in (("train", train), ("test", test), ("labels", labels)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def arguments(*more: str) -> list[str]:
    return ["--data", "nowhere", "--model", "none", *more]


@pytest.fixture
def task(tmp_path) -> Path:
    return write(tmp_path / "CL" / "SC" / "SST-2", rows_of(40), rows_of(9))


def test_every_row_is_read_and_split_once(task):
    found = data.read_task(task, ALL)
    assert (found.name, found.kind, found.labels) == ("SST-2", "SC", ("Good", "Bad"))
    assert (len(found.train), len(found.held_out), len(found.test)) == (32, 8, 9)
    sentences = [row.sentence for row in (*found.train, *found.held_out)]
    assert sorted(sentences) == sorted(f"Text: no {i}" for i in range(40))
    assert all(row.label == ("Good", "Bad")[int(row.sentence[9:]) % 2] for row in found.train)
    assert [row.sentence for row in found.test] != [f"Text: no {i}" for i in range(9)]


def test_caps_take_the_first_rows_of_one_shuffle(task):
    every, few = (
        data.read_task(task, data.Caps(None, 4, None)),
        data.read_task(task, data.Caps(5, 4, 3)),
    )
    assert few.train == every.train[:5]
    assert few.held_out == every.held_out
    assert few.test == every.test[:3]
    assert len(every.train) == 36


def test_rows_without_an_agreed_label_are_left_out(tmp_path):
    rows = [*rows_of(5), {"label": "-", "sentence": "unclear"}]
    found = data.read_task(write(tmp_path / "NLI" / "MNLI", rows_of(10), rows), ALL)
    assert len(found.test) == 5
    assert all(row.sentence != "unclear" for row in found.test)


BROKEN = [
    ("train", "{not json", "train.json is not JSON"),
    ("train", "{}", "train.json must be a list of rows, got dict"),
    ("train", "[]", "train.json must have two rows or more, got 0"),
    ("test", '[{"label": "Good", "sentence": "a"}, ["Good", "b"]]', "test.json, row 2 must have a"),
    ("test", '[{"label": "Good"}]', "test.json, row 1 must have a sentence and a label"),
    (
        "test",
        '[{"label": 1, "sentence": "a"}]',
        "test.json, row 1 must have a sentence and a label",
    ),
    (
        "train",
        '[{"label": "good", "sentence": "a"}]',
        "row 1 must have a label of labels.json, got ",
    ),
    ("labels", '{"Good": 0}', "labels.json must be a list of words"),
    ("labels", '["Good", "Good"]', "labels.json must have two or more different labels"),
]


@pytest.mark.parametrize(("name", "text", "words"), BROKEN)
def test_malformed_files_are_told_in_words(task, name, text, words):
    (task / f"{name}.json").write_text(text)
    with pytest.raises(data.UsageError) as error:
        data.read_task(task, ALL)
    assert words in str(error.value)


def test_a_missing_file_is_named(task):
    (task / "test.json").unlink()
    with pytest.raises(data.UsageError, match=r"test\.json is missing"):
        data.read_task(task, ALL)


def test_tasks_are_found_by_name(task, tmp_path):
    assert data.find_tasks(tmp_path / "CL") == {"SST-2": task}
    with pytest.raises(data.UsageError, match="must be a folder with <kind>/<task>"):
        data.find_tasks(tmp_path)
    write(tmp_path / "CL" / "TC" / "SST-2", rows_of(2), rows_of(2))
    with pytest.raises(data.UsageError, match="must have one task SST-2"):
        data.find_tasks(tmp_path / "CL")


def test_orders():
    known = [name for name in data.ORDERS["long"] if name != "yahoo"]
    assert data.choose_order(["1"], [*known, "yahoo"], False) == [
        "dbpedia",
        "amazon",
        "yahoo",
        "agnews",
    ]
    assert data.choose_order(["3"], known, True) == ["amazon", "agnews", "dbpedia"]
    assert data.choose_order(["WiC", "CB"], known, False) == ["WiC", "CB"]
    assert len(data.choose_order(["long"], known, True)) == 14
    for spec, skip, words in (
        (["1"], False, "none called yahoo; --skip-missing goes on"),
        (["WiC", "WiC"], False, "each task once"),
        (["yahoo", "CB"], True, "two tasks or more, got CB"),
    ):
        with pytest.raises(data.UsageError, match=words):
            data.choose_order(spec, known, skip)


def test_the_released_schedule_is_per_task():
    assert set(methods.RELEASED_LONG) == set(data.ORDERS["long"])
    assert methods.factors("released", "long", "RTE") == (0.5, 0.3)
    assert methods.factors("released", "long", "dbpedia") == (5.0, 0.0)
    assert methods.factors("released", "1", "dbpedia") == (0.5, 0.0)
    assert methods.factors(7.0, "long", "RTE") == (7.0, 0.0)


def test_labels_become_texts_and_prompts_keep_them():
    task = data.Task("amazon", "SC", ("very negative", "neutral"), [], [], [])
    assert data.label_text(task, "neutral") == "sentiment: neutral"
    assert data.label_text(task._replace(kind="NLI"), "neutral") == "logical relation: neutral"
    assert data.label_text(task._replace(kind="else"), "neutral") == "label: neutral"
    head, tail = data.prompt(task)
    assert "amazon" in head
    assert "very negative | neutral" in head
    assert tail.endswith("\n")


MATRIX = [{"a": 0.9}, {"a": 0.5, "b": 0.6}, {"a": 0.7, "b": 0.8, "c": 0.4}, 
          {"a": 0.4, "b": 0.75, "c": 0.5, "d": 0.35}]  # fmt: skip


def test_measures_of_a_matrix_done_by_hand():
    found = results.scores(MATRIX, "abcd")
    assert found.average == pytest.approx((0.4 + 0.75 + 0.5 + 0.35) / 4)
    assert found.forgetting == pytest.approx(((0.9 - 0.4) + (0.8 - 0.75) + (0.4 - 0.5)) / 3)
    assert found.transfer == pytest.approx(((0.4 - 0.9) + (0.75 - 0.6) + (0.5 - 0.4)) / 3)
    assert results.scores(MATRIX[-1:], "abcd") == (found.average, None, None)


def test_the_table_has_mean_and_spread_in_percent():
    other = [*MATRIX[:-1], {**MATRIX[-1], "a": 0.6}]
    rows = [
        results.Row("untrained", None, [MATRIX[-1:]]),
        results.Row("O-LoRA", 500.0, [MATRIX, other]),
    ]
    assert results.table(rows, "abcd").splitlines() == [
        "| method    | lambda | average    | forgetting | backward transfer | a           |"
        " b          | c          | d          |",
        "|-----------|--------|------------|------------|-------------------|-------------|"
        "------------|------------|------------|",
        "| untrained |        | 50.0       | -          | -                 | 40.0        |"
        " 75.0       | 50.0       | 35.0       |",
        "| O-LoRA    | 500    | 52.5 ± 3.5 | 11.7 ± 4.7 | -5.0 ± 4.7        | 50.0 ± 14.1 |"
        " 75.0 ± 0.0 | 50.0 ± 0.0 | 35.0 ± 0.0 |",
    ]


RUN = results.Run("olora", 0.5, 3, "test")


def test_results_are_kept_and_read_again(tmp_path):
    store = results.Store(tmp_path, {"rank": 8})
    store.add(RUN, "a", {"a": 0.5})
    store.add(RUN._replace(lamda="released"), "a", {"a": 0.25})
    store.add(RUN, "b", {"a": 0.5, "b": 1.0})
    again = results.Store(tmp_path, {"rank": 8})
    assert again.rows(RUN) == [{"a": 0.5}, {"a": 0.5, "b": 1.0}]
    assert again.rows(RUN._replace(lamda="released")) == [{"a": 0.25}]
    for other in ({"seed": 4}, {"split": "held_out"}, {"method": "inclora"}, {"lamda": 5.0}):
        assert again.rows(RUN._replace(**other)) == []
    assert not list(tmp_path.rglob("*.part"))


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def half(file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        results.atomically(path, half)
    assert path.read_text() == "before"


def test_results_of_other_settings_are_not_mixed(tmp_path):
    results.Store(tmp_path, {"rank": 8, "lr": [1e-3]})
    with pytest.raises(data.UsageError, match="results with another rank, lr; use another folder"):
        results.Store(tmp_path, {"rank": 4, "lr": [1e-3, 1e-4]})


@pytest.mark.parametrize("line", ["{half", "[]", '{"method": "olora"}'])
def test_a_broken_line_is_named(tmp_path, line):
    results.Store(tmp_path, {}).add(RUN, "a", {"a": 0.5})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(data.UsageError, match=r"results\.jsonl, line 2 is not a result"):
        results.Store(tmp_path, {})


def test_adapters_are_kept_until_the_next_task(tmp_path):
    store = results.Store(tmp_path, {})
    assert store.adapters(RUN, 1) is None
    for done in (1, 2, 3):
        store.save_adapters(RUN, done, {"A": torch.full((2,), float(done))})
        store.drop_adapters(RUN, done - 1)
    assert store.adapters(RUN, 3)["A"].tolist() == [3.0, 3.0]
    assert store.adapters(RUN, 2) is None
    # The first task's are those of every method, and of no other seed.
    assert store.adapters(RUN._replace(method="seqlora", lamda=0.0), 1)["A"].tolist() == [1.0, 1.0]
    assert store.adapters(RUN._replace(seed=4), 1) is None


def test_what_is_not_given_depends_on_the_kind_of_model_and_on_quick():
    options = olora.parse(arguments("--seeds", "5", "--lambdas", "1", "released", "--order", "1"))
    assert (options.lr, options.train_rows, options.order_name) == (None, None, "1")
    assert options.lambdas == [1.0, "released"]
    quick = olora.parse(arguments("--quick", "--seeds", "5", "--test-rows", "7"))
    assert (quick.train_rows, quick.test_rows, quick.seeds) == (64, 7, [5])
    assert olora.PAPER["batch_size"] == 64
    assert olora.PAPER["lr"] == [1e-3]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rank", "0"], "--rank must be 1 or more, got 0"),
        (["--lr", "1", "2", "3"], "--lr must be one rate or two, got 3"),
        (["--seeds", "0", "1"], "--tuning-seed must not be one of --seeds, got 0"),
        (["--lambdas", "-1"], "must be a number from 0 on, got -1"),
        (["--lambdas", "inf"], "must be a number from 0 on, got inf"),
        (["--squared-lambdas", "released"], "invalid number value: 'released'"),
        (["--lambdas", "released", "--order", "a", "b"], "must go with an order of the paper"),
    ],
)
def test_options_that_make_no_sense_are_refused(capsys, more, words):
    with pytest.raises(SystemExit):
        olora.parse(arguments(*more))
    assert words in capsys.readouterr().err


def test_a_model_that_a_package_ships_is_found(tmp_path, monkeypatch):
    model = tmp_path / "its_package" / "model"
    (model / "1_Pooling").mkdir(parents=True)
    (tmp_path / "its_package" / "__init__.py").touch()
    (model / "config.json").write_text('{"model_type": "bert"}')
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert models.find_model("its-package") == str(model)
    assert models.find_model(str(model)) == str(model)
    assert models.find_model("google/t5-v1_1-base") == "google/t5-v1_1-base"
    assert models.find_model("json") == "json"


def test_a_model_that_is_not_there_is_told_in_words(task, capsys):
    found = olora.main(["--data", str(task.parent.parent), "--model", "nowhere/at-all"])
    assert found == 2
    assert "olora: --model must be a folder with a Hugging Face model" in capsys.readouterr().err
