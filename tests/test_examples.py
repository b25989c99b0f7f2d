"""The examples in the documents run, and learn what they set out to learn."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "examples"
NEEDS = {
    "plain_loop": ["transformers"],
    "hf_trainer": ["transformers", "accelerate"],
    "lightning_module": ["transformers", "lightning"],
    "peft_lora": ["transformers", "peft"],
    "trl_weighted_sft": ["trl", "datasets"],
    "distributed": ["transformers"],
    "drop_in": [],
}


def run(name):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]()


@pytest.mark.parametrize("name", [name for name in NEEDS if name != "drop_in"])
def test_the_loss_falls(name):
    losses = run(name)
    assert losses[-1] < losses[0] - 0.3


def test_the_drop_ins_agree():
    values = run("drop_in")
    assert values == pytest.approx([values[-1]] * 3, rel=1e-6)


def test_every_example_is_run_and_listed():
    listed = (FOLDER / "README.md").read_text()
    found = {path.stem: path for path in FOLDER.glob("*.py")}
    assert found.keys() == NEEDS.keys()
    for name, path in found.items():
        assert f"`{name}.py`" in listed
        assert len(path.read_text().splitlines()) < 150
