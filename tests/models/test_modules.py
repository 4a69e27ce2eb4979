"""The modules one by one, as they stand in other people's models."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import TEXT, packed
from helpers.norms import assert_same_rows
from torch import Tensor, nn

from stlm_kernels import byte_pool, ngram_embedding
from stlm_models import Attention, BytePatcher, BytePooling, ByteUnpooling, TiedEmbedding
from stlm_models.layers.ngrams import NgramPooling


def naive_attention(layer: Attention, x: Tensor, documents: list[int]) -> Tensor:
    """x (T, D) attended to position by position, in fp64."""
    rows = []
    position = torch.tensor([documents[:t].count(documents[t]) for t in range(len(documents))])
    half = layer.head_dim // 2
    frequencies = layer.rope_base ** (-torch.arange(half).double() / half)
    angles = position[:, None].double() * frequencies

    def heads(weight: Tensor, gain: Tensor | None, turned: bool = True) -> Tensor:
        y = (x.double() @ weight.double().T).unflatten(-1, (-1, layer.head_dim))
        if not turned:
            return y
        if gain is not None:
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
        a, b = y[..., :half], y[..., half:]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    sizes = list(layer.joined["query_key_value"].values())
    query, key, value = layer.query_key_value.weight.split(sizes)
    q, k = heads(query, layer.query_norm), heads(key, layer.key_norm)
    v = heads(value, None, turned=False)
    group = layer.heads // layer.kv_heads
    for t in range(len(x)):
        first = 0 if layer.window is None else max(0, t - layer.window + 1)
        seen = [s for s in range(first, t + 1) if documents[s] == documents[t]]
        per_head = []
        for head in range(layer.heads):
            scores = k[seen, head // group] @ q[t, head] / math.sqrt(layer.head_dim)
            per_head.append(scores.softmax(0) @ v[seen, head // group])
        rows.append(torch.cat(per_head))
    return torch.stack(rows) @ layer.output.weight.double().T


class TestAttention:
    @pytest.mark.parametrize("window", [None, 1, 4, 5, 100])
    @pytest.mark.parametrize(("kv_heads", "qk_norm"), [(4, True), (2, False)])
    def test_against_one_position_at_a_time(
        self, window: int | None, kv_heads: int, qk_norm: bool
    ) -> None:
        torch.manual_seed(1)
        layer = Attention(16, 4, kv_heads=kv_heads, window=window, qk_norm=qk_norm, head_dim=6)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        x = torch.randn(23, 16)
        documents = [0] * 9 + [2] * 3 + [3] * 11
        cu_seqlens = torch.tensor([0, 9, 9, 12, 23], dtype=torch.int32)
        expected = naive_attention(layer, x, documents).float()
        assert_same_rows(layer(x, cu_seqlens=cu_seqlens), expected)
        dense = torch.stack((x, x.flip(0)))
        rows = [naive_attention(layer, row, [0] * 23).float() for row in dense]
        assert_same_rows(layer(dense), torch.stack(rows))
        assert_same_rows(layer(x), rows[0])

    @pytest.mark.parametrize("window", [None, 4])
    def test_rows_of_no_document_are_zero_and_never_read(self, window: int | None) -> None:
        layer = Attention(16, 2, window=window)
        x = torch.randn(12, 16)
        x[9:] = torch.nan
        x.requires_grad_()
        out = layer(x, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32))
        upstream = torch.ones_like(out)
        upstream[9:] = torch.nan
        out.backward(upstream)
        assert out[:9].isfinite().all()
        assert (out[9:] == 0).all()
        assert x.grad is not None
        assert x.grad[:9].isfinite().all()
        assert (x.grad[9:] == 0).all()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all(), name

    def test_nothing_at_all(self) -> None:
        layer = Attention(16, 2, window=4)
        assert layer(torch.zeros(0, 16)).shape == (0, 16)
        assert layer(torch.zeros(2, 0, 16)).shape == (2, 0, 16)
        none = torch.tensor([0, 0], dtype=torch.int32)
        assert (layer(torch.ones(3, 16), cu_seqlens=none) == 0).all()

    def test_refusals(self) -> None:
        layer = Attention(16, 2)
        cu_seqlens = torch.tensor([0, 6], dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens: expected None with a dense x"):
            layer(torch.zeros(2, 3, 16), cu_seqlens=cu_seqlens)
        with pytest.raises(ValueError, match="x: expected shape"):
            layer(torch.zeros(3, 8))
        with pytest.raises(ValueError, match="cache: expected None"):
            layer(torch.zeros(3, 16), cache=())
        with pytest.raises(ValueError, match="window: expected None or at least 1, got 0"):
            Attention(16, 2, window=0)
        with pytest.raises(ValueError, match="attention_kv_heads: expected a divisor"):
            Attention(16, 4, kv_heads=3)


class TestModules:
    def test_dense_ids_are_documents(self) -> None:
        ids = torch.tensor(list(TEXT[:40])).view(2, 20)
        patcher = BytePatcher("space", max_patch_len=5)
        cu_seqlens = torch.tensor([0, 20, 40], dtype=torch.int32)
        for dense, flat in zip(patcher(ids), patcher(ids.flatten(), cu_seqlens), strict=True):
            assert torch.equal(dense, flat)
        with pytest.raises(ValueError, match="cu_seqlens: expected None with dense"):
            patcher(ids, cu_seqlens)

    def test_pooling_and_unpooling_of_dense_states(self) -> None:
        ids = torch.tensor(list(TEXT[:40])).view(2, 20)
        patches = BytePatcher("fixed", patch_size=4)(ids)
        x = torch.randn(2, 20, 8)
        pooled = BytePooling("mean")(x, patches)
        torch.testing.assert_close(pooled, x.view(10, 4, 8).mean(1))
        unpooling = ByteUnpooling(8)
        nn.init.normal_(unpooling.null_state)
        out = unpooling(pooled, patches, residual=x)
        before = torch.cat((unpooling.null_state.expand(2, 1, 8), pooled.view(2, 5, 8)), 1)
        # Bytes 0, 1, 2 of a patch read the one before, byte 3 closes and reads its own.
        read = torch.tensor([(t + 1) // 4 for t in range(20)])
        torch.testing.assert_close(out, before[:, read] + x)
        assert ByteUnpooling(8, null_state=False)(pooled, patches)[0].abs().sum() == 0

    @pytest.mark.parametrize(
        ("mode", "options", "message"),
        [
            ("median", {}, "mode: expected one of"),
            ("max", {"heads": 4}, 'heads: expected None with mode "max", got 4'),
            ("mean", {"dim": 8}, 'dim: expected None with mode "mean", got 8'),
            ("attention", {"heads": 2}, 'dim: expected an int of .* mode "attention", got None'),
            ("attention", {"dim": 8}, 'heads: expected an int of .* mode "attention", got None'),
            ("attention", {"dim": 8, "heads": 0}, "heads: expected an int of at least 1 .*got 0"),
            ("attention", {"dim": 8, "heads": 3}, "heads: expected a divisor of dim = 8, got 3"),
        ],
    )
    def test_pooling_refuses_what_it_would_drop(
        self, mode: str, options: dict[str, int], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            BytePooling(mode, **options)

    def test_attention_pooling_of_dense_states(self) -> None:
        ids = torch.tensor(list(TEXT[:40])).view(2, 20)
        patches = BytePatcher("fixed", patch_size=4)(ids)
        x = torch.randn(2, 20, 12, requires_grad=True)
        pooling = BytePooling("attention", dim=12, heads=3)
        key, value = pooling.key_value(x).view(10, 4, 2, 3, 4).unbind(2)
        weights = ((key * pooling.query).sum(-1) / 2).softmax(1)
        want = pooling.output((weights[..., None] * value).sum(1).flatten(1))
        got = pooling(x, patches)
        torch.testing.assert_close(got, want)
        got.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pooling.parameters())

    def test_unpooling_refuses_to_read_an_open_patch(self) -> None:
        patches = BytePatcher("space")(torch.tensor(list(b"one two three")))
        states = torch.randn(len(patches.cu_patchlens) - 1, 8)
        message = "got byte 0 reading patch 0, which ends with byte 3: it would see bytes that"
        with pytest.raises(ValueError, match=message):
            ByteUnpooling(8)(states, patches._replace(read_ids=patches.patch_ids))
        one_early = torch.cat([patches.read_ids[1:], patches.read_ids[-1:]])
        with pytest.raises(ValueError, match="got byte 2 reading patch 0"):
            ByteUnpooling(8)(states, patches._replace(read_ids=one_early))
        with pytest.raises(IndexError, match="read_ids"):
            ByteUnpooling(8)(states, patches._replace(read_ids=patches.read_ids + 1000))

    def test_tied_embedding(self) -> None:
        table = TiedEmbedding(257, 8, pad_to=64, logit_scale=0.5, softcap=3.0)
        assert table.weight.shape == (320, 8)
        ids = torch.tensor([[1, 2, 256]], dtype=torch.int16)
        torch.testing.assert_close(table.embed(ids), table.weight[[1, 2, 256]][None])
        x = 5 * torch.randn(4, 8)
        expected = 3 * torch.tanh(0.5 * x @ table.weight[:257].T / 3)
        torch.testing.assert_close(table.logits(x), expected)
        patches = BytePatcher("fixed", patch_size=2)(ids[0])
        pooled = table.pool(ids, patches)
        rows = [table.weight[[1, 2]].mean(0), table.weight[256]]
        torch.testing.assert_close(pooled, torch.stack(rows))
        target = torch.tensor([3, -100, 255, 0])
        loss_sum, n_valid = table.loss(x, target)
        torch.testing.assert_close(loss_sum, F.cross_entropy(expected, target, reduction="sum"))
        assert n_valid.item() == 3

    def test_ngrams_are_pooled_before_they_are_projected(self) -> None:
        layer = NgramPooling((2, 3), 61, 4, 8)
        ids, cu_seqlens = packed([TEXT, b"z"])
        patches = BytePatcher("space", max_patch_len=5)(ids, cu_seqlens)
        rows = ngram_embedding(ids, list(layer.tables), ngram_sizes=(2, 3), cu_seqlens=cu_seqlens)
        expected = BytePooling("mean")(layer.projection(rows), patches)
        torch.testing.assert_close(layer(ids, patches, cu_seqlens), expected)

    @pytest.mark.parametrize("hashes", [1, 2, 3])
    def test_ngrams_sum_their_tables_as_blt_does(self, hashes: int) -> None:
        """BLT's loop: all sizes of one hash function, then of the next; windows begin with 0s."""
        torch.manual_seed(0)
        layer = NgramPooling((3, 2), 61, 4, 8, hashes=hashes)
        ids, cu_seqlens = packed([TEXT])
        shifted = [F.pad(ids.long(), (back, 0))[: len(ids)] for back in range(3)]
        want, table = torch.zeros(len(ids), 4), 0
        for prime in (1_000_000_007, 5_915_587_277, 1_500_450_271)[:hashes]:
            for n in (3, 2):
                oldest_first = reversed(shifted[:n])
                powers = [prime**j % 2**64 for j in range(n)]
                powers = [p - 2**64 if p >= 2**63 else p for p in powers]
                total = sum(x * p for x, p in zip(oldest_first, powers, strict=True))
                want = want + layer.tables[table][total % 61]
                table += 1
        assert table == len(layer.tables)
        torch.testing.assert_close(layer.rows(ids, cu_seqlens), want)

    @pytest.mark.parametrize("hashes", [0, 12])
    def test_hash_functions_that_there_are_not(self, hashes: int) -> None:
        with pytest.raises(ValueError, match=f"hashes: expected 1 to 11, got {hashes}"):
            NgramPooling((2,), 61, 4, 8, hashes=hashes)

    @pytest.mark.parametrize("mode", ["mean", "sum"])
    def test_ngrams_equal_a_byte_pool_over_their_hashes(self, mode: str) -> None:
        """The other composition: the (T, dim) rows never exist, but each hash does."""
        layer = NgramPooling((2, 3), 61, 4, 8)
        ids, cu_seqlens = packed([TEXT, b"z"])
        patches = BytePatcher("space", max_patch_len=5)(ids, cu_seqlens)
        rows = torch.arange(61.0)[:, None]
        pooled = sum(
            byte_pool(
                ngram_embedding(ids, [rows], ngram_sizes=(n,), cu_seqlens=cu_seqlens)
                .flatten()
                .int(),
                table,
                patches.cu_patchlens,
                mode=mode,
            )
            for n, table in zip((2, 3), layer.tables, strict=True)
        )
        leaves = list(layer.parameters())
        got, expected = layer(ids, patches, cu_seqlens, mode=mode), layer.projection(pooled)
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(x.square().sum(), leaves) for x in (got, expected)]
        torch.testing.assert_close(*grads)
