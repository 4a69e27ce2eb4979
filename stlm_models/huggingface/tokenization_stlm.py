"""Bytes as the tokens of a Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from stlm_models import BOS_ID

BYTES = 256
DOCUMENT = "<|document|>"
"""Spelling of id 256 in text that is shown; in text that is read these are 12 bytes."""
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- for mark in ['\x01', '\x02', '\x03'] -%}"
    "{%- if mark in message['role'] ~ message['content'] -%}"
    "{{- raise_exception('messages: expected text without the marks of the chat, bytes 1 to 3') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- '\x01' ~ message['role'] ~ '\x02' ~ message['content'] ~ '\x03' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\x01assistant\x02' -}}{%- endif -%}"
)
"""Each message in ASCII's own marks: 1 before its role, 2 before its text, 3 behind it."""


class ByteTokenizer(PreTrainedTokenizer):
    """UTF-8 bytes as ids 0 to 255, behind id 256, which begins a document and pads.

    Right padding (the default) trains as it is, with labels of -100 there, such as
    `DataCollatorForLanguageModeling(tokenizer, mlm=False)` sets. Prompts of a batch are padded on
    the left: `tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")`.

    No text ever becomes id 256: what looks like a special token is encoded as its bytes. Id 256 is
    the end of a document too, for what asks for one; no model ever predicts it. A fine-tuned model
    that is to end its texts needs a byte for that: `eos_token="\x03"`, with which the messages of
    the chat template end.

    Args:
        kwargs: of every tokenizer; `model_max_length`, the context, is what `for_model` sets.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, **kwargs: Any) -> None:
        document = AddedToken(DOCUMENT, normalized=False, special=True)
        self._added_tokens_decoder = {BOS_ID: document}
        defaults = {
            "bos_token": document,
            "eos_token": document,
            "pad_token": document,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        super().__init__(**{**defaults, **kwargs})

    @classmethod
    def for_model(cls, model: Any, **kwargs: Any) -> ByteTokenizer:
        """One whose `model_max_length` is the context of a model, an `STLMForCausalLM`."""
        return cls(**{"model_max_length": model.config.max_position_embeddings, **kwargs})

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of a document of any bytes, as `encode` gives them for text."""
        return [BOS_ID, *data]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes among the ids, exactly; `decode` replaces what is not UTF-8."""
        return bytes(i for i in map(int, ids) if i != BOS_ID)

    @property
    def vocab_size(self) -> int:
        return BYTES

    def _add_tokens(
        self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False
    ) -> int:
        self._refuse_new(new_tokens or ())
        return super()._add_tokens(new_tokens, special_tokens)

    def add_special_tokens(
        self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> int:
        """Convert as in transformers, only tokens that there are.

        Raises:
            ValueError: for any other, before anything is changed.
        """
        for value in special_tokens_dict.values():
            self._refuse_new(value if isinstance(value, list | tuple) else [value])
        return super().add_special_tokens(special_tokens_dict, *args, **kwargs)

    def _refuse_new(self, tokens: Iterable[str | AddedToken]) -> None:
        known = self.get_vocab()
        unknown = [str(token) for token in tokens if str(token) not in known]
        if unknown:
            raise ValueError(
                "tokens: expected none beside the 256 bytes and id 256, which are all that text is"
                f" made of, got {unknown}"
            )

    def apply_chat_template(
        self,
        conversation: Any,
        *args: Any,
        tokenize: bool = True,
        padding: Any = False,
        truncation: Any = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Build ids as in transformers; they begin with id 256, as those of every document do.

        Raises:
            ValueError: for return_assistant_tokens_mask, which needs a fast tokenizer.
        """
        if return_assistant_tokens_mask:
            raise ValueError(
                "return_assistant_tokens_mask: expected False, for it needs a fast tokenizer's"
                " offsets, got True"
            )
        text = super().apply_chat_template(conversation, *args, tokenize=False, **kwargs)
        if not tokenize:
            return text
        encoded = self(
            text,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        return encoded if return_dict else encoded["input_ids"]

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(BYTES)} | self._added_tokens_encoder

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Id 256 and the bytes; a pair is one document, such as a prompt and what follows."""
        return [BOS_ID, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 where the id is not a byte."""
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(i >= BYTES) for i in token_ids_0]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros: a pair is one document."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of byte tokens; what is not UTF-8 becomes the replacement character."""
        chunks = (t.encode() if t == DOCUMENT else bytes([ord(t)]) for t in tokens)
        return b"".join(chunks).decode("utf-8", "replace")

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Nothing: bytes need no file."""
        return ()

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        if token == DOCUMENT:
            return BOS_ID
        if len(token) != 1 or ord(token) >= BYTES:
            raise ValueError(f"token: expected one of a byte or {DOCUMENT!r}, got {token!r}")
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < BYTES:
            raise ValueError(f"ids: expected 0 to {BOS_ID}, got {index}")
        return chr(index)


ByteTokenizer.register_for_auto_class("AutoTokenizer")
