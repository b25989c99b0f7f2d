"""What a loss over a sharded head costs each rank: by formula, and counted on this machine.

``python bench/scaling.py`` prints the table of docs/scaling.md: arithmetic, nothing runs.
``python bench/scaling.py --measure`` runs one, two and more processes (gloo, one thread each) and
prints the products and bytes that they made and sent, beside the formula's, and the time they took.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

GPUS = (1, 2, 4, 8, 64, 512, 1024)
PER_NODE = 8  # the most ranks that share a vocabulary in the table
CHUNK_BYTES = 512 * 2**20  # of logits, by the rule for CUDA


class Head(NamedTuple):
    """A language model's head."""

    name: str
    width: int
    classes: int


HEADS = (Head("8B", 4096, 128256), Head("70B", 8192, 128256), Head("405B", 16384, 128256))


class Costs(NamedTuple):
    """Of one rank for one step of a scalar loss."""

    flop: float  # of the products
    head: float  # bytes of the slice, its gradient and the float32 sum of it
    logits: float  # bytes of the chunks in memory: one, or two where ranks share a vocabulary
    numbers: float  # bytes sent: shares and log-probabilities
    gradient: float  # bytes sent: the input's gradient
    data: float  # bytes sent: the head's gradient between data-parallel ranks


def costs(
    head: Head, tokens: int, ranks: int, replicas: int = 1, itemsize: int = 2, products: int = 3
) -> Costs:
    """The formulas of docs/scaling.md.

    Args:
        head: width D and classes V.
        tokens: N, those that count, of the ranks that share a vocabulary together.
        ranks: P, which share a vocabulary.
        replicas: R, groups of P ranks with tokens of their own.
        itemsize: bytes of an element of the products.
        products: 3 for a scalar loss, 2 with a frozen head, 4 for one loss per token.
    """
    slice_ = head.width * head.classes / ranks
    others = (ranks - 1) / ranks
    buffers = 1 if ranks == 1 else 2
    most_rows = max(1024, CHUNK_BYTES // buffers // (head.classes // ranks * itemsize))
    steps = max(min(buffers, tokens // 1024), -(-tokens // most_rows))
    chunk_rows = -(-tokens // steps)
    return Costs(
        flop=2.0 * products * tokens * slice_,
        head=slice_ * (2 * itemsize + 4),
        logits=float(min(buffers, steps) * chunk_rows * itemsize * head.classes / ranks),
        numbers=8.0 * tokens * (ranks - 1),
        gradient=2.0 * others * 4 * tokens * head.width,
        data=2.0 * (replicas - 1) / replicas * itemsize * slice_,
    )


def table(tokens: int) -> str:
    """Markdown, one row per head and number of GPUs."""
    lines = [
        "| head | GPUs | P | R | TFLOP | head GB | logits GB | numbers MB | input's gradient MB "
        "| head's gradient MB | FLOP per byte sent in P |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for head in HEADS:
        for gpus in GPUS:
            ranks = min(gpus, PER_NODE)
            replicas = gpus // ranks
            c = costs(head, tokens, ranks, replicas)
            sent = c.numbers + c.gradient
            lines.append(
                f"| {head.name} | {gpus} | {ranks} | {replicas} | {c.flop / 1e12:.1f} "
                f"| {c.head / 1e9:.2f} | {c.logits / 1e9:.2f} | {c.numbers / 1e6:.2f} "
                f"| {c.gradient / 1e6:.0f} | {c.data / 1e6:.0f} "
                f"| {f'{c.flop / sent:,.0f}' if sent else '-'} |"
            )
    return "\n".join(lines)


# What is counted and timed.


def measure(tokens: int, width: int, classes: int, processes: int, repeats: int) -> dict[str, Any]:
    """Products and bytes sent per rank, and the median seconds of a loss and its gradients."""
    arguments = [str(number) for number in (tokens, width, classes, processes, repeats)]
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", str(rank), f"{folder}/store", *arguments],
                stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(processes)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a process failed; its error stands above")
    return json.loads(outputs[0])


def work(rank: int, store: str, arguments: list[int]) -> dict[str, Any]:
    """What each process runs."""
    import torch
    from torch import distributed

    import trimtab

    tokens, width, classes, processes, repeats = arguments
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=processes
    )
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(tokens, width, generator=generator).requires_grad_()
    target = torch.randint(classes, (tokens,), generator=generator)
    weight = torch.randn(classes, width, generator=generator) / width**0.5
    weight = weight.tensor_split(processes)[rank].clone().requires_grad_()

    def step() -> None:
        trimtab.linear_cross_entropy(
            input, weight, target, group=distributed.group.WORLD, impl="native"
        ).backward()

    counted = count(step, processes)
    seconds = []
    for _ in range(repeats):
        distributed.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    distributed.barrier()
    distributed.destroy_process_group()
    return {**counted, "seconds": sorted(seconds)[repeats // 2]}


def count(step: Callable[[], None], processes: int) -> dict[str, float]:
    """FLOP of the products, and bytes that a ring would send for the collectives of ``step``."""
    import torch
    from torch import distributed

    found = {"flop": 0.0, "numbers": 0.0, "gradient": 0.0}
    places = {
        (torch, "mm"): ("flop", lambda a: 2 * a[0].shape[0] * a[0].shape[1] * a[1].shape[1]),
        (torch, "addmm"): ("flop", lambda a: 2 * a[1].shape[0] * a[1].shape[1] * a[2].shape[1]),
        (distributed, "all_gather"): (
            "numbers", lambda a: a[1].is_floating_point() * a[1].nbytes * (processes - 1)),
        (distributed, "all_reduce"): (
            "gradient", lambda a: a[0].nbytes * 2 * (processes - 1) / processes),
    }  # fmt: skip
    originals = {place: getattr(*place) for place in places}

    def counting(place: tuple[Any, str]) -> Callable[..., Any]:
        name, size = places[place]

        def run(*args: Any, **kwargs: Any) -> Any:
            found[name] += size(args)
            return originals[place](*args, **kwargs)

        return run

    try:
        for place in places:
            setattr(*place, counting(place))
        step()
    finally:
        for place, original in originals.items():
            setattr(*place, original)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="N of the table")
    parser.add_argument("--measure", action="store_true", help="run processes on this machine")
    parser.add_argument("--shape", type=int, nargs=3, default=(2048, 512, 32000), metavar="N D V")
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rank, store, *arguments = options.worker
        print(json.dumps(work(int(rank), store, [int(number) for number in arguments])))
        return
    if not options.measure:
        print(table(options.tokens))
        return
    tokens, width, classes = options.shape
    print("| processes | GFLOP | by formula | numbers KB | by formula | gradient MB | by formula "
          "| median ms |\n|--:|--:|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    for processes in options.processes:
        found = measure(tokens, width, classes, processes, options.repeats)
        formula = costs(Head("", width, classes), tokens, processes)
        print(
            f"| {processes} | {found['flop'] / 1e9:.1f} | {formula.flop / 1e9:.1f} "
            f"| {found['numbers'] / 1e3:.1f} | {formula.numbers / 1e3:.1f} "
            f"| {found['gradient'] / 1e6:.2f} | {formula.gradient / 1e6:.2f} "
            f"| {found['seconds'] * 1e3:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
