"""The sources that the rules of CONTRIBUTING are about."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


PACKAGES = ("stlm_kernels", "stlm_models")


SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def jitted(path: Path) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
