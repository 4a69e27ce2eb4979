"""Attention of a batch on a CPU: by torch's flash attention, or by products of matrices.

Torch's kernel multiplies fp32 numbers. Where products of fp32 operands may round these to bf16, as
`torch.set_float32_matmul_precision("medium")` allows, oneDNN multiplies, which can be faster
although weights are then written and read: operands that were bf16 lose nothing, sums stay in fp32,
and the weights and their gradients may be rounded, as in the kernels for GPUs. Weights are formed
for a chunk at a time, which stays in a core's cache, and again in the backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 19
"""Weights formed at a time: 2 MB in fp32."""
ROWS = 128
"""Rows of a chunk at most: under the causal mask it meets all keys that its last row sees."""


class Call(NamedTuple):
    """What a batch of queries (N, H, L, K) sees of its keys (N, H_kv, L_k, K)."""

    mask: Tensor | None  # (N or 1, 1, L, L_k), added to the scores
    causal: bool  # L = L_k, without a mask
    scale: float


class Chunk(NamedTuple):
    """Some rows of some heads of a part of the batch, and the keys that they see."""

    part: slice
    heads: slice
    rows: slice
    keys: slice

    def rows_of(self, x: Tensor) -> Tensor:
        return x[self.part, self.heads, self.rows]

    def keys_of(self, x: Tensor) -> Tensor:
        return x[self.part, self.heads, self.keys]

    def taken(self, q: Tensor, *keyed: Tensor) -> list[Tensor]:
        """Matrices (n heads, rows or keys, K) that products need not copy again."""
        return [self.rows_of(q).flatten(0, 1), *(self.keys_of(x).flatten(0, 1) for x in keyed)]


def takes_products(q: Tensor) -> bool:
    """Return whether torch may round the fp32 operands of products on a CPU to bf16."""
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return q.dtype == torch.float32 and precision == "bf16"


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """(N, H, L, K), and the log-sum-exps of rows (N, H, L), which products do not need."""
    if takes_products(q):
        return _attend_by_products(q, k, v, call), None
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, call.causal, attn_mask=call.mask, scale=call.scale
    )
    return found


def gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    lse: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, after a forward that gave `out` and `lse`; without `lse` neither is
    read."""
    if lse is None or out is None:
        return _gradients_by_products(grad, q, k, v, call)
    found: tuple[Tensor, Tensor, Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            0.0,
            call.causal,
            attn_mask=call.mask,
            scale=call.scale,
        )
    )
    return found


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    k, v = _repeated(k, q), _repeated(v, q)
    out = q.new_empty(q.shape)
    for chunk in _chunks(q, k, call):
        some_q, some_k, some_v = chunk.taken(q, k, v)
        place = chunk.rows_of(out)
        weights = _weights(some_q, some_k, call, chunk, place.shape[:2])
        place.copy_(torch.bmm(weights, some_v).view(place.shape))
    return out


def _gradients_by_products(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads, k, v = k.shape[1], _repeated(k, q), _repeated(v, q)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for chunk in _chunks(q, k, call):
        some_q, some_k, some_v = chunk.taken(q, k, v)
        (up,) = chunk.taken(grad)
        place = chunk.rows_of(dq)
        weights = _weights(some_q, some_k, call, chunk, place.shape[:2])
        dweights = torch.bmm(up, some_v.mT)
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
        place.copy_(torch.bmm(dscores, some_k).mul_(call.scale).view(place.shape))
        # The last rows come first and see all keys, which begins these sums.
        is_first = chunk.rows.stop == q.shape[2]
        for into, weight, rows in ((dk, dscores, some_q), (dv, weights, up)):
            place = chunk.keys_of(into)
            values = torch.bmm(weight.mT, rows).view(place.shape)
            place.copy_(values) if is_first else place.add_(values)
    return dq, _summed(dk.mul_(call.scale), kv_heads), _summed(dv, kv_heads)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys once for each query that shares them."""
    group = q.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, 1)


def _summed(x: Tensor, kv_heads: int) -> Tensor:
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


def _chunks(q: Tensor, k: Tensor, call: Call) -> Iterator[Chunk]:
    (total, heads, length, _), keys = q.shape, k.shape[2]
    for last in range(length, 0, -ROWS):
        first = max(0, last - ROWS)
        seen = last if call.causal else keys
        most = max(1, CHUNK // max(1, (last - first) * seen))  # matrices of a chunk
        some, each = max(1, most // heads), min(heads, most)
        for begin, head in itertools.product(range(0, total, some), range(0, heads, each)):
            part, some_heads = slice(begin, begin + some), slice(head, head + each)
            yield Chunk(part, some_heads, slice(first, last), slice(0, seen))


def _weights(q: Tensor, k: Tensor, call: Call, chunk: Chunk, batch: Sequence[int]) -> Tensor:
    """(n heads, rows, keys) of `batch` (n, heads)."""
    scores = torch.bmm(q, k.mT)
    if call.mask is None:
        scores.mul_(call.scale)
    else:
        mask = call.mask if len(call.mask) == 1 else call.mask[chunk.part]
        by_head = scores.view(*batch, *scores.shape[1:])
        scores = torch.add(mask[:, :, chunk.rows], by_head, alpha=call.scale).flatten(0, 1)
    if call.causal:
        length = q.shape[1]
        later = scores.new_full((length, length), -torch.inf).triu_(1)
        scores[..., chunk.rows.start :].add_(later)
    return scores.softmax(-1)
