"""An `STLM` and its output in two parts, for those who bring a loss of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from stlm_models import STLM

from .arguments_stlm import refuse_others
from .layout_stlm import layout_of

# transformers copies this file into saved folders: imports of stlm are absolute and public.


class Backbone(torch.nn.Module):
    """An `STLM` without its output: `last_hidden_state` (B, T, hidden_size).

    It is made for a call and holds nothing of its own; any other attribute is that of the `STLM`.
    """

    def __init__(self, stlm: STLM) -> None:
        super().__init__()
        self.stlm = stlm

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.stlm, name)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments as in `STLMForCausalLM.forward`, without a cache."""
        refuse_others(kwargs)
        layout = layout_of(input_ids, attention_mask, position_ids, cu_seq_lens_q, seq_idx)
        hidden = self.stlm.hidden(layout.take(input_ids), cu_seqlens=layout.cu_seqlens)
        return BaseModelOutputWithPast(last_hidden_state=layout.put_back(hidden))


class OutputTable(torch.nn.Module):
    """The tied table as an output projection: a view of its rows, no parameter of its own.

    Args:
        stlm: whose table it is.
        rows: as many as have probability; None is the whole vocabulary.
    """

    bias = None

    def __init__(self, stlm: STLM, rows: int | None) -> None:
        super().__init__()
        self._owner = (stlm,)  # no submodule: its parameters have a name already
        self.rows = stlm.config.vocab_size if rows is None else rows

    @property
    def weight(self) -> Tensor:
        """(rows, D), whose gradient is the table's."""
        return self._owner[0].embedding.weight[: self.rows]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., rows), without the config's logit_scale and softcap."""
        return F.linear(x, self.weight)
