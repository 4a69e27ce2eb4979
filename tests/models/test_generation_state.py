"""Generation leaves nothing behind when it ends, pauses, is closed or fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.cached import varied
from helpers.models import TINY
from torch import Tensor, nn

from stlm_models import STLM, bits_per_byte
from stlm_models.compression.codec import compress
from stlm_models.generation import sampling
from stlm_models.generation.engine import CachedRun
from stlm_models.layers.modes import eval_mode
from stlm_models.layers.transformer import PatchCore

PROMPT = b"ab c, de"


@pytest.fixture(name="model")
def one_model() -> STLM:
    """A model in training, but for a part that its user has frozen."""
    model = varied().train()
    model.core.eval()
    return model


def state_of(model: STLM) -> tuple[object, ...]:
    """All that a caller may rely on."""
    return (
        [module.training for module in model.modules()],
        [(p.requires_grad, p.grad is None, p.is_inference()) for p in model.parameters()],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
    )


def chunks(model: STLM, length: int = 40, **options: Any) -> Iterator[str]:
    return model.stream(PROMPT, max_new_bytes=length, **{"temperature": 0, "seed": 1} | options)


class Failing(nn.Module):
    """A core of the user's own that fails after some calls, as Ctrl-C would."""

    def __init__(self, calls: int, error: BaseException) -> None:
        super().__init__()
        self.inner, self.left, self.error = PatchCore(TINY), calls, error

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.inner(x, cu_seqlens)


class TestState:
    def test_between_two_chunks(self, model: STLM) -> None:
        before = state_of(model)
        for _ in chunks(model):
            assert state_of(model) == before
        assert state_of(model) == before

    def test_a_paused_stream_lets_the_model_train(self, model: STLM) -> None:
        expected = "".join(chunks(model))
        paused = chunks(model)
        text = next(paused)
        loss, _ = model(torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4]))
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()
        assert text + "".join(paused) == expected

    def test_what_the_caller_changes_meanwhile_stays(self, model: STLM) -> None:
        paused = chunks(model)
        next(paused)
        model.eval()
        next(paused)
        assert not model.training
        model.decoder.train()
        list(paused)
        assert [m.training for m in model.children()].count(True) == 1

    @pytest.mark.parametrize("end", ["close", "del", "throw"])
    def test_a_stream_that_is_left(self, model: STLM, end: str) -> None:
        before = state_of(model)
        paused: Any = chunks(model)
        next(paused)
        if end == "close":
            paused.close()
        elif end == "del":
            del paused
        else:
            with pytest.raises(KeyError):
                paused.throw(KeyError())
        assert state_of(model) == before

    @pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
    @pytest.mark.parametrize("calls", [0, 2])
    @pytest.mark.parametrize("name", ["generate", "batch", "stream", "bits", "compress"])
    def test_failures(self, name: str, calls: int, error: BaseException) -> None:
        model = varied(core=Failing(calls, error)).train()
        model.decoder.eval()
        text = b"so many words that the core runs again and again, " * 3
        ways: dict[str, Callable[[], object]] = {
            "generate": lambda: model.generate(PROMPT, max_new_bytes=99, seed=1),
            "batch": lambda: model.generate_batch([PROMPT, b""], max_new_bytes=99, seed=1),
            "stream": lambda: list(chunks(model, 99, temperature=1.0)),
            "bits": lambda: bits_per_byte(model, [text, text], context=8, stride=2),
            "compress": lambda: compress(model, text, checkpoint="00" * 32),
        }
        if name == "bits" and calls:
            pytest.skip("one call reads all of it")
        torch.set_num_threads(2)
        before = state_of(model)
        with pytest.raises(type(error)):
            ways[name]()
        after = state_of(model)
        torch.set_num_threads(1)
        assert after == before

    def test_a_seed_leaves_the_random_state(self, model: STLM) -> None:
        before = torch.get_rng_state()
        model.generate_batch([b"", b"x"], max_new_bytes=3, seed=5, top_p=0.9, top_k=7)
        assert torch.equal(torch.get_rng_state(), before)
        model.generate(b"", max_new_bytes=1)  # draws one, as documented
        assert not torch.equal(torch.get_rng_state(), before)

    def test_a_module_with_a_mode_of_its_own(self) -> None:
        """A frozen norm is one: `train` of it is called, and what it decides for stays."""

        class Frozen(PatchCore):
            def train(self, mode: bool = True) -> Frozen:
                return super().train(False)

        model = varied(core=Frozen(TINY))
        model.train()
        assert not model.core.training
        model.generate(b"", max_new_bytes=2)
        assert model.training
        assert not any(module.training for module in model.core.modules())

    def test_modes_module_by_module(self) -> None:
        model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
        for flags in itertools.product((False, True), repeat=4):
            modules = [model, model[0], model[1], model[1][0]]
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag
            before = [module.training for module in model.modules()]
            with eval_mode(model):
                assert not any(module.training for module in model.modules())
            assert [module.training for module in model.modules()] == before


