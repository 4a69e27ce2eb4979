"""Two processes against one: gradients, uneven batches, sharded parameters and checkpoints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import TINY, ids_of, scrambled
from helpers.norms import assert_same_gradients, assert_same_rows
from helpers.ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from stlm_models import STLM, BytePatcher
from stlm_models.checkpoint import load_model
from stlm_models.data.corpus import Corpus
from stlm_models.data.windows import TrainingWindows
from stlm_models.parallel import Ranks, apply_fsdp2, load_sharded, mean_loss, save_sharded
from stlm_models.training.optim import Optimizers
from stlm_models.training.trainer import Trainer, TrainOptions

WORDS = b"the cat sat on the mat, and the dog sat by the door. " * 400
TEXTS = (b"the cat sat on the mat, and the dog", b"sat by")
"""One for each process: their numbers of valid bytes differ."""


def loss_of(model: Any, text: bytes) -> tuple[Tensor, Tensor]:
    ids = ids_of(text)
    return model(ids[:-1], ids[1:].long())


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(got: Tensor, want: Tensor, before: Tensor, name: str) -> None:
    """Products of shards add in another order; Muon's iterations amplify that a little."""
    moved, off = (want - before).norm(), (got - want).norm()
    assert off <= 1e-4 * moved, f"{name}: {off} off of {moved}"


