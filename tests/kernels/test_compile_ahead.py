"""Every kernel compiles for GPUs that are not here, within what their multiprocessors have."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT

pytestmark = pytest.mark.slow

ARCHITECTURES = ("80", "90", "100")
SHARED_BYTES = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10}  # a block's largest share

REGISTERS_OF_A_THREAD, REGISTERS = 255, 64 << 10  # the same on all three


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, Any]]]:
    """By architecture and kernel: registers, spilled and shared bytes, whether wgmma is used."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_ahead.py"))],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


def kernels_in_the_tree() -> set[str]:
    return {
        node.name
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any(isinstance(d, ast.Name) and d.id == "jit" for d in node.decorator_list)
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_is_left_out(compiled, architecture: str) -> None:
    assert {name.partition("[")[0] for name in compiled[architecture]} == kernels_in_the_tree()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_register_is_spilled(compiled, architecture: str) -> None:
    spilled = {name: k["spilled_bytes"] for name, k in compiled[architecture].items()}
    assert {name: count for name, count in spilled.items() if count} == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_is_within_the_part_s_limit(compiled, architecture: str) -> None:
    limit = SHARED_BYTES[architecture]
    assert {n for n, k in compiled[architecture].items() if k["shared_bytes"] > limit} == set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_of_a_block_are_within_what_a_multiprocessor_has(
    compiled, architecture: str
) -> None:
    kernels = compiled[architecture].items()
    assert {name for name, k in kernels if k["registers"] > REGISTERS_OF_A_THREAD} == set()
    blocks = {name: k["registers"] * k["warps"] * 32 for name, k in kernels}
    assert {name: count for name, count in blocks.items() if count > REGISTERS} == {}


def test_products_of_16_bits_are_wgmma_on_sm_90(compiled) -> None:
    """Those of tiles of 16, which serve a handful of pairs, are too small for it."""
    products = {
        name: kernel["wgmma"]
        for name, kernel in compiled["90"].items()
        if re.match(r"_(statistics|weights)_kernel\[(bf|fp)16.*x(64|128)x(64|128)x64x", name)
    }
    assert {name.partition("[")[0] for name in products} == {
        "_statistics_kernel",
        "_weights_kernel",
    }
    assert all(products.values()), products


def test_pixels_and_activations_are_read_and_written_in_wide_accesses(compiled) -> None:
    """Of 8 bytes a thread or more; what remains is ids and statistics."""
    names = r"_(patch|reconstruction|pack|gelu_backward|layer_norm_backward)_kernel"
    found = {
        name: (kernel["wide_accesses"], kernel["accesses"])
        for name, kernel in compiled["100"].items()
        if re.match(names, name)
    }
    assert len({name.partition("[")[0] for name in found}) == 5
    assert {name: counts for name, counts in found.items() if 2 * counts[0] <= counts[1]} == {}
