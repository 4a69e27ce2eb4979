"""Peers of unpool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Inputs

from .entry import Entry, compiled


def _with_table_rows(inputs: Inputs) -> Inputs:
    """Give 1-based ids: row 0 of the table is the null state, so one gather serves every byte."""
    converted = {name: value for name, value in inputs.items() if name != "read_ids"}
    return converted | {"rows": inputs["read_ids"].long() + 1}


def _null_and_states(patch_states: Tensor, null_state: Tensor | None) -> Tensor:
    null = patch_states.new_zeros(patch_states.shape[1]) if null_state is None else null_state
    return torch.cat([null[None].to(patch_states.dtype), patch_states])


def _unpool_index_select(
    patch_states: Tensor,
    rows: Tensor,
    null_state: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    gathered = _null_and_states(patch_states, null_state).index_select(0, rows)
    return gathered if residual is None else gathered + residual


def _unpool_embedding(
    patch_states: Tensor,
    rows: Tensor,
    null_state: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    gathered = F.embedding(rows, _null_and_states(patch_states, null_state))
    return gathered if residual is None else gathered + residual


def _unpool_where(
    patch_states: Tensor,
    rows: Tensor,
    null_state: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    null = 0 if null_state is None else null_state.to(patch_states.dtype)
    gathered = patch_states.index_select(0, (rows - 1).clamp(min=0))
    gathered = torch.where((rows > 0)[:, None], gathered, null)
    return gathered if residual is None else gathered + residual


_INDEX_SELECT = Entry("index_select + add", _unpool_index_select, _with_table_rows)
_UNPOOL_WHERE = Entry("gather + where + add", _unpool_where, _with_table_rows)


PEERS: dict[str, tuple[Entry, ...]] = {
    "unpool": (
        _INDEX_SELECT,
        Entry("embedding + add", _unpool_embedding, _with_table_rows),
        _UNPOOL_WHERE,
        compiled(_INDEX_SELECT),
        compiled(_UNPOOL_WHERE),
    ),
}
