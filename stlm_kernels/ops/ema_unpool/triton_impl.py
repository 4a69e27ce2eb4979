"""ema_unpool in Triton: look back, smooth and hand out in one pass, and the mirror of it backward.

Forward. A program owns BLOCK_T rows x BLOCK_D columns. From the first patch its rows read it looks
back in blocks of LOOK patches until what lies farther weighs less than 2^-30 (a gate of 1 and a
document's first patch weigh it with 0); then it steps from patch to patch. No z in memory, no
order among programs.
Floor (bf16): that of unpool, 2 (T + P) D bytes, 4 T D more with a residual; 291 us at 1M bytes,
D = 512, bare. Look-backs read 16 to 32 patch rows for each 32 rows of the result, from the cache.
Backward. dz as unpool's contiguous segment sum, in fp32; then a program owns BLOCK_P patches x all
columns: s[j] = dz[j] + (1 - gate[j+1]) s[j+1] by the same walk ahead, z[j-1] by the walk back,
dstates = gate * s, dgate = sum of s * (states - z[j-1]) over the columns, in order. No atomics.
Floor: 2 T D + 12 P D bytes; 16 P D * BLOCK_P / 16 selections, small beside the rows' sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import dot_type, segment_of
from ..unpool.triton_impl import launch_bwd as sums_by_patch
from . import config as configs

LINK_BLOCK = 256
FORGOTTEN = tl.constexpr(2.0**-30)
OUTSIDE, FIRST, FOLLOWS = (tl.constexpr(i) for i in range(3))


@triton.jit(do_not_specialize=["n_patches", "n_documents", "steps"])
def stlm_ema_unpool_links(
    cu_ptr, links_ptr, n_patches, n_documents, steps, HAS_DOCUMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mark each patch: it follows another of its document, is its first, or belongs to none."""
    patches = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    links = tl.where(patches == 0, FIRST, FOLLOWS)
    if HAS_DOCUMENTS:
        document = segment_of(cu_ptr, patches, n_documents, steps)
        inside = (document >= 0) & (document < n_documents)
        start = tl.load(cu_ptr + document, mask=inside, other=0)
        links = tl.where(inside, tl.where(start == patches, FIRST, FOLLOWS), OUTSIDE)
    tl.store(links_ptr + patches, links.to(tl.int8), mask=patches < n_patches)


@triton.jit
def _decay(gate_ptr, links_ptr, patches, mask):
    """The weight of the state before each patch; 0 where there is none."""
    link = tl.load(links_ptr + patches, mask=mask, other=OUTSIDE)
    gate = tl.load(gate_ptr + patches, mask=mask & (link == FOLLOWS), other=1.0)
    return 1.0 - gate.to(tl.float32)


