"""From a packed frame to the model's input: resize, crop, normalise as torchvision and PIL do."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from cavmae.dataloaders.constants import IMAGE_MEAN, IMAGE_STD
from cavmae.dataloaders.loading.augment import center_crop, resize_and_crop
from cavmae.dataloaders.loading.dali import ClipDecoder
from cavmae.dataloaders.loading.reader import EncodedClip, ReadTask
from cavmae.dataloaders.media.audio_codec import encode_audio
from cavmae.dataloaders.media.decode_frame import FrameError, decode_frame
from cavmae.dataloaders.media.encode_video import VideoCodec, describe_fragments, encode_video
from cavmae.dataloaders.media.headers import HeaderError, payload_of
from cavmae.dataloaders.media.video_track import rgb_pixels

SOUND = encode_audio(np.zeros(1600, dtype=np.int16), "flac")


def clip_of(picture: bytes, height: int, width: int, image_size: int) -> EncodedClip:
    box = center_crop(height, width, image_size)
    task = ReadTask(position=0, epoch=0, shard=0, sample=0)
    return EncodedClip(task, "", (), SOUND, (picture,), None, box, False, (0.0,), (0.0, 0.1))


def through_loader(picture: bytes, size: tuple[int, int], image_size: int) -> np.ndarray:
    """A JPEG of (height, width) as the model gets it, in levels of 0 to 255, `(size, size, 3)`."""
    decoder = ClipDecoder(True, image_size, maximum_batch=1, threads=1, gpu=None)
    decoder.schedule([clip_of(picture, *size, image_size)])
    frame = decoder.collect().frames[0, 0].transpose(1, 2, 0)
    return 255 * (frame * np.array(IMAGE_STD) + np.array(IMAGE_MEAN))


def through_pil(picture: bytes, image_size: int) -> np.ndarray:
    """The same by torchvision's Resize and CenterCrop as they act on a PIL image."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    short = min(image.size)
    width, height = (image_size * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = round((height - image_size) / 2), round((width - image_size) / 2)
    image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image, dtype=np.float64)


def jpeg(height: int, width: int, noise: bool) -> bytes:
    row, column = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(column / 7 + row / 13), 255 * row / height, 255 * column / width]
    pixels = np.stack(waves, axis=-1)
    if noise:
        pixels[..., 2] = np.random.default_rng(0).integers(0, 256, (height, width))
    encoded = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


@pytest.mark.parametrize(
    ("height", "width", "image_size"),
    [
        pytest.param(256, 341, 224, id="landscape"),
        pytest.param(455, 256, 224, id="portrait"),
        pytest.param(256, 341, 64, id="much_smaller"),
        pytest.param(120, 161, 224, id="larger"),
        pytest.param(224, 224, 224, id="as_it_is"),
        pytest.param(225, 301, 224, id="odd_left_over"),
    ],
)
def test_resize_and_crop_equal_pil_within_2_levels(
    height: int, width: int, image_size: int
) -> None:
    picture = jpeg(height, width, noise=False)
    difference = through_loader(picture, (height, width), image_size) - through_pil(
        picture, image_size
    )
    assert np.abs(difference).max() < 2.01
    assert np.abs(difference).mean() < 0.35


def test_noise_is_filtered_as_pil_does_when_made_smaller() -> None:
    """Without the antialiasing filter this is 13 levels off on average."""
    picture = jpeg(256, 341, noise=True)
    difference = through_loader(picture, (256, 341), 64) - through_pil(picture, 64)
    assert np.abs(difference).max() < 12.01
    assert np.abs(difference).mean() < 0.5


@pytest.mark.parametrize(
    ("size", "resized", "start"),
    [
        ((256, 341), (224, 298), (0, 37)),
        ((341, 256), (298, 224), (37, 0)),
        ((256, 455), (224, 398), (0, 87)),
        ((225, 301), (224, 299), (0, 38)),  # torchvision rounds 37.5 to even
        ((224, 224), (224, 224), (0, 0)),
    ],
)
def test_sizes_and_crops_are_torchvisions(
    size: tuple[int, int], resized: tuple[int, int], start: tuple[int, int]
) -> None:
    ours, crop = resize_and_crop(*size, 224)
    assert ours == resized
    assert tuple(share * (side - 224) for share, side in zip(crop, ours, strict=True)) == start


