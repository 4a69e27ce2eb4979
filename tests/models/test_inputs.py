"""Inputs of a model: ids, patches of the caller, and models that cannot write bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from helpers.models import TEXT, TINY, ids_of, scrambled
from helpers.norms import assert_same_gradients, assert_same_rows
from torch import Tensor

from stlm_kernels import Patches, find_patches
from stlm_models import STLM, ModelConfig, TiedEmbedding
from stlm_models.compression.codec import compress
from stlm_models.evaluation import bits_per_byte
from stlm_models.layers.embedding import UntiedEmbedding
from stlm_models.layers.packing import targets_of_documents

GIVEN = dataclasses.replace(TINY, patch_rule="external")
WORDS = dataclasses.replace(
    TINY, tokens="words", patch_rule="none", core_layers=0, max_patch_len=None
)
BOUNDARIES = torch.tensor([0, 10, 20], dtype=torch.int32)


class TestIds:
    @pytest.mark.parametrize("bad", [257, 319, 300, -1])
    def test_rows_behind_the_vocabulary_are_no_ids(self, bad: int) -> None:
        table = TiedEmbedding(257, 8)
        ids = torch.tensor([65, bad, 66])
        message = rf"byte_ids: expected values in \[0, 256\], got {bad} at position 1"
        with pytest.raises(IndexError, match=message):
            table.embed(ids)
        with pytest.raises(IndexError, match=message):
            table.pool(ids, find_patches(ids.clamp(0, 256), rule="space"))

    @pytest.mark.parametrize("rule", ["space", "none"])
    def test_a_model_refuses_them(self, rule: str) -> None:
        flat = {"patch_rule": rule, "core_layers": 0} if rule == "none" else {}
        model = scrambled(dataclasses.replace(TINY, **flat))  # type: ignore[arg-type]
        with pytest.raises(IndexError, match="got 300 at position 2"):
            model(torch.tensor([256, 65, 300]))

    def test_looking_up_under_vmap(self) -> None:
        table, ids = TiedEmbedding(257, 8), torch.arange(6).view(2, 3)
        assert torch.equal(torch.vmap(table.embed)(ids), table.embed(ids))


def test_an_untied_output_is_judged_by_its_own_table() -> None:
    torch.manual_seed(0)
    table = UntiedEmbedding(257, 8)
    hidden, teacher = torch.randn(5, 8), torch.randn(5, 257)
    targets = torch.tensor([0, 65, 255, -100, 7])
    logq = table.logits(hidden).log_softmax(-1)
    want = logq.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
    assert_same_rows(table.logprobs(hidden, targets), want)
    divergence = torch.nn.functional.kl_div(logq, teacher.softmax(-1), reduction="sum")
    assert_same_rows(table.kl_div(hidden, teacher), divergence)


class TestPatches:
    ids = ids_of(TEXT)[:20].long()

    def patches(self, **changed: Tensor) -> Patches:
        found = find_patches(self.ids, rule="fixed", patch_size=5, cu_seqlens=BOUNDARIES)
        return found._replace(**changed)

    def refuses(self, error: type[Exception], message: str, **changed: Tensor) -> None:
        with pytest.raises(error, match=message):
            scrambled(GIVEN)(self.ids, cu_seqlens=BOUNDARIES, patches=self.patches(**changed))

    @pytest.mark.parametrize("wrong", [[0, 0, 4], [0, 3, 4], [0, 2, 3], [1, 2, 4], [0, 2, 5]])
    def test_documents_of_the_core_are_those_of_the_bytes(self, wrong: list[int]) -> None:
        """Patches of one document would attend to those of another if they differed."""
        cu_seqlens = torch.tensor(wrong, dtype=torch.int32)
        self.refuses(ValueError, "patches.cu_seqlens: expected entry", cu_seqlens=cu_seqlens)

    @pytest.mark.parametrize("max_patches", [1, 2, 3, 4, 9])
    def test_lost_patches_are_no_wrong_boundaries(self, max_patches: int) -> None:
        found = find_patches(
            self.ids, rule="fixed", patch_size=5, cu_seqlens=BOUNDARIES, max_patches=max_patches
        )
        assert scrambled(GIVEN)(self.ids, cu_seqlens=BOUNDARIES, patches=found).isfinite().all()

    @pytest.mark.parametrize("output", ["autoregressive", "parallel"])
    @pytest.mark.parametrize("bad", [4, -2])
    def test_ids_of_no_patch(self, output: str, bad: int) -> None:
        model = scrambled(dataclasses.replace(GIVEN, output=output, decoder_window=None))
        read_ids = self.patches().read_ids.clone()
        read_ids[-1] = bad
        message = rf"patches.read_ids: expected values in \[-1, 3\], got {bad} at position 19"
        with pytest.raises(IndexError, match=message):
            model(self.ids, cu_seqlens=BOUNDARIES, patches=self.patches(read_ids=read_ids))

    def test_an_empty_patch_leaves_the_running_average(self) -> None:
        torch.manual_seed(0)
        core = IgnoresOthers()
        model = STLM(dataclasses.replace(GIVEN, unpooling="ema", core_dim=16), core)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        boundaries, found = torch.tensor([0, 20], dtype=torch.int32), []
        for offsets in ([0, 5, 10, 20], [0, 5, 5, 10, 10, 20]):
            cu_patchlens = torch.tensor(offsets, dtype=torch.int32)
            ends = torch.arange(1, 21)
            own = torch.bucketize(ends, cu_patchlens[1:].long())
            read = torch.bucketize(ends, cu_patchlens[1:].long(), right=True) - 1
            patches = Patches(
                cu_patchlens,
                own.int(),
                read.int(),
                torch.tensor(len(offsets) - 1, dtype=torch.int32),
                torch.tensor([0, len(offsets) - 1], dtype=torch.int32),
            )
            found.append(model(self.ids, cu_seqlens=boundaries, patches=patches))
        assert_same_rows(found[1], found[0])


class IgnoresOthers(torch.nn.Module):
    """A core of one patch at a time, for which an empty patch is not nothing."""

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GIVEN, 'patch_rule: expected a rule to generate, got "external"'),
        (WORDS, "tokens: expected"),
    ],
)
@pytest.mark.parametrize(
    "write",
    [
        lambda model: model.generate(b"a", max_new_bytes=2),
        lambda model: model.stream(b"a", max_new_bytes=2),
        lambda model: compress(model, b"abc", checkpoint="00" * 32),
    ],
)
def test_models_that_write_no_bytes(
    config: ModelConfig, message: str, write: Callable[[STLM], object]
) -> None:
    with pytest.raises(ValueError, match=message):
        write(STLM(config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_bytes": 2.5}, "max_new_bytes: expected an int of at least 0, got 2.5"),
        ({"max_new_bytes": True}, "max_new_bytes: expected an int of at least 0, got True"),
        ({"max_new_bytes": "3"}, "max_new_bytes: expected an int of at least 0, got '3'"),
        ({"max_new_bytes": 3, "seed": 1.5}, "seed: expected None or an int, got 1.5"),
        ({"max_new_bytes": 3, "seed": "a"}, "seed: expected None or an int, got 'a'"),
    ],
)
def test_wrong_arguments_of_generate(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STLM(TINY).generate(b"a", **arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"byte_ids": [1, 2]}, "byte_ids: expected a tensor, got list"),
        ({"targets": [1, 2]}, "targets: expected a tensor, got list"),
        ({"cu_seqlens": [0, 2]}, "cu_seqlens: expected a tensor, got list"),
        ({"patches": 3}, "patches: expected the Patches of find_patches, got int"),
    ],
)
def test_what_is_no_tensor(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STLM(TINY)(**{"byte_ids": torch.tensor([1, 2]), **wrong})


def test_an_id_below_0() -> None:
    with pytest.raises(IndexError, match=r"byte_ids: expected values in \[0, 256\], got -1"):
        STLM(TINY)(torch.tensor([1, -1]))


@pytest.mark.parametrize("data", ["abc", bytearray(b"abc"), ["abc"], [b"abc", None]])
def test_bits_of_what_is_not_bytes(data: Any) -> None:
    with pytest.raises(ValueError, match="data: expected bytes or a list of them, got"):
        bits_per_byte(STLM(TINY), data)


@pytest.mark.parametrize("name", ["softcap", "rope_base", "logit_scale"])
def test_infinite_options(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a finite number above 0, got inf"):
        dataclasses.replace(TINY, **{name: float("inf")})  # type: ignore[arg-type]


class LeavesUnusedSlots(torch.nn.Module):
    """A core that writes nothing useful where no document is."""

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        unused = torch.arange(len(x)) >= cu_seqlens[-1]
        return x.masked_fill(unused[:, None], torch.nan)


@pytest.mark.parametrize(
    "options", [{}, {"unpooling": "ema"}, {"output": "parallel", "decoder_window": None}]
)
def test_what_a_core_leaves_in_unused_slots_reaches_no_gradient(options: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, max_patches=40, **options)
    model, ids = scrambled(config, LeavesUnusedSlots()).train(), ids_of(TEXT)[2:]
    loss_sum, _ = model(ids, ids)
    loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


class TestRowsOfNoDocument:
    """Rows from cu_seqlens[-1] on belong to no document: their ids and targets say nothing."""

    KINDS: ClassVar[list[dict[str, Any]]] = [
        {},
        {"pooling": "attention", "pooling_heads": 2, "unpooling": "ema"},
        {"patch_rule": "none", "core_layers": 0, "max_patch_len": None},
        {"output": "parallel", "decoder_window": None, "reconstruction_weight": 0.5},
    ]

    @pytest.mark.parametrize(
        ("options", "dtype"),
        [*((kind, torch.int64) for kind in KINDS), ({}, torch.int16), ({}, torch.uint8)],
    )
    def test_their_targets_do_not_count(self, options: dict[str, Any], dtype: torch.dtype) -> None:
        model = scrambled(dataclasses.replace(TINY, **options)).train()
        ids, boundaries = torch.tensor([*TEXT]), torch.tensor([0, 9, 30], dtype=torch.int32)
        targets = ids.roll(-1).to(dtype)
        want, n_wanted = model(ids[:30], targets[:30], cu_seqlens=boundaries)
        wanted = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
        assert n_wanted == 30
        for there in (0, 100):
            targets[30:] = there
            got, n_valid = model(ids, targets, cu_seqlens=boundaries)
            assert n_valid == 30
            torch.testing.assert_close(got, want)
            found = torch.autograd.grad(got, list(model.parameters()), allow_unused=True)
            assert_same_gradients(dict(enumerate(found)), dict(enumerate(wanted)))

    def test_their_targets_are_not_looked_at(self) -> None:
        model, ids = scrambled(), torch.tensor([*TEXT])
        targets = torch.full_like(ids, 9999)
        targets[:30] = 7
        boundaries = torch.tensor([0, 30], dtype=torch.int32)
        assert model(ids, targets, cu_seqlens=boundaries)[1] == 30
        with pytest.raises(IndexError, match="got 9999 at position 30"):
            model(ids, targets)

    def test_no_document_at_all(self) -> None:
        model, ids = scrambled(), torch.tensor([*TEXT])
        loss_sum, n_valid = model(ids, ids, cu_seqlens=torch.zeros(1, dtype=torch.int32))
        assert (loss_sum.item(), n_valid.item()) == (0, 0)

    def test_compiled_whole(self) -> None:
        compiled = torch.compile(targets_of_documents, fullgraph=True, backend="aot_eager")
        targets, boundaries = torch.arange(9, dtype=torch.int16), torch.tensor([0, 3, 7]).int()
        want = torch.tensor([*range(7), -100, -100])
        assert torch.equal(compiled(targets, boundaries), want)
        assert torch.equal(targets_of_documents(targets, boundaries), want)
