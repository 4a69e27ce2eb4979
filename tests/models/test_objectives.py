"""Objectives beside the next byte: their values by plain torch, and that the right things move."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.models import TEXT, TINY, packed, scrambled
from helpers.norms import assert_same_rows
from torch import Tensor, nn

from stlm_models import STLM, TiedEmbedding
from stlm_models.config import BOS_ID, BYTES, IGNORED
from stlm_models.training.objectives import (
    MultiByteHeads,
    continuation_logprobs,
    distillation_loss,
    self_play,
    spin_loss,
)


def table(**options: float) -> TiedEmbedding:
    return TiedEmbedding(257, 8, **options).double()


def steps(parameters: list[nn.Parameter], loss: Callable[[], Tensor], n: int = 12) -> None:
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(n):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def small(seed: int) -> STLM:
    torch.manual_seed(seed)
    return STLM(dataclasses.replace(TINY, core_layers=1, decoder_layers=1))


def next_bytes(ids: Tensor, boundaries: Tensor) -> Tensor:
    """Return what follows each id; nothing after the last one of a document."""
    targets = ids.long().roll(-1)
    targets[boundaries[1:].long() - 1] = IGNORED
    return targets


class TestMultiByteHeads:
    DOCUMENTS = (0, 5, 5, 6, 13)
    """Documents in 15 rows: one empty, one shorter than the heads look ahead; two rows of none."""

    def plain(
        self, heads: MultiByteHeads, hidden: Tensor, targets: Tensor, weight: Tensor
    ) -> tuple[Tensor, int]:
        total, n = hidden.new_zeros(()), 0
        for begin, end in zip(self.DOCUMENTS, self.DOCUMENTS[1:], strict=False):
            for t in range(begin, end):
                for ahead, head in enumerate(heads.heads, start=1):
                    if t + ahead < end and targets[t + ahead] != IGNORED:
                        logits = 0.7 * weight[:257] @ head(hidden[t])
                        total = total - logits.log_softmax(0)[targets[t + ahead]]
                        n += 1
        return total, n

    def test_loss_and_gradients_by_plain_torch(self) -> None:
        embedding, heads = table(logit_scale=0.7), MultiByteHeads(8, 4).double()
        for head in heads.heads:
            nn.init.normal_(head.weight)
        hidden = torch.randn(15, 8, dtype=torch.float64, requires_grad=True)
        targets = torch.randint(0, 256, (15,))
        targets[[3, 12]] = IGNORED
        wanted = [hidden, embedding.weight, *heads.parameters()]
        boundaries = torch.tensor(self.DOCUMENTS, dtype=torch.int32)
        loss, n_valid = heads(hidden, targets, embedding, cu_seqlens=boundaries)
        expected, n = self.plain(heads, hidden, targets, embedding.weight)
        assert n_valid == n == (9 - 3) + (15 - 3)
        torch.testing.assert_close(loss, expected)
        for got, true in zip(
            torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True
        ):
            torch.testing.assert_close(got, true)

    def test_dense_rows_are_documents(self) -> None:
        embedding, heads = table(), MultiByteHeads(8, 3).double()
        nn.init.normal_(heads.heads[0].weight)
        hidden = torch.randn(2, 6, 8, dtype=torch.float64)
        targets = torch.randint(0, 256, (2, 6))
        boundaries = torch.tensor([0, 6, 12], dtype=torch.int32)
        dense = heads(hidden, targets, embedding)
        flat = heads(hidden.flatten(0, 1), targets.flatten(), embedding, cu_seqlens=boundaries)
        assert dense == flat
        assert dense[1] == 2 * (5 + 4)
        alone = heads(hidden[0], targets[0].short(), embedding)
        assert alone[1] == 5 + 4
        assert heads(hidden[0, :1], targets[0, :1], embedding)[1] == 0

    def test_they_learn(self) -> None:
        model, heads = small(0), MultiByteHeads(16, 3)
        ids, boundaries = packed([b"abcabcabcabc", b"cabcabcab"])
        targets = next_bytes(ids, boundaries)

        def loss() -> Tensor:
            hidden = model.hidden(ids, cu_seqlens=boundaries)
            byte_sum, n_valid = model.embedding.loss(hidden, targets)
            extra, n = heads(hidden, targets, model.embedding, cu_seqlens=boundaries)
            return byte_sum / n_valid + extra / n

        before = float(loss().detach())
        assert math.isclose(before, 2 * math.log(257), rel_tol=1e-4)
        steps([*model.parameters(), *heads.parameters()], loss, 30)
        hidden = model.hidden(ids, cu_seqlens=boundaries)
        extra, n = heads(hidden, targets, model.embedding, cu_seqlens=boundaries)
        assert extra / n < 0.6 * math.log(257)

    def test_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match="n: expected at least 2"):
            MultiByteHeads(8, 1)
        with pytest.raises(ValueError, match="targets: expected the shape of hidden"):
            MultiByteHeads(8, 2)(torch.zeros(3, 8), torch.zeros(4).long(), table())


class TestDistillation:
    def inputs(self) -> tuple[TiedEmbedding, Tensor, Tensor, Tensor]:
        embedding = table(logit_scale=0.7, softcap=5.0)
        hidden = 2 * torch.randn(2, 5, 8, dtype=torch.float64)
        targets = torch.randint(0, 256, (2, 5))
        targets[0, 1] = targets[1, 4] = IGNORED
        return embedding, hidden, targets, torch.randn(2, 5, 257, dtype=torch.float64)

    def test_value_by_plain_torch(self) -> None:
        embedding, hidden, targets, teacher = self.inputs()
        mask = torch.rand(2, 5) < 0.6
        got, n_valid = distillation_loss(
            embedding, hidden, targets, teacher, weight=0.3, temperature=2.0, mask=mask
        )
        z = 5 * torch.tanh(0.7 * hidden @ embedding.weight[:257].T / 5)
        byte_sum = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum")
        p, q = ((x / 2).log_softmax(-1) for x in (teacher, z))
        kl = (p.exp() * (p - q)).sum(-1)[mask & (targets != IGNORED)].sum()
        torch.testing.assert_close(got, 0.7 * byte_sum + 0.3 * 4 * kl)
        assert n_valid == 8

    def test_the_ends_of_the_weight(self) -> None:
        embedding, hidden, targets, teacher = self.inputs()
        got, _ = distillation_loss(embedding, hidden, targets, teacher, weight=0.0)
        torch.testing.assert_close(got, embedding.loss(hidden, targets)[0])
        same = embedding.logits(hidden).double()
        got, _ = distillation_loss(embedding, hidden, targets, same, weight=1.0)
        assert abs(got) < 1e-5
        with pytest.raises(ValueError, match=r"weight: expected 0 to 1, got 1\.5"):
            distillation_loss(embedding, hidden, targets, teacher, weight=1.5)

    def test_rows_of_no_document_do_not_count(self) -> None:
        embedding, boundaries = table(), torch.tensor([0, 4, 7], dtype=torch.int32)
        hidden, teacher = torch.randn(9, 8).double(), torch.randn(9, 257).double()
        targets = torch.randint(0, 256, (9,))
        want, n_wanted = distillation_loss(embedding, hidden[:7], targets[:7], teacher[:7])
        got, n_valid = distillation_loss(embedding, hidden, targets, teacher, cu_seqlens=boundaries)
        assert n_valid == n_wanted == 7
        torch.testing.assert_close(got, want)
        with pytest.raises(ValueError, match="cu_seqlens: expected None with dense targets"):
            distillation_loss(
                embedding, hidden[None], targets[None], teacher[None], cu_seqlens=boundaries
            )

    def test_byte_156_is_a_target(self) -> None:
        """Byte 156 has the bits that -100 has as an int8."""
        embedding, hidden = table(), torch.randn(3, 8).double()
        teacher, targets = torch.randn(3, 257).double(), torch.tensor([156, 7, 156])
        want = distillation_loss(embedding, hidden, targets, teacher)
        got = distillation_loss(embedding, hidden, targets.to(torch.uint8), teacher)
        torch.testing.assert_close(got, want)

    def test_the_student_comes_nearer(self) -> None:
        student, teacher = small(0), small(1)
        nn.init.normal_(teacher.to_output.weight)
        ids, boundaries = packed([TEXT, b"more of it"])
        targets = next_bytes(ids, boundaries)
        with torch.no_grad():
            wanted = teacher(ids, cu_seqlens=boundaries)

        def divergence() -> Tensor:
            hidden = student.hidden(ids, cu_seqlens=boundaries)
            total, n = distillation_loss(student.embedding, hidden, targets, wanted, weight=1.0)
            return total / n

        before = divergence().detach()
        steps(list(student.parameters()), divergence, 20)
        assert divergence() < 0.7 * before


class TestSelfPlay:
    PROMPTS = (b"", b"the ", b"one and ")
    REAL = (b"alpha", b"end", b"two three")

    def test_logprobs_are_those_of_the_continuation(self) -> None:
        model = scrambled()
        with torch.no_grad():
            model.embedding.weight[BOS_ID] *= 4  # often the likeliest id, and never a byte
        got = continuation_logprobs(model, self.PROMPTS, self.REAL)
        for value, prompt, real in zip(got, self.PROMPTS, self.REAL, strict=True):
            ids = [*([*prompt] or [BOS_ID]), *real]
            rows = model(torch.tensor(ids))[:, :BYTES].log_softmax(-1)[-1 - len(real) : -1]
            expected = rows.gather(1, torch.tensor([*real])[:, None]).sum()
            assert_same_rows(value, expected)

    def test_the_loss_by_its_formula(self) -> None:
        opponent, model = small(0), small(1)
        for one in (opponent, model):
            nn.init.normal_(one.to_output.weight, std=0.3)
        played = self_play(opponent, self.PROMPTS, self.REAL, seed=3)
        assert [len(text) for text in played.generated] == [len(text) for text in self.REAL]
        assert (
            played.generated[1]
            == opponent.generate_batch(self.PROMPTS, max_new_bytes=9, seed=3)[1][:3]
        )
        assert not played.reference.requires_grad
        # Its opponent is as likely as itself to have written either.
        torch.testing.assert_close(spin_loss(opponent, played), torch.tensor(math.log(2)))
        real, generated, reference, opposed = (
            continuation_logprobs(m, self.PROMPTS, texts)
            for m in (model, opponent)
            for texts in (self.REAL, played.generated)
        )
        gain = (real - reference) - (generated - opposed)
        expected = (1 + (-0.2 * gain).exp()).log().mean()
        assert_same_rows(spin_loss(model, played, beta=0.2), expected)

    def test_real_texts_become_likelier_than_its_own(self) -> None:
        model = small(0)
        played = self_play(model, self.PROMPTS, self.REAL, seed=1)
        steps(list(model.parameters()), lambda: spin_loss(model, played))
        real, generated = (
            continuation_logprobs(model, self.PROMPTS, texts)
            for texts in (self.REAL, played.generated)
        )
        assert (real - generated > played.reference + 2).all()
        assert spin_loss(model, played) < 0.9 * math.log(2)

    def test_wrong_arguments(self) -> None:
        model = small(0)
        with pytest.raises(ValueError, match="continuations: expected one for each of 2 prompts"):
            self_play(model, [b"a", b"b"], [b"c"])
        with pytest.raises(ValueError, match="continuations: expected at least one byte in each"):
            continuation_logprobs(model, [b"a"], [b""])
        with pytest.raises(ValueError, match="beta: expected a number above 0"):
            spin_loss(model, self_play(model, [b"a"], [b"c"], seed=0), beta=0.0)
