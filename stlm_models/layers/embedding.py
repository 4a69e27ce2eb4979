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
    linear_cross_entropy,
    linear_kl_div,
    linear_logprobs,
    linear_sample,
)
from stlm_kernels.runtime import check_ids, compute_dtype, values_visible, without_autocast


class TiedEmbedding(nn.Embedding):
    """One table of byte embeddings for the input and, transposed, for the output projection.

    Args:
        vocab_size: ids that count; the table is padded beyond, and padded rows never show.
        dim: width D.
        pad_to: the table has a multiple of this many rows.
        logit_scale, softcap: z = logit_scale * x W^T, then softcap * tanh(z / softcap).

    Under FSDP2 the table belongs to the root's group: `fully_shard` the blocks, then the model that
    holds the table and calls `embed` and `loss` in its own forward. A sharded table raises.

    It is an `nn.Embedding` of the table's rows, so that what looks for one (hooks on the input
    embeddings, say) finds it; `forward` is `embed`.

    >>> table = TiedEmbedding(257, 64)
    >>> table.logits(table.embed(torch.tensor([*b"bytes"]))).shape
    torch.Size([5, 257])
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
        for name, value in (("vocab_size", vocab_size), ("dim", dim), ("pad_to", pad_to)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        rows = -(-vocab_size // pad_to) * pad_to
        super().__init__(rows, dim, _weight=torch.randn(rows, dim) * dim**-0.5)
        self.vocab_size, self.logit_scale, self.softcap = vocab_size, logit_scale, softcap

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def _table(self) -> Tensor:
        """The table of the input, whole; one shard of it would give wrong losses or none."""
        return self._whole(self.weight)

    def _output_table(self) -> Tensor:
        """The table of the output, whole: the same."""
        return self._table()

    def output_rows(self, count: int) -> Tensor:
        """Return the output table's rows of the first ids, (count, D)."""
        return self._output_table()[:count]

    def _whole(self, weight: Tensor) -> Tensor:
        if hasattr(weight, "placements"):
            raise ValueError(
                "weight: expected the whole table, got a DTensor; under FSDP2 keep it in the "
                "root's group (fully_shard the blocks, then the model that holds it) and call "
                "its methods in the model's forward"
            )
        return weight

    def embed(self, byte_ids: Tensor) -> Tensor:
        """byte_ids (...) -> (..., D); IndexError for one of no byte (values: CPU, eager)."""
        _refuse_padded_ids(byte_ids, self.vocab_size)
        return lookup(self._table(), byte_ids.int())

    def forward(self, byte_ids: Tensor) -> Tensor:
        """Embed byte_ids: see `embed`."""
        return self.embed(byte_ids)

    def pool(self, byte_ids: Tensor, patches: Patches, *, mode: str = "mean") -> Tensor:
        """The pooled embeddings of each patch, (P, D); the (T, D) embeddings never exist."""
        _refuse_padded_ids(byte_ids, self.vocab_size)
        return byte_pool(byte_ids.flatten(), self._table(), patches.cu_patchlens, mode=mode)

    def logits(self, x: Tensor, *, valid_vocab: int | None = None) -> Tensor:
        """x (..., D) -> (..., V) fp32 (fp64 for fp64), V = valid_vocab or vocab_size.

        As in `loss`, x and table are cast to x's dtype or autocast's, and their products are not
        rounded: the loss is a small difference of large logits, and bf16 ones would cost it 1e-2.
        """
        weight = self.output_rows(self.vocab_size if valid_vocab is None else valid_vocab)
        dtype = compute_dtype(x)
        wide = torch.promote_types(dtype, torch.float32)
        with without_autocast(x):
            operands = x.to(dtype).to(wide), weight.to(dtype).to(wide)
            logits = F.linear(*operands)
            logits = logits if self.logit_scale == 1 else self.logit_scale * logits
            return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def loss(
        self,
        x: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        valid_vocab: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy of x (..., D) against targets (...), without the logits in memory.

        Ids from valid_vocab (None: vocab_size) on have no probability and are no targets.

        Returns:
            (loss_sum, n_valid): nats over the targets not ignored, and their number, both 0-d.
        """
        loss_sum = linear_cross_entropy(
            x,
            self._output_table(),
            targets,
            reduction="sum",
            ignore_index=ignore_index,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            valid_vocab=self.vocab_size if valid_vocab is None else valid_vocab,
        )
        return loss_sum, (targets.long() != ignore_index).sum()

    def logprobs(
        self,
        x: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        valid_vocab: int | None = None,
    ) -> Tensor:
        """Log-probability of each target (...) after x (..., D), fp32; 0 where it is ignored.

        valid_vocab as in `loss`.
        """
        logprobs, _ = linear_logprobs(
            x,
            self._output_table(),
            targets,
            ignore_index=ignore_index,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            valid_vocab=self.vocab_size if valid_vocab is None else valid_vocab,
        )
        return logprobs

    def kl_div(
        self,
        x: Tensor,
        teacher_logits: Tensor,
        *,
        temperature: float = 1.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The sum of temperature^2 * KL(teacher || this) over x (..., D) where mask (...) is True.

        teacher_logits (..., vocab_size) are taken as given: see `stlm_kernels.linear_kl_div`.
        """
        return linear_kl_div(
            x,
            self._output_table(),
            teacher_logits,
            temperature=temperature,
            mask=mask,
            reduction="sum",
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            valid_vocab=self.vocab_size,
        )

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
            self._output_table(),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            valid_vocab=self.vocab_size if valid_vocab is None else valid_vocab,
        )


class UntiedEmbedding(TiedEmbedding):
    """Embedding with a second table, of the same shape, for the output projection alone.

    >>> table = UntiedEmbedding(257, 64)
    >>> table.weight.shape, table.output_weight.shape
    (torch.Size([320, 64]), torch.Size([320, 64]))
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
        super().__init__(vocab_size, dim, pad_to=pad_to, logit_scale=logit_scale, softcap=softcap)
        self.output_weight = nn.Parameter(torch.randn_like(self.weight) * dim**-0.5)

    def _output_table(self) -> Tensor:
        return self._whole(self.output_weight)


def _refuse_padded_ids(byte_ids: Tensor, vocab_size: int) -> None:
    """A lookup would find the rows behind the vocabulary, which stand for nothing."""
    if values_visible(byte_ids):
        check_ids(byte_ids, vocab_size)


def lookup(
    table: Tensor,  # (V, D)
    ids: Tensor,  # (...) int32|int64
) -> Tensor:  # (..., D)
    """Return `F.embedding(ids, table)`; its gradient is accumulated in float32 and cast once.

    Of a 16-bit table F.embedding (and indexing) adds up the gradient in 16 bits on a CPU: a bf16
    row that is used more than 256 times stops growing.
    """
    is_narrow = torch.promote_types(table.dtype, torch.float32) != table.dtype
    if is_narrow and table.requires_grad and torch.is_grad_enabled():
        return F.embedding(ids, table.float()).to(table.dtype)
    return F.embedding(ids, table)
