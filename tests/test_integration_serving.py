"""Paired requests in vLLM and SGLang, in engines of our own with the order of calls of the real.

The interfaces are the packages' own where these can be imported, else stand-ins. The answers must
be those of ``self_contrastive_generate``, token by token.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import serving_engines as engines
from self_contrastive_cases import VOCAB, build, make, questions, tokens
from trimtab import self_contrastive_generate

pytest.importorskip("transformers")

RESERVED = VOCAB - 1
RATIO = 2.5
STEPS = (9, 12, 15)
GREEDY: dict[str, Any] = {}
SAMPLED = {"temperature": 4.0, "top_p": 0.95}
OURS = ("trimtab.integrations.vllm", "trimtab.integrations.sglang")


def load(name: str, monkeypatch, stand_ins: dict[str, Any] | None = None) -> ModuleType:
    """One of our modules, made anew over the real package or over stand-ins."""
    if stand_ins is None:
        try:
            module = importlib.import_module(name)
            if module._missing is None:
                return module
        except ImportError:
            pass
        stand_ins = engines.modules()
    for key, value in stand_ins.items():
        monkeypatch.setitem(sys.modules, key, value)
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    # Left behind, it would be what a later import finds.
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def vllm(monkeypatch):
    return load(OURS[0], monkeypatch)


@pytest.fixture
def sglang(monkeypatch):
    module = load(OURS[1], monkeypatch)
    runtime = importlib.import_module("sglang.srt.runtime_context")
    arguments = SimpleNamespace(speculative_algorithm=None)
    monkeypatch.setattr(runtime, "get_server_args", lambda: arguments)
    module.server_args = arguments
    return module


@pytest.fixture(scope="module")
def model():
    return make("llama")


@pytest.fixture(scope="module")
def asked():
    return questions()


def wanted(
    model: Any,
    asked: Any,
    how: dict[str, Any],
    eos: int | None = None,
    reserved: int | None = RESERVED,
) -> list[list[int]]:
    """New tokens of each question, up to its own limit or its eos, without the reserved one."""

    def keep_out(ids: Tensor, scores: Tensor) -> Tensor:
        banned = [] if reserved is None else [reserved]
        return scores.index_fill(1, torch.tensor(banned, dtype=torch.int64), -torch.inf)

    answers = []
    for i, (plain, safety) in enumerate(zip(asked.plain, asked.safety, strict=True)):
        sampling = {"do_sample": True, "seed": 100 + i, **how} if how else {}
        ids = self_contrastive_generate(
            model, plain[None], safety[None], ratio=RATIO, max_new_tokens=STEPS[i],
            eos_token_id=[] if eos is None else eos, logits_processor=[keep_out], **sampling,
        )  # fmt: skip
        answers.append(ids[0, len(plain) :].tolist())
    return answers


def submit(engine: Any, paired: Any, asked: Any, how: dict[str, Any], **more: Any) -> list[Any]:
    """Both requests of every question, as [positive, negative] each."""
    found = []
    for i, prompts in enumerate(zip(asked.plain, asked.safety, strict=True)):
        call = {"alpha": RATIO - 1.0, "parted_token_id": RESERVED, "seed": 100 + i, **how, **more}
        if isinstance(engine, engines.TurnEngine):
            both = paired(f"q{i}", max_new_tokens=STEPS[i], **call)
            found.append(engine.add_pair(list(prompts), both))
        else:
            both = paired(f"q{i}", max_tokens=STEPS[i], detokenize=False, **call)
            found.append([engine.add(*one) for one in zip(prompts, both, strict=True)])
    return found


def batch_engine(vllm: ModuleType, model: Any, **how: Any) -> Any:
    processor = vllm.PairedLogitsProcessor(engines.config(), torch.device("cpu"), False)
    return engines.BatchEngine(model, processor, **how)


def slot_engine(vllm: ModuleType, model: Any, **how: Any) -> Any:
    settings = engines.config(chunked=True)
    return engines.SlotEngine(
        model, lambda state: vllm.PairedLogitsProcessor(settings, state), **how
    )


def turn_engine(sglang: ModuleType, model: Any, **how: Any) -> Any:
    return engines.TurnEngine(model, sglang.PairedLogitProcessor, **how)


# --- answers ---


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["batch", "batch, late", "slots"])
def test_vllm_answers_as_self_contrastive_generate_does(vllm, model, asked, kind, how):
    make_engine = slot_engine if kind == "slots" else batch_engine
    engine = make_engine(vllm, model, **({"late": True} if "late" in kind else {}))
    params = importlib.import_module("vllm").SamplingParams
    ordinary = engine.add(asked.plain[0], params(temperature=0.0, max_tokens=6, detokenize=False))
    pairs = submit(engine, vllm.paired, asked, how)
    engine.step()
    later = engine.add(asked.plain[1], params(temperature=0.0, max_tokens=20, detokenize=False))
    while not pairs[0][0].end:
        engine.step()
    # Where a pair has been the step before.
    last = [engine.add(asked.plain[2], later.params), engine.add(asked.safety[2], later.params)]
    engine.run()
    for (positive, negative), answer in zip(pairs, wanted(model, asked, how), strict=True):
        assert positive.tokens == negative.tokens == answer
        assert positive.end == negative.end == "length"
    for one in (ordinary, later, *last):
        prompt = torch.tensor([one.prompt])
        ids = model.generate(prompt, max_new_tokens=len(one.tokens), do_sample=False)
        assert one.tokens == ids[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("overlap", [False, True])
def test_sglang_answers_as_self_contrastive_generate_does(sglang, model, asked, overlap, how):
    engine = turn_engine(sglang, model, overlap=overlap)
    pairs = submit(engine, sglang.paired, asked, how)
    engine.run()
    for (positive, negative), answer in zip(pairs, wanted(model, asked, how), strict=True):
        assert positive.tokens == negative.tokens == answer
        assert positive.end == negative.end == "length"


def test_both_end_at_the_eos_token(vllm, sglang, model, asked):
    eos = wanted(model, asked, GREEDY)[1][4]
    answers = wanted(model, asked, GREEDY, eos)
    assert {len(answer) for answer in answers} - set(STEPS), "one has to end early"
    cases = [
        (batch_engine(vllm, model, eos=eos), vllm), (slot_engine(vllm, model, eos=eos), vllm),
        (turn_engine(sglang, model, eos=eos, overlap=True), sglang),
    ]  # fmt: skip
    for engine, module in cases:
        pairs = submit(engine, module.paired, asked, GREEDY)
        engine.run()
        assert [positive.tokens for positive, _ in pairs] == answers
        assert [negative.tokens for _, negative in pairs] == answers


# --- parted pairs ---


@pytest.mark.parametrize("kind", ["batch", "slots"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_preempted_request_ends_its_pair_and_no_other(vllm, model, asked, kind, victim):
    make_engine = slot_engine if kind == "slots" else batch_engine
    engine = make_engine(vllm, model)
    pairs = submit(engine, vllm.paired, asked, SAMPLED)
    for _ in range(4):
        engine.step()
    engine.preempt(pairs[1][victim])
    engine.step()
    engine.waiting.append(pairs[1][victim])  # resumed with the tokens that it had
    engine.run()
    answers = wanted(model, asked, SAMPLED)
    for i in (0, 2):
        assert pairs[i][0].tokens == pairs[i][1].tokens == answers[i]
    for request in pairs[1]:
        assert request.tokens == [*answers[1][:4], RESERVED]
        assert request.end == RESERVED


def test_prompts_that_are_not_through_in_one_step_part_a_pair(vllm, sglang, model, asked):
    """In the second model runner, by chunks; a chunk's row is no partner for a first token."""
    engine = slot_engine(vllm, model, chunk=10)
    pairs = submit(engine, vllm.paired, asked, GREEDY)
    engine.run()
    answers = wanted(model, asked, GREEDY)
    through = [len(prompt) <= 10 for prompt in asked.safety]
    assert through == [False, True, True]
    for (positive, negative), answer, whole in zip(pairs, answers, through, strict=True):
        expected = answer if whole else [RESERVED]
        assert positive.tokens == negative.tokens == expected
    engine = turn_engine(sglang, model, chunk=len(asked.plain[0]) + 3)
    pairs = submit(engine, sglang.paired, asked, GREEDY)
    engine.run()
    assert [request.tokens for request in pairs[0]] == [[RESERVED]] * 2


