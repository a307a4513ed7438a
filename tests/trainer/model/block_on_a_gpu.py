"""What a compiled block does on a GPU, counted in a process with a device that computes nothing."""

import torch

from cavmae.benchmarks.fake_cuda.trace import Trace, traced, without_values
from cavmae.trainer.model.blocks import Block, Recompute, Stream

BATCH, WIDTH, HEADS = 64, 768, 12
DEVICE = torch.device("cuda", 0)
SEGMENTS: dict[Stream, int] = {"audio": 128, "video": 49, "joint": 177}


def compiled_block(how: Recompute, segments: dict[Stream, int] | None, queries: int) -> Trace:
    """Trace one forward and one backward pass.

    Args:
        how: what is recomputed.
        segments: packed streams; None: one of 128 tokens.
        queries: tokens whose output is wanted; 0: all.
    """
    torch._dynamo.reset()
    tokens = sum(segments.values()) if segments else 128
    with without_values():
        block = Block(WIDTH, HEADS).to(DEVICE, torch.bfloat16)
    block.set_recomputed(how)
    block.compile(dynamic=False, fullgraph=True)
    with traced() as trace:
        x = torch.empty(BATCH, tokens, WIDTH, device=DEVICE, dtype=torch.bfloat16)
        ids = torch.zeros(BATCH, queries, device=DEVICE, dtype=torch.int64) if queries else None
        with trace.phase("forward"):
            y = block(x.requires_grad_(), segments, ids)
        upstream = torch.empty_like(y)
        with trace.phase("backward"):
            y.backward(upstream)
    return trace
