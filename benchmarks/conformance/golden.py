"""`cavmae bench golden DIR`: conformance with the reference numbers of a golden folder.

It compares what `pytest -m golden --golden=DIR` compares without ranks and media, on any folder of
that format, and needs no tests: an installed wheel is enough.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cavmae.benchmarks.conformance.parts import PARTS, not_compared
from cavmae.benchmarks.conformance.tolerances import worst

_SHOWN = 5
"""Deviations beyond their limits that are printed of each case."""


@dataclass(frozen=True)
class GoldenConfig:
    """Compare this implementation with a folder of reference numbers; exit code 1 if it differs."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The golden folder."""
    cases: tuple[str, ...] = ()
    """Cases whose name contains one of these, such as `forward/seed0` or `retrieval`; empty: all.
    A full folder takes minutes."""
    list: bool = False
    """List the cases and compare nothing."""


def main(arguments: list[str]) -> int:
    """Compare and print a table; returns 1 where a deviation is beyond its limit, else 0."""
    config = tyro.cli(GoldenConfig, prog="cavmae bench golden", args=arguments)
    folder = Path(config.folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    cases = {
        f"{name}/{case}": comparison
        for name, part in PARTS.items()
        for case, comparison in part.cases(folder).items()
    }
    if not cases:
        sources = ", ".join(dict.fromkeys(part.source for part in PARTS.values()))
        raise ValueError(f"{folder} is no golden folder: it has none of {sources}")
    chosen = [name for name in cases if not config.cases or any(c in name for c in config.cases)]
    if not chosen:
        raise ValueError(f"no case contains {' or '.join(config.cases)}; --list shows their names")
    if config.list:
        print("\n".join(chosen))
        return 0
    width = max(map(len, chosen))
    print(f"{'case':<{width}}  {'':4}  {'compared':>8}  nearest to its limit")
    failed = 0
    for name in chosen:
        deviations = cases[name]()
        beyond = [one for one in deviations if not one.within]
        failed += bool(beyond)
        result = "FAIL" if beyond else "pass"
        nearest = worst(deviations)
        print(f"{name:<{width}}  {result}  {len(deviations):>8}  {nearest}", flush=True)
        for one in beyond[:_SHOWN]:
            print(f"{'':<{width}}  beyond its limit: {one}")
    for part, reason in not_compared(folder).items():
        print(f"not compared: {part} ({reason})")
    print(f"{len(chosen) - failed} of {len(chosen)} cases pass")
    return 1 if failed else 0
