"""`cavmae search`: what is found is what cosines say, and a file is embedded as packing does it."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_run import save_untrained

from cavmae import cli
from cavmae.dataloaders.media.audio_codec import encode_audio
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.embeddings import search as search_module
from cavmae.trainer.embeddings.faiss_index import build_graph, nearest, nearest_by_graph
from cavmae.trainer.embeddings.search import SearchConfig, search


@pytest.fixture(scope="module")
def run_dir(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "run"
    save_untrained(packed_synthetic, folder)
    return folder


@pytest.fixture(scope="module")
def embeddings(run_dir: Path, packed_synthetic: Path) -> Path:
    out = run_dir.parent / "embeddings"
    assert cli.main(["embed", str(run_dir), str(packed_synthetic / "frames"), f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def video(packed_synthetic: Path) -> Path:
    """The file that clip 9 was packed from."""
    return packed_synthetic.parent / "videos" / "000009.mp4"


@pytest.fixture(scope="module")
def sound(packed_synthetic: Path) -> Path:
    """The sound of clip 9 as it was packed."""
    path = packed_synthetic.parent / "sound.flac"
    path.write_bytes(ShardSet(packed_synthetic / "frames").member(1, 1, "flac"))
    return path


@pytest.fixture(scope="module")
def picture(video: Path) -> Path:
    path = video.parent.parent / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def unit(folder: Path, column: str) -> torch.Tensor:
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    values = torch.tensor(pa.concat_tables(tables)[column].to_pylist())
    return torch.nn.functional.normalize(values, dim=1)


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["search", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    return error


def test_a_sound_finds_videos_and_a_picture_sounds_by_cosine(embeddings: Path) -> None:
    found = search(SearchConfig(str(embeddings), "000001/000000009", top=5))
    audio, video = unit(embeddings, "audio_embedding"), unit(embeddings, "video_embedding")
    for kind, cosines in (("video", video @ audio[9]), ("sound", audio @ video[9])):
        expected = cosines.topk(5)
        assert [clip["position"] for clip in found[kind]] == expected.indices.tolist()
        scores = [clip["score"] for clip in found[kind]]
        assert scores == pytest.approx(expected.values.tolist(), abs=1e-5)
        assert [clip["rank"] for clip in found[kind]] == [1, 2, 3, 4, 5]


def test_a_sound_file_hears_what_the_video_of_it_does(
    embeddings: Path, video: Path, sound: Path
) -> None:
    by_video, by_sound = (
        search(SearchConfig(str(embeddings), str(path), wanted="video")) for path in (video, sound)
    )
    assert [clip["position"] for clip in by_video["video"]] == [
        clip["position"] for clip in by_sound["video"]
    ]


def test_a_file_finds_what_it_can(
    embeddings: Path, video: Path, sound: Path, picture: Path
) -> None:
    for path, kinds in (
        (video, ["video", "sound"]),
        (sound, ["video"]),
        (picture, ["sound"]),
    ):
        assert list(search(SearchConfig(str(embeddings), str(path)))) == kinds


def test_a_graph_finds_what_exact_search_does(tmp_path: Path) -> None:
    """Recall among the first ten, of 5,000 vectors in clusters that overlap."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((100, 64))
    some = centres[random.integers(100, size=5100)] + random.standard_normal((5100, 64))
    some = (some / np.linalg.norm(some, axis=1, keepdims=True)).astype(np.float32)
    vectors, queries = np.split(some, [5000])
    pieces = np.array_split(vectors, 7)
    build_graph(pieces, 64, tmp_path / "index" / "graph")
    shared = 0
    for query in queries:
        exact = nearest(pieces, query, 10)
        cosines = vectors @ query
        assert [row for row, _ in exact] == np.argsort(-cosines)[:10].tolist()
        by_graph = nearest_by_graph(tmp_path / "index" / "graph", query, 10)
        shared += len({row for row, _ in exact} & {row for row, _ in by_graph})
        assert all(abs(cosines[row] - cosine) < 1e-3 for row, cosine in by_graph)
    assert shared / (10 * len(queries)) > 0.98


def test_above_some_size_a_graph_is_built_once_and_answers(
    embeddings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = SearchConfig(str(embeddings), "000000/000000003", wanted="video", top=4)
    exact = search(asked)["video"]
    monkeypatch.setattr(search_module, "EXACT_ROWS", 23)
    for built in (1, 0):
        found = search(asked)["video"]
        assert [clip["position"] for clip in found] == [clip["position"] for clip in exact]
        assert capsys.readouterr().err.count("building") == built
    (graph,) = embeddings.glob("index-*/video_embedding.hnsw")
    graph.write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"damaged; remove .*, and it is built again"):
        search(asked)
    shutil.rmtree(graph.parent)


def with_copies(random: np.random.Generator, noise: float) -> np.ndarray:
    """300 different vectors and 2,000 of one, which differ by `noise`: (2300, 192), of length 1."""
    different = random.standard_normal((300, 192))
    copies = random.standard_normal(192) + noise * random.standard_normal((2000, 192))
    some = np.concatenate([different, copies]).astype(np.float32)
    return some / np.linalg.norm(some, axis=1, keepdims=True)


