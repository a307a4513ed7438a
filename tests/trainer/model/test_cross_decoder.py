"""The cross-attention decoder: who attends to whom, and which patches are decoded."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cavmae.kernels import masked_reconstruction_loss
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import MaskConfig, ModelConfig
from cavmae.trainer.model.cross_decoder import CrossBlock
from cavmae.trainer.model.masking import decoded_count, masks_of, random_masks

MODEL = ModelConfig(
    audio_frames=64,
    mel_bins=32,
    image_size=48,
    width=32,
    modality_depth=1,
    heads=2,
    decoder_width=16,
    decoder_depth=2,
    decoder_heads=2,
    decoder="cross",
)
HALF = MaskConfig(audio_ratio=0.5, video_ratio=0.5)
POSITIONS = torch.tensor([3, 4, 2**40])


def random_model(config: ModelConfig = MODEL) -> CAVMAE:
    torch.manual_seed(0)
    model = CAVMAE(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, 64, 32, generator=generator),
        torch.randn(3, 3, 48, 48, generator=generator),
    )


def test_a_block_is_cross_attention_and_mlp_each_with_norm_and_residual() -> None:
    torch.manual_seed(0)
    block = CrossBlock(16, 2).double()
    queries, tokens = torch.randn(3, 4, 16).double(), torch.randn(3, 7, 16).double()
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True).double()
    with torch.no_grad():
        own = block.cross_attn
        attention.in_proj_weight.copy_(torch.cat([own.q.weight, own.kv.weight]))
        attention.in_proj_bias.copy_(torch.cat([own.q.bias, own.kv.bias]))
        attention.out_proj.load_state_dict(own.proj.state_dict())
    x = queries + attention(block.norm1(queries), tokens, tokens)[0]
    x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    torch.testing.assert_close(block(queries, tokens), x)


@pytest.mark.field
def test_what_is_predicted_of_a_patch_does_not_depend_on_which_others_are_decoded() -> None:
    """A decoder that is called so and attends to itself all the same fails here."""
    model, audio_video = random_model(), inputs()
    whole = random_masks(MODEL, HALF, POSITIONS, seed=0)
    some = random_masks(replace(MODEL, decoded_share=0.3), HALF, POSITIONS, seed=0)
    predicted = model.predict_patches(*audio_video, *whole)
    output = model(*audio_video, *some, norm_pix=False)
    pixels = audio_video[0].transpose(1, 2)[:, None], audio_video[1]
    losses = output.reconstruction_audio, output.reconstruction_video
    for every, mask, of, loss in zip(predicted, some, pixels, losses, strict=True):
        chosen = every.gather(1, mask.removed[:, :, None].expand(-1, -1, every.shape[2]))
        expected = masked_reconstruction_loss(chosen, of, mask.removed, False)
        torch.testing.assert_close(loss, expected)


def test_queries_know_their_modality_and_their_place_and_attend_to_kept_patches_of_both() -> None:
    model = random_model(replace(MODEL, decoder_depth=1))
    masks = random_masks(MODEL, HALF, POSITIONS, seed=0)
    audio, video = model.predict_patches(*inputs(), *masks)
    assert not torch.allclose(audio[:, 0], audio[:, 1])
    silent = torch.zeros_like(inputs()[0])
    for before, after in zip(
        (audio, video), model.predict_patches(silent, inputs()[1], *masks), strict=True
    ):
        assert not torch.allclose(before, after)
    with torch.no_grad():
        model.decoder_modality_a.add_(1)
    changed = model.predict_patches(*inputs(), *masks)
    assert not torch.allclose(changed[0], audio) and torch.equal(changed[1], video)


def test_a_kept_patch_is_asked_for_like_a_removed_one() -> None:
    """Its own token reaches its prediction as those of other patches do, by attention alone."""
    model = random_model()
    with torch.no_grad():
        for block in model.decoder_blocks:
            torch.nn.init.zeros_(block.get_parameter("cross_attn.proj.weight"))
    masks = random_masks(MODEL, HALF, POSITIONS, seed=0)
    audio, _ = model.predict_patches(*inputs(), *masks)
    torch.testing.assert_close(audio, audio[:1].expand_as(audio))


# ---------------------------------------------------------------------------- which are decoded


@pytest.mark.parametrize(
    ("removed", "share", "count"),
    [
        (384, 1 / 3, 128),
        (147, 1 / 3, 49),
        (10, 0.04, 1),
        (10, 0.25, 2),
        (10, 0.35, 4),
        (1, 0.5, 1),
        (7, 1.0, 7),
        (0, 0.5, 0),
    ],
)
def test_a_share_is_a_whole_number_of_patches_and_one_at_least(
    removed: int, share: float, count: int
) -> None:
    assert decoded_count(removed, share) == count


@pytest.mark.parametrize("mode", ["unstructured", "time", "freq", "tf"])
def test_the_decoded_patches_are_a_share_of_the_removed_ones(mode) -> None:
    mask = replace(HALF, audio_mode=mode)
    whole = random_masks(MODEL, mask, POSITIONS, seed=0)
    some = random_masks(replace(MODEL, decoded_share=0.5), mask, POSITIONS, seed=0)
    for every, part in zip(whole, some, strict=True):
        assert torch.equal(part.keep, every.keep) and torch.equal(part.restore, every.restore)
        assert part.removed.shape[1] == decoded_count(every.removed.shape[1], 0.5)
        for chosen, removed in zip(part.removed.tolist(), every.removed.tolist(), strict=True):
            assert len(set(chosen)) == len(chosen) and set(chosen) <= set(removed)


def test_which_are_decoded_depends_on_seed_position_and_modality_alone() -> None:
    share = replace(MODEL, decoded_share=0.5)
    together = random_masks(share, HALF, POSITIONS, seed=0)
    for row, position in enumerate(POSITIONS):
        alone, nothing = masks_of(("audio",), share, HALF, position[None], seed=0)
        assert alone is not None and nothing is None
        assert torch.equal(alone.removed[0], together[0].removed[row])
    drawn = [*places(share, seed=0), *places(share, seed=1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def places(model: ModelConfig, *, seed: int) -> list[torch.Tensor]:
    """Where the decoded patches of each modality are among its removed ones, which change with the
    seed too."""
    whole = random_masks(replace(model, decoded_share=1.0), HALF, POSITIONS, seed=seed)
    some = random_masks(model, HALF, POSITIONS, seed=seed)
    return [
        every.restore.gather(1, part.removed) - every.keep.shape[1]
        for every, part in zip(whole, some, strict=True)
    ]


def test_every_removed_patch_is_decoded_equally_often() -> None:
    """In a structured mask too, whose own order has the patches outside of its columns first."""
    positions, share = torch.arange(4000), replace(MODEL, decoded_share=0.25)
    mask = MaskConfig(audio_ratio=0.75, video_ratio=0.5, audio_mode="time")
    audio, _ = random_masks(replace(share, decoded_share=1.0), mask, positions, seed=0)
    chosen, _ = random_masks(share, mask, positions, seed=0)
    removed = audio.removed.shape[1]
    place = audio.restore.gather(1, chosen.removed) - audio.keep.shape[1]
    counts = torch.bincount(place.flatten(), minlength=removed)
    expected = place.numel() / removed
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_a_share_is_for_the_cross_attention_decoder_and_above_0() -> None:
    with pytest.raises(ValueError, match=r"decoded_share is 0\.5 and model\.decoder self.*cross"):
        ModelConfig(decoded_share=0.5)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"model\.decoded_share is .*; use above 0, up to 1"):
            replace(MODEL, decoded_share=share)
