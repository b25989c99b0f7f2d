"""token_nll: rows of the NLL matrix against log_softmax of a model's own logits."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from trimtab.algorithms.capability_salience.token_rows import row_token_ids, token_nll

transformers = pytest.importorskip("transformers")

LENGTHS = (12, 7, 2, 1, 9)
WIDTH = max(LENGTHS)
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS = {
    "llama": {},
    "gpt2": GPT2,
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gptj": {**GPT2, "rotary_dim": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
}


def make(kind: str, **changes: Any) -> Any:
    """A tiny model whose logits spread enough for a softcap or a scale to matter."""
    settings = {**SHAPE, **MODELS.get(kind, {}), **changes}
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def text(side: str) -> tuple[Tensor, Tensor]:
    """Padded ids and their mask; what pads is not the padding token, so that it would be seen."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (len(LENGTHS), WIDTH), generator=g)
    padded, mask = torch.randint(3, 97, ids.shape, generator=g), torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(WIDTH - length, WIDTH)
        padded[row, place], mask[row, place] = ids[row, :length], 1
    return padded, mask


def row_by_sequence(model: Any) -> Tensor:
    """The row from full logits, one sequence at a time and without any padding."""
    ids, _ = text("right")
    parts = []
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            logits = model(ids[row : row + 1, :length]).logits[0, :-1].double()
        target = ids[row, 1:length, None]
        parts.append(-torch.log_softmax(logits, -1).gather(1, target)[:, 0])
    return torch.cat(parts)


