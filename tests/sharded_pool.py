"""Processes that hold a vocabulary together. One set of them serves a test file."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

RANKS = 4
TIMEOUT = timedelta(seconds=60)


class WorkerError(Exception):
    """What a process raised: the error's type and text, per rank."""


class Pool:
    """``RANKS`` processes with a process group, which run functions of the case files."""

    def __init__(
        self, ranks: int = RANKS, preload: Sequence[str] = ("sharded_head_cases",)
    ) -> None:
        # A server that has imported everything forks them: one import, not one each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        self.folder = tempfile.TemporaryDirectory()
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(theirs, rank, ranks, f"{self.folder.name}/store"), daemon=True
            )
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def start(self, function: Any, *arguments: Any, ranks: int | None = None) -> None:
        """Let the first ``ranks`` processes run a function; the others go on waiting."""
        for connection in self.connections[:ranks]:
            connection.send_bytes(pickle.dumps((function, ranks, arguments)))

    def results(self, ranks: int | None = None, seconds: float = 120) -> list[Any]:
        """What each returned, in rank order."""
        answers = []
        for connection in self.connections[:ranks]:
            assert connection.poll(seconds), "no answer in time"
            answers.append(pickle.loads(connection.recv_bytes()))
        errors = [answer for kind, answer in answers if kind == "error"]
        if errors:
            raise WorkerError("\n".join(errors))
        return [answer for _, answer in answers]

    def run(self, function: Any, *arguments: Any, ranks: int | None = None) -> list[Any]:
        """Both."""
        self.start(function, *arguments, ranks=ranks)
        return self.results(ranks)

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(30)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


def serve(connection: Connection, rank: int, ranks: int, store: str) -> None:
    """What a process runs: requests until the other side closes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    everyone = torch.distributed.group.WORLD
    groups = {None: everyone, ranks: everyone}
    for size in range(2, ranks):
        groups[size] = torch.distributed.new_group(list(range(size)))
    while True:
        try:
            function, size, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        try:
            answer = ("result", function(groups[size], *arguments))
        except Exception as error:
            text = "".join(traceback.format_exception(error)[-3:])
            answer = ("error", f"rank {rank}: {type(error).__name__}: {error}\n{text}")
        connection.send_bytes(pickle.dumps(answer))
    # A process that leaves while another still talks to it can make that one abort.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@contextmanager
def pool() -> Iterator[Pool]:
    made = Pool()
    try:
        yield made
    finally:
        made.close()
