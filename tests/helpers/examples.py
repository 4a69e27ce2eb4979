"""Examples in docstrings, run as their readers would."""

from __future__ import annotations

import doctest
from typing import Any


def run_example(doc: str, name: str, known: dict[str, Any]) -> list[doctest.Example]:
    """Run the example of a docstring with these names at hand, and return its statements."""
    test = doctest.DocTestParser().get_doctest(doc, dict(known), name, None, None)
    said: list[str] = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert (failed, tried) == (0, len(test.examples)), "".join(said)
    assert any(example.want for example in test.examples), "no result is shown"
    return test.examples