@pytest.mark.golden
@pytest.mark.parametrize("clip", ["KlsG1EnBEjc_000361", "00W1lcxW-WU_40.000"])
@pytest.mark.parametrize("number", [0, 5])
def test_published_frames_come_out_as_published(
    golden_folder: Path, clip: str, number: int
) -> None:
    path = golden_folder / "preprocess" / f"{clip}_frame{number}.jpg"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    published = np.load(path.parent / f"{clip}_image.npz")[f"frame_{number}"].astype(np.float64)
    levels = 255 * (published.transpose(1, 2, 0) * np.array(IMAGE_STD) + np.array(IMAGE_MEAN))
    assert np.abs(through_loader(path.read_bytes(), (224, 224), 224) - levels).max() < 2


def gray_video(codec: VideoCodec, levels: list[int]) -> bytes:
    """A packed 90 x 64 video of gray frames."""
    frames = []
    for level in levels:
        planes = np.full((96, 90), 128, dtype=np.uint8)
        planes[:64] = round(16 + level * 219 / 255)
        frames.append(planes)
    return encode_video(frames, (90, 64), codec, 8.0)


def frame_of(video: bytes, index: int) -> bytes:
    """The header and one fragment."""
    sizes = describe_fragments(video)["bytes"]
    start = sum(sizes[: index + 1])
    return video[: sizes[0]] + video[start : start + sizes[index + 1]]


@pytest.mark.parametrize("codec", ["vp9", "h264", "mjpeg"])
def test_any_frame_of_a_packed_video_is_a_file_of_its_own(codec: VideoCodec) -> None:
    levels = list(range(20, 250, 20))
    video = gray_video(codec, levels)
    with av.open(io.BytesIO(video), "r") as container:
        whole = [rgb_pixels(frame, VideoReformatter()) for frame in container.decode(video=0)]
    assert len(whole) == len(levels) == len(describe_fragments(video)["bytes"]) - 1
    for index in (0, 5, len(levels) - 1):
        pixels = decode_frame(frame_of(video, index), 90, 64)
        assert abs(pixels.mean() - levels[index]) < 3
        assert np.array_equal(pixels, whole[index])
        assert pixels.flags.c_contiguous, "DALI takes no rows with gaps between them"


def test_dali_sees_the_same_in_one_frame_as_in_the_whole_video() -> None:
    video = gray_video("vp9", [30, 90, 150])
    decoder = ClipDecoder(False, 32, maximum_batch=3, threads=1, gpu=None)
    clips = [video, frame_of(video, 0), frame_of(video, 2)]
    decoder.schedule([clip_of(clip, 64, 90, 32) for clip in clips])
    whole, first, last = decoder.collect().frames
    assert np.array_equal(whole, first)
    mean, deviation = np.mean(IMAGE_MEAN), np.mean(IMAGE_STD)
    assert abs(255 * (float(last.mean()) * deviation + mean) - 150) < 3


def test_what_holds_no_jpeg_is_an_error() -> None:
    video = gray_video("mjpeg", [30])
    for damaged in (b"", b"no video", video[:-1], video[: describe_fragments(video)["bytes"][0]]):
        with pytest.raises(HeaderError, match="the file holds no frame"):
            payload_of(damaged)


def test_a_damaged_frame_is_an_error() -> None:
    frame = frame_of(gray_video("vp9", [30, 90, 150]), 0)
    with pytest.raises(FrameError, match="the frame cannot be decoded"):
        decode_frame(frame[: len(frame) // 3], 90, 64)


def test_what_is_no_packed_video_has_no_fragments() -> None:
    video = gray_video("vp9", [30, 90, 150])
    header = describe_fragments(video)["bytes"][0]
    for damaged in (video[:-1], video + b"\0", b"no video", video[:header]):
        with pytest.raises(ValueError, match="box"):
            describe_fragments(damaged)
