"""``trimtab doctor``: what is installed, loaded and chosen here, and whether it computes rightly.

Made for broken installs: only the standard library is imported here. Whatever touches torch or a
compiled library runs in a child process that reports line by line, so that a crash in there is one
more finding.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from trimtab._version import __version__

PACKAGES = ("torch", "triton", "numpy", "transformers", "peft")
_FOLDER = Path(__file__).parent
_CHILD_SECONDS = 300
# The child sees the modules that this process sees, wherever it was started from.
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from trimtab.doctor import probe
probe()
"""

Report = dict[str, Any]


def diagnose() -> Report:
    """Everything the doctor knows.

    Returns:
        A JSON-ready dictionary: ``trimtab``, ``system``, ``packages``, ``environment``, ``build``
        (facts of the build), ``torch``, ``gpu``, ``libraries``, ``ops``, ``checks``, ``problems``
        (sentences; empty when healthy). A section that could not be had is ``{"error": why}``.
    """
    report: Report = {
        "trimtab": {"version": __version__, "folder": str(_FOLDER)},
        "system": _guarded(_system),
        "packages": {name: _guarded(partial(_installed, name)) for name in PACKAGES},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("TRIMTAB_", "TRITON_"))
        },
        "build": _guarded(_build_info),
    }
    report.update(_run_child())
    report["problems"] = list(_problems(report))
    return report


def main(argv: list[str] | None = None) -> int:
    """Print the report.

    Args:
        argv: ``--json`` for the machine-readable form.

    Returns:
        0 when healthy, 1 when something is broken.
    """
    arguments = sys.argv[1:] if argv is None else argv
    report = diagnose()
    print(json.dumps(report, indent=2) if "--json" in arguments else "\n".join(_as_text(report)))
    return 1 if report["problems"] else 0


def probe() -> None:
    """Print the sections that need torch, each on a line of JSON as soon as it is known."""
    for name, section in _PROBES.items():
        print(json.dumps({"section": name, "value": _guarded(section)}), flush=True)


def _guarded(probe: Callable[[], Any]) -> Any:
    """The probe's answer, or why there is none."""
    try:
        return probe()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"error": f"{type(error).__name__}: {error}"}


def _run_child() -> Report:
    """The sections that need torch, from a process that may crash."""
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_SECONDS)
        output, status = child.stdout, _describe_exit(child.returncode)
        last_words = child.stderr.strip().splitlines()[-1:]
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        status, last_words = f"took more than {_CHILD_SECONDS} s", []
    except OSError as error:
        output, status, last_words = "", str(error), []
    sections: Report = {}
    for line in output.splitlines():
        # Whatever else an import prints is not ours.
        if line.startswith('{"section": '):
            entry = json.loads(line)
            sections[entry["section"]] = entry["value"]
    reason = ": ".join([f"the probing process {status}", *last_words])
    return {name: sections.get(name, {"error": reason}) for name in _PROBES}


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _problems(report: Report) -> Iterator[str]:
    """What is wrong, in sentences. A library that was never built is a choice, not a fault."""
    for name, section in report.items():
        if "error" in section:
            yield f"{name}: {section['error']}"
            continue
        for key, facts in section.items():
            if isinstance(facts, dict) and "error" in facts:
                yield f"{name}, {key}: {facts['error']}"
            elif name == "libraries" and facts["present"] and facts["reason"]:
                yield f"{name}, {key}: {facts['reason']}"
            elif name == "checks" and not facts["passed"]:
                yield f"self-check, {key}: {_outcome(facts)}"


def _system() -> Report:
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build_info() -> Report:
    path = _FOLDER / "_build_info.json"
    if not path.exists():
        return {"mode": None, "libraries": {}}
    try:
        info: Report = json.loads(path.read_text())
        libraries = info["libraries"]
        if all(isinstance(libraries[name]["built"], bool) for name in libraries):
            return info
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{path.name} must hold what setup.py writes; install again")


