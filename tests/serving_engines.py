"""Serving engines as small as they can be, with the order of calls that the real ones have.

Read from the sources of vLLM 0.33 (both model runners) and SGLang 0.5.23: how requests come into a
batch and leave it, what a logits processor is told and when, and what is late. Every row's logits
are those of the whole context, run alone.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# --- the interfaces, for where the packages are not installed ---


@dataclass
class SamplingParams:
    """The fields of vLLM's that these tests touch."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bad_words: list[str] | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    detokenize: bool = True
    extra_args: dict[str, Any] | None = None


class BatchProcessor(ABC):
    """vllm.v1.sample.logits_processor.LogitsProcessor."""

    @abstractmethod
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None: ...

    @abstractmethod
    def apply(self, logits: Tensor) -> Tensor: ...

    @abstractmethod
    def is_argmax_invariant(self) -> bool: ...

    @abstractmethod
    def update_state(self, batch_update: Any) -> None: ...


class SlotProcessor(ABC):
    """vllm.v1.worker.gpu.sample.logits_processor.LogitsProcessor."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return True

    def apply_staged_writes(self) -> None:
        return None

    @abstractmethod
    def apply(self, logits: Tensor, ctx: Any) -> Tensor: ...


class CustomLogitProcessor(ABC):
    """SGLang's; its string is a pickle of the class, made into an object for every batch."""

    @abstractmethod
    def __call__(self, logits: Tensor, custom_param_list: Any = None) -> Tensor: ...

    @classmethod
    def to_str(cls) -> str:
        return f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def from_str(cls, text: str) -> Any:
        module, name = text.split(":")
        return getattr(sys.modules[module], name)()


def modules(version: str = "0.33.0", sglang_version: str = "0.5.23") -> dict[str, ModuleType]:
    """Stand-ins for the packages, by name."""
    named = {
        "vllm": {"__version__": version, "SamplingParams": SamplingParams},
        "vllm.v1.sample.logits_processor": {"LogitsProcessor": BatchProcessor},
        "vllm.v1.worker.gpu.sample.logits_processor": {"LogitsProcessor": SlotProcessor},
        "sglang": {"__version__": sglang_version},
        "sglang.srt.sampling.custom_logit_processor": {
            "CustomLogitProcessor": CustomLogitProcessor
        },
        "sglang.srt.runtime_context": {"get_server_args": SimpleNamespace},
    }
    found: dict[str, ModuleType] = {}
    for name, contents in named.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(found[name]).update(contents)
    return found


def config(**changes: Any) -> Any:
    """What the processor looks at in vLLM's configuration."""
    return SimpleNamespace(
        speculative_config=changes.get("speculative"),
        parallel_config=SimpleNamespace(
            enable_batch_sharded_sampling=changes.get("sharded", False)
        ),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=changes.get("chunked", False)),
    )


# --- the engines ---


@dataclass(eq=False)
class Request:
    """One request on its way."""

    prompt: list[int]
    params: Any  # SamplingParams, or SGLang's as a dict
    tokens: list[int] = field(default_factory=list)
    end: int | str | None = None
    computed: int = 0  # tokens in the cache

    def get(self, name: str) -> Any:
        params = self.params
        return params.get(name) if isinstance(params, dict) else getattr(params, name)

    def take(self, token: int, eos: int | None) -> None:
        limit = self.get("max_new_tokens" if isinstance(self.params, dict) else "max_tokens")
        self.tokens.append(token)
        if token == eos:
            self.end = "eos"
        elif token in (self.get("stop_token_ids") or []):
            self.end = token
        elif len(self.tokens) == limit:
            self.end = "length"


@torch.no_grad()
def logits_of(model: Any, contexts: list[list[int]]) -> Tensor:
    return torch.stack([model(torch.tensor([ids])).logits[0, -1].float() for ids in contexts])


class Engine:
    """What the engines share: requests that wait, and how long to go on."""

    def __init__(self, model: Any, eos: int | None = None, seed: int = 0) -> None:
        self.model, self.eos, self.random = model, eos, Random(seed)
        self.waiting: list[Request] = []

    def add(self, prompt: Tensor, params: Any) -> Request:
        self.waiting.append(Request(prompt.tolist(), params))
        return self.waiting[-1]

    def step(self) -> bool:
        """One step; False where there is nothing left to do."""
        raise NotImplementedError

    def run(self, steps: int = 200) -> None:
        for _ in range(steps):
            if not self.step():
                return
        raise AssertionError("requests that never end")


