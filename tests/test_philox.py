"""The random stream: published vectors, an oracle in exact integers, and its statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import contrast_oracle as oracle
from trimtab.reference import philox

# Random123's known answers for philox4x32, ten rounds: counter, key, output.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
INT64 = (-(2**63), 2**63 - 1)
NUMBERS = [0, 1, -1, 2**32, 2**32 - 1, -(2**32), 12345678901234567, *INT64]


def tensors(*numbers: int) -> list[torch.Tensor]:
    return [torch.tensor([number]) for number in numbers]


def words_of(seed: int, position: int, classes: int) -> list[np.ndarray]:
    return [w[0].numpy() for w in philox.random_words(*tensors(seed, position), classes)]


def gumbel_of(seed: int, position: int, classes: int) -> np.ndarray:
    return philox.gumbel(*tensors(seed, position), classes)[0].numpy()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    ours = philox.philox4x32(tuple(tensors(*counter)), tuple(tensors(*key)))
    assert tuple(int(word) for word in ours) == expected
    assert oracle.philox4x32_10(counter, key) == expected


@pytest.mark.parametrize("seed", NUMBERS)
@pytest.mark.parametrize("position", NUMBERS)
def test_words_of_any_seed_and_position(seed, position):
    """Both are int64 in two's complement, of which every bit counts."""
    for classes in (1, 2, 7):
        for ours, expected in zip(
            words_of(seed, position, classes), oracle.bits_of(seed, position, classes), strict=True
        ):
            assert ours.tolist() == expected.tolist()


def test_a_token_has_two_words_of_its_pairs_block():
    """Token v has the counter v // 2; of its four words an odd token takes the last two."""
    hi, lo = words_of(5, -9, 6)
    for v in range(6):
        low, high = (-9 & 0xFFFFFFFF), (-9 >> 32) & 0xFFFFFFFF
        words = oracle.philox4x32_10((v // 2, 0, low, high), (5, 0))
        assert (hi[v], lo[v]) == (words[2 * (v % 2)], words[2 * (v % 2) + 1])


def test_every_bit_of_seed_and_position_counts():
    seen = {tuple(words_of(0, 0, 4)[0])}
    for bit in range(64):
        number = (1 << bit) - (1 << 64 if bit == 63 else 0)
        seen |= {tuple(words_of(number, 0, 4)[0]), tuple(words_of(0, number, 4)[0])}
    assert len(seen) == 129


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (-7, 2**40 + 3), (2**62, -1)])
def test_noise_to_the_bit(seed, position):
    assert gumbel_of(seed, position, 20_001).tobytes() == (
        oracle.gumbel(seed, position, 20_001).tobytes()
    )


CORNERS = [0, 1, 2, 0xFFFF, 0x4AFB0CCC, 0x4AFB0CCD, 0x4AFB0CCE, 0x7FFFFFFF, 0x80000000]
CORNERS += [0xFFFFFF7F, 0xFFFFFF80, 0xFFFFFFFE, 0xFFFFFFFF]


def corner_words() -> tuple[np.ndarray, np.ndarray]:
    hi, lo = np.meshgrid(np.array(CORNERS, np.int64), np.array(CORNERS, np.int64))
    return hi.reshape(-1), lo.reshape(-1)


def oracle_noise(hi: np.ndarray, lo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setattr(oracle, "bits_of", lambda *args: (hi.astype(np.uint64), lo))
    return oracle.gumbel(0, 0, len(hi))


def test_noise_of_the_words_at_the_corners(monkeypatch):
    """The smallest and the largest variates, and both sides of where the logarithms change."""
    hi, lo = corner_words()
    ours = philox.gumbel_of_words(torch.tensor(hi), torch.tensor(lo)).numpy()
    assert ours.tobytes() == oracle_noise(hi, lo, monkeypatch).tobytes()
    assert np.isfinite(ours).all()
    smallest, largest = ours.min(), ours.max()
    assert smallest == pytest.approx(-math.log(64 * math.log(2)), rel=1e-6)
    assert largest == pytest.approx(66 * math.log(2), rel=1e-6)


def exact_noise(hi: int, lo: int) -> float:
    """``-log(-log(1 - x))`` of 64 bits; 1 - x is their complement, made odd so that it is not 0."""
    bits = (hi << 32) + lo
    x, rest = bits / 2**64, ((2**64 - 1 - bits) | 1) / 2**64
    return -math.log(-math.log1p(-x) if x < 0.25 else -math.log(rest))


def test_noise_is_accurate():
    """Within 2 float32 roundings of the numbers it is made of, at both ends too."""
    hi, lo = (np.concatenate(w) for w in zip(corner_words(), words_of(3, 4, 3000), strict=True))
    inside = (hi > 0) | (lo > 0)
    hi, lo = hi[inside], lo[inside]
    ours = philox.gumbel_of_words(torch.tensor(hi), torch.tensor(lo)).double().numpy()
    exact = np.array([exact_noise(int(h), int(w)) for h, w in zip(hi, lo, strict=True)])
    eps = np.finfo(np.float32).eps
    assert (np.abs(ours - exact) <= 2 * eps * np.maximum(1, np.abs(exact))).all()


def test_noise_has_gumbels_distribution():
    """Kolmogorov-Smirnov over 400,000 variates of many seeds and positions."""
    seeds = torch.arange(20).repeat_interleave(20)
    noise = philox.gumbel(seeds, torch.arange(20).repeat(20), 1000).reshape(-1).double()
    cdf = torch.exp(-torch.exp(-noise)).sort().values
    n = len(cdf)
    rank = torch.arange(1, n + 1).double() / n
    distance = float(torch.maximum((rank - cdf).abs(), (cdf - rank + 1 / n).abs()).max())
    assert distance * math.sqrt(n) < 1.95, "p < 1e-3"


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (1, -1), (2**32, 0), (0, 2**32)], ids=str)
def test_neighbouring_streams_are_uncorrelated(step):
    """Tokens next to each other too, and a stream moved by one token or one pair."""
    count, classes = 400, 500
    seeds, positions = torch.arange(count) * 3, torch.arange(count) * 7
    here = philox.gumbel(seeds, positions, classes).double()
    there = philox.gumbel(seeds + step[0], positions + step[1], classes).double()
    here, there = (-torch.exp(-g) for g in (here, there))
    for shift in (0, 1, 2):
        a, b = here[:, : classes - shift].reshape(-1), there[:, shift:].reshape(-1)
        r = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert abs(float(r)) * math.sqrt(len(a)) < 4
        if shift:
            within = torch.corrcoef(torch.stack([a, here[:, shift:].reshape(-1)]))[0, 1]
            assert abs(float(within)) * math.sqrt(len(a)) < 4


def test_noise_of_a_row_does_not_depend_on_the_others():
    seeds, positions = torch.tensor([4, -4, 4]), torch.tensor([9, 9, 10])
    together = philox.gumbel(seeds, positions, 33)
    for i in range(3):
        for classes in (33, 10):
            alone = philox.gumbel(seeds[i : i + 1], positions[i : i + 1], classes)
            assert torch.equal(together[i, :classes], alone[0])
