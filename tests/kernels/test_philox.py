"""Philox4x32-10 against the known answers of Random123, and how draws are laid out."""

import pytest
import torch

from cavmae.kernels import STREAMS, philox4x32, random_words

# Random123 1.14.0, tests/kat_vectors, lines `philox4x32 10`.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()], dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    assert torch.equal(philox4x32(words(counter), words(key)), words(answer))


def test_a_position_draws_the_same_words_in_any_batch() -> None:
    batch = random_words(torch.arange(50), 13, seed=7, stream="mask_audio")
    alone = random_words(torch.tensor([31]), 13, seed=7, stream="mask_audio")
    assert torch.equal(batch[31:32], alone)


def test_fewer_words_are_a_prefix_of_more() -> None:
    positions = torch.arange(5)
    few = random_words(positions, 6, seed=1, stream="mask_video")
    assert torch.equal(few, random_words(positions, 21, seed=1, stream="mask_video")[:, :6])


def test_seeds_streams_parts_and_high_positions_all_change_the_draw() -> None:
    position = torch.tensor([3])
    draws = [random_words(position, 4, seed=0, stream=stream) for stream in STREAMS]
    draws.append(random_words(position, 4, seed=1, stream="mask_audio"))
    draws.append(random_words(position, 4, seed=0, stream="mask_audio", part=1))
    draws.append(random_words(position + 2**32, 4, seed=0, stream="mask_audio"))
    assert len({tuple(draw[0].tolist()) for draw in draws}) == len(draws)


def test_words_fill_32_bits_evenly() -> None:
    drawn = random_words(torch.arange(1000), 64, seed=0, stream="mask_video")
    assert drawn.min() >= 0 and drawn.max() < 2**32
    bits = (drawn[..., None] >> torch.arange(32)) & 1
    assert (bits.double().mean((0, 1)) - 0.5).abs().max() < 0.01
