"""Models that learn to label texts: encoders by the nearest label, the others by generation."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from olora_data import Example, Task, UsageError, label_text, prompt
from torch import Tensor

IGNORED = -100


def find_model(name: str) -> str:
    """The folder of a model, the one that an installed package ships, or else the name itself."""
    if Path(name).is_dir():
        return name
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(root).rglob("config.json")):
            if "model_type" in json.loads(path.read_text(encoding="utf-8")):
                return str(path.parent)
    return name


def kind_of(name: str) -> str:
    """One of ``LEARNERS``, going by the model's config."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            "--model must be a folder with a Hugging Face model, an installed package that ships "
            f"one, or a name in the local Hugging Face cache, got {name}"
        ) from error
    if config.is_encoder_decoder:
        return "seq2seq"
    causal = ("ForCausalLM", "LMHeadModel")
    return "causal" if (config.architectures or [""])[0].endswith(causal) else "encoder"


def batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The rows, ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """One row per sequence, filled up with ``value``."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    whole = [[*f, *row] if left else [*row, *f] for row, f in zip(rows, fill, strict=True)]
    return torch.tensor(whole)


class Learner:
    """A model, what it loses on examples, and which of them it labels right.

    ``model`` is the pretrained one until a method puts adapters around it.
    """

    auto_class = "AutoModel"

    def __init__(self, options: argparse.Namespace, path: str, tasks: Sequence[Task]) -> None:
        import transformers

        self.options, self.tasks = options, {task.name: task for task in tasks}
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            load = getattr(transformers, self.auto_class).from_pretrained
            self.model = load(path, local_files_only=True, dtype=self._weights()).to(self.device)
        except (OSError, ValueError) as error:
            raise UsageError(f"--model {path} could not be loaded: {error}") from error

    def _weights(self) -> torch.dtype:
        return self.dtype

    def autocast(self) -> torch.autocast:
        """Float32 unless ``--dtype`` says otherwise."""
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if low else None, enabled=low)

    def count(self, examples: Sequence[Example]) -> int:
        """Number of terms in the loss of these examples."""
        raise NotImplementedError

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Cross-entropy, summed over its terms."""
        raise NotImplementedError

    def right(self, examples: Sequence[Example]) -> list[bool]:
        """For each example, whether the model gives exactly its label."""
        raise NotImplementedError

    @torch.no_grad()
    def accuracy(self, examples: Sequence[Example]) -> float:
        """Share of the examples that get exactly their label."""
        self.model.eval()
        # Similar lengths together: less padding, the same answers.
        rows = sorted(examples, key=lambda row: len(row.sentence))
        with self.autocast():
            return sum(self.right(rows)) / len(rows)


class Encoder(Learner):
    """Labels by the nearest label embedding: mean pooling, L2 norm, cosine times a scale."""

    def __init__(self, options: argparse.Namespace, path: str, tasks: Sequence[Task]) -> None:
        super().__init__(options, path, tasks)
        own = {task.name: [label_text(task, label) for label in task.labels] for task in tasks}
        self.texts = list(dict.fromkeys(text for texts in own.values() for text in texts))
        self.barred = {
            name: torch.tensor(
                [options.label_set == "task" and text not in texts for text in self.texts]
            )
            for name, texts in own.items()
        }

    def _weights(self) -> torch.dtype:
        return torch.float32  # small enough; `--dtype` sets the arithmetic alone

    def _embed(self, texts: Sequence[str]) -> Tensor:  # (len(texts), D)
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.options.max_length,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        hidden = self.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    def _logits(self, examples: Sequence[Example], labels: Tensor) -> Tensor:  # (B, all labels)
        sentences = self._embed([row.sentence for row in examples])
        barred = torch.stack([self.barred[row.task] for row in examples]).to(self.device)
        # A cosine rounded to bfloat16 and then scaled by 20 would be off by up to 0.04.
        with torch.autocast(self.device.type, enabled=False):
            logits = self.options.scale * (sentences @ labels.mT)
        return logits.masked_fill(barred, float("-inf"))

    def _targets(self, examples: Sequence[Example]) -> Tensor:
        texts = [label_text(self.tasks[row.task], row.label) for row in examples]
        return torch.tensor([self.texts.index(text) for text in texts], device=self.device)

    def count(self, examples: Sequence[Example]) -> int:
        return len(examples)

    def loss(self, examples: Sequence[Example]) -> Tensor:
        logits = self._logits(examples, self._embed(self.texts))
        targets = self._targets(examples)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    def right(self, examples: Sequence[Example]) -> list[bool]:
        labels, found = self._embed(self.texts), []
        for part in batches(examples, self.options.eval_batch_size):
            nearest = self._logits(part, labels).argmax(-1)
            found += (nearest == self._targets(part)).tolist()
        return found


