"""ema_unpool in Triton: smoothed states patch by patch, then unpool of them; and the mirror of it.

Forward. A program owns BLOCK_P patches x BLOCK_D columns of z: it looks back in blocks of LOOK
patches until what lies farther weighs less than 2^-30 (a gate of 1 and a document's first patch
weigh it with 0), then steps from patch to patch. No order among programs. z, (P, D) in fp32, is
then handed out by unpool's kernel, which casts once.
Floor (bf16): that of unpool, 2 (T + P) D bytes, 4 T D more with a residual, and 8 P D for z;
look-backs read 16 to 32 patch rows for each BLOCK_P.
Backward. dz as unpool's contiguous segment sum, in fp32; s[j] = dz[j] + (1 - gate[j+1]) s[j+1] by
the same kernel walking back; then dstates = gate * s, dgate = sum of s * (states - z[j-1]) over the
columns, in order. No atomics.
Bytes: 2 T D + 30 P D, of which 24 P D are dz, s and z in fp32, written once and read once.
Counted on sm_90 for words at 1M bytes, D = 768: at least 1,252 us forward, by L2, 878 backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _launch
from ..._triton.tiles import dot_type, segments_of, side_by_side
from ..unpool.triton_impl import launch_bwd as sums_by_patch
from ..unpool.triton_impl import launch_fwd as read_by_rows
from . import config as configs

FORGOTTEN = tl.constexpr(2.0**-30)
OUTSIDE, FIRST, FOLLOWS = (tl.constexpr(i) for i in range(3))
FORWARD, BACK = 1, -1


@triton.jit(do_not_specialize=["n_patches", "n_documents"])
def stlm_ema_unpool_links(
    cu_ptr, links_ptr, n_patches, n_documents, HAS_DOCUMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Mark each patch: it follows another of its document, is its first, or belongs to none."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    patches = first + side_by_side(BLOCK, 1)
    links = tl.where(patches == 0, FIRST, FOLLOWS)
    if HAS_DOCUMENTS:
        document = segments_of(cu_ptr, first, n_documents, BLOCK)
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
def _look_back(
    x_ptr, gate_ptr, links_ptr, at, n_patches, columns,
    D: tl.constexpr, CAST: tl.constexpr, STEP: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Return (columns) of y[at], from the patches before it that weigh anything; see the kernel."""
    SHIFT: tl.constexpr = (1 - STEP) // 2
    state = tl.zeros((LOOK, columns.shape[0]), tl.float32)
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
            gain = tl.load(gate_ptr + js, mask=live, other=0.0).to(tl.float32)
            state += (reach * gain)[:, None] * x
        else:
            state += reach[:, None] * x
        older = js + SHIFT
        last = _decay(gate_ptr, links_ptr, older, (js >= 0) & (older < n_patches))
        weight = tl.sum(tl.where(index == LOOK - 1, reach * last, 0.0), 0)
        behind -= STEP * LOOK
    return tl.sum(state, 0)


