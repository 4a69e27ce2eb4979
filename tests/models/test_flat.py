"""Models without patches: the baselines of bytes and of words that a pooled model is judged by."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.cached import full_states, seen_ids, varied, write_greedily
from helpers.models import TEXT, TINY, ids_of, packed, scrambled
from helpers.norms import assert_same_rows
from torch import nn

from stlm_kernels.testing import assert_causal
from stlm_models import PRESETS, STLM, BytePatcher, ModelConfig
from stlm_models.generation.engine import CachedRun
from stlm_models.presets import BYTES_PER_WORD

FLAT = dataclasses.replace(TINY, patch_rule="none", core_layers=0, decoder_window=None)
KINDS = {
    "n-grams": FLAT,
    "a window, no n-grams": dataclasses.replace(FLAT, decoder_window=7, ngram_sizes=()),
}
WORDS = dataclasses.replace(FLAT, tokens="words", vocab_size=1000, ngram_sizes=())
SIZES = ("demo", "10m", "50m", "100m")


@pytest.fixture(params=KINDS, name="model")
def model_of_each_kind(request: pytest.FixtureRequest) -> STLM:
    return varied(KINDS[request.param])


class TestModel:
    def test_causal(self, model: STLM) -> None:
        assert_causal(lambda ids: model(ids), 257, length=24)

    @torch.no_grad()
    def test_packed_documents_agree_with_separate_ones(self, model: STLM) -> None:
        texts = [TEXT, b"", b"x", TEXT[::-1]]
        ids, cu_seqlens = packed(texts)
        together = model(ids, cu_seqlens=cu_seqlens)
        for i, text in enumerate(texts):
            own = together[cu_seqlens[i] : cu_seqlens[i + 1]]
            assert_same_rows(own, model(ids_of(text)))
        dense = model(ids_of(TEXT)[None])
        assert_same_rows(dense[0], together[: len(TEXT) + 1])

    def test_every_parameter_gets_a_gradient(self) -> None:
        model = scrambled(FLAT)
        ids = ids_of(TEXT)
        model(ids, ids.long())[0].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        assert {name.split(".")[0] for name, _ in model.named_parameters()} == {
            "embedding", "ngrams", "decoder", "to_output",
        }  # fmt: skip

    def test_refusals(self) -> None:
        model, ids = scrambled(FLAT), ids_of(TEXT)
        with pytest.raises(ValueError, match='patches: expected None with patch_rule "none"'):
            model(ids, patches=BytePatcher("space")(ids))
        with pytest.raises(ValueError, match='core: expected None with patch_rule "none"'):
            STLM(FLAT, core=nn.Identity())


@torch.no_grad()
def test_cached_rows_agree_with_the_full_run(model: STLM) -> None:
    texts = [ids_of(text).tolist() for text in (TEXT, TEXT[7:] + TEXT, TEXT[::-1])]
    shown = [1, 9, 20]
    run = CachedRun(model, [text[:n] for text, n in zip(texts, shown, strict=True)])
    for step in range(12):
        rows = [0, 1, 2] if step < 4 else [0, 2]
        run.step(torch.tensor([text[n] for text, n in zip(texts, shown, strict=True)]), rows)
        shown = [n + 1 for n in shown]
        if step == 9:
            run.restart([1], [texts[1][: shown[1]]])
            rows = [0, 1, 2]
        expected = full_states(model, [texts[r][: shown[r]] for r in rows])
        assert_same_rows(run.hidden[rows], expected)


@torch.no_grad()
def test_greedy_writing_is_that_of_full_runs(model: STLM) -> None:
    model.double()  # where rounding decides nothing
    prompts = [b"", b"ab c", TEXT]
    expected = write_greedily(model, seen_ids(prompts), 40)
    assert len(set(expected)) == 3
    assert model.generate_batch(prompts, max_new_bytes=40, temperature=0) == expected


class TestWords:
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_ids_of_words(self, dtype: torch.dtype) -> None:
        model = scrambled(WORDS)
        ids = torch.randint(0, 1000, (2, 9), dtype=dtype)
        assert model.embedding.weight.shape[0] == 1024
        logits = model(ids)
        assert logits.shape == (2, 9, 1000)
        loss_sum, n_valid = model(ids, ids)
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten().long())
        assert_same_rows(loss_sum / n_valid, expected)

    def test_no_bytes_are_written(self) -> None:
        for write in (STLM.generate, STLM.stream):
            with pytest.raises(ValueError, match=r'tokens: expected "bytes".*bits per byte'):
                write(scrambled(WORDS), b"x", max_new_bytes=1)


class TestConfig:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"tokens": "letters"}, "tokens: expected one of"),
            ({"tokens": 1}, "tokens: expected str, got 1"),
            ({"tokens": "words"}, 'patch_rule: expected "none" with tokens "words", got \'space\''),
            ({"patch_rule": "none"}, 'core_layers: expected 0 with patch_rule "none", got 2'),
            (
                {"patch_rule": "none", "core_layers": 0, "patch_size": 4},
                'patch_size: expected None with patch_rule "none", got 4',
            ),
        ],
    )
    def test_wrong_values(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ModelConfig(**values)

    @pytest.mark.parametrize("name", SIZES)
    def test_baselines_are_fair(self, name: str) -> None:
        pooled, flat, words = (PRESETS[name + kind] for kind in ("", "-flat", "-word"))
        with torch.device("meta"):
            sizes = [
                sum(p.numel() for p in STLM(config).parameters())
                for config in (pooled, flat, words)
            ]
        assert sizes[1:] == [pytest.approx(sizes[0], rel=0.02)] * 2
        assert flat.context == pooled.context
        assert words.context == round(pooled.context / BYTES_PER_WORD)
        for baseline in (flat, words):
            assert baseline.decoder_window is None
            assert baseline.byte_dim == 64 * baseline.decoder_heads
