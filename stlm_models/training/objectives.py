"""Objectives beside the next byte: several bytes ahead, a teacher, the model's own texts.

Each is a few lines of a training loop; none holds logits of a text in memory but the teacher's.

Several bytes ahead (heads beside the model, which is used without them):

    heads = MultiByteHeads(config.byte_dim, 4)   # its parameters join the optimiser's
    hidden = model.hidden(ids, cu_seqlens=boundaries)
    targets = targets_of_documents(targets, boundaries)  # of layers.packing: rows of none are -100
    loss_sum, n_valid = model.embedding.loss(hidden, targets)
    extra_sum, n_extra = heads(hidden, targets, model.embedding, cu_seqlens=boundaries)
    loss = loss_sum / n_valid + 0.3 * extra_sum / n_extra

Distillation from a larger model that reads the same bytes:

    with torch.no_grad():
        teacher_logits = teacher(ids, cu_seqlens=boundaries)
    hidden = student.hidden(ids, cu_seqlens=boundaries)
    loss_sum, n_valid = distillation_loss(
        student.embedding, hidden, targets, teacher_logits, weight=0.5, temperature=2.0,
        cu_seqlens=boundaries,
    )
    loss = loss_sum / n_valid

Self-play fine-tuning (SPIN), again and again with the model as it then is for its opponent:

    round = self_play(model, prompts, real_continuations, seed=0)
    for _ in range(steps):
        spin_loss(model, round, beta=0.1).backward()
        ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm_kernels import segment_pool

from ..config import BYTES, IGNORED
from ..generation.engine import prompt_ids
from ..layers.embedding import TiedEmbedding
from ..layers.packing import dense_cu_seqlens, document_starts, targets_of_documents
from ..layers.typed_call import typed_as
from ..model import STLM


class MultiByteHeads(nn.Module):
    """A linear map for each byte after the next, which the tied table turns into its loss.

    A fresh head is zero: it predicts all bytes alike and sends no gradient to the model yet.

    Args:
        dim: width D of the hidden states.
        n: how many bytes are predicted from a position, the next one included; at least 2. There
            are n - 1 heads.

    Source: multi-token prediction, arXiv 2404.19737.
    """

    def __init__(self, dim: int, n: int) -> None:
        super().__init__()
        if n < 2:
            raise ValueError(f"n: expected at least 2, the next byte and one more, got {n}")
        self.heads = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(n - 1))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        hidden: Tensor,  # (B, T, D) or (T, D)
        targets: Tensor,  # (B, T) or (T,) integers
        embedding: TiedEmbedding,
        *,
        cu_seqlens: Tensor | None = None,  # (S+1,) int32
    ) -> tuple[Tensor, Tensor]:
        """The summed loss of the bytes after the next, none of them of another document.

        Args:
            hidden: what `STLM.hidden` gives.
            targets: the next byte of each position, as `STLM.forward` takes them; -100 is ignored.
            embedding: the model's table, which gets its gradient.
            cu_seqlens: document boundaries of packed arguments; None is one document.

        Returns:
            (loss_sum, n_valid): nats of all heads, and how many targets they had, both 0-d.

        Raises:
            ValueError: for targets of another shape than hidden, and dense ones with cu_seqlens.
        """
        if targets.shape != hidden.shape[:-1]:
            expected = f"the shape of hidden without D {tuple(hidden.shape[:-1])}"
            raise ValueError(f"targets: expected {expected}, got {tuple(targets.shape)}")
        if targets.dim() == 2:
            cu_seqlens = dense_cu_seqlens(targets, cu_seqlens)
        flat = targets.flatten().long()
        ahead = [_targets_ahead(flat, i + 1, cu_seqlens) for i in range(len(self.heads))]
        states = torch.stack([head(hidden.flatten(0, -2)) for head in self.heads])
        return embedding.loss(states, torch.stack(ahead), ignore_index=IGNORED)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def _targets_ahead(targets: Tensor, by: int, cu_seqlens: Tensor | None) -> Tensor:
    """targets (T,) of the position this far ahead, -100 where its document has none."""
    length = len(targets)
    ahead = torch.full_like(targets, IGNORED)
    ahead[: max(0, length - by)] = targets[by:]
    if cu_seqlens is None:
        return ahead
    positions = torch.arange(length, device=targets.device)
    starts = document_starts(cu_seqlens, length)
    later = (positions + by).clamp(max=max(0, length - 1))
    same = (starts[later] == starts) & (later < cu_seqlens[-1])
    return ahead.masked_fill(~same, IGNORED)


def distillation_loss(
    embedding: TiedEmbedding,
    hidden: Tensor,  # (..., D)
    targets: Tensor,  # (...) integers
    teacher_logits: Tensor,  # (..., vocab_size)
    *,
    weight: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,  # (...) bool
    cu_seqlens: Tensor | None = None,  # (S+1,) int32
) -> tuple[Tensor, Tensor]:
    """(1 - weight) * nats of the targets + weight * temperature^2 * KL(teacher || student).

    Args:
        embedding, hidden: of the student.
        targets: -100 is ignored, by both terms.
        teacher_logits: as given, without gradient.
        weight: 0 to 1.
        temperature: see `stlm_kernels.linear_kl_div`.
        mask: where the teacher counts; None is everywhere. Elsewhere the first term stands alone.
        cu_seqlens: document boundaries of packed hidden (T, D); nothing counts from its last entry
            on.

    Returns:
        (loss_sum, n_valid): the sum over the targets not ignored, and their number, both 0-d.

    Raises:
        ValueError: for a weight out of range, for cu_seqlens with dense hidden, and as
            `stlm_kernels.linear_kl_div`.

    Source: arXiv 1503.02531.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: expected 0 to 1, got {weight}")
    if targets.dim() != 1 and cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected None with dense targets, got a tensor")
    targets = targets_of_documents(targets, cu_seqlens)
    counted = targets.long() != IGNORED  # a uint8 156 would compare as -100
    byte_loss, n_valid = embedding.loss(hidden, targets, ignore_index=IGNORED)
    divergence = embedding.kl_div(
        hidden,
        teacher_logits,
        temperature=temperature,
        mask=counted if mask is None else counted & mask,
    )
    return (1 - weight) * byte_loss + weight * divergence, n_valid


