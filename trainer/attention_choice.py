"""Which of a GPU's attention kernels a run uses: timed once, when it starts, at its model's shapes.

The choice is written to the run's `config.json`, so that a run that resumes computes the same.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from cavmae.kernels import AttentionBackend, attention, kept_count
from cavmae.kernels.attention import FLASH_ATTN_IS_INSTALLED
from cavmae.trainer.config.configs import PretrainConfig, RunConfig
from cavmae.trainer.model.masking import decoded_count

log = logging.getLogger(__name__)

BATCH = 64
"""Samples; enough for every multiprocessor, and little memory."""
REPEATS = 5


class Shape(NamedTuple):
    """Attention of some blocks: how many, heads, their width, tokens of each segment, and queries
    where they are others than the tokens."""

    blocks: int
    heads: int
    head_width: int
    lengths: list[int]
    queries: int | None = None


Measure = Callable[[AttentionBackend, Shape, torch.dtype, torch.device], float]


def fixed_attention(
    config: RunConfig, device: torch.device, measure: Measure | None = None
) -> AttentionBackend:
    """Return the attention of a run on a GPU: the fastest forward and backward over all blocks.

    A `deterministic` run has torch's flash attention, whose backward pass has a deterministic form;
    in fp32, which that does not take, torch's own choice.

    Args:
        config: `engine.dtype` is bf16 or fp32.
        device: a GPU.
        measure: returns the seconds of one block; default: timed on the device.
    """
    half = config.engine.dtype == "bf16"
    if config.deterministic:
        return "sdpa-flash" if half else "sdpa"
    candidates: list[AttentionBackend] = ["sdpa-flash", "sdpa-cudnn", "sdpa-efficient"]
    if FLASH_ATTN_IS_INSTALLED:
        candidates.append("flash-attn")
    measure = measure or seconds_of_a_block
    dtype = torch.bfloat16 if half else torch.float32
    seconds: dict[AttentionBackend, float] = {}
    for backend in candidates:
        try:
            seconds[backend] = sum(
                shape.blocks * measure(backend, shape, dtype, device)
                for shape in attention_shapes(config)
            )
        except (RuntimeError, ValueError) as error:  # it does not take them on this GPU
            log.info("attention: %s is left out: %s", backend, str(error).partition("\n")[0])
    chosen: AttentionBackend = min(seconds, key=lambda name: seconds[name]) if seconds else "sdpa"
    listed = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    log.info("attention: %s, of %s for all blocks and %d samples", chosen, listed or "none", BATCH)
    return chosen


def attention_shapes(config: RunConfig) -> list[Shape]:
    """Return the shapes of a run's blocks."""
    model = config.model
    of = {"audio": model.audio_tokens, "video": model.video_tokens}
    tokens = [of[modality] for modality in config.data.modalities]
    kept = tokens
    if isinstance(config, PretrainConfig):
        ratio_of = {"audio": config.mask.audio_ratio, "video": config.mask.video_ratio}
        ratios = [ratio_of[modality] for modality in config.data.modalities]
        kept = [kept_count(count, ratio) for count, ratio in zip(tokens, ratios, strict=True)]
    width = model.width // model.heads
    both = [sum(kept)] if len(kept) > 1 else []
    shapes = [
        *(Shape(model.modality_depth, model.heads, width, [count]) for count in kept),
        Shape(model.joint_depth, model.heads, width, [*kept, *both]),
    ]
    if isinstance(config, PretrainConfig):
        decoder = model.decoder_width // model.decoder_heads
        blocks = (model.decoder_depth, model.decoder_heads, decoder)
        if model.decoder == "cross":
            removed = [count - left for count, left in zip(tokens, kept, strict=True)]
            decoded = sum(decoded_count(one, model.decoded_share) for one in removed)
            shapes.append(Shape(*blocks, [sum(kept)], decoded))
        else:
            shapes.append(Shape(*blocks, [sum(tokens)]))
    return shapes


def seconds_of_a_block(
    backend: AttentionBackend, shape: Shape, dtype: torch.dtype, device: torch.device
) -> float:
    """Time a forward and a backward pass on a GPU, after one that is not counted."""
    tokens = sum(shape.lengths)
    queries = shape.queries or tokens
    upstream, *inputs = (
        torch.randn(BATCH, shape.heads, count, shape.head_width, dtype=dtype, device=device)
        for count in (queries, queries, tokens, tokens)
    )
    for one in inputs:
        one.requires_grad_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeat in range(REPEATS + 1):
        if repeat == 1:
            begin.record()
        query, key, value = inputs
        out = attention(query, key, value, shape.lengths, backend=backend)
        torch.autograd.grad(out, inputs, upstream)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / REPEATS
