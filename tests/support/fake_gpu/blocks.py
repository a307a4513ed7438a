"""A transformer block of the base model, compiled for the device that computes nothing."""

from typing import Any

import torch

from cavmae.benchmarks.fake_cuda.device import DEVICE
from cavmae.benchmarks.fake_cuda.trace import Trace, traced, without_values
from cavmae.trainer.model.blocks import Block, Recompute

BATCH = 512
FORMS: dict[str, dict[str, Any]] = {
    "modality": {"width": 768, "heads": 12, "tokens": 128},
    "joint": {
        "width": 768,
        "heads": 12,
        "tokens": 354,
        "segments": {"audio": 128, "video": 49, "joint": 177},
    },
    "last": {"width": 512, "heads": 16, "tokens": 708, "queries": 531},
}
"""Of an audio encoder, of the joint encoder with its three streams packed, and the decoder's last,
which computes the removed patches alone."""


def compiled_block(form: str, recompute: Recompute) -> Trace:
    """Pass a block forward and backward, compiled whole: a break of its graph is an error."""
    torch._dynamo.reset()
    sizes = FORMS[form]
    width, tokens, segments = sizes["width"], sizes["tokens"], sizes.get("segments")
    queries = sizes.get("queries")
    kept = queries or tokens
    with without_values():
        block = Block(width, sizes["heads"]).to(DEVICE, torch.bfloat16)
        block.set_recomputed(recompute)
        if not segments:
            for name, parameter in block.named_parameters():
                parameter.requires_grad_("_a." not in name and "_v." not in name)
        options = {"device": DEVICE, "dtype": torch.bfloat16}
        x = torch.empty(BATCH, tokens, width, requires_grad=True, **options)
        gradient = torch.empty(BATCH, kept, width, **options)
        ids = torch.zeros(BATCH, queries, device=DEVICE, dtype=torch.int64) if queries else None
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    with traced() as trace:
        with trace.phase("forward"):
            y = compiled(x, segments, ids)
        with trace.phase("backward"):
            y.backward(gradient)
    return trace
