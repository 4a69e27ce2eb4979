"""The model's shape, what it is judged by, and above all the leak rule."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import RULES, TEXT, TINY, ids_of, packed, scrambled
from helpers.norms import assert_same_rows
from torch import Tensor, nn

from stlm_kernels import find_patches
from stlm_models import PRESETS, STLM, BytePatcher, ModelConfig, bits_per_byte
from stlm_models.config import BOS_ID, BYTES, config_from_dict
from stlm_models.presets import preset


@pytest.fixture(params=RULES, name="model")
def model_of_each_rule(request: pytest.FixtureRequest) -> Iterator[STLM]:
    with torch.no_grad():
        yield scrambled(RULES[request.param])


class TestLeakRule:
    def test_every_prefix_agrees_with_the_full_run(self, model: STLM) -> None:
        ids = ids_of(TEXT)
        full = model(ids)
        for length in range(1, len(ids)):
            assert_same_rows(model(ids[:length]), full[:length])

    @pytest.mark.parametrize("byte", [ord("x"), ord(" "), 0xC3, 0xA9, 0])
    def test_a_changed_byte_changes_nothing_before_it(self, model: STLM, byte: int) -> None:
        ids = ids_of(TEXT)
        full = model(ids)
        for t in range(1, len(ids)):
            changed = ids.clone()
            changed[t] = byte
            assert_same_rows(model(changed)[:t], full[:t])

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
            assert_same_rows(own, model(ids_of(text)))

    def test_empty_documents_and_rows_of_no_document(self, model: STLM) -> None:
        ids = torch.cat((ids_of(TEXT), ids_of(b"of no document")))
        n = len(TEXT) + 1
        out = model(ids, cu_seqlens=torch.tensor([0, 0, n, n], dtype=torch.int32))
        assert_same_rows(out[:n], model(ids[:n]))

    def test_right_padding_does_not_matter(self, model: STLM) -> None:
        short, long = ids_of(b"a short one"), ids_of(TEXT)
        for padding in (0, ord(" "), ord("x")):
            batch = torch.full((2, len(long)), padding, dtype=torch.int16)
            batch[0, : len(short)] = short
            batch[1] = long
            out = model(batch)
            assert_same_rows(out[0, : len(short)], model(short))
            assert_same_rows(out[1], model(long))

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
        assert_same_rows(loss_sum, expected)
        assert n_valid.item() == targets.numel() - 20
        assert loss_sum.shape == n_valid.shape == ()

    def test_targets_are_not_shifted(self) -> None:
        model = scrambled()
        ids = ids_of(TEXT)
        targets = torch.full_like(ids, -100)
        targets[7] = 65
        loss_sum, _ = model(ids, targets)
        assert_same_rows(loss_sum, -model(ids)[7].log_softmax(-1)[65])

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
        assert_same_rows(given, model(ids, cu_seqlens=cu_seqlens))

    def test_unused_patch_slots_change_nothing(self) -> None:
        model = scrambled()
        ids, cu_seqlens = packed([TEXT, b"another"])
        patches = find_patches(
            ids, rule="space", max_patch_len=5, cu_seqlens=cu_seqlens, max_patches=60
        )
        given = model(ids, cu_seqlens=cu_seqlens, patches=patches)
        assert_same_rows(given, model(ids, cu_seqlens=cu_seqlens))

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
        ("name", "millions"), [("demo", 2.5), ("10m", 10), ("50m", 50), ("100m", 100)]
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
            ({"ngram_hashes": 0}, "ngram_hashes: expected 1 to 11, got 0"),
            ({"ngram_hashes": 12}, "ngram_hashes: expected 1 to 11, got 12"),
            ({"ngram_hashes": 2.0}, "ngram_hashes: expected int, got 2.0"),
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


class TestBitsPerByte:
    @pytest.mark.parametrize(
        ("context", "stride"), [(None, None), (8, 8), (8, 3), (7, 1), (1, 1), (1000, 500)]
    )
    def test_against_one_byte_at_a_time(self, context: int | None, stride: int | None) -> None:
        model = scrambled()
        with torch.no_grad():
            model.embedding.weight[BOS_ID] *= 4  # often the likeliest id, and never a byte
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
                    logits = model(ids[start:target])[-1, :BYTES]
                    nats -= float(logits.log_softmax(-1)[ids[target].long()])
                    n_bytes += 1
        assert actual == pytest.approx(nats / (math.log(2) * n_bytes), rel=1e-4)

    def test_a_model_that_knows_nothing(self) -> None:
        model = scrambled()
        nn.init.zeros_(model.embedding.weight)
        assert bits_per_byte(model, TEXT) == pytest.approx(8)

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
