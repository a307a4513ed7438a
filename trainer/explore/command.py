"""`cavmae explore RUN SHARDS`: a page that shows what a trained run learned.

The page is served while embeddings are read, or computed; it says how far that is.
"""

import importlib.util
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cavmae.field_checks import CheckedFields, NonNegativeInt
from cavmae.trainer.explore.server import listening_socket, serving

if TYPE_CHECKING:
    from cavmae.dataloaders.shards.shard_set import ShardSet
    from cavmae.trainer.embeddings.parquet_store import EmbeddingSet
    from cavmae.trainer.explore.page import Page

PACKAGES = ("gradio", "openTSNE")


@dataclass(frozen=True)
class ExploreConfig(CheckedFields):
    """Show what a run learned on a page for the browser of this machine, with clips of a packed set
    or files. Embeddings that are not there yet are computed first, and kept.

    Raises:
        ValueError: a field is out of its range.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """Folder of a trained run; empty: the one that made the embeddings, if it is still there."""
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")] = ""
    """One tier of packed shards; empty: those of the embeddings, if they are still there."""
    embeddings: str = ""
    """Folder that `cavmae embed` wrote; empty: one in RUN, where they are computed if they are not
    there."""
    port: NonNegativeInt = 0
    """Port on 127.0.0.1; 0: a free one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.embeddings and not (self.run and self.shards):
            raise ValueError("give RUN and SHARDS, or --embeddings with what `cavmae embed` wrote")


def main(arguments: list[str]) -> int:
    """Run the command until it is interrupted; returns its exit code."""
    config = tyro.cli(ExploreConfig, prog="cavmae explore", args=arguments)
    check_installed()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # removes what was uploaded
    with tempfile.TemporaryDirectory(prefix="cavmae-explore-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # of uploads, and of what is shown
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        with listening_socket(config.port) as listening, suppress(KeyboardInterrupt):
            from cavmae.trainer.explore.application import application  # takes seconds
            from cavmae.trainer.explore.page import Page

            page = Page()
            token = secrets.token_urlsafe(32)
            with serving(application(page), listening, token):
                host, port = listening.getsockname()
                print(f"open http://{host}:{port}/?token={token}", flush=True)
                fill(page, config)
                print(f"{page.status}; Ctrl-C ends it", flush=True)
                threading.Event().wait()
    return 0


def check_installed() -> None:
    """Check early that the page can be built.

    Raises:
        ValueError: a package is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"cavmae explore needs {', '.join(missing)}, which is not installed; "
            "pip install 'cavmae[explore]'"
        )


def fill(page: "Page", config: ExploreConfig) -> None:
    """Open embeddings, shards and run, and hand them to the page.

    Raises:
        ValueError: they can't be used, or don't belong together.
        OSError: a file can't be read or written.
    """
    page.status = "loading"
    from cavmae.dataloaders.shards.shard_set import ShardSet
    from cavmae.trainer.embeddings.embed import EmbedConfig, embed_set, in_this_process
    from cavmae.trainer.embeddings.parquet_store import EmbeddingSet, Origin
    from cavmae.trainer.embeddings.search import check_both, run_of
    from cavmae.trainer.explore.collection import Collection
    from cavmae.trainer.inference.load import of_run

    folder, shards = Path(config.embeddings), None
    if config.shards:
        shards = ShardSet(config.shards)
        total = shards.samples
        folder = (
            folder if config.embeddings else Path(config.run, "explore", shards.fingerprint[:8])
        )

        def executor(how: EmbedConfig, origin: Origin, numbers: Sequence[int]) -> Iterator[int]:
            done = 0
            for clips in in_this_process(how, origin, numbers):
                done += clips
                page.status = f"embedding: {done} of {total} clips"
                yield clips

        embed_set(EmbedConfig(config.run, (config.shards,), str(folder)), executor)
    embeddings = EmbeddingSet(folder)
    check_both(embeddings)
    if shards is None:
        shards = shards_of(embeddings)
    run = config.run or embeddings.description["run"]
    model = of_run(run_of(embeddings, run)) if config.run or Path(run).is_dir() else None
    page.fill(Collection(embeddings, shards), model)


def shards_of(embeddings: "EmbeddingSet") -> "ShardSet | None":
    """Open the shards of embeddings; None: others are there now, or none."""
    from cavmae.dataloaders.shards.shard_set import ShardSet

    try:
        shards = ShardSet(embeddings.description["shards"])
    except (OSError, ValueError):
        return None
    return shards if shards.fingerprint == embeddings.origin.shards_fingerprint else None
