"""The speed baseline computes what the published model computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cavmae.benchmarks.baselines.published import PublishedCAVMAE
from cavmae.benchmarks.conformance.forward import ForwardCase, ForwardNumbers
from cavmae.benchmarks.conformance.tolerances import Deviation
from cavmae.kernels import contrastive_loss, mask_ids_from_shuffle
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import ModelConfig


@pytest.mark.golden
@pytest.mark.slow
def test_baseline_gives_the_published_numbers(
    golden_folder: Path, check_deviations_of: Callable[[list[Deviation]], None]
) -> None:
    cases = ForwardCase.all(golden_folder)
    if not cases:
        pytest.skip(f"{golden_folder} has no pretrain_forward/index.json")
    cases = [case for case in cases if case.weights == cases[-1].weights]
    keys = ("mask_ratio_a", "mask_ratio_v", "norm_pix_loss")
    kinds = {tuple(case.entry[key] for key in keys): case for case in cases}
    model = PublishedCAVMAE(cases[0].config)
    cases[0].fill(model)
    for case in kinds.values():
        check_deviations_of(case.deviations(baseline_numbers(model, case)))


def baseline_numbers(model: PublishedCAVMAE, case: ForwardCase) -> ForwardNumbers:
    shuffles = [torch.from_numpy(case.files[f"ids_shuffle_{letter}"]).long() for letter in "av"]
    with torch.no_grad():
        output = model(
            *case.inputs(),
            audio_ratio=case.entry["mask_ratio_a"],
            video_ratio=case.entry["mask_ratio_v"],
            norm_pix=case.entry["norm_pix_loss"],
            shuffles=(shuffles[0], shuffles[1]),
        )
    arrays = {
        "latent": output.latent,
        "ca": output.audio_tokens,
        "cv": output.video_tokens,
        "ca_mean": output.audio_tokens.mean(dim=1),
        "cv_mean": output.video_tokens.mean(dim=1),
        "pred_a": output.predicted_audio,
        "pred_v": output.predicted_video,
    }
    return case.numbers(arrays, output.reconstruction_audio, output.reconstruction_video)


@pytest.mark.parametrize("joint_depth", [1, 2])
def test_baseline_and_model_agree_in_loss_and_gradients(joint_depth: int) -> None:
    sizes = ModelConfig(
        audio_frames=64,
        mel_bins=32,
        image_size=48,
        width=32,
        modality_depth=2,
        joint_depth=joint_depth,
        heads=4,
        decoder_width=16,
        decoder_depth=2,
        decoder_heads=2,
    )
    torch.manual_seed(0)
    model, baseline = CAVMAE(sizes), PublishedCAVMAE(sizes)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    baseline.load_state_dict(model.state_dict())
    log_mel, image = torch.randn(5, 64, 32), torch.randn(5, 3, 48, 48)
    shuffles = torch.rand(5, 8).argsort(1), torch.rand(5, 9).argsort(1)

    expected = baseline(log_mel, image, shuffles=shuffles, contrastive_weight=0.1)
    expected.loss.backward()
    masks = [mask_ids_from_shuffle(shuffle, 0.75) for shuffle in shuffles]
    output = model(log_mel, image, *masks)
    contrast = contrastive_loss(output.audio_embedding, output.video_embedding, 0.05, False)
    loss = output.reconstruction_audio + output.reconstruction_video + 0.1 * contrast.loss
    loss.backward()

    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in baseline.named_parameters()}
    for name, parameter in model.named_parameters():
        expected_gradient = gradients[name]
        if expected_gradient is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected_gradient, rtol=1e-3, atol=1e-6)
    without = {name for name, gradient in gradients.items() if gradient is None}
    positions = {name for name in without if "pos_embed" in name}
    assert set(model.freeze_unused(reconstruct=True, contrast=True)) == without - positions


def test_baseline_draws_its_own_masks() -> None:
    sizes = ModelConfig(
        audio_frames=64, mel_bins=32, image_size=48, width=32, heads=4, decoder_width=16
    )
    baseline = PublishedCAVMAE(sizes)
    inputs = torch.randn(2, 64, 32), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert baseline(*inputs).loss != baseline(*inputs).loss
