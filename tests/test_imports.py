"""What an import may cost, and which layer may import which."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "trimtab"
OPTIONAL = (
    "triton",
    "transformers",
    "matplotlib",
    "tqdm",
    "tokenizers",
    "peft",
    "trl",
    "vllm",
    "sglang",
)

# Layer -> the layers that it may import; everything may import itself.
LAYERS = {
    "_version": (),
    "_schemas": (),
    "_native": ("_schemas",),
    "_choose": ("_native",),
    "reference": ("_schemas",),
    "triton_kernels": ("_schemas",),
    "ops": ("reference", "triton_kernels", "_native", "_schemas", "_choose"),
    "testing": ("ops", "reference", "_schemas", "_choose"),
    "algorithms": ("ops",),
    "compat": ("ops",),
    "integrations": ("algorithms", "ops"),
    "demo": ("algorithms", "ops", "integrations", "testing"),
    "doctor": ("ops", "_choose", "_native", "_version"),
    "__main__": ("doctor", "demo"),
}


def run_fresh(source: str, *arguments: str) -> str:
    """Output of a program in a new interpreter, with this one's module path."""
    prelude = "import json, sys\nsys.path[:] = json.loads(sys.argv.pop(1))\n"
    command = [sys.executable, "-c", prelude + source, json.dumps(sys.path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_and_an_op_without_optional_packages():
    output = run_fresh(
        f"""
for name in {OPTIONAL!r}:
    sys.modules[name] = None   # importing it raises ModuleNotFoundError
import torch, trimtab
for name in trimtab.__all__:
    getattr(trimtab, name)
loss = trimtab.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 3]))
print(round(loss.item(), 4))
"""
    )
    assert output.strip() == "1.3863"


def test_import_loads_nothing_optional_and_leaves_cuda_alone(record_property):
    output = run_fresh(
        """
import time, torch
before = set(sys.modules)   # torch may use some of them itself
start = time.perf_counter()
import trimtab, trimtab.ops
seconds = time.perf_counter() - start
loaded = sorted(set(sys.argv[1:]) & (set(sys.modules) - before))
print(json.dumps({"seconds": seconds, "loaded": loaded, "cuda": torch.cuda.is_initialized()}))
""",
        *OPTIONAL,
    )
    facts = json.loads(output)
    record_property("import_seconds", facts["seconds"])
    assert facts["loaded"] == []
    assert facts["cuda"] is False


def test_integrations_import_without_their_packages_and_say_what_is_missing():
    output = run_fresh(
        f"""
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import trimtab.compat.cce, trimtab.compat.liger, trimtab.integrations.peft
import trimtab.integrations.transformers, trimtab.integrations.trl
import trimtab.integrations.vllm, trimtab.integrations.sglang
try:
    trimtab.integrations.transformers.apply(object())
except ImportError as error:
    print(error)
"""
    )
    assert "install trimtab[transformers]" in output


def test_the_bare_package_and_the_doctor_do_not_import_torch():
    output = run_fresh(
        "import trimtab, trimtab.doctor, trimtab.__main__\nprint('torch' in sys.modules)"
    )
    assert output.strip() == "False"


@pytest.mark.parametrize("name", trimtab.__all__)
def test_every_public_name_exists_and_is_documented(name):
    value = getattr(trimtab, name)
    assert name.startswith("__") or value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = trimtab.no_such_name


def test_the_operators_have_schemas_without_any_library():
    """The operators exist, and trace, in a pure Python install."""
    output = run_fresh(
        """
import torch
torch.ops.load_library = None   # calling it would raise
from pathlib import Path
exists = Path.exists
Path.exists = lambda path: path.suffix != ".so" and exists(path)
from trimtab import _native, ops
assert all("not built" in reason for reason in _native.REASONS.values())
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    logits = torch.empty(8, 100, device="cuda")
    target = torch.empty(8, dtype=torch.int64, device="cuda")
    loss, grad = torch.ops.trimtab.token_loss(
        logits, target, None, None, -100, 1.0, 0.0, 0.0, 0.0, True, "native")
print(tuple(loss.shape), tuple(grad.shape), loss.device.type)
"""
    )
    assert output.strip() == "(8,) (8, 100) cuda"


def imports_of(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import in a file, wherever it stands in it."""
    package = module.rpartition(".")[0] if path.name != "__init__.py" else module
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def modules() -> dict[str, Path]:
    """Module name -> file, for everything that is installed."""
    found = {}
    folders = {PACKAGE: "trimtab", ROOT / "triton_kernels": "trimtab.triton_kernels"}
    for folder, package in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "trimtab" and len(parts) > 1 else None


def forbidden_imports(path: Path, module: str) -> list[str]:
    """The imports of a file that go against the direction of the layers."""
    own = layer_of(module)
    wrong = []
    for line, name in imports_of(path, module):
        layer = layer_of(name)
        # `from trimtab import name` of a public name reaches through the package itself.
        if layer in trimtab._HOME:
            layer = layer_of(trimtab._HOME[layer])
        if own is not None and layer in LAYERS and layer != own and layer not in LAYERS[own]:
            wrong.append(f"{path.name}:{line}: {own} must not import {layer}")
    return wrong


def test_imports_go_down_the_layers():
    layers = {layer_of(module) for module in modules()} - {None}
    assert layers <= set(LAYERS), "a new layer needs a row in the table"
    wrong = [line for module, path in modules().items() for line in forbidden_imports(path, module)]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("trimtab.reference.x", "from trimtab.ops import token_loss"),
        ("trimtab.reference.x", "from ..ops import token_loss"),
        ("trimtab.ops.x", "import trimtab.algorithms.olora"),
        ("trimtab.ops.x", "from trimtab import token_nll"),
        ("trimtab.triton_kernels.x", "def f():\n    from trimtab import _choose"),
    ],
)
def test_the_guard_sees_an_import_that_goes_up(tmp_path, module, line):
    path = tmp_path / "x.py"
    path.write_text(line + "\n")
    assert len(forbidden_imports(path, module)) == 1


def test_every_package_is_listed_for_the_wheel():
    text = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval("[" + text.split("\npackages = [", 1)[1].split("]", 1)[0] + "]")
    packages = [name for name, path in modules().items() if path.name == "__init__.py"]
    assert sorted(listed) == sorted(packages)
