"""A sequence of tasks on disk: PEFT's own folders, and their order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.algorithms.olora.layers import lora_layers
from trimtab.algorithms.olora.peft_model import check_config, check_peft, need_peft_model

if TYPE_CHECKING:
    from trimtab.algorithms.olora import OLoRA

INDEX = "olora.json"
FORMAT = 1


def folder_of(path: str | os.PathLike[str], task: str) -> Path:
    """Where PEFT saves an adapter."""
    return Path(path) if task == "default" else Path(path) / task


def save(olora: OLoRA, path: str | os.PathLike[str]) -> None:
    """Adapters and index; the index last, so that a folder with one is complete."""
    need_peft_model(olora.model, "save")
    if not lora_layers(olora.model):
        raise RuntimeError(
            "model must have LoRA layers, got none, as after merge; save before, or save the model "
            "that merge returned"
        )
    (Path(path) / INDEX).unlink(missing_ok=True)
    olora.model.save_pretrained(str(path), selected_adapters=list(olora.model.peft_config))
    save_index(olora, path)


def save_index(olora: OLoRA, path: str | os.PathLike[str]) -> None:
    """Order of the tasks, which one is in training, and the settings, beside saved adapters."""
    index = {
        "format": FORMAT,
        "tasks": list(olora.model.peft_config),
        "training": olora.task,
        "settings": olora.settings(),
    }
    temporary = Path(path) / f"{INDEX}.part"
    temporary.write_text(json.dumps(index, indent=2) + "\n")
    temporary.replace(Path(path) / INDEX)


def read_index(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The index of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one of this format, or lacks the files of a task.
    """
    file = Path(path) / INDEX
    if not file.is_file():
        raise FileNotFoundError(f"path must be a folder with {INDEX}, got {path}; see OLoRA.save")
    index = json.loads(file.read_text())
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(
            f"path must have an {INDEX} of format {FORMAT}, got {file.read_text()[:80]!r}; save it "
            "again with this version"
        )
    missing = [
        t for t in index["tasks"] if not (folder_of(path, t) / "adapter_config.json").is_file()
    ]
    if missing:
        raise ValueError(
            f"path must have the adapters of all tasks {index['tasks']}, got none of {missing}; "
            "copy their folders too"
        )
    return index


def load(model: Any, path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """The base model with all adapters, that of the task in training active, and the index.

    Raises:
        FileNotFoundError, ValueError: see ``read_index``, and adapters that do not fit the model.
    """
    check_peft()
    from peft import LoraConfig, get_peft_model

    index = read_index(path)
    tasks, training = index["tasks"], index["training"]
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model must be the base model, got {type(model).__name__} with adapters; load adds "
            "them"
        )
    mode = model.training
    for place, task in enumerate(tasks):
        folder = str(folder_of(path, task))
        config = LoraConfig.from_pretrained(folder)
        check_config(config, place)
        config.inference_mode = False
        if place == 0:
            model = get_peft_model(model, config, adapter_name=task)
        else:
            model.add_adapter(task, config)
        try:
            result = model.load_adapter(folder, task)
        except RuntimeError as error:
            raise ValueError(
                f"path must hold adapters of this model, got those of {task!r} that do not fit: "
                f"{error}"
            ) from error
        # Before 0.14 PEFT counts as missing what belongs to the base and to other adapters.
        missing = [k for k in result.missing_keys if ".lora_" in k and task in k.split(".")]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"path must hold adapters of this model, got {task!r} with {len(missing)} "
                f"parameters missing and {len(result.unexpected_keys)} of other layers, such as "
                f"{[*missing, *result.unexpected_keys][0]}; load it on the base it was trained on"
            )
    model.set_adapter(tasks[-1] if training is None else training)
    return model.train(mode), index
