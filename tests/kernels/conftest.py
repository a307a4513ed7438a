"""What the kernel tests have in common."""

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """NumPy, which interprets the kernels, warns of the logarithm of 0 in lanes that are masked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
