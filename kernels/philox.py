"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011).

A draw depends on its key and counter alone, so a sample gets the same mask on any rank, in any
batch and after any resume. This is the readable reference in torch.
"""

import torch

# Named streams of one seed. A stream is a half of the key, so that no two streams ever overlap.
STREAMS = {
    "mask_audio": 1,
    "mask_video": 2,
    "frame": 3,
    "crop": 4,
    "noise": 5,
    "order": 6,
    "substitute": 7,
}

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Four random 32-bit words per counter.

    Args:
        counter: (..., 4) int64, each in [0, 2**32).
        key: (..., 2) int64, each in [0, 2**32); broadcasts against the counter.

    Returns:
        (..., 4) int64, each in [0, 2**32).
    """
    counter_0, counter_1, counter_2, counter_3 = counter.unbind(-1)
    key_0, key_1 = key.unbind(-1)
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps all bits of a 32 x 32 bit product.
        product_0, product_1 = counter_0 * _MULTIPLIER_0, counter_2 * _MULTIPLIER_1
        counter_0 = ((product_1 >> 32) & _WORD) ^ counter_1 ^ key_0
        counter_2 = ((product_0 >> 32) & _WORD) ^ counter_3 ^ key_1
        counter_1, counter_3 = product_1 & _WORD, product_0 & _WORD
        key_0, key_1 = (key_0 + _WEYL_0) & _WORD, (key_1 + _WEYL_1) & _WORD
    return torch.stack(torch.broadcast_tensors(counter_0, counter_1, counter_2, counter_3), -1)


def random_words(
    positions: torch.Tensor, count: int, *, seed: int, stream: str, part: int = 0
) -> torch.Tensor:
    """`count` random 32-bit words for each position of the sample plan.

    Args:
        positions: (batch,) int64 positions in the plan.
        count: words per position.
        seed: the run's seed.
        stream: a name in `STREAMS`.
        part: separates several draws of one stream for one position.

    Returns:
        (batch, count) int64, each in [0, 2**32).
    """
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=positions.device)
    low, high = positions & _WORD, (positions >> 32) & _WORD
    counter = torch.stack(
        torch.broadcast_tensors(
            low[:, None], high[:, None], blocks[None], torch.full_like(blocks, part)[None]
        ),
        -1,
    )  # (batch, blocks, 4)
    key = torch.tensor([seed & _WORD, STREAMS[stream]], dtype=torch.int64, device=positions.device)
    return philox4x32(counter, key).flatten(1)[:, :count]
