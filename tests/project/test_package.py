"""The wheel and the sdist: what they hold, and the commands they install, from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import stlm_kernels
import stlm_models
from stlm_kernels.terminal import program

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = stlm_kernels.__version__
PACKAGES = ("stlm_kernels", "stlm_models")
COMMANDS = {
    f"stlm-{name}"
    for name in ("train", "generate", "evaluate", "compress", "decompress", "inspect", "env")
}
TUNED = "stlm_kernels/tuned/some_gpu.json"
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # building changes the arguments
build_meta.build_wheel(out)
build_meta.build_sdist(out)
"""


@pytest.fixture(scope="module", name="built")
def built_in_a_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, made without network and without a trace in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in (*PACKAGES, "tests", "bench"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    (source / TUNED).write_text("{}")  # as a session on a GPU leaves it
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def sources() -> set[str]:
    """Files that an installed package needs."""
    kinds = (".py", ".json", "py.typed")
    return {TUNED} | {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.name.endswith(kinds) and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_packages_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(built / f"stlm-{VERSION}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(f"stlm-{VERSION}.dist-info/METADATA").decode()
    assert names == sources()
    head = metadata.split("\n\n")[0].splitlines()
    assert f"Version: {VERSION}" in head
    assert "License-Expression: Apache-2.0" in head
    assert "Classifier: Typing :: Typed" in head
    assert 'Requires-Dist: triton>=3.6; sys_platform == "linux"' in head


def test_the_sdist_builds_the_same_and_has_no_tests(built: Path) -> None:
    with tarfile.open(built / f"stlm-{VERSION}.tar.gz") as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert sources() | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests", "bench"))]


def test_there_is_one_version() -> None:
    assert stlm_models.__version__ == VERSION
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "stlm_kernels._version.__version__"
    }


RUN_SCRIPTS = """
import contextlib, io, json, pathlib, runpy, sys, stlm_kernels, stlm_models
found = {"": [stlm_kernels.__file__, stlm_models.__file__]}
for script in sorted(pathlib.Path(sys.argv[1]).glob("stlm-*")):
    sys.argv = [str(script), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            found[script.name] = [ended.code, out.getvalue()]
print(json.dumps(found))
"""


def test_the_installed_commands_run_from_another_folder(built: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    wheel = built / f"stlm-{VERSION}-py3-none-any.whl"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", RUN_SCRIPTS, str(site / "bin")],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(Path(file).is_relative_to(site) for file in found.pop(""))
    assert found.keys() == COMMANDS
    for name, (status, text) in found.items():
        assert status == 0
        assert text.startswith(f"usage: {name} [-h]"), text


@pytest.mark.parametrize(
    ("started_as", "expected"),
    [
        ("/some/bin/stlm-train", "stlm-train"),
        ("stlm-train.exe", "stlm-train"),
        ("/checkout/stlm_models/train.py", "python -m stlm_models.train"),
        ("", "python -m stlm_models.train"),
    ],
)
def test_a_command_calls_itself_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch, started_as: str, expected: str
) -> None:
    monkeypatch.setattr(sys, "argv", [started_as])
    assert program("stlm_models.train") == expected
