"""O-LoRA: what is refused, in words, before anything is changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft

from olora_cases import frozen_and_trained, loop_penalty, make_base, make_config, make_tasks
from trimtab.algorithms import olora as module
from trimtab.algorithms.olora import OLoRA
from trimtab.algorithms.olora import peft_model as peft_side

close = torch.testing.assert_close


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("lamda_1 must be a finite number", {"lamda_1": -0.1}),
        ("lamda_2 must be a finite number", {"lamda_2": math.inf}),
        ("lamda_1 must be a finite number", {"lamda_1": "0.5"}),
        ("norm must be one of", {"norm": "l2"}),
        ("side must be one of", {"side": "a"}),
    ],
)
def test_arguments_out_of_range(match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        make_tasks(ranks=(3,), **arguments)


def test_factors_set_later_are_checked() -> None:
    olora = make_tasks()
    olora.lamda_1, half = np.float32(0.5), olora.penalty()
    close(olora.penalty(), half)
    assert type(olora.settings()["lamda_1"]) is float  # for JSON
    olora.lamda_1 = math.nan
    with pytest.raises(ValueError, match="lamda_1 must be a finite number from 0 on, got nan"):
        olora.penalty()


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("lora_dropout must be 0 with use_dora", {"use_dora": True, "lora_dropout": 0.1}),
        ("modules_to_save must be None", {"modules_to_save": ["lm_head"]}),
        ("bias must be 'none'", {"bias": "all"}),
        ("trainable_token_indices must be None", {"trainable_token_indices": [1]}),
        ("layer_replication must be None", {"layer_replication": [(0, 1)]}),
        ("target_parameters must be None", {"target_parameters": ["x.weight"]}),
    ],
)
def test_what_can_not_be_had_once_per_task(match: str, changes: dict[str, Any]) -> None:
    olora = make_tasks()
    with pytest.raises(ValueError, match=match):
        olora.start_task("t3", make_config(**changes))
    assert (olora.task, olora.finished) == ("t2", ["t0", "t1"])
    if not {"target_parameters", "use_dora"} & set(changes):
        with pytest.raises(ValueError, match=match):
            OLoRA(peft.get_peft_model(make_base(), make_config(**changes)))


def test_a_head_that_peft_saves_by_itself() -> None:
    model = peft.get_peft_model(make_base("bert"), make_config("bert", task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"modules_to_save must be None.*task_type=None"):
        OLoRA(model)


def test_names_and_other_adapters() -> None:
    olora = make_tasks()
    for name in ("t1", "default", "", "a.b", "a/b", 3):
        with pytest.raises(ValueError, match="name must be"):
            olora.start_task(name, make_config())
    with pytest.raises(ValueError, match=r"config must be a peft.LoraConfig, got IA3Config"):
        olora.start_task("t3", peft.IA3Config(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="not found"):
        olora.start_task("t3", make_config(target_modules=["nothing"]))
    assert (olora.task, olora.finished) == ("t2", ["t0", "t1"])
    assert frozen_and_trained(olora.model) == ({"t0", "t1"}, {"t2"})
    close(olora.penalty(), loop_penalty(olora.model, ["t0", "t1"], "t2"))
    olora.start_task("t3", make_config())
    assert olora.penalty() > 0.0


def test_a_task_that_could_not_be_started_leaves_the_one_before_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    olora = make_tasks()
    want = olora.penalty()

    def half_way(model: Any, *_: Any) -> None:
        model.set_adapter("t0")
        raise MemoryError

    monkeypatch.setattr(module, "add_adapter", half_way)
    with pytest.raises(MemoryError):
        olora.start_task("t3", make_config())
    close(olora.penalty(), want)


def test_models_without_lora_and_with_too_many_in_training() -> None:
    inside = make_tasks().model
    for model in (make_base(), nn.Linear(2, 2), nn.DataParallel(inside), torch.compile(inside)):
        with pytest.raises(ValueError, match="model must have LoRA adapters"):
            OLoRA(model)
    model = make_tasks().model
    for layer in peft_side.lora_layers(model).values():
        layer.frozen_peft_weight_names = {}
    model.base_model.set_adapter(["t0", "t1"])
    with pytest.raises(ValueError, match="one active adapter in training"):
        OLoRA(model)


@pytest.mark.parametrize("how", ["ds_id", "empty", "placements"])
def test_sharded_parameters_are_refused_in_words(how: str) -> None:
    olora = make_tasks()
    weight = olora.model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["t2"].weight
    if how == "empty":
        weight.data = torch.empty(0)
    else:
        setattr(weight, how, 0)
    for call in (olora.penalty, olora.activate, lambda: OLoRA(olora.model)):
        with pytest.raises(ValueError, match=r"must have its adapters whole.*use DDP, or ZeRO-2"):
            call()


def test_old_peft_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.12.9")
    with pytest.raises(ImportError, match=r"PEFT 0.13 or later, got 0.12.9; pip install"):
        make_tasks(ranks=(3,))


@pytest.mark.parametrize("name", ["0", "model", "q_proj", "weight", "lora_A", "train", "keys"])
def test_names_that_peft_mixes_up_with_weights(name: str) -> None:
    """PEFT leaves out of a file what has another task's name anywhere among its words."""
    olora = make_tasks()
    with pytest.raises(ValueError, match="name must not be a word in the names of parameters"):
        olora.start_task(name, make_config())
    assert (olora.task, olora.finished) == ("t2", ["t0", "t1"])


