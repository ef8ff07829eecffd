"""The counter whose bits numbers are rounded with: as it is written down, as even and independent as it has to be, and
what is counted."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import spelled
import torch
from cases import CAPABILITIES
from random_bits_tests import *  # noqa: F403

import fusedoptim
from fusedoptim import _native, _random_places, reference
from fusedoptim._random_places import fnv1a, ids_of, place_of


@pytest.fixture(params=[*CAPABILITIES, "reference"])
def kernels(request: pytest.FixtureRequest) -> SimpleNamespace:
    if request.param == "reference":
        return SimpleNamespace(backend="reference", slow=True)
    assert _native._C.set_cpu_capability(request.param)
    return SimpleNamespace(backend="cpu", slow=False)


# ---- as it is written down ----


def word_of(index: int, seed: int, parameter: int, step: int, word: int) -> int:
    """Of one element, in Python's integers."""
    key = spelled.split_mix(spelled.stream(seed, parameter, step) ^ (word + (index >> 32) * 256))
    x = (index * 0x9E3779B1 + key) % 2**32
    x = ((x ^ x >> 16) * 0x21F0AAAD + (key >> 32)) % 2**32
    x = ((x ^ x >> 15) * 0x735A2D97) % 2**32
    return x ^ x >> 15


def test_split_mix_is_the_published_one() -> None:
    """The first numbers of java.util.SplittableRandom's generator from the state 1234567."""
    state, found = 1234567, []
    for _ in range(3):
        found.append(spelled.split_mix(state))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 2**53])
@pytest.mark.parametrize("parameter", [0, 3, 2**64 - 1])
def test_the_reference_counts_as_it_is_written_down(seed: int, parameter: int) -> None:
    near = [0, 1, 2, 97, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 5 * 2**32 + 7, 2**50 + 3]
    for step in (1, 2, 2**24):
        stream = reference.random_stream(seed, parameter, step)
        assert stream == spelled.stream(seed, parameter, step)
        for word in range(3):
            found = reference.random_word(torch.tensor(near), stream, word).tolist()
            assert found == [word_of(i, seed, parameter, step, word) for i in near]
            for i, bits in zip(near, found, strict=True):
                assert spelled.random_words(i >> 32, np.array([i % 2**32]), stream, word).tolist() == [bits]


def test_every_state_has_16_bits_of_its_own() -> None:
    """The parameter and the second moment share the first word, so that what is rounded most often takes one."""
    for rule in _native._C.rules():
        found = _native._C.find_rule(rule)
        halves = [0, *found.halves]
        assert len(set(halves)) == len(halves) and max(halves) < 6
    assert list(_native._C.find_rule("adam").halves)[:2] == [2, 1]
    assert [reference.half_of_slot(slot, 1) for slot in range(3)] == [2, 1, 3]
    assert [reference.half_of_slot(slot, -1) for slot in range(2)] == [2, 3]


def test_parameters_are_told_apart_by_their_names() -> None:
    """By their hash, without what wrappers put before them; by their number where there are none."""
    vectors = {"": 0xCBF29CE484222325, "a": 0xAF63DC4C8601EC8C, "foobar": 0x85944171F73967E8}
    assert {text: fnv1a(text) for text in vectors} == vectors
    names = ["module._orig_mod.layers.0.weight", "layers.0.module_list", "_orig_mod.module.x", "layers.module.b"]
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in names]
    named = fusedoptim.SGD([{"params": list(zip(names, params, strict=True))}], lr=0.1)
    plain = ["layers.0.weight", "layers.0.module_list", "x", "layers.b"]
    assert list(ids_of(named).values()) == plain
    assert [place_of(p, its_id).id for p, its_id in ids_of(named).items()] == [fnv1a(name) for name in plain]
    numbered = fusedoptim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    assert list(ids_of(numbered).values()) == [0, 1, 2, 3]


def test_parameters_of_the_same_name_have_bits_of_their_own() -> None:
    """The first those of its name, wherever it is among the groups."""
    found = []
    for groups in ([["a"], ["b"], ["module.b"]], [["b"], ["a"], ["b"]]):
        params = {(name, i): torch.nn.Parameter(torch.ones(64, 64).bfloat16()) for i, [name] in enumerate(groups)}
        o = fusedoptim.SGD(
            [{"params": [(name, p)]} for (name, _), p in params.items()], lr=1e-3, rounding={"param": "stochastic"}
        )
        for p in params.values():
            p.grad = torch.ones_like(p)
        o.step()
        found.append([p.detach() for p in params.values()])
    (a, b, second), (b_again, a_again, second_again) = found
    assert torch.equal(a, a_again) and torch.equal(b, b_again) and torch.equal(second, second_again)
    assert not torch.equal(b, second) and not torch.equal(a, b)


