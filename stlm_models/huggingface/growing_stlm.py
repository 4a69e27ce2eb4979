"""Texts that grow between calls of a model: what transformers knows as its cache."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor, StoppingCriteria

from stlm_models import STLM
from stlm_models.generation.engine import CachedRun, lost_logits

# transformers copies this file into saved folders: imports of stlm are absolute and public.


class GrowingTexts:
    """Cache that a caller hands from call to call: ids of each row, and a `CachedRun` over them.

    Args:
        model: that runs.
        input_ids, attention_mask: as in `STLMForCausalLM.forward`; each row is one document.

    Raises:
        ValueError: for a row without an id.
    """

    is_compileable = False
    is_linear = (False,)  # as far as transformers is concerned: it may go on from here

    def __init__(self, model: STLM, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        self.model = model
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = zip(input_ids, mask, strict=True)
        self.windows = [ids[kept.bool()].tolist() for ids, kept in rows]
        if not all(self.windows):
            raise ValueError("input_ids: expected at least one id in each row, got a row without")
        self.length = input_ids.shape[1]

    @cached_property
    def run(self) -> CachedRun:
        """Run over the ids that the rows were shown; made at first use."""
        return CachedRun(self.model, self.windows)

    def prepare(self) -> None:
        """Run what the rows have been shown, unless that is done."""
        _ = self.run

    def append(self, input_ids: Tensor) -> Tensor:
        """More ids for each row, (B, N), and the states at them, (B, N, D)."""
        rows = range(len(self.windows))
        if input_ids.dim() != 2 or len(input_ids) != len(rows) or not input_ids.shape[1]:
            expected, got = f"({len(rows)}, N), N >= 1,", tuple(input_ids.shape)
            raise ValueError(f"input_ids: expected shape {expected} with a cache, got {got}")
        run, states = self.run, []
        for ids in input_ids.T:
            for window, byte in zip(self.windows, ids.tolist(), strict=True):
                window.append(byte)
            run.step(ids, rows)
            states.append(run.hidden.clone())  # the next step writes over it
        self.length += input_ids.shape[1]
        return torch.stack(states, 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from row beam_idx[i]; a row whose text changes by that is run anew."""
        before = self.windows
        self.windows = [list(before[i]) for i in beam_idx.tolist()]
        changed = [i for i, window in enumerate(self.windows) if window != before[i]]
        if changed:
            self.run.restart(changed, [self.windows[i] for i in changed])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns of ids, padding among them, that it was shown."""
        return self.length


class ByteStops(StoppingCriteria):
    """Ends a row behind the bytes of one of these strings, wherever in a character they begin.

    transformers' own compares decoded tokens, and a byte that is no character decodes to nothing.
    """

    def __init__(self, stops: list[str]) -> None:
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop_strings: expected strings, none empty, got {stops!r}")
        self.stops = [torch.tensor([*stop.encode()]) for stop in stops]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for stop in self.stops:
            if input_ids.shape[1] >= len(stop):
                end = input_ids[:, -len(stop) :]
                done |= (end == stop.to(end.device)).all(1)
        return done


class RefuseLostLogits(LogitsProcessor):
    """The error that `STLM.generate` raises, in that of transformers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        peaks = scores.amax(-1)
        lost = ~peaks.isfinite()
        if lost.any():
            row = int(lost.nonzero()[0])
            raise lost_logits(peaks[row], f"row {row} after {input_ids.shape[1]} ids")
        return scores
