"""Generation, timed in a process of its own.

Run by `bench.generation_speed` beside any checkout of the library, the one on `PYTHONPATH`: of this
one it imports `turns` alone. The first line of input says what writes; every other asks for the
continuation of all prompts, or for the peak of memory. Answers are lines of JSON.
"""

from __future__ import annotations

import torch

from stlm_models import STLM

from . import turns

TEXT = b"The model reads a prompt once, and each byte that it writes then costs a row of a layer. "


def main() -> None:
    settings, config = turns.begin()
    torch.manual_seed(0)
    model, prompts = STLM(config).eval(), prompts_of(settings["batch_size"])

    def write() -> turns.Record:
        texts = model.generate_batch(prompts, max_new_bytes=settings["new_bytes"], seed=0)
        return {"n_bytes": sum(map(len, texts))}

    turns.answer(lambda: turns.timed(write))


def prompts_of(batch_size: int) -> list[bytes]:
    """Return prompts, no two neighbours of one length."""
    return [TEXT[: len(TEXT) - row % 8] for row in range(batch_size)]