@pytest.mark.field
def test_equal_vectors_do_not_cut_the_others_off(tmp_path: Path) -> None:
    vectors = with_copies(np.random.default_rng(0), noise=1e-7)
    build_graph(np.array_split(vectors, 3), 192, tmp_path / "index" / "graph")
    record = json.loads((tmp_path / "index" / "graph.json").read_text())
    assert record == {"rows": 2300, "nodes": 301, "recall_at_10": 1.0}
    for row in range(0, 300, 10):
        exact = nearest([vectors], vectors[row], 10)
        found = nearest_by_graph(tmp_path / "index" / "graph", vectors[row], 10)
        assert found[0][0] == row
        assert [cosine for _, cosine in found] == pytest.approx([c for _, c in exact], abs=2e-3)
    copies = nearest_by_graph(tmp_path / "index" / "graph", vectors[700], 15)
    assert len(copies) == 15 and all(row >= 300 for row, _ in copies)


@pytest.mark.field
def test_a_graph_that_finds_too_little_says_so_and_is_not_used(
    embeddings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = SearchConfig(str(embeddings), "000000/000000003", wanted="sound", index="hnsw")
    monkeypatch.setattr(search_module, "LEAST_RECALL", 1.01)
    found = search(asked)
    assert "finds 100.0% of the ten nearest, below 101%: all clips" in capsys.readouterr().err
    assert found == search(dataclasses.replace(asked, index="exact"))


def test_the_recall_of_a_graph_is_measured(tmp_path: Path) -> None:
    vectors = with_copies(np.random.default_rng(0), noise=1e-4)  # they link to each other alone
    build_graph([vectors], 192, tmp_path / "index" / "graph")
    recall = json.loads((tmp_path / "index" / "graph.json").read_text())["recall_at_10"]
    assert 0.5 < recall < search_module.LEAST_RECALL


def test_the_result_is_written_as_json_or_as_a_sheet(
    embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", str(embeddings), "000002/000000020", "--top=2"]
    for name in ("found.json", "found.html", "found.png"):
        assert cli.main([*words, f"--out={tmp_path / name}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    page = (tmp_path / "found.html").read_text()
    shown = capsys.readouterr().out
    for clip in (*found["video"], *found["sound"]):
        assert clip["sample_id"] in page and clip["sample_id"] in shown
    assert Image.open(tmp_path / "found.png").format == "PNG"


def test_in_a_pipe_a_clip_is_a_line_and_json_is_all_of_it(
    embeddings: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["search", str(embeddings), "000001/000000009", "--top=3"]
    assert cli.main(words) == 0
    header, *lines = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert len(lines) == 6 and {len(line) for line in lines} == {len(header)}
    assert cli.main([*words, "--json", f"--out={tmp_path / 'found.json'}"]) == 0
    found = json.loads(capsys.readouterr().out)
    clips = [(kind, clip) for kind in ("video", "sound") for clip in found[kind]]
    for line, (kind, clip) in zip(lines, clips, strict=True):
        shown = dict(zip(header, line, strict=True))
        assert (shown["found"], shown["source"]) == (kind, clip["source_path"])
        assert shown["sample id"] == clip["sample_id"]
        assert float(shown["score"]) == pytest.approx(clip["score"], abs=5e-4)


def test_what_can_not_be_a_query_is_one_line(
    embeddings: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(embeddings)
    assert "is no file, and no clip" in error_of(capsys, folder, "000009/000000009")
    assert "is no file, and no clip" in error_of(capsys, folder, "000001/000000001")
    assert "has no sound, by which a video is found" in error_of(
        capsys, folder, str(picture), "--for=video"
    )
    (tmp_path / "text").write_text("nothing to see or hear")
    assert "can't be used (open_failed" in error_of(capsys, folder, str(tmp_path / "text"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:200])
    assert "can't be used: image file is truncated" in error_of(capsys, folder, str(broken))
    silent = tmp_path / "silent.wav"
    silent.write_bytes(encode_audio(np.zeros(16000, np.int16), "wav"))
    assert "silent_audio" in error_of(capsys, folder, str(silent))


def test_embeddings_that_can_not_be_searched_are_one_line(
    embeddings: Path,
    run_dir: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "has no origin.json" in error_of(capsys, str(run_dir), str(picture))
    words = (str(embeddings), str(picture), "--run=moved")
    assert "run moved, which must embed the query, does not exist" in error_of(capsys, *words)
    other_run = tmp_path / "other"
    shutil.copytree(run_dir, other_run)
    torch.save(
        torch.load(run_dir / "weights.pt") | {"extra": torch.ones(1)}, other_run / "weights.pt"
    )
    words = (str(picture), f"--run={other_run}")
    assert "has other weights" in error_of(capsys, str(embeddings), *words)
    copy = tmp_path / "copy"
    shutil.copytree(embeddings, copy)
    file = copy / "000001.parquet"
    table = pq.read_table(file)
    values = table["audio_embedding"].to_pylist()
    values[2][0] = float("nan")
    place = table.schema.get_field_index("audio_embedding")
    field = table.schema.field("audio_embedding")
    table = table.set_column(place, field, [pa.array(values, field.type)])
    note = {b"cavmae": pq.read_metadata(file).metadata[b"cavmae"]}
    pq.write_table(table.replace_schema_metadata(note), file)
    error = error_of(capsys, str(copy), str(picture))
    assert "audio_embedding of 000001/000000010 in" in error and "is not finite" in error
    file.write_bytes(b"PAR1")
    assert "000001.parquet can't be used" in error_of(capsys, str(copy), str(picture))
    description = json.loads((copy / "embeddings.json").read_text())
    description["files"] = [{"name": "000000.parquet", "rows": 0}]
    (copy / "embeddings.json").write_text(json.dumps(description))
    assert "which has no clip" in error_of(capsys, str(copy), str(picture))
    (copy / "embeddings.json").unlink()
    assert "is not complete" in error_of(capsys, str(copy), str(picture))
