"""`cavmae embed RUN INPUT... --out OUT`: embeddings of a packed set, or of files.

Of a packed set one Parquet file for each shard, written atomically: a killed command resumes at the
shards without one, in any number of processes. Batches end with their shard, so no file depends on
another.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from cavmae.atomic_write import write_json
from cavmae.console import Bar
from cavmae.dataloaders.shards.shard_set import ShardSet, looks_packed
from cavmae.dataloaders.shards.storage import real_place
from cavmae.field_checks import CheckedFields, Fraction, PositiveInt
from cavmae.trainer.embeddings.parquet_store import (
    DESCRIPTION,
    Origin,
    as_table,
    claimed,
    file_account,
    file_name,
    write_file,
)
from cavmae.trainer.evaluation.clip_outputs import embedding, output_batches, whole_clips
from cavmae.trainer.evaluation.trained_run import (
    AnyRun,
    embedded_modality,
    open_trained,
    provenance,
)
from cavmae.trainer.inference.embed import embed_files
from cavmae.trainer.model.encoder import AudioVideoEncoder


@dataclass(frozen=True)
class EmbedConfig(CheckedFields):
    """Embed the sound and the frames of every clip of a packed set, or of files. Of a set or a run
    of one modality that one is embedded, and the other is not read.

    Rerun the same command to resume the embedding of a set after an interruption.

    Raises:
        ValueError: a field out of its range.
    """

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a trained run. For files also a folder that was exported, the name of a model on
    the Hub, or a file of published weights."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """One tier of packed shards, a folder or a URL. Or files: paths and URLs of videos, sounds and
    pictures; folders of them; `-`: one in each line of standard input."""
    out: str
    """Of a packed set: folder for one file for each shard; new, empty, or of an interrupted run of
    the same command. Of files: a .parquet file."""
    windows: bool = False
    """A row for each window of a file, instead of the mean."""
    frames: Literal[1, 10] = 1
    """Frames of each clip of a packed set: the middle one, or also each of the ten by itself."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of stored embeddings; they are computed in float32."""
    batch: PositiveInt = 64
    """Clips, or windows of files, that are embedded together."""
    max_bad_fraction: Fraction = 0.01
    """Share of a packed set's clips that a process has read in a row that may be unreadable before
    it stops with a table of them; the first ten never stop it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inputs:
            raise ValueError("no input is given; give a packed set, or files")
        if self.of_files and not self.out.endswith(".parquet"):
            raise ValueError(
                f"out is {self.out}, and {self.inputs[0]} is no packed set, which would have an "
                "index.json; give one, or for files a name that ends in .parquet"
            )
        if self.of_files and self.frames > 1:
            raise ValueError(f"frames is {self.frames}, which is of packed sets; omit it for files")
        if self.windows and not self.of_files:
            raise ValueError("windows is set, which is of files; omit it for a packed set")

    @property
    def of_files(self) -> bool:
        """Whether the inputs are files, not a packed set."""
        one = self.inputs[0]
        if len(self.inputs) > 1 or one == "-":
            return True
        if "://" in one:  # a folder's name has no ending
            return bool(Path(one).suffix)
        return not (Path(one).is_dir() and looks_packed(Path(one)))

    @property
    def shards(self) -> str:
        """The packed set."""
        return self.inputs[0]


Executor = Callable[[EmbedConfig, Origin, Sequence[int]], Iterator[int]]
"""Writes the files of some shards, anywhere; yields how many more clips are done."""


def embed_set(config: EmbedConfig, executor: Executor) -> dict[str, Any]:
    """Embed what is missing, account for every clip; returns the content of `embeddings.json`.

    Args:
        config: what to embed, and how.
        executor: where it is computed; values don't depend on it.

    Raises:
        ValueError: the run or the set does not fit, or `out` has embeddings of others.
        OSError: a file can't be read or written.
        DataFaultError: too many clips are damaged.
    """
    run = open_trained(config.run_dir)
    shards = ShardSet(config.shards, run.config.data.cache)
    modality = embedded_modality(run, shards)
    out, origin = Path(config.out), origin_of(run, shards, config)
    with claimed(out, origin):
        files = [out / file_name(shards, shard) for shard in range(len(shards.sizes))]
        missing = [shard for shard, file in enumerate(files) if not file.exists()]
        for shard in set(range(len(files))) - set(missing):
            file_account(files[shard], origin)  # fail now, not when all others are written
        if missing:
            (out / DESCRIPTION).unlink(missing_ok=True)
            _write_missing(config, origin, executor, missing, shards)
        accounts = [file_account(file, origin) for file in files]
        rows = [count for count, _ in accounts]
        skipped = [clip for _, clips in accounts for clip in clips]
        assert sum(rows) + len(skipped) == shards.samples
        description = {
            "run": str(run.folder.absolute()),
            "shards": real_place(config.shards),
            "clips": shards.samples,
            "modality": modality,
            "rows": sum(rows),
            "skipped": skipped,
            "files": [
                {"name": file.name, "rows": count} for file, count in zip(files, rows, strict=True)
            ],
            "bytes": sum(file.stat().st_size for file in files),
            **provenance(run, shards),
        }
        write_json(out / DESCRIPTION, description)
    return description


def _write_missing(
    config: EmbedConfig,
    origin: Origin,
    executor: Executor,
    missing: Sequence[int],
    shards: ShardSet,
) -> None:
    """Have the missing files written, and show how far that is."""
    files = len(shards.sizes)
    if len(missing) < files:
        print(f"resuming: {files - len(missing)} of {files} files are complete", file=sys.stderr)
    done = shards.samples - sum(shards.sizes[shard] for shard in missing)
    with Bar("embedding", shards.samples, "clips", done=done) as bar:
        for clips in executor(config, origin, missing):
            bar.count(clips)


def origin_of(run: AnyRun, shards: ShardSet, config: EmbedConfig) -> Origin:
    """Describe what the values come from."""
    return Origin(
        weights_sha256=run.weights_sha256,
        config_sha256=hashlib.sha256((run.folder / "config.json").read_bytes()).hexdigest(),
        shards_fingerprint=shards.fingerprint,
        width=run.config.model.width,
        frames=config.frames,
        dtype=config.dtype,
    )


def in_this_process(config: EmbedConfig, origin: Origin, numbers: Sequence[int]) -> Iterator[int]:
    """Execute in one process, on its GPU if it has one."""
    run = open_trained(config.run_dir)
    model = run.model(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    yield from write_files(run, model, config, origin, numbers)


def write_files(
    run: AnyRun,
    model: AudioVideoEncoder,
    config: EmbedConfig,
    origin: Origin,
    numbers: Sequence[int],
) -> Generator[int]:
    """Embed some shards and write the files that are missing; yields how many more clips are done,
    unreadable ones when the file of their shard is written.

    Args:
        run: whose model it is.
        model: set to evaluate.
        config: what to embed, and how.
        origin: of the values.
        numbers: of the shards, ascending.

    Raises:
        ValueError: an embedding is not finite, or run or shards are not those of `origin`.
        OSError: a shard can't be read, or a file can't be written.
        DataFaultError: too many clips are damaged.
    """
    shards = ShardSet(config.shards, run.config.data.cache)
    if origin_of(run, shards, config) != origin:
        raise ValueError(
            f"run {config.run_dir} or shards {config.shards} has changed since the command began, "
            "or is another one on this node; give paths that every node has the same files at"
        )
    out = Path(config.out)
    numbers = [n for n in numbers if not (out / file_name(shards, n)).exists()]
    places = [range(shards.ends[n] - shards.sizes[n], shards.ends[n]) for n in numbers]
    data = dataclasses.replace(run.config.data, max_bad_fraction=config.max_bad_fraction)
    device, modality = model.norm.weight.device, embedded_modality(run, shards)
    loader = whole_clips(
        dataclasses.replace(run.config, data=data),
        config.shards,
        device,
        batch=config.batch,
        frames=config.frames,
        parts=places,
        modality=modality,
    )
    try:
        batches = output_batches(embedding(model), loader, device, origin.torch_dtype)
        batch = next(batches, None)
        for number, here in zip(numbers, places, strict=True):
            tables = []
            while batch is not None and int(batch.clips.positions[0]) in here:
                tables.append(as_table(batch, shards, origin, modality))
                yield len(tables[-1])
                batch = next(batches, None)
            skipped = [
                (clip.sample_id, clip.reason, clip.detail)
                for clip in loader.quarantine
                if clip.position in here
            ]
            assert sum(map(len, tables)) + len(skipped) == shards.sizes[number]
            write_file(out / file_name(shards, number), tables, origin, modality, skipped)
            yield len(skipped)
    finally:
        loader.close()


def embed_listed(config: EmbedConfig) -> None:
    """Embed files, and print a summary; raises as `embed_files` does."""
    out = Path(config.out)
    made = embed_files(
        config.run_dir,
        config.inputs,
        out,
        windows=config.windows,
        dtype=config.dtype,
        batch=config.batch,
    )
    skipped = f"; {len(made.skipped)} skipped" if made.skipped else ""
    print(f"{out}: {made.files} files, {made.rows} rows{skipped}")


def tell(config: EmbedConfig, description: dict[str, Any]) -> None:
    """Print a summary."""
    skipped = len(description["skipped"])
    print(
        f"{config.out}: {description['rows']} clips in {len(description['files'])} files, "
        f"{description['bytes'] / 1e6:.1f} MB"
        + (f"; {skipped} skipped, {DESCRIPTION} has the reasons" if skipped else "")
    )
