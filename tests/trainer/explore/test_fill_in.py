"""*Fill in*: what was removed is grey, kept patches are the original's, and sounds are heard."""

import dataclasses

import numpy as np
import pytest
from tiny_models import CLASSIFIER, PRETRAINING, random_classifier, random_pretraining_model
from tiny_run import MODEL

from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig
from cavmae.trainer.explore import fill_in as fill_in_module
from cavmae.trainer.explore.fill_in import Filled, fill_in
from cavmae.trainer.inference.media import Window
from cavmae.trainer.inference.model import Model

GREY = 191


@pytest.fixture(scope="module", autouse=True)
def few_iterations() -> None:
    """The sound itself is for `test_griffin_lim.py`."""
    fill_in_module.ITERATIONS = 2


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(random_pretraining_model(), PRETRAINING, PretrainConfig(model=MODEL))


@pytest.fixture(scope="module")
def video() -> Window:
    """A second of noise, for a model that hears 1.92 s, and a picture."""
    random = np.random.default_rng(0)
    sound = (0.1 * random.standard_normal(16000)).astype(np.float32)
    return Window((0.0, 1.0), sound, random.integers(0, 255, (48, 64, 3), np.uint8))


def removed(filled: Filled, kind: str) -> np.ndarray:
    """Pixels of `frames` or `spectrograms` that are grey; the rest is the original's."""
    pictures = {name: np.asarray(one) for name, one in getattr(filled, kind).items()}
    grey = (pictures["masked"] == GREY).all(axis=2)
    for name in ("masked", "reconstructed"):
        np.testing.assert_array_equal(pictures[name][~grey], pictures["original"][~grey])
    return grey


@pytest.mark.parametrize(
    ("direction", "of_frame", "of_sound"), [("audio-to-video", 1, 0), ("video-to-audio", 0, 1)]
)
def test_a_direction_removes_all_of_one_modality(
    model: Model, video: Window, direction: str, of_frame: float, of_sound: float
) -> None:
    filled = fill_in(model, video, direction=direction)  # pyright: ignore[reportArgumentType]
    assert removed(filled, "frames").mean() == of_frame
    assert removed(filled, "spectrograms").mean() == of_sound
    silent = filled.errors["video" if of_sound else "audio"]
    assert silent is None and filled.given


def test_ratio_and_mode_choose_whole_columns_of_the_spectrogram(
    model: Model, video: Window
) -> None:
    filled = fill_in(model, video, audio_ratio=0.5, video_ratio=0.25, audio_mode="time")
    columns = removed(filled, "spectrograms")
    assert (columns == columns[:1]).all() and 0 < columns.mean() < 1
    assert removed(filled, "frames").mean() == 0.25
    other = fill_in(model, video, audio_ratio=0.5, video_ratio=0.25, audio_mode="time", seed=1)
    assert (removed(other, "spectrograms") != columns).any()


def test_the_pictures_end_with_the_sound(model: Model, video: Window) -> None:
    """Padding is neither shown nor heard."""
    filled = fill_in(model, video)
    times = filled.spectrograms["original"].height // MODEL.mel_bins
    assert {one.width for one in filled.spectrograms.values()} == {98 * times}
    lengths = {(rate, len(sound)) for rate, sound in filled.sounds.values()}
    assert lengths == {(16000, 97 * 160 + 400)}


@pytest.mark.field  # gradio#2789, VibeVoice#281
def test_sounds_are_integers_and_one_that_is_too_loud_is_cut_off_and_does_not_wrap(
    model: Model, video: Window
) -> None:
    made = model.reconstruct(video)
    data = dataclasses.replace(made.run.data, log_mel_mean=made.run.data.log_mel_mean + 9)
    loud = dataclasses.replace(made, run=dataclasses.replace(made.run, data=data))
    quiet = made.sounds(iterations=1)["original"]
    sound = loud.sounds(iterations=1)["original"]
    assert sound.dtype == np.int16 and np.abs(sound).max() == 32767
    heard = np.abs(quiet) > 500
    assert heard.any() and (np.sign(sound[heard]) == np.sign(quiet[heard])).all()


def test_what_cannot_be_filled_in_is_one_clear_line(model: Model, video: Window) -> None:
    classifier = Model(random_classifier(), CLASSIFIER, FinetuneConfig(model=MODEL))
    with pytest.raises(ValueError, match="this model has no decoder"):
        fill_in(classifier, video)
    with pytest.raises(ValueError, match="use 0 to 1"):
        fill_in(model, video, audio_ratio=1.5)
    with pytest.raises(ValueError, match=r"mode is .sideways.; use unstructured"):
        fill_in(model, video, audio_mode="sideways")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="the window has no picture; give a video with sound"):
        fill_in(model, Window((0.0, 1.0), video.audio, None))
