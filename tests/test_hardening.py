"""What must not bring down a process: hostile arguments, many threads, forks, long runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import hostile_calls
import trimtab
from cuda_on_cpu import library
from trimtab import _native
from trimtab.testing import assert_same_bits

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "sanitized"
SANITIZE = "-g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover"
PARTS = ("csrc", "python", "triton_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILT = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")

pytestmark = pytest.mark.skipif(
    _native.REASONS["cpu"] is not None, reason=str(_native.REASONS["cpu"])
)


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """Folder of a package whose CPU library is built with sanitisers."""
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("no g++ on Linux")
    TREE.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, TREE / name, ignore=BUILT, dirs_exist_ok=True)
        else:
            shutil.copy2(ROOT / name, TREE / name)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {**os.environ, "TRIMTAB_BUILD": "native", "CXX": f"g++ {SANITIZE}"}
    subprocess.run(build, cwd=TREE, env=environment, check=True, capture_output=True)
    return TREE / "python"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hostile_arguments_under_sanitisers(sanitized):
    """Every instruction set that this processor has; each call returns or raises."""
    program = [sys.executable, str(ROOT / "tests" / "hostile_calls.py"), "6000"]
    for seed, isa in enumerate(("generic", "avx2", "avx512")):
        environment = {
            **os.environ,
            "LD_PRELOAD": library.sanitizers(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "TRIMTAB_CPU_ISA": isa,
            "PYTHONPATH": str(sanitized),
        }
        child = subprocess.run(
            [*program, str(seed)], env=environment, capture_output=True, text=True, timeout=280
        )
        if "TRIMTAB_CPU_ISA" in child.stderr:
            continue  # this processor does not have it
        last = child.stdout.rpartition("\n")[2]
        assert child.returncode == 0, f"{child.stdout[-2000:]}\n{child.stderr[:6000]}"
        assert sanitized == Path(json.loads(last)["package"]).parent
        for operator, (returned, raised) in json.loads(last)["answers"].items():
            assert min(returned, raised) > 50, (operator, returned, raised)


def test_hostile_arguments_in_this_process():
    """The library as it is shipped: wrong arguments raise, and write to nothing of anyone else."""
    answers = hostile_calls.run(2000, seed=9, say=lambda line: None)
    assert sum(sum(counts) for counts in answers.values()) == 2000


def results() -> list[torch.Tensor]:
    """One call of each kind, of which the arguments are always the same."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    input, weight = draw(37, 16).requires_grad_(), draw(507, 16).requires_grad_()
    target = torch.randint(507, (37,), generator=generator)
    loss = trimtab.linear_cross_entropy(input, weight, target, token_weight=draw(37).abs())
    grads = torch.autograd.grad(loss, [input, weight])
    positive, negative = draw(5, 4099), draw(5, 4099)
    drawn = trimtab.contrastive_sample(positive, negative, alpha=0.5, top_k=50, top_p=0.9, seed=3)
    logp = trimtab.contrastive_logp(positive, negative, drawn.token, alpha=0.5)
    current = [draw(8, 252).requires_grad_() for _ in range(3)]
    penalty = trimtab.orthogonal_penalty([draw(24, 252) for _ in range(3)], current)
    of_current = torch.autograd.grad(penalty, current)
    return [loss.detach(), *grads, *drawn, logp, penalty.detach(), *of_current]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours.double(), theirs.double())


def test_many_threads_at_once_give_what_one_gives():
    expected = results()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: results(), range(64)):
            assert_same(found, expected)


def send_results(to) -> None:
    to.send([tensor.numpy() for tensor in results()])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_process_computes_the_same(method):
    """Also a forked one, whose parent has used all of its threads before."""
    expected = results()
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    if method == "fork":
        # OpenMP's threads do not survive a fork: torch's own operators hang in such a child too,
        # which is why its data loaders set one thread.
        torch.set_num_threads(1)
    child = context.Process(target=send_results, args=(theirs,))
    try:
        child.start()
        assert ours.poll(120), f"the child ({method}) hangs"
        assert_same([torch.from_numpy(array) for array in ours.recv()], expected)
        child.join(60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(threads)
        child.kill()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_a_long_run_does_not_grow():
    """A leak of one gradient of the head in ten calls would be more than the bound."""

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    for _ in range(50):
        results()
    before, calls = resident(), 200
    for _ in range(calls):
        results()
    assert resident() - before < calls / 10 * (507 * 16 * 4)
