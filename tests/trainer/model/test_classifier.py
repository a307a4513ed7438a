"""The fine-tuning model beyond the published numbers: what each mode reads, uses and refuses."""

from typing import get_args

import pytest
import torch

from cavmae.trainer.model.classifier import CAVMAEClassifier, ClassifierOutput, Mode
from cavmae.trainer.model.config import ModelConfig

SMALL = ModelConfig(
    audio_frames=48,
    mel_bins=32,
    image_size=32,
    width=32,
    modality_depth=1,
    joint_depth=2,
    heads=2,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=2,
)
MODES: tuple[Mode, ...] = get_args(Mode)
AUDIO_MODES: tuple[Mode, ...] = ("audioonly", "missingaudioonly")
VIDEO_MODES: tuple[Mode, ...] = ("videoonly", "missingvideoonly")


def small_model(*, video: bool = True) -> CAVMAEClassifier:
    """Random norms too, so that a wrong one shows."""
    torch.manual_seed(0)
    model = CAVMAEClassifier(SMALL, classes=7, video=video)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def inputs(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(3, 48, 32, generator=generator),
        torch.randn(3, 3, 32, 32, generator=generator),
    )


def classify(model: CAVMAEClassifier, mode: Mode, **given: torch.Tensor | None) -> ClassifierOutput:
    log_mel, frame = inputs()
    with torch.no_grad():
        return model(**({"log_mel": log_mel, "frame": frame} | given), mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_returns_float32_logits_and_what_the_head_reads(mode: Mode) -> None:
    model = small_model()
    output = classify(model, mode)
    assert (output.logits.shape, output.embedding.shape) == ((3, 7), (3, 32))
    assert output.logits.dtype == output.embedding.dtype == torch.float32
    torch.testing.assert_close(model.mlp_head(output.embedding), output.logits)


def test_no_two_modes_agree() -> None:
    model = small_model()
    logits = torch.stack([classify(model, mode).logits.flatten() for mode in MODES])
    distance = torch.cdist(logits, logits) + torch.eye(len(MODES))
    assert distance.min() > 1e-3


@pytest.mark.parametrize("mode", AUDIO_MODES)
def test_audio_modes_read_no_video(mode: Mode) -> None:
    model = small_model()
    assert torch.equal(classify(model, mode).logits, classify(model, mode, frame=None).logits)


@pytest.mark.parametrize("mode", VIDEO_MODES)
def test_video_modes_read_no_audio(mode: Mode) -> None:
    model = small_model()
    assert torch.equal(classify(model, mode).logits, classify(model, mode, log_mel=None).logits)


def test_multimodal_logits_depend_on_both_inputs() -> None:
    model = small_model()
    other_log_mel, other_frame = inputs(seed=2)
    logits = classify(model, "multimodal").logits
    assert not torch.allclose(logits, classify(model, "multimodal", log_mel=other_log_mel).logits)
    assert not torch.allclose(logits, classify(model, "multimodal", frame=other_frame).logits)


def test_embeddings_for_retrieval_are_those_of_the_single_modes() -> None:
    model = small_model()
    log_mel, frame = inputs()
    with torch.no_grad():
        audio, video = model.embed_audio(log_mel), model.embed_video(frame)
    torch.testing.assert_close(audio, classify(model, "audioonly").embedding)
    torch.testing.assert_close(video, classify(model, "videoonly").embedding)


def test_a_missing_modality_averages_the_single_stream_and_the_joint_one() -> None:
    model = small_model()
    with torch.no_grad():
        tokens = model.patch_embed_a(
            inputs()[0].transpose(1, 2)[:, None],
            torch.arange(SMALL.audio_tokens).expand(3, -1),
            model.modality_a,
        )
        tokens = tokens + model.pos_embed_a
        for block in (*model.blocks_a, *model.blocks_u):
            tokens = block(tokens)
        joint = model.norm(tokens).mean(dim=1)
    average = (joint + classify(model, "audioonly").embedding) / 2
    torch.testing.assert_close(classify(model, "missingaudioonly").embedding, average)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_are_exactly_those_without_gradient(mode: Mode) -> None:
    model = small_model()
    every = {name for name, _ in model.named_parameters()}
    frozen = set(model.freeze_unused(mode))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(*inputs(), mode).logits.square().sum().backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None}
    assert used == every - frozen


def test_positions_are_trained_though_pretraining_keeps_them_fixed() -> None:
    assert not SMALL.learnable_positions
    model = small_model()
    assert model.pos_embed_a.requires_grad and model.pos_embed_v.requires_grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", range(SMALL.joint_depth))
def test_every_mode_passes_all_joint_blocks(mode: Mode, number: int) -> None:
    model = small_model()
    before = classify(model, mode).logits
    torch.nn.init.normal_(model.blocks_u.get_parameter(f"{number}.mlp.fc2.bias"))
    assert not torch.allclose(classify(model, mode).logits, before)


def test_parameter_groups_share_out_what_is_trained() -> None:
    model = small_model()
    model.freeze_unused("multimodal")
    encoders, head = model.parameter_groups()
    assert {id(p) for p in head} == {id(p) for p in model.mlp_head.parameters()}
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for p in encoders + head) == sorted(trained)


def test_the_audio_only_model_has_no_video_parameters_and_the_same_logits() -> None:
    whole, audio_only = small_model(), small_model(video=False)
    names = {name for name, _ in audio_only.named_parameters()}
    assert names < {name for name, _ in whole.named_parameters()}
    assert not [name for name in names if name.split(".")[0].endswith("_v")]
    audio_only.load_state_dict({name: whole.state_dict()[name] for name in names})
    for mode in AUDIO_MODES:
        logits = classify(audio_only, mode, frame=None).logits
        assert torch.equal(logits, classify(whole, mode).logits)


@pytest.mark.parametrize("mode", ["multimodal", *VIDEO_MODES])
def test_the_audio_only_model_refuses_modes_that_read_video(mode: Mode) -> None:
    with pytest.raises(ValueError, match=rf"'{mode}', which reads video.*use mode 'audioonly'"):
        classify(small_model(video=False), mode)


@pytest.mark.parametrize(
    ("mode", "absent"), [("multimodal", "frame"), ("missingaudioonly", "log_mel")]
)
def test_an_input_that_the_mode_reads_cannot_be_left_out(mode: Mode, absent: str) -> None:
    with pytest.raises(ValueError, match=f"{absent} is None and mode '{mode}' reads it"):
        classify(small_model(), mode, **{absent: None})


def test_an_unknown_mode_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"mode is 'audio'; use one of multimodal, audioonly"):
        small_model()(*inputs(), "audio")


def test_a_classifier_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="classes is 0"):
        CAVMAEClassifier(SMALL, classes=0)


def test_logits_are_close_in_bf16() -> None:
    model = small_model()
    expected = classify(model, "multimodal").logits
    log_mel, frame = (tensor.bfloat16() for tensor in inputs())
    logits = classify(model.bfloat16(), "multimodal", log_mel=log_mel, frame=frame).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.1)
