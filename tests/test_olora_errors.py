"""O-LoRA: what is refused, in words, before anything is changed."""

from __future__ import annotations

import math
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
