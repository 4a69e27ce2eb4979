"""Peers of ema_unpool."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm_kernels.spec import Case, Inputs

from .entry import Entry, compiled

CHUNK = 128
LONGEST_LOOP = 64


def _with_documents(inputs: Inputs) -> Inputs:
    """Add the document of each patch, and which patches are in one; 1-based ids for the bytes."""
    inputs = dict(inputs)
    patches, device = inputs["gate"].shape[0], inputs["gate"].device
    boundaries = inputs.pop("cu_seqlens", None)
    if boundaries is None:
        boundaries = torch.tensor([0, patches], device=device)
    positions = torch.arange(patches, device=device)
    document = torch.searchsorted(boundaries, positions.to(boundaries.dtype), right=True)
    live = (document < boundaries.shape[0]).to(inputs["gate"].dtype)
    rows = inputs.pop("read_ids").long() + 1
    return inputs | {"document": document, "live": live, "rows": rows}


def _read(smoothed: Tensor, rows: Tensor, residual: Tensor | None) -> Tensor:
    out = F.pad(smoothed, (0, 0, 1, 0)).index_select(0, rows)
    return out if residual is None else out + residual


def _loop(
    patch_states: Tensor,
    gate: Tensor,
    document: Tensor,
    live: Tensor,
    rows: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    nothing = torch.zeros_like(patch_states[0])
    smoothed: list[Tensor] = []
    last = -1
    gates = (gate * live).unbind()
    for state, weight, here in zip(patch_states, gates, document.tolist(), strict=True):
        smoothed.append(torch.lerp(smoothed[-1] if here == last else nothing, state, weight))
        last = here
    return _read(torch.stack(smoothed), rows, residual)


def _chunked_matmul(
    patch_states: Tensor,
    gate: Tensor,
    document: Tensor,
    live: Tensor,
    rows: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """Smooth by state-space duality: decays from summed logarithms, chunks as products."""
    patches = gate.shape[0]
    missing = -patches % CHUNK
    gate, document = F.pad(gate * live, (0, missing)).float(), F.pad(document, (0, missing))
    x = (F.pad(patch_states, (0, 0, 0, missing)) * gate[:, None].to(patch_states)).view(
        -1, CHUNK, patch_states.shape[1]
    )
    logs, document = (1 - gate).log().view(-1, CHUNK).cumsum(1), document.view(-1, CHUNK)
    inside = _decays(logs, document).to(x.dtype) @ x
    ends = _decays(logs[:, -1].cumsum(0), document[:, -1]).to(x.dtype) @ inside[:, -1]
    before, document_before = F.pad(ends[:-1], (0, 0, 1, 0)), F.pad(document[:-1, -1], (1, 0))
    reach = torch.where(document == document_before[:, None], logs.exp(), 0).to(x.dtype)
    smoothed = torch.baddbmm(inside, reach[:, :, None], before[:, None])
    return _read(smoothed.flatten(0, 1)[:patches], rows, residual)


def _decays(logs: Tensor, document: Tensor) -> Tensor:
    """Return (..., n, n): the weight of each earlier position in the same document."""
    kept = (document[..., :, None] == document[..., None, :]).tril()
    differences = logs[..., :, None] - logs[..., None, :]
    return differences.masked_fill(~kept, -torch.inf).exp()


def _short_only(case: Case) -> str | None:
    return "it steps through the patches in Python" if case["P"] > LONGEST_LOOP else None


_CHUNKED = Entry("log-space chunked matmul", _chunked_matmul, _with_documents)

PEERS: dict[str, tuple[Entry, ...]] = {
    "ema_unpool": (
        Entry("loop over patches", _loop, _with_documents, _short_only),
        _CHUNKED,
        compiled(_CHUNKED),
    ),
}
