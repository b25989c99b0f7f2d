"""The O-LoRA reproduction script on tiny random BERT, T5 and LLaMA: losses, answers, resuming."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

FOLDER = str(Path(__file__).resolve().parent.parent / "bench" / "reproductions")
sys.path.insert(0, FOLDER)
try:
    olora, data, methods, models, results = (
        importlib.import_module(name)
        for name in ("olora", "olora_data", "olora_methods", "olora_models", "olora_results")
    )
finally:
    sys.path.remove(FOLDER)

TASKS = {
    "TC/animals": {"Cat": "purrs meows", "Dog": "barks", "Cow": "moos"},
    "SC/mood": {"very good": "glad merry", "bad": "sad"},
    "TC/metals": {"Iron": "rusts", "Gold": "shines"},
}
ORDER = [name.split("/")[1] for name in TASKS]
KINDS = ("encoder", "seq2seq", "causal")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny products take many times longer when two threads share a busy core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three tasks of 20 rows whose words give the label away."""
    root = tmp_path_factory.mktemp("CL_Benchmark")
    for name, words in TASKS.items():
        pairs = [(label, word) for label, spoken in words.items() for word in spoken.split()]
        rows = [
            {
                "label": pairs[i % len(pairs)][0],
                "sentence": f"it {pairs[i % len(pairs)][1]} " * (1 + i % 3),
            }
            for i in range(20)
        ]
        (root / name).mkdir(parents=True)
        for part, content in (("labels", list(words)), ("train", rows), ("test", rows[:8])):
            (root / name / f"{part}.json").write_text(json.dumps(content))
    return root


def save_tokenizer(path: Path, kind: str) -> int:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as pieces
    from transformers import PreTrainedTokenizerFast

    if kind == "encoder":
        words = " ".join(f"{label} {spoken}" for t in TASKS.values() for label, spoken in t.items())
        vocabulary = dict.fromkeys(
            ["[PAD]", "[UNK]", "topic", "sentiment", ":", "it", *words.split()]
        )
        vocabulary = {piece: i for i, piece in enumerate(vocabulary)}
        tokenizer = Tokenizer(pieces.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {piece: i for i, piece in enumerate(["<pad>", "</s>", "<s>", *alphabet])}
        tokenizer = Tokenizer(pieces.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = {"eos_token": "</s>"}
        # As T5 and LLaMA have it: the one pads and begins nothing, the other the reverse.
        special |= {"pad_token": "<pad>"} if kind == "seq2seq" else {"bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return len(vocabulary)


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    import transformers

    found = {}
    for kind in KINDS:
        found[kind] = path = tmp_path_factory.mktemp(kind)
        size = save_tokenizer(path, kind)
        torch.manual_seed(0)
        if kind == "encoder":
            model = transformers.BertModel(transformers.BertConfig(
                vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=64, initializer_range=0.5,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            ))  # fmt: skip
        elif kind == "seq2seq":
            model = transformers.T5ForConditionalGeneration(transformers.T5Config(
                vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=9.0,
            ))  # fmt: skip
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
                vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, bos_token_id=2, eos_token_id=1, initializer_range=0.5,
            ))  # fmt: skip
            # What chat models ship with; answers are greedy all the same.
            model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=1.7)
        model.save_pretrained(path)
    return found