def give_gradients(model: torch.nn.Module) -> None:
    """Set equal gradients in every process: orthogonal, so that Muon amplifies no direction."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator)
        if grad.dim() == 2:
            u, _, v = torch.linalg.svd(grad, full_matrices=False)
            grad = u @ v
        mesh = getattr(parameter, "device_mesh", None)
        parameter.grad = distribute_tensor(grad, mesh, parameter.placements) if mesh else grad


def trained(ranks: Ranks, parts: int = 1) -> tuple[Trainer, list[float]]:
    corpus = Corpus("words", [WORDS], [])
    patcher = BytePatcher("space", max_patch_len=TINY.max_patch_len, max_patches=100)
    options = TrainOptions(steps=2, batch_size=4, grad_accum_steps=parts)
    trainer = Trainer(TINY, corpus, options, ranks, patcher)
    losses: list[float] = []
    trainer.run(lambda result: losses.append(float(result.loss)))
    return trainer, losses


def lost_patches(ranks: Ranks) -> Tensor | None:
    patcher = BytePatcher("fixed", patch_size=2, max_patches=10)
    corpus, options = Corpus("words", [WORDS], []), TrainOptions(steps=1, batch_size=2)
    return Trainer(TINY, corpus, options, ranks, patcher).train_step().lost_patches


def in_two_processes(rank: int, root: Path) -> None:
    """Write down what only a process of two can see, for the tests below."""
    results: dict[str, Any] = {}
    copies = DistributedDataParallel(scrambled())
    loss, results["mean"] = mean_loss(*loss_of(copies, TEXTS[rank]))
    loss.backward()
    results["ddp"] = gradients(copies.module)

    sharded = apply_fsdp2(scrambled())
    results["sharded"] = [type(p).__name__ for p in sharded.parameters()]
    loss, _ = mean_loss(*loss_of(sharded, TEXTS[rank]))
    loss.backward()
    results["fsdp"] = gradients(sharded)
    give_gradients(sharded)
    optimizers = Optimizers(sharded, muon_lr=0.01, adamw_lr=0.01, muon_dtype=torch.float32)
    optimizers.step(1.0)
    save_sharded(root / "by_two", sharded.state_dict())
    try:
        save_sharded(root / "by_two", scrambled().state_dict())
    except FileExistsError as error:
        results["refused"] = str(error)
    results["stepped"] = {n: whole(p.detach()) for n, p in sharded.named_parameters()}
    results["generated"] = sharded.generate(b"the ", max_new_bytes=4, temperature=0)

    other = apply_fsdp2(STLM(TINY))
    load_sharded(root / "by_one", other.state_dict())
    results["loaded"] = {n: whole(p.detach()) for n, p in other.named_parameters()}
    results["untrained"] = dict(scrambled().named_parameters())
    trainer, results["losses"] = trained(Ranks(rank, 2), parts=2)
    results["trained"] = dict(trainer.model.named_parameters())
    results["agreed"] = Ranks(rank, 2).agree(7.0 + rank, should_stop=rank == 1)
    results["lost"] = lost_patches(Ranks(rank, 2))
    torch.save(results, root / f"results-{rank}")


@pytest.fixture(scope="module", name="folder")
def folder_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    save_sharded(folder / "by_one", scrambled().state_dict())
    run_ranks(in_two_processes, folder, folder)
    return folder


@pytest.fixture(params=[0, 1], name="seen")
def results_of_a_rank(folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    return torch.load(folder / f"results-{request.param}", weights_only=True)


def alone() -> tuple[STLM, Tensor]:
    """One process that sees all the bytes."""
    model = scrambled()
    sums = [loss_of(model, text) for text in TEXTS]
    loss = sum(x for x, _ in sums) / sum(n for _, n in sums)
    loss.backward()
    return model, loss.detach()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(seen: dict[str, Any], kind: str) -> None:
    model, loss = alone()
    want = gradients(model)
    assert_same_gradients(seen[kind], want)
    assert_same_rows(seen["mean"], loss)


def test_a_sharded_model_trains_and_generates_as_one(seen: dict[str, Any]) -> None:
    assert set(seen["sharded"]) == {"DTensor"}
    model = scrambled()
    give_gradients(model)
    Optimizers(model, muon_lr=0.01, adamw_lr=0.01, muon_dtype=torch.float32).step(1.0)
    for name, parameter in model.named_parameters():
        assert_same_step(seen["stepped"][name], parameter.detach(), seen["untrained"][name], name)
    assert len(seen["generated"]) == 4


def test_checkpoints_change_the_number_of_processes(folder: Path, seen: dict[str, Any]) -> None:
    kept = scrambled()
    for name, parameter in kept.named_parameters():
        assert torch.equal(seen["loaded"][name], parameter), f"{name}, by one, read by two"
    model = STLM(TINY)
    load_sharded(folder / "by_two", model.state_dict())
    for name, parameter in model.named_parameters():
        assert torch.equal(seen["stepped"][name], parameter), f"{name}, by two, read by one"
    assert not [p for p in (folder / "by_two").iterdir() if p.suffix != ".safetensors"]


def test_a_folder_that_holds_something_is_refused(
    folder: Path, seen: dict[str, Any], tmp_path: Path
) -> None:
    """Every process refuses it: what is read from it would be of both."""
    assert seen["refused"] == f"folder: expected an empty one, got {folder / 'by_two'}: move it"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="folder: expected an empty one"):
        save_sharded(tmp_path, {"x": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_all_follow_the_first_clock_and_stop_together(seen: dict[str, Any]) -> None:
    assert seen["agreed"] == (7.0, True)


def test_the_trainer_in_two_processes_and_two_parts_equals_one(seen: dict[str, Any]) -> None:
    trainer, losses = trained(Ranks())
    assert seen["losses"] == pytest.approx(losses, rel=1e-4)
    table = "embedding.weight"  # moved by AdamW, which amplifies no rounding
    torch.testing.assert_close(
        seen["trained"][table], trainer.model.embedding.weight.detach(), rtol=1e-3, atol=1e-5
    )


def test_patches_without_a_slot_are_those_of_all_processes(seen: dict[str, Any]) -> None:
    # Each process has 10 slots for the 16 patches of its window of 32 bytes, or a few more.
    assert int(seen["lost"]) >= 2 * 6


def test_the_command_under_torchrun(full: bool, tmp_path: Path) -> None:
    if not full:
        pytest.skip("two processes that import everything and judge take a minute: --full")
    text = tmp_path / "text.txt"
    text.write_bytes(WORDS)
    launcher = "torch.distributed.run --standalone --nproc-per-node 2 -m stlm_models.train"
    options = [
        "--data",
        str(text),
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    command = [sys.executable, "-m", *launcher.split(), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out") == 1
    assert done.stderr.count("corpus:") == 1
    assert load_model(tmp_path / "run")


# Without another process


def test_one_process_divides_by_its_own_bytes() -> None:
    loss, mean = mean_loss(torch.tensor(6.0, requires_grad=True), torch.tensor(3))
    assert loss.requires_grad
    assert (loss.item(), mean.item()) == (2.0, 2.0)
    assert not mean.requires_grad
    assert float(mean_loss(torch.tensor(0.0), torch.tensor(0))[0]) == 0.0
    assert Ranks.join() == Ranks(0, 1)


def windows(rank: int = 0, world: int = 1) -> Iterator[Any]:
    documents = [bytes(range(256)) * 4]
    made = TrainingWindows(documents, context=16, batch_size=4, seed=3, rank=rank, world=world)
    return (made.batch(step) for step in range(3))


def test_processes_share_the_rows_of_a_step() -> None:
    for everything, *parts in zip(windows(), windows(0, 2), windows(1, 2), strict=True):
        assert torch.equal(everything.byte_ids, torch.cat([x.byte_ids for x in parts]))
        assert torch.equal(everything.targets, torch.cat([x.targets for x in parts]))
    with pytest.raises(
        ValueError, match="batch_size: expected a multiple of the 3 processes, got 4"
    ):
        next(windows(0, 3))