@dataclass(frozen=True)
class SelfPlay:
    """A round of self-play: what follows each prompt in the data, and what the opponent wrote.

    Args:
        prompts, real, generated: one of each for each of S texts.
        reference: (S,) log p(real) - log p(generated) of the opponent.
    """

    prompts: list[bytes]
    real: list[bytes]
    generated: list[bytes]
    reference: Tensor


@torch.no_grad()
def self_play(
    opponent: STLM,
    prompts: Sequence[bytes],
    real: Sequence[bytes],
    *,
    temperature: float = 1.0,
    seed: int | None = None,
) -> SelfPlay:
    """Let a model continue the prompts, each as far as the real text goes, and judge both.

    Args:
        opponent: usually the model as it is before this round.
        prompts, real: texts and what follows them, each continuation at least a byte.
        temperature, seed: see `STLM.generate_batch`.

    Raises:
        ValueError: for other than one continuation for each prompt, or an empty one.
    """
    _check_continuations(prompts, real)
    longest = max(map(len, real), default=0)
    texts = opponent.generate_batch(
        prompts, max_new_bytes=longest, temperature=temperature, seed=seed
    )
    # As long as the real ones: a difference in length would be the easiest to learn.
    generated = [text[: len(true)] for text, true in zip(texts, real, strict=True)]
    margin = continuation_logprobs(opponent, prompts, real)
    margin = margin - continuation_logprobs(opponent, prompts, generated)
    return SelfPlay(list(prompts), list(real), generated, margin)


def spin_loss(model: STLM, played: SelfPlay, *, beta: float = 0.1) -> Tensor:
    """The mean of -logsigmoid(beta * (margin - played.reference)), 0-d.

    margin is log p(real) - log p(generated) of the model. Where it is that of its opponent the loss
    is log 2.

    Args:
        beta: above 0; how soon a difference is enough.

    Raises:
        ValueError: for a beta that is not above 0.

    Source: SPIN, arXiv 2401.01335.
    """
    if not beta > 0:
        raise ValueError(f"beta: expected a number above 0, got {beta}")
    both = continuation_logprobs(
        model, played.prompts * 2, [*played.real, *played.generated]
    ).unflatten(0, (2, -1))
    return -F.logsigmoid(beta * (both[0] - both[1] - played.reference)).mean()


def continuation_logprobs(
    model: STLM, prompts: Sequence[bytes], continuations: Sequence[bytes]
) -> Tensor:
    """(S,) nats: the log-probability of each continuation after its prompt, differentiable.

    The model sees of a prompt what `STLM.generate` shows it; its own bytes do not count.

    Raises:
        ValueError: for other than one continuation for each prompt, or an empty one.
    """
    _check_continuations(prompts, continuations)
    ids: list[int] = []
    targets: list[int] = []
    boundaries = [0]
    for prompt, continuation in zip(prompts, continuations, strict=True):
        seen = prompt_ids(prompt)
        ids += [*seen, *continuation[:-1]]
        targets += [*[IGNORED] * (len(seen) - 1), *continuation]
        boundaries.append(len(ids))
    device = model.embedding.weight.device
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    hidden = model.hidden(
        torch.tensor(ids, dtype=torch.int16, device=device), cu_seqlens=cu_seqlens
    )
    logprobs = model.embedding.logprobs(
        hidden,
        torch.tensor(targets, dtype=torch.int16, device=device),
        ignore_index=IGNORED,
        valid_vocab=BYTES,  # as they are generated
    )
    return segment_pool(logprobs[:, None], cu_seqlens, mode="sum")[:, 0]


def _check_continuations(prompts: Sequence[bytes], continuations: Sequence[bytes]) -> None:
    if len(prompts) != len(continuations):
        expected = f"one for each of {len(prompts)} prompts"
        raise ValueError(f"continuations: expected {expected}, got {len(continuations)}")
    if not all(continuations):
        raise ValueError("continuations: expected at least one byte in each, got an empty one")