def _torch() -> Report:
    import torch

    return {
        "version": torch.__version__,
        "folder": str(Path(torch.__file__).parent),
        "cuda": torch.version.cuda or "built without",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _gpu() -> Report:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {f"cuda:{index}": torch.cuda.get_device_properties(index) for index in range(count)}
    return {
        name: f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB"
        for name, gpu in found.items()
    }


def _libraries() -> Report:
    from trimtab import _native

    built = _guarded(_build_info).get("libraries", {})
    found: Report = {}
    for device, reason in _native.REASONS.items():
        facts = built.get(device, {})
        present = (_FOLDER / f"_{device}.so").exists()
        if not present and "reason" in facts:
            reason = f"not built: {facts['reason']}"
        built_with = {
            key: facts[key] for key in ("compiler", "torch", "cuda", "archs") if key in facts
        }
        if device == "cuda" and reason is None:
            reason = _gpu_without_code(facts.get("archs"))
        found[f"_{device}.so"] = {"present": present, "reason": reason, "built_with": built_with}
    return found


def _gpu_without_code(archs: str | None) -> str | None:
    """Which GPU of this machine the CUDA library was not compiled for, or None."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() and archs else 0
    for index in range(count):
        major, minor = torch.cuda.get_device_capability(index)
        if gpu_code(archs or "", major, minor) is None:
            return (
                f"has code for {archs}, none for cuda:{index} of capability {major}.{minor}; "
                f"build with TRIMTAB_CUDA_ARCHS={major}{minor}"
            )
    return None


def gpu_code(archs: str, major: int, minor: int) -> str | None:
    """What a GPU runs of a library that ``setup.py`` built.

    Args:
        archs: as in ``TRIMTAB_CUDA_ARCHS``, for example ``80;90a;100f``.
        major: compute capability of the GPU.
        minor: its second digit.

    Returns:
        ``sm_90a`` for machine code, ``compute_80`` for PTX that the driver compiles, or None.
    """
    names = [name for name in re.split(r"[;,\s]+", archs) if name]
    numbers = {name: divmod(int(name.rstrip("af")), 10) for name in names}
    for name, (of_major, of_minor) in numbers.items():
        later = minor == of_minor if name.endswith("a") else minor >= of_minor
        if major == of_major and later:
            return f"sm_{name}"
    plain = max((number for name, number in numbers.items() if name.isdigit()), default=None)
    if plain is not None and plain <= (major, minor):
        return f"compute_{plain[0]}{plain[1]}"
    return None


def _devices() -> tuple[str, ...]:
    import torch

    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _operators() -> dict[str, Callable[..., Any]]:
    from trimtab import ops

    return {
        name: function for family in ops._FAMILIES for name, (function, _) in family.CHOICES.items()
    }


def _ops() -> Report:
    import torch

    from trimtab._choose import choose

    def answer(name: str, device: str) -> Report:
        return choose(name, device, torch.float32)._asdict()

    return {
        f"{name} on {device}": _guarded(partial(answer, name, device))
        for name in _operators()
        for device in _devices()
    }


def _checks() -> Report:
    import torch

    from trimtab._choose import IMPLS, why_not

    return {
        f"{name}, {impl} on {device}": _guarded(partial(self_check, function, impl, device))
        for name, function in _operators().items()
        for device in _devices()
        for impl in IMPLS
        if why_not(impl, name, device, torch.float32) is None
    }


_SAMPLE_ROWS, _SAMPLE_WIDTH = 13, 67


def _samples() -> dict[str, Any]:
    """Parameter name -> a number, a tensor or several. All widths and the vocabulary are equal."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, width = _SAMPLE_ROWS, _SAMPLE_WIDTH

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).double()

    return {
        "input": normal(rows, width),
        "linear_weight": normal(width, width) * width**-0.5,
        "ref_input": normal(rows, width),
        "ref_linear_weight": normal(width, width) * width**-0.5,
        "target": torch.randint(width, (rows,), generator=generator),
        "positive": normal(rows, width),
        "negative": normal(rows, width),
        "alpha": 0.5,
        "previous": [normal(rows, width), normal(2, width)],
        "current": [normal(3, width), normal(5, width)],
        "tensors": [normal(rows, width), normal(2, width)],
        "bases": [torch.linalg.qr(normal(width, k)).Q.mT for k in (3, 5)],
    }


