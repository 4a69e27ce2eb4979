"""Types that a user's checker sees: what modules return, which torch by itself declares as Any."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stlm_models
from stlm_models import STLM

ROOT = Path(__file__).parents[2]
USER = ROOT / "tests/helpers/typed_user.py"
TENSOR = "torch._tensor.Tensor"
REVEALED = {
    "logits": TENSOR,
    "one tensor": TENSOR,
    "loss": f"tuple[{TENSOR}, {TENSOR}]",
    "bytes": "bytes",
}


def test_mypy_strict_sees_what_modules_return() -> None:
    # A cache of its own: `make lint` may be running. No configuration of ours, as at a user's.
    options = ["--strict", "--follow-imports=silent", "--config-file=", "--no-error-summary"]
    cache = f"--cache-dir={ROOT / '.mypy_cache/typed_user'}"
    command = [sys.executable, "-m", "mypy", *options, cache, str(USER)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    revealed = dict(re.findall(r":(\d+): note: Revealed type is \"(.*)\"", done.stdout))
    refused = set(re.findall(r":(\d+): error: ", done.stdout))
    expected = {
        str(number): match[1]
        for number, line in enumerate(USER.read_text().splitlines(), 1)
        if (match := re.search(r"  # (.+)$", line))
    }
    assert len(expected) > 10
    assert refused == {line for line, kind in expected.items() if kind == "refused"}, done.stdout
    for line, kind in expected.items():
        if kind != "refused":
            assert revealed[line] == REVEALED[kind], f"line {line}: {done.stdout}"


def test_every_module_with_a_forward_has_a_typed_call() -> None:
    """The declaration is for checkers alone; at run time torch's own `__call__` runs."""
    for path in sorted(Path(stlm_models.__file__).parent.rglob("*.py")):
        source = path.read_text()
        classes = re.split(r"^class (?=\w+\(nn\.Module\))", source, flags=re.M)[1:]
        for text in classes:
            body = re.split(r"^\S", text.split("\n", 1)[1], flags=re.M)[0]
            typed = "@typed_as(forward)" in body
            assert typed == ("    def forward(" in body), f"{path.name}: {text.split('(')[0]}"
    assert STLM.__call__ is torch.nn.Module.__call__


def test_the_declaration_is_for_checkers_alone() -> None:
    from stlm_models.layers.typed_call import typed_as

    with pytest.raises(NotImplementedError, match="forward: only for type checkers"):
        typed_as(STLM.forward)