class TestInferenceMode:
    """A stream may begin in it and go on outside, or the other way round."""

    def test_begun_inside_and_read_outside(self, model: STLM) -> None:
        expected = "".join(chunks(model))
        with torch.inference_mode():
            paused = chunks(model)
            text = next(paused)
        text += next(paused)
        with torch.inference_mode():
            text += next(paused)
        assert text + "".join(paused) == expected

    def test_a_run_of_its_own(self, model: STLM) -> None:
        """Hugging Face's `generate` has one, without `STLM.generate` around it."""
        text, ids = [*PROMPT, 32], torch.tensor([32])
        with torch.inference_mode():
            run = CachedRun(model, [[*PROMPT]])
        run.step(ids, [0])
        with torch.inference_mode():
            run.step(ids, [0])
            run.restart([0], [text])
        expected = CachedRun(model, [text]).hidden
        run.step(ids, [0])
        run.restart([0], [text])
        torch.testing.assert_close(run.hidden, expected)
        assert not run.hidden.requires_grad

    def test_a_model_made_inside(self) -> None:
        expected = "".join(chunks(varied()))
        with torch.inference_mode():
            model = varied()
            paused = chunks(model)
            text = next(paused)
        assert text + "".join(paused) == expected

    def test_what_a_core_keeps_can_be_trained_with(self) -> None:
        class Keeping(PatchCore):
            scale: Tensor | None = None

            def forward(self, x: Tensor, *args: Any) -> Tensor:
                if self.scale is None:
                    self.scale = x.detach().new_ones(x.shape[-1])
                return super().forward(x * self.scale, *args)

        model = varied(core=Keeping(TINY))
        with torch.inference_mode():
            model.generate(PROMPT, max_new_bytes=2)
        loss, _ = model(torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4]))
        loss.backward()


class TestListsOfTheUser:
    def test_stops_and_prompts_stay(self, model: STLM) -> None:
        stops, prompts = [b"\xff\xff", b"q"], [b"a", "b", b""]
        model.generate_batch(prompts, max_new_bytes=5, seed=1, stop=stops)
        assert stops == [b"\xff\xff", b"q"]
        assert prompts == [b"a", "b", b""]

    def test_a_list_that_changes_while_a_stream_is_read(self, model: STLM) -> None:
        expected = "".join(chunks(model))
        stops = [b"\x00never\x00"]
        paused = chunks(model, stop=stops)
        text = next(paused)
        stops += [bytes([byte]) for byte in range(256)]
        assert text + "".join(paused) == expected


