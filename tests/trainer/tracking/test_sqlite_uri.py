"""A store's URI names the same file for SQLAlchemy as for us, whatever is in the path."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import make_url

from cavmae.trainer.tracking.sqlite_uri import sqlite_file, sqlite_uri

pytestmark = pytest.mark.field
NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=20)


@given(names=st.lists(NAMES, min_size=1, max_size=3))
def test_a_uri_names_the_file_that_it_was_made_for(names: list[str]) -> None:
    path = Path("/", *names)
    uri = sqlite_uri(path)
    assert sqlite_file(uri) == path
    assert make_url(uri).database == str(path)


def test_a_plain_path_is_left_as_it_is() -> None:
    assert sqlite_uri(Path("/runs/my runs, #2&3/mlflow.db")) == (
        "sqlite:////runs/my runs, #2&3/mlflow.db"
    )
    assert sqlite_file("http://127.0.0.1:5000") is None
