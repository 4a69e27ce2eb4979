"""Docstrings of the public ops: short, complete, and with an example that runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers.examples import run_example

import stlm_kernels
from stlm_kernels.registry import OPS

NUMERICS = (Path(__file__).parents[2] / "docs/numerics.md").read_text()
NAMES = [*OPS, "explain"]
MAX_LINES = 30


def doc_of(name: str) -> str:
    return inspect.getdoc(getattr(stlm_kernels, name)) or ""


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_fits_on_a_page(name: str) -> None:
    lines = doc_of(name).splitlines()
    assert len(lines) <= MAX_LINES, f"{name} has {len(lines)} lines"
    assert lines[0].endswith(".")
    assert lines[1] == ""


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name: str) -> None:
    public = {each: getattr(stlm_kernels, each) for each in stlm_kernels.__all__}
    statements = run_example(doc_of(name), name, {"torch": torch, **public})
    assert 1 <= len(statements) <= 2


@pytest.mark.parametrize("name", OPS)
def test_the_contract_is_complete(name: str) -> None:
    """Every argument is described, with the meaning of None where it may be None."""
    doc = doc_of(name)
    arguments = doc.split("Args:\n")[1].split("Returns:")[0]
    described = {
        each: text
        for names, text in re.findall(
            r"^    ([a-z_]\w*(?:, [a-z_]\w*)*): (.*?)(?=^    \w|\Z)", arguments, flags=re.M | re.S
        )
        for each in names.split(", ")
    }
    parameters = inspect.signature(getattr(stlm_kernels, name)).parameters
    assert set(described) == set(parameters)
    for each, parameter in parameters.items():
        if "None" in str(parameter.annotation):
            assert "None" in described[each], each
        if str(parameter.annotation) == "Tensor":
            assert "(" in described[each] or described[each].startswith("likewise"), each
    for word in ("Returns:", "Raises: ValueError", "NotImplementedError", "Source:"):
        assert word in doc, word


@pytest.mark.parametrize("name", OPS)
def test_the_page_on_numerics_has_a_section(name: str) -> None:
    assert f"\n## {name}\n" in NUMERICS
    assert "docs/numerics.md" in doc_of(name)
