"""Log output of a rank: to standard error for the person watching, to a file for later."""

import logging
import sys
from contextlib import suppress
from pathlib import Path

from cavmae.credentials import redacted


def log_to_stderr(rank: int) -> None:
    """Show everything from rank 0, and warnings from the others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%H:%M:%S")
    )
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("cavmae").setLevel(logging.INFO)  # for the file
    for handler in logging.getLogger().handlers:  # Ray has its own
        handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def log_to_file(path: Path) -> None:
    """Append everything that this rank logs to a file, one attempt after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("cavmae")
    for old in [one for one in logger.handlers if isinstance(one, logging.FileHandler)]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)


class _Formatter(logging.Formatter):
    """Leaves out the credentials of URLs, which libraries quote in errors and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _LogFile(logging.FileHandler):
    """A log file that may not be writable for a while, which is said once."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._said:
            with suppress(OSError):  # it may be on the same disk
                print(
                    f"{self.baseFilename} could not be written ({sys.exc_info()[1]}); what is "
                    "logged until it can be is only here",
                    file=sys.stderr,
                )
        self._said = True