@triton.jit
def _walk_tile(
    x_ptr, gate_ptr, links_ptr, ids, n_patches, columns,
    D: tl.constexpr, CAST: tl.constexpr, STEP: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """(ids, columns) of y[j] = gain[j] x[j] + decay y[j - STEP] at ids; zeros for -1.

    STEP 1 walks forward: gain is the gate, decay that of patch j. STEP -1 walks backward: gain is
    1, decay that of patch j + 1.
    """
    SHIFT: tl.constexpr = (1 - STEP) // 2
    low = tl.min(tl.where(ids >= 0, ids, n_patches), 0)
    high = tl.max(ids, 0)
    at = low if STEP == 1 else high
    state = tl.zeros(columns.shape, tl.float32)
    index = tl.arange(0, LOOK)
    behind, weight = at, 1.0
    while (behind >= 0) & (behind < n_patches) & (tl.abs(weight) > FORGOTTEN):
        js = behind - STEP * index
        live = (js >= 0) & (js < n_patches)
        newer = js + STEP + SHIFT
        decay = _decay(gate_ptr, links_ptr, newer, live & (index > 0))
        decay = tl.where(index > 0, decay, 1.0)
        cut = tl.cumsum((decay == 0).to(tl.int32), 0) > 0  # NaN behind it must not count
        reach = tl.where(cut, 0.0, weight * tl.cumprod(decay, 0))
        link = tl.load(links_ptr + js, mask=live, other=OUTSIDE)
        live = live & (link != OUTSIDE) & (reach != 0)
        x = tl.load(
            x_ptr + js[:, None] * D + columns[None, :],
            mask=live[:, None] & (columns < D)[None, :], other=0.0,
        ).to(CAST).to(tl.float32)  # fmt: skip
        if STEP == 1:
            x *= tl.load(gate_ptr + js, mask=live, other=0.0).to(tl.float32)[:, None]
        state += tl.sum(reach[:, None] * x, 0)
        older = js + SHIFT
        last = _decay(gate_ptr, links_ptr, older, (js >= 0) & (older < n_patches))
        weight = tl.sum(tl.where(index == LOOK - 1, reach * last, 0.0), 0)
        behind -= STEP * LOOK
    tile = tl.zeros((ids.shape[0], columns.shape[0]), tl.float32)
    for _ in range(0, (high - low + 1).to(tl.int32)):
        tile = tl.where((ids == at)[:, None], state[None, :], tile)
        at += STEP
        inside = (at >= 0) & (at < n_patches)
        decay = _decay(gate_ptr, links_ptr, at + SHIFT, inside & (at + SHIFT < n_patches))
        inside = inside & (tl.load(links_ptr + at, mask=inside, other=OUTSIDE) != OUTSIDE)
        x = tl.load(x_ptr + at * D + columns, mask=columns < tl.where(inside, D, 0), other=0.0)
        x = x.to(CAST).to(tl.float32)
        if STEP == 1:
            x *= tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        state = x + tl.where(decay == 0, 0.0, decay * state)
    return tile


@triton.jit(do_not_specialize=["n_patches", "total"])
def stlm_ema_unpool_fwd(
    states_ptr, gate_ptr, links_ptr, ids_ptr, residual_ptr, out_ptr,
    n_patches, total,
    D: tl.constexpr, CAST: tl.constexpr, HAS_RESIDUAL: tl.constexpr, LOOK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    rows = (program // tl.cdiv(D, BLOCK_D)) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = (program % tl.cdiv(D, BLOCK_D)) * BLOCK_D + tl.arange(0, BLOCK_D)
    ids = tl.load(ids_ptr + rows, mask=rows < total, other=-1).to(tl.int64)
    bad = (ids < -1) | (ids >= n_patches)
    out = _walk_tile(
        states_ptr, gate_ptr, links_ptr, tl.where(bad, -1, ids), n_patches, columns,
        D, CAST, 1, LOOK,
    )  # fmt: skip
    place = rows[:, None] * D + columns[None, :]
    mask = (rows < total)[:, None] & (columns < D)[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + place, mask=mask, other=0.0)
        out += residual.to(CAST).to(tl.float32)
    out = tl.where(bad[:, None], float("nan"), out)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_patches"])
def stlm_ema_unpool_bwd(
    dz_ptr, states_ptr, gate_ptr, links_ptr, dstates_ptr, dgate_ptr,
    n_patches,
    D: tl.constexpr, CAST: tl.constexpr, LOOK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    patches = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    own = patches < n_patches
    link = tl.load(links_ptr + patches, mask=own, other=OUTSIDE)
    gate = tl.load(gate_ptr + patches, mask=link != OUTSIDE, other=0.0).to(tl.float32)
    before = tl.where(link == FOLLOWS, patches - 1, -1)
    dgate = tl.zeros((BLOCK_P,), tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        s = _walk_tile(
            dz_ptr, gate_ptr, links_ptr, tl.where(own, patches, -1), n_patches, columns,
            D, tl.float32, -1, LOOK,
        )  # fmt: skip
        z = _walk_tile(
            states_ptr, gate_ptr, links_ptr, before, n_patches, columns, D, CAST, 1, LOOK
        )
        place = patches[:, None] * D + columns[None, :]
        mask = own[:, None] & (columns < D)[None, :]
        read = mask & (link != OUTSIDE)[:, None]
        h = tl.load(states_ptr + place, mask=read, other=0.0).to(CAST).to(tl.float32)
        dgate += tl.sum(s * (h - z), 1)
        tl.store(dstates_ptr + place, (gate[:, None] * s).to(dstates_ptr.dtype.element_ty), mask)
    tl.store(dgate_ptr + patches, dgate.to(dgate_ptr.dtype.element_ty), mask=own)


def launch_fwd(
    patch_states: Tensor,  # (P, D)
    gate: Tensor,  # (P,)
    read_ids: Tensor,  # (T,)
    cu_seqlens: Tensor | None,  # (S+1,) int32
    residual: Tensor | None,  # (T, D)
    out_dtype: torch.dtype,
) -> Tensor:
    """(T, D) in `out_dtype`."""
    (patches, width), total = patch_states.shape, read_ids.shape[0]
    out = torch.empty((total, width), dtype=out_dtype, device=patch_states.device)
    config = configs.fwd_config(width, out_dtype, patch_states.device)
    programs = _launch.ceil_div(total, config["BLOCK_T"])
    states = patch_states.contiguous()
    _launch.launch(
        stlm_ema_unpool_fwd, programs * _launch.ceil_div(width, config["BLOCK_D"]),
        states, gate.contiguous(), _links(cu_seqlens, patches, states.device),
        read_ids.contiguous(), states if residual is None else residual.contiguous(), out,
        patches, total,
        D=width, CAST=dot_type(out_dtype), HAS_RESIDUAL=residual is not None,
        device=states.device, **config,
    )  # fmt: skip
    return out


def launch_bwd(
    grad: Tensor,  # (T, D)
    patch_states: Tensor,  # (P, D)
    gate: Tensor,  # (P,)
    read_ids: Tensor,  # (T,)
    cu_seqlens: Tensor | None,  # (S+1,) int32
) -> tuple[Tensor, Tensor]:
    """(P, D) and (P,) gradients of the patch states and of the gate."""
    patches, width = patch_states.shape
    dstates = torch.empty_like(patch_states, memory_format=torch.contiguous_format)
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    config = configs.bwd_config(width, patch_states.dtype, grad.device)
    _launch.launch(
        stlm_ema_unpool_bwd, _launch.ceil_div(patches, config["BLOCK_P"]),
        sums_by_patch(grad, read_ids, patches, torch.float32),
        patch_states.contiguous(), gate.contiguous(), _links(cu_seqlens, patches, grad.device),
        dstates, dgate, patches,
        D=width, CAST=dot_type(grad.dtype), device=grad.device, **config,
    )  # fmt: skip
    return dstates, dgate


def _links(cu_seqlens: Tensor | None, patches: int, device: torch.device) -> Tensor:
    """(P,) int8: see the kernel."""
    links = torch.empty(patches, dtype=torch.int8, device=device)
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _launch.launch(
        stlm_ema_unpool_links, _launch.ceil_div(patches, LINK_BLOCK),
        links if cu_seqlens is None else cu_seqlens.contiguous(), links,
        patches, documents, (documents + 2).bit_length(),
        HAS_DOCUMENTS=cu_seqlens is not None, BLOCK=LINK_BLOCK, num_warps=4, device=device,
    )  # fmt: skip
    return links
