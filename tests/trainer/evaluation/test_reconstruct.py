"""`cavmae reconstruct`: what is removed stays unseen, and errors are those of what was removed."""

import dataclasses
import hashlib
import json
import re
import wave
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from cavmae import cli
from cavmae.dataloaders.media.audio_codec import decode_audio
from cavmae.dataloaders.media.log_mel import log_mel
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.kernels import MaskIds, mask_ids_from_shuffle
from cavmae.trainer.config.configs import LossConfig
from cavmae.trainer.config.serialize import SCHEMA
from cavmae.trainer.evaluation.reconstruct import (
    ERRORS,
    ReconstructConfig,
    errors_of_removed,
    removal_masks,
    removed_ratios,
)
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.tracking.figures import masked_and_reconstructed, patchify, unpatchify


@pytest.fixture(scope="module")
def joint(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with OUT in `out`: 3 clips of 2 s, for a model that hears 2.1 s."""
    folder = tmp_path_factory.mktemp("reconstruct") / "run"
    tiny_run.save_untrained(
        packed_synthetic, folder, model=dataclasses.replace(tiny_run.MODEL, audio_frames=208)
    )
    words = [str(folder), str(packed_synthetic / "frames"), str(folder / "out"), "--clips", "3"]
    assert cli.main(["reconstruct", *words, "--sound-iterations", "30"]) == 0
    return folder


def report_of(folder: Path) -> dict:
    return json.loads((folder / "out" / "reconstructions.json").read_text())


def test_the_report_names_the_first_clips_the_run_and_its_weights(
    joint: Path, packed_synthetic: Path
) -> None:
    report = report_of(joint)
    shards = ShardSet(str(packed_synthetic / "frames"))
    first = [shards.sample_id(0, sample) for sample in range(3)]
    assert [clip["sample_id"] for clip in report["clips"]] == first
    assert (report["options"]["clips"], report["options"]["seed"]) == (3, 0)
    assert {clip["direction"] for clip in report["clips"]} == {"joint"}
    assert (report["audio_ratio"], report["video_ratio"], report["skipped"]) == (0.75, 0.75, [])
    saved = json.loads((joint / "config.json").read_text())
    assert {"schema": SCHEMA} | report["config"] == saved
    weights = (joint / "weights.pt").read_bytes()
    assert report["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_each_modality_has_its_errors_and_their_mean_over_clips(joint: Path) -> None:
    report = report_of(joint)
    for kind in ("audio", "video"):
        for name in ERRORS:
            values = [clip[kind][name] for clip in report["clips"]]
            assert all(value > 0 for value in values) and len(set(values)) == 3
            assert report["mean"][kind][name] == pytest.approx(sum(values) / 3)


def test_each_clip_has_a_picture_and_two_sounds_of_its_own_length(
    joint: Path, packed_synthetic: Path
) -> None:
    names = [clip["sample_id"].replace("/", "-") for clip in report_of(joint)["clips"]]
    endings = (".png", "-original.wav", "-reconstructed.wav")
    expected = {f"clip-{name}{ending}" for name in names for ending in endings}
    assert {path.name for path in (joint / "out").iterdir()} == expected | {"reconstructions.json"}
    shards = ShardSet(str(packed_synthetic / "frames"))
    for number, name in enumerate(names):
        samples = shards.description(0, number)["audio"]["samples"]
        for ending in endings[1:]:
            with wave.open(str(joint / "out" / f"clip-{name}{ending}")) as sound:
                assert (sound.getframerate(), sound.getnchannels()) == (16000, 1)
                assert sound.getsampwidth() == 2
                assert samples - 160 < sound.getnframes() <= samples  # whole windows


def test_the_original_sound_is_the_clips_own_at_its_level(
    joint: Path, packed_synthetic: Path
) -> None:
    shards = ShardSet(str(packed_synthetic / "frames"))
    stored = decode_audio(shards.member(0, 0, shards.audio_codec))
    name = shards.sample_id(0, 0).replace("/", "-")
    with wave.open(str(joint / "out" / f"clip-{name}-original.wav")) as sound:
        heard = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).copy()
    both = log_mel(
        [torch.from_numpy(stored), torch.from_numpy(heard)], 32, 198, torch.device("cpu")
    )
    assert torch.corrcoef(both.flatten(1))[0, 1] > 0.9
    assert (both[1] - both[0]).median().abs() < 0.3


@pytest.mark.parametrize("direction", ["audio-to-video", "video-to-audio"])
def test_a_reconstruction_knows_of_what_was_removed_no_more_than_mean_and_variance(
    tmp_path: Path, direction: str
) -> None:
    run = tiny_run.tiny_run(tmp_path, tmp_path / "run")
    torch.manual_seed(0)
    model = CAVMAE(run.model)
    log_mel, frame = torch.randn(2, 192, 32), torch.randn(2, 3, 32, 32)
    config = ReconstructConfig("run", "shards", "out", direction=direction)  # pyright: ignore[reportArgumentType]
    masks = removal_masks(
        run,
        torch.arange(2),
        removed_ratios(config.direction, config.audio_ratio, config.video_ratio, run),
        seed=0,
    )
    from_sound = direction == "audio-to-video"
    other, mask = (frame, masks[1]) if from_sound else (log_mel.transpose(1, 2)[:, None], masks[0])

    def reconstructed(pixels: torch.Tensor) -> torch.Tensor:
        inputs = (log_mel, pixels) if from_sound else (pixels[:, 0].transpose(1, 2), frame)
        predicted = model.predict_patches(*inputs, *masks)[1 if from_sound else 0]
        masked, whole = masked_and_reconstructed(pixels, mask, predicted, norm_pix=True)
        assert masked.isnan().all()
        return whole

    turned = patchify(other).flip(2)  # within each patch, which keeps mean and variance
    grid = (other.shape[2] // 16, other.shape[3] // 16)
    changed = unpatchify(turned, grid)
    assert not torch.equal(changed, other)
    torch.testing.assert_close(reconstructed(changed), reconstructed(other))
    assert not torch.allclose(reconstructed(2 * changed), reconstructed(other))


def test_the_mask_of_a_clip_is_that_of_its_place_and_keeps_the_share_asked_for(
    tmp_path: Path,
) -> None:
    run = tiny_run.tiny_run(tmp_path, tmp_path / "run")
    config = ReconstructConfig("run", "shards", "out", audio_ratio=0.5, video_ratio=1.0)
    ratios = removed_ratios(config.direction, config.audio_ratio, config.video_ratio, run)
    audio, video = removal_masks(run, torch.arange(5), ratios, seed=3)
    assert (audio.keep.shape, audio.removed.shape) == ((5, 12), (5, 12))
    assert (video.keep.shape, video.removed.shape) == ((5, 0), (5, 4))
    alone, _ = removal_masks(run, torch.tensor([4]), ratios, seed=3)
    assert torch.equal(alone.removed[0], audio.removed[4])
    other, _ = removal_masks(run, torch.tensor([4]), ratios, seed=4)
    assert not torch.equal(other.removed, alone.removed)


def test_all_that_is_removed_is_shown_of_a_run_that_decodes_a_share(tmp_path: Path) -> None:
    run = tiny_run.tiny_run(tmp_path, tmp_path / "run")
    some = dataclasses.replace(run.model, decoder="cross", decoded_share=0.25)
    masks = [
        removal_masks(one, torch.arange(5), (0.5, 0.75), seed=3)
        for one in (run, dataclasses.replace(run, model=some))
    ]
    for expected, found in zip(*masks, strict=True):
        assert torch.equal(found.removed, expected.removed)


def half_mask() -> MaskIds:
    """Of 4 patches in a row: 0 and 2 are kept."""
    return mask_ids_from_shuffle(torch.tensor([[0, 2, 1, 3]]), 0.5)


def four_patches() -> torch.Tensor:
    """(1, 1, 16, 64) whose patches have the means 0, 1, 2, 3 and the same pattern of variance 1."""
    pattern = torch.ones(16, 16)
    pattern[::2] = -1
    return (pattern[:, None] + torch.arange(4.0)[:, None]).reshape(1, 1, 16, 64)


def errors(
    mask: MaskIds, predicted: torch.Tensor, *, columns: int = 64, norm_pix: bool = False
) -> dict[str, float]:
    """Of the four patches, which were divided by 3."""
    std = torch.tensor([3.0])
    found = errors_of_removed(
        four_patches(),
        mask,
        predicted,
        norm_pix=norm_pix,
        std=std,
        present_columns=columns,
    )
    assert found is not None
    return found


def test_errors_are_those_of_removed_patches_before_normalisation() -> None:
    predicted = patchify(four_patches())
    predicted[:, [0, 2]] = 100.0  # kept: not counted
    predicted[:, 1] += 2.0
    found = errors(half_mask(), predicted)
    assert found["mean_squared_error"] == pytest.approx((3 * 2) ** 2 / 2)
    # The mean patch of those kept is the pattern at 1: patch 1 itself, and 2 below patch 3.
    assert found["mean_squared_error_of_kept_mean"] == pytest.approx((3 * 2) ** 2 / 2)
    assert found["mean_squared_error_of_patch_mean"] == pytest.approx(3**2)


def test_padding_is_neither_an_error_nor_part_of_a_guess() -> None:
    predicted = patchify(four_patches())
    predicted[:, 3] += 50.0
    found = errors(half_mask(), predicted, columns=32)
    assert found["mean_squared_error"] == 0
    assert found["mean_squared_error_of_kept_mean"] == pytest.approx(3**2)  # patch 0 for patch 1
    nothing_left = errors_of_removed(
        four_patches(),
        half_mask(),
        predicted,
        norm_pix=False,
        std=torch.ones(1),
        present_columns=16,
    )
    assert nothing_left is None


def test_where_nothing_is_kept_the_guess_is_the_data_sets_mean() -> None:
    mask = mask_ids_from_shuffle(torch.arange(4)[None], 1.0)
    found = errors(mask, torch.zeros(1, 4, 256))
    assert found["mean_squared_error_of_kept_mean"] == found["mean_squared_error"]
    assert found["mean_squared_error"] == pytest.approx(9 * (1 + (0 + 1 + 4 + 9) / 4))


def test_a_normalised_prediction_of_zeros_is_the_guess_of_each_patchs_mean() -> None:
    found = errors(half_mask(), torch.zeros(1, 4, 256), norm_pix=True)
    assert found["mean_squared_error"] == found["mean_squared_error_of_patch_mean"]


@pytest.mark.parametrize(
    ("left_out", "changes", "message"),
    [
        ("config.json", {}, "which has no config.json; give the folder of a run"),
        ("weights.pt", {}, "whose run has not finished: it has no weights.pt"),
        ("", {"loss": LossConfig(reconstruction_weight=0)}, "loss.reconstruction_weight is 0"),
    ],
)
def test_a_folder_without_a_trained_decoder_is_refused_in_a_line(
    packed_synthetic: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    left_out: str,
    changes: dict,
    message: str,
) -> None:
    folder = tmp_path / "run"
    tiny_run.save_untrained(packed_synthetic, folder, **changes)
    if left_out:
        (folder / left_out).unlink()
    assert cli.main(["reconstruct", str(folder), "shards", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert text.startswith(f"error: run_dir is {folder}, ") and message in text
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_to(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    tiny_run.save_untrained(packed_synthetic, tmp_path / "run")
    arguments = ["reconstruct", str(tmp_path / "run"), "shards", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clips": 0}, "clips is 0; use 1 or more"),
        ({"sound_iterations": 0}, "sound_iterations is 0; use 1 or more"),
    ],
)
def test_a_field_out_of_its_range_is_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ReconstructConfig("run", "shards", "out", **fields)


def test_a_ratio_that_is_none_or_that_the_direction_gives_is_refused(tmp_path: Path) -> None:
    run = tiny_run.tiny_run(tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match=r"audio_ratio is 1\.5; use 0 to 1"):
        removed_ratios("joint", 1.5, None, run)
    message = r"video_ratio is 0\.5 and direction video-to-audio, .* omit video_ratio, or use"
    with pytest.raises(ValueError, match=message):
        removed_ratios("video-to-audio", None, 0.5, run)


@pytest.mark.parametrize(("ratio", "happens"), [(1.0, "keeps no patch"), (0.0, "removes none")])
def test_ratios_that_leave_nothing_to_see_or_to_make_are_refused(
    tmp_path: Path, ratio: float, happens: str
) -> None:
    run = tiny_run.tiny_run(tmp_path, tmp_path / "run")
    config = ReconstructConfig("run", "shards", "out", audio_ratio=ratio, video_ratio=ratio)
    with pytest.raises(ValueError, match=f"which {happens} of 28; change one of them"):
        removed_ratios(config.direction, config.audio_ratio, config.video_ratio, run)
