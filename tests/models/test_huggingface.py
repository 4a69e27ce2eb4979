"""The Hugging Face extra: what it computes, what it is called, what it saves and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import TINY

from stlm_models import STLM, ModelConfig, TiedEmbedding

transformers = pytest.importorskip("transformers")
from helpers.huggingface import (  # noqa: E402
    KINDS,
    PROMPTS,
    assert_same,
    byte_logprobs,
    collated,
    left_padded,
    one_model,
    one_stlm,
)

from stlm_models.huggingface import (  # noqa: E402
    ByteTokenizer,
    STLMForCausalLM,
    STLMHFConfig,
)

LEAST = torch.finfo(torch.float32).min


def summed_nats(stlm: STLM, texts: list[str]) -> tuple[float, int]:
    """Nats of the bytes of each text alone, and how many there are."""
    nats, count = 0.0, 0
    for text in texts:
        data = [*text.encode()]
        rows = byte_logprobs(stlm, [256, *data])[:-1]
        nats -= float(rows.detach().gather(1, torch.tensor(data, dtype=torch.int64)[:, None]).sum())
        count += len(data)
    return nats, count


class TestTokenizer:
    tokenizer = ByteTokenizer()

    def test_bytes_are_ids(self) -> None:
        text = "é <|document|>\n"
        ids = self.tokenizer(text).input_ids
        assert ids == [256, *text.encode()] == self.tokenizer.encode_bytes(text.encode())
        assert self.tokenizer.decode(ids, skip_special_tokens=True) == text
        assert self.tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"
        data = bytes(range(256))
        assert self.tokenizer.decode_bytes(self.tokenizer.encode_bytes(data)) == data
        with pytest.raises(ValueError, match="ids: expected 0 to 256"):
            self.tokenizer.decode([257])

    def test_special_ids_and_length(self) -> None:
        own = self.tokenizer
        assert own.bos_token_id == own.eos_token_id == own.pad_token_id == 256
        assert len(own) == 257
        assert ByteTokenizer.for_model(one_model()).model_max_length == TINY.context

    @pytest.mark.parametrize(
        "add",
        [
            lambda t: t.add_tokens(["<new>"]),
            lambda t: t.add_special_tokens({"pad_token": "[PAD]"}),
            lambda t: t.add_special_tokens({"extra_special_tokens": ["<a>"]}),
            lambda t: ByteTokenizer(unk_token="<unk>"),
        ],
    )
    def test_new_tokens_are_refused(self, add: Any) -> None:
        tokenizer = ByteTokenizer()
        with pytest.raises(ValueError, match="tokens: expected none beside the 256 bytes"):
            add(tokenizer)
        assert len(tokenizer) == 257
        assert tokenizer.all_special_ids == [256]
        assert tokenizer.decode(tokenizer("x").input_ids, skip_special_tokens=True) == "x"
        assert tokenizer.add_tokens(["a"]) == 0  # a byte it has
        with pytest.raises(ValueError, match="token: expected one of a byte"):
            tokenizer.convert_tokens_to_ids("<new>")

    def test_a_byte_may_end_texts(self, tmp_path: Path) -> None:
        ByteTokenizer(eos_token="\x03").save_pretrained(tmp_path)
        loaded = ByteTokenizer.from_pretrained(tmp_path)
        assert loaded.eos_token_id == 3
        assert loaded("a\x03").input_ids == [256, ord("a"), 3]
        assert loaded.decode([ord("a"), 3], skip_special_tokens=True) == "a"
        high = ByteTokenizer(eos_token=chr(0x80))
        assert high.decode_bytes(high.encode_bytes(b"\x80")) == b"\x80"
        assert high.convert_tokens_to_string([chr(0xC3), chr(0xA9)]) == "é"

    def test_chats(self) -> None:
        chat = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "so"}]
        text = "\x01user\x02é\x03\x01assistant\x02so\x03"
        own = self.tokenizer
        assert own.apply_chat_template(chat, tokenize=False) == text
        assert own.apply_chat_template(chat).input_ids == [256, *text.encode()]
        prompt = own.apply_chat_template(
            chat[:1], add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        assert prompt[0].tolist() == [256, *text.encode()][: -len("so\x03")]
        batch = own.apply_chat_template([chat, chat[:1]], padding=True, return_tensors="pt")
        assert batch["attention_mask"].sum(1).tolist() == [1 + len(text.encode()), 10]
        with pytest.raises(Exception, match="messages: expected text without the marks"):
            own.apply_chat_template([{"role": "user", "content": "a\x03b"}])
        with pytest.raises(ValueError, match="return_assistant_tokens_mask: expected False"):
            own.apply_chat_template(chat, return_assistant_tokens_mask=True)


class TestConfig:
    def test_names(self) -> None:
        config = STLMHFConfig(TINY, hidden_size=32, decoder_layers=1)
        assert config.model_config == ModelConfig(
            **{**TINY.to_dict(), "byte_dim": 32, "decoder_layers": 1}
        )
        assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (257, 32, 1)
        assert (config.num_attention_heads, config.num_key_value_heads) == (2, 2)
        assert (config.max_position_embeddings, config.intermediate_size) == (TINY.context, 24)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 256, 256)
        assert config.tie_word_embeddings
        config.tie_word_embeddings = False
        assert not config.model_config.tied
        assert STLMHFConfig.from_dict(config.to_dict()).model_config == config.model_config

    def test_what_is_refused(self) -> None:
        with pytest.raises(ValueError, match="stlm: expected the fields of ModelConfig"):
            STLMHFConfig({"width": 3})
        with pytest.raises(ValueError, match="vocab_size: expected at least 257, got 4"):
            STLMHFConfig().vocab_size = 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_over_bytes_and_shifted(kind: str) -> None:
    stlm, batch = one_stlm(kind), collated(PROMPTS)
    model = STLMForCausalLM.from_stlm(stlm)
    nats, count = summed_nats(stlm, PROMPTS[:2])
    output = model(**batch)
    assert_same(output.loss, nats / count)
    of_seven = model(**batch, num_items_in_batch=7).loss
    assert_same(of_seven, nats / 7)
    assert output.logits.shape == (*batch["input_ids"].shape, 257)
    assert model(**batch, return_dict=False)[0] == output.loss
    # By others: id 256 has no mass, and where it is a label it is ignored.
    logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
    assert_same(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), output.loss)
    unmasked = model(batch["input_ids"], labels=batch["input_ids"])
    assert_same(unmasked.loss, output.loss)
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert_same(model(**{**batch, "labels": None}, shift_labels=shifted).loss, output.loss)
    mask = batch["attention_mask"]
    anything = shifted.masked_fill(mask == 0, 7)  # where no byte stands
    of_shifted = model(batch["input_ids"], attention_mask=mask, shift_labels=anything).loss
    assert_same(of_shifted, output.loss)
    training = model.train()(**batch)
    assert training.logits is None
    if kind != "parallel":  # which has a second loss in training
        assert_same(training.loss, output.loss)


def test_special_ids_have_no_mass_and_give_no_nan() -> None:
    model = one_model()
    logits = model(**left_padded(PROMPTS[:1])).logits
    assert (logits[..., 256] == LEAST).all()
    assert (logits.softmax(-1)[..., 256] == 0).all()
    assert_same(logits.softmax(-1).sum(-1), torch.ones(logits.shape[:2]))
    logits.softmax(-1).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_as_if_alone(side: str) -> None:
    model = one_model()
    batch = ByteTokenizer()(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
    logits = model(**batch).logits
    for row, kept, text in zip(logits, batch["attention_mask"].bool(), PROMPTS, strict=True):
        alone = byte_logprobs(model.stlm, [256, *text.encode()])
        assert_same(row[kept][:, :256].log_softmax(-1), alone)
        assert (row[~kept].argmax(-1) == 256).all()


def test_a_second_document_start_is_padding() -> None:
    """Two starts are what lm-evaluation-harness makes of a tokenizer that begins texts itself."""
    model = one_model()
    ids = torch.tensor([[256, 256, *b"ab c"], [256, *b"ab cd"]])
    logits = model(ids).logits.log_softmax(-1)
    assert logits[0, 0, 256] == 0
    alone = model(ids[:1, 1:]).logits.log_softmax(-1)
    assert_same(logits[:1, 1:], alone)
    assert_same(logits[1:], model(ids[1:]).logits.log_softmax(-1))


class TestPackedDocuments:
    rows = (b"ab c", b"x", b"a longer text, of words")

    def batch(self, **options: Any) -> dict[str, Any]:
        collator = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)
        return dict(collator([{"input_ids": [256, *row]} for row in self.rows]))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"position_ids_start": 2},
            {"return_flash_attn_kwargs": True},
            {"return_position_ids": False, "return_flash_attn_kwargs": True},
            {"return_position_ids": False, "return_seq_idx": True},
        ],
    )
    def test_each_is_as_if_alone(self, options: dict[str, Any]) -> None:
        stlm = one_stlm()
        model, batch = STLMForCausalLM.from_stlm(stlm), self.batch(**options)
        output = model(**batch)
        alone = torch.cat([byte_logprobs(stlm, [256, *row]) for row in self.rows])
        assert_same(output.logits[0, :, :256].log_softmax(-1), alone)
        nats, count = summed_nats(stlm, [row.decode() for row in self.rows])
        assert_same(output.loss, nats / count)
        assert_same(model.train()(**batch).loss, output.loss)

    def test_no_document_predicts_the_next_one(self) -> None:
        """Even where none begins with id 256 and labels say nothing of their boundaries."""
        model = one_model()
        ids = torch.tensor([[*b"abcd"]])
        positions = torch.tensor([[0, 1, 0, 1]])
        packed = model(ids, position_ids=positions, labels=ids).loss
        rows = torch.tensor([[*b"ab"], [*b"cd"]])
        assert_same(packed, model(rows, labels=rows).loss)

    def test_padded_and_packed_at_once(self) -> None:
        model = one_model()
        ids = torch.tensor([[256, 256, *b"ab", 256, *b"c"], [256, *b"xyz", 256, *b"d"]])
        mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
        positions = torch.tensor([[0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 1]])
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        expected = torch.cat(
            [byte_logprobs(model.stlm, [256, *row]) for row in (b"ab", b"c", b"xyz", b"d")]
        )
        assert_same(logits[mask.bool()][:, :256].log_softmax(-1), expected)

    def test_positions_that_rise_change_nothing(self) -> None:
        model, batch = one_model(), left_padded()
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert_same(model(**batch, position_ids=positions).logits, model(**batch).logits)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"position_ids": torch.tensor([[0, 1, 3, 4]])}, "position_ids: expected positions"),
            ({"position_ids": torch.tensor([[0, 1, 2]])}, r"position_ids: expected shape \(1, 4\)"),
            ({"position_ids": torch.arange(4)}, "position_ids: expected shape"),
            ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask: expected shape"),
            ({"labels": torch.zeros(1, 3, dtype=torch.int64)}, "labels: expected shape"),
        ],
    )
    def test_what_is_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            one_model()(torch.tensor([[*b"abcd"]]), **arguments)
        with pytest.raises(ValueError, match="input_ids: expected one row"):
            one_model()(torch.zeros(2, 2, dtype=torch.int64), seq_idx=torch.tensor([[0, 0]]))


@pytest.mark.parametrize("kind", ["pooled", "flat", "untied"])
@pytest.mark.parametrize("padded", [False, True])
def test_hidden_states_and_attentions(kind: str, padded: bool) -> None:
    """States are what the result is computed from: gradients reach them; weights are causal."""
    model = one_model(kind)
    batch = left_padded() if padded else left_padded(PROMPTS[:1])
    plain = model(**batch).logits
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert_same(output.logits, plain)
    shape, config = batch["input_ids"].shape, model.config
    assert [x.shape for x in output.hidden_states] == [(*shape, 16)] * 3
    assert [x.shape for x in output.attentions] == [(shape[0], 2, shape[1], shape[1])] * 2
    table = model.stlm.embedding
    logits = table.logits(output.hidden_states[-1])[..., :256]
    kept = batch["attention_mask"].bool()
    assert_same(logits[kept], plain[kept][:, :256])
    for x in (*output.hidden_states, *output.attentions):
        x.retain_grad()
    output.logits[kept][:, :256].square().sum().backward()
    assert all(x.grad.abs().max() > 0 for x in (*output.hidden_states, *output.attentions))
    weights = output.attentions[0].detach()
    seen = weights.sum(1)[kept]  # (rows, T)
    assert_same(weights.sum(-1)[:, 0][kept], torch.ones(int(kept.sum())))
    rows, columns = kept.nonzero(as_tuple=True)
    later = torch.arange(shape[1]) > columns[:, None]
    assert (seen[later | ~kept[rows]] == 0).all()
    outside = (kept.cumsum(1)[rows, columns][:, None] - kept.cumsum(1)[rows]) >= TINY.decoder_window
    assert (seen[outside] == 0).all()
    config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 3


def test_outputs_that_are_refused() -> None:
    batch = left_padded(PROMPTS[:1])
    with pytest.raises(ValueError, match='expected False with output "parallel"'):
        one_model("parallel")(**batch, output_hidden_states=True)
    with pytest.raises(ValueError, match="output_hidden_states: expected None or a bool"):
        one_model()(**batch, output_hidden_states=[0])
    model = one_model()
    with pytest.raises(ValueError, match="output_attentions: expected False beside packed"):
        model(
            torch.tensor([[1, 2]]),
            position_ids=torch.zeros(1, 2, dtype=int),
            output_attentions=True,
        )
    assert_same(model(**batch).logits, one_model()(**batch).logits)  # as it was


class TestEmbeddings:
    def test_the_table_is_found_and_set(self) -> None:
        model = one_model()
        table = model.get_input_embeddings()
        assert isinstance(table, torch.nn.Embedding)
        assert table.weight is model.stlm.embedding.weight
        other = TiedEmbedding(257, 16)
        model.set_input_embeddings(other)
        assert model.get_input_embeddings() is other
        batch = left_padded(PROMPTS[:1])
        assert not torch.equal(model(**batch).logits, one_model()(**batch).logits)
        for wrong in (torch.nn.Embedding(257, 16), TiedEmbedding(257, 8), TiedEmbedding(300, 16)):
            with pytest.raises(ValueError, match=r"value: expected a TiedEmbedding\(257, 16\)"):
                model.set_input_embeddings(wrong)

    def test_hooks_on_it_reach_the_model(self) -> None:
        model, batch = one_model(), left_padded(PROMPTS[:1])
        before = model(**batch).logits
        hook = model.get_input_embeddings().register_forward_hook(lambda m, i, out: out + 1)
        assert not torch.equal(model(**batch).logits, before)
        hook.remove()
        model.requires_grad_(False)
        model.enable_input_require_grads()
        assert model(**batch).logits.requires_grad

    def test_the_output_is_a_view(self) -> None:
        model, batch = one_model(), left_padded(PROMPTS[:1])
        head, states = model.get_output_embeddings(), model.base_model(**batch).last_hidden_state
        assert_same(head(states), model(**batch).logits[..., :256])
        head(states).square().sum().backward()
        assert model.stlm.embedding.weight.grad is not None
        assert "output_table" not in "".join(model.state_dict())
        assert one_model("untied").get_output_embeddings() is None

    def test_its_size_is_that_of_text(self) -> None:
        model = one_model()
        assert model.resize_token_embeddings(257) is model.get_input_embeddings()
        assert model.resize_token_embeddings() is model.get_input_embeddings()
        for arguments in ((300,), (257, 64), (100,)):
            with pytest.raises(ValueError, match="new_num_tokens: expected 257, the bytes and"):
                model.resize_token_embeddings(*arguments)


def test_what_would_be_ignored_is_refused() -> None:
    model, batch = one_model(), left_padded()
    with pytest.raises(ValueError, match=r"inputs_embeds: expected None.* has to see them"):
        model(inputs_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="token_type_ids: expected None"):
        model(**batch, token_type_ids=batch["input_ids"])
    with pytest.raises(ValueError, match=r"input_ids: expected shape \(B, T\), got None"):
        model()
    with pytest.raises(ValueError, match="num_items_in_batch: expected None without labels"):
        model(**batch, num_items_in_batch=3)


def test_a_saved_folder_loads_exactly(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    model, tokenizer = one_model(), ByteTokenizer()
    model.save_pretrained(tmp_path)
    ByteTokenizer.for_model(model).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    with safe_open(weights, "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    auto = transformers.AutoModelForCausalLM
    registered = auto.from_pretrained(tmp_path)
    assert type(registered) is STLMForCausalLM
    remote = auto.from_pretrained(tmp_path, trust_remote_code=True)
    for loaded in (remote, registered, STLMForCausalLM.from_pretrained(tmp_path)):
        assert loaded.config.model_config == TINY
        assert loaded.generation_config.suppress_tokens == [256]
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
        batch = tokenizer(PROMPTS[1], return_tensors="pt")
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    for trust in (True, False):
        reader = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust)
        assert reader("é<|document|>").input_ids == tokenizer("é<|document|>").input_ids
        assert reader.model_max_length == TINY.context
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_config == TINY
    tensors = load_file(weights)
    tensors.pop("stlm.to_core.weight")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*to_core"):
        STLMForCausalLM.from_pretrained(tmp_path)
    _, info = STLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert list(info["missing_keys"]) == ["stlm.to_core.weight"]


@pytest.mark.parametrize("shard", ["1GB", "20kB"])
def test_a_folder_with_matrices_apart_loads(shard: str, tmp_path: Path) -> None:
    """Load what 0.1.0 saved, in one file or several; a matrix that is not there stays missing."""
    from safetensors.torch import load_file, save_file

    model = one_model()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "20kB")
    apart = 0
    for file in files:
        tensors = load_file(file)
        for path, module in model.named_modules():
            for joined, rows in getattr(module, "joined", {}).items():
                whole = tensors.pop(f"{path}.{joined}.weight", None)
                if whole is not None:
                    parts = whole.split(list(rows.values()))
                    names = [f"{path}.{name}.weight" for name in rows]
                    tensors |= dict(zip(names, map(torch.clone, parts), strict=True))
                    apart += len(parts)
        save_file(tensors, file, {"format": "pt"})
    assert apart
    loaded, info = STLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (loaded, auto, STLMForCausalLM.from_pretrained(tmp_path)):
        for name, tensor in model.state_dict().items():
            assert torch.equal(each.state_dict()[name], tensor)
    lost = next(name for name in tensors if name.endswith((".query.weight", ".gate.weight")))
    save_file({n: x for n, x in tensors.items() if n != lost}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="missing_keys"):
        STLMForCausalLM.from_pretrained(tmp_path)


def test_the_folder_stands_without_this_package(tmp_path: Path, in_a_process: Any) -> None:
    """The copied files are enough, beside an installed stlm."""
    one_model().save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    out = in_a_process(
        f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
print(model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=3).shape)
print("stlm_models.huggingface" in sys.modules)
"""
    )
    assert out.split("\n")[:2] == ["torch.Size([1, 6])", "False"]


@pytest.fixture
def in_a_process() -> Any:
    import os
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}

    def run(code: str) -> str:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
