"""The Hugging Face extra among others' training loops and their harness.

`make test-full` installs what these need: accelerate, lightning, peft, trl and lm_eval.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import TINY
from torch import Tensor

from stlm_models import bits_per_byte

transformers = pytest.importorskip("transformers")
from helpers.huggingface import assert_same, byte_logprobs, collated, one_model, one_stlm  # noqa: E402

from stlm_models.huggingface import (  # noqa: E402
    ByteTokenizer,
    STLMForCausalLM,
    STLMHFConfig,
)

TEXTS = ["a", "a much longer text", "bc", "four words of text"]


def arguments(folder: Path, **options: Any) -> Any:
    values = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return transformers.TrainingArguments(str(folder), **{**values, **options})


def trained(folder: Path, collator: Any = None, **options: Any) -> dict[str, Tensor]:
    """The parameters after a step of the Trainer on all texts."""
    pytest.importorskip("accelerate")
    model, tokenizer = one_model(), ByteTokenizer()
    if collator is None:
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = [tokenizer(text) for text in TEXTS]
    trainer = transformers.Trainer(
        model, arguments(folder, **options), train_dataset=rows, data_collator=collator
    )
    trainer.train()
    return model.stlm.state_dict()


@pytest.mark.parametrize(
    "other",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"gradient_checkpointing": True},
        {"collator": transformers.DataCollatorWithFlattening()},
    ],
)
def test_the_trainer_moves_alike(other: dict[str, Any], tmp_path: Path) -> None:
    """Ragged batches added up, blocks run again, documents packed: the parameters of one batch."""
    expected, moved = trained(tmp_path), trained(tmp_path, **other)
    start = one_stlm().state_dict()
    assert not torch.equal(expected["to_core.weight"], start["to_core.weight"])
    for name, tensor in expected.items():
        assert_same(tensor, moved[name])


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        trained(tmp_path, label_smoothing_factor=0.1)


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    """The way that the message of the test above names."""
    pytest.importorskip("accelerate")
    model, tokenizer, seen = one_model(), ByteTokenizer(), []

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append(outputs.logits.shape)
        flat = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch

    model.accepts_loss_kwargs = False
    trainer = transformers.Trainer(
        model,
        arguments(tmp_path),
        train_dataset=[tokenizer(text) for text in TEXTS],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        compute_loss_func=loss_of,
    )
    trainer.train()
    assert seen == [(4, 19, 257)]
    for name, tensor in trained(tmp_path).items():
        assert_same(tensor, model.stlm.state_dict()[name])


class TestCheckpointing:
    def kept(self, model: STLMForCausalLM) -> tuple[int, list[Tensor]]:
        kept: dict[int, Tensor] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x
            return x

        model.train().zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(**collated(["some words of text " * 20])).loss
        loss.backward()
        n_bytes = sum(x.untyped_storage().nbytes() for x in kept.values())
        return n_bytes, [p.grad.clone() for p in model.parameters()]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_less_memory(self, reentrant: bool) -> None:
        model = one_model()
        plainly, expected = self.kept(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        sparing, gradients = self.kept(model)
        assert sparing < 0.6 * plainly
        for ours, theirs in zip(gradients, expected, strict=True):
            assert_same(ours, theirs)
        model.gradient_checkpointing_disable()
        assert self.kept(model)[0] == plainly

    def test_the_config_turns_it_on(self) -> None:
        config = STLMHFConfig(TINY, checkpointing=True)
        assert STLMForCausalLM(config).is_gradient_checkpointing
        assert not one_model().is_gradient_checkpointing


def test_lora_on_the_linear_layers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    model = peft.get_peft_model(one_model(), config)
    batch = collated(TEXTS)
    before = model(**batch).loss
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    after = model(**batch)
    assert after.loss < before
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(one_model(), tmp_path).eval()
    assert_same(loaded(**batch).logits, after.logits)
    prompt = ByteTokenizer()("ab c", return_tensors="pt")
    expected = loaded.generate(**prompt, max_new_tokens=4, do_sample=False)
    merged = loaded.merge_and_unload()
    assert_same(merged(**batch).logits, after.logits)
    assert torch.equal(merged.generate(**prompt, max_new_tokens=4, do_sample=False), expected)
    table = one_model().stlm.embedding.weight
    assert torch.equal(merged.get_input_embeddings().weight, table)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"text": "some text"}, {"eos_token": "\x03"}),
        ({"text": "some text"}, {"packing": True}),
        ({"prompt": "one, ", "completion": "two"}, {}),
        ({"messages": CHAT}, {"gradient_checkpointing": True}),
    ],
)
def test_two_steps_of_supervised_fine_tuning(
    row: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = one_model()
    config = trl.SFTConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_length=TINY.context,
        **options,
    )
    trainer = trl.SFTTrainer(
        model,
        config,
        train_dataset=datasets.Dataset.from_list([row] * 4),
        processing_class=ByteTokenizer.for_model(model),
    )
    first = trainer.train_dataset[0]["input_ids"]
    assert first[0] == 256
    if "eos_token" in options:
        assert first == [256, *b"some text\x03"]
        data, nats = b"some text\x03", byte_logprobs(one_stlm(), first)[:-1]
        wanted = -float(nats.gather(1, torch.tensor([*data])[:, None]).mean().detach())
        batch = dict(next(iter(trainer.get_train_dataloader())))
        found = trainer.compute_loss(trainer.model, batch)
        assert_same(float(found.detach()), wanted)
    trainer.train()
    moved = model.stlm.state_dict()
    start = one_stlm().state_dict()
    assert any(not torch.equal(moved[name], start[name]) for name in start)
    assert all(tensor.isfinite().all() for tensor in moved.values())


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = one_model()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    before = module.model(**collated(TEXTS)).loss
    trainer.fit(
        module, torch.utils.data.DataLoader([TEXTS] * 2, batch_size=None, collate_fn=collated)
    )
    assert module.model.eval()(**collated(TEXTS)).loss < before


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = one_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**collated(TEXTS)).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]


class TestTheHarness:
    """lm-evaluation-harness with the tokenizer's defaults, on documents of this machine."""

    TEXTS = ("a short text", "Zoë and more", " spaced out ", "x")

    @pytest.fixture
    def harness(self) -> tuple[Any, STLMForCausalLM]:
        models = pytest.importorskip("lm_eval.models.huggingface")
        model = one_model()
        tokenizer = ByteTokenizer.for_model(model)
        lm = models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
        assert lm.max_length == TINY.context
        return lm, model

    def test_bits_per_byte(self, harness: tuple[Any, STLMForCausalLM], tmp_path: Path) -> None:
        import lm_eval

        lm, model = harness
        file = tmp_path / "documents.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.TEXTS))
        task = {
            "task": "documents",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path)},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        }
        results = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)["results"]
        ours = bits_per_byte(model.stlm, [text.encode() for text in self.TEXTS])
        assert results["documents"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-5)

    @pytest.mark.parametrize("context", ["a short", ""])
    def test_loglikelihood(self, harness: tuple[Any, STLMForCausalLM], context: str) -> None:
        lm, model = harness
        (nats, _), *_ = lm.loglikelihood([request("loglikelihood", (context, " té"))])
        ids = [256, *context.encode(), *" té".encode()]
        rows = byte_logprobs(model.stlm, ids)[-5:-1]
        expected = rows.gather(1, torch.tensor(ids[-4:])[:, None]).sum()
        assert nats == pytest.approx(float(expected.detach()), rel=1e-5)

    def test_generation(self, harness: tuple[Any, STLMForCausalLM]) -> None:
        lm, model = harness
        tokenizer = ByteTokenizer()
        prompts = ["a short", "Zoë"]
        free = {"until": ["never"], "max_gen_toks": 8}
        got = lm.generate_until([request("generate_until", (text, free)) for text in prompts])
        whole = []
        for text in prompts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            out = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
            whole.append(tokenizer.decode(out))
        assert got == whole
        stop = whole[0][2]
        cut = {"until": [stop], "max_gen_toks": 8}
        assert lm.generate_until([request("generate_until", (prompts[0], cut))]) == [
            whole[0][: whole[0].index(stop)]
        ]


def request(kind: str, values: tuple[Any, ...]) -> Any:
    from lm_eval.api.instance import Instance

    make: Callable[..., Any] = Instance
    return make(request_type=kind, doc={}, arguments=values, idx=0)
