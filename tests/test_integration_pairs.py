"""What the integrations for serving engines share: a pair's arguments, and the token of both."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab import contrastive_sample
from trimtab.integrations._pairs import (
    Row,
    check_neutral,
    draw_pairs,
    pair_arguments,
    read_side,
    too_old,
)

# --- the rows ---


def side(name: str = "positive", pair: str = "p", parted: int | None = 5, **draw: Any) -> Any:
    arguments = pair_arguments(pair, **{"alpha": 1.5, "parted_token_id": parted, **draw})
    return read_side(arguments[name == "negative"])


def logits(rows: int = 4, columns: int = 50, seed: int = 0) -> Tensor:
    return 3.0 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def taken(row: Tensor) -> int:
    """The one token of a row that any sampler takes."""
    assert row.isfinite().sum() == 1
    assert row.max() == 0.0
    return int(row.argmax())


@pytest.mark.parametrize("stride", [1, 2])
def test_each_pair_draws_by_its_own_arguments(stride):
    draws = [
        {}, {"temperature": 1.5, "seed": 3}, {"temperature": 2.0, "top_k": 4, "seed": 4},
        {"temperature": 3.0, "plausibility": 0.01, "top_p": 0.8, "alpha": -0.5},
        {"temperature": 3.0, "plausibility": 0.2, "min_p": 0.05, "seed": 2**62, "alpha": 3},
        {"temperature": 5.0, "parted": None, "seed": -1},
    ]  # fmt: skip
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1)).tolist()
    before = logits(13 * stride)[::stride]
    before[:, 5] += 12.0
    rows, expected = [], {}
    for i, draw in enumerate(draws):
        positive, negative = order[2 * i], order[2 * i + 1]
        for name, index in (("positive", positive), ("negative", negative)):
            rows.append(Row(index, side(name, f"p{i}", **draw), 40 + i))
        own = {"alpha": 1.5, **draw, "position": 40 + i, "temperature": draw.get("temperature", 0)}
        masked = before.clone()
        if own.pop("parted", 5) is not None:
            masked[:, 5] = -torch.inf
        expected[i] = int(contrastive_sample(masked[[positive]], masked[[negative]], **own).token)
    after = draw_pairs(before.clone(), rows[::-1])
    assert len(set(expected.values())) > 3
    for i in range(len(draws)):
        assert [taken(after[order[2 * i + j]]) for j in (0, 1)] == [expected[i]] * 2
    assert torch.equal(after[order[12]], before[order[12]])


PARTED = {
    "alone": [Row(0, side(), 2)],
    "not one of each side": [Row(0, side(), 2), Row(1, side(), 2)],
    "3 requests": [Row(0, side(), 2), Row(1, side("negative"), 2), Row(2, side(), 2)],
    "different arguments": [Row(0, side(), 2), Row(1, side("negative", alpha=2.0), 2)],
    "2 and 3 new tokens": [Row(0, side(), 2), Row(1, side("negative"), 3)],
    "different tokens": [Row(0, side(), 2, [7, 8]), Row(1, side("negative"), 2, [7, 9])],
}


@pytest.mark.parametrize("reason", PARTED)
def test_a_parted_pair_gets_its_token_or_raises(reason):
    rows = PARTED[reason]
    after = draw_pairs(logits(), rows)
    assert [taken(after[row.place]) for row in rows] == [5] * len(rows)
    assert torch.equal(after[3], logits()[3])
    raising = [
        row._replace(side=row.side._replace(draw=row.side.draw._replace(parted_token_id=None)))
        for row in rows
    ]
    with pytest.raises(RuntimeError, match=f"pair 'p' must have both .*{reason}"):
        draw_pairs(logits(), raising)


def test_tokens_that_are_not_known_yet_part_nothing():
    rows = [Row(0, side(), 2, [7, -1]), Row(1, side("negative"), 2, [7, 9])]
    assert taken(draw_pairs(logits(), rows)[0]) != 5
    rows = [Row(0, side(), 2, [7]), Row(1, side("negative"), 2, [7, 9])]
    assert taken(draw_pairs(logits(), rows)[0]) != 5


@pytest.mark.parametrize("parted", [5, None])
def test_what_only_the_device_knows(parted):
    """NaN, and requests that were continued with different tokens."""
    rows = [Row(i, side(name, parted=parted), 2) for i, name in enumerate(("positive", "negative"))]
    broken = logits()
    broken[1, 20] = torch.nan
    for given, last in ((broken, None), (logits(), torch.tensor([1, 2, 1, 1]))):
        if parted is None:
            with pytest.raises(RuntimeError, match="without a token to choose"):
                draw_pairs(given, rows, last)
        else:
            assert [taken(draw_pairs(given, rows, last)[i]) for i in (0, 1)] == [5, 5]
    # Before the first new token both were continued with the ends of their prompts.
    first = [row._replace(generated=0) for row in rows]
    assert taken(draw_pairs(logits(), first, torch.tensor([1, 2, 1, 1]))[0]) != 5


def test_the_token_for_parted_pairs_is_never_drawn():
    rows = [Row(0, side(), 2), Row(1, side("negative"), 2)]
    planted = logits()
    planted[0, 5] = 1e4
    assert taken(draw_pairs(planted, rows)[0]) != 5
    with pytest.raises(ValueError, match=r"parted_token_id must be in \[0, 50\), got 50"):
        draw_pairs(logits(), [row._replace(side=side(parted=50)) for row in rows[:1]])
    both = [row._replace(side=side(row.side.side, parted=50)) for row in rows]
    with pytest.raises(ValueError, match="parted_token_id must be in"):
        draw_pairs(logits(), both)


# --- arguments ---


def test_arguments_are_flat_and_survive_json():
    both = pair_arguments("p", alpha=1.5, parted_token_id=None, top_p=0.9, seed=2**60)
    for name, arguments in zip(("positive", "negative"), both, strict=True):
        assert all(isinstance(value, (str, int, float)) for value in arguments.values())
        found = read_side(json.loads(json.dumps(arguments)))
        assert found == read_side(arguments)
        assert (found.side, found.draw.top_p, found.draw.seed) == (name, 0.9, 2**60)
    assert read_side(None) is None
    assert read_side({"other": 1}) is None


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"trimtab_pair": ""}, ValueError, "pair_id must be a name"),
        ({"trimtab_pair": 3}, TypeError, "pair_id must be a string"),
        ({"trimtab_pair": None}, TypeError, "trimtab_pair must be a string or a number"),
        ({"trimtab_side": "plain"}, ValueError, "trimtab_side must be one of"),
        ({"trimtab_alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"trimtab_top_p": 2.0}, ValueError, r"top_p must be in \[0, 1\]"),
        ({"trimtab_seed": 1.5}, TypeError, "seed must be an integer"),
        ({"trimtab_parted_token_id": -1}, ValueError, "parted_token_id must be 0 or more"),
        ({"trimtab_parted_token_id": True}, TypeError, "parted_token_id must be an integer"),
        ({"trimtab_topp": 0.9}, ValueError, "got topp"),
    ],
)
def test_bad_arguments(changes, error, match):
    good = pair_arguments("p", alpha=1.5, parted_token_id=1)[0]  # equal to True
    with pytest.raises(error, match=match):
        read_side({**good, **changes})


def test_a_missing_argument():
    with pytest.raises(ValueError, match="trimtab_alpha must be given"):
        read_side({"trimtab_pair": "p", "trimtab_side": "positive"})


def test_versions():
    assert not too_old("0.33.1.dev5+g1", (0, 32))
    assert not too_old("1", (0, 32))
    assert too_old("0.9", (0, 32))
    assert too_old("0.5.22.post1", (0, 5, 23))
    assert too_old("dev", (0, 32))


def test_neutral_means_neutral():
    check_neutral({"a": 1.0, "b": None, "c": []}.get, {"a": 1, "b": 2, "c": None})
    with pytest.raises(ValueError, match="a must be 1 in a paired request, got 2"):
        check_neutral({"a": 2}.get, {"a": 1})
