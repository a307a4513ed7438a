"""Loading somebody else's weights: both kinds of checkpoint, and what does not fit."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.weights import adapt_mae, load_initial_weights, load_published

SIZES = ModelConfig(
    audio_frames=32,
    mel_bins=32,
    image_size=32,
    width=16,
    modality_depth=2,
    joint_depth=1,
    heads=2,
    decoder_width=8,
    decoder_depth=1,
    decoder_heads=2,
)


def random_model(seed: int, sizes: ModelConfig = SIZES) -> CAVMAE:
    torch.manual_seed(seed)
    model = CAVMAE(sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def mae_state(sizes: ModelConfig = SIZES) -> dict[str, torch.Tensor]:
    """A random MAE checkpoint with its decoder, named as the published ones are."""
    generator = torch.Generator().manual_seed(7)
    width, decoder_width = sizes.width, sizes.decoder_width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, sizes.video_tokens + 1, width),
        "mask_token": (1, 1, decoder_width),
        "decoder_pos_embed": (1, sizes.video_tokens + 1, decoder_width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "decoder_embed.weight": (decoder_width, width),
        "decoder_embed.bias": (decoder_width,),
        "decoder_pred.weight": (768, decoder_width),
        "decoder_pred.bias": (768,),
    }
    norms = {"norm": width, "decoder_norm": decoder_width}
    blocks = [("blocks", width, sizes.modality_depth + sizes.joint_depth)]
    blocks += [("decoder_blocks", decoder_width, sizes.decoder_depth)]
    for name, channels, depth in blocks:
        for i in range(depth):
            block = f"{name}.{i}"
            norms |= {f"{block}.norm1": channels, f"{block}.norm2": channels}
            linears = {
                "attn.qkv": (3, 1),
                "attn.proj": (1, 1),
                "mlp.fc1": (4, 1),
                "mlp.fc2": (1, 4),
            }
            for linear, (outputs, inputs) in linears.items():
                shapes[f"{block}.{linear}.weight"] = (outputs * channels, inputs * channels)
                shapes[f"{block}.{linear}.bias"] = (outputs * channels,)
    for norm, channels in norms.items():
        shapes |= {f"{norm}.weight": (channels,), f"{norm}.bias": (channels,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_equal_states(model: CAVMAE, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert not [name for name in state if not torch.equal(state[name], expected[name])]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights_load_with_and_without_prefix(tmp_path: Path, prefix: str) -> None:
    published = random_model(1).state_dict()
    torch.save({prefix + name: tensor for name, tensor in published.items()}, tmp_path / "w.pth")
    model = random_model(2)
    load_initial_weights(model, tmp_path / "w.pth")
    assert_equal_states(model, published)


def test_published_weights_load_from_a_state_dict() -> None:
    published = random_model(1).state_dict()
    model = random_model(2)
    load_published(model, {f"module.{name}": tensor for name, tensor in published.items()})
    assert_equal_states(model, published)


def test_mae_weights_go_to_both_modalities_and_the_last_ones_to_the_joint_encoder() -> None:
    source, model = mae_state(), random_model(3)
    state = adapt_mae(source, model)
    assert torch.equal(state["blocks_a.1.mlp.fc1.weight"], source["blocks.1.mlp.fc1.weight"])
    assert torch.equal(state["blocks_v.0.norm2.bias"], source["blocks.0.norm2.bias"])
    for norm in ("norm1", "norm1_a", "norm1_v"):
        assert torch.equal(state[f"blocks_u.0.{norm}.weight"], source["blocks.2.norm1.weight"])
    for norm in ("norm", "norm_a", "norm_v"):
        assert torch.equal(state[f"{norm}.bias"], source["norm.bias"])
    audio_kernel = source["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert torch.equal(state["patch_embed_a.proj.weight"], audio_kernel)
    assert torch.equal(state["pos_embed_v"], source["pos_embed"][:, 1:])
    assert torch.equal(state["decoder_pred_a.weight"], source["decoder_pred.weight"][:256])
    assert torch.equal(state["decoder_pred_v.weight"], source["decoder_pred.weight"])


def test_what_mae_has_no_counterpart_for_keeps_its_value() -> None:
    model = random_model(3)
    state, before = adapt_mae(mae_state(), model), model.state_dict()
    kept = ["modality_a", "decoder_modality_v", "pos_embed_a", "decoder_pos_embed_a"]
    kept += ["blocks_a.0.norm1_a.weight", "blocks_v.1.norm2_v.bias"]
    kept += ["decoder_blocks.0.norm1_v.weight"]
    assert not [name for name in kept if not torch.equal(state[name], before[name])]


@pytest.mark.parametrize("nested", [True, False])
def test_mae_file_is_recognised_by_its_keys(tmp_path: Path, nested: bool) -> None:
    source, model = mae_state(), random_model(3)
    expected = adapt_mae(source, model)
    torch.save({"model": source} if nested else source, tmp_path / "mae.pth")
    load_initial_weights(model, tmp_path / "mae.pth")
    assert_equal_states(model, expected)


def test_missing_and_unexpected_tensors_are_named() -> None:
    state = random_model(1).state_dict()
    del state["norm_a.weight"]
    state["mlp_head.1.weight"] = torch.zeros(5, 16)
    with pytest.raises(ValueError) as error:
        load_published(random_model(2), state)
    assert "missing: norm_a.weight" in str(error.value)
    assert "unexpected: mlp_head.1.weight (5, 16)" in str(error.value)


def test_wrong_shape_is_named_with_both_shapes_and_the_field_to_change() -> None:
    longer = random_model(1, replace(SIZES, audio_frames=64)).state_dict()
    model = random_model(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_published(model, longer)
    assert "pos_embed_a has shape (1, 8, 16) and the model's pos_embed_a (1, 4, 16)" in str(
        error.value
    )
    assert "model.audio_frames" in str(error.value)
    assert_equal_states(model, before)


def test_mae_checkpoint_without_decoder_is_refused() -> None:
    encoder = {n: t for n, t in mae_state().items() if "decoder" not in n and n != "mask_token"}
    with pytest.raises(
        ValueError, match=r"missing: .*mask_token.*take a checkpoint with its decode"
    ):
        adapt_mae(encoder, random_model(3))


def test_mae_checkpoint_with_more_blocks_than_the_model_is_refused() -> None:
    deeper = mae_state(replace(SIZES, modality_depth=3))
    with pytest.raises(ValueError, match=r"unexpected: blocks\.3\."):
        adapt_mae(deeper, random_model(3))


def test_mae_checkpoint_of_another_image_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pos_embed has shape \(1, 9, 16\).*model\.image_size"):
        adapt_mae(mae_state(replace(SIZES, image_size=48)), random_model(3))


def test_unknown_checkpoint_is_refused_with_its_keys(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"neither CAV-MAE.*encoder\.weight"):
        load_initial_weights(random_model(3), tmp_path / "other.pth")


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_checkpoint_that_would_run_code_is_refused_unrun(tmp_path: Path) -> None:
    marker = tmp_path / "code_ran"
    state = {**random_model(1).state_dict(), "extra": RunsCode(marker)}
    torch.save(state, tmp_path / "malicious.pth")
    with pytest.raises(ValueError, match="could run code"):
        load_initial_weights(random_model(2), tmp_path / "malicious.pth")
    assert not marker.exists()


def test_checkpoint_with_values_beside_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "w": torch.zeros(2)}, tmp_path / "mixed.pth")
    with pytest.raises(ValueError, match="no tensors, such as epoch"):
        load_initial_weights(random_model(2), tmp_path / "mixed.pth")


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save(random_model(1).state_dict(), tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"w\.pth cannot be read.*download it again"):
        load_initial_weights(random_model(2), tmp_path / "w.pth")
