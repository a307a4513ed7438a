"""URIs of MLflow's SQLite stores for paths with any characters, and back."""

from pathlib import Path
from urllib.parse import unquote

_PLAIN, _QUOTED = "sqlite:///", "sqlite+pysqlite:///"


def sqlite_uri(path: Path) -> str:
    """Return the URI of the store in a file: SQLAlchemy ends a path at `?` and decodes `%20`."""
    text = str(path)
    quoted = text.replace("%", "%25").replace("?", "%3F")
    # With the driver named, MLflow makes no folder of the quoted name.
    return f"{_PLAIN}{text}" if quoted == text else f"{_QUOTED}{quoted}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file that the URI of a store names; None: it is no SQLite file."""
    for prefix in (_PLAIN, _QUOTED):
        if uri.startswith(prefix):
            return Path(unquote(uri.removeprefix(prefix).partition("?")[0]))
    return None