def test_prompts_in_several_steps_that_end_in_the_same_one(vllm, sglang, model):
    """And, in vLLM, both requests preempted together: they go on as if nothing had been."""
    pair = build([tokens(9, 50)], [tokens(11, 51)])
    engine = slot_engine(vllm, model, chunk=8)
    (requests,) = submit(engine, vllm.paired, pair, SAMPLED, parted_token_id=None)
    for _ in range(5):
        engine.step()
    for request in requests:
        engine.preempt(request)
    engine.chunk = 10  # past one prompt, and short of what has come after it
    engine.waiting += requests
    engine.run()
    assert [one.tokens for one in requests] == wanted(model, pair, SAMPLED, reserved=None) * 2
    pair = build([tokens(20, 52)], [tokens(4, 53)])
    engine = turn_engine(sglang, model, chunk=15)
    (requests,) = submit(engine, sglang.paired, pair, SAMPLED, parted_token_id=None)
    engine.run()
    assert [one.tokens for one in requests] == wanted(model, pair, SAMPLED, reserved=None) * 2


@pytest.mark.parametrize("kind", ["batch", "slots", "turns"])
def test_tokens_that_differ_end_a_pair(vllm, sglang, model, asked, kind):
    """As where a part of the engine has overruled the token of one request."""
    if kind == "turns":
        engine, module = turn_engine(sglang, model), sglang
    else:
        engine, module = (slot_engine if kind == "slots" else batch_engine)(vllm, model), vllm
    ((positive, negative), *_) = submit(engine, module.paired, asked, GREEDY)
    for _ in range(3):
        engine.step()
    negative.tokens[-1] = (negative.tokens[-1] + 1) % RESERVED
    engine.run()
    assert positive.tokens == [*wanted(model, asked, GREEDY)[0][:3], RESERVED]
    assert negative.end == RESERVED


