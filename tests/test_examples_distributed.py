"""The distributed example trains alike on one process and on several, and starts by torchrun."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.testing import assert_within_budget

pytest.importorskip("transformers")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("no gloo", allow_module_level=True)

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "distributed.py"
STEPS, ROWS, RATE = 4, 8, 0.5
CPU_ONLY = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # a machine may have one GPU
# Ranks, and how many of them share each matrix.
LAYOUTS = {"one": (1, 1), "data": (2, 1), "tensor": (2, 2), "both": (4, 2)}


def start() -> dict[str, Any]:
    """What the example defines, on the CPU and in float64."""
    os.environ.update(CPU_ONLY)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    return runpy.run_path(str(EXAMPLE))


def train(rank: int, ranks: int, tensor: int, port: int) -> dict[str, Tensor]:
    """What one of the processes that torchrun would start does; losses, and every parameter."""
    example = start()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )  # fmt: skip
    mesh, model = example["join"](tensor), example["make_model"]()
    example["distribute"](model, mesh)
    assert model.lm_head.weight.to_local().shape[0] == example["VOCABULARY"] // ranks
    # A step that is as large as its gradient; Adam's is not.
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = example["train"](model, optimizer, mesh, STEPS, ROWS)
    found = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    torch.distributed.destroy_process_group()
    return {"losses": torch.tensor(losses, dtype=torch.float64), **found}


def train_plainly(dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in the plainest way: no ranks, no micro-batches, the loss of all logits."""
    example = start()
    model, losses = example["make_model"]().to(dtype), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        parts = example["micro_batches"](step, ROWS, OneRank)
        ids, labels = (torch.cat([p[name] for p in parts]) for name in ("input_ids", "labels"))
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = {name: p.detach() for name, p in model.named_parameters()}
    return {"losses": torch.tensor(losses, dtype=torch.float64), **found}


class OneRank:
    """What the example asks of a mesh, without a process group."""

    device_type = "cpu"

    def __class_getitem__(cls, _: str) -> type:
        return cls

    @staticmethod
    def size() -> int:
        return 1

    @staticmethod
    def get_local_rank(_: str) -> int:
        return 0


@pytest.fixture(scope="module")
def pool():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_examples_distributed", "transformers.models.llama.modeling_llama"]
    )
    with ProcessPoolExecutor(4, mp_context=context) as made:
        yield made


def free_port() -> int:
    store = torch.distributed.TCPStore("localhost", 0, is_master=True)
    return store.port


@pytest.fixture(scope="module")
def plain(pool):
    """What one process finds in float32 and in float64."""
    return [
        pool.submit(train_plainly, dtype).result(60) for dtype in (torch.float32, torch.float64)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_steps_are_the_same_on_any_number_of_processes(pool, plain, layout):
    eager, truth = plain
    assert truth["losses"][0] - truth["losses"][-1] > 0.05
    ranks, tensor = LAYOUTS[layout]
    port = free_port()
    # No process takes a second rank, as the first waits for the others.
    started = [pool.submit(train, rank, ranks, tensor, port) for rank in range(ranks)]
    for each in started:
        found = each.result(timeout=120)
        assert found.keys() == truth.keys()
        for name, value in found.items():
            # Llama's norms are float32 whatever the model is.
            assert_within_budget(value, eager[name], truth[name], name=name, dtype=torch.float32)


def test_torchrun(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(EXAMPLE), "--tensor", "2", "--steps", "10",
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path,
                           env={**os.environ, **CPU_ONLY})  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    assert re.fullmatch(r"step 10: loss \d\.\d{3}, [\d,]+ tokens/s\n", found.stdout)


def test_rows_that_can_not_be_shared(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="rows must be a multiple of 2, got 5"):
        runpy.run_path(str(EXAMPLE))["main"](rows=5)
