"""O-LoRA in a ``transformers.Trainer``: ``OLoRACallback``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.algorithms.olora import OLoRA
from trimtab.algorithms.olora.files import folder_of, save_index

try:
    from transformers import TrainerCallback
except ImportError as error:
    _missing = error

    class TrainerCallback:  # type: ignore[no-redef]
        """Stands in for transformers' class, and says so when it is used."""

        def __init__(self) -> None:
            raise ImportError(
                "OLoRACallback must have transformers and accelerate, which can't be imported; "
                "pip install 'transformers[torch]'"
            ) from _missing


_SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM")
_STATE = "olora"


class OLoRACallback(TrainerCallback):
    """Adds O-LoRA to any ``Trainer`` or subclass of it.

    ::

        trainer = Trainer(olora.model, args, ..., callbacks=[OLoRACallback(olora)])

    At the start of every optimizer step it writes the gradient of ``olora.penalty()`` into
    ``.grad``, and those of the losses are added to it. So an optimizer step has the penalty once,
    whatever ``gradient_accumulation_steps``, ``num_items_in_batch`` or the number of processes;
    fp16's scale is applied; clipping and "grad_norm" see the sum. (The released code adds the
    penalty undivided to each of k accumulated losses: for the same effect give k times its
    ``lamda_1``.) The "loss" that Trainer logs is the task's own.

    Logs "olora_penalty", the mean since the last log, also into ``state.log_history``; nothing is
    synchronised until Trainer logs. Each callback sees what those before it wrote, so for the
    reporters of ``report_to`` to have it put it first:
    ``trainer.callback_handler.callbacks.insert(0, OLoRACallback(olora))``.

    Checkpoints hold every task as PEFT saves them, and what ``OLoRA.load`` needs. Resuming and
    ``load_best_model_at_end`` restore the task in training. Make a new Trainer for each task, since
    an optimizer keeps the parameters that it was made with.

    Works with DDP, mixed precision and gradient checkpointing. DeepSpeed and FSDP keep gradients
    elsewhere and are refused: with ZeRO-1 and 2 add ``olora.penalty()`` to the loss in
    ``compute_loss`` instead (not measured).

    Args:
        olora: with a task in training when training begins.

    Raises:
        ImportError: transformers is missing.
    """

    def __init__(self, olora: OLoRA) -> None:
        super().__init__()
        if not isinstance(olora, OLoRA):
            raise TypeError(f"olora must be an OLoRA, got {type(olora).__name__}; use OLoRA(model)")
        self.olora = olora
        self._written: int | None = None
        self._sum: Any = 0.0
        self._count = 0

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Makes all tasks active again, which resuming undoes, and checks what has to hold.

        Raises:
            ValueError: another model, an optimizer that lacks the task's parameters or does not
                step on ``.grad``, or a checkpoint of other tasks.
            RuntimeError: no task in training.
        """
        olora = self.olora
        if model is not olora.model:
            raise ValueError(
                f"model must be that of OLoRA, got another {type(model).__name__}; pass "
                "olora.model to the Trainer"
            )
        _check_backend(args)
        olora.activate()
        olora.check("OLoRACallback")
        _check_optimizer(olora, optimizer)
        _check_resumed(olora, state)
        state.stateful_callbacks[_STATE] = {"tasks": olora.tasks()}
        if args.load_best_model_at_end and "default" in olora.finished:
            # Trainer loads the root of the best checkpoint into the first active adapter, and what
            # PEFT saves there is "default".
            others = [task for task in olora.tasks() if task != "default"]
            model.base_model.active_adapter = ["default", *others]
        self._sum, self._count, self._written = 0.0, 0, None

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """The gradient: the parameters are those of all backward passes of the step."""
        # Trainer begins a step again whose micro-batches an epoch's end has cut short.
        if self._written == state.global_step:
            return
        self._written = state.global_step
        value = self.olora.accumulate_grads(getattr(optimizer, "scaler", None))
        self._sum = self._sum + value
        self._count += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Notices a loop that never begins a step.

        Raises:
            RuntimeError: the step that has ended was without the penalty.
        """
        if self._written != state.global_step - 1:
            raise RuntimeError(
                "Trainer must call on_step_begin before each step with OLoRACallback, got a step "
                "without it; add olora.penalty() to the loss in compute_loss instead"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Adds the mean penalty to the losses that are logged."""
        if self._count and logs is not None and "loss" in logs:
            logs["olora_penalty"] = float(self._sum) / self._count
            if state.log_history:
                state.log_history[-1]["olora_penalty"] = logs["olora_penalty"]
            self._sum, self._count = 0.0, 0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Puts what ``OLoRA.load`` needs into a checkpoint that has all tasks."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        saved = all((folder_of(folder, t) / "adapter_config.json").exists()
                    for t in self.olora.tasks())  # fmt: skip
        if state.is_world_process_zero and saved:
            save_index(self.olora, folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Loads the task of the best checkpoint, of which Trainer reads the root alone."""
        best, task, model = state.best_model_checkpoint, self.olora.task, self.olora.model
        if args.load_best_model_at_end and best is not None and task is not None:
            mode = model.training
            model.load_adapter(str(folder_of(best, task)), task)
            model.train(mode)
            self.olora.activate()


def _check_backend(args: Any) -> None:
    """Refuses what does not step on ``.grad`` of whole parameters."""
    kind = getattr(getattr(args, "distributed_state", None), "distributed_type", "NO")
    kind = getattr(kind, "value", str(kind))
    if kind in _SHARDING or getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        raise ValueError(
            f"Trainer must keep whole gradients in .grad with OLoRACallback, got {kind}; use DDP, "
            "or with DeepSpeed ZeRO-1 and 2 add olora.penalty() to the loss in compute_loss"
        )


def _check_optimizer(olora: OLoRA, optimizer: Any) -> None:
    """Whether the optimizer trains the task."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = olora.parameters()
    missing = sum(id(p) not in held for p in wanted)
    if missing:
        raise ValueError(
            f"optimizer must hold the parameters of {olora.task!r}, got one without {missing} of "
            f"{len(wanted)}; make a new Trainer for each task, after start_task"
        )


def _check_resumed(olora: OLoRA, state: Any) -> None:
    """Whether a checkpoint that Trainer has read is of these tasks.

    Trainer reads the folders of a checkpoint, and its root where there are none, but of several
    tasks PEFT saves "default" in the root.
    """
    if state.global_step == 0:
        return
    found = state.stateful_callbacks.get(_STATE, {}).get("tasks", olora.tasks())
    unread = olora.task == "default" and bool(olora.finished)
    if found != olora.tasks() or unread:
        raise ValueError(
            f"resume_from_checkpoint must be of the tasks {olora.tasks()}, got {found}; Trainer "
            "does not read 'default' beside others: use OLoRA.load(base, checkpoint), and resume "
            "with its model"
        )
