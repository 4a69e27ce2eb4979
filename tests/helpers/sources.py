"""The project's own sources: which there are, what they import, where imports go round."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("stlm_kernels", "stlm_models")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
"""The files of the two packages that users install."""
ALL_SOURCES = [*SOURCES, *sorted((ROOT / "bench").rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """Return the dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_pairs(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) for every import of a file; the name is None for `import a`."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from ((module, alias.name) for alias in node.names)


def imports_of(path: Path) -> set[str]:
    """Return the absolute names of all imports: `from a import b` gives both `a` and `a.b`."""
    pairs = list(import_pairs(path))
    return {module for module, _ in pairs} | {f"{m}.{name}" for m, name in pairs if name}


def import_graph(paths: Iterable[Path]) -> dict[str, set[str]]:
    """Return the modules that each module imports; those under TYPE_CHECKING count as well.

    `from a import b` is an import of the module `a.b` where there is one, else of `a`.
    """
    files = {module_of(path): path for path in paths}
    graph = {}
    for module, path in files.items():
        pairs = import_pairs(path)
        used = {f"{m}.{name}" if f"{m}.{name}" in files else m for m, name in pairs}
        graph[module] = used & files.keys() - {module}
    return graph


def circles_of(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    reached = {module: reachable(graph, module) for module in graph}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }
    return [list(group) for group in sorted(groups)]


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        module = ahead.pop()
        if module not in found:
            found.add(module)
            ahead += graph[module]
    return found


def jitted(path: Path) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