class BatchEngine(Engine):
    """vLLM's first model runner: rows of a persistent batch, and every change of it told.

    With ``late`` (async scheduling) a step's tokens are -1 in the lists until the next one samples.
    """

    def __init__(self, model: Any, processor: Any, *, late: bool = False, **how: Any) -> None:
        super().__init__(model, **how)
        self.processor, self.late = processor, late
        self.rows: list[Request] = []
        self.removed: list[int] = []
        self.lists: dict[int, list[int]] = {}

    def preempt(self, request: Request) -> None:
        """Out of the batch, for as long as nobody adds it again."""
        self.removed.append(self.rows.index(request))

    def step(self) -> bool:
        removed = sorted({*self.removed, *(i for i, r in enumerate(self.rows) if r.end)})
        self.removed, added, moved = [], [], []
        gaps = list(removed)
        for request in self.waiting:
            index = gaps.pop(0) if gaps else len(self.rows)
            self.rows[index : index + 1] = [request]
            self.lists[id(request)] = list(request.tokens)
            added.append((index, request.params, request.prompt, self.lists[id(request)]))
        self.waiting = []
        moved += self._condense(gaps)
        if len(self.rows) > 1:  # an attention backend that wants another order
            a, b = self.random.sample(range(len(self.rows)), 2)
            self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
            moved.append((a, b, SimpleNamespace(name="SWAP")))
        change = SimpleNamespace(
            batch_size=len(self.rows), removed=gaps[::-1], added=added, moved=moved
        )
        self.processor.update_state(change if removed or added or moved else None)
        if not self.rows:
            return False
        logits = logits_of(self.model, [row.prompt + row.tokens for row in self.rows])
        for request in self.rows:
            self.lists[id(request)][:] = request.tokens
        drawn = self.processor.apply(logits).argmax(-1).tolist()
        for request, token in zip(self.rows, drawn, strict=True):
            request.take(token, self.eos)
            self.lists[id(request)].append(-1 if self.late else token)
        return True

    def _condense(self, gaps: list[int]) -> list[tuple[int, int, Any]]:
        """The last rows move down into the gaps; what is left of ``gaps`` was never filled."""
        moved, empty = [], list(gaps)
        last = len(self.rows) - 1
        while empty:
            while last in empty:
                empty.remove(last)
                last -= 1
            if not empty:
                break
            target = empty.pop(0)
            gaps.remove(target)
            moved.append((last, target, SimpleNamespace(name="UNIDIRECTIONAL")))
            self.rows[target] = self.rows[last]
            last -= 1
        del self.rows[last + 1 :]
        return moved


class SlotEngine(Engine):
    """vLLM's second model runner: slots, a new order in every step, prompts in chunks."""

    def __init__(self, model: Any, make: Any, *, chunk: int = 1000, **how: Any) -> None:
        super().__init__(model, **how)
        size = 64
        self.state = SimpleNamespace(
            prompt_len=SimpleNamespace(np=np.zeros(size, dtype=np.int32)),
            prefill_len=SimpleNamespace(np=np.zeros(size, dtype=np.int32)),
        )
        self.processor, self.chunk = make(self.state), chunk
        self.slots: dict[int, Request] = {}
        self.free = list(range(size))

    def preempt(self, request: Request) -> None:
        slot = next(slot for slot, one in self.slots.items() if one is request)
        del self.slots[slot]
        self.free.append(slot)
        request.computed = 0

    def step(self) -> bool:
        for slot in [slot for slot, one in self.slots.items() if one.end]:
            del self.slots[slot]
            self.free.append(slot)
        for request in self.waiting:
            slot = self.free.pop()
            self.slots[slot] = request
            self.state.prompt_len.np[slot] = len(request.prompt)
            self.state.prefill_len.np[slot] = len(request.prompt) + len(request.tokens)
            self.processor.add_request(slot, request.params)
        self.waiting = []
        if not self.slots:
            return False
        order = self.random.sample(sorted(self.slots), len(self.slots))
        running = [self.slots[slot] for slot in order]
        for request in running:
            whole = len(request.prompt) + len(request.tokens)
            request.computed = min(request.computed + self.chunk, whole)
        fed = [(one.prompt + one.tokens)[: one.computed] for one in running]
        context = SimpleNamespace(
            idx_mapping_np=np.array(order),
            seq_lens_upper_bound_np=np.array([len(ids) for ids in fed] + [0]),
            input_ids=torch.tensor([ids[-1] for ids in fed]),
        )
        self.processor.apply_staged_writes()
        drawn = self.processor.apply(logits_of(self.model, fed), context).argmax(-1).tolist()
        for slot, request, token in zip(order, running, drawn, strict=True):
            if request.computed >= self.state.prefill_len.np[slot]:
                request.take(token, self.eos)
        return True


