"""`cavmae bench explore`: how long the page of `cavmae explore` keeps one waiting, in Chromium.

Embeddings are drawn in clusters around random centres; their clips are those of a few generated
videos, over and over, so that results are decoded and drawn as they are for a large set.
"""

import random
import re
import shutil
import statistics
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pyarrow as pa
import torch
import tyro

from cavmae.atomic_write import write_json
from cavmae.benchmarks.harness.processes import PATIENCE_SECONDS, Start, module_command
from cavmae.benchmarks.harness.records import RecordedConfig, bar, timing, write_record
from cavmae.benchmarks.harness.synthetic_shards import synthetic_shards
from cavmae.benchmarks.harness.work_folder import work_folder
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.field_checks import PositiveInt
from cavmae.trainer.embeddings.parquet_store import (
    DESCRIPTION,
    VECTORS,
    Origin,
    arrow_schema,
    claimed,
    write_file,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

VIDEOS = 40
CLASSES = 50
ROWS_OF_A_FILE = 1000
PAGE_SECONDS, QUERY_SECONDS = 3.0, 1.0
"""What the first page and a query may take."""
RESULTS_SHOWN = 24
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class ExplorePageConfig(RecordedConfig):
    """Measure the first page, queries and the map of `cavmae explore`, in Debian's Chromium.

    Raises:
        ValueError: an option out of its range.
    """

    clips: PositiveInt = 100_000
    """Clips that have embeddings."""
    width: PositiveInt = 768
    """Width of the embeddings."""
    queries: PositiveInt = 10
    """Clips that are looked at, one after the other."""


def main(arguments: list[str]) -> int:
    """Measure, print and write a record; returns 1 where a bar is not met.

    Raises:
        ValueError: Chromium or Playwright is not installed.
    """
    config = tyro.cli(ExplorePageConfig, prog="cavmae bench explore", args=arguments)
    chromium = shutil.which("chromium")
    if chromium is None or find_spec("playwright") is None:
        raise ValueError(
            "this needs the program chromium and the module playwright; install Debian's package "
            "chromium, and pip install 'cavmae[dev]'"
        )
    with work_folder("explore") as work:
        embeddings = make_embeddings(work, config.clips, config.width)
        command = module_command("cavmae", "explore", "--embeddings", str(embeddings))
        results = _measure(command, work / "explore.log", chromium, config)
    path = write_record(config.out, "explore", torch.device("cpu"), vars(config), results)
    bars = (results["first_page"], results["query"])
    print(
        f"address {results['start_seconds']:.1f} s after the command, clips there after "
        f"{results['filled_seconds']:.1f} s\n"
        f"first page {bars[0]['value']:.1f} s, a query {bars[1]['value']:.2f} s (median of "
        f"{len(results['queries']['all_seconds'])}), map the first time "
        f"{results['map_seconds']:.0f} s, {results['memory_bytes'] / 2**30:.1f} GiB\n"
        f"record: {path}"
    )
    return 0 if all(one["met"] for one in bars) else 1


def make_embeddings(work: Path, clips: int, width: int) -> Path:
    """Write a folder of embeddings of as many clips, as `cavmae embed` would.

    Args:
        work: folder for it, and for the videos and shards of its clips.
        clips, width: of it.
    """
    folder = synthetic_shards(work, VIDEOS)
    shards = ShardSet(str(folder))
    origin = Origin("0" * 64, "0" * 64, shards.fingerprint, width, frames=1, dtype="float32")
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((CLASSES, width), dtype=np.float32)
    files = []
    out = work / "embeddings"
    with claimed(out, origin):
        for number, first in enumerate(range(0, clips, ROWS_OF_A_FILE)):
            rows = np.arange(first, min(first + ROWS_OF_A_FILE, clips))
            path = out / f"{number:06d}.parquet"
            write_file(path, [_rows(rows, shards, origin, centres, generator)], origin, "both", [])
            files.append({"name": path.name, "rows": len(rows), "bytes": path.stat().st_size})
        description = {"run": str(work / "run"), "shards": str(folder), "clips": clips}
        write_json(out / DESCRIPTION, description | {"modality": "both", "files": files})
    return out


def sample_id(row: int) -> str:
    """Name a clip."""
    return f"clip/{row:07d}"


def _rows(
    rows: np.ndarray,
    shards: ShardSet,
    origin: Origin,
    centres: np.ndarray,
    generator: np.random.Generator,
) -> pa.Table:
    classes = rows % len(centres)
    columns: dict[str, Any] = {
        "position": rows % shards.samples,
        "sample_id": [sample_id(row) for row in rows],
        "labels": [[f"class {one}"] for one in classes],
        "source_path": [f"videos/{row % VIDEOS:06d}.mp4" for row in rows],
        "source_start_seconds": np.zeros(len(rows)),
        "source_end_seconds": np.full(len(rows), 2.0),
        "seconds": np.full(len(rows), 2.0),
        "frame_seconds": [[1.0]] * len(rows),
    }
    for column in VECTORS.values():
        noise = generator.standard_normal((len(rows), origin.width), dtype=np.float32)
        columns[column] = list(centres[classes] + noise)
    return pa.table(columns, schema=arrow_schema(origin, "both"))


def _measure(
    command: list[str], log: Path, chromium: str, config: ExplorePageConfig
) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright  # of the extra dev

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(1000 * PATIENCE_SECONDS)
        began = time.monotonic()
        with Start([(command, {})], log) as server:
            address, addressed = _address(server), time.monotonic()
            page.goto(address)
            page.get_by_role("button", name="Any clip").wait_for()
            shown = time.monotonic() - addressed
            status = page.get_by_label("State")
            while not re.match(r"\d+ clips", status.input_value()):
                time.sleep(_POLL_SECONDS)
            filled = time.monotonic() - began
            wanted = random.sample(range(config.clips), min(config.queries, config.clips))
            queries = [_query(page, sample_id(row)) for row in wanted]
            started = time.monotonic()
            page.get_by_role("tab", name="Map").click()
            page.locator(".map img").wait_for()
            mapped = time.monotonic() - started
            memory = psutil.Process(server.first.pid).memory_info().rss
        browser.close()
    return {
        "start_seconds": addressed - began,
        "first_page": bar(shown, below=PAGE_SECONDS),
        "filled_seconds": filled,
        "query": bar(statistics.median(queries), below=QUERY_SECONDS),
        "queries": timing(queries),
        "map_seconds": mapped,
        "memory_bytes": memory,
    }


def _address(server: Start) -> str:
    """Wait for the address that the command prints.

    Raises:
        RuntimeError: it ended instead.
    """
    while not (found := re.search(r"^open (\S+)$", server.text(), re.M)):
        if server.ended:
            raise RuntimeError(f"cavmae explore ended: {server.text()}")
        time.sleep(0.01)
    return found[1]


def _query(page: "Page", wanted: str) -> float:
    """Look at a clip; returns the seconds until all that is found for it is shown.

    Raises:
        RuntimeError: it is not shown.
    """
    captions, images = page.locator(".found .caption-label"), page.locator(".found img")
    before = set(captions.all_text_contents())
    page.get_by_label("Id of a clip").fill(wanted)
    started = time.monotonic()
    page.get_by_label("Id of a clip").press("Enter")
    # Polled from here: the page's policy forbids it to evaluate what Playwright would wait for.
    while (waited := time.monotonic() - started) < PATIENCE_SECONDS:
        now = captions.all_text_contents()  # scores and ids, which differ for every clip
        shown = images.evaluate_all("all => all.filter(one => one.complete).length")
        if len(now) == shown == RESULTS_SHOWN and before.isdisjoint(now):
            return waited
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"what is found for {wanted} is not shown after {PATIENCE_SECONDS:g} s")
