"""The Triton kernels of the tree, by their names in the source."""

import ast

from launch import ROOT


def kernels_in_the_tree() -> set[str]:
    return {
        node.name
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any(isinstance(d, ast.Name) and d.id == "jit" for d in node.decorator_list)
    }
