"""The folder that a benchmark works in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from cavmae.benchmarks.harness.processes import unwind_on_sigterm


@contextmanager
def work_folder(benchmark: str, given: str = "") -> Iterator[Path]:
    """Create a folder for the files of a benchmark; SIGTERM unwinds this process from here on.

    Args:
        benchmark: its name.
        given: a folder, which is kept; empty: a temporary one, which is removed at the end.
    """
    unwind_on_sigterm()
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given).resolve()
        return
    with TemporaryDirectory(prefix=f"cavmae-{benchmark}-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()
