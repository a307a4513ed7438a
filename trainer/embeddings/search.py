"""`cavmae search EMBEDDINGS QUERY`: find videos by a sound, and sounds by a frame.

The query is a media file, which the run's model embeds, or a clip of the set.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from cavmae.atomic_write import read_json, write_json
from cavmae.console import JsonOption, counted, print_json, print_rows
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.tools.inspect import card_of, write_sheet
from cavmae.field_checks import CheckedFields, PositiveInt
from cavmae.trainer.embeddings.faiss_index import Ranked, build_graph, nearest, nearest_by_graph
from cavmae.trainer.embeddings.parquet_store import VECTORS, EmbeddingSet
from cavmae.trainer.evaluation.trained_run import AnyRun, open_trained_pair
from cavmae.trainer.inference.load import of_run

FOUND_BY = {"video": "sound", "sound": "picture"}
"""What is found, and the part of the query that it is found by."""
EXACT_ROWS = 1_000_000
"""Most clips for which `auto` is exact: 3 GB are read for a query at width 768."""
LEAST_RECALL = 0.98
"""A graph that finds less of what exact search does is not used."""
COLUMNS = {"video": "video_embedding", "sound": "audio_embedding", "picture": "video_embedding"}


@dataclass(frozen=True)
class SearchConfig(CheckedFields, JsonOption):
    """Rank the clips of EMBEDDINGS for a query: videos by its sound, sounds by its picture.

    Raises:
        ValueError: a field out of its range.
    """

    embeddings: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="EMBEDDINGS")]
    """Folder that `cavmae embed` wrote."""
    query: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]
    """A sound, picture or video file; or a sample id of the set, such as 000003/000003017."""
    top: PositiveInt = 10
    """Clips that are listed."""
    wanted: Annotated[Literal["all", "video", "sound"], tyro.conf.arg(name="for")] = "all"
    """What to find: videos, by the query's sound; sounds, by its picture; all: what it can find."""
    index: Literal["auto", "exact", "hnsw"] = "auto"
    """`exact` compares with every clip; `hnsw` with some, by a graph that is built once; `auto`:
    exact up to a million clips, hnsw above."""
    run: str = ""
    """Folder of the run that made the embeddings; empty: where it was at that time."""
    out: str = ""
    """Also write the result: .json, or a sheet of the clips found as .html or .png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out and Path(self.out).suffix not in (".json", ".html", ".png"):
            raise ValueError(f"out is {self.out!r}; use a name that ends in .json, .html or .png")


def search(config: SearchConfig) -> dict[str, list[dict[str, Any]]]:
    """Find clips, best first, as `video` and as `sound`.

    Raises:
        ValueError: embeddings, run or query can't be used, or do not go together.
        OSError: a file can't be read.
    """
    embeddings = EmbeddingSet(config.embeddings)
    check_both(embeddings)
    query = query_embeddings(config, embeddings)
    kinds = [
        kind
        for kind in FOUND_BY
        if config.wanted in ("all", kind) and COLUMNS[FOUND_BY[kind]] in query
    ]
    if not kinds:
        raise ValueError(
            f"query {config.query} has no {FOUND_BY[config.wanted]}, by which a {config.wanted} is "
            "found; give a file that has one, or omit --for"
        )
    found = {}
    for kind in kinds:
        vector = query[COLUMNS[FOUND_BY[kind]]]
        ranked = _ranked(config, embeddings, kind, vector)
        clips = embeddings.clips([row for row, _ in ranked])
        found[kind] = [
            {"rank": rank, "score": score, **clip}
            for rank, ((_, score), clip) in enumerate(zip(ranked, clips, strict=True), start=1)
        ]
    return found


def check_both(embeddings: EmbeddingSet) -> None:
    """Check that clips are found by the other modality.

    Raises:
        ValueError: the embeddings are of one.
    """
    if len(embeddings.vectors) < len(VECTORS):
        raise ValueError(
            f"embeddings is {embeddings.folder}, which has {embeddings.vectors[0]} alone, and "
            "videos are found by sound, sounds by a picture; give embeddings of both"
        )


def run_of(embeddings: EmbeddingSet, folder: str) -> AnyRun:
    """Open the run that made embeddings.

    Raises:
        ValueError: another run is in the folder, or none.
        OSError: a file can't be read.
    """
    run = open_trained_pair(folder)
    if run.weights_sha256 != embeddings.origin.weights_sha256:
        raise ValueError(
            f"run {run.folder} has other weights ({run.weights_sha256[:12]}) than those that made "
            f"{embeddings.folder} ({embeddings.origin.weights_sha256[:12]}); give that run's folder"
        )
    return run


def _ranked(config: SearchConfig, embeddings: EmbeddingSet, kind: str, query: np.ndarray) -> Ranked:
    """Rank the rows of the embeddings by the cosine of what is found with the query."""
    length = np.linalg.norm(query)
    if not np.isfinite(length) or length == 0:
        raise ValueError(
            f"the embedding of query {config.query} is not finite, or all zeros; look at the query "
            "or at the weights"
        )
    unit, top, column = query / length, min(config.top, embeddings.rows), COLUMNS[kind]
    if config.index == "exact" or (config.index == "auto" and embeddings.rows <= EXACT_ROWS):
        return nearest(embeddings.unit_vectors(column), unit, top)
    graph = embeddings.beside(f"{column}.hnsw")
    record = graph.with_suffix(".json")
    if not record.exists():
        print(f"building {graph} of {embeddings.rows} clips, once", file=sys.stderr, flush=True)
        queries = embeddings.unit_vectors(COLUMNS[FOUND_BY[kind]])
        vectors = counted(
            embeddings.unit_vectors(column), "indexing", embeddings.rows, "clips", len
        )
        build_graph(vectors, embeddings.origin.width, graph, queries)
    recall = read_json(record)["recall_at_10"]
    if recall < LEAST_RECALL:
        print(
            f"{graph} finds {recall:.1%} of the ten nearest, below {LEAST_RECALL:.0%}: all clips "
            "are compared instead, as with --index exact",
            file=sys.stderr,
        )
        return nearest(embeddings.unit_vectors(column), unit, top)
    return nearest_by_graph(graph, unit, top)


def query_embeddings(config: SearchConfig, embeddings: EmbeddingSet) -> dict[str, np.ndarray]:
    """Embed the query: `audio_embedding` and `video_embedding`, (width,) float32, if it has them.

    Raises:
        ValueError: the query can't be used, or the run is not that of the embeddings.
        OSError: a file can't be read.
    """
    if not Path(config.query).is_file():
        return embeddings.vectors_of(config.query)
    folder = config.run or embeddings.description["run"]
    if not Path(folder).is_dir():
        raise ValueError(
            f"run {folder}, which must embed the query, does not exist; give its folder by --run, "
            "or a sample id as the query"
        )
    run = run_of(embeddings, folder)
    found = of_run(run).embed(config.query, windows=False)
    sides = {"audio_embedding": found.audio, "video_embedding": found.video}
    return {column: vector.numpy() for column, vector in sides.items() if vector is not None}


def write_result(config: SearchConfig, found: dict[str, list[dict[str, Any]]]) -> None:
    """Write what was found to `config.out`.

    Raises:
        ValueError: the shards have changed, so no sheet can be made.
        OSError: a file can't be read or written.
    """
    embeddings = EmbeddingSet(config.embeddings)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".json":
        origin = dataclasses.asdict(embeddings.origin)
        write_json(out, {"options": dataclasses.asdict(config), "origin": origin, "found": found})
        return
    shards = ShardSet(embeddings.description["shards"])
    if shards.fingerprint != embeddings.origin.shards_fingerprint:
        raise ValueError(
            f"shards {shards.folder} have changed since {config.embeddings} was made; embed them "
            "again, or write the result as .json"
        )
    cards = []
    for kind, clips in found.items():
        for clip in clips:
            card = card_of(shards, *shards.at(clip["position"]))
            name = f"{kind} {clip['rank']}, score {clip['score']:.3f}: {card.sample_id}"
            cards.append(dataclasses.replace(card, sample_id=name))
    write_sheet(out, f"found by {config.query}", cards)


_COLUMNS = ("found", "rank", "score", "sample id", "source", "start", "seconds", "labels")


def _rows(found: dict[str, list[dict[str, Any]]]) -> list[tuple[object, ...]]:
    return [
        (
            kind,
            clip["rank"],
            f"{clip['score']:.3f}",
            clip["sample_id"],
            clip["source_path"],
            f"{clip['source_start_seconds']:g}",
            f"{clip['seconds']:.1f}",
            ", ".join(clip["labels"]),
        )
        for kind, clips in found.items()
        for clip in clips
    ]


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    config = tyro.cli(SearchConfig, prog="cavmae search", args=arguments)
    found = search(config)
    if config.json:
        print_json(found)
    else:
        print_rows(_COLUMNS, _rows(found), paths=("source",), whole=("sample id",))
    if config.out:
        write_result(config, found)
        print(f"result: {config.out}", file=sys.stderr)
    return 0
