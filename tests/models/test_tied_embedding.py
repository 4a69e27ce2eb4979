"""TiedEmbedding in models of other people: the same losses, step by step; and its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.norms import assert_greedy
from torch import Tensor, nn

from stlm_kernels import find_patches
from stlm_models import TiedEmbedding

VOCAB, WIDTH, LENGTH, STEPS = 260, 32, 24, 40


class PlainGPT(nn.Module):
    """A small GPT of plain torch parts, with one table for both ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.wpe = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 64, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.wte.weight, std=0.1)

    def hidden(self, embedded: Tensor) -> Tensor:
        length = embedded.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = embedded + self.wpe.weight[:length]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.norm(x)

    def loss(self, ids: Tensor) -> Tensor:
        x = self.hidden(self.wte(ids[:, :-1]))
        return F.cross_entropy(F.linear(x, self.wte.weight).flatten(0, 1), ids[:, 1:].flatten())


def table_from(weight: Tensor) -> TiedEmbedding:
    table = TiedEmbedding(len(weight), weight.shape[1])
    with torch.no_grad():
        table.weight[: len(weight)] = weight
    return table


def batches() -> Tensor:
    rng = torch.Generator().manual_seed(3)
    words = torch.randint(0, VOCAB, (6, 4), generator=rng)
    return words[torch.randint(0, 6, (STEPS, 4, LENGTH // 4), generator=rng)].flatten(2)


def curve(parameters: list[nn.Parameter], loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    optimiser, losses = torch.optim.AdamW(parameters, lr=3e-3), []
    for ids in batches():
        loss = loss_of(ids)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_same_training(ours: Tensor, baseline: Tensor) -> None:
    assert baseline[-1] < 0.7 * baseline[0], "nothing was learnt"
    torch.testing.assert_close(ours, baseline, rtol=5e-3, atol=0)


def mean_loss(table: TiedEmbedding, x: Tensor, targets: Tensor) -> Tensor:
    loss_sum, n_valid = table.loss(x, targets)
    return loss_sum / n_valid


def test_in_a_plain_gpt() -> None:
    baseline, swapped = PlainGPT(), PlainGPT()
    table = table_from(swapped.wte.weight)
    del swapped.wte

    def loss(ids: Tensor) -> Tensor:
        return mean_loss(table, swapped.hidden(table.embed(ids[:, :-1])), ids[:, 1:])

    ours = curve([*swapped.parameters(), *table.parameters()], loss)
    assert_same_training(ours, curve(list(baseline.parameters()), baseline.loss))


def test_in_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    torch.manual_seed(0)
    baseline = transformers.GPT2LMHeadModel(config)
    torch.manual_seed(0)
    body = transformers.GPT2LMHeadModel(config).transformer
    table = table_from(body.wte.weight)
    del body.wte

    def loss(ids: Tensor) -> Tensor:
        x = body(inputs_embeds=table.embed(ids)).last_hidden_state
        return mean_loss(table, x[:, :-1], ids[:, 1:])

    ours = curve([*body.parameters(), *table.parameters()], loss)
    theirs = curve(list(baseline.parameters()), lambda ids: baseline(ids, labels=ids).loss)
    assert_same_training(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_are_as_wide_as_the_loss(dtype: torch.dtype) -> None:
    table = TiedEmbedding(VOCAB, 16, logit_scale=0.5, softcap=8.0).to(dtype)
    x, targets = torch.randn(30, 16).to(dtype), torch.randint(0, VOCAB, (30,))
    logits, (loss_sum, _) = table.logits(x), table.loss(x, targets)
    assert logits.dtype == loss_sum.dtype == torch.promote_types(dtype, torch.float32)
    baseline = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss_sum, baseline)


@pytest.mark.parametrize("way_in", ["embed", "pool"])
def test_the_tied_gradient_is_the_sum_of_both_ends(way_in: str) -> None:
    rng = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(0, VOCAB, (30,), generator=rng) for _ in range(2))
    patches = find_patches(ids, rule="fixed", patch_size=3)

    def loss(entrance: TiedEmbedding, head: TiedEmbedding) -> Tensor:
        x = entrance.embed(ids) if way_in == "embed" else entrance.pool(ids, patches)
        return head.loss(x.tanh(), targets[: len(x)])[0]

    weight = torch.randn(VOCAB, 16, generator=rng)
    tied, entrance, head = (table_from(weight) for _ in range(3))
    loss(tied, tied).backward()
    loss(entrance, head).backward()
    assert (entrance.weight.grad != 0).any()
    assert (head.weight.grad != 0).any()
    torch.testing.assert_close(tied.weight.grad, entrance.weight.grad + head.weight.grad)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_losses(dtype: torch.dtype, autocast: bool) -> None:
    """Losses and logits in 16 bits, the module's or autocast's, see the table in 16 bits."""
    torch.manual_seed(0)
    table = TiedEmbedding(257, 64, softcap=20.0)
    with torch.no_grad():
        table.weight.mul_(8)  # logits of the size that training gives
    x, targets = torch.randn(40, 64, dtype=dtype), torch.randint(257, (40,))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits, logprobs = table.logits(x), table.logprobs(x, targets)
        largest = table.sample(x, temperature=0.0)
    assert logits.dtype == torch.float32
    found = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, logprobs, rtol=1e-5, atol=1e-5)
    assert_greedy(largest.tolist(), logits.detach())
