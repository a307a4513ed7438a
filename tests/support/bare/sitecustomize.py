"""Hide what a machine lacks that has torch, triton, numpy and pytest alone, from a program that is
started with this folder in PYTHONPATH, and from what it starts.

Python imports this file when it starts.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_THERE = {
    *("torch", "functorch", "torchgen", "triton", "numpy"),
    # What torch requires.
    *("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy"),
    *("typing_extensions", "_distutils_hack", "optree"),
    # For the tests alone.
    *("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments"),
    *("hypothesis", "_hypothesis_globals", "sortedcontainers"),
}


class _Bare(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = super().find_spec(fullname, path, target)
        if spec is None or path is not None or fullname in _THERE:
            return spec
        place = spec.origin or str(spec.submodule_search_locations)
        vendored = "setuptools" in place
        return None if "site-packages" in place and not vendored else spec


sys.meta_path[:] = [_Bare if finder is PathFinder else finder for finder in sys.meta_path]
