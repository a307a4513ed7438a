"""The cases of `cavmae bench kernels`: each operation as we compute it and as others do.

Contenders of a case compute the same thing from the same values; a test compares their results,
and a run notes how far they are apart. `eager` is the published model's operations in plain torch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from cavmae.benchmarks.baselines.tiled_contrastive import tiled_contrastive_loss
from cavmae.kernels import (
    AttentionBackend,
    attention,
    contrastive_loss,
    gather_patches,
    gather_tokens,
    masked_reconstruction_loss,
    random_mask,
    restore_tokens,
)
from cavmae.kernels.attention import FLASH_ATTN_IS_INSTALLED

TEMPERATURE = 0.05
# Token counts of the published base model.
AUDIO, VIDEO, KEPT_AUDIO, KEPT_VIDEO = 512, 196, 128, 49
WIDTH, DECODER_WIDTH = 768, 512
ATTENTION = {
    "decoder": (16, 32, 708),
    "audio": (12, 64, 128),
    "video": (12, 64, 49),
    "joint": (12, 64, 177),
}
"""Heads, head width and tokens."""


@dataclass
class Contender:
    """One way to compute an operation.

    Attributes:
        run: the forward pass.
        leaves: tensors whose gradients the backward pass makes; empty: forward only.
        as_ours: of the gradients, the values that those of `ours` are.
    """

    run: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor] = field(default_factory=list)
    as_ours: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient


@dataclass
class Case:
    """One operation at one size.

    Attributes:
        name: such as `restore_tokens`.
        contenders: `ours`, `eager` and others.
        forward_bytes, both_bytes: what must move through memory, forward and with backward, by the
            formula in the operation's docstring; 0 where products are the limit.
        forward_flops, both_flops: of the matrix products; 0 where memory is the limit.
        matrix_bytes: of the dense float32 similarity matrix; 0 where there is none.
        drawn: outputs are random, so that contenders differ.
    """

    name: str
    contenders: dict[str, Contender]
    forward_bytes: int = 0
    both_bytes: int = 0
    forward_flops: int = 0
    both_flops: int = 0
    matrix_bytes: int = 0
    drawn: bool = False


def cases(
    device: torch.device, batch: int, dtype: torch.dtype, contrastive: Sequence[int]
) -> Iterator[Case]:
    """All cases, built one at a time.

    Args:
        device: where the tensors are.
        batch: samples of the masked operations.
        dtype: of tokens, predictions and embeddings; pixels are float32, as the loader gives them.
        contrastive: batch sizes of the contrastive loss.
    """
    torch.manual_seed(0)
    options = {"device": device, "dtype": dtype}
    yield from attention_cases(batch, device, dtype)
    yield _gather(batch, options)
    yield _restore(batch, options)
    for sound in (True, False):
        yield _reconstruction(batch, options, sound)
        yield _patches(batch, options, sound)
    for sound in (True, False):
        yield _mask(batch, device, sound)
    for size in contrastive:
        yield _contrastive(size, options)


def attention_cases(batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield attention at the shapes of the published base model, by each backend at hand.

    Args:
        batch: samples.
        device, dtype: of the tensors.
    """
    options = {"device": device, "dtype": dtype}
    for name, (heads, head_width, tokens) in ATTENTION.items():
        yield _attention(f"attention_{name}", (batch, heads, tokens, head_width), options)


def _attention(name: str, shape: tuple[int, int, int, int], options: dict) -> Case:
    batch, heads, tokens, head_width = shape
    query, key, value = leaves = [
        _leaf(batch, tokens, heads, head_width, options=options) for _ in range(3)
    ]

    def contender(backend: AttentionBackend | None) -> Contender:
        def run() -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return attention(q, k, v, backend=backend)

        return Contender(run, leaves)

    others: list[AttentionBackend] = []
    if query.device.type == "cuda":
        others = ["sdpa-flash", "sdpa-cudnn", "sdpa-efficient"]
        if FLASH_ATTN_IS_INSTALLED:
            others.append("flash-attn")
    products = 4 * batch * heads * tokens * tokens * head_width
    return Case(
        name,
        {
            "ours": contender(None),
            "eager": contender("sdpa"),
            **{name: contender(name) for name in others},
        },
        forward_flops=products,
        both_flops=7 * products // 2,  # the backward pass computes the scores again
    )