@pytest.fixture
def arguments(folder, model_folders, tmp_path):
    def make(kind: str, *more: str, out: str = "out") -> list[str]:
        rows = ["--train-rows", "12", "--batch-size", "6", "--max-length", "200", "--device", "cpu"]
        return [
            "--data", str(folder), "--model", str(model_folders[kind]), "--order", *ORDER,
            "--out", str(tmp_path / out), *rows, "--lr", "1e-2", "--rank", "2",
            "--seeds", "1", "2", "--lambdas", "0.5", "5", "--squared-lambdas", "1", *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def learner(arguments):
    """Makes the model of a kind, ready to be asked, and its tasks by name."""

    def make(kind: str, *more: str) -> Any:
        options = olora.parse(arguments(kind, *more))
        tasks, path, found = olora.prepare(options)
        assert found == kind
        made = models.LEARNERS[kind](options, path, tasks)
        made.model.eval()
        return made

    return make


@pytest.fixture
def losses_for_accuracies(monkeypatch):
    """A measure that shows every bit of the weights, which accuracies on few rows do not."""

    def loss(self: Any, examples: Any) -> float:
        self.model.eval()
        with torch.no_grad():
            return self.loss(examples).item()

    monkeypatch.setattr(models.Learner, "accuracy", loss)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_from_data_to_table(arguments, tmp_path, capsys, kind):
    assert olora.main(arguments(kind)) == 0
    shown = capsys.readouterr().out
    for title in ("untrained", "SeqLoRA", "IncLoRA", "O-LoRA, squared norm", "joint training"):
        assert f"\n| {title} " in shown
    assert "lambda 0.5" in shown or "lambda 5" in shown
    assert "Rows for training/held out/test: animals 12/4/8, mood 12/4/8, metals 12/4/8" in shown
    kept = json.loads((tmp_path / "out" / "table.json").read_text())
    assert (kept["rank"], kept["epochs"], kept["order"]) == (2, 1, ORDER)
    assert [len(cell["accuracies"]) for cell in kept["cells"]] == [1, 2, 2, 2, 2, 2]
    for cell in kept["cells"]:
        for matrix in cell["accuracies"]:
            whole = len(matrix) == len(ORDER)
            assert [list(row) for row in matrix] == [
                ORDER[: i + 1] if whole else ORDER for i in range(len(matrix))
            ]
            assert all(0.0 <= share <= 1.0 for row in matrix for share in row.values())
    adapters = {path.name for path in (tmp_path / "out" / "adapters").iterdir()}
    assert adapters == {f"first-task-seed{seed}.pt" for seed in (0, 1, 2)}


def test_lambda_is_chosen_on_held_out_rows(arguments, monkeypatch, tmp_path, learner):
    tasks, asked = learner("encoder").tasks, []
    monkeypatch.setattr(models.Learner, "accuracy", lambda self, rows: asked.append(rows) or 0.5)
    assert olora.main(arguments("encoder", "--methods", "olora", "--seeds", "1")) == 0
    found = lines(tmp_path / "out")
    tuned = [line for line in found if line["split"] == "held_out"]
    assert [line["lamda"] for line in tuned] == [0.5] * 3 + [5.0] * 3
    assert {line["seed"] for line in tuned} == {0}
    assert [list(line["accuracy"]) for line in tuned] == [[], [], ORDER] * 2
    assert [(line["lamda"], line["seed"]) for line in found[7:]] == [(0.5, 1)] * 3
    held_out, test = (
        [getattr(tasks[name], part) for name in ORDER] for part in ("held_out", "test")
    )
    assert asked == [*test, *held_out * 2, test[0], *test[:2], *test]


def test_the_best_average_wins_and_the_first_of_equals(arguments):
    options = olora.parse(arguments("encoder", "--lambdas", "1", "2", "3", "4"))
    table = olora.Table(options, [SimpleNamespace(name=n) for n in "ab"], None, lambda: None)
    asked = []

    def trained(run: Any) -> Any:
        asked.append(run)
        return [{}, {1: {"a": 0.9, "b": 0.1}, 2: {"a": 0.6, "b": 0.7}, 3: {"a": 0.7, "b": 0.6},
                     4: {"a": 1.0, "b": 0.0}}[run.lamda]]  # fmt: skip

    table.trained = trained
    assert table.choose("olora") == 2
    assert asked == [results.Run("olora", float(n), 0, "held_out") for n in (1, 2, 3, 4)]
    asked.clear()
    assert table.choose("olora-squared") == 1
    assert table.choose("inclora") is None
    assert asked == []


@pytest.mark.usefixtures("losses_for_accuracies")
@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_run_that_is_broken_off_ends_with_the_same_table(
    arguments, tmp_path, monkeypatch, capsys, cut
):
    assert olora.main(arguments("encoder", out="whole")) == 0
    table = capsys.readouterr().out.replace("whole", "parts")
    add, left = results.Store.add, 0

    def tired(self: Any, *what: Any) -> None:
        """Stops the script around every second result: before or after it is written."""
        nonlocal left
        left += 1
        if left % 2 == 0 and cut == "before":
            raise KeyboardInterrupt
        add(self, *what)
        if left % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(results.Store, "add", tired)
    starts, ended = 0, None
    while ended is None:
        starts += 1
        try:
            ended = olora.main(arguments("encoder", out="parts"))
        except KeyboardInterrupt:
            capsys.readouterr()
    assert ended == 0
    assert starts > 10
    by = json.dumps
    assert sorted(map(by, lines(tmp_path / "parts"))) == sorted(map(by, lines(tmp_path / "whole")))
    assert table.endswith(capsys.readouterr().out[-200:])
    kept = [(tmp_path / out / "table.json").read_text() for out in ("whole", "parts")]
    assert kept[0] == kept[1]


def test_with_every_result_there_no_model_is_loaded(arguments, monkeypatch):
    assert olora.main(arguments("encoder", "--methods", "seqlora")) == 0

    def refuse(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setitem(olora.LEARNERS, "encoder", refuse)
    assert olora.main(arguments("encoder", "--methods", "seqlora", "--seeds", "2")) == 0
    with pytest.raises(AssertionError, match="loaded"):
        olora.main(arguments("encoder", "--methods", "seqlora", "--seeds", "3"))


def test_adapters_that_are_gone_are_missed_in_words(arguments, tmp_path, monkeypatch, capsys):
    add = results.Store.add
    monkeypatch.setattr(results.Store, "add", lambda self, *what: (add(self, *what), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        olora.main(arguments("encoder", "--methods", "seqlora"))
    with pytest.raises(ZeroDivisionError):
        olora.main(arguments("encoder", "--methods", "seqlora"))
    monkeypatch.setattr(results.Store, "add", add)
    (tmp_path / "out" / "adapters" / "first-task-seed1.pt").unlink()
    assert olora.main(arguments("encoder", "--methods", "seqlora")) == 2
    assert "must have the adapters of seqlora, seed 1, test rows after 1 tasks" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--target-modules", "nothing"], "--target-modules must fit the model"),
        (["--order", "animals", "yahoo"], "none called yahoo"),
    ],
)
def test_what_does_not_fit_is_told_in_words(arguments, capsys, more, words):
    assert olora.main(arguments("encoder", *more)) == 2
    assert words in capsys.readouterr().err


def final_adapters(arguments: Any, monkeypatch: Any, *more: str) -> dict[str, dict[str, Any]]:
    """Run -> adapters after the last stage, cloned."""
    found: dict[str, dict[str, Any]] = {}
    measure = methods.Training._measure

    def keep(self: Any, index: int) -> Any:
        state = methods.adapter_state(self.learner.model)
        found[self.run.method] = {name: value.clone() for name, value in state.items()}
        return measure(self, index)

    monkeypatch.setattr(methods.Training, "_measure", keep)
    settings = ["--seeds", "1", "--lambdas", "500", "--squared-lambdas", "500", *more]
    assert olora.main(arguments("encoder", *settings)) == 0
    return found


def of_task(state: dict[str, Any], number: int, factor: str) -> list[Any]:
    return [v for k, v in state.items() if f"lora_{factor}.task{number}." in k]


def test_each_method_trains_what_it_says(arguments, monkeypatch, tmp_path):
    found = final_adapters(arguments, monkeypatch)
    first = torch.load(tmp_path / "out" / "adapters" / "first-task-seed1.pt", weights_only=True)
    for method in ("inclora", "olora", "olora-squared"):
        for factor in "AB":
            kept = of_task(found[method], 1, factor)
            assert len(kept) == 4
            assert all(map(torch.equal, kept, of_task(first, 1, factor))), method
        assert all(value.abs().sum() > 0 for value in of_task(found[method], 3, "B")), method
    assert set(first) == set(found["seqlora"]) == set(found["joint"])
    assert not any(map(torch.equal, found["seqlora"].values(), first.values()))

    def overlap(state: dict[str, Any]) -> float:
        pairs = [(1, 2), (1, 3), (2, 3)]
        both = [zip(of_task(state, i, "A"), of_task(state, j, "A"), strict=True) for i, j in pairs]
        return sum((a @ b.mT).abs().sum().item() for pair in both for a, b in pair)

    sizes = {method: overlap(found[method]) for method in ("inclora", "olora", "olora-squared")}
    assert sizes["olora"] < sizes["inclora"]
    assert sizes["olora-squared"] < sizes["inclora"]
    assert sizes["olora"] != sizes["olora-squared"]


def test_with_lambda_0_the_penalty_changes_nothing(arguments, monkeypatch):
    found = final_adapters(arguments, monkeypatch, "--lambdas", "0", "--squared-lambdas", "0")
    for method in ("olora", "olora-squared"):
        assert all(map(torch.equal, found[method].values(), found["inclora"].values()))


def test_the_second_rate_is_that_of_the_later_tasks(arguments, monkeypatch, tmp_path):
    found = final_adapters(arguments, monkeypatch, "--methods", "seqlora", "--lr", "1e-2", "1e-30")
    first = torch.load(tmp_path / "out" / "adapters" / "first-task-seed1.pt", weights_only=True)
    assert all(map(torch.equal, found["seqlora"].values(), first.values()))


@pytest.mark.parametrize("size", ["4", "12"])
def test_a_step_has_the_mean_gradient_and_one_penalty(learner, monkeypatch, size):
    from peft import LoraConfig, get_peft_model

    made = learner("encoder", "--micro-batch-size", size, "--batch-size", "12")
    made.model = get_peft_model(made.model, LoraConfig(r=2, init_lora_weights=False))
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    rows = made.tasks["mood"].train
    expected = torch.autograd.grad(made.loss(rows) / 12, parameters)
    seen: list[Any] = []

    def penalty() -> None:
        for parameter in parameters:
            parameter.grad += 1.0

    def clip(given: Any, largest: float) -> None:
        seen.append(([p.grad.clone() for p in given], largest))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    methods.fit(made, rows, made.options, rate=1e-2, seed=0, add_penalty=penalty)
    assert len(rows) == 12
    assert [largest for _, largest in seen] == [1.0]
    torch.testing.assert_close(seen[0][0], [grad + 1.0 for grad in expected])
    assert {id(p) for p in parameters} == {
        id(p) for p in made.model.parameters() if p.requires_grad
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_a_sum_over_terms(learner, kind):
    """So that micro-batches of any size add up to the batch, whatever their padding."""
    made = learner(kind)
    rows = [row for task in made.tasks.values() for row in task.train[:5]]
    one_by_one = sum(made.loss([row]) for row in rows)
    torch.testing.assert_close(made.loss(rows), one_by_one)
    assert made.count(rows) == sum(made.count([row]) for row in rows)
    assert made.count(rows[:1]) == (1 if kind == "encoder" else len(rows[0].label) + 1)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_the_loss_is_that_of_the_label_after_the_prompt(learner, kind):
    made = learner(kind)
    row = made.tasks["mood"].train[0]
    head, tail = data.prompt(made.tasks["mood"])
    encode = lambda text: made.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prompt, answer = encode(head + row.sentence + tail), [*encode(row.label), 1]
    with torch.no_grad():
        if kind == "seq2seq":
            out = made.model(
                torch.tensor([[*prompt, 1]]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]])
            )
            logits = out.logits[0]
        else:
            logits = made.model(torch.tensor([[2, *prompt, *answer]])).logits[
                0, -len(answer) - 1 : -1
            ]
        expected = -logits.log_softmax(-1)[range(len(answer)), answer].sum()
        torch.testing.assert_close(made.loss([row]), expected)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_right_is_what_greedy_decoding_says(learner, kind):
    """Token by token by hand, one row at a time; together the rows need padding."""
    made = learner(kind)
    longest = max(len(label) for task in made.tasks.values() for label in task.labels) + 1
    rows = []
    for row in made.tasks["animals"].train[:6]:
        ids, new = made._source(row), []
        for _ in range(longest):
            with torch.no_grad():
                if kind == "seq2seq":
                    logits = made.model(
                        torch.tensor([ids]), decoder_input_ids=torch.tensor([[0, *new]])
                    )
                else:
                    logits = made.model(torch.tensor([ids + new]))
            new.append(logits.logits[0, -1].argmax().item())
            if new[-1] == 1:
                break
        said = made.tokenizer.decode(new, skip_special_tokens=True).strip()
        rows += [row._replace(label=said), row._replace(label=said + "!")]
    assert len({len(made._source(row)) for row in rows}) > 1
    assert len({row.label for row in rows}) > 2
    assert made.right(rows) == [True, False] * 6


def test_a_long_text_is_cut_and_the_prompt_is_not(learner):
    made = learner("causal", "--max-length", "150")
    row = made.tasks["mood"].train[0]._replace(sentence="x" * 500)
    head, tail = data.prompt(made.tasks["mood"])
    text = made.tokenizer.decode(made._source(row))
    assert text.startswith(f"<s>{head}xxx")
    assert text.endswith(f"xxx{tail}")
    assert len(made._source(row)) == 149
    made.options.max_length = 40
    with pytest.raises(data.UsageError, match="must leave room behind the prompt of mood, got 40"):
        made._source(row)


def test_an_encoder_takes_the_nearest_label(learner):
    made = learner("encoder", "--scale", "7")
    assert made.texts == ["topic: Cat", "topic: Dog", "topic: Cow", "sentiment: very good",
                          "sentiment: bad", "topic: Iron", "topic: Gold"]  # fmt: skip

    def embed(text: str) -> Any:
        ids = torch.tensor([made.tokenizer(text)["input_ids"]])
        return torch.nn.functional.normalize(made.model(ids).last_hidden_state[0].mean(0), dim=0)

    row = made.tasks["mood"].train[0]
    with torch.no_grad():
        logits = 7 * torch.stack([embed(row.sentence) @ embed(text) for text in made.texts])
        own = made.texts.index(f"sentiment: {row.label}")
        torch.testing.assert_close(made.loss([row]), -logits.log_softmax(0)[own])
        assert made.right([row]) == [logits.argmax().item() == own]
        alone = learner("encoder", "--scale", "7", "--label-set", "task")
        expected = -logits[3:5].log_softmax(0)[own - 3]
        torch.testing.assert_close(alone.loss([row]), expected)
        assert alone.right([row]) == [3 + logits[3:5].argmax().item() == own]
        both = [row, made.tasks["animals"].train[0]]
        torch.testing.assert_close(alone.loss(both), alone.loss(both[:1]) + alone.loss(both[1:]))


def test_accuracy_is_the_share_of_what_is_right(learner, monkeypatch):
    made = learner("encoder")
    rows = made.tasks["animals"].test
    monkeypatch.setattr(made, "right", lambda asked: [row is rows[3] for row in asked])
    assert made.accuracy(rows) == 1 / len(rows)
