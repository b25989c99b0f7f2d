"""What processes run for the tests of our loss in models that wrappers copy or cut."""

from __future__ import annotations

import functools
import os
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import trimtab.integrations.transformers as hf
from hf_cases import make_batch, make_model, with_grads
from trimtab.integrations._deferred_loss import Settings
from trimtab.integrations.trl import _TokenScores

ATTENTION_AND_MLP = {
    "model.layers.*.self_attn.[qkv]_proj": "columns",
    "model.layers.*.self_attn.o_proj": "rows",
    "model.layers.*.mlp.gate_proj": "columns",
    "model.layers.*.mlp.up_proj": "columns",
    "model.layers.*.mlp.down_proj": "rows",
}


def model_of(spec: dict[str, Any]) -> Any:
    return make_model(spec.get("kind", "llama"), **spec.get("changes", {}))


def batch_of(rows: int = 6) -> dict[str, Tensor]:
    """Rows that ranks can share, with weights; their numbers of labels differ."""
    batch = make_batch(rows)
    for row in range(rows):
        batch["labels"][row, : row + 3] = -100
    batch["loss_weights"] = torch.linspace(-1.0, 2.0, rows * 13).reshape(rows, 13)
    return batch


def count_of(batch: dict[str, Tensor]) -> Tensor:
    """What Trainer counts over the devices."""
    return (batch["labels"][:, 1:] != -100).sum()


