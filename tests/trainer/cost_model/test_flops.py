"""Operation counts: those of the published base model, and the formulas against torch's counter."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cavmae.trainer.config.recipes import audioset_base, efficient_base
from cavmae.trainer.cost_model.flops import backward_flops, forward_flops, training_flops
from cavmae.trainer.model.blocks import Modality
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import MaskConfig, ModelConfig
from cavmae.trainer.model.masking import masks_of, random_masks

SHALLOW = ModelConfig(modality_depth=2, decoder_depth=2)
"""The base model's widths and tokens; the other blocks are like these."""
NARROW = ModelConfig(
    audio_frames=256, mel_bins=64, image_size=64, width=96, heads=4, modality_depth=2,
    joint_depth=2, decoder_width=64, decoder_heads=4, decoder_depth=1,
)  # fmt: skip
CROSS = replace(NARROW, decoder="cross", decoder_depth=2, decoded_share=0.3)


def counted(config: ModelConfig, *, reconstruct: bool) -> tuple[int, int]:
    """Operations of a forward and a backward pass as torch counts them.

    Attention is written out (`SDPBackend.MATH`): fused kernels compute it again in the backward
    pass, which the formulas leave out, and torch can't count the CPU's fused one.
    """
    model = CAVMAE(config)
    model.freeze_unused(reconstruct=reconstruct, contrast=True)
    masks = random_masks(config, MaskConfig(), torch.arange(1), seed=0)
    log_mel = torch.randn(1, config.audio_frames, config.mel_bins)
    frame = torch.randn(1, 3, config.image_size, config.image_size)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = model(log_mel, frame, *masks, reconstruct=reconstruct)
            assert output.audio_embedding is not None and output.video_embedding is not None
            loss = output.audio_embedding.sum() + output.video_embedding.sum()
            if reconstruct:
                assert output.reconstruction_audio is not None
                assert output.reconstruction_video is not None
                loss = loss + output.reconstruction_audio + output.reconstruction_video
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("reconstruct", [True, False], ids=["both losses", "contrast alone"])
@pytest.mark.parametrize(
    "config", [SHALLOW, NARROW, CROSS], ids=["base width", "narrow", "cross-attention"]
)
def test_formulas_agree_with_torchs_counter(config: ModelConfig, reconstruct: bool) -> None:
    forward, backward = counted(config, reconstruct=reconstruct)
    formula = forward_flops(config, reconstruct=reconstruct)
    assert formula.total == pytest.approx(forward, rel=0.01)
    assert backward_flops(formula).total == pytest.approx(backward, rel=0.01)
    trained = training_flops(config, reconstruct=reconstruct)
    assert trained == pytest.approx(forward + backward, rel=0.01)


@pytest.mark.parametrize("config", [NARROW, CROSS], ids=["self", "cross"])
@pytest.mark.parametrize("modality", ["audio", "video"])
def test_formulas_agree_with_torchs_counter_on_one_modality(
    modality: Modality, config: ModelConfig
) -> None:
    model = CAVMAE(config)
    model.freeze_unused(reconstruct=True, contrast=False, modalities=(modality,))
    masks = masks_of((modality,), config, MaskConfig(), torch.arange(1), seed=0)
    log_mel = torch.randn(1, NARROW.audio_frames, NARROW.mel_bins) if modality == "audio" else None
    side = NARROW.image_size
    frame = torch.randn(1, 3, side, side) if modality == "video" else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both_passes:
        output = model(log_mel, frame, *masks, contrast=False)
        sum(output.reconstructions.values(), torch.zeros(())).backward()
    formula = training_flops(config, modalities=(modality,))
    assert formula == pytest.approx(both_passes.get_total_flops(), rel=0.01)


def test_base_model_needs_78_gflop_forward_and_234_to_train() -> None:
    assert forward_flops(ModelConfig()).total == pytest.approx(78e9, rel=0.02)
    assert training_flops(ModelConfig()) == pytest.approx(234e9, rel=0.02)


def test_cross_attention_for_a_third_of_the_removed_patches_needs_0_56_of_the_operations() -> None:
    published, efficient = audioset_base().model, efficient_base().model
    assert training_flops(efficient) / training_flops(published) == pytest.approx(0.563, abs=1e-3)


def test_pixels_need_no_gradient() -> None:
    forward = forward_flops(ModelConfig())
    assert 3 * forward.total - training_flops(ModelConfig()) == forward.embed


def test_fewer_removed_patches_cost_more() -> None:
    half = forward_flops(ModelConfig(), audio_ratio=0.5, video_ratio=0.5)
    assert half.total > 1.3 * forward_flops(ModelConfig()).total


def test_each_part_grows_with_its_own_depth() -> None:
    base = forward_flops(ModelConfig())
    deeper = {
        "encoders": forward_flops(replace(ModelConfig(), modality_depth=22)),
        "decoder": forward_flops(replace(ModelConfig(), decoder_depth=16)),
    }
    assert deeper["encoders"] == replace(base, encoders=2 * base.encoders)
    assert deeper["decoder"].decoder > 1.9 * base.decoder
    assert replace(deeper["decoder"], decoder=base.decoder) == base
