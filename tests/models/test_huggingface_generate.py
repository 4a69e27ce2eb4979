"""`generate` of the Hugging Face extra, and loops of a user's own with its cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cached import write_greedily
from helpers.models import TINY
from torch import Tensor

transformers = pytest.importorskip("transformers")
from helpers.huggingface import PROMPTS, assert_same, left_padded, one_model  # noqa: E402

from stlm_models.huggingface import (  # noqa: E402
    ByteTokenizer,
    STLMForCausalLM,
    STLMHFConfig,
)

GREEDY = {"do_sample": False, "max_new_tokens": 6}
OUTPUT = transformers.modeling_outputs.CausalLMOutputWithPast
CACHE = "cache" if "cache" in OUTPUT.__annotations__ else "past_key_values"


@pytest.fixture(name="model")
def model_of_a_kind() -> STLMForCausalLM:
    return one_model()


@pytest.mark.parametrize("kind", ["pooled", "flat", "untied", "parallel"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_it_is_that_of_full_runs(kind: str, cached: bool, masked: bool) -> None:
    model, batch = one_model(kind), left_padded()
    if not masked:
        del batch["attention_mask"]
    out = model.generate(**batch, **GREEDY, use_cache=cached)
    expected = write_greedily(model.stlm, [[256, *text.encode()] for text in PROMPTS], 6)
    assert [bytes(row[-6:].tolist()) for row in out] == expected


@pytest.mark.parametrize("pad_to", [None, 40])
def test_a_cache_goes_on_where_it_stopped(model: STLMForCausalLM, pad_to: int | None) -> None:
    """Wider than its longest row, as `pad_to_multiple_of` makes it, a batch has columns to skip."""
    batch = ByteTokenizer()(
        PROMPTS,
        padding="max_length" if pad_to else True,
        max_length=pad_to,
        padding_side="left",
        return_tensors="pt",
    )
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**batch, **options)
    more = torch.tensor([[*b" and"]] * len(PROMPTS))
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(PROMPTS), 8, dtype=torch.int64)], 1)
    second = model.generate(ids, attention_mask=mask, **{CACHE: first[CACHE]}, **options)
    anew = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(second.sequences, anew.sequences)


class TestALoopOfOnesOwn:
    @pytest.mark.parametrize("keep", [0, 1])
    @pytest.mark.parametrize("grad", [True, False])
    def test_byte_by_byte(self, model: STLMForCausalLM, keep: int, grad: bool) -> None:
        batch = left_padded()
        ids, mask, cache = batch["input_ids"], batch["attention_mask"], None
        given: Tensor = ids
        with torch.set_grad_enabled(grad):
            for _ in range(6):
                out = model(
                    given,
                    attention_mask=mask,
                    use_cache=True,
                    logits_to_keep=keep,
                    **{CACHE: cache},
                )
                assert out.logits.shape[1] == (keep or given.shape[1])
                given, cache = out.logits[:, -1:].argmax(-1), out[CACHE]
                ids = torch.cat([ids, given], 1)
                mask = torch.cat([mask, torch.ones_like(given)], 1)
        assert torch.equal(ids, model.generate(**batch, **GREEDY))

    def test_several_ids_at_once(self, model: STLMForCausalLM) -> None:
        ids = torch.tensor([[256, *b"one row of"], [256, *b"another ro"]])
        whole = model(ids, output_hidden_states=True)
        first = model(ids[:, :4], use_cache=True)
        assert_same(first.logits, whole.logits[:, :4])
        second = model(ids[:, 4:], output_hidden_states=True, **{CACHE: first[CACHE]})
        assert_same(second.logits, whole.logits[:, 4:])
        for ours, all_of_them in zip(second.hidden_states, whole.hidden_states, strict=True):
            assert_same(ours, all_of_them[:, 4:])
        assert second[CACHE].get_seq_length() == ids.shape[1]

    def test_what_is_refused(self, model: STLMForCausalLM) -> None:
        ids = torch.tensor([[*b"abc"], [*b"def"]])
        cache = {CACHE: model(ids, use_cache=True)[CACHE]}
        new, zeros = ids[:, :1], torch.zeros(2, 1, dtype=torch.int64)
        for arguments, message in (
            ({"labels": new}, "labels: expected None beside a cache"),
            ({"attention_mask": zeros}, "attention_mask: expected ones for the ids beside a cache"),
            ({"position_ids": zeros}, "position_ids: expected positions above 0 beside a cache"),
            ({"output_attentions": True}, "output_attentions: expected False beside a cache"),
        ):
            with pytest.raises(ValueError, match=message):
                model(new, **cache, **arguments)
        with pytest.raises(ValueError, match=r"input_ids: expected shape \(2, N\)"):
            model(ids[:1], **cache)
        theirs = transformers.DynamicCache()
        with pytest.raises(ValueError, match="cache: expected None or what an earlier call"):
            model(new, **{CACHE: theirs})
        with pytest.raises(ValueError, match="use_cache: expected False beside packed"):
            model(ids[:1], position_ids=torch.tensor([[0, 0, 1]]), use_cache=True)
        with pytest.raises(ValueError, match="input_ids: expected at least one id in each row"):
            model(ids, attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]), use_cache=True)


def test_beams_go_on_from_a_cache(model: STLMForCausalLM) -> None:
    batch = left_padded(PROMPTS[:2])
    runs = [
        model.generate(**batch, **GREEDY, num_beams=3, num_return_sequences=2, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*runs)


def test_reordered_rows_go_on_from_their_own_text(model: STLMForCausalLM) -> None:
    """Beam search asks this of a cache when a beam continues another one."""
    ids = torch.tensor([[256, *b"one row"], [256, *b"another"], [256, *b"a third"]])
    texts = model(ids, use_cache=True, logits_to_keep=1)[CACHE]
    order = torch.tensor([1, 1, 0])
    texts.reorder_cache(order)
    new = torch.tensor([[ord("x")], [ord("y")], [ord(" ")]])
    whole = model.stlm.hidden(torch.cat([ids[order], new], 1))[:, -1:]
    assert_same(texts.append(new), whole)


class TestStops:
    @pytest.mark.parametrize("with_tokenizer", [True, False])
    @pytest.mark.parametrize("of_a_character", [True, False])
    def test_rows_end_behind_them(
        self, model: STLMForCausalLM, with_tokenizer: bool, of_a_character: bool
    ) -> None:
        """One of two rows writes the stop and the other does not: é is two bytes of it."""
        model.generation_config.max_new_tokens = 5
        stop = "é!" if of_a_character else "e"
        script = [[*stop.encode(), *b"....."], [*b"abcdefg"]]
        ids = torch.tensor([[*b"x"], [*b"y"]])

        def follow(input_ids: Tensor, scores: Tensor) -> Tensor:
            scores = torch.full_like(scores, -torch.inf)
            for row, text in enumerate(script):
                scores[row, text[input_ids.shape[1] - 1]] = 0
            return scores

        options = {"tokenizer": ByteTokenizer()} if with_tokenizer else {}
        out = model.generate(
            ids, logits_processor=[follow], do_sample=False, stop_strings=[stop, "never"], **options
        )
        length = len(stop.encode())
        assert out[0].tolist() == [ord("x"), *stop.encode(), *[256] * (5 - length)]
        assert out[1].tolist() == [*b"yabcde"]

    def test_what_is_refused(self, model: STLMForCausalLM) -> None:
        with pytest.raises(ValueError, match="stop_strings: expected strings, none empty"):
            model.generate(torch.tensor([[1]]), stop_strings=["a", ""], max_new_tokens=1)


@pytest.mark.parametrize("cached", [True, False])
def test_guidance(model: STLMForCausalLM, cached: bool) -> None:
    """scale * (log p - log p without the prompt) + the latter, by its formula."""
    prompt, other = torch.tensor([[256, *b"ab c"]]), torch.tensor([[256, *b"zz"]])
    out = model.generate(
        prompt, guidance_scale=1.7, negative_prompt_ids=other, **GREEDY, use_cache=cached
    )
    ids, without = prompt, other
    for _ in range(6):
        p, q = (model(x).logits[:, -1, :256].log_softmax(-1) for x in (ids, without))
        new = (1.7 * (p - q) + q).argmax(-1, keepdim=True)
        ids, without = torch.cat([ids, new], 1), torch.cat([without, new], 1)
    assert torch.equal(out, ids)


def test_no_special_id_is_ever_drawn(model: STLMForCausalLM) -> None:
    """Special ids are never drawn, even the likeliest, whatever the user suppresses."""
    batch = left_padded(["a"] * 16)
    logits = model.stlm(batch["input_ids"])
    assert (logits[:, -1].argmax(-1) == 256).all()
    out = model.generate(**batch, do_sample=True, max_new_tokens=12, suppress_tokens=[65])
    assert (out[:, 2:] < 256).all()
    assert (out[:, 2:] != 65).all()
    assert (model.generate(**batch, do_sample=True, max_new_tokens=3, top_k=300)[:, 2:] < 256).all()


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("cached", [True, False])
def test_outputs_of_each_step(model: STLMForCausalLM, beams: int, cached: bool) -> None:
    batch = left_padded()
    length = batch["input_ids"].shape[1]
    out = model.generate(
        **batch,
        **GREEDY,
        num_beams=beams,
        use_cache=cached,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=not cached,
        return_dict_in_generate=True,
    )
    rows = beams * len(PROMPTS)
    assert [x.shape for x in out.scores] == [x.shape for x in out.logits] == [(rows, 257)] * 6
    for step, states in enumerate(out.hidden_states):
        wide = 1 if cached and step else length + step
        assert [x.shape for x in states] == [(rows, wide, 16)] * 3
    if not cached:
        for step, weights in enumerate(out.attentions):
            assert [x.shape for x in weights] == [(rows, 2, length + step, length + step)] * 2


def test_arguments_that_change_nothing(model: STLMForCausalLM) -> None:
    batch = left_padded()
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, logits_to_keep=0), expected)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for cached in (True, False):
        out = model.generate(**batch, **GREEDY, position_ids=positions, use_cache=cached)
        assert torch.equal(out, expected)
    assert model.generate(max_new_tokens=3).shape == (1, 4)  # no prompt begins a document
    kwargs: dict[str, Any] = {"output_hidden_states": True, "own": "value"}
    prepared = model.prepare_inputs_for_generation(batch["input_ids"], **kwargs)
    assert {name: prepared[name] for name in kwargs} == kwargs


def test_what_is_refused(model: STLMForCausalLM) -> None:
    batch = ByteTokenizer()(PROMPTS, padding=True, return_tensors="pt")
    for inputs in (batch, {"input_ids": batch["input_ids"]}):
        with pytest.raises(ValueError, match="prompts padded on the left"):
            model.generate(**inputs, max_new_tokens=2)
    words = {**TINY.to_dict(), "tokens": "words", "patch_rule": "none", "core_layers": 0}
    with pytest.raises(ValueError, match='tokens: expected "bytes" to generate'):
        STLMForCausalLM(STLMHFConfig(words)).generate(batch["input_ids"][:1], max_new_tokens=2)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 16), max_new_tokens=2)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        model.generate(batch["input_ids"][:1], prompt_lookup_num_tokens=2, max_new_tokens=2)


def test_a_pipeline(model: STLMForCausalLM) -> None:
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=ByteTokenizer())
    text = pipe("ab c", max_new_tokens=4, do_sample=False, return_full_text=False)
    expected = write_greedily(model.stlm, [[256, *b"ab c"]], 4)[0].decode("utf-8", "replace")
    assert text[0]["generated_text"] == expected


class TestState:
    @pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_lost_logits_are_an_error(
        self, model: STLMForCausalLM, options: dict[str, object], use_cache: bool
    ) -> None:
        with torch.no_grad():
            model.stlm.to_output.weight[0, 0] = float("nan")
        with pytest.raises(
            FloatingPointError, match=r"logits: expected numbers .* of nan for row 0"
        ):
            model.generate(**left_padded(["ab"]), max_new_tokens=2, use_cache=use_cache, **options)

    def test_modes_and_lists_stay(self, model: STLMForCausalLM) -> None:
        inputs, suppressed = left_padded(["ab"]), [65, 66]
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

    @pytest.mark.parametrize("keep", [0, 1])
    def test_a_cache_of_inference_mode_goes_on_outside(
        self, model: STLMForCausalLM, keep: int
    ) -> None:
        ids = left_padded(["ab c"])["input_ids"]
        with torch.inference_mode():
            first = model(ids[:, :-1], use_cache=True, logits_to_keep=keep)
        logits = model(ids[:, -1:], **{CACHE: first[CACHE]}).logits
        assert_same(logits[:, -1], model(ids).logits[:, -1])