def gathered(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, by the names that the model has without its wrapper."""
    whole = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in found.items()}
    return {name.removeprefix("module."): value for name, value in whole.items()}


def raised(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def mesh_of_all() -> Any:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def averaged_step(model: Any, wrapped: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """A rank's rows as Trainer passes them: the divisor of all ranks, the loss times the ranks."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    batch = batch_of()
    count = count_of(batch)
    for _ in range(spec.get("passes", 1)):
        # Before the forward pass: within it FSDP shows other parameters.
        wrapped.zero_grad()
        output = wrapped(
            **{name: value[rank::ranks] for name, value in batch.items()}, num_items_in_batch=count
        )
        assert output.logits is None
        (output.loss * ranks).backward()
    loss = output.loss.detach().clone()
    torch.distributed.all_reduce(loss)
    grads = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    return gathered({"loss": loss, **grads})


def copied(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """DDP around a model that has our loss."""
    model = model_of(spec)
    hf.apply(model)
    return averaged_step(model, torch.nn.parallel.DistributedDataParallel(model), spec)


def shard_fully(model: Any, head: str, **settings: Any) -> Any:
    """FSDP2 as people use it: each layer, the rest with the model, and the head in some way."""
    settings["mesh"] = mesh_of_all()
    for layer in model.model.layers:
        fully_shard(layer, **settings)
    if head == "kept":
        fully_shard(model.lm_head, reshard_after_forward=False, **settings)
    elif head == "kept with its norm":
        fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **settings)
    elif head == "sharded again":
        fully_shard(model.lm_head, **settings)
    elif head == "root, sharded again":
        settings["reshard_after_forward"] = True  # as accelerate asks for
    return fully_shard(model, **settings)


def fully_sharded(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """FSDP2 around a model that has our loss, or that gets it."""
    model = model_of(spec)
    if spec.get("order") != "after":
        hf.apply(model)
    shard_fully(model, spec["head"])
    if spec.get("order") == "after":
        hf.apply(model, check=False)
    return averaged_step(model, model, {**spec, "passes": 2})


def fully_sharded_by_fsdp1(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """FSDP's first version, with the parameters that the model has."""
    model = model_of(spec)
    hf.apply(model)
    policy = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={type(model.model.layers[0])}
    )
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    found = averaged_step(model, wrapped, spec)
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        grads = {name: p.grad.clone() for name, p in wrapped.named_parameters()}
    plain = {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in grads.items()}
    return {"loss": found["loss"], **plain}


def fully_sharded_in_16_bits(group: Any, spec: dict[str, Any]) -> tuple[Any, ...]:
    """FSDP2's mixed precision: dtypes of the loss and of the head's gradient."""
    model = model_of(spec)
    hf.apply(model)
    shard_fully(model, "root", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found = averaged_step(model, model, {})
    return found["loss"], found["loss"].dtype, found["lm_head.weight"].dtype


def cut(model: Any, layout: str, plan: dict[str, str]) -> Any:
    """Torch's own tensor parallelism, with each rank's logits or those of all."""
    styles = {"columns": ColwiseParallel(), "rows": RowwiseParallel()}
    output = Replicate() if layout == "gathered" else Shard(-1)
    plan = {name: styles[kind] for name, kind in plan.items()}
    head = {"lm_head": ColwiseParallel(output_layouts=output)}
    return parallelize_module(model, mesh_of_all(), {**plan, **head})


def tensor_parallel(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """Our loss before or after torch has cut the model; its own logits after reverting."""
    model, batch = model_of(spec), batch_of()
    if spec["order"] == "before":
        hf.apply(model)
    cut(model, spec["layout"], spec["plan"])
    if spec["order"] == "after":
        hf.apply(model, check=spec["layout"] == "gathered")
    output = model(**batch)
    assert output.logits is None
    found = gathered(with_grads(output.loss, model))
    with torch.no_grad():
        found["evaluation"] = model.eval()(**batch, return_logits=False).loss
    if spec["layout"] == "gathered":
        with torch.no_grad():
            found["evaluation with logits"] = model(**batch, return_logits=True).loss
        hf.revert(model)
        del batch["loss_weights"]
        found["logits"] = model(**batch).logits.detach()
    return found


def planned(group: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Transformers' own plan for tensor parallelism, from a saved model."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["folder"], tp_plan="auto")
    assert type(model.lm_head.weight).__name__ == "DTensor"
    model, batch = model.train(), batch_of()
    hf.apply(model)
    output = model(**batch)
    assert output.logits is None
    found = gathered(with_grads(output.loss, model))
    with torch.no_grad():
        found["evaluation"] = model.eval()(**batch, return_logits=False).loss
    hf.revert(model)
    del batch["loss_weights"]
    return {**found, "logits": model(**batch).logits.detach()}


def trained(group: Any, spec: dict[str, Any]) -> dict[str, Tensor]:
    """A step of Trainer on two processes: the change of each parameter."""
    from test_integration_transformers_training import Rows, make_trainer

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # Accelerate wants an address even where the group exists.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost",
        MASTER_PORT="29500", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    model = model_of(spec)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hf.apply(model)
    trainer = make_trainer(
        model, Rows(weights=True), spec["folder"], optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    assert trainer.accelerator.num_processes == ranks
    trainer.args.max_steps = 1
    trainer.train()
    step = {n: (before[n].double() - p.detach()) / 0.01 for n, p in model.named_parameters()}
    return {"loss": torch.tensor(trainer.state.log_history[0]["loss"]), **step}


def refused(group: Any, spec: dict[str, Any]) -> dict[str, str]:
    """What can't work, and what it says."""

    def outcome(prepare: Any, **settings: Any) -> str:
        def run() -> None:
            hf.apply(model, **settings)
            model(**batch_of())

        model = prepare(make_model())
        return raised(run)

    def resharded() -> None:
        model = make_model()
        hf.apply(model)
        shard_fully(model, "sharded again")(**batch_of())

    def adapted(model: Any) -> Any:
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["lm_head"])
        return peft.get_peft_model(model, config)

    def adapted_and_cut() -> None:
        model = adapted(make_model())
        hf.apply(model)
        cut(torch.nn.ModuleDict({"lm_head": model.get_base_model().lm_head.base_layer}),
            "gathered", {})  # fmt: skip
        model(**batch_of())

    def rows_of_hidden() -> None:
        model = make_model()
        hf.apply(model)
        mesh = mesh_of_all()
        model.lm_head.register_forward_pre_hook(
            lambda _, args: (DTensor.from_local(args[0], mesh, [Shard(1)]),)
        )
        model(**batch_of())

    def logits_in_slices() -> None:
        model, batch = make_model().eval(), batch_of()
        hf.apply(model)
        cut(model, "sliced", {})
        del batch["loss_weights"]
        model(**batch)

    def scores_of_tokens() -> None:
        model = cut(make_model(), "gathered", {})
        with _TokenScores(model, Settings()).in_place():
            batch = batch_of()
            del batch["loss_weights"]
            model(**batch)

    return {
        "sharded before": outcome(lambda model: shard_fully(model, "root")),
        "slices of logits": outcome(lambda model: cut(model, "sliced", {})),
        "sharded again": raised(resharded),
        "adapters": raised(adapted_and_cut),
        "logits in slices": raised(logits_in_slices),
        "scores of tokens": raised(scores_of_tokens),
        "rows of hidden states": raised(rows_of_hidden),
    }
