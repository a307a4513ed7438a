"""`cavmae.load`: the same values as the commands on packed sets, from files and arrays."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_models import (
    CLASSIFIER,
    PRETRAINING,
    SOUND_CLASSIFIER,
    random_classifier,
    random_pretraining_model,
)
from tiny_run import MODEL, save_untrained, save_untrained_classifier

import cavmae
from cavmae import cli
from cavmae.dataloaders.media.audio_codec import encode_audio
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.evaluation.clip_outputs import embed
from cavmae.trainer.inference import model as model_module
from cavmae.trainer.inference.media import Medium, Window
from cavmae.trainer.inference.model import Model
from cavmae.trainer.release.hub import hub_model
from cavmae.trainer.release.model_spec import ModelSpec

CLIP = "000001/000000009"


@pytest.fixture(scope="module")
def run_dir(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "run"
    save_untrained(packed_synthetic, folder)
    return folder


@pytest.fixture(scope="module")
def model(run_dir: Path) -> Model:
    return cavmae.load(run_dir, batch=3)


@pytest.fixture(scope="module")
def classifier(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "fine-tuned"
    save_untrained_classifier(packed_synthetic, folder)
    return folder


@pytest.fixture(scope="module")
def video(packed_synthetic: Path) -> Path:
    """The file that clip 9 was packed from."""
    return packed_synthetic.parent / "videos" / "000009.mp4"


def cosine(a: torch.Tensor | None, b: torch.Tensor) -> float:
    assert a is not None
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, cavmae; assert 'torch' not in sys.modules; cavmae.load; import torch"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        cavmae.lode  # noqa: B018


@pytest.mark.parametrize("tier", ["frames", "video"])
def test_a_file_has_the_embeddings_of_its_packed_clip(
    model: Model, run_dir: Path, packed_synthetic: Path, video: Path, tier: str
) -> None:
    """The frames of a tier have been encoded anew; the sound is the same to the bit."""
    packed = embed(model.network, model.config, str(packed_synthetic / tier), clips=10, batch=4)
    found = model.embed(str(video))
    assert cosine(found.video, packed.values["video"][9]) > 0.99
    others = torch.tensor([cosine(found.video, one) for one in packed.values["video"]])
    assert others.argmax() == 9 and others[:9].max() < 0.99, "the model tells clips apart"
    torch.testing.assert_close(found.audio, packed.values["audio"][9], rtol=1e-5, atol=1e-5)


def test_decoded_arrays_have_the_embeddings_of_the_set(
    model: Model, packed_synthetic: Path, tmp_path: Path
) -> None:
    """Sound and picture of a packed clip, handed over as a user would."""
    shards = ShardSet(packed_synthetic / "frames")
    packed = embed(model.network, model.config, str(packed_synthetic / "frames"), clips=10, batch=4)
    (tmp_path / "sound.flac").write_bytes(shards.member(1, 1, "flac"))
    (tmp_path / "frame.jpg").write_bytes(shards.member(1, 1, "5.jpg"))
    by_path = model.embed([str(tmp_path / "sound.flac"), str(tmp_path / "frame.jpg")])
    torch.testing.assert_close(by_path[0].audio, packed.values["audio"][9], rtol=1e-5, atol=1e-5)
    assert by_path[0].video is None and by_path[1].audio is None
    with Image.open(tmp_path / "frame.jpg") as picture:
        assert model.embed(picture).video is not None
    # Pillow's JPEG decoder and DALI's differ by a level.
    assert cosine(by_path[1].video, packed.values["video"][9]) > 0.9999


def test_long_sounds_are_cut_into_windows_and_short_ones_padded(model: Model) -> None:
    random = np.random.default_rng(0)
    seconds = model.window_seconds
    waveform = (0.1 * random.standard_normal(round(3.5 * seconds * 16000))).astype(np.float32)
    found = model.embed((waveform, 16000), windows=True)
    assert found.audio is not None and found.audio.shape == (4, MODEL.width)
    assert found.audio_seconds[:, 0].tolist() == pytest.approx(
        [0, seconds, 2 * seconds, 2.5 * seconds]
    )
    first = model.embed((waveform[: round(seconds * 16000)], 16000))
    torch.testing.assert_close(found.audio[0], first.audio)
    whole = model.embed((waveform, 16000))
    torch.testing.assert_close(whole.audio, found.audio.mean(0))
    short = model.embed((waveform[:9000], 16000))
    assert short.audio is not None and short.audio_seconds.tolist() == [[0.0, 0.5625]]


def test_no_medium_changes_another(model: Model, video: Path, tmp_path: Path) -> None:
    """Windows of several media share batches of three."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    noise = 0.1 * np.random.default_rng(1).standard_normal(16000 * 3)
    media = [str(video), (noise, 16000), str(tmp_path / "red.png"), str(video)]
    together = model.embed(media, windows=True)
    for one, medium in zip(together, media, strict=True):
        alone = model.embed(medium, windows=True)
        for name in ("audio", "video"):
            a, b = getattr(one, name), getattr(alone, name)
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[0].audio, together[3].audio)