def test_names_are_hashed_only_where_something_is_rounded_stochastically(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> int:
        raise AssertionError(f"{text} was hashed")

    monkeypatch.setattr(_random_places, "fnv1a", refuse)
    model = torch.nn.Linear(2, 2)
    optimizer = fusedoptim.AdamW(model.named_parameters())
    with fusedoptim.step_in_backward(optimizer):
        model(torch.ones(2)).sum().backward()
        optimizer.param_groups[0]["rounding"] = "stochastic"
        optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
        with pytest.raises(AssertionError, match="was hashed"):
            model(torch.ones(2)).sum().backward()


# ---- as even and independent as it has to be ----

N = 1 << 18
LAGS = (1, 2, 3, 4, 7, 16, 64, 128, 512, 1000, 4096, 8192, 65536)
#: A seed, a parameter, a step and a word, and those whose bits must not follow from its.
STREAM, NEIGHBOURS = (0, 3, 40, 0), [(0, 3, 41, 0), (0, 4, 40, 0), (1, 3, 40, 0), (0, 3, 40, 1), (0, 3, 1064, 0)]


def weighed(x: np.ndarray, others: list[np.ndarray]) -> float:
    """How many standard deviations the worst of all statistics is off, for words that should be even and independent
    of themselves some places further and of others."""
    found: list[float] = []

    def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (x & 0xFFFF) / 65535 - 0.5, (x >> 16) / 65535 - 0.5

    def bits_even(x: np.ndarray) -> None:
        ones = np.unpackbits(x.view(np.uint8)).reshape(-1, 32).sum(0, dtype=np.int64)
        found.extend((ones / len(x) - 0.5) * 2 * len(x) ** 0.5)

    def correlate(a: np.ndarray, b: np.ndarray) -> None:
        (low_a, high_a), (low_b, high_b) = halves(a), halves(b)
        for x, y in ((low_a, low_b), (high_a, high_b), (low_a, high_b)):
            found.append(x @ y / len(a) ** 0.5 * 12)
        bits_even(a ^ b)

    bits_even(x)
    low, high = halves(x)
    found.append(low @ high / N**0.5 * 12)
    for shift, width in [(0, 8), (8, 8), (16, 8), (24, 8), (0, 12), (4, 12), (16, 12), (20, 12), (8, 16)]:
        cells = 1 << width
        counts = np.bincount(x >> shift & cells - 1, minlength=cells)
        chi = ((counts - N / cells) ** 2).sum() * cells / N
        found.append((chi - cells + 1) / (2 * (cells - 1)) ** 0.5)
    for other in [*(np.roll(x, lag) for lag in LAGS), *others]:
        correlate(x, other)
    return float(np.abs(found).max())


def test_bits_are_even_and_independent() -> None:
    """None of 700 statistics is off by 4.5 standard deviations, which by chance happens once in 200 times: no such
    chance is taken, because nothing is drawn."""
    for first in (0, 2**20, 2**32 - N):
        index = np.arange(first, first + N)
        words = [spelled.random_words(0, index, spelled.stream(*s), w) for *s, w in (STREAM, *NEIGHBOURS)]
        words.append(spelled.random_words(1, index, spelled.stream(*STREAM[:3]), 0))
        assert weighed(words[0], words[1:]) < 4.5


def broken(how: str, index: np.ndarray, stream: int, word: int) -> np.ndarray:
    key = spelled.split_mix(stream ^ word)
    low, high = np.uint32(key % 2**32), np.uint32(0 if how == "one key" else key >> 32)
    x = index.astype(np.uint32) * np.uint32(1 if how == "no Weyl start" else 0x9E3779B1) + low
    if how == "no shift between":
        return x * np.uint32(0x21F0AAAD) + high
    x = (x ^ x >> 16) * np.uint32(0x21F0AAAD) + high
    if how == "one multiplication":
        return x ^ x >> 15
    x = (x ^ x >> 15) * np.uint32(0x735A2D97)
    return x if how == "no last shift" else x ^ x >> 15


@pytest.mark.parametrize("how", ["no Weyl start", "one multiplication", "no shift between", "no last shift"])
def test_a_broken_counter_is_noticed(how: str) -> None:
    words = [broken(how, np.arange(N), spelled.stream(*s), w) for *s, w in (STREAM, *NEIGHBOURS)]
    assert weighed(words[0], words[1:]) > 15


def test_steps_do_not_repeat_each_others_bits_further_on() -> None:
    """As those do whose keys differ by what a few elements add, if that is all of the key."""
    inverse = pow(0x9E3779B1, -1, 2**32)

    def start(step: int) -> int:
        return spelled.split_mix(spelled.stream(0, 3, step)) * inverse % 2**32

    near = (step for step in range(2, 2**20) if (start(step) - start(1)) % 2**32 < N // 2)
    step, index = next(near), np.arange(N)
    further = (start(step) - start(1)) % 2**32
    for how, repeats in (("one key", True), ("", False)):
        a, b = (broken(how, index, spelled.stream(0, 3, s), 0) for s in (1, step))
        assert np.array_equal(a[further:], b[: N - further]) == repeats
        if not repeats:
            assert np.array_equal(a, spelled.random_words(0, index, spelled.stream(0, 3, 1), 0))
            assert weighed(np.roll(a, -further), [b]) < 4.5
