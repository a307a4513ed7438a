"""Replace every message of a program that is started with this folder in PYTHONPATH.

Python imports this file when it starts. Programs that find out what others do must read what is
written for programs (`status.json`, metrics, status lines), never what is written for people.
"""

import builtins
import logging
import sys
from typing import Any

_MESSAGE = "a message in other words"
_make_record, _print = logging.getLogRecordFactory(), builtins.print


def _record(*values: Any, **options: Any) -> logging.LogRecord:
    record = _make_record(*values, **options)
    record.msg, record.args = _MESSAGE, ()
    return record


def _say(*words: Any, **options: Any) -> None:
    name = str(sys._getframe(1).f_globals.get("__name__"))
    _print(*([_MESSAGE] if name.startswith(("cavmae.", "__main__")) else words), **options)


if "queue" not in sys.orig_argv:  # a test reads what the queue itself says; its runs are muted
    logging.setLogRecordFactory(_record)
    builtins.print = _say
