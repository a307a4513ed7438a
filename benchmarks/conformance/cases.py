"""Weights, inputs and sizes of the golden cases, rebuilt from their recipe.

A golden folder holds outputs, gradients and training histories of the published code, but no
weights: those are noise from one generator per name (golden README, section 1).
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from cavmae.kernels import MaskIds
from cavmae.trainer.model.config import ModelConfig

Positions = Literal["sincos", "recipe"]


def noise(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """Standard normal float64 values; each name has a generator of its own."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + seed))
    return generator.standard_normal(tuple(shape))


def recipe(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """One parameter as float32: deviation 0.02 around 0, or around 1 for a norm's weight."""
    values = noise(name, shape, seed)
    values *= 0.02
    if len(shape) == 1 and name.endswith(".weight"):
        values += 1.0
    return values.astype(np.float32)


def fill_from_recipe(model: nn.Module, seed: int, positions: Positions = "sincos") -> None:
    """Give every tensor of a model's state dict its recipe value, in place.

    Args:
        model: parameters named as the published ones.
        seed: the case's seed.
        positions: `sincos` leaves the position tables as they are.
    """
    for name, tensor in model.state_dict().items():
        if positions == "sincos" and "pos_embed" in name:
            continue
        tensor.copy_(torch.from_numpy(recipe(name, tensor.shape, seed)))


def recipe_inputs(
    batch: int, config: ModelConfig, seed: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, audio_frames, mel_bins) log-mel and (batch, 3, side, side) image, float32."""
    audio = noise("input.audio", (batch, config.audio_frames, config.mel_bins), seed) * 0.5 * scale
    image = noise("input.image", (batch, 3, config.image_size, config.image_size), seed) * scale
    return torch.from_numpy(audio.astype(np.float32)), torch.from_numpy(image.astype(np.float32))


def mask_on(mask: MaskIds, device: torch.device | str) -> MaskIds:
    """The same mask ids on a device."""
    return MaskIds(mask.keep.to(device), mask.removed.to(device), mask.restore.to(device))


def config_from_arguments(arguments: Mapping[str, Any]) -> ModelConfig:
    """Sizes from the arguments of the published constructor, which are its defaults if absent."""
    modality_depth = arguments.get("modality_specific_depth", 11)
    return ModelConfig(
        audio_frames=arguments.get("audio_length", 1024),
        image_size=arguments.get("img_size", 224),
        width=arguments.get("embed_dim", 768),
        modality_depth=modality_depth,
        joint_depth=12 - modality_depth,
        heads=arguments.get("num_heads", 12),
        decoder_width=arguments.get("decoder_embed_dim", 512),
        decoder_depth=arguments.get("decoder_depth", 8),
        decoder_heads=arguments.get("decoder_num_heads", 16),
        learnable_positions=bool(arguments.get("tr_pos", False)),
    )


def config_from_shapes(
    shapes: Mapping[str, Sequence[int]], heads: int = 12, decoder_heads: int = 16
) -> ModelConfig:
    """Sizes from the shapes of a state dict; the head counts leave no trace in it."""
    audio_tokens, width = shapes["pos_embed_a"][1:]

    def depth(blocks: str) -> int:
        return len({name.split(".")[1] for name in shapes if name.startswith(f"{blocks}.")})

    return ModelConfig(
        audio_frames=audio_tokens // 8 * 16,
        image_size=round(shapes["pos_embed_v"][1] ** 0.5) * 16,
        width=width,
        modality_depth=depth("blocks_a"),
        joint_depth=depth("blocks_u"),
        heads=heads,
        decoder_width=shapes["mask_token"][-1],
        decoder_depth=depth("decoder_blocks"),
        decoder_heads=decoder_heads,
    )


def read_json(path: Path) -> Any:
    """The parsed file."""
    return json.loads(path.read_text())
