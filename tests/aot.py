"""Triton kernels compiled for GPUs that are not there, and what the binaries say of themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

CAPABILITIES = [80, 90, 100]
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
VOCAB = 128256


def cuobjdump() -> Path:
    triton = pytest.importorskip("triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    element: dict[str, str],
    integers: Iterable[str],
    shape: Any,
    capability: int,
    *,
    sixteens: bool = True,
) -> Any:
    """Compiled as a launch would.

    Args:
        kernel: the jitted function.
        constants: value of each constexpr and of each optional argument that is left out.
        element: type behind each pointer that is not float32's.
        integers: scalar arguments that are int32, apart from sizes; the others are float32.
        shape: the launch's configuration.
        capability: of the GPU.
        sixteens: whether sizes are multiples of 16, which Triton finds out from the arguments.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + element.get(name, "fp32")
            aligned[(place,)] = [["tt.divisibility", 16]]
        elif name == "V" or name.endswith("_stride"):
            signature[name] = "i32"
            if sixteens:
                aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if name in integers else "fp32"
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in signature},
        attrs=aligned,
    )
    options = {
        "num_warps": shape.num_warps,
        "num_stages": shape.num_stages,
        "enable_fp_fusion": False,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def measure(compiled: Any, dump: Path) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [dump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}

    def count(pattern: str, code: str = "ptx") -> int:
        return len(re.findall(pattern, compiled.asm[code]))

    row = re.search(r"(%\w+) = tt\.get_program_id x", compiled.asm["ttir"])[1]
    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "wide loads": count(r"\bld\.global\S*\.v4\.b32"),
        "wide stores": count(r"\bst\.global\S*\.v4\.b32"),
        "wide copies": count(r"\bcp\.async\.c[ag]\.shared\.global[^;]*, (?:0x10|16)\b"),
        "tensor products": count(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\."),
        "uses of a row": count(rf"{row}\b", "ttir") - 1,
        "uses of a row in 64 bits": count(rf"arith\.extsi {row} : i32 to i64", "ttir"),
        "doubles": count(r"\.f64\b"),
        "exponentials": count(r"\bex2\.approx\.ftz\.f32"),
        "slow exponentials": count(r"\bex2\.approx\.f32"),
        "fused": count(r"\bfma\.rn\.f32\b"),
        "flushed": count(r"\b(?:add|sub|mul)\.\S*ftz"),
        "divisions": count(r"\bdiv\.(?!rn)\S*f32"),
        "rounded divisions": count(r"\bdiv\.rn\.f32"),
    }


Target = tuple[str, torch.dtype, int]  # name of a variant, dtype of the logits, capability


def report(targets: Iterable[Target], compile_variant: Callable[..., Any]) -> None:
    """The child's program: everything compiled and measured, as JSON."""
    import triton

    dump = cuobjdump()
    usage = [
        [name, str(dtype), capability, measure(compile_variant(name, dtype, capability), dump)]
        for name, dtype, capability in targets
    ]
    json.dump({"triton": triton.__version__, "usage": usage}, sys.stdout)


def ask(program: str, cache: Path) -> dict[str, Any]:
    """What a child says that runs ``program`` without the interpreter.

    Triton's decorator yields interpreted functions where ``TRITON_INTERPRET=1`` is set.
    """
    if not cuobjdump().exists():
        pytest.skip(f"this Triton comes without {cuobjdump().name}, which reads the registers")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, program]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def usages(
    answer: dict[str, Any], name: str, dtype: torch.dtype | None = None
) -> list[tuple[int, dict[str, int]]]:
    """Capability and usage of a variant, of one dtype or of all."""
    found = [
        (capability, usage)
        for one, of, capability, usage in answer["usage"]
        if one == name and of == str(dtype or of)
    ]
    assert found
    return found
