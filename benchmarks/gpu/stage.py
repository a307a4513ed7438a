"""One stage of a GPU check, in a process of its own: `python -m cavmae.benchmarks.gpu.stage`.

What it has found is written whenever there is more of it, so that a stage that is ended loses what
it was at and no more.
"""

import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cavmae.atomic_write import write_text
from cavmae.benchmarks.gpu.setting import Check, Found, Skip

ENDED = "ended"
"""Status of a stage until it knows better."""


def main(words: list[str]) -> None:
    """Run a stage; words are its function, as module:function, the fields of its `Check` as JSON,
    and the file that gets what it finds."""
    module, _, function = words[0].partition(":")
    check, write = Check(**json.loads(words[1])), Path(words[2])
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    found, status, reason = Found("", {}), ENDED, ""
    try:
        stage: Callable[[Check], Iterator[Found]] = getattr(
            importlib.import_module(f"cavmae.benchmarks.gpu.{module}"), function
        )
        for found in stage(check):
            _write(write, found, ENDED, "")
        status, reason = "passed", ""
        if found.beyond:
            status, reason = "failed", "; ".join(found.beyond[:5])
    except Skip as skip:
        status, reason = "skipped", str(skip)
    except Exception as error:
        # An error on an unknown device is a result, and the other stages continue.
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {error}"
    _write(write, found, status, reason)


def _write(path: Path, found: Found, status: str, reason: str) -> None:
    details = found.details | ({"beyond": found.beyond} if found.beyond else {})
    entry = {"status": status, "reason": reason, "key": found.key, "details": details}
    write_text(path, json.dumps(entry))  # a number that is none is a finding too


if __name__ == "__main__":
    main(sys.argv[1:])
