"""Loading somebody else's weights: both kinds of checkpoint, and what does not fit."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from unsafe_pickle import save_malicious

from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.pos_embed import position_table
from cavmae.trainer.model.weights import (
    adapt_mae,
    load_classifier_weights,
    load_initial_weights,
    load_published,
    read_state,
    sizes_of,
)

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


def assert_equal_states(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
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
    assert "Set model.audio_frames to 64 (with 32 mel bins)" in str(error.value)
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


def test_mae_checkpoint_of_another_image_size_gets_the_positions_of_the_models() -> None:
    source = mae_state(replace(SIZES, image_size=48))
    class_token = torch.zeros(1, 1, 16)
    source["pos_embed"] = torch.cat([class_token, position_table(16, (3, 3))], dim=1)
    state = adapt_mae(source, random_model(3))
    assert torch.equal(state["pos_embed_v"], position_table(16, (2, 2)))
    assert state["decoder_pos_embed_v"].shape == (1, 4, 8)


CROSS = replace(SIZES, decoder="cross", decoded_share=0.5)


def saved(path: Path, state: Mapping[str, object]) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("theirs", "ours"), [(SIZES, CROSS), (CROSS, SIZES)], ids=["self to cross", "cross to self"]
)
def test_a_decoder_of_the_other_kind_is_refused_by_its_name_or_begun_anew(
    tmp_path: Path, theirs: ModelConfig, ours: ModelConfig
) -> None:
    state = random_model(1, theirs).state_dict()
    path = saved(tmp_path / "w.pth", {f"module.{name}": one for name, one in state.items()})
    model = random_model(2, ours)
    own = {name: one.clone() for name, one in model.state_dict().items()}
    message = (
        rf"w\.pth has a decoder of {theirs.decoder}-attention and the model one of "
        rf"{ours.decoder}-attention .*set model\.decoder to {theirs.decoder}, or .* new_decoder"
    )
    for load in (load_initial_weights, load_published):
        with pytest.raises(ValueError, match=message):
            load(model, path)
    assert_equal_states(model, own)
    load_initial_weights(model, path, new_decoder=True)
    decoder = {n: t for n, t in own.items() if n.startswith("decoder_") or n == "mask_token"}
    encoders = {n: t for n, t in state.items() if n in own and n not in decoder}
    assert len(decoder) > 20 and len(encoders) > 90
    assert_equal_states(model, encoders | decoder)


@pytest.mark.field
@pytest.mark.parametrize("has_decoder", [True, False])
@pytest.mark.parametrize("sizes", [SIZES, CROSS, replace(SIZES, decoder_width=16, decoder_depth=3)])
def test_an_mae_starts_the_encoders_of_a_model_that_begins_its_decoder_anew(
    tmp_path: Path, sizes: ModelConfig, has_decoder: bool
) -> None:
    """The published MAE files for fine-tuning have no decoder."""
    source = mae_state()
    if not has_decoder:
        source = {n: t for n, t in source.items() if "decoder" not in n and n != "mask_token"}
    path, model = saved(tmp_path / "mae.pth", {"model": source}), random_model(3, sizes)
    own = {name: one.clone() for name, one in model.state_dict().items()}
    load_initial_weights(model, path, new_decoder=True)
    state = model.state_dict()
    changed = {n for n in own if not torch.equal(state[n], own[n])}
    assert not any(n.startswith("decoder_") or n == "mask_token" for n in changed)
    assert torch.equal(state["blocks_v.1.mlp.fc1.weight"], source["blocks.1.mlp.fc1.weight"])
    assert torch.equal(state["norm.bias"], source["norm.bias"])


def test_an_mae_decoder_does_not_become_a_cross_attention_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "mae.pth", {"model": mae_state()})
    with pytest.raises(ValueError, match=r"mae\.pth has a decoder of self-attention .*new_decoder"):
        load_initial_weights(random_model(3, CROSS), path)


def test_sizes_tell_the_kind_of_decoder() -> None:
    for sizes in (SIZES, CROSS):
        state = CAVMAE(replace(sizes, mel_bins=128, decoder_width=16)).state_dict()
        assert sizes_of(state, "w").decoder == sizes.decoder


def test_unknown_checkpoint_is_refused_with_its_keys(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"neither CAV-MAE.*encoder\.weight"):
        load_initial_weights(random_model(3), tmp_path / "other.pth")


def test_checkpoint_that_would_run_code_is_refused_unrun(tmp_path: Path) -> None:
    state = random_model(1).state_dict()
    marker = save_malicious(tmp_path / "malicious.pth", tmp_path, state)
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


def random_classifier(seed: int, classes: int = 5, *, video: bool = True) -> CAVMAEClassifier:
    torch.manual_seed(seed)
    model = CAVMAEClassifier(SIZES, classes, video=video)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_pretraining_checkpoint_fills_all_of_a_classifier_but_its_head(
    tmp_path: Path, prefix: str
) -> None:
    pretrained = random_model(1).state_dict()
    torch.save({prefix + name: tensor for name, tensor in pretrained.items()}, tmp_path / "w.pth")
    model = random_classifier(2)
    head = {n: t.clone() for n, t in model.state_dict().items() if n.startswith("mlp_head.")}
    assert load_classifier_weights(model, tmp_path / "w.pth") == list(head)
    encoders = {name: pretrained[name] for name in model.state_dict() if name not in head}
    assert_equal_states(model, encoders | head)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("classes", [5, 9])
def test_a_fine_tuned_checkpoint_fills_all_of_a_classifier(prefix: str, classes: int) -> None:
    tuned = random_classifier(1, classes).state_dict()
    model = random_classifier(2, classes)
    state = {prefix + name: tensor for name, tensor in tuned.items()}
    assert load_classifier_weights(model, state) == []
    assert_equal_states(model, tuned)


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_an_audio_only_classifier_takes_the_audio_part(fine_tuned: bool) -> None:
    expected = (random_classifier(1) if fine_tuned else random_model(1)).state_dict()
    model = random_classifier(2, video=False)
    kept = load_classifier_weights(model, expected)
    state = model.state_dict()
    assert not [n for n in state if n not in kept and not torch.equal(state[n], expected[n])]


def test_an_audio_only_checkpoint_does_not_fill_a_whole_classifier() -> None:
    with pytest.raises(ValueError, match=r"missing: modality_v.*built with video=False"):
        load_classifier_weights(
            random_classifier(2), random_classifier(1, video=False).state_dict()
        )


def test_another_number_of_classes_is_named_with_the_fix(tmp_path: Path) -> None:
    torch.save(random_classifier(1, classes=9).state_dict(), tmp_path / "vgg.pth")
    model = random_classifier(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_classifier_weights(model, tmp_path / "vgg.pth")
    assert "vgg.pth has 9 classes (mlp_head.1.weight (9, 16)) and the model 5" in str(error.value)
    assert "classes=9" in str(error.value)
    assert_equal_states(model, before)


def test_a_classifier_does_not_start_from_weights_of_another_architecture(tmp_path: Path) -> None:
    torch.save(mae_state(), tmp_path / "mae.pth")
    with pytest.raises(ValueError, match=r"mae\.pth holds no CAV-MAE weights.*pretrain from this"):
        load_classifier_weights(random_classifier(2), tmp_path / "mae.pth")


@pytest.mark.parametrize("change", ["missing", "unexpected", "deeper", "longer"])
def test_a_checkpoint_that_does_not_fit_leaves_the_classifier_as_it_was(change: str) -> None:
    sizes = {"deeper": {"modality_depth": 3}, "longer": {"audio_frames": 64}}.get(change, {})
    state = random_model(1, replace(SIZES, **sizes)).state_dict()
    if change == "missing":
        del state["norm_v.bias"]
    if change == "unexpected":
        state["cls_token"] = torch.zeros(1, 1, 16)
    model = random_classifier(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = {
        "missing": "missing: norm_v.bias",
        "unexpected": r"unexpected: cls_token \(1, 1, 16\)",
        "deeper": r"unexpected: blocks_a\.2.*Set model\.modality_depth",
        "longer": r"pos_embed_a has shape \(1, 8, 16\).*Set model\.audio_frames to 64",
    }[change]
    with pytest.raises(ValueError, match=message):
        load_classifier_weights(model, state)
    assert_equal_states(model, before)


def test_a_fine_tuned_checkpoint_is_none_to_pretrain_from() -> None:
    with pytest.raises(ValueError, match=r"missing: mask_token.*without a classifier"):
        load_published(random_model(2), random_classifier(1).state_dict())


@pytest.mark.parametrize("content", [b"", b"broken\n", b"PK\x03\x04 and no more", b"\x80\x02X"])
def test_a_file_that_is_no_checkpoint_is_an_error_naming_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pt (cannot be read as|is no) (a )?checkpoint"):
        read_state(path)


def not_finite(value: float) -> dict[str, torch.Tensor]:
    state = random_model(1).state_dict()
    state["blocks_a.0.attn.qkv.weight"][1, 2] = value
    return state


@pytest.mark.field
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, name: str, value: float) -> None:
    save = torch.save if name == "w.pt" else save_file
    save(not_finite(value), tmp_path / name)
    message = rf"{name}: tensor blocks_a\.0\.attn\.qkv\.weight has 1 NaN or infinite values of 768"
    for load in (
        lambda: load_initial_weights(random_model(2), tmp_path / name),
        lambda: load_classifier_weights(random_classifier(2), tmp_path / name),
        lambda: load_published(random_model(2), tmp_path / name),
    ):
        with pytest.raises(ValueError, match=message):
            load()


@pytest.mark.field
def test_a_double_that_float32_cannot_hold_is_not_finite(tmp_path: Path) -> None:
    state = {name: tensor.double() for name, tensor in random_model(1).state_dict().items()}
    state["norm.bias"][0] = 1e300
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"tensor norm\.bias has 1 NaN or infinite"):
        read_state(tmp_path / "w.pt")


@pytest.mark.field
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    state = random_model(1).state_dict()
    torch.save(state | {"norm.weight": state["norm.weight"].to(dtype)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: tensor norm\.weight is of (int|bool)"):
        read_state(tmp_path / "w.pt")


@pytest.mark.field
@pytest.mark.parametrize("part", [0.001, 0.05, 0.1, 0.2, 0.5, 0.9, 0.99])
def test_a_file_that_was_cut_is_named(tmp_path: Path, part: float) -> None:
    torch.save(random_model(1).state_dict(), tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=r"cut\.pt cannot be read.*copy or download it again"):
        read_state(tmp_path / "cut.pt")


@pytest.mark.field
def test_names_of_wrapped_models_are_known(tmp_path: Path) -> None:
    expected = random_model(1).state_dict()
    for prefix in ("_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        torch.save({prefix + name: one for name, one in expected.items()}, tmp_path / "w.pt")
        assert read_state(tmp_path / "w.pt").keys() == expected.keys()
    blocks = {name.replace("blocks_a.0.", "blocks_a.0._orig_mod."): name for name in expected}
    torch.save({name: expected[bare] for name, bare in blocks.items()}, tmp_path / "w.pt")
    assert read_state(tmp_path / "w.pt").keys() == expected.keys()
    both = expected | {f"module.{name}": tensor for name, tensor in expected.items()}
    torch.save(both, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"w\.pt holds {len(expected)} tensors twice"):
        read_state(tmp_path / "w.pt")


@pytest.mark.field
def test_the_state_of_a_lightning_module_says_what_to_take_out(tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in random_model(1).state_dict().items()}
    torch.save({"optimizer": {"lr": 1}, "state_dict": state, "epoch": 3}, tmp_path / "l.ckpt")
    with pytest.raises(ValueError, match=r"torch\.save\(torch\.load\(FILE\)\['state_dict'\]"):
        read_state(tmp_path / "l.ckpt")
    torch.save(state, tmp_path / "l.pt")
    for load in (
        lambda: load_initial_weights(random_model(2), tmp_path / "l.pt"),
        lambda: load_classifier_weights(random_classifier(2), tmp_path / "l.pt"),
    ):
        with pytest.raises(ValueError, match=r"l\.pt holds n.*take 'model\.' off the names"):
            load()


@pytest.mark.field
def test_the_sizes_that_are_advised_are_those_of_the_file(tmp_path: Path) -> None:
    sizes = replace(SIZES, audio_frames=96, image_size=48, width=32, decoder_width=16)
    torch.save(random_model(1, sizes).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError) as error:
        load_initial_weights(random_model(2), tmp_path / "w.pt")
    assert str(error.value).startswith(f"{tmp_path / 'w.pt'} does not fit the model")
    assert str(error.value).endswith(
        "Set model.width to 32, model.decoder_width to 16, model.audio_frames to 96 (with 32 mel "
        "bins), model.image_size to 48"
    )