def test_a_partner_that_never_comes(vllm, model, asked):
    engine = batch_engine(vllm, model)
    both = vllm.paired("q", alpha=1.5, parted_token_id=RESERVED, max_tokens=5, detokenize=False)
    alone = engine.add(asked.plain[0], both[0])
    engine.run()
    assert (alone.tokens, alone.end) == ([RESERVED], RESERVED)
    both = vllm.paired("q", alpha=1.5, parted_token_id=None, max_tokens=5, detokenize=False)
    engine.add(asked.plain[0], both[1])
    with pytest.raises(RuntimeError, match=r"pair 'q' .* its negative request alone"):
        engine.run()


def test_one_that_ends_before_the_other(sglang, model, asked):
    engine = turn_engine(sglang, model)
    ((positive, negative), *_) = submit(engine, sglang.paired, asked, GREEDY)
    negative.params["max_new_tokens"] = 3
    engine.run()
    answer = wanted(model, asked, GREEDY)[0]
    assert negative.tokens == answer[:3]
    assert positive.tokens == [*answer[:3], RESERVED]


# --- what is refused ---

VLLM_CALL = {"alpha": 1.5, "parted_token_id": 5, "detokenize": False}


def test_vllm_refuses_what_it_would_ignore(vllm):
    positive, negative = vllm.paired("p", stop_token_ids=[3], extra_args={"own": 1}, **VLLM_CALL)
    for params in (positive, negative):
        assert params.extra_args["own"] == 1
        assert list(params.stop_token_ids) == [3, 5]
        vllm.PairedLogitsProcessor.validate_params(params)
    for name, value in (("repetition_penalty", 1.1), ("seed", 1), ("temperature", 0.5)):
        params = vllm.paired("p", **VLLM_CALL)[0]
        setattr(params, name, value)
        with pytest.raises(ValueError, match=f"{name} must be"):
            vllm.PairedLogitsProcessor.validate_params(params)
    params.temperature, params.stop_token_ids = 0.0, [3]
    with pytest.raises(ValueError, match="stop_token_ids must have parted_token_id 5"):
        vllm.PairedLogitsProcessor.validate_params(params)
    params.extra_args = {"trimtab_pair": 3}
    with pytest.raises(ValueError, match="trimtab_side must be given"):
        vllm.PairedLogitsProcessor.validate_params(params)
    # A TypeError would not become an answer to the client.
    params.extra_args = {"trimtab_pair": 3, "trimtab_side": "positive", "trimtab_alpha": 1.0}
    with pytest.raises(ValueError, match="pair_id must be a string"):
        vllm.PairedLogitsProcessor.validate_params(params)
    params.extra_args = None
    vllm.PairedLogitsProcessor.validate_params(params)
    with pytest.raises(ValueError, match="presence_penalty must be"):
        vllm.paired("p", presence_penalty=0.5, **VLLM_CALL)
    with pytest.raises(ValueError, match="stop must be None without parted_token_id"):
        vllm.paired("p", stop="x", **{**VLLM_CALL, "parted_token_id": None, "detokenize": True})


