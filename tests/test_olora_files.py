"""O-LoRA: merging at the end, folders that plain PEFT opens, and the picture of the overlap."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft
from packaging.version import parse

from olora_cases import (
    frozen_and_trained,
    loop_penalty,
    make_base,
    make_batch,
    make_config,
    make_tasks,
)
from trimtab.algorithms.olora import OLoRA
from trimtab.algorithms.olora.overlap import orthonormal_rows

close = torch.testing.assert_close


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}


# Merging.


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_merging_keeps_the_sum_of_all_tasks(kind: str) -> None:
    olora = make_tasks(kind, changes=({"lora_alpha": 4}, {"use_rslora": True}, {}))
    batch = make_batch(kind)
    want = olora.model(**batch).logits.detach()
    merged = olora.merge()
    assert olora.task is None
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert type(merged) is type(make_base(kind))
    close(merged(**batch).logits, want)
    with pytest.raises(RuntimeError, match="LoRA layers, got none, as after merge"):
        olora.start_task("t3", make_config(kind))
    assert (make_base(kind)(**batch).logits - want).abs().max() > 0.01


def make_dora() -> OLoRA:
    """Three tasks of which two are DoRA, with magnitudes as training would leave them."""
    olora = make_tasks(changes=({"use_dora": True}, {}, {"use_dora": True}))
    with torch.no_grad():
        for name, parameter in olora.model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.0 + torch.rand_like(parameter))
    return olora


def test_dora_is_merged_in_the_order_in_which_it_acts() -> None:
    olora = make_dora()
    want = olora.model(**make_batch()).logits.detach()
    if parse(peft.__version__) < parse("0.21"):
        with pytest.raises(ValueError, match="use_dora must be False to merge several tasks"):
            olora.merge()
    else:
        close(olora.merge()(**make_batch()).logits, want)


def test_finished_dora_acts_as_before_when_tasks_come() -> None:
    olora = make_dora()
    want = olora.model(**make_batch()).logits.detach()
    olora.finish_task()
    close(olora.model(**make_batch()).logits, want, rtol=0.0, atol=0.0)
    for rank in (2, 3):
        olora.start_task(f"new{rank}", make_config(rank=rank, init_lora_weights=True))
        close(olora.model(**make_batch()).logits, want, rtol=0.0, atol=0.0)


def test_old_peft_does_not_merge_several_with_dora(monkeypatch: pytest.MonkeyPatch) -> None:
    olora = make_dora()
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(ValueError, match=r"got \['t0', 't2'\] with it; use PEFT 0.21"):
        olora.merge()


# Folders.


@pytest.mark.parametrize("first", ["t0", "default"])
def test_a_sequence_is_saved_and_loaded_in_the_middle_of_a_task(tmp_path: Path, first: str) -> None:
    model = peft.get_peft_model(make_base(), make_config(task_type="CAUSAL_LM"), adapter_name=first)
    olora = OLoRA(model, lamda_1=0.3, lamda_2=0.2, norm="frobenius2", side="B")
    olora.start_task("t1", make_config(rank=2, target_modules=["q_proj", "k_proj"]))
    olora.start_task("t2", make_config(rank=4, use_rslora=True, lora_dropout=0.25))
    olora.save(tmp_path / "sequence")
    base = make_base().train()
    again = OLoRA.load(base, str(tmp_path / "sequence"))
    assert again.model.training
    assert type(again.model) is type(model)
    assert (again.task, again.finished) == ("t2", [first, "t1"])
    assert again.settings() == olora.settings()
    assert frozen_and_trained(again.model) == ({first, "t1"}, {"t2"})
    close(adapters(again.model), adapters(olora.model), rtol=0.0, atol=0.0)
    close(again.penalty(), olora.penalty(), rtol=0.0, atol=0.0)
    again.model.eval()
    close(again.model(**make_batch()).logits, olora.model(**make_batch()).logits)
    assert again.model.peft_config["t2"].lora_dropout == 0.25
    changed = OLoRA.load(make_base(), tmp_path / "sequence", lamda_1=0.0, side="A")
    assert changed.settings() == {**olora.settings(), "lamda_1": 0.0, "side": "A"}


def test_a_finished_sequence_goes_on_after_loading(tmp_path: Path) -> None:
    olora = make_tasks()
    olora.finish_task()
    olora.save(tmp_path)
    again = OLoRA.load(make_base(), tmp_path)
    assert (again.task, again.finished) == (None, ["t0", "t1", "t2"])
    assert frozen_and_trained(again.model) == ({"t0", "t1", "t2"}, set())
    again.start_task("t3", make_config())
    close(again.penalty(), loop_penalty(again.model, ["t0", "t1", "t2"], "t3"))
    again.save(tmp_path)
    assert OLoRA.load(make_base(), tmp_path).tasks() == ["t0", "t1", "t2", "t3"]


def test_an_earlier_task_in_training_keeps_its_place(tmp_path: Path) -> None:
    model = make_tasks().model
    model.set_adapter("t0")
    OLoRA(model).save(tmp_path)
    again = OLoRA.load(make_base(), tmp_path)
    assert (again.task, again.finished) == ("t0", ["t1", "t2"])
    assert list(again.model.peft_config) == ["t0", "t1", "t2"]


@pytest.mark.parametrize("first", ["t0", "default"])
def test_plain_peft_opens_every_task(tmp_path: Path, first: str) -> None:
    olora = OLoRA(peft.get_peft_model(make_base(), make_config(), adapter_name=first))
    olora.start_task("t1", make_config(rank=2))
    olora.save(tmp_path)
    for task, folder in ((first, tmp_path if first == "default" else tmp_path / first),
                         ("t1", tmp_path / "t1")):  # fmt: skip
        plain = peft.PeftModel.from_pretrained(make_base(), folder, adapter_name=task)
        want = {n: p for n, p in adapters(olora.model).items() if f".{task}." in n}
        close(adapters(plain), want, rtol=0.0, atol=0.0)
        olora.model.set_adapter(task)
        close(plain(**make_batch()).logits, olora.model(**make_batch()).logits)
    plain.load_adapter(str(tmp_path if first == "default" else tmp_path / first), first)
    assert set(plain.peft_config) == {first, "t1"}


def broken(folder: Path, how: str) -> Any:
    """Breaks a saved sequence; gives the model to load it into."""
    index = folder / "olora.json"
    if how == "index":
        index.unlink()
    elif how == "format":
        index.write_text(json.dumps({**json.loads(index.read_text()), "format": 99}))
    elif how == "folder":
        shutil.rmtree(folder / "t1")
    elif how == "rank":
        config = folder / "t1" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 5}))
    elif how == "targets":
        config = folder / "t1" / "adapter_config.json"
        content = {**json.loads(config.read_text()), "target_modules": ["q_proj", "o_proj"]}
        config.write_text(json.dumps(content))
    elif how == "width":
        return make_base(hidden_size=24)
    elif how == "depth":
        return make_base(num_hidden_layers=3)
    elif how == "shallow":
        return make_base(num_hidden_layers=1)
    elif how == "adapters":
        return make_tasks().model
    return make_base()


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("index", "path must be a folder with olora.json"),
        ("format", "path must have an olora.json of format 1"),
        ("folder", r"adapters of all tasks \['t0', 't1', 't2'\], got none of \['t1'\]"),
        ("rank", "'t1' that do not fit"),
        ("targets", "got 't1' with 4 parameters missing and 4 of other layers"),
        ("width", "'t0' that do not fit"),
        ("depth", "got 't0' with 4 parameters missing and 0 of other layers"),
        ("shallow", "got 't0' with 0 parameters missing and 4 of other layers"),
        ("adapters", "model must be the base model, got PeftModel with adapters"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, how: str, match: str) -> None:
    make_tasks().save(tmp_path)
    model = broken(tmp_path, how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the keys, too
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            OLoRA.load(model, tmp_path)


def test_saving_again_leaves_no_half_written_index(tmp_path: Path) -> None:
    olora = make_tasks()
    olora.save(tmp_path)
    olora.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"t0", "t1", "t2", "olora.json", "README.md"}


# The picture.


def test_heat_map(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from trimtab.algorithms.olora.plots import plot_overlap

    olora = make_tasks(changes=({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"]}, {}))
    table = olora.overlap()
    assert bool(table[0, 1].isnan())
    figure = plot_overlap(table, olora.tasks(), title="overlap")
    axes, bar = figure.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["t0", "t1", "t2"]
    texts = {t.get_position(): t.get_text() for t in axes.texts}
    assert set(texts) == {(2, 0), (2, 1), (0, 2), (1, 2)}
    assert texts[2, 0] == f"{float(table[0, 2]):.2f}"
    assert bar.get_ylabel() == "mean squared cosine"
    figure.savefig(tmp_path / "overlap.png")
    assert (tmp_path / "overlap.png").stat().st_size > 1000
    assert float(table[0, 0]) == pytest.approx(1.0)  # the input is left alone
    for count in (1, 2):
        plot_overlap(torch.eye(count), largest=0.5).savefig(tmp_path / f"{count}.png")
    with pytest.raises(ValueError, match=r"overlap must be of shape \(T, T\), got \(4, 3, 3\)"):
        plot_overlap(olora.overlap(per_module=True))
    with pytest.raises(ValueError, match="tasks must be 3 names, got 2"):
        plot_overlap(table, ["a", "b"])


# What only a fault in between or rounding shows.


def test_a_loaded_config_is_the_saved_one(tmp_path: Path) -> None:
    olora = make_tasks()
    olora.save(tmp_path)
    loaded = OLoRA.load(make_base(), tmp_path)
    assert list(loaded.model.peft_config) == list(olora.model.peft_config)
    for task, config in olora.model.peft_config.items():
        assert loaded.model.peft_config[task].inference_mode == config.inference_mode is False
        assert loaded.model.peft_config[task].r == config.r


def test_an_index_is_whole_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left")

    olora = make_tasks()
    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space left"):
        olora.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="must be a folder with"):
        OLoRA.load(make_base(), tmp_path)


def test_all_layers_know_the_tasks_in_their_order() -> None:
    olora = make_tasks()
    olora.model.set_adapter("t1")
    olora.activate()
    for layer in olora.model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            assert list(layer.active_adapters) == ["t0", "t1", "t2"]


def test_the_rank_of_a_subspace_is_numerical() -> None:
    rows = torch.randn(2, 300)
    for scale in (1e-6, 1.0, 1e6):
        dependent = scale * torch.cat((rows, 0.3 * rows[:1] - 1.7 * rows[1:]))
        assert orthonormal_rows(dependent).shape == (2, 300)
        nearly = scale * torch.cat((rows, rows[:1] + 1e-3 * torch.randn(1, 300)))
        assert orthonormal_rows(nearly).shape == (3, 300)


def test_no_cosine_is_above_one() -> None:
    base = nn.Sequential(*[nn.Linear(64, 64) for _ in range(16)])
    config = make_config(r"\d+", rank=8)
    config.target_modules = r"\d+"
    olora = OLoRA(peft.get_peft_model(base, config, adapter_name="t0"))
    olora.start_task("t1", config)
    with torch.no_grad():
        for name, parameter in olora.model.named_parameters():
            if ".lora_A.t1" in name:
                first = olora.model.get_parameter(name.replace("t1", "t0"))
                parameter.copy_(torch.randn(8, 8) @ first)
    cosines = torch.cat(list(olora.principal_cosines("t0", "t1").values()))
    assert cosines.shape == (128,)
    assert float(cosines.max()) <= 1.0
    close(cosines, torch.ones(128))
