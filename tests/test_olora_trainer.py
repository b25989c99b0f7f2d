"""OLoRACallback: the penalty once per optimizer step, whatever Trainer does around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import peft
import transformers

from olora_cases import (
    dataset,
    frozen_and_trained,
    loop_penalty,
    make_base,
    make_config,
    make_tasks,
)
from trimtab.algorithms.olora import OLoRA
from trimtab.integrations.peft import OLoRACallback

close = torch.testing.assert_close


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}


def make_args(folder: Path, **settings: Any) -> Any:
    settings = {
        "use_cpu": True, "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1,
        "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2, "optim": "sgd",
        "lr_scheduler_type": "constant", "save_strategy": "no", **settings,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **settings)


def train(olora: OLoRA, folder: Path, resume: Any = None, kind: str = "llama", **settings: Any):
    """A stock Trainer with the callback, after training."""
    metrics = settings.pop("compute_metrics", None)
    trainer = transformers.Trainer(
        olora.model, make_args(folder, **settings), train_dataset=dataset(kind=kind),
        eval_dataset=dataset(4, kind), callbacks=[OLoRACallback(olora)], compute_metrics=metrics,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def make_double(kind: str = "llama", first: str = "t0", **settings: Any) -> OLoRA:
    """Two tasks, the second in training, in float64 so that equal means equal."""
    torch.manual_seed(0)
    model = peft.get_peft_model(make_base(kind), make_config(kind), adapter_name=first)
    olora = OLoRA(model, **{"lamda_1": 0.3, "lamda_2": 0.1, **settings})
    olora.start_task("t1", make_config(kind, rank=2))
    olora.model.double()
    return olora


class PenaltyInLoss(transformers.Trainer):
    """The same by hand: the penalty is added to the losses, a k-th to each of k that are summed."""

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, **kwargs)
        summed = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        parts = self.current_gradient_accumulation_steps if summed else 1
        penalty = loop_penalty(self.model, ["t0"], "t1", lamda_1=0.3, lamda_2=0.1)
        return loss + penalty / parts


ACCUMULATION = {"gradient_accumulation_steps": 3}
REMAINDER = {"gradient_accumulation_steps": 5, "max_grad_norm": 0.0, "max_steps": -1,
             "num_train_epochs": 2}  # fmt: skip
CHECKPOINTING = {"gradient_checkpointing": True, "max_grad_norm": 1e-3}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", ACCUMULATION),
        ("llama", REMAINDER),
        ("llama", CHECKPOINTING),
        ("t5", ACCUMULATION),
        ("bert", ACCUMULATION),
    ],
)
def test_a_run_is_that_of_the_penalty_in_the_loss(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    olora = make_double(kind)
    trainer = train(olora, tmp_path, kind=kind, **settings)
    hand = PenaltyInLoss(
        make_double(kind).model, make_args(tmp_path, **settings), train_dataset=dataset(kind=kind)
    )
    hand.train()
    got, want = adapters(olora.model), adapters(hand.model)
    close(got, want, rtol=1e-9, atol=1e-12)
    assert not all(torch.equal(got[n], p) for n, p in adapters(make_double(kind).model).items())
    for ours, theirs in zip(trainer.state.log_history[:-1], hand.state.log_history, strict=False):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
        total = ours["loss"] + ours["olora_penalty"]
        assert total == pytest.approx(theirs["loss"], rel=1e-6)


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for size, steps in ((6, 1), (2, 3), (1, 6)):
        olora = make_double()
        train(olora, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        runs.append(adapters(olora.model))
    close(runs[1], runs[0], rtol=1e-9, atol=1e-12)
    close(runs[2], runs[0], rtol=1e-9, atol=1e-12)


def test_seq2seq_trainer_and_adamw(tmp_path: Path) -> None:
    olora = make_double("t5", lamda_1=2.0)
    before = olora.overlap()
    args = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=25, report_to="none", disable_tqdm=True,
        learning_rate=1e-2, logging_steps=5, save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Seq2SeqTrainer(
        olora.model, args, train_dataset=dataset(kind="t5"), callbacks=[OLoRACallback(olora)]
    )
    frozen = {n: p for n, p in adapters(olora.model).items() if ".t0." in n}
    trainer.train()
    assert olora.overlap()[0, 1] < 0.5 * before[0, 1]
    close({n: p for n, p in adapters(olora.model).items() if ".t0." in n}, frozen, rtol=0, atol=0)
    logs = [row["olora_penalty"] for row in trainer.state.log_history if "loss" in row]
    assert logs[-1] < 0.5 * logs[0]


def test_mixed_precision(tmp_path: Path) -> None:
    olora = make_tasks(ranks=(3, 2))
    trainer = train(olora, tmp_path, bf16=True, max_steps=1)
    assert {p.dtype for p in olora.parameters()} == {torch.float32}
    assert trainer.state.log_history[0]["olora_penalty"] == pytest.approx(
        float(make_tasks(ranks=(3, 2)).penalty().detach()), rel=1e-6
    )


def test_the_scale_of_fp16_is_that_of_the_loss() -> None:
    """What Trainer does with fp16, which needs CUDA there, with a scaler for the CPU."""
    olora, plain = make_tasks(ranks=(3, 2)), make_tasks(ranks=(3, 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    optimizer = torch.optim.SGD(olora.parameters(), lr=0.1)
    optimizer.scaler = scaler  # as accelerate's AcceleratedOptimizer has it
    callback = OLoRACallback(olora)
    callback.on_step_begin(None, transformers.TrainerState(), None, optimizer=optimizer)
    batch = {
        name: torch.stack([row[name] for row in dataset(2)]) for name in ("input_ids", "labels")
    }
    scaler.scale(olora.model(**batch).loss).backward()
    scaler.unscale_(optimizer)
    (plain.model(**batch).loss + plain.penalty()).backward()
    close([p.grad for p in olora.parameters()], [p.grad for p in plain.parameters()])


class NoSynchronisation(TorchDispatchMode):
    """Refuses what makes the host wait for a device's value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal,
            torch.ops.aten.is_nonzero,
        ), func  # fmt: skip
        return func(*args, **(kwargs or {}))


