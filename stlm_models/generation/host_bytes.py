"""Stages of bytes on the host, where a call of torch takes longer than what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stlm_kernels import runtime

from ..layers.embedding import TiedEmbedding, UntiedEmbedding
from ..layers.linear import is_plain
from ..layers.ngrams import NgramPooling, powers
from ..layers.norms import host_rms_norm
from .followers import IncrementalFollowers
from .plain_layers import DTYPES, hooks_of
from .stages import ByteModel
from .state import IncrementalNgrams

Rows = NDArray[np.int64] | slice
"""Rows of a batch, (R,); a slice of all of them reads and writes without a copy."""
STAGES = ("ngram_rows", "own_states", "core_inputs", "core_states", "output_states")
OUTSIDE = "stlm_models.model"


class HostBytes:
    """Stages of each row's next byte: up to its own state, and behind the decoder.

    They run on the weights of plain modules, in numpy but for products; sums have numpy's order.

    Args:
        model: an `STLM` for which `is_plain_model` holds.
        ngrams: the last ids of each row, where the model has n-grams.
        followers: of the rows.
    """

    def __init__(
        self, model: ByteModel, ngrams: IncrementalNgrams | None, followers: IncrementalFollowers
    ) -> None:
        self.model, self.followers, self._ngrams = model, followers, ngrams
        self._table = model.embedding.weight.detach().numpy()
        self._vocab_size = model.embedding.vocab_size
        self._output = model.to_output.weight.t()
        self._projection: Tensor | None = None
        if model.ngrams is not None:
            sizes = model.ngrams.sizes
            self._powers = powers(sizes, model.ngrams.multipliers, max(sizes)).numpy()
            self._tables = [table.detach().numpy() for table in model.ngrams.tables]
            project = model.ngrams.projection if model.is_flat else model.ngrams_to_bytes
            self._projection = None if project is None else project.weight.t()
        self._hooks = hooks_of([*outer_modules(model)])

    def serves(self, byte_ids: Tensor) -> bool:
        """Return whether the next step is plain modules' code alone, on values that can be read."""
        if any(self._hooks) or not runtime.values_visible(byte_ids) or torch.is_grad_enabled():
            return False
        weight = self.model.embedding.weight
        return runtime.compute_dtype(weight) == weight.dtype

    def own_states(
        self, byte_ids: Tensor, rows: Rows
    ) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any]]:
        """Show each of these rows (R,) its next id, of ids (B,).

        Returns:
            embeddings (R, D), n-gram rows (R, ngram_dim) where there are n-grams, and own states
            (R, D).
        """
        ids = byte_ids.numpy()[rows]
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            runtime.check_ids(
                byte_ids[torch.from_numpy(np.arange(len(byte_ids))[rows])], self._vocab_size
            )
        embedded = self._table[ids]
        own = np.empty_like(embedded)
        host_rms_norm(embedded, own)
        follows = self.followers.host_step(ids, rows)
        if follows is not None:
            own += follows
        if self._ngrams is None:
            return embedded, None, own
        ngrams = self._ngram_rows(self._ngrams.last_ids.numpy(), ids, rows)
        if self._projection is not None:
            torch.from_numpy(own).addmm_(torch.from_numpy(ngrams), self._projection)
        return embedded, ngrams, own

    def _ngram_rows(
        self, last_ids: NDArray[np.int64], ids: NDArray[np.int64], rows: Rows
    ) -> NDArray[Any]:
        """`NgramPooling.embed` once the last ids (B, n) hold these."""
        last_ids[rows, :-1] = last_ids[rows, 1:]
        last_ids[rows, -1] = ids
        places = last_ids[rows] @ self._powers % len(self._tables[0])
        found = self._tables[0][places[:, 0]]
        for i, table in enumerate(self._tables[1:], 1):
            found += table[places[:, i]]
        return found

    def output_states(self, x: Tensor) -> Tensor:
        """`STLM.output_states` of x (R, D)."""
        normed = torch.empty_like(x)
        host_rms_norm(x.numpy(), normed.numpy())
        return torch.mm(normed, self._output)


def host_bytes(
    model: ByteModel, ngrams: IncrementalNgrams | None, followers: IncrementalFollowers
) -> HostBytes | None:
    """Return the stages on the host, where all of the model outside its blocks is plain."""
    weight = model.embedding.weight
    if not weight.is_cpu or weight.dtype not in DTYPES:
        return None
    modules = list(outer_modules(model))
    tables = [p for module in modules for p in module.parameters()]
    is_own = (
        type(model.embedding) in (TiedEmbedding, UntiedEmbedding)
        and (model.ngrams is None or type(model.ngrams) is NgramPooling)
        and all(map(is_plain, outer_maps(model)))
        and all(type(p) in runtime.PLAIN and p.dtype == weight.dtype for p in tables)
        and not any("forward" in vars(module) for module in modules)
        and not {"embed", "pool"} & vars(model.embedding).keys()
        and not set(STAGES) & vars(model).keys()
        and all(getattr(type(model), stage).__module__ == OUTSIDE for stage in STAGES)
    )
    return HostBytes(model, ngrams, followers) if is_own else None


def outer_maps(model: ByteModel) -> list[nn.Module]:
    """Return the linear maps outside blocks and core that run on the host."""
    found: list[nn.Module] = [model.to_output]
    if not model.is_flat and model.head is None:
        found += [model.to_core, model.from_core]
    if model.ngrams is not None:
        found += [model.ngrams.projection]
        found += [] if model.ngrams_to_bytes is None else [model.ngrams_to_bytes]
    return found


def outer_modules(model: ByteModel) -> Sequence[nn.Module]:
    """Return the modules outside blocks and core."""
    inner = {"core", "encoder", "decoder", "encoder_feed_forward", "decoder_feed_forward"}
    parts = [part for name, part in model.named_children() if name not in inner]
    return [module for part in parts for module in part.modules()]
