"""A run whose address space is limited after its first step: later allocations fail.

Started by `test_oom.py`.
"""

import resource
import sys
from pathlib import Path

from cavmae.command import exit_code
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.config.serialize import load_config
from cavmae.trainer.run import run

LEFT_BYTES = 100 << 20
"""For Python's own needs; a step of the test takes several times as much."""


class LimitedMemory:
    """A launcher's stop notice, which limits the address space at its first call."""

    called = False

    def __call__(self) -> str:
        if not self.called:
            self.called = True
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + LEFT_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return ""


def main(arguments: list[str]) -> int:
    run(load_config(arguments[0], PretrainConfig), LimitedMemory())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