def _run(function: Callable[..., Any], impl: str, device: str, dtype: Any) -> dict[str, Any]:
    """Outputs of an operator on the samples, and the gradients of their sum, by name."""
    import torch

    samples = _samples()
    names = [
        p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty
    ]
    missing = [name for name in names if name not in samples]
    if missing:
        raise LookupError(f"the doctor has no sample of {', '.join(missing)}")
    leaves: dict[str, Any] = {}

    def prepared(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [prepared(f"{name}[{i}]", one) for i, one in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        if not value.is_floating_point():
            return value.to(device)
        leaves[name] = value.to(device).to(dtype).requires_grad_()
        return leaves[name]

    result = function(**{name: prepared(name, samples[name]) for name in names}, impl=impl)
    if isinstance(result, list):
        fields = {f"value[{i}]": one for i, one in enumerate(result)}
    else:
        fields = result._asdict() if hasattr(result, "_asdict") else {"value": result}
    totals = [field.sum() for field in fields.values() if field.requires_grad]
    if totals:
        grads = torch.autograd.grad(sum(totals), list(leaves.values()), allow_unused=True)
        named = zip(leaves, grads, strict=True)
        fields.update({f"gradient of {name}": grad for name, grad in named if grad is not None})
    return {name: field.detach().cpu() for name, field in fields.items()}


def self_check(function: Callable[..., Any], impl: str, device: str) -> Report:
    """Run a public operator in float32 and compare values and gradients with float64.

    The bound is that of sums of rounded products: number of terms times rounding unit times the
    largest value.

    Args:
        function: the operator.
        impl: the implementation to run.
        device: device type to run on.

    Returns:
        ``where`` (the output nearest to its bound), its ``max_error`` and ``bound``, ``passed``,
        ``seconds``.
    """
    import torch

    truth = _run(function, "reference", "cpu", torch.float64)
    start = time.perf_counter()
    ours = _run(function, impl, device, torch.float32)
    seconds = time.perf_counter() - start
    worst: tuple[float, Report] = (-1.0, {})
    for name, exact in truth.items():
        error = (ours[name].double() - exact.double()).abs().max().item()
        largest = max(1.0, exact.double().abs().max().item())
        bound = 2 * _SAMPLE_WIDTH * torch.finfo(torch.float32).eps * largest
        ratio = error / bound if math.isfinite(error) else math.inf
        if ratio > worst[0]:
            # JSON has no NaN.
            shown = error if math.isfinite(error) else None
            worst = ratio, {"where": name, "max_error": shown, "bound": bound}
    return {**worst[1], "passed": worst[0] <= 1.0, "seconds": round(seconds, 4)}


_PROBES: dict[str, Callable[[], Any]] = {
    "torch": _torch,
    "gpu": _gpu,
    "libraries": _libraries,
    "ops": _ops,
    "checks": _checks,
}


def _outcome(check: Report) -> str:
    verdict = "PASS" if check["passed"] else "FAIL"
    error = "not finite" if check["max_error"] is None else f"{check['max_error']:.1e}"
    return f"{verdict}  error {error} in {check['where']}, bound {check['bound']:.1e}"


def _as_text(report: Report) -> Iterator[str]:
    """The report for people."""
    yield f"trimtab {report['trimtab']['version']}  {report['trimtab']['folder']}"
    for title in ("system", "packages", "torch", "gpu", "environment"):
        yield from _table(title, report[title])
    yield from _table("libraries", report["libraries"], _library_in_words)
    yield from _table(
        "operators, float32", report["ops"], lambda choice: "{impl}: {reason}".format(**choice)
    )
    yield from _table("self-check, float32 against float64", report["checks"], _outcome)
    yield ""
    yield from (f"PROBLEM  {problem}" for problem in report["problems"])
    yield "not healthy" if report["problems"] else "healthy"


def _library_in_words(facts: Report) -> str:
    built = ", ".join(f"{key} {value}" for key, value in facts["built_with"].items())
    return facts["reason"] or f"loaded; built with {built}"


def _table(title: str, section: Any, in_words: Callable[[Any], str] = str) -> Iterator[str]:
    """A title and one line per entry; of a section that could not be had, the reason."""
    yield f"\n{title}"
    if isinstance(section, dict) and "error" in section:
        yield f"  not known: {section['error']}"
    elif not section:
        yield "  none"
    else:
        width = max(map(len, section))
        for name, value in section.items():
            failed = isinstance(value, dict) and "error" in value
            words = f"not known: {value['error']}" if failed else in_words(value)
            yield f"  {name:<{width}}  {words}"


if __name__ == "__main__":
    raise SystemExit(main())
