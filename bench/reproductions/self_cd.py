"""Self-CD's table for a local chat model: refusals without, with and against a safety prompt.

    python bench/reproductions/self_cd.py --model FOLDER --data FOLDER [--ratios 2.5] [--out FOLDER]

Shi et al., "Navigating the OverKill in Large Language Models", ACL 2024, arXiv 2401.17633. The data
are ``data`` of github.com/InvokerStark/OverKill: OKTest.csv (300 safe questions that sound harmful)
and xstest_v2_prompts.csv (250 safe questions, and 200 unsafe ones, whose ``type`` begins with
"contrast"). Conditions: no prompt, the safety prompt, and Self-CD at every ratio, all greedy.

For orientation, the paper's LLaMA2-7B on the safe half of XSTest, with GPT-4 as the judge: 38.0 %
refusals without a prompt, 54.4 % with it, 10.0 % by Self-CD with ratio 2.5.

What this script has to read between the lines:

- The paper's judge is GPT-4. Here it is the list of phrases of ``trimtab.demo.refusals``, where an
  empty answer also counts as a refusal, or any function of yours: ``--judge module:function``,
  ``(question, answer) -> bool``, True for a refusal.
- Prompts go through the tokenizer's chat template. A tokenizer without one gets the released
  code's ``<s>[INST] {system} {user} [/INST]``, as does any with ``--template paper``.
- That code never fills ``{system}`` in the context "without". We take no system prompt and no
  second space; ``--plain-prompt ""`` fills it with nothing and keeps the space it leaves.

Answers are lines of JSON, one file per question set and condition. A run that was broken off goes
on where it stopped, and other ratios or another judge cost only what is new.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimtab.algorithms import self_contrastive
from trimtab.demo.refusals import is_refusal

Judge = Callable[[str, str], bool]
Answers = dict[int, str]

SETS = ("OKTest", "XSTest safe", "XSTest unsafe")
PAPER_TEMPLATE = (
    "{{ bos_token }}[INST] {% for message in messages %}{{ message['content'] }} {% endfor %}"
    "[/INST]"
)


class Condition(NamedTuple):
    """One row of the table."""

    name: str
    prompt: str | None = None  # system prompt of plain decoding
    ratio: float | None = None  # of Self-CD


class UsageError(Exception):
    """The script can't do what was asked; the message says what to do."""


def refuses(question: str, answer: str) -> bool:
    """Whether the answer begins like a refusal; an empty one helps nobody and counts as one."""
    return not answer.strip() or is_refusal(answer.strip())


def load_judge(spec: str | None) -> Judge:
    """``module:function``, with the current folder on the path; None for ``refuses``."""
    if spec is None:
        return refuses
    module, _, name = spec.partition(":")
    if not module or not name:
        raise UsageError(f"--judge must be module:function, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--judge must name a function that can be imported: {error}") from error