def test_nothing_is_synchronised_until_trainer_logs(tmp_path: Path) -> None:
    olora = make_tasks(lamda_2=0.1)
    callback = OLoRACallback(olora)
    state, logs = transformers.TrainerState(), {"loss": 1.0}
    values = []
    for _ in range(3):
        values.append(float(olora.penalty().detach()))
        with NoSynchronisation():
            callback.on_step_begin(None, state, None)
        state.global_step += 1
        callback.on_step_end(None, state, None)
        with torch.no_grad():
            olora.parameters()[0].mul_(2.0)
    for other in ({"eval_loss": 1.0}, None):
        callback.on_log(None, state, None, logs=other)
        assert other in ({"eval_loss": 1.0}, None)
    callback.on_log(None, state, None, logs=logs)
    assert logs["olora_penalty"] == pytest.approx(sum(values) / 3, rel=1e-6)
    callback.on_log(None, state, None, logs=(later := {"loss": 1.0}))
    assert later == {"loss": 1.0}


def test_a_step_that_is_begun_twice_has_the_penalty_once() -> None:
    """Trainer does so where an epoch of unknown length ends amid the micro-batches of a step."""
    olora = make_tasks()
    callback, state = OLoRACallback(olora), transformers.TrainerState()
    callback.on_step_begin(None, state, None)
    once = [None if p.grad is None else p.grad.clone() for p in olora.parameters()]
    callback.on_step_begin(None, state, None)
    for parameter, grad in zip(olora.parameters(), once, strict=True):
        assert (parameter.grad is None and grad is None) or torch.equal(parameter.grad, grad)
    assert any(grad is not None for grad in once)


def test_a_loop_without_beginnings_is_noticed() -> None:
    callback, state = OLoRACallback(make_tasks()), transformers.TrainerState()
    state.global_step = 1
    with pytest.raises(RuntimeError, match="must call on_step_begin before each step"):
        callback.on_step_end(None, state, None)


