"""The model's shape, its modules one by one, and above all the leak rule."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm_kernels import byte_pool, find_patches, ngram_embedding
from stlm_models import (
    PRESETS,
    STLM,
    Attention,
    BytePatcher,
    BytePooling,
    ByteUnpooling,
    ModelConfig,
    TiedEmbedding,
    bits_per_byte,
)
from stlm_models.config import DOCUMENT_START, config_from_dict, preset
from stlm_models.layers import NgramPooling

TINY = ModelConfig(
    byte_dim=16,
    max_patch_len=5,
    ngram_sizes=(2, 3),
    ngram_buckets=61,
    ngram_dim=4,
    core_layers=2,
    core_dim=24,
    core_heads=2,
    core_kv_heads=1,
    core_ff=32,
    decoder_layers=2,
    decoder_heads=2,
    decoder_kv_heads=2,
    decoder_ff=24,
    decoder_window=7,
    context=32,
)
# Every kind of border: forced ones, runs of spaces, UTF-8, a space at the very beginning and end.
TEXT = " ab c,  de\n\n extraordinarily(x) == 'Zoë'; 12_345 ".encode()
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def scrambled(config: ModelConfig = TINY, core: nn.Module | None = None) -> STLM:
    """A model whose every parameter matters: fresh ones begin with residual branches of zero."""
    torch.manual_seed(0)
    model = STLM(config, core)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.dim() > 1 else 1.0)
    return model.eval()


def ids_of(text: bytes) -> Tensor:
    return torch.tensor([DOCUMENT_START, *text], dtype=torch.int16)


def packed(texts: list[bytes]) -> tuple[Tensor, Tensor]:
    pieces = [ids_of(text) for text in texts]
    lengths = torch.tensor([0, *map(len, pieces)])
    return torch.cat(pieces), lengths.cumsum(0).int()


RULES = {
    "space": TINY,
    "space, patches of any length": dataclasses.replace(TINY, max_patch_len=None),
    "fixed": dataclasses.replace(TINY, patch_rule="fixed", patch_size=4, max_patch_len=None),
    "sum, no window, no n-grams": dataclasses.replace(
        TINY, pooling="sum", decoder_window=None, ngram_sizes=(), qk_norm=False, softcap=20.0
    ),
}


@pytest.fixture(params=RULES, name="model")
def model_of_each_rule(request: pytest.FixtureRequest) -> Iterator[STLM]:
    with torch.no_grad():
        yield scrambled(RULES[request.param])


class TestLeakRule:
    def test_every_prefix_agrees_with_the_full_run(self, model: STLM) -> None:
        ids = ids_of(TEXT)
        full = model(ids)
        for length in range(1, len(ids)):
            torch.testing.assert_close(model(ids[:length]), full[:length], **CLOSE)

    @pytest.mark.parametrize("byte", [ord("x"), ord(" "), 0xC3, 0xA9, 0])
    def test_a_changed_byte_changes_nothing_before_it(self, model: STLM, byte: int) -> None:
        ids = ids_of(TEXT)
        full = model(ids)
        for t in range(1, len(ids)):
            changed = ids.clone()
            changed[t] = byte
            torch.testing.assert_close(model(changed)[:t], full[:t], **CLOSE)

    def test_a_changed_byte_is_seen_from_there_on(self, model: STLM) -> None:
        # The tests above would pass for a model that ignores its input.
        ids = ids_of(TEXT)
        full = model(ids)
        changed = ids.clone()
        changed[5] = ord("Q")
        different = (model(changed) - full).abs().amax(-1) > 1e-3
        assert different[5:12].all()
        assert not different[:5].any()

    def test_the_core_reaches_beyond_the_window(self) -> None:
        config = dataclasses.replace(TINY, decoder_layers=1)
        with torch.no_grad():
            model = scrambled(config)
            ids = ids_of(TEXT)
            changed = ids.clone()
            changed[2] = ord("Q")
            assert (model(changed) - model(ids))[-5:].abs().amax() > 1e-3

    def test_packed_documents_agree_with_separate_ones(self, model: STLM) -> None:
        texts = [TEXT, b"", b"x", b"no end", b"  begins spacelike", TEXT[::-1]]
        ids, cu_seqlens = packed(texts)
        together = model(ids, cu_seqlens=cu_seqlens)
        for i, text in enumerate(texts):
            own = together[cu_seqlens[i] : cu_seqlens[i + 1]]
            torch.testing.assert_close(own, model(ids_of(text)), **CLOSE)

    def test_empty_documents_and_rows_of_no_document(self, model: STLM) -> None:
        ids = torch.cat((ids_of(TEXT), ids_of(b"of no document")))
        n = len(TEXT) + 1
        out = model(ids, cu_seqlens=torch.tensor([0, 0, n, n], dtype=torch.int32))
        torch.testing.assert_close(out[:n], model(ids[:n]), **CLOSE)

    def test_right_padding_does_not_matter(self, model: STLM) -> None:
        short, long = ids_of(b"a short one"), ids_of(TEXT)
        for padding in (0, ord(" "), ord("x")):
            batch = torch.full((2, len(long)), padding, dtype=torch.int16)
            batch[0, : len(short)] = short
            batch[1] = long
            out = model(batch)
            torch.testing.assert_close(out[0, : len(short)], model(short), **CLOSE)
            torch.testing.assert_close(out[1], model(long), **CLOSE)

    def test_reading_the_open_patch_is_refused(self) -> None:
        model = scrambled()
        ids = ids_of(TEXT)
        patches = model.patcher(ids)
        leaking = patches._replace(read_ids=patches.patch_ids)
        with pytest.raises(ValueError, match=r"patches\.read_ids: .*complete.*byte that reads"):
            model(ids, patches=leaking)

    def test_reading_a_foreign_document_is_refused(self) -> None:
        model = scrambled()
        ids, cu_seqlens = packed([b"one two", b"three four"])
        patches = model.patcher(ids, cu_seqlens)
        foreign = patches.read_ids.clone()
        foreign[int(cu_seqlens[1]) + 1] = 0
        with pytest.raises(ValueError, match=r"patches\.read_ids: .*own document"):
            model(ids, cu_seqlens=cu_seqlens, patches=patches._replace(read_ids=foreign))


class TestModel:
    def test_loss_is_the_cross_entropy_of_the_logits(self) -> None:
        model = scrambled()
        ids = ids_of(TEXT)[None].repeat(2, 1)
        targets = torch.randint(0, 256, ids.shape)
        targets[0, :20] = -100
        loss_sum, n_valid = model(ids, targets)
        logits = model(ids)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        torch.testing.assert_close(loss_sum, expected)
        assert n_valid.item() == targets.numel() - 20
        assert loss_sum.shape == n_valid.shape == ()

    def test_targets_are_not_shifted(self) -> None:
        model = scrambled()
        ids = ids_of(TEXT)
        targets = torch.full_like(ids, -100)
        targets[7] = 65
        loss_sum, _ = model(ids, targets)
        torch.testing.assert_close(loss_sum, -model(ids)[7].log_softmax(-1)[65])

    def test_padded_rows_of_the_table_never_show(self) -> None:
        model = scrambled()
        assert model.embedding.weight.shape[0] == 320
        assert model(ids_of(TEXT)).shape[-1] == 257

    def test_every_parameter_gets_a_gradient(self) -> None:
        model = scrambled()
        # Without id 256 and its closed patch, the first bytes read the null state.
        ids = ids_of(TEXT)[2:]
        loss_sum, _ = model(ids, ids)
        loss_sum.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

    def test_a_core_of_ones_own(self) -> None:
        class Doubling(nn.Module):
            def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
                assert x.shape == (int(cu_seqlens[-1]), TINY.core_dim)
                return 2 * x

        with torch.no_grad():
            assert scrambled(core=Doubling())(ids_of(TEXT)).isfinite().all()

    def test_a_core_of_the_wrong_width_is_refused(self) -> None:
        class Narrowing(nn.Module):
            def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
                return x[:, 1:]

        with pytest.raises(ValueError, match="core: expected states of"):
            scrambled(core=Narrowing())(ids_of(TEXT))

    def test_patches_of_a_loader_give_the_same(self) -> None:
        model = scrambled()
        ids, cu_seqlens = packed([TEXT, b"another"])
        patches = BytePatcher("space", max_patch_len=5)(ids, cu_seqlens)
        given = model(ids, cu_seqlens=cu_seqlens, patches=patches)
        torch.testing.assert_close(given, model(ids, cu_seqlens=cu_seqlens))

    def test_unused_patch_slots_change_nothing(self) -> None:
        model = scrambled()
        ids, cu_seqlens = packed([TEXT, b"another"])
        patches = find_patches(
            ids, rule="space", max_patch_len=5, cu_seqlens=cu_seqlens, capacity=60
        )
        given = model(ids, cu_seqlens=cu_seqlens, patches=patches)
        torch.testing.assert_close(given, model(ids, cu_seqlens=cu_seqlens), **CLOSE)

    def test_bf16_autocast_is_close(self) -> None:
        model = STLM(TINY)
        ids = ids_of(TEXT)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(ids)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, model(ids), rtol=0.05, atol=0.1)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"byte_ids": torch.zeros(2, 3, 4).long()}, r"byte_ids: expected shape"),
            ({"byte_ids": torch.zeros(4)}, "byte_ids: expected integers"),
            ({"byte_ids": torch.zeros(4).long(), "targets": torch.zeros(3).long()}, "targets: "),
            (
                {
                    "byte_ids": torch.zeros(2, 4).long(),
                    "cu_seqlens": torch.tensor([0, 8], dtype=torch.int32),
                },
                "cu_seqlens: expected None with dense",
            ),
            (
                {"byte_ids": torch.zeros(4).long(), "cu_seqlens": torch.tensor([0, 4])},
                "cu_seqlens: expected int32",
            ),
        ],
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            scrambled()(**arguments)


class TestConfig:
    @pytest.mark.parametrize("name", PRESETS)
    def test_json_round_trip(self, name: str) -> None:
        config = PRESETS[name]
        assert ModelConfig(**json.loads(json.dumps(config.to_dict()))) == config

    @pytest.mark.parametrize(
        ("name", "millions"), [("demo", 2.4), ("10m", 10), ("50m", 50), ("100m", 100)]
    )
    def test_presets_have_the_size_in_their_name(self, name: str, millions: float) -> None:
        with torch.device("meta"):
            model = STLM(PRESETS[name])
        # parameters() gives a shared tensor once.
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == pytest.approx(millions * 1e6, rel=0.05)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"vocab_size": 256}, "vocab_size: expected at least 257, got 256"),
            ({"byte_dim": "128"}, "byte_dim: expected int, got '128'"),
            ({"core_layers": True}, "core_layers: expected int, got True"),
            (
                {"core_heads": 3, "core_kv_heads": 1},
                "core_heads: expected a divisor of the width 256, got 3",
            ),
            ({"core_kv_heads": 3}, "core_kv_heads: expected a divisor of core_heads = 4, got 3"),
            ({"byte_dim": 6}, "decoder head width: expected an even number"),
            ({"patch_rule": "bpe"}, "patch_rule: expected one of"),
            ({"patch_rule": "fixed"}, "patch_size: expected an int of at least 1"),
            ({"patch_size": 4}, 'patch_size: expected None with patch_rule "space", got 4'),
            ({"pooling": "median"}, "pooling: expected one of"),
            ({"max_patch_len": 0}, "max_patch_len: expected at least 1, got 0"),
            ({"softcap": 0.0}, "softcap: expected a finite number above 0, got 0.0"),
            ({"ngram_sizes": (0,)}, "ngram_sizes: expected at least 1, got 0"),
            ({"context": 1}, "context: expected at least 2, got 1"),
        ],
    )
    def test_wrong_values(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ModelConfig(**values)

    def test_unknown_names(self) -> None:
        with pytest.raises(ValueError, match=r"preset: expected one of .*'demo'.* got 'huge'"):
            preset("huge")
        with pytest.raises(ValueError, match=r"got also \['depth'\]"):
            config_from_dict({"depth": 3})
        with pytest.raises(ValueError, match="config: expected an object"):
            config_from_dict([1])


def naive_attention(layer: Attention, x: Tensor, documents: list[int]) -> Tensor:
    """x (T, D) attended to position by position, in fp64."""
    rows = []
    position = torch.tensor([documents[:t].count(documents[t]) for t in range(len(documents))])
    half = layer.head_dim // 2
    frequencies = layer.rope_base ** (-torch.arange(half).double() / half)
    angles = position[:, None].double() * frequencies

    def heads(linear: nn.Linear, gain: Tensor | None, turned: bool = True) -> Tensor:
        y = (x.double() @ linear.weight.double().T).unflatten(-1, (-1, layer.head_dim))
        if not turned:
            return y
        if gain is not None:
            y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
        a, b = y[..., :half], y[..., half:]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    q, k = heads(layer.query, layer.query_norm), heads(layer.key, layer.key_norm)
    v = heads(layer.value, None, turned=False)
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
        torch.testing.assert_close(layer(x, cu_seqlens=cu_seqlens), expected, **CLOSE)
        dense = torch.stack((x, x.flip(0)))
        rows = [naive_attention(layer, row, [0] * 23).float() for row in dense]
        torch.testing.assert_close(layer(dense), torch.stack(rows), **CLOSE)
        torch.testing.assert_close(layer(x), rows[0], **CLOSE)

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
        rows = ngram_embedding(ids, list(layer.tables), ns=(2, 3), cu_seqlens=cu_seqlens)
        expected = BytePooling("mean")(layer.projection(rows), patches)
        torch.testing.assert_close(layer(ids, patches, cu_seqlens), expected)

    @pytest.mark.parametrize("mode", ["mean", "sum"])
    def test_ngrams_equal_a_byte_pool_over_their_hashes(self, mode: str) -> None:
        """The other composition: the (T, dim) rows never exist, but each hash does."""
        layer = NgramPooling((2, 3), 61, 4, 8)
        ids, cu_seqlens = packed([TEXT, b"z"])
        patches = BytePatcher("space", max_patch_len=5)(ids, cu_seqlens)
        rows = torch.arange(61.0)[:, None]
        pooled = sum(
            byte_pool(
                ngram_embedding(ids, [rows], ns=(n,), cu_seqlens=cu_seqlens).flatten().int(),
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


class TestBitsPerByte:
    @pytest.mark.parametrize(
        ("context", "stride"), [(None, None), (8, 8), (8, 3), (7, 1), (1, 1), (1000, 500)]
    )
    def test_against_one_byte_at_a_time(self, context: int | None, stride: int | None) -> None:
        model = scrambled()
        documents = [TEXT, b"", b"x", TEXT[:32], TEXT[:33]]
        actual = bits_per_byte(model, documents, context=context, stride=stride)
        length = context or TINY.context
        step = stride or length // 2
        nats, n_bytes = 0.0, 0
        with torch.no_grad():
            for document in documents:
                ids = ids_of(document)
                for target in range(1, len(ids)):
                    # The first window that reaches the target; it begins at a multiple of step.
                    start = step * max(0, math.ceil((target - length) / step))
                    logits = model(ids[start:target])[-1]
                    nats -= float(logits.log_softmax(-1)[ids[target].long()])
                    n_bytes += 1
        assert actual == pytest.approx(nats / (math.log(2) * n_bytes), rel=1e-4)

    def test_a_model_that_knows_nothing(self) -> None:
        model = scrambled()
        nn.init.zeros_(model.embedding.weight)
        assert bits_per_byte(model, TEXT) == pytest.approx(math.log2(257))

    def test_mode_is_put_back(self) -> None:
        model = scrambled().train()
        bits_per_byte(model, b"abc")
        assert model.training

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"data": []}, "data: expected at least one byte"),
            ({"data": b"x", "stride": 0}, "stride: expected 1 to context"),
            ({"data": b"x", "context": 4, "stride": 5}, "stride: expected 1 to context = 4, got 5"),
            ({"data": b"x", "context": 0}, "context: expected at least 1, got 0"),
        ],
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            bits_per_byte(scrambled(), **arguments)
