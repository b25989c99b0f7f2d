"""One training script from a laptop to a cluster: torch's own FSDP2 and tensor parallelism.

A process on a laptop, then four, of which pairs share every matrix::

    python docs/examples/distributed.py
    torchrun --nproc-per-node 4 docs/examples/distributed.py --tensor 2

CPUs talk by gloo, GPUs by NCCL. Whatever the number of processes, the steps are the same up to
rounding: they see the same batches, and every token weighs the same.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab.integrations.transformers

VOCABULARY, LENGTH, MICRO_BATCHES = 128, 24, 2
PLAN = {
    "model.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
    # Each rank has some classes. Logits are made, and gathered, in evaluation only.
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}


def join(tensor: int) -> DeviceMesh:
    """Joins the other processes, if torchrun has started any: a mesh of data x tensor ranks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    shape = (dist.get_world_size() // tensor, tensor)
    return init_device_mesh(device, shape, mesh_dim_names=("data", "tensor"))


def make_model() -> LlamaForCausalLM:
    """A tiny model, the same on every rank; yours comes from ``from_pretrained``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    trimtab.integrations.transformers.apply(model)  # the one line, before what cuts the model
    return model


def distribute(model: LlamaForCausalLM, mesh: DeviceMesh) -> None:
    """Each rank keeps its slices: of a matrix between tensor ranks, of those between data ranks."""
    model.to(mesh.device_type)
    parallelize_module(model, mesh["tensor"], PLAN)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])  # the head with it, which is there until the loss is


def micro_batches(step: int, rows: int, mesh: DeviceMesh) -> list[dict[str, torch.Tensor]]:
    """This rank's share of a step: sequences that count, and how they go on after a prompt."""
    generator = torch.Generator().manual_seed(step)
    ids = (torch.arange(LENGTH) + torch.randint(100, (rows, 1), generator=generator)) % VOCABULARY
    prompt = torch.randint(1, LENGTH // 2, (rows, 1), generator=generator)
    labels = ids.masked_fill(torch.arange(LENGTH) < prompt, -100)
    own = slice(mesh.get_local_rank("data"), None, mesh["data"].size())
    parts = (t[own].to(mesh.device_type).chunk(MICRO_BATCHES) for t in (ids, labels))
    return [{"input_ids": i, "labels": t} for i, t in zip(*parts, strict=True)]


def train(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    mesh: DeviceMesh,
    steps: int,
    rows: int,
) -> list[float]:
    """Trains, and returns the loss of each step, a mean over the tokens of all ranks."""
    data, ranks = mesh.get_group("data"), mesh["data"].size()
    if rows % (ranks * MICRO_BATCHES):
        raise ValueError(f"rows must be a multiple of {ranks * MICRO_BATCHES}, got {rows}")
    losses, tokens, began = [], 0, time.perf_counter()
    for step in range(steps):
        parts = micro_batches(step, rows, mesh)
        count = sum((part["labels"][:, 1:] != -100).sum() for part in parts)
        dist.all_reduce(count, group=data)
        loss = torch.zeros((), device=mesh.device_type)
        for part in parts:
            model.set_requires_gradient_sync(part is parts[-1])
            output = model(**part, num_items_in_batch=count)
            (output.loss * ranks).backward()  # FSDP averages over its ranks
            loss += output.loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss, group=data)
        losses.append(loss.item())
        tokens += rows * LENGTH
        if dist.get_rank() == 0 and (step + 1) % 10 == 0:
            rate = tokens / (time.perf_counter() - began)
            print(f"step {step + 1}: loss {losses[-1]:.3f}, {rate:,.0f} tokens/s")
    return losses


def main(tensor: int = 1, steps: int = 40, rows: int = 16) -> list[float]:
    """Trains on as many ranks as there are, ``tensor`` of which share each matrix."""
    mesh = join(tensor)
    try:
        model = make_model()
        distribute(model, mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        return train(model, optimizer, mesh, steps, rows)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share each matrix")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=16, help="sequences in a step, of all ranks")
    main(**vars(parser.parse_args()))