def test_a_medium_that_fails_late_takes_its_windows_with_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows of it are in a batch of three when it fails."""
    cut = model_module.windows_of

    def fails(medium: Medium, *how: Any) -> Iterator[Window]:
        yield from cut(medium, *how)
        if medium is late:
            raise ValueError("it is silent")

    monkeypatch.setattr(model_module, "windows_of", fails)
    late, good = (
        (np.sin(np.arange(round(16000 * seconds)) / 9), 16000)
        for seconds in (1.9 * model.window_seconds, 1.0)
    )
    failed: list[tuple[int, str]] = []
    each = model.embed_each([late, good], failed=lambda n, error: failed.append((n, str(error))))
    ((number, found),) = each
    assert number == 1 and failed == [(0, "it is silent")]
    torch.testing.assert_close(found.audio, model.embed(good).audio)


def test_tokens_average_to_the_embedding_and_have_places(model: Model, video: Path) -> None:
    found = model.embed(str(video), windows=True, tokens=True)
    for vectors, tokens, count in (
        (found.audio, found.audio_tokens, MODEL.audio_tokens),
        (found.video, found.video_tokens, MODEL.video_tokens),
    ):
        assert tokens is not None and vectors is not None
        assert tokens.values.shape == (len(vectors), count, MODEL.width)
        assert tokens.places.shape == (len(vectors), count, 4)
        torch.testing.assert_close(tokens.values.mean(1), vectors)
    assert found.audio_tokens is not None and found.video_tokens is not None
    sound, picture = found.audio_tokens.places[0], found.video_tokens.places[0]
    assert sound[0].tolist() == pytest.approx([0, 0.16, 0, 16])
    assert sound[1].tolist() == pytest.approx([0.16, 0.32, 0, 16])
    left, top, right, bottom = picture.T
    assert left.min() + right.max() == pytest.approx(1) and top.min() == pytest.approx(0)
    assert bottom.max() == pytest.approx(1) and (right > left).all() and (bottom > top).all()


def test_similarity_compares_sound_with_picture(model: Model, video: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    noise = (0.1 * np.random.default_rng(1).standard_normal(16000), 16000)
    clip, red, sound = model.embed([str(video), str(tmp_path / "red.png"), noise])
    found = model.similarity([str(video), noise], [str(tmp_path / "red.png")])
    assert found.shape == (2, 1) and red.video is not None
    assert found[0, 0].item() == pytest.approx(cosine(clip.audio, red.video), abs=1e-6)
    assert found[1, 0].item() == pytest.approx(cosine(sound.audio, red.video), abs=1e-6)
    assert model.similarity(red, noise).item() == pytest.approx(found[1, 0].item(), abs=1e-6)
    assert model.similarity(clip, red, ("video", "video")).item() == pytest.approx(
        cosine(clip.video, red.video), abs=1e-6
    )
    with pytest.raises(ValueError, match="the sides have no audio in a and audio in b"):
        model.similarity(red, noise, ("audio", "audio"))


def test_half_precision_is_close(run_dir: Path, model: Model, video: Path) -> None:
    found = cavmae.load(run_dir, dtype="bfloat16").embed(str(video))
    exact = model.embed(str(video))
    assert found.audio is not None and found.audio.dtype == torch.float32
    assert exact.audio is not None and cosine(found.audio, exact.audio) > 0.99
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        cavmae.load(run_dir, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device is tpu:9, which can't be used"):
        cavmae.load(run_dir, device="tpu:9")


def test_classes_have_names_and_probabilities(classifier: Path, video: Path) -> None:
    model = cavmae.load(classifier)
    found = model.classify(str(video))
    assert found.scores.sum().item() == pytest.approx(1)  # trained with cross_entropy
    (label, score), *_ = found.top(3)
    assert label in found.labels and score == pytest.approx(found.scores.max().item())
    sound, windows = (0.1 * np.random.default_rng(0).standard_normal(16000 * 9), 16000), 0
    alone = model.classify(sound, windows=True)
    windows = len(alone.seconds)
    assert windows > 1 and alone.scores.shape == (windows, len(alone.labels))
    torch.testing.assert_close(model.classify(sound).scores, alone.scores.mean(0))
    assert model.embed(str(video)).audio is not None
    weights = classifier / "weights.pt"
    for loss, total in (("cross_entropy", 1.0), ("bce", found.logits.sigmoid().sum().item())):
        one = cavmae.load(weights, sizes=MODEL, loss=loss)  # type: ignore[arg-type]
        assert one.classify(str(video)).scores.sum().item() == pytest.approx(total)


def test_a_model_of_one_modality_says_what_it_lacks(video: Path, tmp_path: Path) -> None:
    hub_model(random_classifier(video=False), SOUND_CLASSIFIER).save_pretrained(tmp_path)
    model = cavmae.load(tmp_path)
    sound = (np.sin(np.arange(16000)).astype(np.float32), 16000)
    by_sound, by_video = model.classify([sound, str(video)])  # of the video its sound alone
    assert by_sound.scores.shape == by_video.scores.shape
    picture = Image.new("RGB", (64, 48))
    with pytest.raises(ValueError, match="a picture of 64 x 48 pixels has no sound, and this"):
        model.classify(picture)
    with pytest.raises(ValueError, match="has no sound, and this model was trained on audio alone"):
        model.embed(picture)
    assert model.embed((np.sin(np.arange(16000)), 16000)).video is None
    with pytest.raises(ValueError, match="this model has no decoder"):
        model.reconstruct(picture)


def test_a_video_is_reconstructed_as_the_command_does(
    model: Model, video: Path, tmp_path: Path
) -> None:
    made = model.reconstruct(str(video), audio_ratio=0.5, video_ratio=0.75)
    errors = made.errors()
    assert errors["audio"] is not None and errors["video"] is not None
    assert made.filled_frame.shape == (1, 3, MODEL.image_size, MODEL.image_size)
    made.save(tmp_path / "out", iterations=2)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "reconstruction.png",
        "reconstruction-original.wav",
        "reconstruction-reconstructed.wav",
    }
    with pytest.raises(ValueError, match="has no sound; give a video with sound"):
        model.reconstruct(Image.new("RGB", (64, 48)))
    with pytest.raises(ValueError, match=r"video_ratio is 0\.5 and direction audio-to-video"):
        model.reconstruct(str(video), direction="audio-to-video", video_ratio=0.5)


def test_a_model_is_the_same_wherever_it_is_loaded_from(
    model: Model, run_dir: Path, video: Path, tmp_path: Path
) -> None:
    assert (
        cli.main(
            ["export", str(run_dir), str(tmp_path / "exported"), "--format", "hub", "published"]
        )
        == 0
    )
    expected = model.embed(str(video))
    for found in (
        cavmae.load(tmp_path / "exported"),
        cavmae.load(tmp_path / "exported/published.pth", sizes=MODEL),
        cavmae.load(run_dir / "weights.pt", sizes=MODEL),
    ):
        made = found.embed(str(video))
        torch.testing.assert_close(made.audio, expected.audio)
        torch.testing.assert_close(made.video, expected.video)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not weights")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        cavmae.load(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder \./runs/missing"):
        cavmae.load("./runs/missing")
    with pytest.raises(ValueError, match=r"which has no config\.json"):
        cavmae.load(tmp_path)


@pytest.mark.parametrize(
    "spec",
    [PRETRAINING, CLASSIFIER, SOUND_CLASSIFIER, replace(CLASSIFIER, mode="videoonly")],
    ids=lambda spec: spec.mode or "pretraining",
)
def test_the_code_on_a_models_card_runs(
    spec: ModelSpec,
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classifier = random_classifier(video=spec.video)
    hub_model(classifier if spec.mode else random_pretraining_model(), spec).save_pretrained(
        tmp_path
    )
    (tmp_path / "clip.mp4").symlink_to(video)
    monkeypatch.chdir(tmp_path)
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 6
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["found"]


def test_files_are_embedded_without_packing(
    model: Model, run_dir: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "media"
    (folder / ".hidden").mkdir(parents=True)
    (folder / ".hidden/x").write_bytes(b"x")
    (folder / "clip.mp4").symlink_to(video)
    (folder / "notes.txt").write_text("no sound")
    Image.new("RGB", (64, 48), "red").save(folder / "red.png")
    waveform = 8000 * np.sin(np.arange(round(16000 * 2.5 * model.window_seconds)) / 9)
    (folder / "long.wav").write_bytes(encode_audio(waveform.astype(np.int16), "wav"))
    out = tmp_path / "made/out.parquet"
    words = ["embed", str(run_dir), str(folder), str(video), f"--out={out}"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "4 files, 4 rows; 1 skipped" in said.out and f"skipped: {folder}/notes.txt" in said.err
    table = pq.read_table(out)
    names = ["clip.mp4", "long.wav", "red.png"]
    assert table["path"].to_pylist() == [*(f"{folder}/{name}" for name in names), str(video)]
    expected = model.embed(str(video))
    assert expected.audio is not None
    found = table["audio_embedding"][0].as_py()
    np.testing.assert_allclose(found, expected.audio.numpy(), rtol=1e-5)
    assert table["audio_embedding"][2].as_py() is None
    skipped = json.loads((pq.read_metadata(out).metadata or {})[b"cavmae"])["skipped"]
    assert [name for name, _ in skipped] == [f"{folder}/notes.txt"]
    assert cli.main([*words, "--windows"]) == 0
    assert pq.read_table(out)["path"].to_pylist().count(f"{folder}/long.wav") == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out=folder"], "is no packed set, which would have an index.json"),
        (["--out=a.parquet", "--frames=10"], "frames is 10, which is of packed sets"),
        (["--out=a.parquet", "--workers=2"], "workers is set, which is of packed sets"),
        (["--out=a.parquet"], "none of 1 files can be used"),
    ],
)
def test_files_that_cannot_be_embedded_are_one_error(
    run_dir: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("no sound")
    try:
        assert cli.main(["embed", str(run_dir), "notes.txt", *words]) == 1
    except SystemExit as end:  # fields that contradict each other
        assert end.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("a.parquet").exists()


def test_files_are_classified_from_a_list(
    classifier: Path,
    video: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound = tmp_path / "a sound.wav"
    waveform = 8000 * np.sin(np.arange(16000 * 2) / 9)
    sound.write_bytes(encode_audio(waveform.astype(np.int16), "wav"))
    (tmp_path / "list").write_text(f"{sound}\n{video}\n{tmp_path}/missing.wav\n")
    with (tmp_path / "list").open() as listed:
        monkeypatch.setattr(sys, "stdin", listed)
        words = ["classify", str(classifier), "-", "--top=2", f"--out={tmp_path}/out.csv"]
        assert cli.main(words) == 0
    said = capsys.readouterr()
    rows = [line.split("\t") for line in said.out.splitlines()]
    assert [name for name, _, _ in rows] == [str(sound)] * 2 + [str(video)] * 2
    assert "missing.wav" in said.err and "2 files, 1 skipped" in said.err
    table = (tmp_path / "out.csv").read_text().splitlines()
    assert len(table) == 3 and table[0].startswith("path,")
