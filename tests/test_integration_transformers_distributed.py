"""Our loss in Hugging Face models on several processes: DDP, FSDP2, tensor parallelism, Trainer."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import sharded_pool
from hf_cases import loss_of_logits, make_model, with_grads
from trimtab.testing import assert_same_bits, assert_within_budget

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("no gloo", allow_module_level=True)

import hf_distributed_cases as cases

NOT_IN_TRAINING = {"evaluation", "evaluation with logits", "logits"}


@pytest.fixture(scope="module")
def pool():
    slow = ("transformers.models.llama.modeling_llama", "torch._dynamo", "accelerate")
    made = sharded_pool.Pool(2, ["hf_distributed_cases", *slow])
    yield made
    made.close()


def one_process(spec, batch):
    """The weighted loss from the logits of one process, and what float64 makes of it."""
    model = cases.model_of(spec)
    results = []
    for twin in (model, copy.deepcopy(model).double()):
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        output = twin(**inputs)
        found = with_grads(loss_of_logits(output, twin, batch), twin)
        results.append({**found, "logits": output.logits.detach()})
        for name in ("evaluation", "evaluation with logits"):
            results[-1][name] = found["loss"]
    return results


def check(spec, ranks, batch=None, dtype=None):
    """Every rank has the loss and the gradients of one process."""
    eager, truth = one_process(spec, cases.batch_of() if batch is None else batch)
    scale = max(float(v.abs().max()) for name, v in truth.items() if name != "logits")
    for found in ranks:
        assert found.keys() >= truth.keys() - NOT_IN_TRAINING
        for name, value in found.items():
            assert_within_budget(
                value, eager[name], truth[name], name=name, dtype=dtype, scale=scale
            )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_ddp(pool, kind):
    check({"kind": kind}, pool.run(cases.copied, {"kind": kind}))


@pytest.mark.parametrize(
    ("kind", "head", "order"),
    [
        ("llama", "root", "before"),
        ("llama", "root", "after"),
        ("llama", "root, sharded again", "before"),
        ("llama", "kept", "before"),
        ("llama", "kept with its norm", "before"),
        ("qwen2", "root", "before"),  # tied to the embeddings
    ],
)
def test_fully_sharded(pool, kind, head, order):
    spec = {"kind": kind, "head": head, "order": order}
    check(spec, pool.run(cases.fully_sharded, spec))


def test_the_first_fsdp(pool):
    check({}, pool.run(cases.fully_sharded_by_fsdp1, {}))


def test_fully_sharded_in_16_bits(pool):
    spec = {"kind": "llama"}
    _, truth = one_process(spec, cases.batch_of())
    narrow = cases.model_of(spec).bfloat16()
    output = narrow(cases.batch_of()["input_ids"])
    eager = loss_of_logits(output, narrow, cases.batch_of()).detach()
    for loss, dtype, of_grad in pool.run(cases.fully_sharded_in_16_bits, spec):
        assert dtype == of_grad == torch.float32
        assert_within_budget(
            loss,
            eager,
            truth["loss"],
            dtype=torch.bfloat16,
            scale=float(truth["logits"].abs().max()),
        )


@pytest.mark.parametrize("layout", ["gathered", "sliced"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gptj"])
def test_tensor_parallel(pool, kind, order, layout):
    changes = {"tie_word_embeddings": False} | (
        {"num_key_value_heads": 2} if kind == "llama" else {}
    )
    plan = cases.ATTENTION_AND_MLP if kind == "llama" else {}
    spec = {"kind": kind, "changes": changes, "plan": plan, "order": order, "layout": layout}
    first, second = pool.run(cases.tensor_parallel, spec)
    check(spec, [first])
    for name, value in first.items():
        assert_same_bits(second[name], value, name=name)


def test_the_plan_of_transformers(pool, tmp_path):
    changes = {"vocab_size": 128, "num_key_value_heads": 2}
    spec = {"changes": changes, "folder": str(tmp_path)}
    make_model("llama", **changes).save_pretrained(tmp_path)
    first, second = pool.run(cases.planned, spec)
    check(spec, [first])
    for name, value in first.items():
        assert_same_bits(second[name], value, name=name)


def test_trainer(pool, tmp_path):
    """Two processes, each with its own rows and two micro-batches: the step of one process."""
    from test_integration_transformers_training import Rows

    rows = Rows(weights=True).rows
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    batch["labels"][:, 0] = -100  # predicted by nothing, so Trainer does not count it
    spec = {"folder": str(tmp_path)}
    eager, truth = one_process(spec, batch)
    model = make_model()
    # The step is read off parameters that are larger than it.
    scale = max(float(p.detach().abs().max()) for p in model.parameters()) / 0.01
    first, second = pool.run(cases.trained, spec)
    for name, step in first.items():
        assert_same_bits(second[name], step, name=name)
        if name == "loss":
            assert abs(float(step) - float(truth["loss"])) < 1e-4
        else:
            assert_within_budget(
                step, eager[name], truth[name], name=name, dtype=torch.float32, scale=scale
            )


REFUSED = {
    "sharded before": "apply before fully_shard, or pass check=False",
    "slices of logits": r"with logits \(1, 8, 6[34]\) of \(1, 8, 127\).* before parallelize_module",
    "sharded again": "model must keep its head as its forward had it .* reshard_after_forward",
    "adapters": "model must have a head without adapters where it is a DTensor",
    "logits in slices": "model must give the logits of all 127 classes to a loss, got 6[34]",
    "scores of tokens": "model must have a whole head, got a DTensor",
    "rows of hidden states": "model must give its head hidden states that every rank has all of",
}


def test_refused_in_words(pool):
    for rank in pool.run(cases.refused, {}):
        assert rank.keys() == REFUSED.keys()
        for name, text in rank.items():
            assert text.startswith("ValueError: model must"), (name, text)
            assert re.search(REFUSED[name], text), (name, text)