def test_the_callback_takes_an_olora() -> None:
    with pytest.raises(TypeError, match="olora must be an OLoRA, got PeftModel"):
        OLoRACallback(make_tasks().model)


def test_logs_are_means_and_reach_a_reporter_behind(tmp_path: Path) -> None:
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    olora = make_double()
    trainer = transformers.Trainer(
        olora.model, make_args(tmp_path, logging_steps=2), train_dataset=dataset(),
        eval_dataset=dataset(4), callbacks=[Reporter()],
    )  # fmt: skip
    trainer.callback_handler.callbacks.insert(0, OLoRACallback(olora))
    values, penalty = [], olora.penalty
    olora.penalty = lambda: values.append(penalty()) or values[-1]
    trainer.train()
    trainer.evaluate()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(values) == 4
    for row, pair in zip(rows, (values[:2], values[2:]), strict=True):
        assert row["olora_penalty"] == pytest.approx(sum(map(Tensor.item, pair)) / 2)
    assert [row["olora_penalty"] for row in seen if "loss" in row] == [
        row["olora_penalty"] for row in rows
    ]
    assert all("olora_penalty" not in row for row in seen if "loss" not in row)


# Checkpoints.


@pytest.mark.parametrize("first", ["t0", "default"])
@pytest.mark.parametrize("how", ["built again", "load"])
def test_resuming_gives_the_uninterrupted_run(tmp_path: Path, first: str, how: str) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    whole = make_double(first=first)
    start = adapters(whole.model)
    rows = train(whole, tmp_path / "whole", **settings).state.log_history
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "t1" / "adapter_model.safetensors").exists()
    if how == "load":
        olora = OLoRA.load(make_base(), checkpoint)
        olora.model.double()  # PEFT loads float64 files into float32 adapters
        olora.lamda_2 = 0.1
    else:
        olora = make_double(first=first)
        close(adapters(olora.model), start)
    trainer = train(olora, tmp_path / "again", resume=str(checkpoint), **settings)
    got = adapters(olora.model)
    exact = {} if how == "built again" else {"rtol": 1e-6, "atol": 1e-7}
    close(got, adapters(whole.model), **exact)
    assert any(not torch.equal(got[n], p) for n, p in start.items() if ".t1." in n)
    assert frozen_and_trained(olora.model) == ({first}, {"t1"})
    assert set(olora.model.active_adapters) == {first, "t1"}
    for ours, theirs in zip(trainer.state.log_history[:-1], rows[:-1], strict=True):
        assert ours["olora_penalty"] == pytest.approx(theirs["olora_penalty"], rel=1e-6)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_resuming_adds_the_tasks_that_the_checkpoint_has(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_double()
    train(whole, tmp_path, **settings)
    olora = OLoRA(peft.get_peft_model(make_base(), make_config(rank=2), adapter_name="t1"))
    olora.lamda_1, olora.lamda_2 = 0.3, 0.1
    train(olora, tmp_path / "b", resume=str(tmp_path / "checkpoint-2"), **settings)
    assert (olora.task, olora.finished) == ("t1", ["t0"])
    assert frozen_and_trained(olora.model) == ({"t0"}, {"t1"})
    close(adapters(olora.model), {n: p.float() for n, p in adapters(whole.model).items()})


def test_checkpoints_of_other_tasks_are_refused(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(make_double(first="default"), tmp_path, **settings)
    checkpoint = str(tmp_path / "checkpoint-2")
    lacks = OLoRA(peft.get_peft_model(make_base(), make_config(rank=2), adapter_name="t1"))
    with pytest.raises(
        ValueError, match=r"of the tasks \['t1'\], got \['default', 't1'\]; Trainer"
    ):
        train(lacks, tmp_path / "b", resume=checkpoint, **settings)
    model = make_double(first="default").model
    model.set_adapter("default")
    with pytest.raises(ValueError, match=r"of the tasks \['t1', 'default'\]"):
        train(OLoRA(model), tmp_path / "b", resume=checkpoint, **settings)


@pytest.mark.parametrize("first", ["t0", "default"])
@pytest.mark.parametrize("rank", [2, 3])
def test_the_best_checkpoint_is_loaded(tmp_path: Path, first: str, rank: int) -> None:
    """Trainer alone would load nothing, or what is in the root: the adapter named "default"."""
    olora = OLoRA(peft.get_peft_model(make_base(), make_config(), adapter_name=first))
    olora.start_task("t1", make_config(rank=rank))
    frozen = {n: p for n, p in adapters(olora.model).items() if f".{first}." in n}
    trainer = train(
        olora, tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score",
        compute_metrics=lambda _: {"score": 1.0},
    )  # fmt: skip
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"  # the first with the best score
    want = adapters(OLoRA.load(make_base(), best).model)
    close(adapters(olora.model), want, rtol=0.0, atol=0.0)
    close({n: want[n] for n in frozen}, frozen, rtol=0.0, atol=0.0)
    assert frozen_and_trained(olora.model) == ({first}, {"t1"})
    assert olora.model.active_adapters[0] == "t1"  # the one that Trainer resumes
    olora.model.train()
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    assert olora.model.training  # which PEFT's load_adapter ends
    assert json.loads((best / "olora.json").read_text())["training"] == "t1"


# What can't work.


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    olora = make_double()
    with pytest.raises(ValueError, match="model must be that of OLoRA, got another PeftModel"):
        transformers.Trainer(
            make_double().model, make_args(tmp_path), train_dataset=dataset(),
            callbacks=[OLoRACallback(olora)],
        ).train()  # fmt: skip
    trainer = train(olora, tmp_path)
    olora.finish_task()
    with pytest.raises(RuntimeError, match="OLoRACallback must have a task in training"):
        trainer.train()
    olora.start_task("t2", make_config())
    with pytest.raises(ValueError, match="'t2', got one without 8 of 8; make a new Trainer"):
        trainer.train()
    train(olora, tmp_path)


@pytest.mark.parametrize("how", ["deepspeed", "fsdp", "FSDP"])
def test_sharding_backends_are_refused(tmp_path: Path, how: str) -> None:
    args = make_args(tmp_path)
    if how == "FSDP":
        args.distributed_state.distributed_type = "FSDP"
    else:
        setattr(args, how, True)
    olora = make_tasks(ranks=(3,))
    with pytest.raises(ValueError, match=r"whole gradients in .grad with OLoRACallback.*use DDP"):
        OLoRACallback(olora).on_train_begin(args, None, None, model=olora.model)


def test_without_transformers_the_error_says_what_to_install() -> None:
    program = """
import sys
sys.modules["transformers"] = None
from trimtab.integrations.peft import OLoRACallback
try:
    OLoRACallback(None)
except ImportError as error:
    print(error)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "pip install 'transformers[torch]'" in result.stdout, result.stderr


# Two processes.


def train_distributed(folder: str) -> None:
    """What each of two processes runs."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    for name, settings in DISTRIBUTED.items():
        olora = make_double()
        train(olora, Path(folder), ddp_backend="gloo", **settings)
        torch.save(adapters(olora.model), f"{folder}/{name}-{rank}.pt")
    # A process that leaves while the other still talks to it can make that one abort (gloo).
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


DISTRIBUTED: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-2},
    "reentrant": {"gradient_checkpointing": True, "ddp_find_unused_parameters": False,
                  "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}  # fmt: skip


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("no gloo")
    program = "import sys\nfrom test_olora_trainer import train_distributed as f\nf(sys.argv[1])"
    port = str(29000 + os.getpid() % 5000)
    shared = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    ends = "\n".join(output[-2000:] for output in outputs)
    assert [process.returncode for process in processes] == [0, 0], ends
    for name, settings in DISTRIBUTED.items():
        one = make_double()
        train(one, tmp_path, per_device_train_batch_size=4, **settings)
        found = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]
        close(found[0], found[1], rtol=0.0, atol=0.0)
        close(found[0], adapters(one.model), rtol=1e-9, atol=1e-12)
