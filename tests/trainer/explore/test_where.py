"""*Where*: a value lies over the very pixels, and the seconds and pitches, of its patch."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CLASSIFIER, PRETRAINING, random_classifier, random_pretraining_model
from tiny_run import MODEL

from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig
from cavmae.trainer.explore.where import Scene, Side, look
from cavmae.trainer.inference.media import Window
from cavmae.trainer.inference.model import Model

HZ = 16000


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(random_pretraining_model(), PRETRAINING, PretrainConfig(model=MODEL))


def noise(seconds: float) -> np.ndarray:
    samples = np.random.default_rng(0).standard_normal(round(seconds * HZ))
    return (0.1 * samples).astype(np.float32)


def window(audio: np.ndarray | None = None, frame: np.ndarray | None = None) -> Window:
    return Window((0.0, 1.0), audio, frame)


WIDE = np.random.default_rng(0).integers(0, 255, (64, 160, 3), np.uint8)
SECOND = window(noise(1.0), WIDE)


@pytest.fixture(scope="module")
def scene(model: Model) -> Scene:
    """A model that hears 1.92 s, and a picture of which it sees the middle 64 columns."""
    return look(model, SECOND, SECOND)


def centre(side: Side, token: int) -> tuple[float, float]:
    left, top, right, bottom = side.boxes[token].tolist()
    return (left + right) / 2, (top + bottom) / 2


@pytest.mark.field  # anomalib#3129, vit-pytorch#219: a map of the crop laid over all of a picture
@pytest.mark.parametrize("kind", ["audio", "video"])
def test_a_click_on_the_brightest_place_of_a_map_finds_the_patch_of_that_value(
    scene: Scene, kind: str
) -> None:
    side: Side = getattr(scene, kind)
    plain = np.asarray(side.painted(torch.zeros(len(side.tokens)))).astype(int)
    area = 0
    for token in side.used.nonzero().flatten().tolist():
        values = torch.zeros(len(side.tokens))
        values[token] = 1.0
        changed = (np.asarray(side.painted(values)).astype(int) != plain).any(axis=2)
        rows, columns = np.nonzero(changed)
        assert changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        height, width = changed.shape
        for y, x in ((rows.min(), columns.min()), (rows.max(), columns.max())):  # both corners
            found = side.around((x + 0.5) / width, (y + 0.5) / height)
            assert found.nonzero().flatten().tolist() == [token]
        area += changed.sum()
    assert area == (256 * 256 if kind == "video" else plain[:, :, 0].size * 7 / 12), "no gaps"


def test_the_map_of_a_wide_picture_covers_the_square_that_the_model_saw(scene: Scene) -> None:
    before = np.asarray(scene.video.shown)
    after = np.asarray(scene.video.painted(torch.arange(len(scene.video.tokens)) * 1.0))
    assert before.shape == after.shape == (256, 640, 3)
    unseen = np.ones(640, bool)
    unseen[192:448] = False
    np.testing.assert_array_equal(after[:, unseen], np.rint(before[:, unseen] * 0.3))
    with pytest.raises(ValueError, match="at 5% from the left and 50% from the top is nothing"):
        scene.video.around(0.05, 0.5)


def test_a_picture_and_its_mirror_image_have_mirrored_places(model: Model) -> None:
    """A patch of one colour, which a model without attention keeps in its own token."""
    network = random_pretraining_model()
    for name, parameter in network.named_parameters():
        if "attn" in name or "pos_embed" in name:
            parameter.data.zero_()
    alone = Model(network, PRETRAINING, PretrainConfig(model=MODEL))
    pixels = np.full((32, 32, 3), 90, np.uint8)
    pixels[:16, 16:] = (250, 10, 40)
    for picture, x in ((pixels, 0.75), (pixels[:, ::-1].copy(), 0.25)):
        side = look(alone, SECOND, window(frame=picture)).video
        cosines = side.cosines(side.mean(side.around(x, 0.25)))
        best = int(cosines.argmax())
        assert centre(side, best) == (x, 0.25)
        assert cosines[best] == pytest.approx(1, abs=1e-5) and cosines.sort().values[-2] < 0.999


@pytest.mark.parametrize(("pitch", "low"), [(200, True), (6000, False)])
def test_low_pitches_are_at_the_bottom_of_the_spectrogram(
    model: Model, pitch: float, low: bool
) -> None:
    """Of a sound that is longer than the model hears."""
    tone = 0.5 * np.sin(2 * np.pi * pitch * np.arange(3 * HZ, dtype=np.float32) / HZ)
    shown = np.asarray(look(model, window(tone), SECOND).audio.shown).sum(2)
    half = len(shown) // 2
    assert (shown[half:].mean() > shown[:half].mean()) == low


def test_padding_after_a_short_sound_has_no_value_and_cannot_be_chosen(scene: Scene) -> None:
    values = scene.audio.cosines(scene.video.mean())
    starts = scene.audio.boxes[:, 0] * scene.seconds
    assert torch.equal(values.isnan(), starts > 0.98)  # 98 frames of 10 ms, in patches of 16
    grey = np.asarray(scene.audio.shown)[:, -1]
    assert (grey == grey[0]).all() and len(set(grey[0].tolist())) == 1
    with pytest.raises(ValueError, match="at 90% from the left"):
        scene.audio.around(0.9, 0.5)


def test_a_square_of_patches_ends_at_the_edge_and_at_padding(scene: Scene) -> None:
    def chosen(time: float, patches: int) -> list[list[int]]:
        return scene.audio.around(time / 12, 0.75, patches).reshape(2, 12).nonzero().tolist()

    assert chosen(2.5, 1) == [[0, 2]]  # low frequencies come first, and are shown below
    assert chosen(2.5, 3) == [[row, column] for row in (0, 1) for column in (1, 2, 3)]
    assert chosen(0.1, 3) == [[row, column] for row in (0, 1) for column in (0, 1)]
    assert chosen(6.5, 3) == [[row, column] for row in (0, 1) for column in (5, 6)]
    both = scene.audio.around(2.5 / 12, 0.75, 3)
    torch.testing.assert_close(
        scene.audio.mean(both), scene.audio.tokens.reshape(2, 12, -1)[:, 1:4].mean(dim=(0, 1))
    )


def test_a_frame_is_drawn_around_the_patches_that_are_chosen(scene: Scene) -> None:
    before = np.asarray(scene.video.shown)
    after = np.asarray(scene.video.outlined(scene.video.around(0.4, 0.25)))
    rows, columns = np.nonzero((before != after).any(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 127, 192, 319)
    assert (before[4:124, 196:316] == after[4:124, 196:316]).all()


def test_all_tokens_of_both_sides_give_the_score_of_a_search(model: Model, scene: Scene) -> None:
    expected = model.similarity((noise(1.0), HZ), Image.fromarray(WIDE))
    assert scene.cosine == pytest.approx(expected.item(), abs=1e-5)
    sound = scene.audio.mean()
    values = scene.video.cosines(sound)
    token = scene.video.tokens[3]
    assert values[3] == pytest.approx(
        (sound @ token / sound.norm() / token.norm()).item(), abs=1e-5
    )


def test_the_best_stretch_is_the_column_of_the_highest_mean(scene: Scene) -> None:
    values = torch.zeros(2, 12)
    values[0, 1], values[:, 4], values[:, 9:] = 1.0, 0.8, torch.nan
    assert scene.best_stretch(values.flatten()) == pytest.approx((0.64, 0.80))


def test_what_lacks_sound_or_picture_is_one_clear_line(model: Model) -> None:
    with pytest.raises(ValueError, match="there is no sound; choose a clip that has one"):
        look(model, window(frame=WIDE), SECOND)
    with pytest.raises(ValueError, match="there is no picture"):
        look(model, SECOND, window(noise(1.0)))
    with pytest.raises(ValueError, match="silent_audio"):
        look(model, window(np.zeros(HZ, np.float32)), SECOND)


def test_a_classifier_shows_where_as_well() -> None:
    model = Model(random_classifier(), CLASSIFIER, FinetuneConfig(model=MODEL))
    assert len(look(model, SECOND, SECOND).video.tokens) == MODEL.video_tokens