def test_vllm_stop_strings_are_the_positive_request_s(vllm):
    positive, negative = vllm.paired("p", stop="x", **{**VLLM_CALL, "detokenize": True})
    assert list(positive.stop if isinstance(positive.stop, list) else [positive.stop]) == ["x"]
    assert not negative.stop


@pytest.mark.parametrize(
    ("changes", "slots", "match"),
    [
        ({"speculative": object()}, True, "speculative_config must be None"),
        ({"sharded": True}, True, "enable_batch_sharded_sampling must be False"),
        ({"chunked": True}, False, "enable_chunked_prefill must be False"),
    ],
)
def test_vllm_engines_that_it_refuses(vllm, changes, slots, match):
    rest = (SimpleNamespace(),) if slots else (torch.device("cpu"), False)
    with pytest.raises(ValueError, match=match):
        vllm.PairedLogitsProcessor(engines.config(**changes), *rest)
    assert not vllm.PairedLogitsProcessor(engines.config(), *rest).is_argmax_invariant()


def test_sglang_refuses_what_it_would_ignore(sglang):
    call = {"alpha": 1.5, "parted_token_id": 5}
    both = sglang.paired("p", stop="x", custom_params={"own": 1}, max_new_tokens=4, **call)
    positive, negative = both["sampling_params"]
    assert positive["stop"] == "x"
    assert "stop" not in negative
    assert positive["custom_params"]["own"] == negative["custom_params"]["own"] == 1
    json.dumps(both)
    for name, value in (("frequency_penalty", 0.1), ("n", 2), ("ignore_eos", True)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            sglang.paired("p", **{name: value}, **call)
    with pytest.raises(ValueError, match="stop_regex must be left out"):
        sglang.paired("p", stop_regex="x", **call)
    with pytest.raises(ValueError, match="stop must be None without parted_token_id"):
        sglang.paired("p", stop="x", alpha=1.5, parted_token_id=None)
    sglang.server_args.speculative_algorithm = "EAGLE"
    with pytest.raises(ValueError, match="speculative_algorithm must be None"):
        sglang.PairedLogitProcessor()


@pytest.mark.parametrize("name", OURS)
def test_a_missing_or_old_package_is_said(monkeypatch, name):
    package = name.rpartition(".")[2]
    call = {"alpha": 1.5, "parted_token_id": 5}
    module = load(name, monkeypatch, {package: None})
    with pytest.raises(ImportError, match=rf"{package} >= 0.*can't be imported.*install {package}"):
        module.paired("p", **call)
    old = engines.modules("0.31.2", "0.5.9")
    module = load(name, monkeypatch, old)
    with pytest.raises(ImportError, match=rf"{package} >= 0.*got 0\.\d+\.\d; upgrade it"):
        module.paired("p", **call)
