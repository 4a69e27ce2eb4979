"""The library at other commits, and processes that run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def library_of(commit: str, *folders: str) -> Iterator[Path]:
    """Unpack folders of a commit into a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "library.tar"
        command = ["git", "-C", str(ROOT), "archive", "-o", str(archive), commit, *folders]
        subprocess.run(command, check=True)
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        yield Path(folder)


class Side:
    """A process that answers lines with JSON, by the library in a folder.

    Args:
        folder: which the library is imported from.
        calls: module of `bench/harness` whose `main` answers; of this checkout it imports nothing
            else but other such modules.
    """

    def __init__(self, folder: Path, calls: str) -> None:
        # An editable installation would find here what the other commit lacks.
        program = (
            "import sys; sys.path.append(sys.argv[1]);"
            " sys.meta_path[:] = [x for x in sys.meta_path if 'editable' not in str(x)];"
            f" from bench.harness import {calls}; {calls}.main()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program, str(ROOT)],
            env={**os.environ, "PYTHONPATH": str(folder)}, text=True, cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, line: str) -> Any:
        """Return the answer to a line.

        Raises:
            RuntimeError: the process has ended; what it said is on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"process: expected an answer to {line!r}, got none")
        return json.loads(answer)
