"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011).

A draw depends on its key and counter alone, so a sample gets the same mask on any rank, in any
batch and after any resume. This is the readable reference in torch.
"""

import torch

# Named streams of one seed. A stream is a half of the key, so that no two streams ever overlap.
# Numbers 3 to 14 are those of the data loaders, in `cavmae.dataloaders.sampling.philox`.
STREAMS = {"mask_audio": 1, "mask_video": 2, "decoded_audio": 15, "decoded_video": 16}

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Four random 32-bit words per counter.

    Args:
        counter: (..., 4) int64, each in [0, 2**32).
        key: (..., 2) int64, each in [0, 2**32); broadcasts against the counter.

    Returns:
        (..., 4) int64, each in [0, 2**32).
    """
    # Words 0 and 2 are multiplied, words 1 and 3 are not: both pairs lie along a first dimension.
    dimensions = max(counter.ndim, key.ndim)
    counter, key = (
        x.reshape((1,) * (dimensions - x.ndim) + x.shape).movedim(-1, 0) for x in (counter, key)
    )

    def pair(first: int, second: int) -> torch.Tensor:
        return counter.new_tensor([first, second]).reshape(2, *(1,) * (dimensions - 1))

    multipliers, weyl = pair(*_MULTIPLIERS), pair(*_WEYL)
    word, half = counter.new_tensor(_WORD), counter.new_tensor(32)
    even, odd = counter[0::2].contiguous(), counter[1::2]
    for step in range(10):
        # int64 products wrap modulo 2**64, which keeps all bits of a 32 x 32 bit product.
        product = (even * multipliers).flip(0)
        even = ((product >> half) ^ odd ^ (key + weyl * step)) & word
        odd = product
    odd = odd & word
    return torch.stack(torch.broadcast_tensors(even[0], odd[0], even[1], odd[1]), -1)


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