def assert_rounded(got: Tensor, want: Tensor) -> None:
    """``got`` is ``want`` rounded to float32, give or take what float64 adds up to."""
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    allowed = torch.finfo(torch.float32).eps * want.abs() + 1e-12
    assert ((got.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", MODELS)
def test_row_is_that_of_the_full_logits(kind: str, side: str) -> None:
    model = make(kind)
    want = row_by_sequence(model)
    assert len(want) == sum(LENGTHS) - len(LENGTHS)
    ids, mask = text(side)
    for batch_size in (1, 2, 5, 8):
        assert_rounded(token_nll(model, ids, mask, batch_size=batch_size), want)
    assert_rounded(trimtab.token_nll(model, ids, mask.bool(), impl="reference"), want)


def test_text_without_padding() -> None:
    model = make("llama")
    ids, _ = text("right")
    logits = model(ids).logits[:, :-1].detach()
    want = -torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0].flatten()
    assert_rounded(token_nll(model, ids), want)
    assert_rounded(token_nll(model, ids.int(), torch.ones_like(ids)), want)


def test_row_token_ids_are_in_the_order_of_the_row() -> None:
    want = torch.cat([text("right")[0][row, 1:length] for row, length in enumerate(LENGTHS)])
    for side in ("right", "left"):
        assert torch.equal(row_token_ids(*text(side)), want)
    ids, _ = text("right")
    assert torch.equal(row_token_ids(ids), ids[:, 1:].flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_as_good_as_eager(dtype: torch.dtype) -> None:
    model = make("gemma2")
    exact = row_by_sequence(model)
    model = model.to(dtype)
    eager = row_by_sequence(model)
    ours = token_nll(model, *text("right"), batch_size=1).double()
    error, allowed = (ours - exact).abs().max(), (eager - exact).abs().max()
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.abs().max()


def test_the_head_makes_no_logits_but_for_the_comparison() -> None:
    model, rows = make("llama"), []
    hook = model.lm_head.register_forward_hook(lambda *a: rows.append(a[2].numel() // 97))
    token_nll(model, *text("right"))
    hook.remove()
    assert rows == [8]


def test_modules_are_left_in_the_mode_they_were_in() -> None:
    model = make("gpt2", resid_pdrop=0.9, embd_pdrop=0.9, attn_pdrop=0.9)
    want = token_nll(model, *text("right"))
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert torch.equal(token_nll(model, *text("right")), want), "no dropout"
    assert [module.training for module in model.modules()] == before
    assert not want.requires_grad
    with pytest.raises(ValueError, match="logits"):
        token_nll(model, *text("right"), logit_scale=0.5)
    assert [module.training for module in model.modules()] == before


def test_hidden_states_and_head_of_your_own() -> None:
    model = make("gptj")
    calls = []

    def hidden(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        calls.append(attention_mask is None)
        return model.transformer(input_ids, attention_mask=attention_mask).last_hidden_state

    head = model.lm_head
    got = token_nll(
        hidden, *text("left"), linear_weight=head.weight, linear_bias=head.bias, batch_size=1
    )
    assert_rounded(got, row_by_sequence(model))
    assert all(calls), "one sequence at a time has no padding once it is aligned"
    scaled = token_nll(
        hidden, *text("left"), linear_weight=head.weight, linear_bias=head.bias,
        logit_scale=0.5, softcap=3.0,
    )  # fmt: skip
    assert not all(calls)
    ids, mask = text("right")
    z = 3.0 * torch.tanh(0.5 * model(ids, attention_mask=mask).logits[:, :-1] / 3.0)
    want = -torch.log_softmax(z, -1).gather(2, ids[:, 1:, None])[..., 0]
    assert_rounded(scaled, want[mask[:, 1:].bool()].detach())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("hyperclovax", {"logits_scaling": 3.0}), ("bert", {"is_decoder": True})],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_head_that_is_not_the_whole_way_to_the_logits_is_an_error(
    kind: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match="model must make its logits as"):
        token_nll(make(kind, **settings).to(dtype), *text("right"))


def test_logit_scale_can_be_given_where_the_config_says_something_else() -> None:
    model = make("hyperclovax", logits_scaling=3.0)
    got = token_nll(model, *text("left"), logit_scale=3.0)
    assert_rounded(got, row_by_sequence(model))


def test_wrapped_models_are_looked_into() -> None:
    class Wrapper(torch.nn.Module):
        """As an adapter library wraps: the model inside does the work."""

        def __init__(self, inside: Any) -> None:
            super().__init__()
            self.inside = inside

        def get_base_model(self) -> Any:
            return self.inside

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inside(*args, **kwargs)

    model = make("llama")
    assert_rounded(token_nll(Wrapper(model), *text("right")), row_by_sequence(model))


def test_nothing_to_count() -> None:
    model = make("llama")
    one = torch.tensor([[5], [6]])
    assert token_nll(model, one).shape == (0,)
    ids, mask = text("right")
    assert token_nll(model, ids, torch.zeros_like(mask)).shape == (0,)
    mask[1] = 0
    kept = [row for row in range(len(LENGTHS)) if row != 1]
    want = token_nll(model, ids[kept], mask[kept])
    torch.testing.assert_close(token_nll(model, ids, mask), want)


def test_progress_goes_on_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make("llama")
    want = token_nll(model, *text("right"))
    assert torch.equal(token_nll(model, *text("right"), progress=True), want)
    assert "token_nll" in capsys.readouterr().err
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.warns(UserWarning, match="progress=True needs tqdm"):
        assert torch.equal(token_nll(model, *text("right"), progress=True), want)


IDS, MASK = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5)
GAPS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]])


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "input_ids must be integers", {"input_ids": IDS.float()}),
        (ValueError, "input_ids must be .sequences", {"input_ids": IDS[0]}),
        (ValueError, "input_ids must be .sequences", {"input_ids": IDS[:0]}),
        (ValueError, "attention_mask must have the shape", {"attention_mask": MASK[:1]}),
        (ValueError, "attention_mask must be one run .* sequence 1", {"attention_mask": GAPS}),
        (ValueError, "batch_size must be", {"batch_size": 0}),
        (ValueError, "linear_bias must come with", {"linear_bias": torch.ones(97)}),
        (ValueError, "model must be a Hugging Face", {"model": torch.nn.Linear(2, 2)}),
    ],
)
def test_errors_name_the_argument(
    error: type[Exception], match: str, arguments: dict[str, Any]
) -> None:
    call = {"model": None, "input_ids": IDS, **arguments}
    if call["model"] is None:
        call["model"] = make("llama")
    with pytest.raises(error, match=match):
        token_nll(call.pop("model"), call.pop("input_ids"), **call)


def test_a_sure_model_has_a_loss_of_zero() -> None:
    weight = 100.0 * torch.eye(4)
    ids = torch.tensor([[0, 1, 2, 3]])
    hidden = torch.eye(4)[[1, 2, 3, 0]][None]
    row = token_nll(lambda i, m: hidden, ids, linear_weight=weight)
    assert torch.equal(row, torch.zeros(3))
    other = token_nll(lambda i, m: hidden.roll(1, 2), ids, linear_weight=weight)
    torch.testing.assert_close(other, torch.full((3,), 100.0))
    assert math.isfinite(float(other.sum()))
