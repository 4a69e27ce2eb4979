"""Progress of a training run: a progress line, metrics as JSONL, a loss curve."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from stlm_kernels.terminal import note

from ..files import replace_file, write_png

SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar = None
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar:20}| {desc}")
        self._next_line = 0.0

    def update(self, progress: float, text: str) -> None:
        """Show how far the run is, 0 to 1."""
        if self._bar is not None:
            self._bar.n = min(1.0, progress)
            with suppress(OSError):  # of a terminal that has gone: the run goes on
                self._bar.set_description_str(text)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            note(f"{progress:4.0%} {text}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.write(text, file=sys.stderr)
        else:
            note(text)

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()


class Metrics:
    """JSON lines in `metrics.jsonl`, each written whole or not at all.

    Args:
        run: the run folder.
        step: a resumed run drops what an interrupted one wrote after this step.
    """

    def __init__(self, run: Path, step: int = 0) -> None:
        self.path = run / "metrics.jsonl"
        kept = [record for record in read_metrics(run) if record["step"] <= step]
        replace_file(self.path, "".join(map(_line, kept)).encode())

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        size = self.path.stat().st_size
        try:
            with self.path.open("a") as file:
                file.write(_line(record))
        except OSError:
            if self.path.is_file():  # not a pipe or a device, which keep nothing
                os.truncate(self.path, size)
            raise


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run folder; a last line that was cut off is left out."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def draw_loss_curve(run: Path) -> Path:
    """Draw bits per byte over the minutes of the run into `loss.png`."""
    import matplotlib.figure

    records = read_metrics(run)
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    minutes = [record["seconds"] / 60 for record in records]
    axes.plot(minutes, [record["bits_per_byte"] for record in records], linewidth=1)
    axes.set(xlabel="minutes", ylabel="bits per byte (training)", title=run.name)
    axes.grid(alpha=0.3)
    write_png(run / "loss.png", figure, dpi=120)
    return run / "loss.png"


def progress_text(record: dict[str, Any], progress: float) -> str:
    """A record as the text of a progress line."""
    left = record["seconds"] * (1 - progress) / progress
    return (
        f"step {record['step']}  loss {record['loss']:.4f}"
        f"  {record['bits_per_byte']:.3f} bits/byte  {record['bytes_per_second']:,} bytes/s"
        f"  {max(0, round(left)) // 60}:{max(0, round(left)) % 60:02d} left"
    )


def lost_patches_text(lost_patches: int, max_patches: int | None) -> str:
    """The warning of a record with patches that found no slot."""
    return (
        f"warning: {lost_patches:,} patches since the last record found no slot: max_patches"
        f" {max_patches} is too small, and their bytes read an earlier patch instead"
    )


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
