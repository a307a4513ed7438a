"""Random numbers that depend only on seed, stream and position in the sample plan.

Order of samples, choice of frames and substitutes are drawn here, in the reader workers, without
torch. `cavmae.kernels.philox` is the tensor version of this file: same generator, same layout of
key and counter, same numbers (a test compares them).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10).
"""

import numpy as np

STREAMS = {  # 1, 2, 15 and 16 are those of the masks, in `cavmae.kernels.philox`
    "frame": 3,
    "crop": 4,
    "noise": 5,
    "order": 6,
    "substitute": 7,
    "mixture": 8,
    "flip": 9,
    "spec_augment": 10,
    "shift": 11,
    "window": 12,
    "mix": 13,
    "mix_source": 14,
}

_ROUNDS = 10
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_2 = np.uint64(0xCD9E8D57)
_KEY_STEP_0 = np.uint64(0x9E3779B9)
_KEY_STEP_1 = np.uint64(0xBB67AE85)
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32 with 10 rounds.

    Args:
        counter: `(..., 4)` uint64, each word below 2**32.
        key: `(..., 2)` uint64, each word below 2**32; broadcast against `counter`.

    Returns:
        `(..., 4)` uint64, each word below 2**32.
    """
    counter = counter.astype(np.uint64)
    key = key.astype(np.uint64)
    c0, c1, c2, c3 = (counter[..., word] for word in range(4))
    k0, k1 = key[..., 0], key[..., 1]
    for _ in range(_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_2 = c2 * _MULTIPLIER_2
        c0 = (product_2 >> _HALF) ^ c1 ^ k0
        c1 = product_2 & _WORD
        c2 = (product_0 >> _HALF) ^ c3 ^ k1
        c3 = product_0 & _WORD
        k0 = (k0 + _KEY_STEP_0) & _WORD
        k1 = (k1 + _KEY_STEP_1) & _WORD
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1)


def random_words(seed: int, stream: str, position: int, count: int) -> np.ndarray:
    """Draw the first `count` words of one position of a stream.

    Args:
        seed: any int; its low 32 bits are the key.
        stream: a name in `STREAMS`.
        position: 0 to 2**64 - 1.
        count: number of words.

    Returns:
        `(count,)` uint64, each below 2**32.
    """
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    counter = np.zeros((len(blocks), 4), dtype=np.uint64)
    counter[:, 0] = position & 0xFFFFFFFF
    counter[:, 1] = position >> 32
    counter[:, 2] = blocks
    key = np.array([seed & 0xFFFFFFFF, STREAMS[stream]], dtype=np.uint64)
    return philox4x32(counter, key).reshape(-1)[:count]


def random_permutation(seed: int, stream: str, position: int, length: int) -> np.ndarray:
    """Draw a permutation of `0 .. length - 1` by sorting on a random word each.

    The sorted keys `(word << 32) | index` are unique, so every sorting algorithm on every machine
    gives the same answer.

    Returns:
        `(length,)` int64.
    """
    words = random_words(seed, stream, position, length)
    keys = np.sort((words << _HALF) | np.arange(length, dtype=np.uint64))
    return (keys & _WORD).astype(np.int64)
