"""A user's code for type checkers: `tests/project/test_typing.py` reads what they reveal of it."""

from __future__ import annotations

from typing import reveal_type

import torch

from stlm_models import (
    STLM,
    Attention,
    BytePatcher,
    BytePooling,
    ByteUnpooling,
    ModelConfig,
    Router,
    TiedEmbedding,
)
from stlm_models.training.objectives import MultiByteHeads

ids = torch.zeros(2, 8, dtype=torch.int64)
model = STLM(ModelConfig())
reveal_type(model(ids))  # logits
reveal_type(model(ids, ids))  # loss
reveal_type(model(ids, targets=ids, cu_seqlens=None))  # loss
reveal_type(model.generate(b"the ", max_new_bytes=8))  # bytes
patches = BytePatcher("space")(ids)
reveal_type(patches.read_ids)  # one tensor
hidden = TiedEmbedding(256, 64).embed(ids)
reveal_type(hidden)  # one tensor
reveal_type(Attention(64, heads=2)(hidden))  # one tensor
states = BytePooling("mean")(hidden, patches)
reveal_type(states)  # one tensor
reveal_type(ByteUnpooling(64)(states, patches, residual=hidden))  # one tensor
reveal_type(Router(64)(hidden).starts)  # one tensor
reveal_type(MultiByteHeads(64, 2)(hidden, ids, model.embedding))  # loss
model(3)  # refused
model(ids, no_such_argument=1)  # refused
Attention(64, heads=2)(hidden, hidden)  # refused
