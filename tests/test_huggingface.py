"""The Hugging Face extra: what it computes, generates, saves and refuses, and its Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import TINY, scrambled
from norms import assert_same_rows
from test_cached import write_greedily
from torch import Tensor

from stlm_models import STLM

transformers = pytest.importorskip("transformers")
from stlm_models.huggingface import (  # noqa: E402
    ByteTokenizer,
    STLMForCausalLM,
    STLMHFConfig,
    modeling_stlm,
)

PROMPTS = ["ab c", "Zoë and a longer prompt", ""]


@pytest.fixture(name="stlm")
def one_stlm() -> STLM:
    model = scrambled()
    torch.nn.init.normal_(model.embedding.weight, std=0.3)
    return model


@pytest.fixture(name="model")
def one_model(stlm: STLM) -> STLMForCausalLM:
    return STLMForCausalLM.from_stlm(stlm)


@pytest.fixture(name="tokenizer")
def one_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


def collated(tokenizer: ByteTokenizer, texts: list[str]) -> dict[str, Tensor]:
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return dict(collator([tokenizer(text) for text in texts]))


def test_the_tokenizer(tokenizer: ByteTokenizer) -> None:
    text = "é <|document|>\n"
    assert (
        tokenizer(text).input_ids == [256, *text.encode()] == tokenizer.encode_bytes(text.encode())
    )
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"
    data = bytes(range(256))
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    with pytest.raises(ValueError, match="ids: expected 0 to 256"):
        tokenizer.decode([257])


def test_the_loss_is_shifted_and_padding_counts_for_nothing(
    model: STLMForCausalLM, stlm: STLM, tokenizer: ByteTokenizer
) -> None:
    batch = collated(tokenizer, PROMPTS)
    sums = [
        stlm(ids[None, :-1], ids[None, 1:])
        for ids in map(torch.tensor, tokenizer(PROMPTS[:2]).input_ids)
    ]
    loss_sum, n_valid = sum(s for s, _ in sums), sum(n for _, n in sums)
    output = model(**batch)
    assert_same_rows(output.loss, loss_sum / n_valid)
    assert_same_rows(model(**batch, num_items_in_batch=7).loss, loss_sum / 7)
    assert output.logits.shape == (*batch["input_ids"].shape, 257)
    assert model(**batch, return_dict=False)[0] == output.loss
    assert model.train()(**batch).logits is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_as_if_alone(
    model: STLMForCausalLM, stlm: STLM, tokenizer: ByteTokenizer, side: str
) -> None:
    batch = tokenizer(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
    logits = model(**batch).logits
    for row, kept, text in zip(logits, batch["attention_mask"].bool(), PROMPTS, strict=True):
        alone = stlm(torch.tensor([tokenizer(text).input_ids]))[0]
        assert_same_rows(row[kept], alone)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_generate_is_that_of_full_runs(
    model: STLMForCausalLM, stlm: STLM, tokenizer: ByteTokenizer, cached: bool, masked: bool
) -> None:
    batch = tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    model.double()  # where rounding decides nothing
    stlm.double()
    if not masked:
        del batch["attention_mask"]
    out = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=cached)
    expected = write_greedily(stlm, [[256, *text.encode()] for text in PROMPTS], 6)
    assert [tokenizer.decode_bytes(row[-6:]) for row in out] == expected


@pytest.mark.parametrize("pad_to", [None, 40])
def test_a_cache_goes_on_where_it_stopped(
    model: STLMForCausalLM, tokenizer: ByteTokenizer, pad_to: int | None
) -> None:
    """Wider than its longest row, as `pad_to_multiple_of` makes it, a batch has columns to skip."""
    length = "max_length" if pad_to else True
    batch = tokenizer(
        PROMPTS, padding=length, max_length=pad_to, padding_side="left", return_tensors="pt"
    )
    model.double()  # where rounding decides nothing
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**batch, **options)
    name = next(key for key in ("cache", "past_key_values") if key in first)
    more = torch.tensor([[*b" and"]] * len(PROMPTS))
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(PROMPTS), 8, dtype=torch.int64)], 1)
    second = model.generate(ids, attention_mask=mask, **{name: first[name]}, **options)
    anew = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(second.sequences, anew.sequences)


def test_beams_go_on_from_a_cache(model: STLMForCausalLM, tokenizer: ByteTokenizer) -> None:
    model.double()  # where rounding decides nothing
    batch = tokenizer(PROMPTS[:1], return_tensors="pt")
    runs = [
        model.generate(**batch, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*runs)


def test_reordered_rows_go_on_from_their_own_text(model: STLMForCausalLM) -> None:
    """What beam search asks of a cache when a beam continues another one."""
    from stlm_models.huggingface.modeling_stlm import GrowingTexts

    ids = torch.tensor([[256, *b"one row"], [256, *b"another"], [256, *b"a third"]])
    texts = GrowingTexts(model.stlm, ids, None)
    order = torch.tensor([1, 1, 0])
    texts.reorder_cache(order)
    new = torch.tensor([[ord("x")], [ord("y")], [ord(" ")]])
    texts.append(new)
    whole = model.stlm.hidden(torch.cat([ids[order], new], 1))[:, -1]
    assert_same_rows(texts.run.hidden, whole)


def test_what_would_be_ignored_is_refused(model: STLMForCausalLM, tokenizer: ByteTokenizer) -> None:
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    for inputs in (batch, {"input_ids": batch["input_ids"]}):
        with pytest.raises(ValueError, match="prompts padded on the left"):
            model.generate(**inputs, max_new_tokens=2)
    words = {**TINY.to_dict(), "tokens": "words", "patch_rule": "none", "core_layers": 0}
    with pytest.raises(ValueError, match='tokens: expected "bytes" to generate'):
        STLMForCausalLM(STLMHFConfig(words)).generate(batch["input_ids"][:1], max_new_tokens=2)
    texts = model(batch["input_ids"], use_cache=True, logits_to_keep=1)[1]
    with pytest.raises(ValueError, match="labels: expected None beside a cache"):
        model(batch["input_ids"], labels=batch["input_ids"], cache=texts)
    with pytest.raises(ValueError, match="position_ids: expected None"):
        model(batch["input_ids"], position_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="stlm: expected the fields of ModelConfig"):
        STLMHFConfig({"width": 3})


def test_a_saved_folder_loads_exactly(
    model: STLMForCausalLM, tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    with safe_open(weights, "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    remote = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    for loaded in (remote, STLMForCausalLM.from_pretrained(tmp_path)):
        assert loaded.config.model_config == TINY
        assert loaded.generation_config.suppress_tokens == [256]
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
        batch = tokenizer(PROMPTS[1], return_tensors="pt")
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert reader("é<|document|>").input_ids == tokenizer("é<|document|>").input_ids
    tensors = load_file(weights)
    tensors.pop("stlm.to_core.weight")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*to_core"):
        STLMForCausalLM.from_pretrained(tmp_path)


def test_trainer_accumulates_what_one_batch_gives(
    stlm: STLM, tokenizer: ByteTokenizer, tmp_path: Path
) -> None:
    """Two ragged batches whose gradients are added up move the parameters as one of both does."""
    pytest.importorskip("accelerate")
    rows = [tokenizer(text) for text in ("a", "a much longer text", "bc", "four words of text")]
    moved = []
    for size, accumulated in ((4, 1), (1, 4)):
        model = STLMForCausalLM.from_stlm(stlm)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            learning_rate=1e-2,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
        moved.append(model.stlm.state_dict())
    for name, tensor in moved[0].items():
        assert_same_rows(tensor, moved[1][name])
    assert not torch.equal(moved[0]["to_core.weight"], stlm.to_core.weight)


class TestGenerationState:
    @pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_lost_logits_are_an_error(
        self,
        model: STLMForCausalLM,
        tokenizer: ByteTokenizer,
        options: dict[str, object],
        use_cache: bool,
    ) -> None:
        inputs = tokenizer("ab", return_tensors="pt")
        with torch.no_grad():
            model.stlm.to_output.weight[0, 0] = float("nan")
        with pytest.raises(
            FloatingPointError, match=r"logits: expected numbers .* of nan for row 0"
        ):
            model.generate(**inputs, max_new_tokens=2, use_cache=use_cache, **options)

    def test_modes_and_lists_stay(self, model: STLMForCausalLM, tokenizer: ByteTokenizer) -> None:
        inputs = tokenizer("ab", return_tensors="pt")
        suppressed = [65, 66]
        config = transformers.GenerationConfig(max_new_tokens=3, suppress_tokens=suppressed)
        model.train()
        model.stlm.core.eval()
        before = [module.training for module in model.modules()]
        own = list(model.generation_config.suppress_tokens)
        model.generate(**inputs, generation_config=config)
        model.generate(**inputs, max_new_tokens=2, suppress_tokens=suppressed)
        assert [module.training for module in model.modules()] == before
        assert suppressed == [65, 66] == config.suppress_tokens
        assert model.generation_config.suppress_tokens == own
        assert torch.is_grad_enabled()

    def test_a_cache_of_inference_mode_goes_on_outside(
        self, model: STLMForCausalLM, tokenizer: ByteTokenizer
    ) -> None:
        ids = tokenizer("ab c", return_tensors="pt").input_ids
        name = modeling_stlm._CACHE
        with torch.inference_mode():
            first = model(ids[:, :-1], use_cache=True, logits_to_keep=1)
        logits = model(ids[:, -1:], logits_to_keep=1, **{name: getattr(first, name)}).logits
        assert_same_rows(logits[:, -1], model(ids).logits[:, -1])
