"""The demo's section on O-LoRA: training in turn, measures, and what it says of them."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from trimtab.algorithms.olora import OLoRA
from trimtab.demo import continual, corpus, models, olora, olora_pictures, report, section
from trimtab.demo import continual_training as training
from trimtab.demo import olora_verdict as verdict
from trimtab.demo.continual import LabelTask, TaskSizes, Windows
from trimtab.demo.continual_training import INCREMENTAL, JOINT, ORTHOGONAL, SEQUENTIAL, Course

SIZES = TaskSizes(length=20, answers=3, passages={"train": 40, "choice": 8, "test": 8})
PLAN = replace(olora.QUICK, sizes=SIZES, rank=3, steps=3, batch=6, seeds=1)


@pytest.fixture(scope="module")
def encoded() -> corpus.EncodedCorpus:
    text = corpus.read_corpus(0, max_files=120)
    return corpus.encode(text, corpus.train_tokenizer(text, 600))


@pytest.fixture(scope="module")
def tasks(encoded: corpus.EncodedCorpus) -> list[LabelTask]:
    return continual.build_label_tasks(encoded, SIZES, seed=0)


@pytest.fixture(scope="module")
def base(encoded: corpus.EncodedCorpus):
    torch.manual_seed(0)
    model = models.build(models.Size("tiny", 16, 1, 2), encoded.vocabulary, SIZES.length)
    return model.eval().requires_grad_(False)


@pytest.fixture
def bench(base, tasks: list[LabelTask]) -> training.Bench:
    return training.Bench(base, tasks, PLAN)


# Training


def test_batches_mix_the_tasks_and_name_the_right_answers(tasks: list[LabelTask]):
    rows, labels = training.draw(tasks, 200, torch.Generator().manual_seed(0))
    assert rows.shape == (200, SIZES.length)
    known = {
        tuple(row): task.labels[answer].item()
        for task in tasks
        for row, answer in zip(
            task.parts["train"].rows.tolist(), task.parts["train"].answers, strict=True
        )
    }
    assert [known[tuple(row)] for row in rows.tolist()] == labels.tolist()
    for task in tasks:
        assert 25 < torch.isin(labels, task.labels).sum() < 75
    again, _ = training.draw(tasks, 200, torch.Generator().manual_seed(0))
    assert torch.equal(rows, again)


def test_accuracy_is_over_the_whole_vocabulary():
    """A model that says the last token of the window plus one; 9 is no answer at all."""

    def model(input_ids: Tensor, logits_to_keep: int) -> SimpleNamespace:
        assert logits_to_keep == 1
        said = torch.nn.functional.one_hot(input_ids[:, -1:] + 1, 10).float()
        return SimpleNamespace(logits=said)

    question = continual.questions()[0]
    rows = torch.tensor([[0, 4], [0, 5], [0, 4], [0, 8], [0, 5]])
    windows = Windows(rows, torch.tensor([0, 1, 1, 0, 1]))
    task = LabelTask(question, ["a", "b"], torch.tensor([5, 6]), {"test": windows})
    assert training.accuracies(model, [task], "test", batch=2) == [3 / 5]


def test_all_methods_start_alike_and_take_the_same_steps(bench: training.Bench):
    before = copy.deepcopy(bench.base.state_dict())
    steps: list[int] = []
    courses = bench.courses(3, lambda: steps.append(1))
    assert len(steps) == bench.steps
    expected = [(SEQUENTIAL, 0.0), (INCREMENTAL, 0.0), *((ORTHOGONAL, x) for x in PLAN.lamdas),
                (JOINT, 0.0)]  # fmt: skip
    assert [(course.method, course.lamda) for course in courses] == expected
    *in_turn, joint = courses
    for course in in_turn:
        assert torch.equal(course.accuracy[0, :1], courses[0].accuracy[0, :1])
        assert torch.equal(course.accuracy.isnan(), torch.ones(4, 4).triu(1).bool())
        assert (course.overlap is None) == (course.method == SEQUENTIAL)
    assert joint.accuracy[:-1].isnan().all()
    assert joint.final.isfinite().all()
    for name, value in bench.base.state_dict().items():
        assert torch.equal(value, before[name])


def test_training_repeats_to_the_bit(bench: training.Bench):
    first, again, other = (bench.courses(seed) for seed in (5, 5, 6))
    for a, b, c in zip(first, again, other, strict=True):
        torch.testing.assert_close(a.accuracy, b.accuracy, rtol=0, atol=0, equal_nan=True)
        assert a.choice == b.choice
        if a.overlap is not None:
            assert torch.equal(a.overlap, b.overlap)
            assert not torch.equal(a.overlap, c.overlap)


def test_earlier_adapters_stay_as_they_are_and_take_part(bench: training.Bench):
    model = bench._adapted(0)
    bench._train(model, 0, 0)
    rows = bench.tasks[0].parts["test"].rows
    with torch.no_grad():
        alone = model(input_ids=rows).logits
        olora = OLoRA(model, lamda_1=0.0)
        olora.start_task("opening", bench.config)
        assert torch.equal(model(input_ids=rows).logits, alone)  # the new B is 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bench._train(model, 1, 0)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if ".opening." in name}


def test_the_penalty_is_part_of_the_loss(bench: training.Bench):
    plan = replace(PLAN, steps=40, lamdas=(0.5,))
    wide = replace(bench, plan=plan, tasks=bench.tasks[:2])
    _, plain, ours, _ = wide.courses(0)
    assert (plain.method, ours.method) == (INCREMENTAL, ORTHOGONAL)
    assert ours.shared < 0.2 * plain.shared


def test_only_the_penalty_tells_o_lora_from_incremental_lora(bench: training.Bench):
    """The same adapters to start from, the same batches; a penalty of nothing changes nothing."""
    courses = replace(bench, plan=replace(PLAN, lamdas=(1e-12,))).courses(4)
    plain, ours = (c for c in courses if c.overlap is not None)
    torch.testing.assert_close(ours.overlap, plain.overlap)
    model = bench._adapted(4)
    bench._train(model, 0, 4)
    alone = bench._incremental(model, plain.accuracy[0], 0.0, 4, lambda: None)
    torch.testing.assert_close(alone.overlap, plain.overlap, rtol=0, atol=0)
    torch.testing.assert_close(alone.accuracy, plain.accuracy, rtol=0, atol=0, equal_nan=True)


def test_joint_training_reads_all_tasks(bench: training.Bench, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    draw = training.draw

    def watched(tasks, batch, generator):
        seen.append(len(tasks))
        return draw(tasks, batch, generator)

    monkeypatch.setattr(training, "draw", watched)
    bench.courses(0)
    joint = PLAN.steps * len(bench.tasks)
    assert seen[-joint:] == [4] * joint
    assert set(seen[:-joint]) == {1}


def test_the_double_walk_finds_the_same_penalty(bench: training.Bench):
    grown = bench.grown(0, lamda=1.0)
    assert grown.task == "auxiliary"
    walked = olora.walked_penalty(grown.model, grown.task)
    assert walked > 0.0
    torch.testing.assert_close(walked, grown.penalty())
    seconds = olora.time_steps(bench, 0)
    assert set(seconds["penalty"]) < set(seconds["step"])
    assert all(value > 0.0 for part in seconds.values() for value in part.values())


# Measures


NAN = math.nan
MATRIX = torch.tensor([[0.8, NAN, NAN], [0.5, 0.6, NAN], [0.6, 0.1, 0.7]])


def test_what_a_course_says():
    course = Course(INCREMENTAL, 0.0, 0, MATRIX, 0.4, torch.tensor([[1.0, 0.2], [0.2, 1.0]]))
    assert course.average == pytest.approx((0.6 + 0.1 + 0.7) / 3)
    assert course.learnt.tolist() == pytest.approx([0.8, 0.6, 0.7])
    assert course.forgetting == pytest.approx(((0.8 - 0.6) + (0.6 - 0.1)) / 2)
    assert course.shared == pytest.approx(0.2)
    assert math.isnan(replace(course, overlap=None).shared)


def test_forgetting_is_from_the_best_and_never_negative():
    rising = torch.tensor([[0.2, NAN], [0.5, 0.6]])
    assert Course(INCREMENTAL, 0.0, 0, rising, 0.0).forgetting == 0.0


# What it says


def outcome(
    method: str, *averages: float, lamda: float = 0.0, shared: float = 0.1, first: float = 50.0,
    choice: float = 30.0,
) -> verdict.Outcome:  # fmt: skip
    """Two tasks; the last one ends at what makes the mean come out, the first at `first`."""
    courses = []
    for seed, average in enumerate(averages):
        # Half a point of noise that the methods do not share, on the first task.
        start = first + 0.5 * (seed % 2)
        final = torch.tensor([start, 2 * average - start]) / 100.0
        matrix = torch.stack((torch.tensor([0.6, NAN]), final))
        overlap = torch.tensor([[1.0, shared], [shared, 1.0]])
        courses.append(Course(method, lamda, seed, matrix, choice / 100.0, overlap))
    return verdict.Outcome(method, lamda, courses)


def found(
    ours: tuple[float, ...],
    plain: tuple[float, ...] = (40.0, 41.0, 42.0),
    joint: tuple[float, ...] = (60.0, 61.0, 62.0),
    sequential: tuple[float, ...] = (30.0, 31.0, 32.0),
    *,
    first: float = 50.0,
) -> list[verdict.Outcome]:
    return [
        outcome(SEQUENTIAL, *sequential),
        outcome(INCREMENTAL, *plain),
        outcome(ORTHOGONAL, *ours, lamda=0.5, shared=0.01, first=first),
        outcome(JOINT, *joint),
    ]


TWO = [
    LabelTask(question, list("abcd"), torch.arange(4), {}) for question in continual.questions()[:2]
]


def said(outcomes: list[verdict.Outcome]) -> list[str]:
    return verdict.verdict(verdict.chosen(outcomes), outcomes, TWO, 0.125)


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ((45.0, 46.5, 46.0), "O-LoRA helps here, by 4.8 ± 0.8 points over incremental LoRA"),
        ((35.0, 36.5, 36.0), "O-LoRA does worse than incremental LoRA here, by 5.2 ± 0.8 points"),
        ((45.0, 36.5, 46.0), "no clear difference between O-LoRA and incremental LoRA (1.5 ±"),
        # Higher in the mean, but not seed by seed.
        ((41.0, 41.0, 43.5), "no clear difference between O-LoRA and incremental LoRA (0.8 ±"),
    ],
)
def test_the_answer_follows_the_numbers(ours: tuple[float, ...], words: str):
    first = said(found(ours))[0]
    assert words in first
    assert f"{sum(ours) / 3:.1f} ± " in first
    assert "41.0 ± 1.0 % without it" in first
    assert "gives 25.0 %" in first


def test_differences_are_taken_seed_by_seed():
    """The seeds lie far apart, the difference does not."""
    first = said(found((35.0, 46.0, 55.0), plain=(30.0, 40.0, 50.0)))[0]
    assert "O-LoRA helps here, by 5.3 ± 0.6 points" in first


def test_tasks_that_are_not_learnt_are_no_evidence():
    sentences = said(found((45.0, 46.0, 47.0), joint=(26.0, 27.0, 28.0)))
    assert len(sentences) == 2
    assert "says nothing about O-LoRA" in sentences[0]
    assert "27.0 ± 1.0 %" in sentences[0]
    assert not any("helps" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("kept", "less"),
    [(58.0, "O-LoRA forgets clearly less"), (40.0, "O-LoRA forgets clearly more"),
     (50.0, "no clear difference")],
)  # fmt: skip
def test_what_is_forgotten(kept: float, less: str):
    text = verdict.forgetting(
        outcome(ORTHOGONAL, 50.0, 50.0, 50.0, first=kept, lamda=0.5),
        outcome(INCREMENTAL, 50.0, 50.0, 50.0),
    )
    assert less in text
    assert f"lost {60 - kept - 0.5 / 3:.1f} ± 0.3 points" in text


@pytest.mark.parametrize(
    ("ours", "cost"),
    [((50.0, 51.0, 52.0), "with the penalty it also learns more"),
     ((30.0, 31.0, 32.0), "costs something in learning"),
     ((40.0, 43.0, 40.0), "no clear cost in learning")],
)  # fmt: skip
def test_what_the_penalty_costs_in_learning(ours: tuple[float, ...], cost: str):
    plain = outcome(INCREMENTAL, 40.0, 41.0, 42.0)
    assert cost in verdict.forgetting(outcome(ORTHOGONAL, *ours, lamda=0.5), plain)


def test_every_task_is_named_on_its_side():
    text = said(found((45.0, 46.0, 47.0), first=40.0))[2]
    assert "ends clearly higher on opening (52 against 32 %)" in text
    assert "clearly lower on verb (40 against 50 %)" in text
    assert "no clear difference on none" in text


@pytest.mark.parametrize(
    ("sequential", "words"),
    [((30.0, 31.0, 32.0), "clearly below O-LoRA"), ((60.0, 61.0, 62.0), "clearly above O-LoRA"),
     ((30.0, 46.0, 62.0), "no clear difference to O-LoRA")],
)  # fmt: skip
def test_one_adapter_for_all(sequential: tuple[float, ...], words: str):
    assert words in said(found((45.0, 46.5, 46.0), sequential=sequential))[3]


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ((45.0, 46.5, 46.0), "makes up for 24 %"),
        ((38.0, 39.5, 39.0), "makes up for nothing"),
        ((60.0, 62.5, 61.0), "O-LoRA is not clearly below that"),
    ],
)
def test_how_far_the_ceiling_is(ours: tuple[float, ...], words: str):
    text = said(found(ours))[4]
    assert words in text
    assert "reaches 61.0 ± 1.0 %" in text


def test_the_choice_is_by_the_windows_apart():
    swept = [
        outcome(ORTHOGONAL, 45.0, 45.0, lamda=0.05, choice=30.0, shared=0.04),
        outcome(ORTHOGONAL, 44.0, 44.0, lamda=0.5, choice=35.0, shared=0.01),
        outcome(ORTHOGONAL, 43.0, 43.0, lamda=5.0, choice=35.0, shared=0.001),
    ]
    others = [o for o in found((1.0, 1.0)) if o.method != ORTHOGONAL]
    ours = verdict.chosen([*others, *swept])
    assert ours.lamda == 0.5
    text = verdict.scale(ours, [*others, *swept], 0.125)
    assert "lamda_1 0.5 was chosen out of 0.05, 0.5 and 5" in text
    assert "0.100 without the penalty (random ones have 0.125)" in text
    assert "0.040 at 0.05, 0.010 at 0.5 and 0.001 at 5" in text
    assert "between 43.0 and 45.0 %" in text
    assert "lamda_1 0.05 would have been the best" in text
    best = verdict.scale(swept[0], [*others, *swept], 0.125)
    assert "on the test windows too the highest at 0.05" in best


def test_outcomes_are_by_method_and_lamda():
    courses = [*outcome(ORTHOGONAL, 1.0, lamda=0.5).courses, *outcome(INCREMENTAL, 2.0).courses,
               *outcome(ORTHOGONAL, 3.0, lamda=0.5).courses,
               *outcome(ORTHOGONAL, 4.0, lamda=5.0).courses]  # fmt: skip
    grouped = verdict.outcomes(courses)
    assert [(o.name, len(o.courses)) for o in grouped] == [
        ("O-LoRA, lamda_1 0.5", 2), ("IncLoRA", 1), ("O-LoRA, lamda_1 5", 1)
    ]  # fmt: skip
    assert grouped[0].average == pytest.approx([1.0, 3.0])


# Pictures


def test_pictures_show_the_numbers():
    outcomes = found((45.0, 46.5, 46.0))
    shown = olora_pictures.draw_matrices(outcomes, TWO)
    for axis, one in zip(shown.axes, outcomes, strict=False):
        texts = [text.get_text() for text in axis.texts]
        mean = 100.0 * torch.stack([course.accuracy for course in one.courses]).mean(0)
        assert texts == [f"{value:.0f}" for value in mean[mean.isfinite()].tolist()]
        assert axis.get_title() == one.name
    courses = olora_pictures.draw_courses(outcomes, TWO)
    for line, one in zip(courses.axes[0].containers, outcomes, strict=True):
        assert line.lines[0].get_ydata()[-1] == pytest.approx(sum(one.average) / 3)
    overlap = olora_pictures.draw_overlap(outcomes[1], outcomes[2], TWO, outcomes)
    assert [text.get_text() for text in overlap.axes[1].texts] == ["0.010", "0.010"]
    assert overlap.axes[2].lines[0].get_ydata() == pytest.approx([0.1, 0.01])


# The section


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[section.Context, section.Result]:
    context = section.Context(tmp_path_factory.mktemp("out"), 0, section.QUICK)
    return context, olora.SECTION.run(context)


def test_the_table_shows_the_numbers(quick: tuple[section.Context, section.Result]):
    _, result = quick
    assert all(len(row) == len(result.table.header) for row in result.table.rows)
    assert [row[0].split(",")[0] for row in result.table.rows] == [
        SEQUENTIAL, INCREMENTAL, ORTHOGONAL, JOINT
    ]  # fmt: skip
    for row in result.table.rows:
        method, *rest = row[0].split(", lamda_1 ")
        lamda = float(rest[0]) if rest else 0.0
        runs = [r for r in result.numbers["runs"] if (r["method"], r["lamda_1"]) == (method, lamda)]
        assert len(runs) == olora.QUICK.seeds
        average = torch.tensor([100 * run["average"] for run in runs], dtype=torch.float64)
        assert row[1] == f"{average.mean():.1f} ± {average.std():.1f}"
        final = 100 * torch.stack([run["accuracy"][-1] for run in runs]).double().mean(0)
        assert row[2:6] == [f"{value:.0f}" for value in final.tolist()]
    assert result.numbers["lamda_1"] == float(result.table.rows[2][0].split()[-1])


def test_the_choice_does_not_look_at_test_windows(quick: tuple[section.Context, section.Result]):
    _, result = quick
    runs = [run for run in result.numbers["runs"] if run["method"] == ORTHOGONAL]
    means = {
        lamda: sum(run["choice"] for run in runs if run["lamda_1"] == lamda)
        for lamda in olora.QUICK.lamdas
    }
    assert means[result.numbers["lamda_1"]] == max(means.values())


def test_the_section_can_be_shown(quick: tuple[section.Context, section.Result], tmp_path: Path):
    context, result = quick
    pictures = [block.path for block in result.blocks if isinstance(block, section.Figure)]
    assert [path.name for path in pictures] == ["olora_matrices.png", "olora_courses.png",
                                                "olora_overlap.png"]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    for block in result.blocks:
        if isinstance(block, section.Table):
            assert all(len(row) == len(block.header) for row in block.rows)
    report.write_page(tmp_path / "report.html", [(olora.SECTION, result)], {}, {})
    page = (tmp_path / "report.html").read_text("utf-8")
    for sentence in result.verdict:
        assert sentence.replace("'", "&#x27;") in page
    assert page.count("<img") == 3
    report.write_numbers(tmp_path / "numbers.json", result.numbers)
    numbers = json.loads((tmp_path / "numbers.json").read_text("utf-8"))
    assert numbers["verdict"] == result.verdict
    assert {"O-LoRA: tasks", "O-LoRA: training"} <= set(context.seconds)


def test_the_section_stays_small(base, tasks: list[LabelTask]):
    """Training steps: 2 s of the quick run on one core, 80 s of the full one on two."""
    for plan, most in ((olora.QUICK, 300), (olora.FULL, 8500)):
        assert plan.seeds * training.Bench(base, tasks, plan).steps <= most