class Scheduled(Request):
    """SGLang's request, as its processors see it."""

    @property
    def origin_input_ids(self) -> list[int]:
        return self.prompt

    def finished(self) -> bool:
        return bool(self.end)


class TurnEngine(Engine):
    """SGLang: batches of prompts come before batches of tokens, and ``overlap`` makes tokens late.

    With it a batch's tokens reach the requests' lists only once the next batch is under way, whose
    inputs the device has taken from where the tokens lie.
    """

    def __init__(
        self, model: Any, base: Any, *, overlap: bool = False, chunk: int = 1000, **how: Any
    ) -> None:
        super().__init__(model, **how)
        self.base, self.overlap, self.chunk = base, overlap, chunk
        self.running: list[Scheduled] = []
        self.results: list[tuple[list[Scheduled], list[int]]] = []
        self.seen: dict[int, list[int]] = {}  # what the device has, by request

    def add_pair(self, prompts: list[Tensor], call: dict[str, Any]) -> list[Scheduled]:
        requests = []
        for prompt, params in zip(prompts, call["sampling_params"], strict=True):
            request = Scheduled(prompt.tolist(), dict(params))
            request.processor = call["custom_logit_processor"]
            request.kv = SimpleNamespace(kv_committed_len=0)
            request.output_ids = request.tokens
            request.custom_params = {**params["custom_params"], "__req__": request}
            self.waiting.append(request)
            self.seen[id(request)] = []
            requests.append(request)
        return requests

    def step(self) -> bool:
        if self.waiting:
            batch, room = [], self.chunk
            for request in self.waiting:
                missing = len(request.prompt) - request.kv.kv_committed_len
                taken = min(missing, room)
                room -= taken
                if taken:
                    request.kv.kv_committed_len += taken
                    batch.append(request)
        else:
            self.running = [one for one in self.running if not one.finished()]
            batch = self.running
            for request in batch:
                request.kv.kv_committed_len += 1
        if not batch:
            self._take()
            return bool(self.results) or any(not one.finished() for one in self.running)
        through = [one for one in batch if one.kv.kv_committed_len >= len(one.prompt)]
        tokens = self._sample(batch)
        if not self.overlap:
            self.results.append((through, [tokens[id(one)] for one in through]))
        self._take()
        if self.overlap:
            self.results.append((through, [tokens[id(one)] for one in through]))
        for request in through:
            self.seen[id(request)].append(tokens[id(request)])
        self.running += [one for one in through if one in self.waiting]
        self.waiting = [one for one in self.waiting if one not in through]
        return True

    def _take(self) -> None:
        for requests, tokens in self.results:
            for request, token in zip(requests, tokens, strict=True):
                if not request.finished():
                    request.take(token, self.eos)
        self.results = []

    def _sample(self, batch: list[Scheduled]) -> dict[int, int]:
        fed = [(one.prompt + self.seen[id(one)])[: one.kv.kv_committed_len] for one in batch]
        logits = logits_of(self.model, fed)
        for text in {one.processor for one in batch}:
            rows = [i for i, one in enumerate(batch) if one.processor == text]
            params = [batch[i].custom_params for i in rows]
            chosen = logits.index_select(0, torch.tensor(rows))
            logits[rows] = self.base.from_str(text)(chosen, params)
        return {id(one): int(row.argmax()) for one, row in zip(batch, logits, strict=True)}
