"""FLOP formulas of the registered ops, for `torch.utils.flop_counter` whenever it is imported.

The module imports triton, and a counter copies torch's formulas when it is made. So ours must be
there as soon as the module is, and importing this package must not import it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def register_flops(op: Any, formula: Callable[..., int]) -> None:
    """Let torch's counters count a registered op.

    Args:
        op: the overload packet.
        formula: called with shapes in place of tensors.
    """
    _formulas[op] = formula
    if COUNTER in sys.modules:
        sys.modules[COUNTER].register_flop_formula(op)(formula)


class _CounterFinder(MetaPathFinder):
    """Finder of torch's counter that adds the formulas when the counter's module has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = _then_register(loader.exec_module)
        return spec


def _then_register(run: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        run(module)
        for op, formula in _formulas.items():
            module.register_flop_formula(op)(formula)

    return exec_module


sys.meta_path.insert(0, _CounterFinder())
