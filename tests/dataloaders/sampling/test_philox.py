"""The reader workers' random numbers: Philox4x32-10, laid out by seed, stream and position."""

import numpy as np
import pytest
import torch

from cavmae.dataloaders.sampling import philox
from cavmae.dataloaders.sampling.philox import STREAMS, random_permutation, random_words
from cavmae.kernels import philox as twin

ONES = 0xFFFFFFFF

# Random123, examples/kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_its_authors(name: str) -> None:
    counter, key, words = KNOWN_ANSWERS[name]
    assert philox.philox4x32(np.array(counter), np.array(key)).tolist() == list(words)


def test_no_stream_is_one_of_the_kernels() -> None:
    numbers = [*STREAMS.values(), *twin.STREAMS.values()]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("position", [0, 1, 2**32 - 1, 2**32, 2**40 + 12345])
def test_words_equal_those_of_the_kernels(
    stream: str, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(twin.STREAMS, stream, STREAMS[stream])
    ours = random_words(-7, stream, position, 11)
    theirs = twin.random_words(torch.tensor([position]), 11, seed=-7, stream=stream)[0]
    assert ours.tolist() == theirs.tolist()


def test_seed_stream_and_position_each_change_the_words() -> None:
    draws = {
        tuple(random_words(seed, stream, position, 4).tolist())
        for seed in (0, 1)
        for stream in ("frame", "order")
        for position in (0, 1, 2**32)
    }
    assert len(draws) == 12


def test_more_words_of_a_position_begin_with_the_fewer() -> None:
    assert random_words(3, "frame", 9, 50)[:7].tolist() == random_words(3, "frame", 9, 7).tolist()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 4096])
def test_a_permutation_holds_every_index_once(length: int) -> None:
    permutation = random_permutation(5, "order", 17, length)
    assert sorted(permutation.tolist()) == list(range(length))


def test_permutations_put_each_index_everywhere_equally_often() -> None:
    counts = np.zeros((6, 6))
    for position in range(3000):
        counts[np.arange(6), random_permutation(5, "order", position, 6)] += 1
    # 500 expected; the deviation of a count is 20.4, and 36 counts stay within 5 of those.
    assert np.abs(counts - 500).max() < 102