class TextToText(Learner):
    """Labels by greedy generation after a prompt; right if the text is exactly the label."""

    only_decodes = False

    def __init__(self, options: argparse.Namespace, path: str, tasks: Sequence[Task]) -> None:
        super().__init__(options, path, tasks)
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UsageError(f"--model {path} must have a tokenizer with an end-of-text token")
        self.eos = eos
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else eos
        self.answers = {label: [*self._ids(label), eos] for t in tasks for label in t.labels}
        self._only_greedy()

    def _only_greedy(self) -> None:
        """Sampling, penalties and lengths of the model's own config would reach the answers."""
        from transformers import GenerationConfig

        self.model.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, eos_token_id=self.eos, pad_token_id=self.pad,
            max_new_tokens=max(map(len, self.answers.values())),
            decoder_start_token_id=getattr(self.model.config, "decoder_start_token_id", None),
        )  # fmt: skip

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _source(self, row: Example) -> list[int]:
        """The prompt with the text cut to what fits: the question and the options stay whole."""
        first = [self.tokenizer.bos_token_id] if self.tokenizer.bos_token_id is not None else []
        head, tail = map(self._ids, prompt(self.tasks[row.task]))
        room = self.options.max_length - len(first) - len(head) - len(tail) - 1
        if room < 1:
            raise UsageError(
                f"--max-length must leave room behind the prompt of {row.task}, got "
                f"{self.options.max_length}; {self.options.max_length + 1 - room} would do"
            )
        return first + head + self._ids(row.sentence)[:room] + tail

    def count(self, examples: Sequence[Example]) -> int:
        return sum(len(self.answers[row.label]) for row in examples)

    def right(self, examples: Sequence[Example]) -> list[bool]:
        found: list[bool] = []
        for part in batches(examples, self.options.eval_batch_size):
            # A decoder's answer begins right behind its prompt, so its padding is on the left.
            ids, mask = self._inputs([self._source(row) for row in part], self.only_decodes)
            answers = self.model.generate(input_ids=ids, attention_mask=mask)
            if self.only_decodes:
                answers = answers[:, ids.shape[1] :]
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            found += [text.strip() == row.label for text, row in zip(texts, part, strict=True)]
        return found

    def _inputs(self, rows: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
        mask = pad([[1] * len(row) for row in rows], 0, left)
        return pad(rows, self.pad, left).to(self.device), mask.to(self.device)


class Seq2Seq(TextToText):
    """T5 and its like."""

    auto_class = "AutoModelForSeq2SeqLM"

    def _source(self, row: Example) -> list[int]:
        return [*super()._source(row), self.eos]

    def loss(self, examples: Sequence[Example]) -> Tensor:
        ids, mask = self._inputs([self._source(row) for row in examples])
        labels = pad([self.answers[row.label] for row in examples], IGNORED).to(self.device)
        mean = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return mean * self.count(examples)


class Causal(TextToText):
    """LLaMA and its like: the loss is that of the label alone, not of the prompt."""

    auto_class = "AutoModelForCausalLM"
    only_decodes = True

    def loss(self, examples: Sequence[Example]) -> Tensor:
        sources = [self._source(row) for row in examples]
        answers = [self.answers[row.label] for row in examples]
        pairs = list(zip(sources, answers, strict=True))
        ids, mask = self._inputs([source + answer for source, answer in pairs])
        labels = pad([[IGNORED] * len(s) + a for s, a in pairs], IGNORED)
        mean = self.model(input_ids=ids, attention_mask=mask, labels=labels.to(self.device)).loss
        return mean * self.count(examples)


LEARNERS = {"encoder": Encoder, "seq2seq": Seq2Seq, "causal": Causal}