@triton.jit(do_not_specialize=["n_patches"])
def stlm_ema_unpool_smooth(
    x_ptr, gate_ptr, links_ptr, y_ptr,
    n_patches,
    D: tl.constexpr, CAST: tl.constexpr, STEP: tl.constexpr, LOOK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Form y[j] = gain[j] x[j] + decay y[j - STEP].

    STEP 1 walks forward: gain is the gate, decay that of patch j. STEP -1 walks back: gain is 1,
    decay that of patch j + 1.
    """
    SHIFT: tl.constexpr = (1 - STEP) // 2
    program = tl.program_id(0).to(tl.int64)
    first = (program // tl.cdiv(D, BLOCK_D)) * BLOCK_P
    columns = (program % tl.cdiv(D, BLOCK_D)) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = first if STEP == 1 else tl.minimum(first + BLOCK_P, n_patches) - 1
    y = _look_back(x_ptr, gate_ptr, links_ptr, at, n_patches, columns, D, CAST, STEP, LOOK)
    tl.store(y_ptr + at * D + columns, y, mask=columns < D)
    for _ in range(1, tl.minimum(BLOCK_P, n_patches - first).to(tl.int32)):
        at += STEP
        decay = _decay(gate_ptr, links_ptr, at + SHIFT, at + SHIFT < n_patches)
        inside = tl.load(links_ptr + at) != OUTSIDE
        x = tl.load(x_ptr + at * D + columns, mask=columns < tl.where(inside, D, 0), other=0.0)
        x = x.to(CAST).to(tl.float32)
        if STEP == 1:
            x *= tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = x + tl.where(decay == 0, 0.0, decay * y)
        tl.store(y_ptr + at * D + columns, y, mask=columns < D)


@triton.jit(do_not_specialize=["n_patches"])
def stlm_ema_unpool_bwd(
    s_ptr, z_ptr, states_ptr, gate_ptr, links_ptr, dstates_ptr, dgate_ptr,
    n_patches,
    D: tl.constexpr, CAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    patches = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    own = patches < n_patches
    link = tl.load(links_ptr + patches, mask=own, other=OUTSIDE)
    gate = tl.load(gate_ptr + patches, mask=link != OUTSIDE, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + side_by_side(BLOCK_D, 4)
        place = patches[:, None] * D + columns[None, :]
        mask = own[:, None] & (columns < D)[None, :]
        s = tl.load(s_ptr + place, mask=mask, other=0.0)
        z = tl.load(z_ptr + place - D, mask=mask & (link == FOLLOWS)[:, None], other=0.0)
        read = mask & (link != OUTSIDE)[:, None]
        h = tl.load(states_ptr + place, mask=read, other=0.0).to(CAST).to(tl.float32)
        dgate += s * (h - z)
        tl.store(dstates_ptr + place, (gate[:, None] * s).to(dstates_ptr.dtype.element_ty), mask)
    dgate = tl.sum(dgate, 1).to(dgate_ptr.dtype.element_ty)
    tl.store(dgate_ptr + patches, dgate, mask=own)


def launch_fwd(
    patch_states: Tensor,  # (P, D)
    gate: Tensor,  # (P,)
    read_ids: Tensor,  # (T,)
    cu_seqlens: Tensor | None,  # (S+1,) int32
    residual: Tensor | None,  # (T, D)
    out_dtype: torch.dtype,
) -> Tensor:
    """Return (T, D) in `out_dtype`."""
    links = _links(cu_seqlens, patch_states.shape[0], patch_states.device)
    z = _smoothed(patch_states, gate, links, FORWARD, out_dtype)
    return read_by_rows(z, read_ids, None, residual, out_dtype, states_dtype=torch.float32)


def launch_bwd(
    grad: Tensor,  # (T, D)
    patch_states: Tensor,  # (P, D)
    gate: Tensor,  # (P,)
    read_ids: Tensor,  # (T,)
    cu_seqlens: Tensor | None,  # (S+1,) int32
) -> tuple[Tensor, Tensor]:
    """Return (P, D) and (P,) gradients of the patch states and of the gate."""
    patches, width = patch_states.shape
    links = _links(cu_seqlens, patches, grad.device)
    dz = sums_by_patch(grad, read_ids, patches, torch.float32)
    s = _smoothed(dz, gate, links, BACK, torch.float32)
    z = _smoothed(patch_states, gate, links, FORWARD, grad.dtype)
    dstates = torch.empty_like(patch_states, memory_format=torch.contiguous_format)
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    config = configs.bwd_config(patches, width, patch_states.dtype, grad.device)
    _launch.launch(
        stlm_ema_unpool_bwd, _launch.ceil_div(patches, config["BLOCK_P"]),
        s, z, patch_states.contiguous(), gate.contiguous(), links, dstates, dgate, patches,
        D=width, CAST=dot_type(grad.dtype), device=grad.device, **config,
    )  # fmt: skip
    return dstates, dgate


def _smoothed(
    x: Tensor,  # (P, D)
    gate: Tensor,  # (P,)
    links: Tensor,  # (P,) int8
    step: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return (P, D) fp32: see the kernel. `x` counts as cast to `dtype`."""
    (patches, width), device = x.shape, x.device
    y = torch.empty((patches, width), dtype=torch.float32, device=device)
    config = configs.smooth_config(patches, width, x.dtype, device)
    programs = _launch.ceil_div(patches, config["BLOCK_P"])
    _launch.launch(
        stlm_ema_unpool_smooth, programs * _launch.ceil_div(width, config["BLOCK_D"]),
        x.contiguous(), gate.contiguous(), links, y, patches,
        D=width, CAST=dot_type(dtype), STEP=step, device=device, **config,
    )  # fmt: skip
    return y


def _links(cu_seqlens: Tensor | None, patches: int, device: torch.device) -> Tensor:
    """(P,) int8: see the kernel."""
    links = torch.empty(patches, dtype=torch.int8, device=device)
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    config = configs.links_config(patches, device)
    _launch.launch(
        stlm_ema_unpool_links, _launch.ceil_div(patches, config["BLOCK"]),
        links if cu_seqlens is None else cu_seqlens.contiguous(), links,
        patches, documents,
        HAS_DOCUMENTS=cu_seqlens is not None, device=device, **config,
    )  # fmt: skip
    return links