def read_questions(folder: Path) -> dict[str, list[str]]:
    """The question sets, by name."""
    oktest = [row["prompt"] for row in _rows(folder / "OKTest.csv", ("prompt",))]
    xstest = list(_rows(folder / "xstest_v2_prompts.csv", ("type", "prompt")))
    unsafe = [row["type"].startswith("contrast") for row in xstest]
    found = {
        "OKTest": oktest,
        "XSTest safe": [row["prompt"] for row, bad in zip(xstest, unsafe, strict=True) if not bad],
        "XSTest unsafe": [row["prompt"] for row, bad in zip(xstest, unsafe, strict=True) if bad],
    }
    return {name: [question.strip() for question in questions] for name, questions in found.items()}


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    if not path.is_file():
        raise UsageError(f"--data must be a folder with {path.name}, got {path.parent}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise UsageError(f"{path.name} must have a column {', '.join(sorted(missing))}")
        yield from (row for row in reader if row["prompt"] and row["prompt"].strip())


def read_answers(path: Path, questions: Sequence[str], condition: Condition) -> Answers:
    """What is answered already. A last line that was cut off is taken out of the file."""
    answers: Answers = {}
    if not path.exists():
        return answers
    whole = 0
    with path.open("rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number} is not JSON; delete it") from error
            if row.get("condition") != condition.name:
                raise UsageError(
                    f"{path} has answers of another condition than {condition.name}; use another "
                    "--out"
                )
            if row["id"] < len(questions) and row["question"] != questions[row["id"]]:
                raise UsageError(
                    f"{path} answers other questions than --data has; use another --out"
                )
            answers[row["id"]] = row["answer"]
            whole += len(line)
        file.truncate(whole)
    return answers


def write_answers(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append, and wait until it is on the disk."""
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix answers of different settings in one folder."""
    path = out / "settings.json"
    if path.exists():
        kept = json.loads(path.read_text())
        changed = [name for name in settings if kept.get(name) != settings[name]]
        if changed:
            raise UsageError(
                f"--out has answers with another {', '.join(changed)}; use another folder"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


class Chat:
    """A local chat model that answers batches of questions."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not options.model.is_dir():
            raise UsageError(
                f"--model must be a folder with a Hugging Face model, got {options.model}"
            )
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        if options.template == "paper" or self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = PAPER_TEMPLATE
        dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
        model = AutoModelForCausalLM.from_pretrained(
            options.model, local_files_only=True, dtype=dtype
        )
        self.model = model.to(options.device).eval()
        self._only_greedy()

    def _only_greedy(self) -> None:
        """Sampling, penalties and lengths of the model's own config would reach some conditions."""
        from transformers import GenerationConfig

        old, tokenizer = self.model.generation_config, self.tokenizer
        eos = old.eos_token_id if old.eos_token_id is not None else tokenizer.eos_token_id
        ends = eos if isinstance(eos, list) else [eos]
        pads = (old.pad_token_id, tokenizer.pad_token_id, ends[0], 0)
        self.model.generation_config = GenerationConfig(
            bos_token_id=old.bos_token_id, eos_token_id=eos,
            pad_token_id=next(token for token in pads if token is not None),
        )  # fmt: skip

    @torch.inference_mode()
    def answer(self, questions: Sequence[str], condition: Condition) -> list[str]:
        """One answer per question."""
        options, chats = self.options, [[{"role": "user", "content": q}] for q in questions]
        inputs = self_contrastive.self_contrastive_inputs(
            self.tokenizer, chats, safety_prompt=condition.prompt or options.safety_prompt,
            plain_prompt=options.plain_prompt, device=self.model.device,
        )  # fmt: skip
        if condition.ratio is not None:
            ids = self_contrastive.self_contrastive_generate(
                self.model, **inputs, ratio=condition.ratio, max_new_tokens=options.max_new_tokens
            )
            width = inputs["input_ids"].shape[1]
        else:
            side = "" if condition.prompt is None else "safety_"
            prompt = inputs[f"{side}input_ids"]
            ids = self.model.generate(
                prompt, attention_mask=inputs[f"{side}attention_mask"], do_sample=False,
                max_new_tokens=options.max_new_tokens,
            )  # fmt: skip
            width = prompt.shape[1]
        texts = self.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]


def file_of(out: Path, name: str, condition: Condition) -> Path:
    """Where the answers of one cell of the table are kept."""
    words = f"{name} {condition.name}".lower().replace(" -", " minus ")
    return out / (re.sub(r"[^a-z0-9.+]+", "-", words) + ".jsonl")


def conditions(options: argparse.Namespace) -> list[Condition]:
    """The rows of the table."""
    plain = "no prompt" if options.plain_prompt is None else "plain prompt"
    rows = [Condition(plain), Condition("safety prompt", options.safety_prompt)]
    if options.helpful:
        rows.append(Condition("helpful prompt", self_contrastive.HELPFUL_PROMPT))
    return rows + [
        Condition(f"Self-CD {repr(ratio).removesuffix('.0')}", ratio=ratio)
        for ratio in options.ratios
    ]


def answer_all(
    options: argparse.Namespace, sets: dict[str, list[str]], make_chat: Callable[[], Chat]
) -> dict[tuple[str, str], Answers]:
    """Answers of every cell, those that are missing from the model; loads it if any are."""
    from tqdm import tqdm

    found = {
        (name, condition): read_answers(file_of(options.out, name, condition), questions, condition)
        for name, questions in sets.items()
        for condition in conditions(options)
    }
    missing = {
        # The longest first: if a batch does not fit the memory, it shows at once.
        (name, condition): sorted(set(range(len(sets[name]))) - set(answers),
                                  key=lambda i, name=name: -len(sets[name][i]))
        for (name, condition), answers in found.items()
    }  # fmt: skip
    total = sum(map(len, missing.values()))
    chat = make_chat() if total else None
    with tqdm(total=total, unit="answer", disable=not total, dynamic_ncols=True) as bar:
        for (name, condition), todo in missing.items():
            bar.set_description(f"{name}, {condition.name}")
            for start in range(0, len(todo), options.batch_size):
                batch = todo[start : start + options.batch_size]
                questions = [sets[name][i] for i in batch]
                texts = chat.answer(questions, condition) if chat is not None else []
                rows = [
                    {"id": i, "condition": condition.name, "question": question, "answer": text}
                    for i, question, text in zip(batch, questions, texts, strict=True)
                ]
                write_answers(file_of(options.out, name, condition), rows)
                found[name, condition].update({row["id"]: row["answer"] for row in rows})
                bar.update(len(rows))
    return {
        (name, condition.name): {i: text for i, text in answers.items() if i < len(sets[name])}
        for (name, condition), answers in found.items()
    }


def refusal_counts(
    sets: dict[str, list[str]], answers: dict[tuple[str, str], Answers], judge: Judge
) -> list[dict[str, Any]]:
    """One entry per cell of the table."""
    cells = []
    for (name, condition), texts in answers.items():
        refused = sum(bool(judge(sets[name][i], text)) for i, text in sorted(texts.items()))
        cells.append({"set": name, "condition": condition, "refused": refused, "asked": len(texts)})
    return cells


def _share(cell: dict[str, Any]) -> str:
    refused, asked = cell["refused"], cell["asked"]
    return f"{100 * refused / max(1, asked):.1f} ({refused}/{asked})"


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Refusals in percent, conditions down, sets across."""
    by_place = {(cell["condition"], cell["set"]): cell for cell in cells}
    names = list(dict.fromkeys(cell["set"] for cell in cells))
    rows = [["refusals, %", *names]]
    for condition in dict.fromkeys(cell["condition"] for cell in cells):
        found = [by_place[condition, name] for name in names]
        rows.append([condition, *map(_share, found)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a Hugging Face chat model")
    add("--data", type=Path, required=True, help="folder with OKTest.csv and xstest_v2_prompts.csv")
    add("--out", type=Path, default=Path("self-cd"), help="folder of answers and table (self-cd)")
    add("--ratios", type=float, nargs="*", default=[2.5], help="of Self-CD (2.5)")
    add("--sets", nargs="+", choices=SETS, default=list(SETS), help="question sets (all)")
    add("--limit", type=int, help="first questions of each set only")
    add("--batch-size", type=int, default=8, help="questions at a time (8)")
    add("--max-new-tokens", type=int, default=200, help="length of an answer (200, as released)")
    add("--judge", help="module:function, (question, answer) -> True for a refusal")
    add("--template", choices=("model", "paper"), default="model", help="chat template (model)")
    add("--plain-prompt", help="system prompt of the context without the safety prompt (none)")
    add("--safety-prompt", default=self_contrastive.SAFETY_PROMPT, help="(the released one)")
    add("--helpful", action="store_true", help="also the paper's baseline, a prompt to be helpful")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    kept = ("template", "plain_prompt", "safety_prompt", "max_new_tokens", "dtype")
    settings = {"model": str(options.model.resolve())}
    settings |= {name: getattr(options, name) for name in kept}
    try:
        judge = load_judge(options.judge)
        sets = {name: questions[: options.limit]
                for name, questions in read_questions(options.data).items()
                if name in options.sets}  # fmt: skip
        check_settings(options.out, settings)
        answers = answer_all(options, sets, lambda: Chat(options))
    except UsageError as error:
        print(f"self_cd: {error}", file=sys.stderr)
        return 2
    cells = refusal_counts(sets, answers, judge)
    by = options.judge or "phrases that begin refusals; the paper's judge is GPT-4"
    (options.out / "table.json").write_text(
        json.dumps({**settings, "judge": by, "cells": cells}, indent=1) + "\n"
    )
    print(f"{table(cells)}\n\njudge: {by}\nanswers and table.json: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