def test_a_first_adapter_with_such_a_name() -> None:
    model = peft.get_peft_model(make_base(), make_config(), adapter_name="q_proj")
    with pytest.raises(ValueError, match="name must not be a word in the names of parameters"):
        OLoRA(model)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_rewrite_the_base(init: str) -> None:
    olora = make_tasks()
    with pytest.raises(ValueError, match="init_lora_weights must leave the base as it is"):
        olora.start_task("t3", make_config(init_lora_weights=init))
    assert olora.task == "t2"


def test_saving_after_a_merge(tmp_path: Path) -> None:
    """It would put files without weights over good ones."""
    olora = make_tasks()
    olora.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    olora.merge()
    with pytest.raises(RuntimeError, match="model must have LoRA layers, got none, as after merge"):
        olora.save(tmp_path)
    assert len(before) == 3
    assert all(path.read_bytes() == data for path, data in before.items())


def test_merging_into_a_weight_that_is_tied() -> None:
    base = make_base(tie_word_embeddings=True)
    model = peft.get_peft_model(base, make_config(target_modules=["lm_head"]), adapter_name="t0")
    olora = OLoRA(model)
    with pytest.raises(ValueError, match="must not tie a weight that has LoRA"):
        olora.merge()
    assert olora.task == "t0"


def test_a_refused_merge_leaves_the_task_in_training() -> None:
    model = peft.inject_adapter_in_model(make_config(), make_base(), adapter_name="t0")
    olora = OLoRA(model)
    with pytest.raises(ValueError, match=r"must be a peft\.PeftModel to merge"):
        olora.merge()
    assert olora.task == "t0"


def test_gradients_of_a_finished_task_are_gone() -> None:
    """An optimizer from before, or clipping, would still use them."""
    olora = make_tasks()
    olora.penalty().backward()
    assert any(p.grad is not None for p in olora.parameters())
    olora.start_task("t3", make_config())
    finished = [p for n, p in olora.model.named_parameters() if "lora_" in n and ".t3." not in n]
    assert finished
    assert all(p.grad is None for p in finished)


def test_a_finished_task_thawed_in_one_layer_is_frozen_again() -> None:
    olora = make_tasks()
    thawed = [p for n, p in olora.model.named_parameters() if ".t0." in n and "layers.1" in n]
    assert thawed
    for parameter in thawed:
        parameter.requires_grad_(True)
    olora.penalty()
    assert not any(parameter.requires_grad for parameter in thawed)


def test_side_and_norm_are_fixed() -> None:
    olora = make_tasks()
    for name in ("side", "norm"):
        with pytest.raises(AttributeError):
            setattr(olora, name, "B")
