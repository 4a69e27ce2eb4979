"""The modules that a byte-level model is made of, each usable in a model of your own.

All of them take packed tensors: T bytes or P patches of all documents behind each other. A dense
(B, T, ...) is flattened, each of its rows being a document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm_kernels import (
    Patches,
    byte_pool,
    find_patches,
    linear_cross_entropy,
    linear_sample,
    segment_pool,
    unpool,
)

from .attention import Attention
from .ngrams import NgramPooling, ngram_hashes

__all__ = [
    "Attention",
    "BytePatcher",
    "BytePooling",
    "ByteUnpooling",
    "NgramPooling",
    "TiedEmbedding",
    "ngram_hashes",
]


class BytePatcher(nn.Module):
    """Cut bytes into patches by a rule, as `stlm_kernels.find_patches` does.

    Args:
        rule, patch_size, max_patch_len, capacity: see `stlm_kernels.find_patches`.
    """

    def __init__(
        self,
        rule: str,
        *,
        patch_size: int | None = None,
        max_patch_len: int | None = None,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        self.rule, self.patch_size = rule, patch_size
        self.max_patch_len, self.capacity = max_patch_len, capacity

    def forward(
        self,
        byte_ids: Tensor,  # (T,) or (B, T)
        cu_seqlens: Tensor | None = None,  # (S+1,) int32
    ) -> Patches:
        """The patches of packed byte_ids, or of the rows of dense ones, counted as if packed.

        Raises:
            ValueError: for dense byte_ids with cu_seqlens, and as `find_patches`.
        """
        if byte_ids.dim() == 2:
            cu_seqlens = dense_cu_seqlens(byte_ids, cu_seqlens)
            byte_ids = byte_ids.flatten()
        return find_patches(
            byte_ids,
            rule=self.rule,
            patch_size=self.patch_size,
            max_patch_len=self.max_patch_len,
            cu_seqlens=cu_seqlens,
            capacity=self.capacity,
        )


class BytePooling(nn.Module):
    """Pool hidden states of bytes into one state per patch.

    Read the result through `Patches.read_ids`, as `ByteUnpooling` does: every mode but "first"
    looks at bytes of its patch that lie ahead of a position inside it.

    Args:
        mode: "mean", "sum", "max", "first" or "last".
        dim, heads: belong to attention pooling, which is not built yet, and must be None.
    """

    MODES = ("mean", "sum", "max", "first", "last")

    def __init__(self, mode: str, *, dim: int | None = None, heads: int | None = None) -> None:
        super().__init__()
        if mode not in self.MODES:
            raise ValueError(f"mode: expected one of {self.MODES}, got {mode!r}")
        for name, value in (("dim", dim), ("heads", heads)):
            if value is not None:
                raise ValueError(f'{name}: expected None with mode "{mode}", got {value!r}')
        self.mode = mode

    def forward(self, x: Tensor, patches: Patches) -> Tensor:
        """x (T, D) or (B, T, D) -> (P, D)."""
        return segment_pool(x.reshape(-1, x.shape[-1]), patches.cu_patchlens, mode=self.mode)


class ByteUnpooling(nn.Module):
    """Give each byte the state of the last patch that is complete at it (`Patches.read_ids`).

    Args:
        dim: width of the states.
        null_state: learn what bytes read before the first patch of their document is complete;
            otherwise they read zeros.
    """

    def __init__(self, dim: int, *, null_state: bool = True) -> None:
        super().__init__()
        self.null_state = nn.Parameter(torch.zeros(dim)) if null_state else None

    def forward(
        self,
        patch_states: Tensor,  # (P, D)
        patches: Patches,
        residual: Tensor | None = None,  # (T, D) or (B, T, D)
    ) -> Tensor:
        """(T, D), in the shape of the residual where there is one.

        The residual must come from a causal encoder: what it knows of later bytes would leak.
        """
        flat = None if residual is None else residual.reshape(-1, residual.shape[-1])
        out = unpool(patch_states, patches.read_ids, null_state=self.null_state, residual=flat)
        return out if residual is None else out.view(residual.shape)


class TiedEmbedding(nn.Module):
    """One table of byte embeddings for the input and, transposed, for the output projection.

    Args:
        vocab_size: ids that count; the table is padded beyond, and padded rows never show.
        dim: width D.
        pad_to: the table has a multiple of this many rows.
        logit_scale, softcap: z = logit_scale * x W^T, then softcap * tanh(z / softcap).
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        pad_to: int = 64,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("dim", dim), ("pad_to", pad_to)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        rows = -(-vocab_size // pad_to) * pad_to
        self.vocab_size, self.logit_scale, self.softcap = vocab_size, logit_scale, softcap
        self.weight = nn.Parameter(torch.randn(rows, dim) * dim**-0.5)

    def embed(self, byte_ids: Tensor) -> Tensor:
        """byte_ids (...) -> (..., D)."""
        return F.embedding(byte_ids.int(), self.weight)

    def pool(self, byte_ids: Tensor, patches: Patches, *, mode: str = "mean") -> Tensor:
        """The pooled embeddings of each patch, (P, D); the (T, D) embeddings never exist."""
        return byte_pool(byte_ids.flatten(), self.weight, patches.cu_patchlens, mode=mode)

    def logits(self, x: Tensor, *, valid_vocab: int | None = None) -> Tensor:
        """x (..., D) -> (..., V) fp32, V = valid_vocab or vocab_size."""
        weight = self.weight[: self.vocab_size if valid_vocab is None else valid_vocab]
        # The loss is a small difference of large logits: bf16 ones would cost it 1e-2.
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logit_scale * F.linear(x.float(), weight.float())
            return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def loss(
        self, x: Tensor, targets: Tensor, *, ignore_index: int = -100
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy of x (..., D) against targets (...), without the logits in memory.

        Returns:
            (loss_sum, n_valid): nats over the targets not ignored, and their number, both 0-d.
        """
        loss_sum = linear_cross_entropy(
            x,
            self.weight,
            targets,
            reduction="sum",
            ignore_index=ignore_index,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            valid_vocab=self.vocab_size,
        )
        return loss_sum, (targets.long() != ignore_index).sum()

    def sample(
        self,
        x: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Tensor | None = None,
        valid_vocab: int | None = None,
    ) -> Tensor:
        """Next ids of x (..., D), (...) int64: see `stlm_kernels.linear_sample`."""
        return linear_sample(
            x,
            self.weight,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            valid_vocab=self.vocab_size if valid_vocab is None else valid_vocab,
        )


def dense_cu_seqlens(byte_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Document borders of dense (B, T) ids, whose rows are the documents."""
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None with dense byte_ids, got a tensor")
    rows, length = byte_ids.shape
    return torch.arange(rows + 1, dtype=torch.int32, device=byte_ids.device) * length
