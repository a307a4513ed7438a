"""Exit codes of all commands: an error that the user can fix is one line, not a traceback."""

import os
import select
import sys
import traceback
from collections.abc import Callable
from types import TracebackType

from cavmae.credentials import redacted

_STDOUT = 1


class UserMistake(ValueError):
    """What no restart can mend, such as fields that contradict the run that they would resume."""


def exit_code(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command; with CAVMAE_DEBUG=1 every error has its traceback. No URL in what is printed
    of an error has a credential.

    Args:
        command: takes the words after its name and returns an exit code.
        arguments: those words.

    Returns:
        The command's own code, 1 after an error that was reported, 130 after an interrupt, 141
        where the reader of standard output, such as `head`, has left (as after SIGPIPE).
    """
    sys.excepthook = _print_traceback
    try:
        code = command(arguments)
        if sys.stdout is not None:  # it was closed before the command began
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # for what is still to be flushed
            return 141
        # Of a system's own error (no such file, disk full) and of one that our code raised, the
        # message alone tells the user what to fix; one from inside a library is a bug to report.
        user_error = isinstance(error, OSError) or raised_by_us(error)
        if os.environ.get("CAVMAE_DEBUG") == "1" or not user_error:
            raise
        print(redacted(f"error: {error}"), file=sys.stderr)
        return 1


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _reader_left() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    pipe = select.poll()
    pipe.register(_STDOUT, 0)
    return any(found & select.POLLERR for _, found in pipe.poll(0))


def raised_by_us(error: Exception) -> bool:
    """Return whether the package's own code raised an error, not a library that it calls."""
    last = list(traceback.walk_tb(error.__traceback__))[-1][0]
    module = last.f_globals.get("__spec__")
    return getattr(module, "name", "").startswith("cavmae.")
