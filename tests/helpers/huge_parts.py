"""Parts of calls too large for a reference: what decides some of their rows, as a small call.

What the reference gives for the part must be what the op gave for those rows, gradients included:
the whole call's upstream gradient is zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stlm_kernels.registry import OPS
from stlm_kernels.spec import Inputs, OpSpec

LOOKBACK = 32
"""Patches after which nothing is left of an average whose gates are 1/2 and more."""


class Part(NamedTuple):
    """A small call, and where its rows lie in the whole, whose leading dimensions are flat.

    Args:
        spec: the op whose reference and yardstick judge: not always the whole's own.
        inputs: its arguments.
        out_rows: rows of the whole's results...
        own_rows: ...and the same ones in the part's.
        arguments: of the whole -> (name in the part, rows of the whole or None for all of them).
    """

    spec: OpSpec
    inputs: Inputs
    out_rows: Tensor
    own_rows: Tensor
    arguments: dict[str, tuple[str, Tensor | None]]


def runs(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The rows from each start to its end, one run after the other, and the runs' boundaries."""
    rows = [torch.arange(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    boundaries = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    return torch.cat(rows), boundaries


def picked(x: Tensor, rows: Tensor) -> Tensor:
    return x.detach()[rows.to(x.device)]


def document_starts(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the row where the document of each row begins."""
    boundaries = cu_seqlens.cpu().long()
    return boundaries[torch.searchsorted(boundaries, rows, right=True) - 1]


def whole_patches(spec: OpSpec, inputs: Inputs, rows: Tensor, by_byte: tuple[str, ...]) -> Part:
    """Patches `rows`: nothing outside them counts."""
    boundaries = inputs["cu_patchlens"].cpu().long()
    taken, cu_patchlens = runs(boundaries[rows], boundaries[rows + 1])
    small = {name: picked(inputs[name], taken) for name in by_byte}
    arguments: dict[str, tuple[str, Tensor | None]] = {name: (name, taken) for name in by_byte}
    part = Part(spec, inputs | small | {"cu_patchlens": cu_patchlens}, rows, rows, arguments)
    return part._replace(own_rows=torch.arange(len(rows)))


def byte_pool(inputs: Inputs, rows: Tensor) -> Part:
    part = whole_patches(OPS["byte_pool"], inputs, rows, ("byte_ids",))
    return part._replace(arguments={"weight": ("weight", None)})


def segment_pool(inputs: Inputs, rows: Tensor) -> Part:
    return whole_patches(OPS["segment_pool"], inputs, rows, ("x",))


def attention_pool(inputs: Inputs, rows: Tensor) -> Part:
    part = whole_patches(OPS["attention_pool"], inputs, rows, ("key", "value"))
    part.inputs["query"] = picked(inputs["query"], rows)
    return part._replace(arguments=part.arguments | {"query": ("query", rows)})


def patch_attention(inputs: Inputs, rows: Tensor) -> Part:
    """The patches of the bytes `rows`."""
    boundaries = inputs["cu_patchlens"].cpu().long()
    patches = (torch.searchsorted(boundaries, rows, right=True) - 1).unique()
    part = whole_patches(OPS["patch_attention"], inputs, patches, ("q", "k", "v"))
    taken = part.arguments["q"][1]
    assert taken is not None
    return part._replace(out_rows=taken, own_rows=torch.arange(len(taken)))


def attention(inputs: Inputs, rows: Tensor) -> Part:
    """A causal row and its window are a patch with a query of its own, as attention_pool has."""
    length, window = inputs["q"].shape[1], inputs["window"]
    first = torch.maximum(rows - window + 1, rows - rows % length)
    taken, cu_patchlens = runs(first, rows + 1)
    q, k, v = (inputs[name].flatten(0, 1) for name in ("q", "k", "v"))
    small: Inputs = {"query": picked(q, rows), "key": picked(k, taken), "value": picked(v, taken)}
    small |= {"cu_patchlens": cu_patchlens, "scale": inputs["scale"]}
    arguments = {"q": ("query", rows), "k": ("key", taken), "v": ("value", taken)}
    return Part(OPS["attention_pool"], small, rows, torch.arange(len(rows)), arguments)


def decode_attention(inputs: Inputs, rows: Tensor) -> Part:
    """All queries, over the entries of the window alone; it has no gradients."""
    rows, ends = rows.unique(), inputs["cache_lens"].cpu().long()
    window = inputs["window"]
    caches = {
        name: torch.stack([inputs[name][b, ends[b] - window : ends[b]] for b in rows.tolist()])
        for name in ("k_cache", "v_cache")
    }
    small = inputs | caches | {"q": picked(inputs["q"], rows)}
    small["cache_lens"] = torch.full((len(rows),), window, dtype=torch.int32)
    return Part(OPS["decode_attention"], small, rows, torch.arange(len(rows)), {})


def unpool(inputs: Inputs, rows: Tensor) -> Part:
    reads = picked(inputs["read_ids"], rows).cpu().long()
    patches, own = reads[reads >= 0].unique(return_inverse=True)
    small = inputs | {"patch_states": picked(inputs["patch_states"], patches)}
    small["read_ids"] = reads.masked_scatter(reads >= 0, own).int()
    small["residual"] = picked(inputs["residual"], rows)
    arguments = {"patch_states": ("patch_states", patches), "residual": ("residual", rows)}
    return Part(OPS["unpool"], small, rows, torch.arange(len(rows)), arguments)


def ema_unpool(inputs: Inputs, rows: Tensor) -> Part:
    """Each row's patch is the last of a document of its own; some rows read none."""
    reads = picked(inputs["read_ids"], rows).cpu().long()
    first = torch.maximum(
        reads - LOOKBACK, document_starts(reads.clamp(min=0), inputs["cu_seqlens"])
    )
    taken, cu_seqlens = runs(torch.where(reads < 0, 0, first), reads + 1)
    small = {name: picked(inputs[name], taken) for name in ("patch_states", "gate")}
    small["read_ids"] = torch.where(reads < 0, -1, cu_seqlens[1:] - 1).int()
    small |= {"cu_seqlens": cu_seqlens, "residual": picked(inputs["residual"], rows)}
    arguments = {"patch_states": ("patch_states", taken), "gate": ("gate", taken)}
    arguments["residual"] = ("residual", rows)
    return Part(OPS["ema_unpool"], small, rows, torch.arange(len(rows)), arguments)


def ngram_embedding(inputs: Inputs, rows: Tensor) -> Part:
    """Each row is the last of a document of its own, as long as the longest n-gram."""
    first = torch.maximum(
        rows - max(inputs["ngram_sizes"]) + 1, document_starts(rows, inputs["cu_seqlens"])
    )
    taken, cu_seqlens = runs(first, rows + 1)
    small = inputs | {"byte_ids": picked(inputs["byte_ids"], taken), "cu_seqlens": cu_seqlens}
    tables = {name: (name, None) for name in inputs if name.startswith("table")}
    return Part(OPS["ngram_embedding"], small, rows, cu_seqlens[1:].long() - 1, tables)


def linear_logprobs(inputs: Inputs, rows: Tensor) -> Part:
    small = inputs | {name: picked(inputs[name], rows) for name in ("input", "target")}
    arguments = {"input": ("input", rows), "linear_weight": ("linear_weight", None)}
    return Part(OPS["linear_logprobs"], small, rows, torch.arange(len(rows)), arguments)


def linear_sample(inputs: Inputs, rows: Tensor) -> Part:
    """Rows drawn without noise, which is keyed by the row; there are no gradients."""
    small = inputs | {"input": picked(inputs["input"], rows)}
    return Part(OPS["linear_sample"], small, rows, torch.arange(len(rows)), {})


def qk_norm_rope(inputs: Inputs, rows: Tensor) -> Part:
    small = inputs | {name: picked(inputs[name], rows) for name in ("q", "k", "positions")}
    arguments: dict[str, tuple[str, Tensor | None]] = {name: (name, rows) for name in ("q", "k")}
    arguments |= {name: (name, None) for name in ("q_weight", "k_weight")}
    return Part(OPS["qk_norm_rope"], small, rows, torch.arange(len(rows)), arguments)


def qkv_rope(inputs: Inputs, rows: Tensor) -> Part:
    small = inputs | {name: picked(inputs[name], rows) for name in ("x", "positions")}
    arguments: dict[str, tuple[str, Tensor | None]] = {"x": ("x", rows)}
    arguments |= {name: (name, None) for name in ("weight", "q_weight", "k_weight")}
    return Part(OPS["qkv_rope"], small, rows, torch.arange(len(rows)), arguments)


def swiglu(inputs: Inputs, rows: Tensor) -> Part:
    arguments: dict[str, tuple[str, Tensor | None]] = {"x": ("x", rows)}
    arguments |= {name: (name, None) for name in ("gate_up", "down")}
    return Part(
        OPS["swiglu"],
        inputs | {"x": picked(inputs["x"], rows)},
        rows,
        torch.arange(len(rows)),
        arguments,
    )


PARTS: dict[str, Callable[[Inputs, Tensor], Part]] = {
    function.__name__: function
    for function in (
        byte_pool,
        segment_pool,
        attention_pool,
        patch_attention,
        attention,
        decode_attention,
        unpool,
        ema_unpool,
        ngram_embedding,
        linear_logprobs,
        linear_sample,
        qk_norm_rope,
        qkv_rope,
        swiglu,
    )
}