def _shuffle(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    return torch.rand(batch, tokens, device=device).argsort(1)


def _leaf(*shape: int, options: dict) -> torch.Tensor:
    return torch.randn(shape, **options).requires_grad_()


def _gather(batch: int, options: dict) -> Case:
    tokens, taken = AUDIO + VIDEO, AUDIO + VIDEO - KEPT_AUDIO - KEPT_VIDEO
    x = _leaf(batch, tokens, DECODER_WIDTH, options=options)
    ids = _shuffle(batch, tokens, x.device)[:, :taken].contiguous()
    row = batch * DECODER_WIDTH * x.element_size()
    return Case(
        "gather_tokens",
        {
            "ours": Contender(lambda: gather_tokens(x, ids), [x]),
            "eager": Contender(
                lambda: x.gather(1, ids[:, :, None].expand(-1, -1, DECODER_WIDTH)), [x]
            ),
        },
        forward_bytes=2 * taken * row,
        both_bytes=(3 * taken + tokens) * row,
    )


def _restore(batch: int, options: dict) -> Case:
    kept, tokens = KEPT_AUDIO + KEPT_VIDEO, AUDIO + VIDEO
    x = _leaf(batch, kept, DECODER_WIDTH, options=options)
    mask_token = _leaf(1, 1, DECODER_WIDTH, options=options)
    position = torch.randn(1, tokens, DECODER_WIDTH, **options)
    modalities = [_leaf(1, 1, DECODER_WIDTH, options=options) for _ in range(2)]
    audio, video = (_shuffle(batch, count, x.device) for count in (AUDIO, VIDEO))
    places = torch.cat(
        [
            torch.where(audio < KEPT_AUDIO, audio, kept),
            torch.where(video < KEPT_VIDEO, video + KEPT_AUDIO, kept),
        ],
        1,
    )

    def ours() -> torch.Tensor:
        spread = [m.expand(-1, n, -1) for m, n in zip(modalities, (AUDIO, VIDEO), strict=True)]
        return restore_tokens(x, places, mask_token, position, torch.cat(spread, 1))

    def eager() -> torch.Tensor:
        """Each modality by itself, as the published decoder does."""
        parts = []
        for tokens_of, restore in ((x[:, :KEPT_AUDIO], audio), (x[:, KEPT_AUDIO:], video)):
            removed = mask_token.repeat(batch, restore.shape[1] - tokens_of.shape[1], 1)
            full = torch.cat([tokens_of, removed], 1)
            parts.append(full.gather(1, restore[:, :, None].expand(-1, -1, DECODER_WIDTH)))
        whole = torch.cat(parts, 1) + position
        return torch.cat([whole[:, :AUDIO] + modalities[0], whole[:, AUDIO:] + modalities[1]], 1)

    leaves = [x, mask_token, *modalities]
    moved = batch * (kept + tokens) * DECODER_WIDTH * x.element_size()
    return Case(
        "restore_tokens",
        {"ours": Contender(ours, leaves), "eager": Contender(eager, leaves)},
        forward_bytes=moved,
        both_bytes=2 * moved,
    )


def _pixels(batch: int, device: torch.device, sound: bool) -> tuple[torch.Tensor, int, int]:
    """Pixels, and how many tokens they have and keep."""
    if sound:  # as the loader lays it out: time before frequency
        pixels = torch.randn(batch, 1024, 128, device=device).transpose(1, 2)[:, None]
        return pixels, AUDIO, KEPT_AUDIO
    return torch.randn(batch, 3, 224, 224, device=device), VIDEO, KEPT_VIDEO


def _reconstruction(batch: int, options: dict, sound: bool) -> Case:
    pixels, tokens, kept = _pixels(batch, options["device"], sound)
    values = 256 * pixels.shape[1]
    ids = _shuffle(batch, tokens, pixels.device)[:, kept:].contiguous()
    whole = _leaf(batch, tokens, values, options=options)
    mask = torch.zeros(batch, tokens, device=pixels.device).scatter_(1, ids, 1.0)

    def of_removed(x: torch.Tensor) -> torch.Tensor:
        return x.gather(1, ids[:, :, None].expand(-1, -1, values))

    predicted = of_removed(whole.detach()).requires_grad_()

    def eager() -> torch.Tensor:
        """Every patch predicted and compared, then those that were seen masked out."""
        channels, height, width = pixels.shape[1:]
        target = pixels.reshape(batch, channels, height // 16, 16, width // 16, 16)
        target = target.permute(0, 2, 4, 3, 5, 1).reshape(batch, tokens, values)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        per_patch = (whole.float() - target).square().mean(2)
        return (per_patch * mask).sum() / mask.sum()

    reads = predicted.numel() * (predicted.element_size() + pixels.element_size())
    return Case(
        f"reconstruction_{'audio' if sound else 'video'}",
        {
            "ours": Contender(
                lambda: masked_reconstruction_loss(predicted, pixels, ids, True), [predicted]
            ),
            "eager": Contender(eager, [whole], of_removed),
        },
        forward_bytes=reads,
        both_bytes=2 * reads + predicted.nbytes,
    )


def _patches(batch: int, options: dict, sound: bool) -> Case:
    pixels, tokens, kept = _pixels(batch, options["device"], sound)
    channels = pixels.shape[1]
    values = 256 * channels
    ids = _shuffle(batch, tokens, pixels.device)[:, :kept].contiguous()
    weight = (torch.randn(WIDTH, channels, 16, 16, **options) * 0.02).requires_grad_()
    bias = _leaf(WIDTH, options=options)

    def ours() -> torch.Tensor:
        patches = gather_patches(pixels, ids, 16, dtype=weight.dtype)
        return F.linear(patches, weight.flatten(1), bias)

    def eager() -> torch.Tensor:
        """Everything embedded, then what stays, as the published encoder does."""
        whole = F.conv2d(pixels.to(weight.dtype), weight, bias, stride=16)
        whole = whole.flatten(2).transpose(1, 2)
        return whole.gather(1, ids[:, :, None].expand(-1, -1, WIDTH))

    size = weight.element_size()
    # Pixels to patches, patches to tokens; backward reads patches and gradient of the tokens.
    forward = batch * kept * (values * (pixels.element_size() + 2 * size) + WIDTH * size)
    product = 2 * batch * kept * values * WIDTH
    leaves = [weight, bias]
    return Case(
        f"patch_embedding_{'audio' if sound else 'video'}",
        {"ours": Contender(ours, leaves), "eager": Contender(eager, leaves)},
        forward_bytes=forward,
        both_bytes=forward + batch * kept * (values + WIDTH) * size,
        forward_flops=product,
        both_flops=2 * product,
    )


def _mask(batch: int, device: torch.device, sound: bool) -> Case:
    grid = (8, 64) if sound else (14, 14)
    stream = "mask_audio" if sound else "mask_video"
    positions = torch.arange(batch, device=device)

    tokens, kept = grid[0] * grid[1], grid[0] * grid[1] // 4

    def eager() -> torch.Tensor:
        """With the mask, which the published loss multiplies with and ours has no use for."""
        restore = _shuffle(batch, tokens, device).argsort(1)
        mask = torch.ones(batch, tokens, device=device)
        mask[:, :kept] = 0
        mask = mask.gather(1, restore)
        return restore

    return Case(
        f"random_{stream}",
        {
            "ours": Contender(
                lambda: random_mask(positions, seed=0, stream=stream, grid=grid, ratio=0.75).restore
            ),
            "eager": Contender(eager),
        },
        drawn=True,
    )


def _contrastive(size: int, options: dict) -> Case:
    audio, video = (_leaf(size, WIDTH, options=options) for _ in range(2))

    truth = torch.arange(size, device=audio.device)

    def eager() -> torch.Tensor:
        """With the accuracy, which the published code counts in every step as well."""
        a, v = F.normalize(audio, dim=1), F.normalize(video, dim=1)
        similarity = (a @ v.T).float() / TEMPERATURE
        losses = [-similarity.log_softmax(dim).diagonal().mean() for dim in (0, 1)]
        hits = [(similarity.softmax(d).argmax(d) == truth).float().mean() for d in (0, 1)]
        # Times 0, so that the value is the loss's and torch.compile can't leave the rest out.
        return (losses[0] + losses[1]) / 2 + 0.0 * (hits[0] + hits[1])

    leaves, product = [audio, video], 2 * size * size * WIDTH
    return Case(
        f"contrastive_{size}",
        {
            "ours": Contender(
                lambda: contrastive_loss(audio, video, TEMPERATURE, True).loss, leaves
            ),
            "eager": Contender(eager, leaves),
            # TF32 is what the published code computes with; IEEE products would take far longer.
            "tiled": Contender(
                lambda: tiled_contrastive_loss(audio, video, TEMPERATURE, precision="tf32"), leaves
            ),
        },
        forward_flops=product,
        both_flops=5 * product,
        matrix_bytes=4 * size * size,
    )