def writing(model: STLM, script: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model say what it is told to, from the beginning."""
    steps = itertools.count()

    def sample(x: Tensor, **_: Any) -> Tensor:
        return torch.full((len(x),), script[next(steps) % len(script)])

    monkeypatch.setattr(model.embedding, "sample", sample)


class TestStops:
    @pytest.mark.parametrize(
        ("script", "stops", "expected"),
        [
            (b"xab and more", [b"b", b"ab"], b"x"),  # one byte completes both: the longest
            (b"xabc and more", [b"abc", b"b"], b"xa"),  # the first to be complete
            (b"xabcd", [b"bc", b"abcd"], b"xa"),
            (b"one\r\n\r\ntwo", [b"\n", b"\r\n", b"\r\n\r\n"], b"one"),
            (b"aaaa", [b"aa", b"a"], b""),
            (b"xyz", [b"q", b"zz"], b"xyz"),
            (b"x<end>", [b">", b"<end>", b"d>"], b"x"),
        ],
    )
    def test_their_order_does_not_matter(
        self, script: bytes, stops: list[bytes], expected: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = STLM(TINY)
        for ordered in itertools.permutations(stops):
            writing(model, script, monkeypatch)
            options: Any = {"max_new_bytes": len(script), "stop": list(ordered)}
            assert model.generate(b"", **options) == expected
            writing(model, script, monkeypatch)
            assert "".join(model.stream(b"", **options)) == expected.decode()


LOST = {
    "nan": (float("nan"), "nan"),
    "+inf": (float("inf"), "inf"),
    "all -inf": (float("-inf"), "-inf"),
}


class TestLostLogits:
    """A NaN was drawn as byte 0, without a word."""

    @pytest.mark.parametrize("name", LOST)
    @pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 1}, {"seed": 1, "top_k": 3}])
    def test_they_are_an_error(
        self, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        value, shown = LOST[name]
        model = varied().train()
        logits = model.embedding.logits
        columns = slice(None) if value < 0 else slice(7, 8)

        def lost(x: Tensor, **kwargs: Any) -> Tensor:
            found = logits(x, **kwargs)
            found[..., columns] = value
            return found

        monkeypatch.setattr(model.embedding, "logits", lost)
        message = (
            rf"logits: expected numbers .* got a maximum of {shown} for prompt 0 after 0 bytes"
        )
        for generate in (
            lambda: model.generate(PROMPT, max_new_bytes=3, **options),
            lambda: model.generate_batch([PROMPT, b""], max_new_bytes=3, **options),
            lambda: list(chunks(model, 3, **options)),
        ):
            with pytest.raises(FloatingPointError, match=message):
                generate()
        assert model.training

    @pytest.mark.parametrize("part", ["to_output", "embedding", "core"])
    def test_a_parameter_that_is_nan(self, part: str) -> None:
        model = varied()
        with torch.no_grad():
            next(model.get_submodule(part).parameters()).view(-1)[0] = float("nan")
        with pytest.raises(FloatingPointError, match="got a maximum of nan for prompt 0"):
            model.generate(PROMPT, max_new_bytes=30, seed=1)

    def test_special_ids_and_some_of_minus_infinity_are_none(self) -> None:
        model = varied()
        expected = model.generate(PROMPT, max_new_bytes=3, temperature=0)
        model = varied()
        with torch.no_grad():
            model.embedding.weight[256] = float("nan")  # what no byte is
        assert model.generate(PROMPT, max_new_bytes=3, temperature=0) == expected

    def test_a_row_that_is_done_may_be_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = varied()
        logits, steps = model.embedding.logits, itertools.count()

        def lost(x: Tensor, **kwargs: Any) -> Tensor:
            found = logits(x, **kwargs)
            if next(steps) > 0:
                found[0] = float("nan")
            return found

        free = model.generate_batch([b"x", b"y"], max_new_bytes=4, seed=4)
        monkeypatch.setattr(model.embedding, "logits", lost)
        stop = free[0][:1]
        assert stop not in free[1], "or it would end both"
        texts = model.generate_batch([b"x", b"y"], max_new_bytes=4, seed=4, stop=stop)
        assert texts == [b"", free[1]]

    @pytest.mark.parametrize("scale", [1.0, 1e22, -1e22])
    def test_logits_are_formed_where_their_bounds_leave_a_doubt(self, scale: float) -> None:
        """Products may pass float32's 3e38, and the squares of states alone."""
        embedding = varied().embedding
        embedding.logit_scale = scale
        largest = sampling._largest_norm(embedding)
        for size in (1e-3, 1e17, 1e25):
            hidden = torch.full((2, embedding.embedding_dim), size)
            is_bounded = sampling._are_bounded(hidden, largest)
            assert is_bounded == (size < 1e19 and size * abs(scale) < 1e37)
            if is_bounded:
                assert embedding.logits(hidden).isfinite().all()
        assert not sampling._are_bounded(torch.full((1, 3), float("nan")), 1.0)
        assert not sampling._are_bounded(torch.ones(1, 3).half(), 1.0)
